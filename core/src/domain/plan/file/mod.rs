//! The rollout file's shape, in Argo Rollouts' and Flagger's words, in both directions: what people write is read by it, and what
//! the log keeps is written by it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::domain::assignment::HashFunction;
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
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutFile {
    /// Version of the file's format.
    #[schemars(extend("const" = API_VERSION))]
    api_version: String,
    /// Kind of the file.
    #[schemars(extend("const" = KIND))]
    kind: String,
    metadata: MetadataPart,
    spec: SpecPart,
}

/// The service, and what its authors say about it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MetadataPart {
    /// Name of the service.
    name: ServiceId,
    /// Labels that `list --selector` selects services by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    /// Notes of other tools.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// What is rolled out, and how.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SpecPart {
    /// The version that serves before the rollout.
    stable: SidePart,
    /// The version that the rollout introduces.
    canary: SidePart,
    /// Weights and pauses, in order; weights never decrease, and the last one is 100 %.
    steps: Vec<StepPart>,
    /// How long the canary is analysed at 100 % before it becomes stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bake: Option<BakePart>,
    /// Which requests the canary gets.
    #[serde(default)]
    routing: RoutingPart,
    /// What decides whether the canary is healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    analysis: Option<AnalysisPart>,
    /// What happens to canary traffic when a node loses the majority.
    #[serde(default)]
    safety: SafetyPart,
    /// Maximum time without progress, after which the rollout is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress_deadline: Option<Millis>,
}

/// A version and its servers.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SidePart {
    /// Name of the version.
    version: VersionId,
    /// Base URL of its server: `http://host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// Base URLs of its servers, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    urls: Vec<String>,
    /// `node`: no server answers, the nodes do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<AnswerPart>,
    /// How the servers are probed; none: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    health_check: Option<HealthPart>,
}

/// Who answers in the place of servers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum AnswerPart {
    /// The node itself, for tests.
    Node,
}

/// How servers are probed.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HealthPart {
    /// Path of the probe, such as `/healthz`.
    path: String,
    /// Time between two probes of a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interval: Option<Millis>,
}

/// A step: one of `setWeight`, `weights` and `pause`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StepPart {
    /// The canary's share, 0 to 100 percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    set_weight: Option<f64>,
    /// The shares of both versions, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights: Option<BTreeMap<VersionId, f64>>,
    /// A pause at the present weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pause: Option<PausePart>,
}

/// A pause.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PausePart {
    /// How long it is; none: until an operator promotes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    duration: Option<Millis>,
}

/// The time at 100 %.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct BakePart {
    /// How long it is.
    duration: Millis,
}

/// Which requests the canary gets.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RoutingPart {
    /// What a request's version is chosen by; none: each request is assigned at random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash_on: Option<HashPart>,
    /// Requests that always go to the canary; one match is enough.
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    matches: Vec<MatchPart>,
    /// Copies of stable's requests for the canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mirror: Option<MirrorPart>,
    /// How much of the service a node carries at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsPart>,
    /// How long a server that was ejected gets a growing share of its requests; none: all at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    slow_start: Option<Millis>,
    /// Time limits of requests; those that are left out are the node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timeouts: Option<TimeoutsPart>,
    /// Ends a request at its server once an HTTP/1.x client has ended its side of the connection; default false: it is answered.
    /// A stream that an HTTP/2 client resets, and a connection that is reset, end the request in any case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    cancel_on_disconnect: bool,
}

/// How much of a service a node carries at once.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LimitsPart {
    /// Requests of the service at once; none: three quarters of the node's `requests_max`, or all of it for its only service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_requests: Option<u64>,
    /// Requests at each of its servers at once; none: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_requests_per_server: Option<u64>,
    /// Requests that may wait for a place at a version's servers; default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_pending: Option<u64>,
    /// How long each of them may wait; default 1 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pending_timeout: Option<Millis>,
}

/// Time limits of requests.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TimeoutsPart {
    /// Longest wait for the first byte of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_byte: Option<Millis>,
    /// Longest silence within an answer's body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idle: Option<Millis>,
    /// Longest time to the answer's last byte; `0s`: without end. A gRPC request's `grpc-timeout` counts where it is shorter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    total: Option<Millis>,
}

/// Copies of stable's requests that the canary gets; its answers are dropped.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MirrorPart {
    /// Share of stable's requests that are copied, 0 to 100 percent.
    percent: f64,
}

/// What a request's version is chosen by: one of `header`, `cookie` and `clientAddress`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HashPart {
    /// Name of a header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<String>,
    /// Name of a cookie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cookie: Option<String>,
    /// The client's address.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    client_address: bool,
    /// Set the cookie where a client has none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    set: bool,
    /// How long a client keeps the cookie that is set; default: as long as its session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_age: Option<Millis>,
    /// Function that makes a number of the key; default `xxh3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    function: Option<HashFunction>,
    /// Whether each rollout begins with users of its own; default `rollout`, once every member of the cluster knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    salt: Option<SaltPart>,
    /// Slot of the rollout's start, which the cluster writes beside `salt: rollout`. In a file that is applied it is ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    salt_slot: Option<u64>,
}

/// Which users a rollout begins with.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum SaltPart {
    /// Others than the rollouts before it; `retry` keeps them.
    Rollout,
    /// The same ones in each rollout of the service.
    None,
}

/// Requests by their headers, all of which have to match.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MatchPart {
    /// Names of headers, each with the value that matches.
    headers: BTreeMap<String, ExactPart>,
}

/// A value that matches.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ExactPart {
    /// The whole value.
    exact: String,
}

/// What decides whether the canary is healthy.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AnalysisPart {
    /// Length of the window that is judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    window: Option<Millis>,
    /// What is judged; none: errors and latency by their default limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metrics: Option<Vec<MetricPart>>,
    /// Largest probability that SEQUENTIAL rolls a canary back that is no worse than stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    /// Canary answers that a promotion needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_samples: Option<u64>,
    /// What happens when there are no answers to judge: the step holds, or the canary is rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    no_data: Option<NoDataPart>,
    /// What happens when there is no verdict for long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_inconclusive: Option<InconclusivePart>,
}

/// What is judged, and by which limit.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MetricPart {
    /// `errors` or `latency`, or one of them with more after a dash; another name for a metric of `provider`.
    name: String,
    #[serde(default)]
    strategy: StrategyPart,
    /// Statistic of the latency: `mean`, or a quantile such as `p95`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    statistic: Option<String>,
    /// Limits of THRESHOLD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threshold_range: Option<RangePart>,
    /// Classes of statuses that count as errors: the metric `errors` by THRESHOLD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    classes: Option<Vec<ClassPart>>,
    /// What a value beyond the limits leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_failure: Option<FailurePart>,
    /// System that stores the metric; none: this cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider: Option<ProviderPart>,
    /// SEQUENTIAL's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allowed_increase: Option<f64>,
    /// SEQUENTIAL's: the quantile of stable's latency that slow requests are told by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quantile: Option<f64>,
}

/// A class of statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum ClassPart {
    #[serde(rename = "5xx")]
    Server,
    #[serde(rename = "4xx")]
    Client,
    #[serde(rename = "3xx")]
    Redirect,
}

/// The name of a strategy, known or not: an unknown one is named together with its metric.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
struct StrategyPart(String);

impl Default for StrategyPart {
    fn default() -> Self {
        Self(THRESHOLD.into())
    }
}

const THRESHOLD: &str = "THRESHOLD";
const SEQUENTIAL: &str = "SEQUENTIAL";

/// Limits of a value, both included; percent for errors, milliseconds for latency.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RangePart {
    /// Smallest allowed value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    /// Largest allowed value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max: Option<f64>,
}

/// System that stores a metric.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ProviderPart {
    /// A Prometheus server.
    prometheus: PrometheusPart,
}

/// A query of a Prometheus server.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PrometheusPart {
    /// Base URL of the server: `http://host:port`.
    address: String,
    /// PromQL, with `{{service}}`, `{{stable}}`, `{{version}}` and `{{window}}`.
    query: String,
    /// Time between two queries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interval: Option<Millis>,
}

/// What a value beyond its limits leads to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum FailurePart {
    /// All traffic goes back to stable.
    Rollback,
    /// The rollout is paused.
    Pause,
}

/// What happens when there are no answers to judge.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum NoDataPart {
    /// The weight is held.
    Hold,
    /// The canary is rolled back.
    Fail,
}

/// What happens when there is no verdict for long.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct InconclusivePart {
    /// Time without a verdict.
    after: Millis,
    /// What happens then.
    #[serde(default)]
    then: ThenPart,
}

/// What follows.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ThenPart {
    /// The rollout is paused.
    #[default]
    Pause,
}

/// What happens to canary traffic when a node loses the majority.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SafetyPart {
    /// How long canary traffic outlives the last contact with a majority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<Millis>,
    /// Where it goes then.
    #[serde(default)]
    on_partition: PartitionPart,
}

/// Where canary traffic goes when a node loses the majority.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum PartitionPart {
    /// To stable.
    #[default]
    Stable,
    /// It stays at the committed weight.
    Hold,
}

/// Milliseconds, written as people write durations: `30s`, `5m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Millis(u64);

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        duration(deserializer).map(Self)
    }
}

impl JsonSchema for Millis {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "description": "A duration, such as `30s`, `5m` or `1h 30m`.", "type": "string", "minLength": 2 })
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(Duration::from_millis(self.0)))
    }
}

/// Reads `30s`, `5m`, `1h 30m` as milliseconds. Units that look like others or have no fixed length are refused, as `1M` is a month to some
/// and a minute to others.
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || {
        let expected = "a number and one of ms, s, m, h and d, such as 30s, 5m or 1h 30m";
        serde::de::Error::custom(format!("duration {text:?}, expected {expected}"))
    };
    let mut units = text.split(|letter: char| !letter.is_alphabetic()).filter(|unit| !unit.is_empty());
    if units.any(|unit| UNITS_REFUSED.contains(&unit)) {
        return Err(wrong());
    }
    let found = humantime::parse_duration(&text).map_err(|_| wrong())?;
    u64::try_from(found.as_millis()).map_err(|_| wrong())
}

/// What the parser of durations would take for a month, weeks or years. It also knows their whole words, in which durations of months
/// are written down.
const UNITS_REFUSED: [&str; 9] = ["M", "w", "wk", "wks", "week", "weeks", "y", "yr", "yrs"];
