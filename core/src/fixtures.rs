//! Rollouts for the core's own tests, as `config` makes them of a file that names no more than their steps.

use std::sync::Arc;

use crate::domain::analysis::{Analysis, Limit, Metric};
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::plan::{Backend, Manifest, RolloutSpec, Stage};
use crate::domain::query::Query;
use crate::domain::verdict::OnFailure;
use crate::domain::weights::Weight;

/// Returns a stage at this share (basis points), at least `hold_ms` long.
pub fn held(bp: u16, hold_ms: u64) -> Stage {
    Stage { weight: Weight::from_bp(bp).unwrap(), hold_ms, manual: false }
}

/// Returns a stage at this share (basis points), which an operator ends.
pub fn manual(bp: u16) -> Stage {
    Stage { manual: true, ..held(bp, 0) }
}

/// Returns a rollout of service `s` from v1 to v2, as the log keeps it.
pub fn manifest(stages: &[Stage], analysis: Analysis) -> Arc<Manifest> {
    Arc::new(rollout(stages, analysis).checked().unwrap())
}

/// Returns a rollout of service `s` from v1 to v2.
pub fn rollout(stages: &[Stage], analysis: Analysis) -> RolloutSpec {
    let backend = |name| Backend::new(VersionId::new(name).unwrap(), Vec::new());
    let (stable, canary) = (backend("v1"), backend("v2"));
    RolloutSpec { analysis, ..RolloutSpec::new(ServiceId::new("s").unwrap(), stable, canary, stages.to_vec()) }
}

/// Returns an analysis that compares the canary's errors with stable's, in windows of 3 s.
pub fn errors_vs_stable() -> Analysis {
    let limit = Limit::ErrorsVsStable { increase_ppm: 5_000 };
    let metrics = vec![Metric { name: "errors".into(), limit, on_failure: OnFailure::Rollback }];
    Analysis { window_ms: 3_000, min_samples: 10, metrics, ..Analysis::default() }
}

/// Returns an analysis by one query to a Prometheus, at most 0.05, in windows of 3 s.
pub fn by_query() -> Analysis {
    let query = Query {
        name: "failing".into(),
        address: "http://x:1".into(),
        template: "errors".into(),
        interval_ms: 10_000,
        min: None,
        max: Some(50_000),
        on_failure: OnFailure::Rollback,
    };
    Analysis { window_ms: 3_000, metrics: Vec::new(), queries: vec![query], ..Analysis::default() }
}
