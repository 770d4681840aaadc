//! Files that people write, typed once at the edge: unknown keys are refused, units stand in the keys.
//!
//! A complaint names the file, the key, and what was found and expected.

pub mod genesis;
pub mod node;
pub mod redact;
pub mod rollout;
pub mod router;

use std::fmt;

use serde::de::DeserializeOwned;
use strsim::levenshtein;

/// A file of settings that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {problem}")]
pub struct FileError<P> {
    /// Path of the file, or another name for where its text came from.
    pub file: String,
    /// What is wrong with it.
    pub problem: P,
}

impl<P> FileError<P> {
    fn new(file: impl fmt::Display, problem: impl Into<P>) -> Self {
        Self { file: file.to_string(), problem: problem.into() }
    }
}

/// A text that is no YAML, or has unknown or missing keys, or values of another type. It is shown in one line, with the
/// nearest known key.
#[derive(Debug)]
pub struct YamlError(Box<serde_saphyr::Error>);

impl std::error::Error for YamlError {}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let complaint = self.0.to_string();
        let first = complaint.lines().next().unwrap_or_default();
        f.write_str(&with_nearest_key(first.strip_prefix("error: ").unwrap_or(first)))
    }
}

/// Reads YAML (or JSON, which is YAML).
fn read_yaml<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    serde_saphyr::from_str(text).map_err(|error| YamlError(Box::new(error)))
}

/// Returns a parser's complaint about an unknown key with the nearest known one, where the complaint lists them.
fn with_nearest_key(complaint: &str) -> String {
    let Some(at) = complaint.find("unknown field") else { return complaint.to_string() };
    let letters = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let mut words = complaint[at + "unknown field".len()..].split(letters).filter(|word| !word.is_empty());
    let Some(found) = words.next() else { return complaint.to_string() };
    let known = words.filter(|word| !["expected", "one", "of", "or"].contains(word));
    let nearest = known.min_by_key(|known| levenshtein(found, known));
    match nearest.filter(|known| levenshtein(found, known) <= 1 + found.len() / 3) {
        Some(known) => format!("{complaint}; did you mean `{known}`?"),
        None => complaint.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_named() {
        let complaint = "unknown field `setWieght`, expected one of `setWeight`, `weights`, `pause`";
        assert!(with_nearest_key(complaint).ends_with("did you mean `setWeight`?"));
        assert_eq!(with_nearest_key("unknown field `x`, expected `weights`"), "unknown field `x`, expected `weights`");
    }
}
