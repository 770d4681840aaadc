//! What clients send: the bodies and the query parameters of writes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, ServiceId};

/// What a change of a rollout may be told beside the service's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeDetails {
    /// For `promote`: promote to 100 %, without the steps between.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// For `promote`: promote to the next step without the wait for samples.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_wait: bool,
    /// For `undo`: back to the former version at once, without the steps.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub now: bool,
    /// Reason, recorded in the history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The member that a change of the cluster is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberName {
    /// Name of the node.
    pub node: NodeId,
}

/// A member, and the data that its vote is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberData {
    /// Name of the node.
    pub node: NodeId,
    /// Incarnation of its data, up to 16 hexadecimal digits: `GET /v1/cluster` shows a member's, `aviary cluster join` a new node's.
    #[schemars(regex(pattern = "^[0-9A-Fa-f]{1,16}$"))]
    pub incarnation: String,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceName {
    /// Name of the service.
    pub service: ServiceId,
}

/// What serves a service's stable version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceServers {
    /// Name of the service.
    pub service: ServiceId,
    /// Addresses of the servers, such as `http://host:port`.
    pub servers: Vec<String>,
}

/// When a write is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WriteConsistency {
    /// Once the node that was asked routes with it.
    #[default]
    Node,
    /// Once all live nodes route with it.
    Everywhere,
}

/// What a read has to know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReadConsistency {
    /// What the node that was asked knows.
    #[default]
    Node,
    /// Every write that any node answered before.
    Linearizable,
}
