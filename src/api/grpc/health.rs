//! `grpc.health.v1`: what this node is able to do.

use std::time::Duration;

use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::super::state::ApiState;
use super::rollouts::Rollouts;
use super::streams::{Decisions, Telemetry};
use crate::protocol::Mode;
use crate::schema::v1::decision_service_server::DecisionServiceServer;
use crate::schema::v1::rollout_service_server::RolloutServiceServer;
use crate::schema::v1::telemetry_service_server::TelemetryServiceServer;

/// Between two looks at the node.
const LOOK: Duration = Duration::from_millis(200);

/// The server as a whole, by the protocol's convention.
const WHOLE: &str = "";

/// Says what serves, until the state's shutdown: the server as a whole while `/readyz` does, rollouts while `/readyz?quorum` does,
/// because they need a majority; decisions and telemetry always, because a node without one still has its log, and counts.
pub async fn report(mut reporter: HealthReporter, state: ApiState) {
    reporter.set_serving::<DecisionServiceServer<Decisions>>().await;
    reporter.set_serving::<TelemetryServiceServer<Telemetry>>().await;
    let (rollouts, mut told) = (RolloutServiceServer::<Rollouts>::NAME, [None; 2]);
    loop {
        let published = &state.node.published;
        let (ready, quorum) = (published.not_ready().is_none(), published.mode() == Mode::Normal);
        for (told, (service, serves)) in told.iter_mut().zip([(WHOLE, ready), (rollouts, quorum && ready)]) {
            if told.replace(serves) != Some(serves) {
                let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status(service, status).await;
            }
        }
        tokio::select! {
            () = state.shutdown.cancelled() => break,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    let decisions = DecisionServiceServer::<Decisions>::NAME;
    for service in [WHOLE, rollouts, decisions, TelemetryServiceServer::<Telemetry>::NAME] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
        // A client that watches hears that, and then the end of the stream, which the shutdown waits for.
        reporter.clear_service_status(service).await;
    }
}
