//! Join tokens: how an agent proves which node it is before it has a certificate.
//!
//! The text is `nodemesh-join-1:<trust domain>:<node>:<fingerprint>:<secret>`: the SHA-256 of the
//! control plane's root and a secret of 256 bits, both in 64 digits of lower case hexadecimal. Only
//! the SHA-256 of the text is ever stored, so a changed field makes it another, unknown token.

use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};

use crate::{
    hex,
    spiffe::{SpiffeError, TrustDomain, check_segment},
    svid::Fingerprint,
};

const PREFIX: &str = "nodemesh-join-1";

/// Why a text is no join token. The text itself is never repeated: it may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not of the form above.
    #[error("not a join token: copy the whole line that `mesh-control token create` printed")]
    Form,
    /// A field cannot be read.
    #[error("the join token is damaged, make a new one with `mesh-control token create`: {0}")]
    Field(&'static str),
    /// A name cannot be used.
    #[error(transparent)]
    Name(#[from] SpiffeError),
}

/// Entitles to one certificate for one node, once. `Debug` does not show the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The trust domain that the node joins.
    pub trust_domain: TrustDomain,
    /// The node's name.
    pub node: String,
    /// The root by which the control plane is recognised.
    pub root: Fingerprint,
    secret: [u8; 32],
}

impl JoinToken {
    /// A token with a secret drawn from the system's random generator by the caller.
    ///
    /// # Errors
    ///
    /// [`SpiffeError::Segment`] if the node's name cannot stand in a SPIFFE ID.
    pub fn new(
        trust_domain: TrustDomain,
        node: &str,
        root: Fingerprint,
        secret: [u8; 32],
    ) -> Result<Self, SpiffeError> {
        check_segment(node)?;
        Ok(Self { trust_domain, node: node.to_owned(), root, secret })
    }

    /// The text, secret included: for the operator at creation, and for the control plane.
    pub fn reveal(&self) -> String {
        let Self { trust_domain, node, root, secret } = self;
        format!("{PREFIX}:{trust_domain}:{node}:{root}:{}", hex::encode(secret))
    }

    /// What the control plane keeps of it: 64 digits of hexadecimal.
    pub fn digest(&self) -> String {
        hex::encode(&Sha256::digest(self.reveal()))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = s.trim().split(':').collect();
        let [PREFIX, trust_domain, node, root, secret] = parts[..] else {
            return Err(TokenError::Form);
        };
        let root = root.parse().map_err(TokenError::Field)?;
        let secret =
            hex::decode(secret).ok_or(TokenError::Field("the secret has 64 hexadecimal digits"))?;
        Ok(Self::new(trust_domain.parse()?, node, root, secret)?)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("trust_domain", &self.trust_domain)
            .field("node", &self.node)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        let root = "ab".repeat(32).parse().unwrap();
        JoinToken::new("mesh.example".parse().unwrap(), "node-1", root, [7; 32]).unwrap()
    }

    #[test]
    fn the_text_round_trips() {
        let text = token().reveal();
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!("{text}\n").parse(), Ok(token()), "as read from a file");
    }

    #[test]
    fn every_change_makes_another_token() {
        let other_node = JoinToken { node: "node-2".to_owned(), ..token() };
        let other_secret = JoinToken { secret: [8; 32], ..token() };
        assert_ne!(other_node.digest(), token().digest());
        assert_ne!(other_secret.digest(), token().digest());
    }

    #[test]
    fn damaged_texts_are_refused_without_repeating_them() {
        let text = token().reveal();
        for damaged in [
            "",
            "x",
            &text[1..],
            &text[..text.len() - 1],
            &text.to_uppercase(),
            &text.replace("node-1", "../node"),
            &text.replace("node-1", ""),
            &format!("{text}:x"),
        ] {
            let error = damaged.parse::<JoinToken>().unwrap_err().to_string();
            assert!(!error.contains(&hex::encode(&[7; 32])), "{error}");
        }
    }

    #[test]
    fn debug_hides_the_secret() {
        let other_secret = JoinToken { secret: [8; 32], ..token() };
        assert_eq!(format!("{:?}", token()), format!("{other_secret:?}"));
    }
}
