//! Prometheus metrics: gauges from the view at each scrape, counters from announcements.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::domain::time::Mono;
use crate::domain::weights::Weight;
use crate::node::handle::NodeHandle;
use crate::protocol::record::{Initiator, RecordKind};
use crate::protocol::{Event, Mode, View};

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

/// How long the series of a version are told after it left its service's split, so that its last numbers are scraped.
const TOLD_AFTER_MS: u64 = 15 * 60 * 1000;

/// Versions whose series are told, each with when it was last part of its service's split.
#[derive(Debug, Default)]
struct ToldVersions(BTreeMap<(ServiceId, VersionId), Mono>);

impl ToldVersions {
    /// Takes note of the versions that the view knows, at `now`, and forgets those that left [`TOLD_AFTER_MS`] ago.
    fn look(&mut self, view: &View, now: Mono) {
        for (id, found) in view.services.iter() {
            let weights = found.service.routing.weights.iter().map(|(version, _)| version);
            let serving = [&found.serving.stable.version].into_iter();
            let canary = found.serving.canary.iter().map(|(canary, _)| &canary.version);
            for version in weights.chain(serving).chain(canary) {
                self.0.insert((id.clone(), version.clone()), now);
            }
        }
        self.0.retain(|_, last| now.millis_since(*last) < TOLD_AFTER_MS);
    }

    /// Returns the rendered metrics without the series of versions that are forgotten.
    fn without_forgotten(&self, rendered: &str) -> String {
        let told: BTreeSet<_> = self.0.keys().map(|(service, version)| (service.as_str(), version.as_str())).collect();
        let is_told = |line: &&str| match (label(line, "service"), label(line, "version")) {
            (Some(service), Some(version)) => told.contains(&(service, version)),
            _ => true,
        };
        rendered.lines().filter(is_told).fold(String::with_capacity(rendered.len()), |text, line| text + line + "\n")
    }
}

/// Returns the value of a series' label; none for a line without it. Names of services and versions need no escapes.
fn label<'l>(line: &'l str, name: &str) -> Option<&'l str> {
    let labels = line.split_once('{').filter(|_| !line.starts_with('#'))?.1;
    let (_, rest) = labels.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

static TOLD: Mutex<ToldVersions> = Mutex::new(ToldVersions(BTreeMap::new()));

/// Tells the weight of each version: one that left the split falls to 0 instead of standing still.
fn tell_weights(view: &View, told: &ToldVersions) {
    for (id, version) in told.0.keys() {
        let weight = view.services.get(id).map_or(Weight::ZERO, |found| found.service.routing.weights.of(version));
        let (service, version) = (id.to_string(), version.to_string());
        gauge!("aviary_rollout_weight", "service" => service, "version" => version).set(weight.fraction());
    }
}

/// Answers `GET /metrics` in the text format of Prometheus.
pub async fn scrape(State(state): State<ApiState>) -> Response {
    let view = state.node.published.view();
    let now = state.node.published.clock().now().mono;
    {
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        told.look(&view, now);
        tell_weights(&view, &told);
    }
    gauge!("aviary_quorum").set(f64::from(u8::from(state.node.published.mode() == Mode::Normal)));
    for (id, found) in view.services.iter() {
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
    let told = TOLD.lock().unwrap_or_else(PoisonError::into_inner).without_forgotten(&state.metrics.render());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], told).into_response()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{NodeId, TxId};
    use crate::domain::rollout::{Change, Service, Stamp};
    use crate::domain::time::Wall;

    #[test]
    fn the_series_of_a_version_that_left_are_told_for_a_while_and_no_longer() {
        let service = ServiceId::new("m").unwrap();
        let serves = |stable: &str, canary: &str| {
            let file = format!(
                "apiVersion: aviary/v1\nkind: Rollout\nmetadata: {{ name: m }}\nspec:\n  \
                 stable: {{ version: {stable}, url: \"http://127.0.0.1:1\" }}\n  \
                 canary: {{ version: {canary}, url: \"http://127.0.0.1:2\" }}\n  steps: [ {{ setWeight: 5 }} ]\n"
            );
            let spec = crate::config::rollout::parse(&file, "r").unwrap();
            let stamp = Stamp { tx: TxId::new("t").unwrap(), at: Wall(1) };
            let started = Service::after(None, &service, &Change::Start(spec.into()), &stamp).unwrap();
            View::fixed(NodeId::new("a").unwrap(), started)
        };
        let rendered = "# TYPE aviary_requests_total counter\n\
            aviary_requests_total{service=\"m\",version=\"v1\",code_class=\"2xx\"} 7\n\
            aviary_requests_total{service=\"m\",version=\"v2\",code_class=\"2xx\"} 8\n\
            aviary_requests_total{service=\"m\",version=\"v3\",code_class=\"2xx\"} 9\n\
            aviary_build_info{version=\"0.2.0\"} 1\naviary_routing_version{service=\"m\"} 3\n";
        let lines = |told: &ToldVersions| {
            let text = told.without_forgotten(rendered);
            ["v1", "v2", "v3", "0.2.0", "routing_version", "TYPE"].map(|word| text.contains(word))
        };
        let mut told = ToldVersions::default();
        told.look(&serves("v1", "v2"), Mono::from_millis(1));
        assert_eq!(lines(&told), [true, true, false, true, true, true]);
        told.look(&serves("v2", "v3"), Mono::from_millis(2));
        assert_eq!(lines(&told), [true, true, true, true, true, true], "its last numbers are scraped");
        told.look(&serves("v2", "v3"), Mono::from_millis(TOLD_AFTER_MS + 1));
        assert_eq!(lines(&told), [false, true, true, true, true, true]);
        assert_eq!(told.0.len(), 2, "it is forgotten here, too");
    }
}
