//! Files that people write, typed once at the edge: unknown keys are refused, units stand in the keys.

pub mod genesis;
pub mod node;
pub mod rollout;
pub mod router;

use serde::de::DeserializeOwned;
use strsim::levenshtein;

/// Reads YAML (or JSON, which is YAML); a complaint is one line.
fn read_yaml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_saphyr::from_str(text).map_err(|error| {
        let complaint = error.to_string();
        let first = complaint.lines().next().unwrap_or_default();
        with_nearest_key(first.strip_prefix("error: ").unwrap_or(first))
    })
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
