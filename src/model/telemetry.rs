//! What a node answers to a batch of reported events.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many events of a batch count, and why others don't.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchReceipt {
    /// Number of events that count.
    pub accepted: u64,
    /// Number of events that don't, by kind of reason.
    pub rejected: BTreeMap<String, u64>,
    /// The first of them.
    pub first_rejected: Vec<RejectedEvent>,
}

/// An event that doesn't count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RejectedEvent {
    /// Its place in the batch, from 0 on.
    pub event: usize,
    /// Why it doesn't count, in words.
    pub error: String,
}
