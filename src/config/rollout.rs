//! The rollout file: YAML (or JSON, which is YAML) in Argo Rollouts' and Flagger's words.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use crate::domain::analysis::{Analysis, Limit, Metric, NoData, Statistic};
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::limits::{self, OutOfRange};
use crate::domain::plan::{Backend, HashOn, HealthCheck, Match, OnPartition, RolloutSpec, SpecError, Stage};
use crate::domain::query::Query;
use crate::domain::verdict::OnFailure;
use crate::domain::weights::{Weight, WeightError, Weights};

use super::{FileError, YamlError};

/// A rollout file that can't be used.
pub type RolloutError = FileError<RolloutProblem>;

/// Why a text is no rollout.
#[derive(Debug, thiserror::Error)]
pub enum RolloutProblem {
    /// The text is no YAML, or has unknown or missing keys.
    #[error(transparent)]
    Shape(#[from] YamlError),
    /// The file is of another kind or of another version.
    #[error("{key}: found {found:?}, expected {expected:?}")]
    OtherFile {
        /// Key: `apiVersion` or `kind`.
        key: &'static str,
        /// Value found.
        found: String,
        /// The only value that this program reads.
        expected: &'static str,
    },
    /// A version's server has an address that can't be used.
    #[error("{key}: {problem}")]
    Server {
        /// Key of the version.
        key: &'static str,
        /// What is wrong with the address.
        problem: UrlError,
    },
    /// A step is not allowed.
    #[error("spec.steps: step {number}: {problem}")]
    Step {
        /// Number of the step in the file, from 1.
        number: usize,
        /// What is wrong with the step.
        problem: StepProblem,
    },
    /// The rules of the analysis are not allowed.
    #[error("spec.analysis: {0}")]
    Analysis(#[from] AnalysisProblem),
    /// A name that no header or cookie can have.
    #[error("{key}: header {found:?} is not a header name, expected letters, digits and hyphens")]
    HeaderName {
        /// Key of the name.
        key: &'static str,
        /// Name found.
        found: String,
    },
    /// Requests are hashed on nothing, or on two things.
    #[error("spec.routing.hashOn: expected one of header, cookie and clientAddress: true")]
    HashOn,
    /// The mirrored share is no weight.
    #[error("spec.routing.mirror: {0}")]
    Mirror(WeightError),
    /// The values together are not a valid rollout.
    #[error(transparent)]
    Whole(#[from] SpecError),
}

/// Why a step is not allowed.
#[derive(Debug, thiserror::Error)]
pub enum StepProblem {
    /// A number is no weight, or the weights are no split.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The weights name a version that the rollout does not have.
    #[error("weights name {found}, expected {stable} and {canary}")]
    Version {
        /// Version found.
        found: VersionId,
        /// The rollout's stable version.
        stable: VersionId,
        /// The rollout's canary version.
        canary: VersionId,
    },
    /// The step has none of its three keys, or several.
    #[error("expected one of setWeight, weights and pause")]
    NotOne,
}

/// Why rules of the analysis are not allowed.
#[derive(Debug, thiserror::Error)]
pub enum AnalysisProblem {
    /// A number beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
    /// Two metrics have the same name.
    #[error("two metrics have one name, expected a name for each, such as errors and errors-vs-stable")]
    SameName,
    /// A metric of the cluster's own with a name that says nothing about what is measured.
    #[error("metric {0:?} is unknown, expected errors, latency, or one of them with more after a dash")]
    Unknown(String),
    /// A metric whose values are not allowed.
    #[error("metric {name}: {problem}")]
    Metric {
        /// Name of the metric.
        name: String,
        /// What is wrong with it.
        problem: MetricProblem,
    },
}

/// Why the values of a metric are not allowed.
#[derive(Debug, thiserror::Error)]
pub enum MetricProblem {
    /// A number beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
    /// A word that is none of those that the key knows.
    #[error("{key} is {found:?}, expected {expected}")]
    Word {
        /// Key: `strategy` or `statistic`.
        key: &'static str,
        /// Word found.
        found: String,
        /// The words that the key knows.
        expected: &'static str,
    },
    /// Keys of another strategy or of another kind of metric; names both kinds of keys.
    #[error("{0}")]
    ForeignKeys(&'static str),
    /// A metric of the cluster's own without the one limit that THRESHOLD needs.
    #[error("no thresholdRange with a max alone, expected {{ max: … }}")]
    NoMax,
    /// A metric of another system without any limit.
    #[error("no thresholdRange, expected {{ min: …, max: … }} or one of them")]
    NoRange,
    /// A highest error rate that is no percentage.
    #[error("thresholdRange.max is {0}, expected 0 to 100 percent, two decimals")]
    ErrorRate(f64),
    /// The other system has an address that can't be used.
    #[error("provider: {0}")]
    Provider(#[from] UrlError),
    /// The query to the other system is empty or too long.
    #[error("the provider's query is empty or longer than {max} bytes, expected PromQL", max = limits::QUERY_BYTES_MAX)]
    QueryLength,
    /// The query has a word in braces that nothing is put in place of.
    #[error("the query has {{{{{0}}}}}, expected {{{{service}}}}, {{{{stable}}}}, {{{{version}}}} or {{{{window}}}}")]
    QueryWord(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RolloutFile {
    api_version: String,
    kind: String,
    metadata: RolloutMetadata,
    spec: SpecPart,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RolloutMetadata {
    name: ServiceId,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SpecPart {
    stable: SidePart,
    canary: SidePart,
    steps: Vec<StepPart>,
    #[serde(default)]
    bake: Option<Lasting>,
    #[serde(default)]
    routing: Routing,
    #[serde(default)]
    analysis: Option<AnalysisPart>,
    #[serde(default)]
    safety: Safety,
    #[serde(default, deserialize_with = "maybe_duration")]
    progress_deadline: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SidePart {
    version: VersionId,
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    urls: Vec<String>,
    #[serde(default)]
    health_check: Option<HealthPart>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthPart {
    path: String,
    #[serde(default, deserialize_with = "maybe_duration")]
    interval: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StepPart {
    #[serde(default)]
    set_weight: Option<f64>,
    #[serde(default)]
    weights: Option<BTreeMap<VersionId, f64>>,
    #[serde(default)]
    pause: Option<Pause>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pause {
    #[serde(default, deserialize_with = "maybe_duration")]
    duration: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lasting {
    #[serde(deserialize_with = "duration")]
    duration: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Routing {
    #[serde(default)]
    hash_on: Option<HashPart>,
    #[serde(default, rename = "match")]
    matches: Vec<MatchPart>,
    #[serde(default)]
    mirror: Option<MirrorPart>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MirrorPart {
    percent: f64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HashPart {
    #[serde(default)]
    header: Option<String>,
    #[serde(default)]
    cookie: Option<String>,
    #[serde(default)]
    client_address: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatchPart {
    headers: BTreeMap<String, Exact>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exact {
    exact: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AnalysisPart {
    #[serde(default, deserialize_with = "maybe_duration")]
    window: Option<u64>,
    #[serde(default)]
    metrics: Option<Vec<MetricPart>>,
    #[serde(default)]
    alpha: Option<f64>,
    #[serde(default)]
    min_samples: Option<u64>,
    #[serde(default)]
    no_data: Option<NoDataPart>,
    #[serde(default)]
    on_inconclusive: Option<Inconclusive>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MetricPart {
    name: String,
    #[serde(default = "threshold")]
    strategy: String,
    #[serde(default)]
    statistic: Option<String>,
    #[serde(default)]
    threshold_range: Option<RangePart>,
    #[serde(default)]
    on_failure: Option<FailurePart>,
    /// System that stores the metric; none: this cluster.
    #[serde(default)]
    provider: Option<Provider>,
    #[serde(default)]
    allowed_increase: Option<f64>,
    #[serde(default)]
    quantile: Option<f64>,
}

fn threshold() -> String {
    "THRESHOLD".into()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RangePart {
    #[serde(default)]
    min: Option<f64>,
    #[serde(default)]
    max: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Provider {
    prometheus: PrometheusPart,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrometheusPart {
    address: String,
    query: String,
    #[serde(default, deserialize_with = "maybe_duration")]
    interval: Option<u64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FailurePart {
    Rollback,
    Pause,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NoDataPart {
    Hold,
    Fail,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inconclusive {
    #[serde(deserialize_with = "duration")]
    after: u64,
    #[serde(default)]
    #[expect(dead_code, reason = "pause is all there is; the key says so in the file")]
    then: ThenPart,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ThenPart {
    #[default]
    Pause,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Safety {
    #[serde(default, deserialize_with = "maybe_duration")]
    lease: Option<u64>,
    #[serde(default)]
    on_partition: PartitionPart,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PartitionPart {
    #[default]
    Stable,
    Hold,
}

/// Reads `30s`, `5m`, `1h 30m` as milliseconds.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let found = humantime::parse_duration(&text);
    let found = found.map_err(|e| serde::de::Error::custom(format!("duration {text:?}: {e}, expected 30s, 5m, 1h")))?;
    u64::try_from(found.as_millis()).map_err(serde::de::Error::custom)
}

fn maybe_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    duration(deserializer).map(Some)
}

/// Returns the rollout that `text` describes; errors begin with `file`.
pub fn parse(text: &str, file: &str) -> Result<RolloutSpec, RolloutError> {
    parse_text(text).map_err(|problem| RolloutError::new(file, problem))
}

fn parse_text(text: &str) -> Result<RolloutSpec, RolloutProblem> {
    let parsed: RolloutFile = super::read_yaml(text)?;
    for (key, found, expected) in [("apiVersion", parsed.api_version, "aviary/v1"), ("kind", parsed.kind, "Rollout")] {
        if found != expected {
            return Err(RolloutProblem::OtherFile { key, found, expected });
        }
    }
    let SpecPart { stable, canary, steps, bake, routing, analysis, safety, progress_deadline } = parsed.spec;
    let server = |key| move |problem| RolloutProblem::Server { key, problem };
    let stable = backend(stable).map_err(server("spec.stable"))?;
    let canary = backend(canary).map_err(server("spec.canary"))?;
    let stages = stages(steps, &stable.version, &canary.version)?;
    let analysis = analysis.map_or(Ok(Analysis::default()), self::analysis)?;
    let header = |key, found: &str| {
        http::HeaderName::from_bytes(found.as_bytes())
            .map(|name| name.as_str().to_string())
            .map_err(|_| RolloutProblem::HeaderName { key, found: found.into() })
    };
    let hash_on = routing.hash_on.map(|hash| match (hash.header, hash.cookie, hash.client_address) {
        (Some(name), None, false) => header("spec.routing.hashOn", &name).map(HashOn::Header),
        // A cookie's name is a token, as a header's is, with large and small letters told apart.
        (None, Some(name), false) => header("spec.routing.hashOn", &name).map(|_| HashOn::Cookie(name)),
        (None, None, true) => Ok(HashOn::ClientAddress),
        _ => Err(RolloutProblem::HashOn),
    });
    let mirror = routing.mirror.map_or(Ok(Weight::ZERO), |mirror| Weight::from_percent(mirror.percent));
    let matches = routing.matches.into_iter().map(|part| {
        let headers = part.headers.into_iter();
        let headers = headers.map(|(name, exact)| Ok((header("spec.routing.match", &name)?, exact.exact)));
        Ok(Match { headers: headers.collect::<Result<_, RolloutProblem>>()? })
    });
    let matches = matches.collect::<Result<_, RolloutProblem>>()?;
    let spec = RolloutSpec {
        service: parsed.metadata.name,
        stable,
        canary,
        stages,
        bake_ms: bake.map_or(60_000, |bake| bake.duration),
        hash_on: hash_on.transpose()?,
        matches,
        mirror: mirror.map_err(RolloutProblem::Mirror)?,
        analysis,
        lease_ms: safety.lease.unwrap_or(2_000),
        on_partition: match safety.on_partition {
            PartitionPart::Stable => OnPartition::Stable,
            PartitionPart::Hold => OnPartition::Hold,
        },
        progress_deadline_ms: progress_deadline.unwrap_or(30 * 60 * 1000),
    };
    Ok(spec.checked()?)
}

fn backend(side: SidePart) -> Result<Backend, UrlError> {
    let urls = side.url.into_iter().chain(side.urls).map(|url| checked_url(&url)).collect::<Result<_, _>>()?;
    let health_check =
        side.health_check.map(|part| HealthCheck { path: part.path, interval_ms: part.interval.unwrap_or(5_000) });
    Ok(Backend { version: side.version, urls, health_check })
}

/// An address of a server, given here, that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It is no URL.
    #[error("url {0:?}: {1}, expected http://host:port")]
    Malformed(String, http::uri::InvalidUri),
    /// It has no port, or a user or a fragment.
    #[error("url {0:?} is not a plain address, expected http://host:port")]
    NotPlain(String),
    /// It asks for TLS.
    #[error("url {0:?} is https, expected http: upstream TLS is not available yet")]
    Https(String),
    /// It has no scheme, or an unknown one.
    #[error("url {0:?} has no scheme, expected http://host:port")]
    NoScheme(String),
    /// It has a path or a query.
    #[error("url {0:?} has a path, expected http://host:port: requests keep their own path")]
    HasPath(String),
}

/// Returns a server's address as it is used, or what is wrong with it.
pub fn checked_url(url: &str) -> Result<String, UrlError> {
    let uri: http::Uri = url.parse().map_err(|why| UrlError::Malformed(url.into(), why))?;
    let plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if uri.port_u16().is_none_or(|port| port == 0) || !plain || url.contains('#') {
        return Err(UrlError::NotPlain(url.into()));
    }
    match uri.scheme_str() {
        Some("http" | "h2c") => {}
        Some("https") => return Err(UrlError::Https(url.into())),
        _ => return Err(UrlError::NoScheme(url.into())),
    }
    if uri.path() != "/" && !uri.path().is_empty() || uri.query().is_some() {
        return Err(UrlError::HasPath(url.into()));
    }
    Ok(url.trim_end_matches('/').to_string())
}

/// Steps as their author wrote them, folded into stages: a pause belongs to the weight before it.
fn stages(steps: Vec<StepPart>, stable: &VersionId, canary: &VersionId) -> Result<Vec<Stage>, RolloutProblem> {
    let mut stages: Vec<Stage> = Vec::new();
    for (i, step) in steps.into_iter().enumerate() {
        let wrong = |problem| RolloutProblem::Step { number: i + 1, problem };
        let weight = match (step.set_weight, step.weights, step.pause) {
            (Some(percent), None, None) => Weight::from_percent(percent).map_err(|why| wrong(why.into()))?,
            (None, Some(parts), None) => split(parts, stable, canary).map_err(wrong)?,
            (None, None, Some(pause)) => {
                if stages.is_empty() {
                    stages.push(Stage { weight: Weight::ZERO, hold_ms: 0, manual: false });
                }
                let stage = stages.last_mut().expect("a stage just pushed");
                match pause.duration {
                    Some(ms) => stage.hold_ms = stage.hold_ms.saturating_add(ms),
                    None => stage.manual = true,
                }
                continue;
            }
            _ => return Err(wrong(StepProblem::NotOne)),
        };
        stages.push(Stage { weight, hold_ms: 0, manual: false });
    }
    if stages.last().is_some_and(|last| last.weight < Weight::FULL) {
        stages.push(Stage { weight: Weight::FULL, hold_ms: 0, manual: false });
    }
    Ok(stages)
}

fn split(parts: BTreeMap<VersionId, f64>, stable: &VersionId, canary: &VersionId) -> Result<Weight, StepProblem> {
    let parts: Result<Vec<_>, WeightError> =
        parts.into_iter().map(|(version, percent)| Ok((version, Weight::from_percent(percent)?))).collect();
    let weights = parts.and_then(Weights::new)?;
    if let Some((found, _)) = weights.iter().find(|(version, _)| version != stable && version != canary) {
        let (found, stable, canary) = (found.clone(), stable.clone(), canary.clone());
        return Err(StepProblem::Version { found, stable, canary });
    }
    Ok(weights.of(canary))
}

fn analysis(part: AnalysisPart) -> Result<Analysis, AnalysisProblem> {
    let default = Analysis::default();
    let (metrics, queries) = match part.metrics {
        Some(parts) => {
            let (mut metrics, mut queries) = (Vec::new(), Vec::new());
            for mut part in parts {
                match part.provider.take() {
                    None => metrics.push(metric(part)?),
                    Some(provider) => {
                        let name = part.name.clone();
                        let query = query(part, provider.prometheus);
                        queries.push(query.map_err(|problem| AnalysisProblem::Metric { name, problem })?);
                    }
                }
            }
            (metrics, queries)
        }
        None => (default.metrics, Vec::new()),
    };
    let names = metrics.iter().map(|metric| &metric.name).chain(queries.iter().map(|query| &query.name));
    let names: BTreeSet<&String> = names.collect();
    if names.len() < metrics.len() + queries.len() {
        return Err(AnalysisProblem::SameName);
    }
    let alpha = part.alpha.unwrap_or(f64::from(default.alpha_ppm) / 1e6);
    limits::ALPHA.check(alpha)?;
    Ok(Analysis {
        alpha_ppm: (alpha * 1e6).round() as u32,
        window_ms: part.window.unwrap_or(default.window_ms),
        min_samples: part.min_samples.unwrap_or(default.min_samples),
        metrics,
        queries,
        no_data: match part.no_data {
            Some(NoDataPart::Fail) => NoData::Fail,
            Some(NoDataPart::Hold) | None => NoData::Hold,
        },
        inconclusive_after_ms: part.on_inconclusive.map(|inconclusive| inconclusive.after),
    })
}

fn metric(part: MetricPart) -> Result<Metric, AnalysisProblem> {
    let name = part.name.clone();
    let kind = name.split('-').next().unwrap_or_default();
    if kind != "errors" && kind != "latency" {
        return Err(AnalysisProblem::Unknown(name));
    }
    let metric = match part.strategy.as_str() {
        "THRESHOLD" => threshold_metric(part),
        "SEQUENTIAL" => sequential_metric(part),
        _ => {
            let (key, found, expected) = ("strategy", part.strategy, "THRESHOLD or SEQUENTIAL");
            Err(MetricProblem::Word { key, found, expected })
        }
    };
    metric.map_err(|problem| AnalysisProblem::Metric { name, problem })
}

/// A metric that a Prometheus keeps.
fn query(part: MetricPart, provider: PrometheusPart) -> Result<Query, MetricProblem> {
    let MetricPart { name, strategy, statistic, threshold_range, on_failure, allowed_increase, quantile, .. } = part;
    let PrometheusPart { address, query: template, interval } = provider;
    if strategy != "THRESHOLD" || statistic.is_some() || allowed_increase.is_some() || quantile.is_some() {
        return Err(MetricProblem::ForeignKeys(
            "a provider's metric has a thresholdRange and no strategy, statistic, allowedIncrease or quantile",
        ));
    }
    let Some(RangePart { min, max }) = threshold_range.filter(|range| range.min.is_some() || range.max.is_some())
    else {
        return Err(MetricProblem::NoRange);
    };
    let micro = |bound: f64| limits::QUERY_BOUND.check(bound).map(|bound| (bound * 1e6).round() as i64);
    let (min, max) = (min.map(micro).transpose()?, max.map(micro).transpose()?);
    let address = checked_url(&address)?;
    if template.trim().is_empty() || template.len() > limits::QUERY_BYTES_MAX {
        return Err(MetricProblem::QueryLength);
    }
    let words = ["service", "stable", "version", "window"];
    let mut rest = template.as_str();
    while let Some((_, after)) = rest.split_once("{{") {
        let (word, after) = after.split_once("}}").unwrap_or((after, ""));
        if !words.contains(&word.trim()) {
            return Err(MetricProblem::QueryWord(word.into()));
        }
        rest = after;
    }
    let on_failure = match on_failure {
        Some(FailurePart::Pause) => OnFailure::Pause,
        Some(FailurePart::Rollback) | None => OnFailure::Rollback,
    };
    let interval_ms = interval.unwrap_or(10_000);
    Ok(Query { name, address, template: template.trim().into(), interval_ms, min, max, on_failure })
}

/// Default `allowedIncrease`: 0.5 % of all answers for errors, 10 % for the 95th percentile.
const INCREASES: (f64, f64) = (0.005, 0.1);

fn sequential_metric(part: MetricPart) -> Result<Metric, MetricProblem> {
    let MetricPart { name, statistic, threshold_range, on_failure, allowed_increase, quantile, .. } = part;
    if statistic.is_some() || threshold_range.is_some() || on_failure.is_some() {
        return Err(MetricProblem::ForeignKeys(
            "statistic, thresholdRange and onFailure are THRESHOLD's, expected allowedIncrease and quantile",
        ));
    }
    let errors = name.starts_with("errors");
    let increase = allowed_increase.unwrap_or(if errors { INCREASES.0 } else { INCREASES.1 });
    let allowed = if errors { limits::ERRORS_INCREASE } else { limits::LATENCY_INCREASE };
    allowed.check(increase)?;
    let increase_ppm = (increase * 1e6).round() as u32;
    if errors {
        return match quantile {
            Some(_) => Err(MetricProblem::ForeignKeys("quantile is for latency, expected allowedIncrease alone")),
            None => Ok(Metric { name, limit: Limit::ErrorsVsStable { increase_ppm }, on_failure: OnFailure::Rollback }),
        };
    }
    let quantile = quantile.unwrap_or(0.95);
    limits::QUANTILE.check(quantile)?;
    let limit = Limit::LatencyVsStable { quantile_bp: (quantile * 1e4).round() as u16, increase_ppm };
    Ok(Metric { name, limit, on_failure: OnFailure::Rollback })
}

fn threshold_metric(part: MetricPart) -> Result<Metric, MetricProblem> {
    let MetricPart { name, statistic, threshold_range, on_failure, allowed_increase, quantile, .. } = part;
    if allowed_increase.is_some() || quantile.is_some() {
        return Err(MetricProblem::ForeignKeys(
            "allowedIncrease and quantile are SEQUENTIAL's, expected thresholdRange",
        ));
    }
    let Some(RangePart { min: None, max: Some(max) }) = threshold_range else {
        return Err(MetricProblem::NoMax);
    };
    let (limit, default) = if name.starts_with("errors") {
        if statistic.is_some() {
            return Err(MetricProblem::ForeignKeys("statistic is for latency, expected thresholdRange alone"));
        }
        let max_bp = Weight::from_percent(max).map_err(|_| MetricProblem::ErrorRate(max))?;
        (Limit::ErrorRate { max_bp: max_bp.bp() }, OnFailure::Rollback)
    } else {
        let statistic = match statistic.as_deref() {
            None | Some("mean") => Statistic::Mean,
            Some("p50") => Statistic::Quantile(5_000),
            Some("p95") => Statistic::Quantile(9_500),
            Some("p99") => Statistic::Quantile(9_900),
            Some(other) => {
                let (key, found, expected) = ("statistic", other.into(), "mean, p50, p95 or p99");
                return Err(MetricProblem::Word { key, found, expected });
            }
        };
        limits::LATENCY_MAX.check(max)?;
        (Limit::Latency { statistic, max_us: (max * 1000.0) as u64 }, OnFailure::Pause)
    };
    let on_failure = match on_failure {
        Some(FailurePart::Rollback) => OnFailure::Rollback,
        Some(FailurePart::Pause) => OnFailure::Pause,
        None => default,
    };
    Ok(Metric { name, limit, on_failure })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
apiVersion: aviary/v1
kind: Rollout
metadata: { name: fraud-model }
spec:
  stable: { version: v1, url: "http://127.0.0.1:9101" }
  canary: { version: v2, urls: ["http://127.0.0.1:9102/", "http://127.0.0.1:9103"] }
  steps:
    - pause: {}
    - setWeight: 5
    - pause: { duration: 30s }
    - pause: { duration: 1m }
    - weights: { v1: 80, v2: 20 }
    - pause: {}
  bake: { duration: 10s }
  routing:
    hashOn: { header: X-User-ID }
    match: [ { headers: { X-Canary: { exact: always } } } ]
  analysis:
    window: 30s
    metrics:
      - { name: errors, strategy: THRESHOLD, thresholdRange: { max: 2.5 }, onFailure: rollback }
      - { name: latency, statistic: p95, thresholdRange: { max: 250 } }
    minSamples: 200
    noData: fail
    onInconclusive: { after: 10m, then: pause }
  safety: { lease: 3s, onPartition: hold }
  progressDeadline: 20m
"#;

    fn complaint(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "the case changes something");
        parse(&GOOD.replacen(from, to, 1), "r.yaml").unwrap_err().to_string()
    }

    #[test]
    fn a_whole_file_reads_as_it_was_meant() {
        let spec = parse(GOOD, "r.yaml").unwrap();
        let stages: Vec<_> = spec.stages.iter().map(|s| (s.weight.bp(), s.hold_ms, s.manual)).collect();
        assert_eq!(stages, [(0, 0, true), (500, 90_000, false), (2000, 0, true), (10_000, 0, false)]);
        assert_eq!(spec.canary.urls, ["http://127.0.0.1:9102", "http://127.0.0.1:9103"]);
        assert_eq!(spec.hash_on, Some(HashOn::Header("x-user-id".into())));
        let routed = |from: &str, to: &str| parse(&GOOD.replacen(from, to, 1), "r.yaml").unwrap();
        assert_eq!(routed("header: X-User-ID", "cookie: Sid").hash_on, Some(HashOn::Cookie("Sid".into())));
        assert_eq!(routed("header: X-User-ID", "clientAddress: true").hash_on, Some(HashOn::ClientAddress));
        assert_eq!(routed("match: [", "mirror: { percent: 12.5 }\n    match: [").mirror.bp(), 1_250);
        let well = routed("version: v1,", "version: v1, healthCheck: { path: /ok, interval: 2s },").stable.health_check;
        assert_eq!(well, Some(HealthCheck { path: "/ok".into(), interval_ms: 2_000 }));
        assert_eq!(spec.matches[0].headers, [("x-canary".to_string(), "always".to_string())]);
        assert_eq!((spec.lease_ms, spec.bake_ms, spec.progress_deadline_ms), (3_000, 10_000, 1_200_000));
        assert_eq!(spec.on_partition, OnPartition::Hold);
        assert_eq!(spec.analysis.metrics[0].limit, Limit::ErrorRate { max_bp: 250 });
        assert_eq!(
            spec.analysis.metrics[1].limit,
            Limit::Latency { statistic: Statistic::Quantile(9_500), max_us: 250_000 }
        );
        assert_eq!(spec.analysis.inconclusive_after_ms, Some(600_000));
    }

    #[test]
    fn a_canary_may_be_compared_with_stable() {
        let metric = "{ name: latency, statistic: p95, thresholdRange: { max: 250 } }";
        let compared = "{ name: latency-vs-stable, strategy: SEQUENTIAL, quantile: 0.9, allowedIncrease: 0.05 }";
        let text = GOOD.replace(metric, compared).replace("minSamples: 200", "alpha: 0.02");
        let analysis = parse(&text, "r.yaml").unwrap().analysis;
        let limit = Limit::LatencyVsStable { quantile_bp: 9_000, increase_ppm: 50_000 };
        assert_eq!((analysis.metrics[1].limit, analysis.alpha_ppm), (limit, 20_000));
        let policy = analysis.sequential(7_200_000).unwrap();
        assert_eq!((policy.errors_share, policy.alpha, policy.horizon_seconds), (0.0, 0.02, 10_800.0));
        assert!(
            complaint(metric, "{ name: errors-vs-stable, strategy: SEQUENTIAL, quantile: 0.9 }")
                .contains("is for latency")
        );
        assert!(
            complaint(metric, "{ name: latency-p, strategy: SEQUENTIAL, allowedIncrease: 0 }")
                .contains("expected 0.0001 to 10")
        );
        assert_eq!(parse(GOOD, "r.yaml").unwrap().analysis.sequential(1), None);
    }

    #[test]
    fn a_mistake_names_what_was_found_and_expected() {
        let found = complaint("setWeight: 5", "setWieght: 5");
        assert!(found.contains("setWieght") && found.ends_with("did you mean `setWeight`?"), "{found}");
        assert!(found.contains("line 10"), "{found}");
        assert_eq!(
            complaint("{ v1: 80, v2: 20 }", "{ v1: 70, v2: 20 }"),
            "r.yaml: spec.steps: step 5: weights sum to 9000 bp, expected 10000 bp"
        );
        assert_eq!(
            complaint("setWeight: 5", "setWeight: 120"),
            "r.yaml: spec.steps: step 2: weight is 120 %, expected 0 to 100 with at most two decimals"
        );
        assert_eq!(
            complaint("setWeight: 5", "setWeight: 50"),
            "r.yaml: step weight 20% follows 50%, expected weights that never decrease"
        );
        assert!(complaint("duration: 30s", "duration: 30 parsecs").contains("30 parsecs"));
        assert!(complaint("http://127.0.0.1:9101", "https://127.0.0.1:9101").contains("is https, expected http"));
        assert!(
            complaint("strategy: THRESHOLD", "strategy: SEQUENTIAL")
                .contains("thresholdRange and onFailure are THRESHOLD's")
        );
        assert!(
            complaint("strategy: THRESHOLD", "strategy: GUESS").contains("\"GUESS\", expected THRESHOLD or SEQUENTIAL")
        );
        assert!(
            complaint("minSamples: 200", "minSamples: 200\n    alpha: 2")
                .contains("alpha is 2, expected 0.0001 to 0.5")
        );
        assert!(complaint("name: errors, strategy", "name: latency, strategy").contains("two metrics have one name"));
        assert!(complaint("name: latency", "name: cpu").contains("metric \"cpu\" is unknown"));
        assert_eq!(
            complaint("version: v2", "version: v1"),
            "r.yaml: spec.steps: step 5: weights name v2, expected v1 and v1"
        );
        assert!(complaint("kind: Rollout", "kind: Deployment").contains("expected \"Rollout\""));
        assert!(complaint("{ X-Canary: { exact: always } }", "{}").contains("names no header"));
        assert!(complaint("header: X-User-ID", "header: \"X User\"").contains("expected letters, digits and hyphens"));
        assert!(complaint("http://127.0.0.1:9101", "http://127.0.0.1").contains("expected http://host:port"));
        assert!(complaint("header: X-User-ID", "header: a, cookie: b").contains("expected one of header, cookie"));
        assert!(
            complaint("version: v1,", "version: v1, healthCheck: { path: ok },")
                .contains("expected one such as /healthz")
        );
        assert!(complaint("match: [", "mirror: { percent: 120 }\n    match: [").contains("weight is 120 %"));
        assert!(complaint("lease: 3s", "lease: 100ms").contains("safety.lease is 100 ms, expected 1000 to 60000 ms"));
    }
}
