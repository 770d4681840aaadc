//! From a rollout to the file that says all that it is, defaults too, so that another build's defaults change nothing.

use super::super::{Backend, HashOn, HealthCheck, Match, OnPartition, RequestLimits, RolloutSpec, Stage, Timeouts};
use super::{
    API_VERSION, AnalysisPart, AnswerPart, BakePart, ClassPart, ExactPart, FailurePart, HashPart, HealthPart,
    InconclusivePart, KIND, LimitsPart, MatchPart, MetadataPart, MetricPart, Millis, MirrorPart, NoDataPart,
    PartitionPart, PausePart, PrometheusPart, ProviderPart, RangePart, RolloutFile, RoutingPart, SEQUENTIAL,
    SafetyPart, SaltPart, SidePart, SpecPart, StepPart, StrategyPart, ThenPart, TimeoutsPart,
};
use crate::domain::analysis::{Analysis, Limit, Metric, NoData};
use crate::domain::assignment::{HashFunction, Salt};
use crate::domain::classes::ErrorClasses;
use crate::domain::query::Query;
use crate::domain::verdict::OnFailure;
use crate::domain::weights::Weight;

impl RolloutFile {
    /// Returns the file that describes this rollout, with every default written out.
    pub fn of(spec: &RolloutSpec) -> Self {
        let percent = |weight: Weight| f64::from(weight.bp()) / 100.0;
        Self {
            api_version: API_VERSION.into(),
            kind: KIND.into(),
            metadata: MetadataPart {
                name: spec.service.clone(),
                labels: spec.labels.clone(),
                annotations: spec.annotations.clone(),
            },
            spec: SpecPart {
                stable: side_of(&spec.stable, spec.node_answers),
                canary: side_of(&spec.canary, spec.node_answers),
                steps: spec.stages.iter().flat_map(steps_of).collect(),
                bake: Some(BakePart { duration: Millis(spec.bake_ms) }),
                routing: RoutingPart {
                    hash_on: spec.hash_on.as_ref().map(|hash_on| hash_of(hash_on, spec)),
                    matches: spec.matches.iter().map(match_of).collect(),
                    mirror: (spec.mirror > Weight::ZERO).then(|| MirrorPart { percent: percent(spec.mirror) }),
                    limits: limits_of(&spec.limits),
                    slow_start: (spec.slow_start_ms > 0).then_some(Millis(spec.slow_start_ms)),
                    timeouts: timeouts_of(spec.timeouts),
                    cancel_on_disconnect: spec.cancel_on_disconnect,
                },
                analysis: Some(analysis_of(&spec.analysis, spec.error_classes)),
                safety: SafetyPart {
                    lease: Some(Millis(spec.lease_ms)),
                    on_partition: match spec.on_partition {
                        OnPartition::Stable => PartitionPart::Stable,
                        OnPartition::Hold => PartitionPart::Hold,
                    },
                },
                progress_deadline: Some(Millis(spec.progress_deadline_ms)),
            },
        }
    }
}

fn side_of(backend: &Backend, node_answers: bool) -> SidePart {
    let health =
        |check: &HealthCheck| HealthPart { path: check.path.clone(), interval: Some(Millis(check.interval_ms)) };
    SidePart {
        version: backend.version.clone(),
        url: None,
        urls: backend.urls.clone(),
        answer: (node_answers && backend.urls.is_empty()).then_some(AnswerPart::Node),
        health_check: backend.health_check.as_ref().map(health),
    }
}

/// A stage's weight, then its pauses.
fn steps_of(stage: &Stage) -> Vec<StepPart> {
    let pause = |duration| StepPart { pause: Some(PausePart { duration }), ..StepPart::default() };
    let weight = Some(f64::from(stage.weight.bp()) / 100.0);
    let mut steps = vec![StepPart { set_weight: weight, ..StepPart::default() }];
    steps.extend((stage.hold_ms > 0).then(|| pause(Some(Millis(stage.hold_ms)))));
    steps.extend(stage.manual.then(|| pause(None)));
    steps
}

/// Returns the limits that are not the default ones.
fn limits_of(limits: &RequestLimits) -> Option<LimitsPart> {
    let default = RequestLimits::default();
    let other = |found: u64, default: u64| (found != default).then_some(found);
    let part = LimitsPart {
        max_requests: limits.max_requests,
        max_requests_per_server: limits.max_requests_per_server,
        max_pending: other(limits.max_pending, default.max_pending),
        pending_timeout: other(limits.pending_timeout_ms, default.pending_timeout_ms).map(Millis),
    };
    (part != LimitsPart::default()).then_some(part)
}

fn hash_of(hash_on: &HashOn, spec: &RolloutSpec) -> HashPart {
    let (salt, salt_slot) = match spec.salt {
        Salt::Unsaid => (None, None),
        Salt::None => (Some(SaltPart::None), None),
        Salt::Rollout(slot) => (Some(SaltPart::Rollout), slot),
    };
    let function = Some(spec.hash_function).filter(|function| *function != HashFunction::default());
    let max_age = spec.set_cookie.and_then(|cookie| cookie.max_age_ms).map(Millis);
    let part = HashPart { set: spec.set_cookie.is_some(), max_age, function, salt, salt_slot, ..HashPart::default() };
    match hash_on {
        HashOn::Header(name) => HashPart { header: Some(name.clone()), ..part },
        HashOn::Cookie(name) => HashPart { cookie: Some(name.clone()), ..part },
        HashOn::ClientAddress => HashPart { client_address: true, ..part },
    }
}

fn timeouts_of(timeouts: Timeouts) -> Option<TimeoutsPart> {
    let Timeouts { first_byte_ms, idle_ms, total_ms } = timeouts;
    let part = || TimeoutsPart {
        first_byte: first_byte_ms.map(Millis),
        idle: idle_ms.map(Millis),
        total: total_ms.map(Millis),
    };
    (timeouts != Timeouts::default()).then(part)
}

fn match_of(matched: &Match) -> MatchPart {
    let exact = |(name, value): &(String, String)| (name.clone(), ExactPart { exact: value.clone() });
    MatchPart { headers: matched.headers.iter().map(exact).collect() }
}

fn analysis_of(analysis: &Analysis, error_classes: ErrorClasses) -> AnalysisPart {
    let Analysis { window_ms, min_samples, metrics, queries, no_data, alpha_ppm, inconclusive_after_ms } = analysis;
    AnalysisPart {
        window: Some(Millis(*window_ms)),
        metrics: Some(
            metrics.iter().map(|metric| metric_of(metric, error_classes)).chain(queries.iter().map(query_of)).collect(),
        ),
        alpha: Some(share_of(*alpha_ppm)),
        min_samples: Some(*min_samples),
        no_data: Some(match no_data {
            NoData::Hold => NoDataPart::Hold,
            NoData::Fail => NoDataPart::Fail,
        }),
        on_inconclusive: inconclusive_after_ms
            .map(|after| InconclusivePart { after: Millis(after), then: ThenPart::Pause }),
    }
}

fn metric_of(metric: &Metric, error_classes: ErrorClasses) -> MetricPart {
    let name = metric.name.clone();
    let threshold = |statistic, max| MetricPart {
        name: name.clone(),
        statistic,
        threshold_range: Some(RangePart { min: None, max: Some(max) }),
        on_failure: Some(failure_of(metric.on_failure)),
        ..MetricPart::default()
    };
    let sequential = |quantile, increase_ppm| MetricPart {
        name: name.clone(),
        strategy: StrategyPart(SEQUENTIAL.into()),
        quantile,
        allowed_increase: Some(share_of(increase_ppm)),
        ..MetricPart::default()
    };
    match metric.limit {
        Limit::ErrorRate { max_bp } => {
            MetricPart { classes: classes_of(error_classes), ..threshold(None, f64::from(max_bp) / 100.0) }
        }
        Limit::Latency { statistic, max_us } => threshold(Some(statistic.to_string()), max_us as f64 / 1000.0),
        Limit::ErrorsVsStable { increase_ppm } => sequential(None, increase_ppm),
        Limit::LatencyVsStable { quantile_bp, increase_ppm } => {
            sequential(Some(f64::from(quantile_bp) / 1e4), increase_ppm)
        }
    }
}

/// The classes, where they aren't the usual one alone.
fn classes_of(ErrorClasses { client, redirect }: ErrorClasses) -> Option<Vec<ClassPart>> {
    let all = [(true, ClassPart::Server), (client, ClassPart::Client), (redirect, ClassPart::Redirect)];
    (client || redirect).then(|| all.into_iter().filter_map(|(counts, class)| counts.then_some(class)).collect())
}

fn query_of(query: &Query) -> MetricPart {
    let bound = |micro: i64| micro as f64 / 1e6;
    MetricPart {
        name: query.name.clone(),
        threshold_range: Some(RangePart { min: query.min.map(bound), max: query.max.map(bound) }),
        on_failure: Some(failure_of(query.on_failure)),
        provider: Some(ProviderPart {
            prometheus: PrometheusPart {
                address: query.address.clone(),
                query: query.template.clone(),
                interval: Some(Millis(query.interval_ms)),
            },
        }),
        ..MetricPart::default()
    }
}

fn failure_of(on_failure: OnFailure) -> FailurePart {
    match on_failure {
        OnFailure::Rollback => FailurePart::Rollback,
        OnFailure::Pause => FailurePart::Pause,
    }
}

/// Millionths as a share of one.
fn share_of(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}
