//! What people read of the API's answers: shares, times, single fields.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::domain::ids::VersionId;
use crate::domain::run::SequentialEvidence;
use crate::domain::time::Wall;
use crate::domain::weights::Weights;

/// Returns the value at a path from the top of the answer; none where there is none, or null.
///
/// A path is a JSON pointer (RFC 6901), `/weights/1.5.0`, or names with dots between them, `spec.steps.0.weight`. A name that holds a dot
/// itself is then quoted in brackets: `weights["1.5.0"]`.
pub fn at<'a>(answer: &'a Value, path: &str) -> Option<&'a Value> {
    let found = match path.starts_with('/') {
        true => answer.pointer(path),
        false => segments(path)?.into_iter().try_fold(answer, |at, part| match at {
            Value::Array(items) => items.get(part.parse::<usize>().ok()?),
            _ => at.get(part),
        }),
    };
    found.filter(|value| !value.is_null())
}

/// Returns the names of a path with dots and brackets; none where a bracket doesn't end.
fn segments(path: &str) -> Option<Vec<&str>> {
    let (mut names, mut rest) = (Vec::new(), path);
    loop {
        if let Some(inner) = rest.strip_prefix('[') {
            let quote = inner.chars().next().filter(|first| matches!(first, '"' | '\''));
            let (name, after) = match quote {
                Some(quote) => inner[1..].split_once(&format!("{quote}]"))?,
                None => inner.split_once(']')?,
            };
            names.push(name);
            rest = after;
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            names.push(&rest[..end]);
            rest = &rest[end..];
        }
        if rest.is_empty() {
            return Some(names);
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
    }
}

/// Returns a value as a word: texts without quotes, everything else as JSON.
pub fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Returns a split of traffic, `v1=95% v2=5%`.
pub fn weights(weights: &Weights) -> String {
    split(weights.iter().map(|(version, weight)| (version, weight.fraction())))
}

/// Returns the split of traffic of fractions by version.
pub fn shares(shares: &BTreeMap<VersionId, f64>) -> String {
    split(shares.iter().map(|(version, share)| (version, *share)))
}

fn split<'a>(parts: impl Iterator<Item = (&'a VersionId, f64)>) -> String {
    let part = |(version, share): (_, f64)| format!("{version}={}%", (share * 10_000.0).round() / 100.0);
    parts.map(part).collect::<Vec<_>>().join(" ")
}

/// Returns a time with its date and zone, `2026-11-29 12:00:03Z`.
pub fn time(time: Wall) -> String {
    time_of(time.0)
}

/// Returns the time of milliseconds since 1970, with its date and zone.
pub fn time_of(ms: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    humantime::format_rfc3339_seconds(time).to_string().replacen('T', " ", 1)
}

/// Returns the time of day (UTC) of milliseconds since 1970, for a live screen.
pub fn clock_of(ms: u64) -> String {
    time_of(ms)[11..19].to_owned()
}

/// Returns the comparison's reckoning in words.
pub fn evidence(sequential: &SequentialEvidence) -> String {
    let SequentialEvidence { e_value, bound, alpha_spent, .. } = sequential;
    format!("e {e_value:.2} of {bound:.0}, α spent {alpha_spent:.4}")
}

/// Returns the parts that are not empty as one line, with two blanks between them.
pub fn line(parts: impl IntoIterator<Item = String>) -> String {
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::weights::Weight;
    use serde_json::json;

    #[test]
    fn a_field_is_where_its_path_says_and_nowhere_else() {
        let answer = json!({"phase": "Paused", "weights": {"v1": 0.95, "v2": 0.05}, "x": null, "reasons": ["a", "b"]});
        assert_eq!(at(&answer, "phase").map(word), Some("Paused".into()));
        assert_eq!(at(&answer, "weights.v2"), Some(&json!(0.05)));
        assert_eq!(at(&answer, "reasons.1"), Some(&json!("b")));
        for nothing in ["v2", "x", "reasons.2", "weights.v2.v2", ""] {
            assert_eq!(at(&answer, nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_name_with_dots_is_addressed_by_a_pointer_or_in_brackets() {
        let answer = json!({"weights": {"1.5.0": 0.05, "a/b": 1, "v1": 2}, "steps": [{"weight": 3}], "v]": {"x.y": 4}});
        for (path, expected) in [
            ("/weights/1.5.0", 0.05),
            ("/weights/a~1b", 1.0),
            ("/steps/0/weight", 3.0),
            ("weights[\"1.5.0\"]", 0.05),
            ("weights['1.5.0']", 0.05),
            ("weights[v1]", 2.0),
            ("steps[0].weight", 3.0),
            ("[\"v]\"]['x.y']", 4.0),
        ] {
            assert_eq!(at(&answer, path).and_then(Value::as_f64), Some(expected), "{path}");
        }
        for nothing in ["weights.1.5.0", "/weights", "weights[\"1.5.0\"", "weights[", "[]", "/", "steps[1]"] {
            assert_eq!(at(&answer, nothing).filter(|found| !found.is_object()), None, "{nothing}");
        }
    }

    #[test]
    fn weights_are_shown_in_percent() {
        let part = |version, bp| (VersionId::new(version).unwrap(), Weight::from_bp(bp).unwrap());
        let split = Weights::new(vec![part("v1", 8_750), part("v2", 1_250)]).unwrap();
        assert_eq!(weights(&split), "v1=87.5% v2=12.5%");
    }

    #[test]
    fn a_time_is_shown_with_its_date_and_zone() {
        assert_eq!(time(Wall(1_764_381_723_400)), "2025-11-29 02:02:03Z");
        assert_eq!(clock_of(3_723_000), "01:02:03");
    }
}
