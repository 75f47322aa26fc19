//! One root follows another, and at no moment does anybody trust too little.
//!
//! 1. The next root is made and trusted, but signs nothing yet.
//! 2. It signs; the one before is still trusted.
//! 3. The one before is trusted no more.
//!
//! Between two steps lies longer than the longest certificate lives: who has not heard of a step by
//! then has no valid certificate either. The Secret is all the state there is, and a step is one
//! write that fails if somebody else has written in between. So replicas need no leader, and one
//! that dies has left nothing half done.

use std::time::{Duration, SystemTime};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use pem::{EncodeConfig, LineEnding, Pem};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::secret::ROOT;

/// The key of the Secret under which the next root waits, with its key.
const NEXT: &str = "next-root.pem";

/// The annotation of the Secret that asks for a new root.
const ROTATE: &str = "nodemesh.io/rotate-root";

/// The annotation of the Secret that says when the last step was done.
const SINCE: &str = "nodemesh.io/rotated-at";

const CERTIFICATE: &str = "CERTIFICATE";

/// What rotation is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// When a root is to be followed by another even if nobody asks.
    pub(super) due: SystemTime,
    /// How long each step must have been in force before the next.
    pub(super) settle: Duration,
}

/// Why a Secret cannot be taken one step further.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// A root is not what was written.
    #[error("its `{0}` is no private key followed by certificates: restore it from a backup")]
    Content(&'static str),
    /// The next root cannot be made.
    #[error("making the next root")]
    Make(#[from] crate::ca::CaError),
}

/// The Secret as the step that is due now leaves it; `None` if none is. `new_root` makes a root:
/// key and certificate in PEM.
pub(super) fn step(
    secret: &Secret,
    rules: Rules,
    now: SystemTime,
    new_root: impl FnOnce() -> Result<String, crate::ca::CaError>,
) -> Result<Option<Secret>, RotationError> {
    // An operator's own CA is the operator's to rotate.
    let Some(root) = parse(secret, ROOT)? else { return Ok(None) };
    let annotations = secret.metadata.annotations.clone().unwrap_or_default();
    let asked = annotations.contains_key(ROTATE);
    let next = parse(secret, NEXT)?;
    let mut after = secret.clone();
    let data = after.data.get_or_insert_default();
    if next.is_none() && root.trusted.is_empty() {
        if now < rules.due && !asked {
            return Ok(None);
        }
        let made = new_root()?;
        let new = Root::parse(made.as_bytes()).ok_or(RotationError::Content(NEXT))?;
        data.insert(ROOT.to_owned(), root.trusting(vec![new.certificate]));
        data.insert(NEXT.to_owned(), ByteString(made.into_bytes()));
    } else {
        let since =
            annotations.get(SINCE).and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
        match since.map(|since| SystemTime::from(since) + rules.settle) {
            Some(settled) if now < settled => return Ok(None),
            Some(_) => {
                match next {
                    Some(next) => {
                        data.insert(ROOT.to_owned(), next.trusting(vec![root.certificate]))
                    }
                    None => data.insert(ROOT.to_owned(), root.trusting(Vec::new())),
                };
                data.remove(NEXT);
            }
            // Nobody knows how long ago: the time begins now.
            None => {}
        }
    }
    let annotations = after.metadata.annotations.get_or_insert_default();
    annotations.remove(ROTATE);
    let stamp = OffsetDateTime::from(now).format(&Rfc3339).unwrap_or_default();
    annotations.insert(SINCE.to_owned(), stamp);
    Ok(Some(after))
}

/// A root with its key, and those that are trusted beside it.
struct Root {
    key: Pem,
    certificate: Pem,
    trusted: Vec<Pem>,
}

impl Root {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut pems = pem::parse_many(text).ok()?.into_iter();
        let (key, certificate) = (pems.next()?, pems.next()?);
        let trusted: Vec<_> = pems.collect();
        let mut certificates = std::iter::once(&certificate).chain(&trusted);
        let is_root = key.tag().ends_with("PRIVATE KEY")
            && certificates.all(|certificate| certificate.tag() == CERTIFICATE);
        is_root.then_some(Self { key, certificate, trusted })
    }

    fn trusting(self, trusted: Vec<Pem>) -> ByteString {
        let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
        let pems = [self.key, self.certificate].into_iter().chain(trusted);
        let text: String = pems.map(|pem| pem::encode_config(&pem, config)).collect();
        ByteString(text.into_bytes())
    }
}

fn parse(secret: &Secret, key: &'static str) -> Result<Option<Root>, RotationError> {
    let found = secret.data.as_ref().and_then(|data| data.get(key));
    found.map(|ByteString(text)| Root::parse(text).ok_or(RotationError::Content(key))).transpose()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    const SETTLE: Duration = Duration::from_secs(100);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    /// Key and certificate, and the certificate alone.
    fn root() -> (String, String) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem().replace("\r\n", "\n");
        (key.serialize_pem().replace("\r\n", "\n") + &certificate, certificate)
    }

    fn secret(root: &str, annotations: &[(&str, &str)]) -> Secret {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let annotations = annotations.iter().map(owned).collect();
        Secret {
            metadata: ObjectMeta { annotations: Some(annotations), ..ObjectMeta::default() },
            data: Some([(ROOT.to_owned(), ByteString(root.as_bytes().to_vec()))].into()),
            ..Secret::default()
        }
    }

    fn text(secret: &Secret, key: &str) -> Option<String> {
        let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
        Some(String::from_utf8(bytes.clone()).unwrap())
    }

    fn go(secret: &Secret, due: u64, now: u64, new: &str) -> Option<Secret> {
        let rules = Rules { due: at(due), settle: SETTLE };
        step(secret, rules, at(now), || Ok(new.to_owned())).unwrap()
    }

    #[test]
    fn a_root_is_followed_by_another_in_three_steps() {
        let ((old, old_certificate), (new, new_certificate)) = (root(), root());
        let steady = secret(&old, &[]);
        assert_eq!(go(&steady, 50, 49, &new), None);

        let announced = go(&steady, 50, 50, &new).unwrap();
        assert_eq!(text(&announced, ROOT).unwrap(), old.clone() + &new_certificate);
        assert_eq!(text(&announced, NEXT).unwrap(), new);
        assert_eq!(go(&announced, 50, 149, "none is made"), None);

        let switched = go(&announced, 50, 150, "none is made").unwrap();
        assert_eq!(text(&switched, ROOT).unwrap(), new.clone() + &old_certificate);
        assert_eq!(text(&switched, NEXT), None);
        assert_eq!(go(&switched, 50, 249, "none is made"), None);

        let retired = go(&switched, 50, 250, "none is made").unwrap();
        assert_eq!(text(&retired, ROOT).unwrap(), new);
        assert_eq!(go(&retired, 1000, 251, "none is made"), None);
    }

    #[test]
    fn who_asks_gets_one_new_root() {
        let ((old, _), (new, _)) = (root(), root());
        let announced = go(&secret(&old, &[(ROTATE, "")]), 1000, 0, &new).unwrap();
        let (switched, asked) = (go(&announced, 1000, 100, "").unwrap(), ROTATE.to_owned());
        let retired = go(&switched, 1000, 200, "").unwrap();
        assert!(!retired.metadata.annotations.as_ref().unwrap().contains_key(&asked));
        assert_eq!(go(&retired, 1000, 900, ""), None);
    }

    #[test]
    fn without_a_time_the_wait_begins_anew() {
        let ((old, _), (_, other)) = (root(), root());
        for annotations in [&[][..], &[(SINCE, "yesterday")]] {
            let lost = secret(&(old.clone() + &other), annotations);
            let stamped = go(&lost, 1000, 500, "").unwrap();
            assert_eq!(stamped.data, lost.data);
            assert_eq!(go(&stamped, 1000, 599, ""), None);
            assert_eq!(text(&go(&stamped, 1000, 600, "").unwrap(), ROOT).unwrap(), old);
        }
    }

    #[test]
    fn what_is_not_ours_or_damaged_is_left_alone() {
        let mut operator = secret("", &[(ROTATE, "")]);
        operator.data = Some([("tls.crt".to_owned(), ByteString(vec![1]))].into());
        assert_eq!(go(&operator, 0, 1, "none is made"), None);
        let (_, certificate) = root();
        for damaged in ["", "x", &certificate] {
            let rules = Rules { due: at(0), settle: SETTLE };
            step(&secret(damaged, &[]), rules, at(1), || panic!("none is made")).unwrap_err();
        }
    }

    #[test]
    fn the_version_that_was_read_is_the_one_that_is_replaced() {
        let ((old, _), (new, _)) = (root(), root());
        let mut steady = secret(&old, &[]);
        steady.metadata.resource_version = Some("7".to_owned());
        let announced = go(&steady, 0, 1, &new).unwrap();
        assert_eq!(announced.metadata.resource_version.as_deref(), Some("7"));
    }
}
