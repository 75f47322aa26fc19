//! Strict YAML, with errors of one line that name key and place.

use serde::de::DeserializeOwned;

/// Reads a document.
///
/// # Errors
///
/// What is wrong, where, and what stands there.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_saphyr::from_str(text).map_err(|error: serde_saphyr::Error| {
        let reason = error.without_snippet();
        let line = error
            .location()
            .and_then(|at| text.lines().nth(usize::try_from(at.line()).ok()?.checked_sub(1)?));
        match line.map(|line| line.trim().chars().take(80).collect::<String>()) {
            Some(line) if !line.is_empty() => format!("{reason}: `{line}`"),
            Some(_) | None => reason.to_string(),
        }
    })
}
