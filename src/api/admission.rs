//! Which requests pass: each needs a token whose role is enough for it.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode, header};

use super::auth::{Actor, Role};
use super::state::{ApiState, error};

/// gRPC services that change nothing, though all of gRPC is POST.
const LOOKING: [&str; 4] = [
    "/aviary.v1.DecisionService/",
    "/aviary.v1.RolloutService/GetRollout",
    "/aviary.v1.RolloutService/ListRollouts",
    "/grpc.reflection.v1.ServerReflection/",
];

/// Returns the role that a request needs; none where it needs no token.
pub fn needed(method: &Method, path: &str) -> Option<Role> {
    let reads = matches!(*method, Method::GET | Method::HEAD);
    match path {
        // What the API is like is no secret.
        "/livez" | "/readyz" | "/v1/openapi.json" => None,
        path if path.starts_with("/grpc.health.v1.Health/") => None,
        path if LOOKING.iter().any(|service| path.starts_with(service)) => Some(Role::Viewer),
        // A backup is the whole cluster in a file.
        "/v1/cluster/backup" => Some(Role::Admin),
        path if path.starts_with("/v1/cluster") && !reads => Some(Role::Admin),
        _ => Some(if reads { Role::Viewer } else { Role::Operator }),
    }
}

/// Lets a request through when its token's role is enough; everything passes where no tokens are configured, which is
/// on loopback only.
pub async fn check(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let Some(tokens) = &state.tokens else { return next.run(request).await };
    let Some(needed) = needed(request.method(), request.uri().path()) else { return next.run(request).await };
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let actor = token.and_then(|value| value.strip_prefix("Bearer ")).and_then(|token| tokens.actor_of(token.trim()));
    match actor.cloned() {
        Some(actor) if actor.role >= needed => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Some(Actor { role, .. }) => {
            error(StatusCode::FORBIDDEN, format!("the token's role is {role}, expected {needed}"))
        }
        None => error(StatusCode::UNAUTHORIZED, "no known bearer token, expected header Authorization: Bearer …"),
    }
}
