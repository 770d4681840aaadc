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

/// Error in a rollout file.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// The file is no YAML, or has unknown or missing keys.
    #[error("{file}: {complaint}")]
    Shape {
        /// Path of the rollout file.
        file: String,
        /// Error of the parser, with its line.
        complaint: String,
    },
    /// A value is not allowed.
    #[error("{file}: {place}: {complaint}")]
    Value {
        /// Path of the rollout file.
        file: String,
        /// Key whose value is not allowed, such as `spec.steps`.
        place: String,
        /// What was found, and what was expected.
        complaint: String,
    },
    /// The values together are not a valid rollout.
    #[error("{file}: {error}")]
    Whole {
        /// Path of the rollout file.
        file: String,
        /// The rule that they break.
        error: SpecError,
    },
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
    let parsed: RolloutFile =
        super::read_yaml(text).map_err(|complaint| RolloutError::Shape { file: file.into(), complaint })?;
    let value =
        |place: &str, complaint: String| RolloutError::Value { file: file.into(), place: place.into(), complaint };
    if parsed.api_version != "aviary/v1" {
        return Err(value("apiVersion", format!("found {:?}, expected \"aviary/v1\"", parsed.api_version)));
    }
    if parsed.kind != "Rollout" {
        return Err(value("kind", format!("found {:?}, expected \"Rollout\"", parsed.kind)));
    }
    let SpecPart { stable, canary, steps, bake, routing, analysis, safety, progress_deadline } = parsed.spec;
    let stable = backend(stable).map_err(|why| value("spec.stable", why))?;
    let canary = backend(canary).map_err(|why| value("spec.canary", why))?;
    let stages = stages(steps, &stable.version, &canary.version).map_err(|why| value("spec.steps", why))?;
    let analysis = match analysis {
        Some(part) => self::analysis(part).map_err(|why| value("spec.analysis", why))?,
        None => Analysis::default(),
    };
    let header = |place: &str, name: &str| {
        http::HeaderName::from_bytes(name.as_bytes()).map(|name| name.as_str().to_string()).map_err(|_| {
            value(place, format!("header {name:?} is not a header name, expected letters, digits and hyphens"))
        })
    };
    let hash_on = routing.hash_on.map(|hash| match (hash.header, hash.cookie, hash.client_address) {
        (Some(name), None, false) => header("spec.routing.hashOn", &name).map(HashOn::Header),
        // A cookie's name is a token, as a header's is, with large and small letters told apart.
        (None, Some(name), false) => header("spec.routing.hashOn", &name).map(|_| HashOn::Cookie(name)),
        (None, None, true) => Ok(HashOn::ClientAddress),
        _ => Err(value("spec.routing.hashOn", "expected one of header, cookie and clientAddress: true".into())),
    });
    let mirror = routing.mirror.map_or(Ok(Weight::ZERO), |mirror| Weight::from_percent(mirror.percent));
    let matches = routing.matches.into_iter().map(|part| {
        let headers = part.headers.into_iter();
        let headers = headers.map(|(name, exact)| Ok((header("spec.routing.match", &name)?, exact.exact)));
        Ok(Match { headers: headers.collect::<Result<_, RolloutError>>()? })
    });
    let matches = matches.collect::<Result<_, RolloutError>>()?;
    let spec = RolloutSpec {
        service: parsed.metadata.name,
        stable,
        canary,
        stages,
        bake_ms: bake.map_or(60_000, |bake| bake.duration),
        hash_on: hash_on.transpose()?,
        matches,
        mirror: mirror.map_err(|why| value("spec.routing.mirror", why.to_string()))?,
        analysis,
        lease_ms: safety.lease.unwrap_or(2_000),
        on_partition: match safety.on_partition {
            PartitionPart::Stable => OnPartition::Stable,
            PartitionPart::Hold => OnPartition::Hold,
        },
        progress_deadline_ms: progress_deadline.unwrap_or(30 * 60 * 1000),
    };
    spec.checked().map_err(|error| RolloutError::Whole { file: file.into(), error })
}

fn backend(side: SidePart) -> Result<Backend, String> {
    let urls = side.url.into_iter().chain(side.urls).map(|url| checked_url(&url)).collect::<Result<_, _>>()?;
    let health_check =
        side.health_check.map(|part| HealthCheck { path: part.path, interval_ms: part.interval.unwrap_or(5_000) });
    Ok(Backend { version: side.version, urls, health_check })
}

/// Returns a server's address as it is used, or what is wrong with it.
pub fn checked_url(url: &str) -> Result<String, String> {
    let uri: http::Uri = url.parse().map_err(|e| format!("url {url:?}: {e}, expected http://host:port"))?;
    let plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if uri.port_u16().is_none_or(|port| port == 0) || !plain || url.contains('#') {
        return Err(format!("url {url:?} is not a plain address, expected http://host:port"));
    }
    match uri.scheme_str() {
        Some("http" | "h2c") => {}
        Some("https") => return Err(format!("url {url:?} is https, expected http: upstream TLS is not available yet")),
        _ => return Err(format!("url {url:?} has no scheme, expected http://host:port")),
    }
    if uri.path() != "/" && !uri.path().is_empty() || uri.query().is_some() {
        return Err(format!("url {url:?} has a path, expected http://host:port: requests keep their own path"));
    }
    Ok(url.trim_end_matches('/').to_string())
}

/// Steps as their author wrote them, folded into stages: a pause belongs to the weight before it.
fn stages(steps: Vec<StepPart>, stable: &VersionId, canary: &VersionId) -> Result<Vec<Stage>, String> {
    let mut stages: Vec<Stage> = Vec::new();
    for (i, step) in steps.into_iter().enumerate() {
        let place = format!("step {}", i + 1);
        let weight = match (step.set_weight, step.weights, step.pause) {
            (Some(percent), None, None) => Weight::from_percent(percent).map_err(|e| format!("{place}: {e}"))?,
            (None, Some(parts), None) => split(parts, stable, canary).map_err(|e| format!("{place}: {e}"))?,
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
            _ => return Err(format!("{place}: expected one of setWeight, weights and pause")),
        };
        stages.push(Stage { weight, hold_ms: 0, manual: false });
    }
    if stages.last().is_some_and(|last| last.weight < Weight::FULL) {
        stages.push(Stage { weight: Weight::FULL, hold_ms: 0, manual: false });
    }
    Ok(stages)
}

fn split(parts: BTreeMap<VersionId, f64>, stable: &VersionId, canary: &VersionId) -> Result<Weight, String> {
    let parts: Result<Vec<_>, WeightError> =
        parts.into_iter().map(|(version, percent)| Ok((version, Weight::from_percent(percent)?))).collect();
    let weights = parts.and_then(Weights::new).map_err(|e| e.to_string())?;
    if let Some((stranger, _)) = weights.iter().find(|(version, _)| version != stable && version != canary) {
        return Err(format!("weights name {stranger}, expected {stable} and {canary}"));
    }
    Ok(weights.of(canary))
}

fn analysis(part: AnalysisPart) -> Result<Analysis, String> {
    let default = Analysis::default();
    let (metrics, queries) = match part.metrics {
        Some(parts) => {
            let (asked, own): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| part.provider.is_some());
            let metrics = own.into_iter().map(metric).collect::<Result<Vec<_>, _>>()?;
            (metrics, asked.into_iter().map(query).collect::<Result<Vec<_>, _>>()?)
        }
        None => (default.metrics, Vec::new()),
    };
    let names = metrics.iter().map(|metric| &metric.name).chain(queries.iter().map(|query| &query.name));
    let names: BTreeSet<&String> = names.collect();
    if names.len() < metrics.len() + queries.len() {
        return Err("two metrics have one name, expected a name for each, such as errors and errors-vs-stable".into());
    }
    let alpha = part.alpha.unwrap_or(f64::from(default.alpha_ppm) / 1e6);
    limits::ALPHA.check(alpha).map_err(|why| why.to_string())?;
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

fn metric(part: MetricPart) -> Result<Metric, String> {
    let kind = part.name.split('-').next().unwrap_or_default();
    if kind != "errors" && kind != "latency" {
        let name = &part.name;
        return Err(format!(
            "metric {name:?} is unknown, expected errors, latency, or one of them with more after a dash"
        ));
    }
    match part.strategy.as_str() {
        "THRESHOLD" => threshold_metric(part),
        "SEQUENTIAL" => sequential_metric(part),
        other => Err(format!("metric {}: strategy is {other:?}, expected THRESHOLD or SEQUENTIAL", part.name)),
    }
}

/// A metric that a Prometheus keeps.
fn query(part: MetricPart) -> Result<Query, String> {
    let MetricPart { name, strategy, statistic, threshold_range, on_failure, allowed_increase, quantile, provider } =
        part;
    let complain = |why: &str| Err(format!("metric {name}: {why}"));
    let Some(Provider { prometheus: PrometheusPart { address, query: template, interval } }) = provider else {
        return complain("no provider");
    };
    if strategy != "THRESHOLD" || statistic.is_some() || allowed_increase.is_some() || quantile.is_some() {
        return complain(
            "a provider's metric has a thresholdRange and no strategy, statistic, allowedIncrease or quantile",
        );
    }
    let Some(RangePart { min, max }) = threshold_range.filter(|range| range.min.is_some() || range.max.is_some())
    else {
        return complain("no thresholdRange, expected { min: …, max: … } or one of them");
    };
    let micro = |bound: f64| match bound.abs() < 1e12 {
        true => Ok((bound * 1e6).round() as i64),
        false => Err(format!("metric {name}: thresholdRange has {bound}, expected less than 10^12 either way")),
    };
    let (min, max) = (min.map(micro).transpose()?, max.map(micro).transpose()?);
    let address = checked_url(&address).map_err(|why| format!("metric {name}: provider: {why}"))?;
    if template.trim().is_empty() || template.len() > 4_096 {
        return complain("the provider's query is empty or longer than 4096 bytes, expected PromQL");
    }
    let words = ["service", "stable", "version", "window"];
    let mut rest = template.as_str();
    while let Some((_, after)) = rest.split_once("{{") {
        let (word, after) = after.split_once("}}").unwrap_or((after, ""));
        if !words.contains(&word.trim()) {
            return Err(format!(
                "metric {name}: the query has {{{{{word}}}}}, expected {{{{service}}}}, {{{{stable}}}}, {{{{version}}}} or {{{{window}}}}"
            ));
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

fn sequential_metric(part: MetricPart) -> Result<Metric, String> {
    let MetricPart { name, statistic, threshold_range, on_failure, allowed_increase, quantile, .. } = part;
    if statistic.is_some() || threshold_range.is_some() || on_failure.is_some() {
        return Err(format!(
            "metric {name}: statistic, thresholdRange and onFailure are THRESHOLD's, expected allowedIncrease and quantile"
        ));
    }
    let errors = name.starts_with("errors");
    let increase = allowed_increase.unwrap_or(if errors { INCREASES.0 } else { INCREASES.1 });
    let of_metric = |why: OutOfRange| format!("metric {name}: {why}");
    let allowed = if errors { limits::ERRORS_INCREASE } else { limits::LATENCY_INCREASE };
    allowed.check(increase).map_err(of_metric)?;
    let increase_ppm = (increase * 1e6).round() as u32;
    if errors {
        return match quantile {
            Some(_) => Err(format!("metric {name}: quantile is for latency, expected allowedIncrease alone")),
            None => Ok(Metric { name, limit: Limit::ErrorsVsStable { increase_ppm }, on_failure: OnFailure::Rollback }),
        };
    }
    let quantile = quantile.unwrap_or(0.95);
    limits::QUANTILE.check(quantile).map_err(of_metric)?;
    let limit = Limit::LatencyVsStable { quantile_bp: (quantile * 1e4).round() as u16, increase_ppm };
    Ok(Metric { name, limit, on_failure: OnFailure::Rollback })
}

fn threshold_metric(part: MetricPart) -> Result<Metric, String> {
    let MetricPart { name, statistic, threshold_range, on_failure, allowed_increase, quantile, .. } = part;
    if allowed_increase.is_some() || quantile.is_some() {
        return Err(format!("metric {name}: allowedIncrease and quantile are SEQUENTIAL's, expected thresholdRange"));
    }
    let Some(RangePart { min: None, max: Some(max) }) = threshold_range else {
        return Err(format!("metric {name} has no thresholdRange with a max alone, expected {{ max: … }}"));
    };
    let (limit, default) = if name.starts_with("errors") {
        if statistic.is_some() {
            return Err(format!("metric {name}: statistic is for latency, expected thresholdRange alone"));
        }
        let max_bp = Weight::from_percent(max).map_err(|_| {
            format!("metric {name}: thresholdRange.max is {max}, expected 0 to 100 percent, two decimals")
        })?;
        (Limit::ErrorRate { max_bp: max_bp.bp() }, OnFailure::Rollback)
    } else {
        let statistic = match statistic.as_deref() {
            None | Some("mean") => Statistic::Mean,
            Some("p50") => Statistic::Quantile(5_000),
            Some("p95") => Statistic::Quantile(9_500),
            Some("p99") => Statistic::Quantile(9_900),
            Some(other) => {
                return Err(format!("metric {name}: statistic is {other:?}, expected mean, p50, p95 or p99"));
            }
        };
        if !(max > 0.0 && max <= 3_600_000.0) {
            return Err(format!(
                "metric {name}: thresholdRange.max is {max} ms, expected more than 0, at most an hour"
            ));
        }
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
