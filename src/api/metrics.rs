//! Prometheus metrics: gauges from the view at each scrape, counters from announcements.

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::sync::broadcast::error::RecvError;

use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::routing::{RoutingState, Status};
use crate::domain::weights::Weight;
use crate::node::handle::NodeHandle;
use crate::protocol::record::{Initiator, RecordKind};
use crate::protocol::{Event, View};

use super::state::ApiState;

/// Upper bounds of duration histograms, in seconds.
const BOUNDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Installs the process's metrics once and returns the way to scrape them.
pub fn install() -> PrometheusHandle {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    let build = || {
        let builder = PrometheusBuilder::new().set_buckets(&BOUNDS).expect("the bounds are not empty");
        builder.install_recorder().expect("nothing else installs metrics")
    };
    INSTALLED.get_or_init(build).clone()
}

/// Series of `aviary_rollout_weight` told so far: a version that left the split falls to 0 instead of standing still.
static WEIGHED: Mutex<BTreeSet<(ServiceId, VersionId)>> = Mutex::new(BTreeSet::new());

fn tell_weights(view: &View) {
    let mut weighed = WEIGHED.lock().unwrap_or_else(PoisonError::into_inner);
    for (id, found) in &view.services {
        weighed.extend(found.service.routing.weights.iter().map(|(version, _)| (id.clone(), version.clone())));
    }
    for (id, version) in weighed.iter() {
        let weight = view.services.get(id).map_or(Weight::ZERO, |found| found.service.routing.weights.of(version));
        let (service, version) = (id.to_string(), version.to_string());
        gauge!("aviary_rollout_weight", "service" => service, "version" => version).set(weight.fraction());
    }
}

/// Answers `GET /metrics` in the text format of Prometheus.
pub async fn scrape(State(state): State<ApiState>) -> Response {
    let view = state.node.published.view();
    tell_weights(&view);
    for (id, found) in &view.services {
        let service = id.to_string();
        let routing = &found.service.routing;
        let effective = f64::from(state.node.published.effective_bp(&found.serving)) / 10_000.0;
        gauge!("aviary_effective_canary_weight", "service" => service.clone()).set(effective);
        gauge!("aviary_routing_version", "service" => service.clone()).set(routing.version as f64);
        for phase in ["Progressing", "Paused", "Baking", "Completed", "RolledBack"] {
            let here = f64::from(u8::from(found.service.rollout.phase.to_string() == phase));
            gauge!("aviary_rollout_phase", "service" => service.clone(), "phase" => phase).set(here);
        }
        let lease_ms = found.service.rollout.spec.lease_ms;
        let left = state.node.published.lease_ms_left(lease_ms).unwrap_or(0) as f64 / 1000.0;
        gauge!("aviary_lease_remaining_seconds", "service" => service.clone()).set(left);
        if let Some(sequential) = &found.sequential {
            gauge!("aviary_analysis_e_value", "service" => service.clone()).set(sequential.e_value);
            gauge!("aviary_analysis_alpha_spent", "service" => service).set(sequential.alpha_spent);
        }
    }
    state.metrics.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], state.metrics.render()).into_response()
}

/// How often measured durations are summed up: they would pile up at a node that nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Counts announcements until the node ends.
pub async fn count(node: NodeHandle) {
    let mut events = node.events();
    let (metrics, mut upkeep) = (install(), tokio::time::interval(UPKEEP));
    loop {
        let next = tokio::select! {
            next = events.recv() => next,
            _ = upkeep.tick() => {
                metrics.run_upkeep();
                continue;
            }
        };
        let announcement = match next {
            Ok(announcement) => announcement,
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        match &announcement.event {
            Event::Routing { state, .. } if state.status == Status::Prepared => {}
            Event::Routing { kind, initiator, state, took_ms, coordinator, .. } => {
                count_transaction(*kind, *initiator, state);
                // Once in a cluster.
                if let Some(ms) = took_ms.filter(|_| coordinator.as_ref() == Some(&announcement.node)) {
                    let (kind, outcome) = (kind.name(), state.status.to_string());
                    let seconds = Duration::from_millis(ms).as_secs_f64();
                    histogram!("aviary_commit_duration_seconds", "kind" => kind, "outcome" => outcome).record(seconds);
                }
            }
            Event::Analyzed { service, window_verdict, .. } => {
                let of = if window_verdict.is_window { "window" } else { "comparison" };
                let (service, verdict) = (service.to_string(), window_verdict.verdict.word());
                counter!("aviary_analysis_verdicts_total", "service" => service, "of" => of, "verdict" => verdict)
                    .increment(1);
            }
            Event::Voted { vote, .. } => counter!("aviary_gate_votes_total", "vote" => vote.clone()).increment(1),
            Event::Enforced { took_ms, .. } => {
                histogram!("aviary_rollback_propagation_seconds").record(*took_ms as f64 / 1000.0);
            }
            Event::Verdict { .. }
            | Event::LocalHold { .. }
            | Event::Membership { .. }
            | Event::DefaultService { .. }
            | Event::Lease { .. }
            | Event::Coordinator { .. }
            | Event::Peer { .. }
            | Event::Rejected { .. } => {}
        }
    }
}

/// Counts a refused transaction, or one that sent the traffic back to stable.
fn count_transaction(kind: RecordKind, initiator: Initiator, state: &RoutingState) {
    let service = state.service.to_string();
    let reason = match (state.status, kind, initiator) {
        (Status::Aborted, ..) => {
            counter!("aviary_transactions_refused_total", "service" => service).increment(1);
            return;
        }
        (_, RecordKind::Revert, _) => "in_doubt",
        (_, RecordKind::Rollback, Initiator::Node) => "verdict",
        (_, RecordKind::Rollback, Initiator::Client) => "operator",
        _ => return,
    };
    counter!("aviary_rollbacks_total", "service" => service, "reason" => reason).increment(1);
}
