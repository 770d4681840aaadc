//! The cluster as one of its nodes sees it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, ServiceId};
use crate::node::frame::Versions;
use crate::protocol::Mode;
use crate::protocol::record::Slot;

/// Answer of `GET /v1/cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterView {
    /// Id of the cluster, 32 hexadecimal digits.
    pub cluster: String,
    /// Node that answers.
    pub node: NodeId,
    /// Incarnation of its data, 16 hexadecimal digits.
    pub incarnation: String,
    /// `Voter` or `Learner`.
    pub membership: String,
    /// What the node is able to do at the moment.
    pub mode: Mode,
    /// Whom it takes for the coordinator.
    pub coordinator: NodeId,
    /// Last slot that it has decided.
    pub head: Slot,
    /// Hash of the record at that slot, in hexadecimal.
    pub hash: String,
    /// Services with an increase that was decided in doubt, or with a decrease that this node doesn't know to be decided.
    #[serde(default)]
    pub in_doubt: Vec<ServiceId>,
    /// Slot that is being decided, as far as the node knows; none while none is.
    #[serde(default)]
    pub open: Option<Slot>,
    /// Service that gets the requests that name none.
    #[serde(default)]
    pub default_service: Option<ServiceId>,
    /// What not every build knows, and which members it waits for.
    #[serde(default)]
    pub features: Vec<FeatureView>,
    /// Members of the cluster, by name.
    pub members: BTreeMap<NodeId, ClusterMember>,
    /// Nodes that are no members and that the node heard from: those that are to become members, and removed ones.
    #[serde(default)]
    pub outsiders: BTreeMap<NodeId, ClusterOutsider>,
}

/// Something that a release brought and that is used once every member knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FeatureView {
    /// Its name, such as `default-service`.
    pub name: String,
    /// Protocol version that brought it.
    pub protocol: u16,
    /// First release that knows it.
    pub release: String,
    /// True while no member can go back behind that release: the log made use of it, or those of `used_by` do.
    pub used: bool,
    /// Services whose rollout under way makes use of it; empty where the log as a whole does.
    #[serde(default)]
    pub used_by: Vec<ServiceId>,
    /// Members that don't know it yet, each with its build if it told that.
    pub waits_for: BTreeMap<NodeId, Option<String>>,
}

/// A node that is no member, as the node that answers sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterOutsider {
    /// True if the node heard from it lately.
    pub alive: bool,
    /// Its last decided slot, by its last word.
    pub head: Option<Slot>,
    /// Incarnation of its data, 16 hexadecimal digits.
    pub incarnation: String,
    /// Its build, by its own word.
    pub build: Option<String>,
    /// Versions of the control protocol that it speaks.
    pub protocol: Option<Versions>,
}

/// One member as the node that answers sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterMember {
    /// True if the node heard from it lately.
    pub alive: bool,
    /// Its API port, `host:port`, as the file of the node that answers has it; none for that node itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// True if its Yes isn't needed, and it serves stable only.
    pub cordoned: bool,
    /// Its last decided slot, by its last word.
    pub head: Option<Slot>,
    /// Incarnation whose votes count, 16 hexadecimal digits.
    pub incarnation: String,
    /// Why its votes don't count; none when they do.
    pub counts_not: Option<String>,
    /// Its build, by its own word; none until it said so.
    #[serde(default)]
    pub build: Option<String>,
    /// Versions of the control protocol that it speaks.
    #[serde(default)]
    pub protocol: Option<Versions>,
    /// Versions of its formats on disk, by name.
    #[serde(default)]
    pub formats: Option<BTreeMap<String, String>>,
}
