//! The rollout file's shape, in Argo Rollouts' and Flagger's words, in both directions: what people write is read by it, and what
//! the log keeps is written by it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::domain::ids::{ServiceId, VersionId};

mod error;
mod read;
mod write;

pub use error::{AnalysisProblem, MetricProblem, StepProblem, UrlError, ValueError};
pub use read::checked_url;

/// The API version of rollout files that this build reads and writes.
const API_VERSION: &str = "aviary/v1";

/// The kind of rollout files.
const KIND: &str = "Rollout";

/// A rollout file, key by key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutFile {
    api_version: String,
    kind: String,
    metadata: MetadataPart,
    spec: SpecPart,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataPart {
    name: ServiceId,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SpecPart {
    stable: SidePart,
    canary: SidePart,
    steps: Vec<StepPart>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bake: Option<BakePart>,
    #[serde(default)]
    routing: RoutingPart,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    analysis: Option<AnalysisPart>,
    #[serde(default)]
    safety: SafetyPart,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress_deadline: Option<Millis>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SidePart {
    version: VersionId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    urls: Vec<String>,
    /// Says that no server answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<AnswerPart>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    health_check: Option<HealthPart>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AnswerPart {
    Node,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthPart {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interval: Option<Millis>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StepPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    set_weight: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights: Option<BTreeMap<VersionId, f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pause: Option<PausePart>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PausePart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    duration: Option<Millis>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BakePart {
    duration: Millis,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RoutingPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash_on: Option<HashPart>,
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    matches: Vec<MatchPart>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mirror: Option<MirrorPart>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MirrorPart {
    percent: f64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HashPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cookie: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    client_address: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatchPart {
    headers: BTreeMap<String, ExactPart>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExactPart {
    exact: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AnalysisPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    window: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metrics: Option<Vec<MetricPart>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_samples: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    no_data: Option<NoDataPart>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_inconclusive: Option<InconclusivePart>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MetricPart {
    name: String,
    #[serde(default)]
    strategy: StrategyPart,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    statistic: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threshold_range: Option<RangePart>,
    /// Classes of statuses that count as errors: the metric `errors` by THRESHOLD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    classes: Option<Vec<ClassPart>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_failure: Option<FailurePart>,
    /// System that stores the metric; none: this cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider: Option<ProviderPart>,
    /// SEQUENTIAL's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allowed_increase: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quantile: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum ClassPart {
    #[serde(rename = "5xx")]
    Server,
    #[serde(rename = "4xx")]
    Client,
    #[serde(rename = "3xx")]
    Redirect,
}

/// The name of a strategy, known or not: an unknown one is named together with its metric.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct StrategyPart(String);

impl Default for StrategyPart {
    fn default() -> Self {
        Self(THRESHOLD.into())
    }
}

const THRESHOLD: &str = "THRESHOLD";
const SEQUENTIAL: &str = "SEQUENTIAL";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RangePart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max: Option<f64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProviderPart {
    prometheus: PrometheusPart,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrometheusPart {
    address: String,
    query: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interval: Option<Millis>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FailurePart {
    Rollback,
    Pause,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NoDataPart {
    Hold,
    Fail,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InconclusivePart {
    after: Millis,
    #[serde(default)]
    then: ThenPart,
}

#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ThenPart {
    #[default]
    Pause,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SafetyPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<Millis>,
    #[serde(default)]
    on_partition: PartitionPart,
}

#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PartitionPart {
    #[default]
    Stable,
    Hold,
}

/// Milliseconds, written as people write durations: `30s`, `5m`, `1h 30m`.
#[derive(Debug, Clone, Copy)]
struct Millis(u64);

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        duration(deserializer).map(Self)
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(Duration::from_millis(self.0)))
    }
}

/// Reads `30s`, `5m`, `1h 30m` as milliseconds.
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let found = humantime::parse_duration(&text);
    let found = found.map_err(|e| serde::de::Error::custom(format!("duration {text:?}: {e}, expected 30s, 5m, 1h")))?;
    u64::try_from(found.as_millis()).map_err(serde::de::Error::custom)
}
