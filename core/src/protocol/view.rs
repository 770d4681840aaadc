//! What a node routes with and shows: the committed weight is a ceiling, and a [`Hold`] lowers it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId};
use crate::domain::plan::{Backend, Manifest, UnknownKey};
use crate::domain::rollout::Service;
use crate::domain::run::SequentialEvidence;
use crate::domain::verdict::Verdict;
use crate::domain::window::Evidence;

use super::feature::Feature;
use super::log::record::{Hash, Slot};
use super::message::Membership;

/// What a node as a whole is able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A voter in touch with a majority.
    Normal,
    /// No lease: canary traffic that needs one is off.
    FailSafe,
    /// The node follows the log without a vote.
    Learner,
}

/// What the data plane serves one service by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// Routing version that was committed last.
    pub routing_version: u64,
    /// Version and servers that serve everything else.
    pub stable: Backend,
    /// The canary, and its share at most, in basis points; the share is 0 when something holds it back.
    pub canary: Option<(Backend, u16)>,
    /// Milliseconds that canary traffic outlives the lease's start; none: no lease is needed.
    pub lease_ms: Option<u64>,
    /// Stickiness and matches are the rollout's.
    pub spec: Arc<Manifest>,
    /// Why less than the committed share is served; none when nothing holds it back.
    pub held_back: Option<Hold>,
}

/// Why a node serves less than the committed share. The first that applies is named; [`Hold::InDoubt`] is the last of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// The node is a learner: it may not know what is decided.
    Learner,
    /// The node is cordoned, so that it serves stable only.
    Cordoned,
    /// The rollout has a key that this build doesn't know: it is never half obeyed.
    UnknownKey(UnknownKey),
    /// The node accepted a decrease that it doesn't know to be decided.
    Decreasing,
    /// The node stopped the canary by itself, and why.
    Local(String),
    /// The increase at this slot was decided in doubt: the service is served as before it.
    InDoubt(Slot),
}

impl Hold {
    /// Returns the share in basis points that is left of `weight_bp`.
    pub fn ceiling_bp(&self, weight_bp: u16) -> u16 {
        match self {
            Self::Learner | Self::Cordoned | Self::UnknownKey(_) | Self::Decreasing | Self::Local(_) => 0,
            // The weight is already the one before the increase.
            Self::InDoubt(_) => weight_bp,
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Learner => write!(f, "this node has no vote"),
            Self::Cordoned => write!(f, "this node is cordoned"),
            Self::UnknownKey(why) => why.fmt(f),
            Self::Decreasing => write!(f, "a rollback is being decided"),
            Self::Local(why) => write!(f, "local hold: {why}"),
            Self::InDoubt(slot) => write!(f, "slot {slot} was decided in doubt and is being reverted"),
        }
    }
}

/// One service as this node sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    /// State that the cluster has committed.
    pub service: Service,
    /// The last record that concerned it.
    pub slot: Slot,
    /// Hash of the record that led to the state.
    pub hash: Hash,
    /// What this node may serve of it at this moment.
    pub serving: Serving,
    /// Counts of this node's sliding window.
    pub local: Evidence,
    /// Counts of all nodes' sliding windows.
    pub cluster: Evidence,
    /// What the analysis says, when the canary has traffic.
    pub verdict: Option<Verdict>,
    /// The comparison's reckoning; none without one.
    pub sequential: Option<SequentialEvidence>,
    /// What the rollout waits for, in words; empty when it waits for nothing.
    pub waiting_for: String,
    /// The last decrease: true once every voter obeys it or every lease it could outlive has ended.
    pub enforced: bool,
}

// No figure in it is ever NaN. What is the same is then known without looking into it.
impl Eq for ServiceView {}

/// One member as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberView {
    /// Incarnation whose votes count.
    pub incarnation: Incarnation,
    /// Out of the gate set.
    pub cordoned: bool,
    /// True if this node heard from it lately.
    pub alive: bool,
    /// Its last decided slot, by its last word.
    pub head: Option<Slot>,
    /// Why its votes don't count; none when they do.
    pub counts_not: Option<String>,
}

/// A node that is no member, as this node sees it: one that is to become one, or that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutsiderView {
    /// Incarnation of its data, by its own word.
    pub incarnation: Incarnation,
    /// True if this node heard from it lately.
    pub alive: bool,
    /// Its last decided slot, by its last word.
    pub head: Option<Slot>,
}

/// Everything this node routes with and shows.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Name of this node.
    pub node: NodeId,
    /// Cluster that this node belongs to.
    pub cluster: ClusterId,
    /// This run of its disk.
    pub incarnation: Incarnation,
    /// Voter or learner; whether it holds a lease is the reader's to compare with the clock.
    pub membership: Membership,
    /// Last slot that this node has decided.
    pub head: Slot,
    /// Hash of the record at that slot.
    pub head_hash: Hash,
    /// Whom this node takes for the coordinator.
    pub coordinator: NodeId,
    /// Voters of the cluster, by name.
    pub members: BTreeMap<NodeId, MemberView>,
    /// Nodes that are no members and that this node heard from.
    pub outsiders: BTreeMap<NodeId, OutsiderView>,
    /// The slot that is being decided, as far as this node knows; none while none is.
    pub open: Option<Slot>,
    /// The service that gets the requests that name none; none before the first rollout.
    pub default_service: Option<ServiceId>,
    /// Features that the log made use of.
    pub uses: Vec<Feature>,
    /// Services that the log knows, by name; shared with the views before and after in which none of them changed.
    pub services: Arc<BTreeMap<ServiceId, Arc<ServiceView>>>,
}

impl View {
    /// Returns the view of a node by itself, of one service whose weights nobody changes any more, and no lease ends.
    pub fn fixed(node: NodeId, service: Service) -> Self {
        let (spec, routing) = (service.rollout.spec.clone(), &service.routing);
        let canary = routing.canary_model_id.as_ref().map(|_| (spec.canary.clone(), routing.canary_weight().bp()));
        let serving = Serving {
            routing_version: routing.version,
            stable: service.stable.clone(),
            canary,
            lease_ms: None,
            spec,
            held_back: None,
        };
        let id = routing.service.clone();
        let shown = ServiceView {
            service,
            slot: Slot(0),
            hash: Hash::default(),
            serving,
            local: Evidence::default(),
            cluster: Evidence::default(),
            verdict: None,
            sequential: None,
            waiting_for: String::new(),
            enforced: true,
        };
        Self {
            node: node.clone(),
            cluster: ClusterId([0; 16]),
            incarnation: Incarnation(0),
            membership: Membership::Voter,
            head: Slot(0),
            head_hash: Hash::default(),
            coordinator: node,
            members: BTreeMap::new(),
            outsiders: BTreeMap::new(),
            open: None,
            default_service: Some(id.clone()),
            uses: Vec::new(),
            services: Arc::new(BTreeMap::from([(id, Arc::new(shown))])),
        }
    }
}
