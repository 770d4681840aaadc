//! Rollouts: what each node routes with, what is known of the canary's health, and what was decided.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::domain::assignment::UserAssignment;
use crate::domain::ids::{NodeId, ServiceId, TxId, VersionId};
use crate::domain::plan::{Backend, RolloutSpec};
use crate::domain::rollout::Phase;
use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::SequentialEvidence;
use crate::domain::stats::Stats;
use crate::domain::time::Wall;
use crate::domain::weights::Weights;
use crate::protocol::Mode;
use crate::protocol::record::Slot;

/// One service's routing as a node serves it: answer of `GET /routing/state`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RoutingView {
    /// What the cluster has committed.
    #[serde(flatten)]
    pub routing: RoutingState,
    /// Node that answers.
    pub node: NodeId,
    /// Slot of the last record that concerned the service.
    pub slot: Slot,
    /// Hash of the record that led to the state, in hexadecimal: nodes with equal hashes agree.
    pub hash: String,
    /// What the node is able to do at the moment.
    pub mode: Mode,
    /// Phase of the rollout.
    pub phase: Phase,
    /// Number of the current stage, from 0 on.
    pub stage: usize,
    /// Number of stages that the rollout has.
    pub stages: usize,
    /// Routing version that the rollout began with, which tells it from other rollouts of the service; 0 by a node of an earlier build.
    #[serde(default)]
    pub rollout_generation: u64,
    /// How its users are assigned; the service's own salt by a node of an earlier build.
    #[serde(default)]
    pub assignment: UserAssignment,
    /// Why the rollout is paused or was rolled back; empty where there is no reason.
    pub reason: String,
    /// True while the rollout goes on only when a person says so: it is paused, or at a step that waits for an operator.
    #[serde(default)]
    pub waits_for_operator: bool,
    /// What the rollout waits for; empty when it waits for nothing.
    pub waiting_for: String,
    /// Why this node serves less than the committed share; none when nothing holds it back.
    pub held_back: Option<String>,
    /// Shares that this node serves at the moment, 0.0 to 1.0.
    pub effective_weights: BTreeMap<VersionId, f64>,
    /// How long this node may still serve canary traffic without the majority, in milliseconds; none without a lease.
    pub lease_ms_left: Option<u64>,
    /// The last decrease: true once it is in force everywhere.
    pub enforced: bool,
}

/// One service's evidence as a node and the cluster see it: answer of `GET /health/snapshot`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HealthView {
    /// Service whose answers were counted.
    pub service: ServiceId,
    /// Node that answers.
    pub node: NodeId,
    /// Routing version under which they were counted.
    pub routing_version: u64,
    /// Length of the sliding window, in milliseconds.
    pub window_ms: u64,
    /// Answers of this node's window, by version.
    pub local: BTreeMap<VersionId, AnswerCounts>,
    /// Answers of all nodes' windows, by version.
    pub cluster: BTreeMap<VersionId, AnswerCounts>,
    /// Verdict in a word: promote, hold, pause or rollback; none while there is nothing to judge.
    pub verdict: Option<String>,
    /// Reason of the verdict.
    pub verdict_reason: Option<String>,
    /// Numbers behind a verdict of SEQUENTIAL.
    pub sequential: Option<SequentialEvidence>,
}

/// Counts of one version's answers in a window; rates and latencies are none without answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AnswerCounts {
    /// Number of answers.
    pub count: u64,
    /// Number of them that were errors.
    pub errors: u64,
    /// Share of errors, 0.0 to 1.0.
    pub error_rate: Option<f64>,
    /// Mean latency in milliseconds, without errors.
    pub mean_ms: Option<f64>,
    /// Median latency in milliseconds.
    pub p50_ms: Option<f64>,
    /// Latency in milliseconds that 95 % stay below.
    pub p95_ms: Option<f64>,
    /// Latency in milliseconds that 99 % stay below.
    pub p99_ms: Option<f64>,
}

impl From<&Stats> for AnswerCounts {
    fn from(stats: &Stats) -> Self {
        Self {
            count: stats.count,
            errors: stats.errors,
            error_rate: stats.error_rate(),
            mean_ms: stats.mean_ms(),
            p50_ms: stats.quantile_ms(0.5),
            p95_ms: stats.quantile_ms(0.95),
            p99_ms: stats.quantile_ms(0.99),
        }
    }
}

/// The last rollout of one service: answer of `GET /v1/rollouts/{name}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutView {
    /// Name of the service.
    pub name: ServiceId,
    /// Labels and annotations of the rollout file.
    pub metadata: RolloutMetadata,
    /// Routing as the node that answers serves it.
    #[serde(flatten)]
    pub routing: RoutingView,
    /// Evidence on the canary.
    pub health: HealthView,
    /// Versions and steps, in brief.
    pub spec: RolloutBrief,
    /// What serves as stable; none where a node of an older build answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<Backend>,
    /// True where something of the last rollout may have been served: false where its start was reverted.
    #[serde(default = "yes")]
    pub was_served: bool,
    /// The rollout file that is in force, with every default written out.
    #[schemars(with = "serde_json::Map<String, Value>")]
    pub manifest: Value,
}

const fn yes() -> bool {
    true
}

/// What the author of a rollout file says about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutMetadata {
    /// Labels that users select services by.
    pub labels: BTreeMap<String, String>,
    /// Notes of other tools.
    pub annotations: BTreeMap<String, String>,
}

/// Versions and steps of a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutBrief {
    /// Version that serves before the rollout.
    pub stable: VersionBrief,
    /// Version that the rollout introduces.
    pub canary: VersionBrief,
    /// The steps, each with its weight.
    pub steps: Vec<StepBrief>,
    /// How long the canary is analysed at 100 %, in milliseconds.
    pub bake_ms: u64,
    /// How long canary traffic outlives the last contact with a majority, in milliseconds.
    pub lease_ms: u64,
}

/// A version and its servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionBrief {
    /// Name of the version.
    pub version: VersionId,
    /// Base URLs of its servers; empty where the node answers itself.
    pub urls: Vec<String>,
}

/// A step of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepBrief {
    /// The canary's share, 0.0 to 1.0.
    pub weight: f64,
    /// Minimum time at this step, in milliseconds.
    pub pause_ms: u64,
    /// True if the rollout waits here for an operator.
    pub manual: bool,
}

impl From<&Backend> for VersionBrief {
    fn from(backend: &Backend) -> Self {
        Self { version: backend.version.clone(), urls: backend.urls.clone() }
    }
}

impl From<&RolloutSpec> for RolloutBrief {
    fn from(spec: &RolloutSpec) -> Self {
        let steps = spec.stages.iter().map(|stage| StepBrief {
            weight: stage.weight.fraction(),
            pause_ms: stage.hold_ms,
            manual: stage.manual,
        });
        Self {
            stable: (&spec.stable).into(),
            canary: (&spec.canary).into(),
            steps: steps.collect(),
            bake_ms: spec.bake_ms,
            lease_ms: spec.lease_ms,
        }
    }
}

/// A page of the services' rollouts: answer of `GET /v1/rollouts`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutList {
    /// Rollouts of this page, by the services' names.
    pub rollouts: Vec<RolloutView>,
    /// Where the next page begins: the parameter `after` of its request; none on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<ServiceId>,
}

/// The records that changed a service, or were to: answer of `GET /v1/rollouts/{name}/history`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct History {
    /// The newest records, oldest first.
    pub history: Vec<HistoryEntry>,
    /// First slot that is still in the log of the node that answers: what was decided before is missing. None where nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_from: Option<Slot>,
}

/// One record of a service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryEntry {
    /// Slot of the record.
    pub slot: Slot,
    /// What was decided, such as `Start`, `Promote` or `Refused`. A later build may have more kinds.
    pub kind: String,
    /// Id of the transaction.
    pub txid: TxId,
    /// When its coordinator proposed it.
    pub proposed_at: Wall,
    /// When it was decided.
    pub decided_at: Wall,
    /// Ballot in which it was decided.
    pub ballot: Option<String>,
    /// Routing version after it.
    pub version: Option<u64>,
    /// Committed shares after it.
    pub weights: Option<Weights>,
    /// Phase of the rollout after it.
    pub phase: Option<Phase>,
    /// Who asked for it.
    pub actor: String,
    /// Outcome of the transaction.
    pub status: Option<Status>,
    /// Reasons that were given for it, or by those who refused it.
    pub reasons: Vec<String>,
    /// Nodes that voted Yes, each with what it saw.
    pub yes: Option<BTreeMap<NodeId, String>>,
    /// True if the increase was completed by a successor that couldn't know whether all had voted Yes.
    pub in_doubt: bool,
    /// Hash of the record, in hexadecimal.
    pub hash: String,
}
