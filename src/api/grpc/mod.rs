//! gRPC on the API port: rollouts, decisions to follow, telemetry to report, health and reflection. The schema is in `proto/`.

use axum::Router;

mod health;
mod rollouts;
mod streams;

use super::state::ApiState;
use crate::schema::v1;
use crate::schema::v1::decision_service_server::DecisionServiceServer;
use crate::schema::v1::rollout_service_server::RolloutServiceServer;
use crate::schema::v1::telemetry_service_server::TelemetryServiceServer;
use rollouts::Rollouts;
use streams::{Decisions, Telemetry};

/// Adds the services to the API's routes.
pub fn routes(router: Router, state: &ApiState) -> Router {
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(health::report(reporter, state.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the schema was compiled with the program");
    router
        .route_service("/aviary.v1.RolloutService/{method}", RolloutServiceServer::new(Rollouts(state.clone())))
        .route_service("/aviary.v1.DecisionService/{method}", DecisionServiceServer::new(Decisions(state.clone())))
        .route_service("/aviary.v1.TelemetryService/{method}", TelemetryServiceServer::new(Telemetry(state.clone())))
        .route_service("/grpc.health.v1.Health/{method}", health)
        .route_service("/grpc.reflection.v1.ServerReflection/{method}", reflection)
}
