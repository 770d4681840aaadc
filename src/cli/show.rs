//! Reads what people want to know out of the API's JSON. Lenient: a field is found wherever a node puts it, and one
//! that is missing is left out.

use std::collections::VecDeque;

use serde_json::Value;

/// Returns the value of the nearest field of that name, breadth first; null fields count as missing.
pub fn seek<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let mut queue = VecDeque::from([value]);
    while let Some(next) = queue.pop_front() {
        match next {
            Value::Object(fields) => match fields.get(name) {
                Some(found) if !found.is_null() => return Some(found),
                _ => queue.extend(fields.values()),
            },
            Value::Array(items) => queue.extend(items),
            _ => {}
        }
    }
    None
}

/// Returns the field at a dotted path (`state.weights.v2`); a single name is sought everywhere.
pub fn field<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let mut parts = path.split('.');
    let first = seek(value, parts.next()?)?;
    parts.try_fold(first, |at, part| match at {
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        _ => at.get(part),
    })
}

/// Returns a value as a word: texts without quotes, everything else as JSON.
pub fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Returns the word of the nearest field of that name; empty when it is missing.
pub fn text(value: &Value, name: &str) -> String {
    seek(value, name).map(word).unwrap_or_default()
}

/// Returns the nearest field of that name as a number.
pub fn number(value: &Value, name: &str) -> Option<u64> {
    seek(value, name)?.as_u64()
}

/// Returns a split of traffic, `v1=95% v2=5%`: from fractions by name, or from pairs in basis points.
pub fn weights(value: &Value) -> String {
    let percent = |share: f64| format!("{}%", (share * 10_000.0).round() / 100.0);
    match value {
        Value::Object(parts) => {
            let parts = parts.iter().filter_map(|(name, w)| Some(format!("{name}={}", percent(w.as_f64()?))));
            parts.collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    }
}

/// Returns the nearest field of that name as a split of traffic.
pub fn weights_of(value: &Value, name: &str) -> String {
    seek(value, name).map(weights).unwrap_or_default()
}

/// Returns the reasons in an answer or event, joined; a single `reason` counts too.
pub fn reasons(value: &Value) -> String {
    let many = seek(value, "reasons").and_then(Value::as_array);
    let many = many.map(|all| all.iter().map(word).collect::<Vec<_>>().join("; ")).unwrap_or_default();
    if many.is_empty() { text(value, "reason") } else { many }
}

/// Returns the time of day (UTC) of milliseconds since 1970, or of an RFC 3339 text.
pub fn clock(value: Option<&Value>) -> String {
    match value {
        Some(Value::Number(ms)) => ms.as_u64().map(clock_of).unwrap_or_default(),
        Some(Value::String(text)) => text.get(11..19).unwrap_or(text).to_owned(),
        _ => String::new(),
    }
}

/// Returns the time of day (UTC), `12:00:03`.
pub fn clock_of(ms: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    humantime::format_rfc3339_seconds(time).to_string()[11..19].to_owned()
}

/// Returns the rows of a list, wherever the answer keeps them: an array, or the first array in an object.
pub fn rows(value: &Value) -> Vec<&Value> {
    let array = match value {
        Value::Array(items) => Some(items),
        Value::Object(fields) => fields.values().find_map(Value::as_array),
        _ => None,
    };
    array.map(|items| items.iter().collect()).unwrap_or_default()
}

/// Returns the comparison's reckoning in words; empty without one.
pub fn evidence(value: &Value) -> String {
    let Some(sequential) = seek(value, "sequential").filter(|sequential| sequential.is_object()) else {
        return String::new();
    };
    let number = |key: &str| sequential[key].as_f64().unwrap_or_default();
    let (e_value, bound, spent) = (number("e_value"), number("bound"), number("alpha_spent"));
    format!("e {e_value:.2} of {bound:.0}, α spent {spent:.4}")
}

/// Returns a verdict in words: a plain word, or the one key of an object and its reason.
pub fn verdict(value: &Value) -> String {
    match seek(value, "verdict") {
        Some(Value::Object(one)) => one.iter().map(|(k, v)| format!("{k}: {}", word(v))).collect(),
        Some(other) => word(other),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_field_is_found_wherever_it_is() {
        let answer = json!({"rollout": {"phase": "Paused"}, "state": {"weights": {"v1": 0.95, "v2": 0.05}}, "x": null});
        assert_eq!(text(&answer, "phase"), "Paused");
        assert_eq!(field(&answer, "state.weights.v2"), Some(&json!(0.05)));
        assert_eq!(field(&answer, "x"), None);
        assert_eq!(field(&json!({"reasons": ["a", "b"]}), "reasons.1"), Some(&json!("b")));
    }

    #[test]
    fn the_nearest_field_counts() {
        assert_eq!(text(&json!({"a": {"slot": 1}, "slot": 2}), "slot"), "2");
    }

    #[test]
    fn weights_are_shown_in_percent() {
        assert_eq!(weights(&json!({"v1": 0.875, "v2": 0.125})), "v1=87.5% v2=12.5%");
    }

    #[test]
    fn times_are_read_as_milliseconds_and_as_text() {
        assert_eq!(clock(Some(&json!(3_723_000))), "01:02:03");
        assert_eq!(clock(Some(&json!("2026-11-20T22:58:56.120Z"))), "22:58:56");
    }
}
