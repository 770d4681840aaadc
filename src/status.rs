//! Status answers that both HTTP ports give: `/routing/state`, `/health/snapshot`, `/livez`, `/readyz`, `/lease/SERVICE`.
//! Ready means "can serve", and needs no majority: with two of three nodes dead the third is all that users have.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use serde::Serialize;

use crate::code::Code;
use crate::domain::ids::ServiceId;
use crate::domain::weights::Weight;
use crate::domain::window::Evidence;
use crate::model::{HealthView, LeaseView, ProbeStatus, ProbeView, Problem, ReadConsistency, RoutingView};
use crate::node::handle::NodeHandle;
use crate::protocol::{Hold, Mode, Outcome, ServiceView};

/// Begins the paths that tell whether this node may send a service's canary traffic.
const LEASE: &str = "/lease/";

/// The port that is asked. On the data port anybody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The operators' port.
    Api,
    /// The clients' port: no answer lists the services.
    Data,
}

/// Returns true for the paths that [`answer`] answers.
pub fn is_here(path: &str) -> bool {
    matches!(path, "/routing/state" | "/health/snapshot" | "/livez" | "/readyz") || leased(path).is_some()
}

/// Returns the service, as it is written in the path, whose lease a path asks for.
fn leased(path: &str) -> Option<&str> {
    path.strip_prefix(LEASE).filter(|name| !name.is_empty() && !name.contains('/'))
}

/// Answers `/routing/state`, `/health/snapshot`, `/livez`, `/readyz` and `/lease/SERVICE`; none for any other path.
pub async fn answer(node: &NodeHandle, port: Port, method: &Method, uri: &Uri) -> Option<Response<Full<Bytes>>> {
    let path = uri.path();
    if !is_here(path) {
        return None;
    }
    if *method != Method::GET && *method != Method::HEAD {
        let mut response = Problem::new(Code::MethodNotAllowed, format!("{path} takes GET")).response();
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(response);
    }
    Some(match path {
        "/livez" => json_response(StatusCode::OK, &ProbeView { status: ProbeStatus::Alive, mode: None }),
        "/readyz" => ready(node, asks_for_quorum(uri)),
        _ if leased(path).is_some() => lease(node, leased(path).unwrap_or_default()),
        _ => look(node, port, uri).await.unwrap_or_else(|problem| problem.response()),
    })
}

/// Answers `/routing/state` and `/health/snapshot`.
async fn look(node: &NodeHandle, port: Port, uri: &Uri) -> Result<Response<Full<Bytes>>, Problem> {
    let StatusQuery { service, consistency } = query(uri)?;
    if consistency == ReadConsistency::Linearizable {
        caught_up(node).await?;
    }
    let service = service_of(node, port, service)?;
    let answer = match uri.path() {
        "/routing/state" => routing_view(node, &service).map(|view| json_response(StatusCode::OK, &view)),
        _ => health_view(node, &service).map(|view| json_response(StatusCode::OK, &view)),
    };
    answer.ok_or_else(|| Problem::new(Code::NotFound, format!("service {service} is unknown")))
}

/// Returns an answer with this status and a body of one line of JSON.
pub fn json_response(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let Ok(body) = serde_json::to_string(body) else {
        return Problem::new(Code::Internal, "the answer is no JSON").response();
    };
    let mut response = Response::new(Full::from(format!("{body}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Waits until this node knows every write answered so far.
///
/// # Errors
/// When no majority answers, or the node can't tell.
pub async fn caught_up(node: &NodeHandle) -> Result<(), Problem> {
    match node.read().await {
        Outcome::Current(_) => Ok(()),
        Outcome::NoQuorum { reached, needed } => Err(Problem::no_quorum(reached, needed)),
        Outcome::Refused(why) => Err(Problem { status: 503, ..Problem::new(Code::Refused, why) }),
        _ => Err(Problem::new(Code::Unavailable, "the read could not be confirmed; try again")),
    }
}

/// What `/routing/state` and `/health/snapshot` may be asked for.
#[derive(Default)]
struct StatusQuery {
    /// Name of a service; none: the first one.
    service: Option<String>,
    consistency: ReadConsistency,
}

fn query(uri: &Uri) -> Result<StatusQuery, Problem> {
    let mut query = StatusQuery::default();
    for (key, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        match (&*key, &*value) {
            ("service", name) => query.service = Some(name.into()),
            ("consistency", "node") => query.consistency = ReadConsistency::Node,
            ("consistency", "linearizable") => query.consistency = ReadConsistency::Linearizable,
            ("consistency", found) => {
                let why = format!("consistency is {found:?}, expected node or linearizable");
                return Err(Problem::new(Code::InvalidArgument, why));
            }
            // Other programs may add parameters of their own, such as one that defeats a cache.
            _ => {}
        }
    }
    Ok(query)
}

fn service_of(node: &NodeHandle, port: Port, named: Option<String>) -> Result<ServiceId, Problem> {
    let view = node.published.view();
    let mut known = view.services.keys();
    let found = match &named {
        Some(name) => known.find(|id| id.as_str() == name),
        None => known.next(),
    };
    found.cloned().ok_or_else(|| {
        let detail = match named {
            Some(name) if !view.services.is_empty() => format!("service {name:?} is unknown"),
            _ => "no service is known here: apply a rollout first".to_string(),
        };
        let mut problem = Problem::new(Code::NotFound, detail);
        problem.facts.known = (port == Port::Api).then(|| view.services.keys().cloned().collect());
        problem
    })
}

fn asks_for_quorum(uri: &Uri) -> bool {
    let mut keys = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).map(|(key, _)| key);
    keys.any(|key| key == "quorum")
}

/// Answers `/readyz`: whether this node can serve requests; for `/readyz?quorum`, whether it can change something, too.
fn ready(node: &NodeHandle, needs_quorum: bool) -> Response<Full<Bytes>> {
    let mode = node.published.mode();
    let without_quorum = (needs_quorum && mode == Mode::FailSafe).then_some("no contact with a majority");
    let Some(reason) = node.published.not_ready().or(without_quorum) else {
        return json_response(StatusCode::OK, &ProbeView { status: ProbeStatus::Ready, mode: Some(mode) });
    };
    let mut problem = Problem::new(Code::Unavailable, format!("not ready: {reason}"));
    problem.facts.mode = Some(mode);
    problem.response()
}

/// Answers `/lease/SERVICE`: 200 while this node may send canary traffic of a service, else 503 with the reason. So a load balancer
/// that asks for it as a health check of the canary's servers keeps to the lease.
fn lease(node: &NodeHandle, name: &str) -> Response<Full<Bytes>> {
    let name = percent_decode_str(name).decode_utf8_lossy();
    match leased_share(node, &name) {
        Ok(view) => json_response(StatusCode::OK, &view),
        Err(why) => Problem::new(Code::Unavailable, format!("no canary traffic of {name:?}: {why}")).response(),
    }
}

/// Why a node sends no canary traffic of a service.
#[derive(Debug, thiserror::Error)]
enum NoShare {
    #[error("this node is about to stop")]
    Leaving,
    #[error("this service is unknown here")]
    Unknown,
    #[error("{0}")]
    Held(Hold),
    #[error("the lease has ended: no contact with a majority")]
    NoLease,
    #[error("the canary has no share")]
    NoCanary,
}

/// Returns the share of a service's traffic that the canary may get from this node, or why it gets none.
fn leased_share(node: &NodeHandle, name: &str) -> Result<LeaseView, NoShare> {
    if node.published.is_leaving() {
        return Err(NoShare::Leaving);
    }
    let view = node.published.view();
    let (service, found) = view.services.iter().find(|(id, _)| id.as_str() == name).ok_or(NoShare::Unknown)?;
    let serving = &found.serving;
    let bp = node.published.effective_bp(serving);
    let lease_ms_left = serving.lease_ms.and_then(|lease_ms| node.published.lease_ms_left(lease_ms));
    match (&serving.canary, &serving.held_back) {
        (Some((canary, _)), _) if bp > 0 => {
            let weight = Weight::from_bp(bp).unwrap_or_default().fraction();
            Ok(LeaseView { service: service.clone(), version: canary.version.clone(), weight, lease_ms_left })
        }
        (_, Some(hold)) => Err(NoShare::Held(hold.clone())),
        (Some((_, 1..)), None) => Err(NoShare::NoLease),
        (_, None) => Err(NoShare::NoCanary),
    }
}

/// Returns one service's routing as this node serves it; none when it is unknown.
pub fn routing_view(node: &NodeHandle, service: &ServiceId) -> Option<RoutingView> {
    let view = node.published.view();
    let found = view.services.get(service)?;
    let ServiceView { service: service_state, slot, hash, serving, waiting_for, enforced, .. } = &**found;
    let rollout = &service_state.rollout;
    let effective = Weight::from_bp(node.published.effective_bp(serving)).unwrap_or_default();
    let mut effective_weights = BTreeMap::from([(serving.stable.version.clone(), effective.rest().fraction())]);
    if let Some((canary, _)) = &serving.canary {
        effective_weights.insert(canary.version.clone(), effective.fraction());
    }
    Some(RoutingView {
        routing: service_state.routing.clone(),
        node: view.node.clone(),
        slot: *slot,
        hash: hash.to_string(),
        mode: node.published.mode(),
        phase: rollout.phase,
        stage: rollout.stage,
        stages: rollout.spec.stages.len(),
        rollout_generation: rollout.rollout_generation,
        assignment: rollout.spec.assignment(),
        reason: rollout.reason.clone(),
        waits_for_operator: rollout.waits_for_operator(),
        waiting_for: waiting_for.clone(),
        held_back: serving.held_back.as_ref().map(ToString::to_string),
        effective_weights,
        lease_ms_left: node.published.lease_ms_left(serving.lease_ms.unwrap_or(rollout.spec.lease_ms)),
        enforced: *enforced,
    })
}

/// Returns one service's evidence as this node and the cluster see it; none when it is unknown.
pub fn health_view(node: &NodeHandle, service: &ServiceId) -> Option<HealthView> {
    let view = node.published.view();
    let found = view.services.get(service)?;
    let (routing, spec) = (&found.service.routing, &found.service.rollout.spec);
    let versions = |evidence: &Evidence| {
        let mut versions = BTreeMap::from([(routing.stable_model_id.clone(), (&evidence.stable).into())]);
        if let Some(canary) = &routing.canary_model_id {
            versions.insert(canary.clone(), (&evidence.canary).into());
        }
        versions
    };
    Some(HealthView {
        service: routing.service.clone(),
        node: view.node.clone(),
        routing_version: routing.version,
        window_ms: spec.analysis.window_ms,
        local: versions(&found.local),
        cluster: versions(&found.cluster),
        verdict: found.verdict.as_ref().map(|verdict| verdict.word().into()),
        verdict_reason: found.verdict.as_ref().map(|verdict| verdict.reason().into()),
        sequential: found.sequential,
    })
}
