//! The verbs that change something: by any node, through the coordinator, once for each key. HTTP and gRPC both call them.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http::{HeaderMap, Request, header};
use http_body_util::Full;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use tracing::{info, warn};

use crate::code::Code;
use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::text::bounded;
use crate::entropy;
use crate::model::{Changed, Problem};
use crate::protocol::record::{ConfigChange, Slot};
use crate::protocol::{OperatorRequest, Outcome};

use super::auth::Actor;
use super::state::{ApiState, BODY_BYTES_MAX};

/// Set on a request that was forwarded once, with the node that did.
const FORWARDED: &str = "x-aviary-forwarded";
/// Longest wait for this node to serve by a write that the coordinator answered.
const SERVED_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the coordinator's answer.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Who asks for a write, and how.
pub struct Caller {
    /// Owner of the token; none where none is needed.
    pub actor: Option<Actor>,
    /// The idempotency key, the token, and the body's type.
    pub headers: HeaderMap,
}

/// Begins the rollout of a file, YAML or JSON.
pub async fn apply(state: &ApiState, caller: &Caller, body: &Bytes) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let text =
        std::str::from_utf8(body).map_err(|_| wrong("the rollout is not UTF-8, expected a rollout file".into()))?;
    let file = caller.headers.get("x-aviary-file").and_then(|name| name.to_str().ok()).unwrap_or("rollout");
    let manifest = crate::config::rollout::parse(text, file).map_err(|why| wrong(why.to_string()))?;
    submit(state, caller, "/v1/rollouts", body, OperatorRequest::Apply(Arc::new(manifest))).await
}

/// What a verb may be told beside the service's name.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Details {
    /// Promote to 100 %, without the stages between.
    #[serde(default)]
    pub full: bool,
    /// Promote to the next stage without the wait for samples.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_wait: bool,
    /// Reason for the history.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Changes a rollout by `verb`.
pub async fn change(
    state: &ApiState,
    caller: &Caller,
    name: &str,
    verb: &str,
    body: &Bytes,
) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let service = ServiceId::new(name).map_err(|why| wrong(why.to_string()))?;
    let details = if body.is_empty() { Ok(Details::default()) } else { serde_json::from_slice(body) };
    let Details { full, skip_wait, reason } =
        details.map_err(|why| wrong(format!("{why}; expected {{\"full\": …, \"skip_wait\": …, \"reason\": …}}")))?;
    let reason = bounded(reason.unwrap_or_default());
    let reason = if reason.is_empty() { "asked by an operator".to_string() } else { reason };
    let asked = match verb {
        "promote" if skip_wait && full => return Err(wrong("expected one of full and skip_wait".into())),
        "promote" if skip_wait => OperatorRequest::SkipWait { service },
        "promote" => OperatorRequest::Promote { service, full },
        "pause" => OperatorRequest::Pause { service, reason },
        "resume" => OperatorRequest::Resume { service },
        "abort" => OperatorRequest::Abort { service, reason },
        "retry" => OperatorRequest::Retry { service },
        "undo" => OperatorRequest::Undo { service },
        _ => {
            let expected = "promote, pause, resume, abort, retry or undo";
            return Err(Problem::new(Code::NotFound, format!("{verb:?} is unknown, expected {expected}")));
        }
    };
    submit(state, caller, &format!("/v1/rollouts/{name}/{verb}"), body, asked).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberBody {
    node: NodeId,
    #[serde(default)]
    incarnation: Option<String>,
}

/// Changes the members by `verb`.
pub async fn configure(state: &ApiState, caller: &Caller, verb: &str, body: &Bytes) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let MemberBody { node, incarnation } =
        serde_json::from_slice(body).map_err(|why| wrong(format!("{why}; expected {{\"node\": …}}")))?;
    let incarnation = incarnation.map(|text| u64::from_str_radix(&text, 16).map(Incarnation));
    let change = match (verb, incarnation) {
        ("cordon", None) => ConfigChange::Cordon(node),
        ("uncordon", None) => ConfigChange::Uncordon(node),
        ("remove", None) => ConfigChange::Remove(node),
        ("readmit", Some(Ok(incarnation))) => ConfigChange::Readmit(node, incarnation),
        ("add", Some(Ok(incarnation))) => ConfigChange::Add(node, incarnation),
        ("readmit" | "add", _) => {
            let where_found = "GET /v1/cluster shows a member's, `aviary cluster join` a new node's";
            return Err(wrong(format!("expected the incarnation too, in hexadecimal: {where_found}")));
        }
        _ => {
            let expected = "cordon, uncordon, readmit, add or remove";
            return Err(Problem::new(Code::NotFound, format!("{verb:?} is unknown, expected {expected}")));
        }
    };
    submit(state, caller, &format!("/v1/cluster/{verb}"), body, OperatorRequest::Config(change)).await
}

/// Has a change decided, by the coordinator if it can be reached, else by this node: any node may run a ballot, and
/// the key makes a repetition harmless.
async fn submit(
    state: &ApiState,
    caller: &Caller,
    path: &str,
    body: &Bytes,
    asked: OperatorRequest,
) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let key = match caller.headers.get("idempotency-key").map(|key| key.to_str()) {
        None => random_key(),
        Some(Ok(key)) => key.to_string(),
        Some(Err(_)) => return Err(wrong("Idempotency-Key is not text".into())),
    };
    let tx = TxId::new(&key).map_err(|why| wrong(format!("Idempotency-Key: {why}")))?;
    if !caller.headers.contains_key(FORWARDED) {
        let coordinator = state.node.published.view().coordinator.clone();
        if let Some(address) = state.peers.get(&coordinator)
            && let Some(answer) = forward(state, address, path, &caller.headers, body, &tx).await
        {
            let slot = match &answer {
                Ok(changed) => changed.slot,
                Err(problem) => problem.facts.slot,
            };
            if let Some(slot) = slot {
                served(state, slot).await;
            }
            return answer;
        }
    }
    let actor = caller.actor.as_ref().map_or_else(|| NOBODY.to_string(), |actor| actor.name.to_string());
    info!(%tx, path, actor, "write asked for");
    let outcome = state.node.submit(tx.clone(), actor, asked).await;
    result(tx, outcome)
}

/// The actor of writes that need no token.
const NOBODY: &str = "anybody on loopback";

fn random_key() -> String {
    format!("tx-{:032x}", entropy::bits())
}

/// Returns the coordinator's answer; none when it gave none.
async fn forward(
    state: &ApiState,
    address: &str,
    path: &str,
    headers: &HeaderMap,
    body: &Bytes,
    tx: &TxId,
) -> Option<Result<Changed, Problem>> {
    let node = state.node.published.view().node.clone();
    let mut request = Request::post(format!("http://{address}{path}"))
        .header("idempotency-key", tx.as_str())
        .header(FORWARDED, node.as_str());
    for name in [header::AUTHORIZATION, header::CONTENT_TYPE, http::HeaderName::from_static("x-aviary-file")] {
        if let Some(value) = headers.get(&name) {
            request = request.header(name, value);
        }
    }
    let request = request.body(Full::from(body.clone())).ok()?;
    let answer = state.client.send(request, FORWARD_TIMEOUT, BODY_BYTES_MAX).await.ok()?;
    if !answer.status.is_success() {
        return Some(Err(Problem::read(answer.status, &answer.body)));
    }
    // What can't be read may have been done: the same key tells.
    let changed = serde_json::from_slice(&answer.body);
    Some(changed.map_err(|why| of_transaction(tx, Problem::new(Code::OutcomeUnknown, format!("{address}: {why}")))))
}

/// Waits until this node routes with the record in `slot`, so that a client that was answered here finds its write here; at most
/// [`SERVED_TIMEOUT`]. The coordinator routes with a record before it answers.
async fn served(state: &ApiState, slot: Slot) {
    // Before the view is looked at: what is published from here on is announced.
    let mut events = state.node.events();
    let wait = async {
        while state.node.published.view().head < slot {
            if matches!(events.recv().await, Err(RecvError::Closed)) {
                return;
            }
        }
    };
    if tokio::time::timeout(SERVED_TIMEOUT, wait).await.is_err() {
        warn!(slot = slot.0, "a write that the coordinator answered isn't served here yet");
    }
}

fn of_transaction(tx: &TxId, mut problem: Problem) -> Problem {
    problem.facts.txid = Some(tx.clone());
    problem
}

/// Returns what an outcome is to those who asked for the write.
fn result(tx: TxId, outcome: Outcome) -> Result<Changed, Problem> {
    let problem = match outcome {
        Outcome::Committed { slot, state, reason, repeated } => {
            return Ok(Changed { reason, ..Changed::committed(tx, slot, state, repeated) });
        }
        Outcome::Unchanged { state, reason, rolled_back } => {
            return Ok(Changed::unchanged(tx, state, reason, rolled_back));
        }
        Outcome::Aborted { slot, reasons, repeated } => {
            let mut problem = Problem::new(Code::Aborted, reasons.join("; "));
            let facts = &mut problem.facts;
            (facts.slot, facts.reasons, facts.repeated) = (Some(slot), reasons, Some(repeated));
            problem
        }
        Outcome::Refused(why) => Problem::new(Code::Refused, why),
        Outcome::KeyReused { slot } => {
            let why = format!("this Idempotency-Key was used for another request, in slot {slot}");
            let mut problem = Problem::new(Code::KeyReused, why);
            problem.facts.slot = Some(slot);
            problem
        }
        Outcome::NoQuorum { reached, needed } => Problem::no_quorum(reached, needed),
        Outcome::InDoubt => Problem::new(Code::OutcomeUnknown, "outcome unknown; repeat with the same Idempotency-Key"),
        Outcome::Busy => Problem::new(Code::Busy, "too many requests are waiting; try again"),
        Outcome::Current(_) => Problem::new(Code::Internal, "a write was answered as a read"),
    };
    Err(of_transaction(&tx, problem))
}
