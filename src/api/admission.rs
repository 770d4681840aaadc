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

/// Lets a request through when its token's role is enough; everything passes where no tokens are configured, which is
/// on loopback only.
pub async fn check(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let Some(tokens) = &state.tokens else { return next.run(request).await };
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
    let tokens = tokens.current();
    match token.and_then(bearer).and_then(|token| tokens.actor_of(token)).cloned() {
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

/// Returns the token of an Authorization field; none for another scheme. Schemes are known in any case (RFC 9110, 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_is_known_in_any_case() {
        for value in ["Bearer t", "bearer t", "BEARER  t", " bEaReR t "] {
            assert_eq!(bearer(value), Some("t"), "{value:?}");
        }
        for value in ["Basic t", "Bearert", "t", "", "Bearer", "Bearers t"] {
            assert_eq!(bearer(value), None, "{value:?}");
        }
    }
}
