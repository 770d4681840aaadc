//! Which requests pass: each needs a token whose role is enough for it; where there are no tokens, none of a browser's page.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode, header};

use super::auth::{Actor, Role};
use super::browser;
use super::state::{ApiState, error};
use crate::listener::KnownCaller;

/// gRPC services that change nothing, though all of gRPC is POST.
const LOOKING: [&str; 4] = [
    "/aviary.v1.DecisionService/",
    "/aviary.v1.RolloutService/GetRollout",
    "/aviary.v1.RolloutService/ListRollouts",
    "/grpc.reflection.v1.ServerReflection/",
];

/// Lets a request through when its token's role is enough. Where no tokens are configured, which is on loopback only, everything
/// passes but what a page of another site may have sent.
pub async fn check(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let Some(tokens) = &state.tokens else {
        return match browser::refusal(&request) {
            Some((status, why)) => error(status, why),
            None => next.run(request).await,
        };
    };
    let path = request.uri().path();
    let needed = match (matches!(*request.method(), Method::GET | Method::HEAD), path) {
        (_, "/livez" | "/readyz") => return next.run(request).await,
        (_, path) if path.starts_with("/grpc.health.v1.Health/") => return next.run(request).await,
        (_, path) if LOOKING.iter().any(|service| path.starts_with(service)) => Role::Viewer,
        // A backup is the whole cluster in a file.
        (true, "/v1/cluster/backup") => Role::Admin,
        (true, _) => Role::Viewer,
        (false, path) if path.starts_with("/v1/cluster") => Role::Admin,
        (false, _) => Role::Operator,
    };
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let actor = token.and_then(|value| value.strip_prefix("Bearer ")).and_then(|token| tokens.actor_of(token.trim()));
    match actor.cloned() {
        Some(actor) if actor.role >= needed => {
            request.extensions_mut().insert(actor);
            let mut answer = next.run(request).await;
            answer.extensions_mut().insert(KnownCaller);
            answer
        }
        Some(Actor { role, .. }) => {
            error(StatusCode::FORBIDDEN, format!("the token's role is {role}, expected {needed}"))
        }
        None => error(StatusCode::UNAUTHORIZED, "no known bearer token, expected header Authorization: Bearer …"),
    }
}
