//! Names that can't be mixed up: each kind of identifier is a type of its own, checked where it is made.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is empty or too long.
    #[error("{what} has {found} characters, expected 1 to {max}")]
    Length {
        /// Which identifier was being made.
        what: &'static str,
        /// Number of characters of the text.
        found: usize,
        /// Maximum number of characters, which this identifier may have.
        max: usize,
    },
    /// A character outside the allowed set.
    #[error("{what} {text:?} contains {found:?}, expected {expected}")]
    Character {
        /// Which identifier was being made.
        what: &'static str,
        /// The rejected text, as it arrived.
        text: String,
        /// The first character that is not allowed.
        found: char,
        /// The allowed set, in words.
        expected: &'static str,
    },
}

const NAME_CHARACTERS: &str = "letters, digits, '.', '_' and '-'";

fn checked(what: &'static str, text: &str, max: usize) -> Result<(), IdError> {
    let found = text.chars().count();
    if found == 0 || found > max {
        return Err(IdError::Length { what, found, max });
    }
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.chars().find(|c| !allowed(c)) {
        Some(found) => Err(IdError::Character { what, text: text.into(), found, expected: NAME_CHARACTERS }),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Returns the identifier, or why `text` is none.
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                let text = text.as_ref();
                checked($what, text, $max)?;
                Ok(Self(text.into()))
            }

            /// Returns the identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "description": concat!("A ", $what, ": 1 to ", $max, " letters, digits, '.', '_' and '-'."),
                    "type": "string", "minLength": 1, "maxLength": $max, "pattern": "^[A-Za-z0-9._-]+$",
                })
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// A node of the cluster, such as `a`; the lowest live one coordinates.
    NodeId, "node id", 32
);
name!(
    /// A service that is rolled out, such as `fraud-model`; one RoutingState each.
    ServiceId, "service name", 63
);
name!(
    /// A version of a service's model or program, such as `v2`.
    VersionId, "version", 63
);
name!(
    /// A transaction: the client's `Idempotency-Key`, or a key the asking node made up.
    TxId, "transaction id", 64
);

/// Which run of a node's disk this is: a fresh random number after a wiped disk, so that a node without its memory
/// can never pass for the node that made the promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The cluster, drawn at random by `aviary cluster init`; frames of another cluster are refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not a cluster id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cluster id {0:?}, expected 32 hexadecimal digits")]
pub struct ClusterIdError(pub String);

impl std::str::FromStr for ClusterId {
    type Err = ClusterIdError;
    fn from_str(text: &str) -> Result<Self, ClusterIdError> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(n) if digits => Ok(Self(n.to_be_bytes())),
            _ => Err(ClusterIdError(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_was_expected_and_found() {
        let error = NodeId::new("no de").unwrap_err().to_string();
        assert_eq!(error, r#"node id "no de" contains ' ', expected letters, digits, '.', '_' and '-'"#);
        assert_eq!(NodeId::new("").unwrap_err().to_string(), "node id has 0 characters, expected 1 to 32");
    }

    #[test]
    fn a_cluster_id_reads_back_as_it_was_printed() {
        let id = ClusterId([7; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("+7070707070707070707070707070707".parse::<ClusterId>().is_err());
    }
}
