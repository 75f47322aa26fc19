//! Join tokens: made once, used once, kept only as hashes. See `docs/identity.md`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use mesh_common::join::JoinToken;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::files;

/// How long a token that expired is remembered, to tell the operator so instead of "unknown".
const MEMORY: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a token was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefusal {
    /// Made elsewhere, forged, damaged, or forgotten.
    #[error("this join token is unknown here: make one with `mesh-control token create`")]
    Unknown,
    /// Somebody has used it already.
    #[error(
        "this join token was used already: if that was not this node, somebody else has joined in \
         its name; make a new one with `mesh-control token create`, which shuts the other out"
    )]
    Used,
    /// Too late.
    #[error("this join token has expired: make a new one with `mesh-control token create`")]
    Expired,
    /// That it was used could not be written down, so it was not.
    #[error("the control plane cannot record the use of the join token: {0}")]
    Storage(#[from] std::io::Error),
}

/// What is kept of a token, under the SHA-256 of its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    node: String,
    #[serde(with = "time::serde::rfc3339")]
    expires: OffsetDateTime,
    used: bool,
}

/// Everything that is kept about joining.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Book {
    tokens: BTreeMap<String, Record>,
    /// By node: certificates that became valid before this are void, since the node has joined
    /// again. Seconds since 1970.
    joined: BTreeMap<String, u64>,
}

impl Book {
    fn sweep(&mut self, now: SystemTime) {
        self.tokens.retain(|_, record| now < SystemTime::from(record.expires) + MEMORY);
    }

    fn consume(&mut self, digest: &str, now: SystemTime) -> Result<String, TokenRefusal> {
        let record = self.tokens.get_mut(digest).ok_or(TokenRefusal::Unknown)?;
        if record.used {
            return Err(TokenRefusal::Used);
        }
        if now >= SystemTime::from(record.expires) {
            return Err(TokenRefusal::Expired);
        }
        record.used = true;
        Ok(record.node.clone())
    }
}

/// The tokens and joins, on disk before they count.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    book: Mutex<Book>,
}

impl Tokens {
    /// Reads what was kept.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or was damaged.
    pub fn open(path: PathBuf) -> std::io::Result<Self> {
        let book = match files::read_optional(&path)? {
            Some(text) => serde_json::from_str(&text)?,
            None => Book::default(),
        };
        Ok(Self { path, book: Mutex::new(book) })
    }

    /// Remembers a new token.
    ///
    /// # Errors
    ///
    /// If it cannot be written down.
    pub fn add(
        &self,
        token: &JoinToken,
        expires: SystemTime,
        now: SystemTime,
    ) -> std::io::Result<()> {
        let expires = OffsetDateTime::from(expires);
        let record = Record { node: token.node.clone(), expires, used: false };
        self.change(now, |book| {
            book.tokens.insert(token.digest(), record);
            Ok(())
        })
    }

    /// Uses a token up. When this returns, no other use can succeed, and certificates of that
    /// node that became valid before `not_before` are void.
    ///
    /// # Errors
    ///
    /// Any [`TokenRefusal`].
    pub fn consume(
        &self,
        token: &JoinToken,
        not_before: SystemTime,
        now: SystemTime,
    ) -> Result<String, TokenRefusal> {
        self.change(now, |book| {
            let node = book.consume(&token.digest(), now)?;
            book.joined.insert(node.clone(), seconds(not_before));
            Ok(node)
        })
    }

    /// Whether a node's certificate was made void by a later join of that node.
    pub fn is_void(&self, node: &str, not_before: SystemTime) -> bool {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.joined.get(node).is_none_or(|joined| seconds(not_before) < *joined)
    }

    /// How many tokens can still be used.
    pub fn open_count(&self, now: SystemTime) -> usize {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let open = |record: &&Record| !record.used && now < SystemTime::from(record.expires);
        book.tokens.values().filter(open).count()
    }

    /// Changes the book on disk, then in memory. One at a time, which makes a use atomic; the
    /// lock is held across the write because a use that is not on disk has not happened.
    fn change<T, E: From<std::io::Error>>(
        &self,
        now: SystemTime,
        change: impl FnOnce(&mut Book) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = book.clone();
        let result = change(&mut next)?;
        next.sweep(now);
        let text = serde_json::to_vec(&next).map_err(std::io::Error::from)?;
        files::replace(&self.path, &text)?;
        *book = next;
        Ok(result)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
    }

    fn token(node: &str, secret: u8) -> JoinToken {
        let root = "ab".repeat(32).parse().unwrap();
        JoinToken::new("mesh.example".parse().unwrap(), node, root, [secret; 32]).unwrap()
    }

    struct Fixture {
        dir: tempfile::TempDir,
        tokens: Tokens,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path().join("joins.json")).unwrap();
        tokens.add(&token("n1", 1), now() + HOUR, now()).unwrap();
        Fixture { dir, tokens }
    }

    impl Fixture {
        fn reopened(&self) -> Tokens {
            Tokens::open(self.dir.path().join("joins.json")).unwrap()
        }
    }

    #[test]
    fn a_token_is_good_for_one_use_also_after_a_restart() {
        let fixture = fixture();
        let tokens = fixture.reopened();
        assert_eq!(tokens.open_count(now()), 1);
        assert_eq!(tokens.consume(&token("n1", 1), now(), now()).unwrap(), "n1");
        for tokens in [tokens, fixture.reopened()] {
            let again = tokens.consume(&token("n1", 1), now(), now());
            assert!(matches!(again, Err(TokenRefusal::Used)));
            assert_eq!(tokens.open_count(now()), 0);
        }
    }

    #[test]
    fn no_secret_is_stored() {
        let fixture = fixture();
        let stored = std::fs::read_to_string(fixture.dir.path().join("joins.json")).unwrap();
        assert!(stored.contains(&token("n1", 1).digest()));
        assert!(!stored.contains(&"01".repeat(32)), "{stored}");
    }

    #[test]
    fn unknown_and_renamed_tokens_are_refused() {
        let Fixture { tokens, dir: _dir } = fixture();
        for token in [token("n1", 2), token("n2", 1)] {
            let result = tokens.consume(&token, now(), now());
            assert!(matches!(result, Err(TokenRefusal::Unknown)));
        }
    }

    #[test]
    fn time_runs_out_and_then_is_forgotten() {
        let Fixture { tokens, dir: _dir } = fixture();
        let late = now() + HOUR;
        let result = tokens.consume(&token("n1", 1), late, late);
        assert!(matches!(result, Err(TokenRefusal::Expired)));
        assert_eq!(tokens.open_count(late), 0);
        let later = late + MEMORY;
        tokens.add(&token("n2", 2), later + HOUR, later).unwrap();
        let result = tokens.consume(&token("n1", 1), later, later);
        assert!(matches!(result, Err(TokenRefusal::Unknown)));
    }

    #[test]
    fn of_many_at_once_one_succeeds() {
        let Fixture { tokens, dir: _dir } = fixture();
        let successes: usize = std::thread::scope(|scope| {
            let uses: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| tokens.consume(&token("n1", 1), now(), now()).is_ok()))
                .collect();
            uses.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
        });
        assert_eq!(successes, 1);
    }

    #[test]
    fn joining_again_voids_what_was_before() {
        let Fixture { tokens, dir: _dir } = fixture();
        assert!(tokens.is_void("n1", now()), "no node is known before it joins");
        tokens.consume(&token("n1", 1), now(), now()).unwrap();
        assert!(!tokens.is_void("n1", now()));
        tokens.add(&token("n1", 2), now() + HOUR, now()).unwrap();
        tokens.consume(&token("n1", 2), now() + HOUR / 2, now() + HOUR / 2).unwrap();
        assert!(tokens.is_void("n1", now()));
        assert!(!tokens.is_void("n1", now() + HOUR / 2));
        assert!(tokens.is_void("n2", now() + HOUR));
    }

    #[test]
    fn what_cannot_be_written_down_has_not_happened() {
        let fixture = fixture();
        let path = fixture.dir.path().to_owned();
        std::fs::remove_dir_all(&path).unwrap();
        let result = fixture.tokens.consume(&token("n1", 1), now(), now());
        assert!(matches!(result, Err(TokenRefusal::Storage(_))));
        std::fs::create_dir(&path).unwrap();
        fixture.tokens.consume(&token("n1", 1), now(), now()).unwrap();
    }
}
