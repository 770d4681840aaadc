//! Formats answers as the node's JSON, as YAML or as a table, with colours only on a terminal.

use std::io::{IsTerminal, Write};

use comfy_table::{Table, presets};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::client::{AnswerError, ApiResponse};
use crate::domain::text::{is_hidden, visible};

/// Format of what a verb prints on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables and lines of text.
    Table,
    /// The node's answer as JSON, unchanged.
    Json,
    /// The node's answer, as YAML.
    Yaml,
}

/// Prints a text; a closed pipe is an error that the program ends quietly on.
pub fn put(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints a line and its line feed to standard output.
pub fn line(text: &str) -> anyhow::Result<()> {
    put(&format!("{text}\n"))
}

/// Returns JSON that means the same, without a character that a terminal obeys; its line feeds and tabs stay.
pub fn json_text(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for letter in json.chars() {
        match is_hidden(letter) && !matches!(letter, '\n' | '\r' | '\t') {
            // All of them are in the first plane, so that one escape is enough.
            true => shown.push_str(&format!("\\u{:04x}", u32::from(letter))),
            false => shown.push(letter),
        }
    }
    shown
}

/// Returns a value as YAML without a character that a terminal obeys, but for line feeds: texts that have one are quoted with escapes.
pub fn yaml_text(value: &Value) -> anyhow::Result<String> {
    let plain = serde_saphyr::to_string(value)?;
    // JSON is YAML, and escapes what YAML's own writer may leave as it is.
    let is_plain = !plain.replace('\n', "").contains(is_hidden);
    Ok(if is_plain { plain } else { format!("{}\n", json_text(&serde_json::to_string_pretty(value)?)) })
}

/// Prints an error's text to standard error, with hidden characters escaped; its lines stay lines.
pub fn error(text: &str) {
    let lines: Vec<_> = text.lines().map(|line| visible(line.to_owned())).collect();
    eprintln!("error: {}", lines.join("\n"));
}

/// Prints an answer's body as JSON or YAML, or (`table`) what the closure makes of it.
pub fn print(format: Format, body: &str, table: impl FnOnce(&Value) -> String) -> anyhow::Result<()> {
    match (format, serde_json::from_str::<Value>(body)) {
        (Format::Json, _) | (_, Err(_)) => line(&json_text(body.trim_end())),
        (Format::Yaml, Ok(value)) => put(&yaml_text(&value)?),
        (Format::Table, Ok(value)) => line(table(&value).trim_end()),
    }
}

/// Prints a node's answer: as it is, or (`table`) what the closure makes of it. A problem is told as an error there.
pub fn answer<T: DeserializeOwned>(
    format: Format,
    answer: &ApiResponse,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    match format {
        Format::Json | Format::Yaml => print(format, &answer.body, |_| String::new()),
        Format::Table => match answer.read() {
            Ok(value) => line(table(&value).trim_end()),
            Err(AnswerError::Problem(problem)) => {
                error(&problem.detail);
                Ok(())
            }
            Err(AnswerError::Shape(why)) => Err(AnswerError::Shape(why).into()),
        },
    }
}

/// Returns a value's name in JSON, such as `fail_safe`.
pub fn name(value: &impl Serialize) -> String {
    serde_json::to_value(value).map(|value| super::show::word(&value)).unwrap_or_default()
}

/// Returns a table with a header, without borders.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Returns a table of facts: a name and what it is, one to a row; rows without a value are left out.
pub fn facts(rows: &[(&str, String)]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    rows.iter().filter(|(_, value)| !value.is_empty()).for_each(|(name, value)| {
        table.add_row([*name, value.as_str()]);
    });
    table.trim_fmt()
}

/// A colour with a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// Green: it succeeded, or is healthy.
    Good,
    /// Yellow: unusual, no action needed yet.
    Odd,
    /// Red: it failed, or is unhealthy.
    Bad,
    /// Dimmed: less important than the rest.
    Faint,
}

/// Returns true when standard output shows colours: a terminal, and NO_COLOR unset or empty.
pub fn colours() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    !refused && std::io::stdout().is_terminal()
}

/// Returns `text` in a tone, or as it is when `on` is false.
pub fn paint(on: bool, tone: Tone, text: &str) -> String {
    let code = match tone {
        Tone::Good => 32,
        Tone::Odd => 33,
        Tone::Bad => 31,
        Tone::Faint => 2,
    };
    if on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_its_meaning_without_what_a_terminal_obeys() {
        let body = "{\n\t\"a\": \"\u{9b}31m\u{202e}\u{7f}\u{2028}é\"}";
        let shown = json_text(body);
        assert!(!shown.replace(['\n', '\t'], "").contains(is_hidden), "{shown:?}");
        assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), serde_json::from_str::<Value>(body).unwrap());
    }

    #[test]
    fn yaml_keeps_its_meaning_without_what_a_terminal_obeys() {
        let value = serde_json::json!({"a": "\u{1b}[2J\u{9b}\u{202e}\u{2066}\u{7f}\u{200f}é", "b\u{1b}": 1});
        let shown = yaml_text(&value).unwrap();
        assert!(!shown.replace('\n', "").contains(is_hidden), "{shown:?}");
        assert_eq!(serde_saphyr::from_str::<Value>(&shown).unwrap(), value);
    }

    #[test]
    fn facts_without_a_value_are_left_out() {
        let found = facts(&[("phase", "Paused".into()), ("reason", String::new()), ("slot", "7".into())]);
        let lines: Vec<_> = found.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines, [["phase", "Paused"], ["slot", "7"]]);
    }

    #[test]
    fn a_server_answer_can_be_shown_as_yaml() {
        let value: Value = serde_json::from_str(r#"{"phase":"Paused","weights":{"v1":0.95},"reasons":["a"]}"#).unwrap();
        let yaml = serde_saphyr::to_string(&value).unwrap();
        let back: Value = serde_saphyr::from_str(&yaml).unwrap();
        assert_eq!(back, value);
    }
}
