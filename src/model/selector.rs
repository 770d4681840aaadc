//! A selection of rollouts by their labels.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Requirements on labels, all of which have to be met: `team=fraud,tier!=x,owner`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

/// Requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    /// `key`: the label is there.
    Exists(String),
    /// `key=value`.
    Equals(String, String),
    /// `key!=value`: another value, or no such label.
    Differs(String, String),
}

/// Why a text selects nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("selector has {found:?}, expected key, key=value or key!=value, with commas between them")]
pub struct SelectorError {
    /// The part that can't be read.
    found: String,
}

impl Selector {
    /// Returns true when a rollout with these labels is selected. An empty selector selects every rollout.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Equals(key, value) => labels.get(key) == Some(value),
            Requirement::Differs(key, value) => labels.get(key) != Some(value),
        })
    }
}

impl FromStr for Requirement {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let wrong = || SelectorError { found: text.into() };
        let word = |part: &str| match part.trim() {
            part if part.contains(['=', '!']) => Err(wrong()),
            part => Ok(part.to_string()),
        };
        let (key, requirement): (_, fn(String, String) -> Self) = match (text.split_once("!="), text.split_once('=')) {
            (Some((key, value)), _) => ((key, word(value)?), Self::Differs),
            (None, Some((key, value))) => ((key, word(value.strip_prefix('=').unwrap_or(value))?), Self::Equals),
            (None, None) => ((text, String::new()), |key, _| Self::Exists(key)),
        };
        match word(key.0)? {
            empty if empty.is_empty() => Err(wrong()),
            name => Ok(requirement(name, key.1)),
        }
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, requirement) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            match requirement {
                Requirement::Exists(key) => f.write_str(key)?,
                Requirement::Equals(key, value) => write!(f, "{key}={value}")?,
                Requirement::Differs(key, value) => write!(f, "{key}!={value}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_selects_by_all_its_requirements() {
        let labels = [("team", "fraud"), ("tier", "gold")].map(|(key, value)| (key.into(), value.into())).into();
        let selects = |text: &str| text.parse::<Selector>().unwrap().selects(&labels);
        for text in ["", "team", "team=fraud", "team==fraud", "team = fraud , tier != x", "owner!=x", "team,tier=gold"]
        {
            assert!(selects(text), "{text}");
        }
        for text in ["owner", "team=other", "team!=fraud", "owner=", "team=fraud,tier!=gold"] {
            assert!(!selects(text), "{text}");
        }
    }

    #[test]
    fn a_selector_reads_as_it_is_shown() {
        for text in ["team=fraud,tier!=x,owner", "empty=", ""] {
            assert_eq!(text.parse::<Selector>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_selects_nothing_is_named() {
        for (text, found) in [("=x", "=x"), ("a=b,,c", ""), ("!a", "!a"), ("a=b=c", "a=b=c"), ("a!=b!=c", "a!=b!=c")] {
            assert_eq!(text.parse::<Selector>(), Err(SelectorError { found: found.into() }), "{text}");
        }
    }
}
