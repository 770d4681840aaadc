//! What is: rollouts, their history, the cluster.

use std::ops::Bound;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode, Uri};
use serde::Deserialize;

use crate::code::Code;
use crate::domain::apply::Standing;
use crate::domain::ids::ServiceId;
use crate::domain::rollout::Service;
use crate::model::{
    ClusterMember, ClusterOutsider, ClusterView, FeatureView, History, HistoryEntry, Problem, RolloutList,
    RolloutMetadata, RolloutView, Selector,
};
use crate::protocol::feature::Feature;
use crate::protocol::record::{Chosen, Operation, Slot};
use crate::protocol::{Hold, ServiceView, View};
use crate::status::{self, Port};

use super::state::{ApiState, error};

/// Most rollouts of one page, and as many as there are where the request gives no limit.
pub const PAGE_MAX: usize = 1000;

/// What `GET /v1/rollouts` may be asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListQuery {
    /// Labels that the rollouts must have.
    pub selector: String,
    /// Most rollouts of this page, 1 to [`PAGE_MAX`].
    pub limit: Option<usize>,
    /// Name after which the page begins.
    pub after: Option<ServiceId>,
}

/// Answers `GET /v1/rollouts`.
pub async fn list(State(state): State<ApiState>, Query(query): Query<ListQuery>) -> Result<Json<RolloutList>, Problem> {
    page(&state, query).map(Json)
}

/// Returns the last rollout of each service, by their names, a page at a time.
pub fn page(state: &ApiState, query: ListQuery) -> Result<RolloutList, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let selector: Selector = query.selector.parse().map_err(|why| wrong(format!("{why}")))?;
    let limit = query.limit.unwrap_or(PAGE_MAX);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(wrong(format!("limit is {limit}, expected 1 to {PAGE_MAX}")));
    }
    let view = state.node.published.view();
    let after = query.after.map_or(Bound::Unbounded, Bound::Excluded);
    let mut selected = view
        .services
        .range((after, Bound::Unbounded))
        .filter(|(_, found)| selector.selects(&found.service.rollout.spec.labels))
        .map(|(id, _)| id);
    let page: Vec<_> = selected.by_ref().take(limit).collect();
    let next = selected.next().and(page.last().copied()).cloned();
    let rollouts = page.into_iter().filter_map(|id| one(state, id)).collect();
    Ok(RolloutList { rollouts, next })
}

/// Answers `GET /v1/rollouts/{name}`: one rollout; 404 for an unknown service.
pub async fn rollout(State(state): State<ApiState>, Path(name): Path<String>) -> Result<Json<RolloutView>, Problem> {
    known(&state, &name).map(Json)
}

/// Returns one rollout.
///
/// # Errors
/// When no such service is known.
pub fn known(state: &ApiState, name: &str) -> Result<RolloutView, Problem> {
    let found = ServiceId::new(name).ok().and_then(|id| one(state, &id));
    found.ok_or_else(|| unknown(state, name))
}

/// Names of known services that an error lists.
const KNOWN_MAX: usize = 20;

fn unknown(state: &ApiState, name: &str) -> Problem {
    let view = state.node.published.view();
    let known: Vec<_> = view.services.keys().map(ServiceId::as_str).collect();
    let known = match known.len() {
        0 => "none yet".to_string(),
        count if count > KNOWN_MAX => format!("{count} others, such as {}", known[..KNOWN_MAX].join(", ")),
        _ => known.join(", "),
    };
    Problem::new(Code::NotFound, format!("rollout {name:?} is unknown, known: {known}"))
}

fn one(state: &ApiState, id: &ServiceId) -> Option<RolloutView> {
    let view = state.node.published.view();
    let service = &view.services.get(id)?.service;
    let spec = &service.rollout.spec;
    Some(RolloutView {
        name: id.clone(),
        metadata: RolloutMetadata { labels: spec.labels.clone(), annotations: spec.annotations.clone() },
        routing: status::routing_view(&state.node, id)?,
        health: status::health_view(&state.node, id)?,
        spec: (&***spec).into(),
        stable: Some(service.stable.clone()),
        was_served: Standing::from(service).was_served,
        manifest: spec.value(),
    })
}

/// Records read from the log at a time.
const BATCH: usize = 256;
/// Most records told at once: the newest.
const HISTORY_MAX: usize = 1000;

/// `GET /v1/rollouts/{name}/history`: every record that changed the service or was to, oldest first.
pub async fn history(State(state): State<ApiState>, Path(name): Path<String>) -> Response {
    let known = ServiceId::new(&name).ok().filter(|id| state.node.published.view().services.contains_key(id));
    let Some(id) = known else { return unknown(&state, &name).into_response() };
    let log = state.node.log.clone();
    let head = state.node.published.view().head;
    let read = tokio::task::spawn_blocking(move || {
        let mut found = std::collections::VecDeque::new();
        let mut from = Slot(0);
        let mut whole_from = None;
        while from <= head {
            let records = log.read(from, BATCH)?;
            let Some(last) = records.last() else { break };
            if from == Slot(0) {
                whole_from = records.first().map(|first| first.record.slot).filter(|first| *first > Slot(1));
            }
            from = last.record.slot.next();
            let concerns = |operation: &Operation| operation.service() == Some(&id) && !operation.is_verdict();
            for chosen in records.iter().filter(|chosen| concerns(&chosen.record.intent.operation)) {
                found.push_back(entry(chosen));
                if found.len() > HISTORY_MAX {
                    found.pop_front();
                    whole_from = found.front().map(|entry: &HistoryEntry| entry.slot);
                }
            }
        }
        Ok::<_, crate::ports::StoreError>(History { history: found.into(), whole_from })
    });
    match read.await {
        Ok(Ok(history)) => Json(history).into_response(),
        Ok(Err(why)) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
    }
}

fn entry(chosen: &Chosen) -> HistoryEntry {
    let record = &chosen.record;
    let state = record.state.as_ref();
    HistoryEntry {
        slot: record.slot,
        kind: record.intent.operation.name().into(),
        txid: record.intent.tx.clone(),
        proposed_at: record.intent.at,
        decided_at: chosen.decided_at,
        ballot: chosen.ballot.as_ref().map(ToString::to_string),
        version: state.map(|state| state.version),
        weights: state.map(|state| state.weights.clone()),
        phase: record.phase,
        actor: record.intent.actor.clone(),
        status: state.map(|state| state.status),
        reasons: record.intent.operation.reasons(),
        yes: record.certificate.as_ref().map(|certificate| certificate.yes.clone()),
        in_doubt: chosen.is_in_doubt(),
        hash: record.hash().to_string(),
    }
}

/// Answers `/routing/state`, `/health/snapshot`, `/livez`, `/readyz` and `/lease/SERVICE`.
pub async fn status(State(state): State<ApiState>, method: Method, uri: Uri) -> Response {
    match status::answer(&state.node, Port::Api, &method, &uri).await {
        Some(answer) => answer.map(Body::new),
        None => error(StatusCode::NOT_FOUND, format!("{} is no status", uri.path())),
    }
}

/// Answers `GET /v1/cluster`: members, coordinator and log positions.
pub async fn cluster(State(state): State<ApiState>) -> Json<ClusterView> {
    let view = state.node.published.view();
    let unsettled =
        |service: &ServiceView| matches!(service.serving.held_back, Some(Hold::InDoubt(_) | Hold::Decreasing));
    let in_doubt: Vec<_> =
        view.services.iter().filter(|(_, service)| unsettled(service)).map(|(id, _)| id.clone()).collect();
    let features = Feature::ALL.into_iter().map(|feature| {
        let waits_for = state.waits_for(feature).into_iter().map(|node| {
            let build = state.node.greetings.of(&node).map(|greeting| greeting.build().to_string());
            (node, build)
        });
        let used_by = used_by(&view, feature);
        FeatureView {
            name: feature.name().into(),
            protocol: feature.protocol(),
            release: feature.release().into(),
            used: view.uses.contains(&feature) || !used_by.is_empty(),
            used_by,
            waits_for: waits_for.collect(),
        }
    });
    let outsiders = view.outsiders.iter().map(|(node, outsider)| {
        let greeting = state.node.greetings.of(node);
        let shown = ClusterOutsider {
            alive: outsider.alive,
            head: outsider.head,
            incarnation: outsider.incarnation.to_string(),
            build: greeting.as_ref().map(|greeting| greeting.build().to_string()),
            protocol: greeting.map(|greeting| greeting.versions),
        };
        (node.clone(), shown)
    });
    let members = view.members.iter().map(|(node, member)| {
        let greeting = state.node.greetings.of(node);
        let shown = ClusterMember {
            alive: member.alive,
            api: state.peers.get(node).cloned(),
            cordoned: member.cordoned,
            head: member.head,
            incarnation: member.incarnation.to_string(),
            counts_not: member.counts_not.clone(),
            build: greeting.as_ref().and_then(|greeting| greeting.facts.get("build").cloned()),
            protocol: greeting.as_ref().map(|greeting| greeting.versions),
            formats: greeting.as_ref().map(|greeting| greeting.formats()),
        };
        (node.clone(), shown)
    });
    Json(ClusterView {
        cluster: view.cluster.to_string(),
        node: view.node.clone(),
        incarnation: view.incarnation.to_string(),
        membership: format!("{:?}", view.membership),
        mode: state.node.published.mode(),
        coordinator: view.coordinator.clone(),
        head: view.head,
        hash: view.head_hash.to_string(),
        in_doubt,
        open: view.open,
        default_service: view.default_service.clone(),
        features: features.collect(),
        outsiders: outsiders.collect(),
        members: members.collect(),
    })
}

/// Returns the services whose rollout under way can't go on at a member that doesn't know the feature.
fn used_by(view: &View, feature: Feature) -> Vec<ServiceId> {
    let uses = |service: &Service| match feature {
        Feature::DefaultService => false,
        Feature::RolloutSalt => {
            service.rollout.phase.is_active() && service.rollout.spec.assignment().salt_slot.is_some()
        }
    };
    view.services.iter().filter(|(_, shown)| uses(&shown.service)).map(|(id, _)| id.clone()).collect()
}
