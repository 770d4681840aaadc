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
        f.write_str(&in_words(&with_nearest_key(first.strip_prefix("error: ").unwrap_or(first))))
    }
}

/// What parsers say to programmers, and what is said to people instead.
const WORDS: [(&str, &str); 13] = [
    ("cannot deserialize null into string; use Option<String>", "found nothing, expected a text"),
    (", set DuplicateKeyPolicy in Options if acceptable", ""),
    ("duplicate mapping key:", "found this key twice:"),
    ("invalid boolean (strict mode expects true/false)", "expected true or false"),
    ("invalid bool", "expected true or false"),
    ("invalid floating point value", "expected a number without a unit, such as 5"),
    ("invalid floating point", "expected a number without a unit, such as 5"),
    ("invalid type: unit value", "found nothing"),
    ("invalid type: ", "found "),
    ("invalid value: ", "found "),
    ("unknown variant ", "found "),
    ("a borrowed string", "a text"),
    ("externally tagged enum expected scalar or mapping", "expected a word"),
];

/// Names of Rust's kinds of numbers.
const WHOLE: [&str; 10] = ["u8", "u16", "u32", "u64", "usize", "i8", "i16", "i32", "i64", "isize"];

/// Returns a parser's complaint without the names of functions and types.
pub fn in_words(complaint: &str) -> String {
    if complaint.starts_with("budget breached") {
        return "the file is too large or nested too deeply".into();
    }
    let text = WORDS.iter().fold(complaint.to_string(), |text, (from, to)| text.replace(from, to));
    let (mut words, mut skip) = (Vec::new(), false);
    for word in text.split(' ') {
        let bare = word.trim_end_matches([',', ';', ':']);
        let end = &word[bare.len()..];
        match bare {
            _ if skip => {
                skip = false;
                words.push(format!("mapping{end}"));
            }
            // What a type is called says nothing; that it is a mapping does.
            "struct" | "enum" => {
                words.push("a".into());
                skip = true;
            }
            bare if WHOLE.contains(&bare) => words.push(format!("a whole number{end}")),
            "f32" | "f64" => words.push(format!("a number{end}")),
            _ => words.push(word.to_string()),
        }
    }
    let text = words.join(" ").replace("invalid a ", "expected a ");
    match text.find("invalid ") {
        // The name of a scalar's type alone.
        Some(at) if !text[at..].contains(", ") && text[at..].split(' ').count() == 2 => {
            format!("{}expected another kind of value", &text[..at])
        }
        _ => text,
    }
}

/// Returns the YAML documents of a text that hold anything, each with its line numbers as they are in the whole.
pub fn documents(text: &str) -> Vec<String> {
    let (mut found, mut document) = (Vec::new(), String::new());
    for line in text.lines() {
        let is_end = line.trim_end() == "...";
        let begins = line.trim_end() == "---" || line.starts_with("--- ");
        if !begins && !is_end {
            document.push_str(line);
            document.push('\n');
            continue;
        }
        let lines = document.matches('\n').count();
        found.push(std::mem::take(&mut document));
        document.push_str(&"\n".repeat(lines));
        document.push_str(&if begins { line.replacen("---", "   ", 1) } else { String::new() });
        document.push('\n');
    }
    found.push(document);
    let holds = |line: &str| !matches!(line.trim_start().chars().next(), None | Some('#' | '%'));
    found.retain(|document| document.lines().any(holds));
    found
}

/// Reads a document of YAML (or JSON, which is YAML).
pub fn read_yaml<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
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
    fn no_complaint_names_a_function_or_a_type_of_the_program() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "camelCase")]
        struct Sample {
            #[expect(dead_code, reason = "only its complaints matter")]
            name: String,
            #[expect(dead_code, reason = "only its complaints matter")]
            count: Option<u64>,
            #[expect(dead_code, reason = "only its complaints matter")]
            share: Option<f64>,
            #[expect(dead_code, reason = "only its complaints matter")]
            is_on: Option<bool>,
            #[expect(dead_code, reason = "only its complaints matter")]
            inner: Option<Box<Sample>>,
            #[expect(dead_code, reason = "only its complaints matter")]
            kind: Option<Kind>,
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Kind {
            One,
        }
        let cases = [
            ("name:", "found nothing, expected a text"),
            ("name: a\nname: b", "found this key twice: name"),
            ("name: a\ncount: x", "expected a whole number"),
            ("name: a\ncount: -1", "expected a whole number"),
            ("name: a\ncount: 1.5", "expected a whole number"),
            ("name: a\nshare: 5%", "expected a number"),
            ("name: a\nisOn: 3", "expected true or false"),
            ("name: a\ninner: 3", "expected"),
            ("name: a\ninner: [1]", "expected"),
            ("name: [a]", "expected"),
            ("name: a\nkind: two", "found `two`, expected one of one"),
            ("name: a\nkind: [1]", "expected"),
            ("name: a\nkind: { two: 1 }", "two"),
            ("- 1", "expected"),
            ("", "expected"),
            ("nme: a", "did you mean `name`?"),
            ("name: a\nshare: .inf\ncount: []", "expected"),
            ("name: *x", "anchor"),
        ];
        for (text, expected) in cases {
            let said = read_yaml::<Sample>(text).map(drop).unwrap_err().to_string();
            assert!(said.contains(expected), "{text:?}: {said}");
            let is_type = |word: &str| {
                let word = word.trim_matches(|letter: char| !letter.is_alphanumeric() && letter != '_');
                let camel = word.chars().skip(1).any(char::is_uppercase) && word.chars().any(char::is_lowercase);
                WHOLE.contains(&word)
                    || ["f64", "struct", "enum", "Sample", "Kind"].contains(&word)
                    || (word.contains("from_") || (camel && word != "isOn"))
            };
            let types: Vec<_> = said.split([' ', '<', '>']).filter(|word| is_type(word)).collect();
            assert!(types.is_empty(), "{text:?}: {said}: {types:?}");
        }
    }

    #[test]
    fn documents_that_hold_nothing_do_not_count_and_lines_keep_their_numbers() {
        assert_eq!(documents("a: 1\n---\n"), ["a: 1\n"]);
        assert_eq!(documents("# head\n%YAML 1.2\n---\na: 1\n...\n# end\n--- # nothing\n\n"), ["\n\n   \na: 1\n"]);
        assert_eq!(documents("---\na: 1\n---\nb: '---'\n"), ["   \na: 1\n", "\n\n   \nb: '---'\n"]);
        assert_eq!(documents("--- {a: 1}\n--- {b: 2}"), ["    {a: 1}\n", "\n    {b: 2}\n"]);
        assert_eq!(documents("{\"a\": \"x ---\"}"), ["{\"a\": \"x ---\"}\n"]);
        assert_eq!(documents("# nothing\n---\n\n"), Vec::<String>::new());
        let second = documents("a: 1\n---\nb: [\n").pop().unwrap();
        assert!(read_yaml::<serde_json::Value>(&second).unwrap_err().to_string().contains("line"), "{second:?}");
    }

    #[test]
    fn the_nearest_key_is_named() {
        let complaint = "unknown field `setWieght`, expected one of `setWeight`, `weights`, `pause`";
        assert!(with_nearest_key(complaint).ends_with("did you mean `setWeight`?"));
        assert_eq!(with_nearest_key("unknown field `x`, expected `weights`"), "unknown field `x`, expected `weights`");
    }
}
