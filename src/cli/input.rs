//! Files that verbs are given: from the disk, or `-` for standard input, with one document or several.

use std::path::Path;

use anyhow::Context as _;

use crate::config;

/// A file's text, and what it is called in errors.
pub struct InputFile {
    /// The file's path, or `standard input`.
    pub name: String,
    /// All that it holds.
    pub text: String,
}

impl InputFile {
    /// Reads a file; `-` is standard input.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let (name, text) = match is_stdin(file) {
            true => ("standard input".to_string(), std::io::read_to_string(std::io::stdin())),
            false => (file.display().to_string(), std::fs::read_to_string(file)),
        };
        let text = text.with_context(|| name.clone())?;
        Ok(Self { name, text })
    }

    /// Returns its YAML documents, each with a name for errors; the whole text where none holds anything.
    pub fn documents(&self) -> Vec<(String, String)> {
        let documents = config::documents(&self.text);
        let name = |index: usize| match documents.len() {
            1 => self.name.clone(),
            _ => format!("{}, document {}", self.name, index + 1),
        };
        match documents.is_empty() {
            true => vec![(self.name.clone(), self.text.clone())],
            false => documents.iter().enumerate().map(|(index, text)| (name(index), text.clone())).collect(),
        }
    }
}

/// Returns true for `-`.
pub fn is_stdin(file: &Path) -> bool {
    file == Path::new("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dash_is_standard_input() {
        assert!(is_stdin(Path::new("-")) && !is_stdin(Path::new("./-")));
    }

    #[test]
    fn each_document_has_a_name_of_its_own() {
        let names = |text: &str| {
            let input = InputFile { name: "r.yaml".into(), text: text.into() };
            input.documents().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names("a: 1\n---\n"), ["r.yaml"]);
        assert_eq!(names("---\na: 1\n---\nb: 1"), ["r.yaml, document 1", "r.yaml, document 2"]);
        assert_eq!(names(""), ["r.yaml"]);
    }
}
