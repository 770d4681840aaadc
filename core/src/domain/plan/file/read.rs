//! From a rollout file to the rollout that it describes.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    Backend, HashOn, HealthCheck, Match, OnPartition, RequestLimits, RolloutSpec, SetCookie, Stage, Timeouts,
};
use super::{
    API_VERSION, AnalysisPart, AnalysisProblem, ClassPart, FailurePart, HashPart, KIND, LimitsPart, MatchPart,
    MetadataPart, MetricPart, MetricProblem, Millis, NoDataPart, PartitionPart, PrometheusPart, RangePart, RolloutFile,
    SEQUENTIAL, SaltPart, SidePart, SpecPart, StepPart, StepProblem, THRESHOLD, TimeoutsPart, UrlError, ValueError,
};
use crate::domain::analysis::{Analysis, Limit, Metric, NoData, Statistic};
use crate::domain::assignment::{HashFunction, Salt};
use crate::domain::classes::ErrorClasses;
use crate::domain::ids::VersionId;
use crate::domain::limits;
use crate::domain::query::Query;
use crate::domain::verdict::OnFailure;
use crate::domain::weights::{Weight, WeightError, Weights};

impl RolloutFile {
    /// Returns the rollout that the file describes, each value checked by itself; [`RolloutSpec::checked`] checks the whole.
    pub fn spec(self) -> Result<RolloutSpec, ValueError> {
        for (key, found, expected) in [("apiVersion", self.api_version, API_VERSION), ("kind", self.kind, KIND)] {
            if found != expected {
                return Err(ValueError::OtherFile { key, found, expected });
            }
        }
        let MetadataPart { name, labels, annotations } = self.metadata;
        let SpecPart { stable, canary, steps, bake, routing, analysis, safety, progress_deadline } = self.spec;
        let server = |key| move |problem| ValueError::Server { key, problem };
        let said = |side: &SidePart| side.answer.is_some();
        let node_answers = said(&stable) && said(&canary);
        for (key, side) in [("spec.stable", &stable), ("spec.canary", &canary)] {
            if said(side) && (side.url.is_some() || !side.urls.is_empty()) {
                return Err(ValueError::AnswerAndServers { key });
            }
        }
        let stable = backend(stable).map_err(server("spec.stable"))?;
        let canary = backend(canary).map_err(server("spec.canary"))?;
        let stages = stages(steps, &stable.version, &canary.version)?;
        let mut spec =
            RolloutSpec { labels, annotations, node_answers, ..RolloutSpec::new(name, stable, canary, stages) };
        if let Some(analysis) = analysis {
            spec.error_classes = error_classes(analysis.metrics.as_deref().unwrap_or_default())?;
            spec.analysis = self::analysis(analysis)?;
        }
        let mirror = routing.mirror.map(|mirror| Weight::from_percent(mirror.percent)).transpose();
        spec.mirror = mirror.map_err(ValueError::Mirror)?.unwrap_or(spec.mirror);
        if let Some(part) = routing.hash_on {
            (spec.hash_function, spec.salt) = assignment(&part)?;
            spec.set_cookie = set_cookie(&part)?;
            spec.hash_on = Some(hash_on(part)?);
        }
        spec.matches = routing.matches.into_iter().map(matched).collect::<Result<_, _>>()?;
        spec.limits = routing.limits.map_or(spec.limits, |part| limits_of(&part));
        spec.slow_start_ms = routing.slow_start.map_or(spec.slow_start_ms, |time| time.0);
        if let Some(TimeoutsPart { first_byte, idle, total }) = routing.timeouts {
            let ms = |limit: Option<Millis>| limit.map(|limit| limit.0);
            spec.timeouts = Timeouts { first_byte_ms: ms(first_byte), idle_ms: ms(idle), total_ms: ms(total) };
        }
        spec.cancel_on_disconnect = routing.cancel_on_disconnect;
        spec.bake_ms = bake.map_or(spec.bake_ms, |bake| bake.duration.0);
        spec.lease_ms = safety.lease.map_or(spec.lease_ms, |lease| lease.0);
        spec.on_partition = match safety.on_partition {
            PartitionPart::Stable => OnPartition::Stable,
            PartitionPart::Hold => OnPartition::Hold,
        };
        spec.progress_deadline_ms = progress_deadline.map_or(spec.progress_deadline_ms, |deadline| deadline.0);
        Ok(spec)
    }
}

fn header(key: &'static str, found: &str) -> Result<String, ValueError> {
    http::HeaderName::from_bytes(found.as_bytes())
        .map(|name| name.as_str().to_string())
        .map_err(|_| ValueError::HeaderName { key, found: found.into() })
}

fn matched(part: MatchPart) -> Result<Match, ValueError> {
    let headers = part.headers.into_iter();
    let headers = headers.map(|(name, exact)| Ok((header("spec.routing.match", &name)?, exact.exact)));
    Ok(Match { headers: headers.collect::<Result<_, ValueError>>()? })
}

fn hash_on(part: HashPart) -> Result<HashOn, ValueError> {
    const KEY: &str = "spec.routing.hashOn";
    match (part.header, part.cookie, part.client_address) {
        (Some(name), None, false) => header(KEY, &name).map(HashOn::Header),
        // A cookie's name is a token, as a header's is, with large and small letters told apart.
        (None, Some(name), false) => header(KEY, &name).map(|_| HashOn::Cookie(name)),
        (None, None, true) => Ok(HashOn::ClientAddress),
        _ => Err(ValueError::HashOn),
    }
}

fn limits_of(part: &LimitsPart) -> RequestLimits {
    let default = RequestLimits::default();
    RequestLimits {
        max_requests: part.max_requests,
        max_requests_per_server: part.max_requests_per_server,
        max_pending: part.max_pending.unwrap_or(default.max_pending),
        pending_timeout_ms: part.pending_timeout.map_or(default.pending_timeout_ms, |time| time.0),
    }
}

/// Returns how the cookie is set that a client's version is chosen by.
fn set_cookie(part: &HashPart) -> Result<Option<SetCookie>, ValueError> {
    match (part.set, &part.cookie, &part.max_age) {
        (true, Some(_), max_age) => Ok(Some(SetCookie { max_age_ms: max_age.map(|age| age.0) })),
        (false, _, None) => Ok(None),
        (true, None, _) | (false, _, Some(_)) => Err(ValueError::SetCookie),
    }
}

/// Returns how keys become tickets.
fn assignment(part: &HashPart) -> Result<(HashFunction, Salt), ValueError> {
    let function = part.function.unwrap_or_default();
    let salt = match (part.salt, part.salt_slot) {
        (None, None) => Salt::Unsaid,
        (Some(SaltPart::None), None) => Salt::None,
        (Some(SaltPart::Rollout), _) if function == HashFunction::Xxh64 => return Err(ValueError::SaltedXxh64),
        (Some(SaltPart::Rollout), slot) => Salt::Rollout(slot),
        (None | Some(SaltPart::None), Some(_)) => return Err(ValueError::SaltSlot),
    };
    Ok((function, salt))
}

fn backend(side: SidePart) -> Result<Backend, UrlError> {
    let urls = side.url.into_iter().chain(side.urls).map(|url| checked_url(&url)).collect::<Result<_, _>>()?;
    let health_check = side
        .health_check
        .map(|part| HealthCheck { path: part.path, interval_ms: part.interval.map_or(5_000, |interval| interval.0) });
    Ok(Backend { version: side.version, urls, health_check })
}

/// Returns a server's address as it is used, or what is wrong with it.
pub fn checked_url(url: &str) -> Result<String, UrlError> {
    let uri = checked_address(url)?;
    if uri.path() != "/" && !uri.path().is_empty() || uri.query().is_some() {
        return Err(UrlError::HasPath(url.into()));
    }
    Ok(url.trim_end_matches('/').to_string())
}

/// Returns the address that the paths of a provider's API are appended to, which may end in a path of its own: what stands behind a
/// proxy often has one.
fn checked_base(url: &str) -> Result<String, UrlError> {
    let uri = checked_address(url)?;
    match uri.query() {
        Some(_) => Err(UrlError::NotPlain(url.into())),
        None => Ok(url.trim_end_matches('/').to_string()),
    }
}

fn checked_address(url: &str) -> Result<http::Uri, UrlError> {
    let uri: http::Uri = url.parse().map_err(|why| UrlError::Malformed(url.into(), why))?;
    let plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if uri.port_u16().is_none_or(|port| port == 0) || !plain || url.contains('#') {
        return Err(UrlError::NotPlain(url.into()));
    }
    match uri.scheme_str() {
        Some("http" | "h2c") => Ok(uri),
        Some("https") => Err(UrlError::Https(url.into())),
        _ => Err(UrlError::NoScheme(url.into())),
    }
}

/// Steps as their author wrote them, folded into stages: a pause belongs to the weight before it.
fn stages(steps: Vec<StepPart>, stable: &VersionId, canary: &VersionId) -> Result<Vec<Stage>, ValueError> {
    let mut stages: Vec<Stage> = Vec::new();
    for (i, step) in steps.into_iter().enumerate() {
        let wrong = |problem| ValueError::Step { number: i + 1, problem };
        let weight = match (step.set_weight, step.weights, step.pause) {
            (Some(percent), None, None) => Weight::from_percent(percent).map_err(|why| wrong(why.into()))?,
            (None, Some(parts), None) => split(parts, stable, canary).map_err(wrong)?,
            (None, None, Some(pause)) => {
                if stages.is_empty() {
                    stages.push(Stage { weight: Weight::ZERO, hold_ms: 0, manual: false });
                }
                let stage = stages.last_mut().expect("a stage just pushed");
                match pause.duration {
                    Some(Millis(ms)) => stage.hold_ms = stage.hold_ms.saturating_add(ms),
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
        window_ms: part.window.map_or(default.window_ms, |window| window.0),
        min_samples: part.min_samples.unwrap_or(default.min_samples),
        metrics,
        queries,
        no_data: match part.no_data {
            Some(NoDataPart::Fail) => NoData::Fail,
            Some(NoDataPart::Hold) | None => NoData::Hold,
        },
        inconclusive_after_ms: part.on_inconclusive.map(|inconclusive| inconclusive.after.0),
    })
}

/// Returns the statuses that count as errors in the whole rollout.
fn error_classes(metrics: &[MetricPart]) -> Result<ErrorClasses, AnalysisProblem> {
    let is_errors = |part: &&MetricPart| part.name.starts_with("errors") && part.strategy.0 == THRESHOLD;
    let mut found = None;
    for part in metrics.iter().filter(is_errors).filter(|part| part.provider.is_none()) {
        let has = |class| part.classes.as_ref().is_some_and(|classes| classes.contains(&class));
        if part.classes.is_some() && !has(ClassPart::Server) {
            return Err(AnalysisProblem::Metric { name: part.name.clone(), problem: MetricProblem::NoServerErrors });
        }
        let classes = ErrorClasses { client: has(ClassPart::Client), redirect: has(ClassPart::Redirect) };
        if found.replace(classes).is_some_and(|before| before != classes) {
            return Err(AnalysisProblem::Classes);
        }
    }
    Ok(found.unwrap_or_default())
}

fn metric(part: MetricPart) -> Result<Metric, AnalysisProblem> {
    let name = part.name.clone();
    let kind = name.split('-').next().unwrap_or_default();
    if kind != "errors" && kind != "latency" {
        return Err(AnalysisProblem::Unknown(name));
    }
    if part.classes.is_some() && (kind != "errors" || part.strategy.0 != THRESHOLD) {
        let problem = MetricProblem::ForeignKeys("classes are for errors by THRESHOLD, expected none");
        return Err(AnalysisProblem::Metric { name, problem });
    }
    let metric = match part.strategy.0.as_str() {
        THRESHOLD => threshold_metric(part),
        SEQUENTIAL => sequential_metric(part),
        _ => {
            let (key, found, expected) = ("strategy", part.strategy.0, "THRESHOLD or SEQUENTIAL");
            Err(MetricProblem::Word { key, found, expected })
        }
    };
    metric.map_err(|problem| AnalysisProblem::Metric { name, problem })
}

/// A metric that a Prometheus keeps.
fn query(part: MetricPart, provider: PrometheusPart) -> Result<Query, MetricProblem> {
    let MetricPart {
        name, strategy, statistic, threshold_range, on_failure, allowed_increase, quantile, classes, ..
    } = part;
    let PrometheusPart { address, query: template, interval } = provider;
    if classes.is_some()
        || strategy.0 != THRESHOLD
        || statistic.is_some()
        || allowed_increase.is_some()
        || quantile.is_some()
    {
        return Err(MetricProblem::ForeignKeys(
            "a provider's metric has a thresholdRange and no strategy, statistic, classes, allowedIncrease or quantile",
        ));
    }
    let Some(RangePart { min, max }) = threshold_range.filter(|range| range.min.is_some() || range.max.is_some())
    else {
        return Err(MetricProblem::NoRange);
    };
    let micro = |bound: f64| limits::QUERY_BOUND.check(bound).map(|bound| (bound * 1e6).round() as i64);
    let (min, max) = (min.map(micro).transpose()?, max.map(micro).transpose()?);
    let address = checked_base(&address)?;
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
    let interval_ms = interval.map_or(10_000, |interval| interval.0);
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
        let statistic = match statistic {
            None => Statistic::Mean,
            Some(found) => self::statistic(&found).ok_or_else(|| {
                let expected = "mean, or a percentile such as p50, p95 and p99.9";
                MetricProblem::Word { key: "statistic", found, expected }
            })?,
        };
        limits::LATENCY_MAX.check(max)?;
        (Limit::Latency { statistic, max_us: (max * 1000.0).round() as u64 }, OnFailure::Pause)
    };
    let on_failure = match on_failure {
        Some(FailurePart::Rollback) => OnFailure::Rollback,
        Some(FailurePart::Pause) => OnFailure::Pause,
        None => default,
    };
    Ok(Metric { name, limit, on_failure })
}

/// Returns the statistic of this name: `mean`, or `p` and a percentile between 0 and 100 with at most two decimals.
fn statistic(text: &str) -> Option<Statistic> {
    if text == "mean" {
        return Some(Statistic::Mean);
    }
    let percentile: f64 = text.strip_prefix('p')?.parse().ok()?;
    let bp = (percentile * 100.0).round();
    let is_one = bp > 0.0 && bp < 10_000.0 && (bp / 100.0 - percentile).abs() < 1e-9;
    is_one.then_some(Statistic::Quantile(bp as u16))
}
