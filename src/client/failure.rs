//! How a node can fail to answer, and what is no address of a node.

use std::fmt;
use std::time::Duration;

use crate::http_client::HttpError;

use super::{Address, ApiResponse};

/// Why a text is no address of a node's API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The URL has another scheme.
    #[error("scheme is {found}, expected http")]
    Scheme {
        /// Scheme that the URL has.
        found: String,
    },
    /// The host and port can't be read.
    #[error("found {found:?}, expected http://host:port")]
    Malformed {
        /// What stands in their place.
        found: String,
    },
    /// The URL has a host without a port.
    #[error("{found:?} has no port, expected http://host:port")]
    NoPort {
        /// What the URL has in the place of host and port.
        found: String,
    },
}

/// Why a node gave no answer, or why its event stream ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The request got no answer, or no usable one.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The node ended the event stream.
    #[error("the stream ended")]
    Ended,
    /// The event stream carried nothing, not even a comment.
    #[error("silent for {} s", .within.as_secs())]
    Silent {
        /// How long nothing came before the connection was given up.
        within: Duration,
    },
}

/// A node and its failure.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {error}")]
pub struct NodeFailure {
    /// Address of the node's API port.
    pub address: Address,
    /// Why the node gave no answer.
    pub error: NodeError,
}

impl NodeFailure {
    /// Returns the failure of the node at `address`.
    pub fn new(address: &Address, error: impl Into<NodeError>) -> Self {
        Self { address: address.clone(), error: error.into() }
    }
}

/// A node's answer that refuses an event stream.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {}", .answer.error())]
pub struct NodeRefusal {
    /// Address of the node's API port.
    pub address: Address,
    /// Answer that refuses the stream, with its reason.
    pub answer: ApiResponse,
}

/// No node answered: each of them failed.
#[derive(Debug)]
pub struct Unreachable {
    /// The failure of each node that was tried, in that order.
    pub failed: Vec<NodeFailure>,
}

impl std::error::Error for Unreachable {}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no node answered: ")?;
        for (index, failure) in self.failed.iter().enumerate() {
            write!(f, "{}{failure}", if index == 0 { "" } else { " · " })?;
        }
        Ok(())
    }
}
