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

/// Returns the role that a request needs; none where it needs no token.
pub fn needed(method: &Method, path: &str) -> Option<Role> {
    let reads = matches!(*method, Method::GET | Method::HEAD);
    match path {
        // What the API is like is no secret.
        "/livez" | "/readyz" | "/v1/openapi.json" => None,
        // A load balancer's health check, which the data port answers too.
        path if path.starts_with("/lease/") => None,
        path if path.starts_with("/grpc.health.v1.Health/") => None,
        path if LOOKING.iter().any(|service| path.starts_with(service)) => Some(Role::Viewer),
        // A backup is the whole cluster in a file.
        "/v1/cluster/backup" => Some(Role::Admin),
        path if path.starts_with("/v1/cluster") && !reads => Some(Role::Admin),
        _ => Some(if reads { Role::Viewer } else { Role::Operator }),
    }
}

/// Lets a request through when its token's role is enough. Where no tokens are configured, which is on loopback only, everything
/// passes but what a page of another site may have sent.
pub async fn check(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let Some(tokens) = &state.tokens else {
        return match browser::refusal(&request) {
            Some((status, why)) => error(status, why),
            None => next.run(request).await,
        };
    };
    let Some(needed) = needed(request.method(), request.uri().path()) else { return next.run(request).await };
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let tokens = tokens.current();
    match token.and_then(bearer).and_then(|token| tokens.actor_of(token)).cloned() {
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
