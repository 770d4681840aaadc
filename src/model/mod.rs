//! What the API's JSON looks like: every shape that both a node and its clients use, in both directions.
//!
//! A node answers with these types, and the command line and the record router read its answers as these types. A reader leaves out
//! members that it doesn't know, so that a later build may add some.

pub mod change;
pub mod cluster;
pub mod probe;
pub mod problem;
pub mod request;
pub mod rollout;
pub mod selector;
pub mod telemetry;

pub use change::{ChangeStatus, Changed, Reach};
pub use cluster::{ClusterMember, ClusterOutsider, ClusterView, FeatureView};
pub use probe::{LeaseView, ProbeStatus, ProbeView};
pub use problem::{Problem, ProblemFacts};
pub use request::{
    ChangeDetails, MemberData, MemberName, ReadConsistency, ServiceName, ServiceServers, WriteConsistency,
};
pub use rollout::{HealthView, History, HistoryEntry, RolloutList, RolloutMetadata, RolloutView, RoutingView};
pub use selector::Selector;
pub use telemetry::{BatchReceipt, RejectedEvent};
