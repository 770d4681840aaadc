//! Writes over HTTP: `service` does what they ask for.

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::routing::{MethodRouter, post};
use axum::{Extension, Json};
use http::HeaderMap;
use serde::Deserialize;

use crate::model::{Changed, Problem, WriteConsistency};

use super::auth::Actor;
use super::service::{self, Caller, ChangeVerb, MemberVerb};
use super::state::ApiState;

type Answer = Result<Json<Changed>, Problem>;

/// What every write may be asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WriteQuery {
    consistency: WriteConsistency,
}

fn caller(query: WriteQuery, actor: Option<Extension<Actor>>, headers: HeaderMap) -> Caller {
    Caller { actor: actor.map(|Extension(actor)| actor), headers, consistency: query.consistency }
}

/// Answers `POST /v1/rollouts`: begins the rollout of a file.
pub async fn apply(
    State(state): State<ApiState>,
    Query(query): Query<WriteQuery>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let caller = caller(query, actor, headers);
    service::apply(&state, &caller, &body).await.map(Json)
}

/// Returns what answers `POST /v1/rollouts/{name}/…`: proposes a change of a rollout.
pub fn change(verb: ChangeVerb) -> MethodRouter<ApiState> {
    let handler = async move |State(state): State<ApiState>,
                              Path(name): Path<String>,
                              Query(query): Query<WriteQuery>,
                              actor: Option<Extension<Actor>>,
                              headers: HeaderMap,
                              body: Bytes|
                -> Answer {
        let caller = caller(query, actor, headers);
        service::change(&state, &caller, &name, verb, &body).await.map(Json)
    };
    post(handler)
}

/// Answers `POST /v1/cluster/set-default`: proposes another default service.
pub async fn set_default(
    State(state): State<ApiState>,
    Query(query): Query<WriteQuery>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let caller = caller(query, actor, headers);
    service::set_default(&state, &caller, &body).await.map(Json)
}

/// Answers `POST /v1/cluster/set-servers`: proposes other servers of what serves a service's stable version.
pub async fn set_servers(
    State(state): State<ApiState>,
    Query(query): Query<WriteQuery>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let caller = caller(query, actor, headers);
    service::set_servers(&state, &caller, &body).await.map(Json)
}

/// Returns what answers `POST /v1/cluster/…`: proposes a change of the members.
pub fn configure(verb: MemberVerb) -> MethodRouter<ApiState> {
    let handler = async move |State(state): State<ApiState>,
                              Query(query): Query<WriteQuery>,
                              actor: Option<Extension<Actor>>,
                              headers: HeaderMap,
                              body: Bytes|
                -> Answer {
        let caller = caller(query, actor, headers);
        service::configure(&state, &caller, verb, &body).await.map(Json)
    };
    post(handler)
}
