//! What must never be seen on the wire.

use memchr::memmem::Finder;

/// 32 random bytes that occur nowhere by chance, and the same as text for protocols that want it.
#[derive(Clone, Debug)]
pub struct Canary {
    bytes: [u8; 32],
    text: String,
}

impl Canary {
    /// A new one.
    pub fn random() -> Self {
        let bytes: [u8; 32] = rand::random();
        let text = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { bytes, text }
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
