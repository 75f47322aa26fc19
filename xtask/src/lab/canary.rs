//! What must never be seen on the wire.

use std::str::FromStr;

use anyhow::{Context as _, Result};
use memchr::memmem::Finder;

/// 32 random bytes that occur nowhere by chance, and the same as text for protocols that want it.
#[derive(Clone, Debug)]
pub struct Canary {
    bytes: [u8; 32],
    text: String,
}

impl Canary {
    /// A new one. It begins like no TLS record: an agent answers those, if only with an alert.
    pub fn random() -> Self {
        let mut bytes = rand::random::<[u8; 32]>();
        bytes[0] |= 0x80;
        Self::from(bytes)
    }

    /// As bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// As 64 hexadecimal digits.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it occurs in `haystack`, in either form.
    pub fn is_in(&self, haystack: &[u8]) -> bool {
        [self.bytes(), self.text.as_bytes()]
            .iter()
            .any(|form| Finder::new(form).find(haystack).is_some())
    }
}

impl From<[u8; 32]> for Canary {
    fn from(bytes: [u8; 32]) -> Self {
        let text = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { bytes, text }
    }
}

/// Of its text: how another process gets to know it.
impl FromStr for Canary {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = || text.get(..64).filter(|_| text.len() == 64);
        let byte = |at| u8::from_str_radix(digits()?.get(at..at + 2)?, 16).ok();
        let bytes: Option<Vec<u8>> = (0..64).step_by(2).map(byte).collect();
        let bytes: Option<[u8; 32]> = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self::from).with_context(|| format!("{text} is not 64 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_is_taken_for_tls() {
        assert!((0..10_000).all(|_| Canary::random().bytes()[0] > 24));
    }

    #[test]
    fn a_canary_is_known_by_its_text() {
        let canary = Canary::random();
        let copy: Canary = canary.text().parse().unwrap();
        assert_eq!(copy.bytes(), canary.bytes());
        for wrong in ["", "00", &canary.text()[2..], &format!("{}00", canary.text())] {
            assert!(wrong.parse::<Canary>().is_err(), "{wrong}");
        }
        assert!(format!("zz{}", &canary.text()[2..]).parse::<Canary>().is_err());
    }
}
