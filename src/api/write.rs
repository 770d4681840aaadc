//! Writes over HTTP: `service` does what they ask for.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use http::HeaderMap;

use crate::model::{Changed, Problem};

use super::auth::Actor;
use super::service::{self, Caller};
use super::state::ApiState;

type Answer = Result<Json<Changed>, Problem>;

fn caller(actor: Option<Extension<Actor>>, headers: HeaderMap) -> Caller {
    Caller { actor: actor.map(|Extension(actor)| actor), headers }
}

/// Answers `POST /v1/rollouts`: begins the rollout of a file.
pub async fn apply(
    State(state): State<ApiState>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    service::apply(&state, &caller(actor, headers), &body).await.map(Json)
}

/// Answers `POST /v1/rollouts/{name}/{verb}`: proposes a change of a rollout.
pub async fn change(
    State(state): State<ApiState>,
    Path((name, verb)): Path<(String, String)>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    service::change(&state, &caller(actor, headers), &name, &verb, &body).await.map(Json)
}

/// Answers `POST /v1/cluster/set-default`: proposes another default service.
pub async fn set_default(
    State(state): State<ApiState>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    service::set_default(&state, &caller(actor, headers), &body).await.map(Json)
}

/// Answers `POST /v1/cluster/{verb}`: proposes a change of the members.
pub async fn configure(
    State(state): State<ApiState>,
    Path(verb): Path<String>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    service::configure(&state, &caller(actor, headers), &verb, &body).await.map(Json)
}
