//! The verbs that change something: by any node, through the coordinator, once for each key. HTTP and gRPC both call them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http::{HeaderMap, Request, header};
use http_body_util::Full;
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;
use tracing::{info, warn};

use crate::code::Code;
use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::file::checked_url;
use crate::domain::text::bounded;
use crate::entropy;
use crate::model::{
    ChangeDetails, Changed, MemberData, MemberName, Problem, ServiceName, ServiceServers, WriteConsistency,
};
use crate::protocol::feature::Feature;
use crate::protocol::record::{ConfigChange, Slot};
use crate::protocol::{OperatorRequest, Outcome};

use super::auth::Actor;
use super::reach;
use super::state::{ApiState, BODY_BYTES_MAX};

/// Set on a request that was forwarded once, with the node that did.
const FORWARDED: &str = "x-aviary-forwarded";
/// Longest wait for this node to serve by a write that the coordinator answered.
const SERVED_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the coordinator's answer.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the coordinator's answer to a decrease: with the second that this node needs by itself, and what is on the
/// way, it is answered within 3.5 s.
const DECREASE_FORWARD_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks at who coordinates, while an answer is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// Who asks for a write, and how.
pub struct Caller {
    /// Owner of the token; none where none is needed.
    pub actor: Option<Actor>,
    /// The idempotency key, the token, and the body's type.
    pub headers: HeaderMap,
    /// When the write is answered.
    pub consistency: WriteConsistency,
}

/// A change of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeVerb {
    /// To the next step, or to 100 %.
    Promote,
    /// Holds the weight.
    Pause,
    /// Continues a paused rollout.
    Resume,
    /// All traffic back to stable.
    Abort,
    /// Starts a rolled-back rollout again.
    Retry,
    /// Starts a rollout back to the former version.
    Undo,
}

impl ChangeVerb {
    fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Abort => "abort",
            Self::Retry => "retry",
            Self::Undo => "undo",
        }
    }
}

/// A change of the cluster's members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberVerb {
    /// Out of the promotion votes.
    Cordon,
    /// Into them again.
    Uncordon,
    /// Its vote counts again.
    Readmit,
    /// A voter more.
    Add,
    /// A voter less.
    Remove,
}

impl MemberVerb {
    fn name(self) -> &'static str {
        match self {
            Self::Cordon => "cordon",
            Self::Uncordon => "uncordon",
            Self::Readmit => "readmit",
            Self::Add => "add",
            Self::Remove => "remove",
        }
    }
}

/// Begins the rollout of a file, YAML or JSON.
pub async fn apply(state: &ApiState, caller: &Caller, body: &Bytes) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let text =
        std::str::from_utf8(body).map_err(|_| wrong("the rollout is not UTF-8, expected a rollout file".into()))?;
    let file = caller.headers.get("x-aviary-file").and_then(|name| name.to_str().ok());
    let file = file.filter(|name| !name.is_empty()).unwrap_or("rollout");
    let manifest = crate::config::rollout::parse(text, file).map_err(|why| wrong(why.to_string()))?;
    submit(state, caller, "/v1/rollouts", body, OperatorRequest::Apply(Arc::new(manifest))).await
}

/// Changes a rollout by `verb`.
pub async fn change(
    state: &ApiState,
    caller: &Caller,
    name: &str,
    verb: ChangeVerb,
    body: &Bytes,
) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let service = ServiceId::new(name).map_err(|why| wrong(why.to_string()))?;
    let details = if body.is_empty() { Ok(ChangeDetails::default()) } else { serde_json::from_slice(body) };
    let ChangeDetails { full, skip_wait, now, reason } = details.map_err(|why| {
        wrong(format!("{why}; expected {{\"full\": …, \"skip_wait\": …, \"now\": …, \"reason\": …}}"))
    })?;
    let reason = bounded(reason.unwrap_or_default());
    let reason = if reason.is_empty() { "asked by an operator".to_string() } else { reason };
    let asked = match verb {
        ChangeVerb::Promote if skip_wait && full => return Err(wrong("expected one of full and skip_wait".into())),
        ChangeVerb::Promote if skip_wait => OperatorRequest::SkipWait { service },
        ChangeVerb::Promote => OperatorRequest::Promote { service, full },
        ChangeVerb::Pause => OperatorRequest::Pause { service, reason },
        ChangeVerb::Resume => OperatorRequest::Resume { service },
        ChangeVerb::Abort => OperatorRequest::Abort { service, reason },
        ChangeVerb::Retry => OperatorRequest::Retry { service },
        ChangeVerb::Undo if now => OperatorRequest::UndoNow { service },
        ChangeVerb::Undo => OperatorRequest::Undo { service },
    };
    submit(state, caller, &format!("/v1/rollouts/{name}/{}", verb.name()), body, asked).await
}

/// Changes the members by `verb`.
pub async fn configure(state: &ApiState, caller: &Caller, verb: MemberVerb, body: &Bytes) -> Result<Changed, Problem> {
    let change = match verb {
        MemberVerb::Cordon => ConfigChange::Cordon(member(body)?),
        MemberVerb::Uncordon => ConfigChange::Uncordon(member(body)?),
        MemberVerb::Remove => ConfigChange::Remove(member(body)?),
        MemberVerb::Readmit => member_data(body).map(|(node, data)| ConfigChange::Readmit(node, data))?,
        MemberVerb::Add => member_data(body).map(|(node, data)| ConfigChange::Add(node, data))?,
    };
    submit(state, caller, &format!("/v1/cluster/{}", verb.name()), body, OperatorRequest::Config(change)).await
}

fn member(body: &Bytes) -> Result<NodeId, Problem> {
    let found: Result<MemberName, _> = serde_json::from_slice(body);
    let wrong = |why| Problem::new(Code::InvalidArgument, format!("{why}; expected {{\"node\": …}}"));
    found.map(|MemberName { node }| node).map_err(wrong)
}

fn member_data(body: &Bytes) -> Result<(NodeId, Incarnation), Problem> {
    let wrong = |why: String| {
        let expected = "expected {\"node\": …, \"incarnation\": …}, the latter in hexadecimal";
        let where_found = "GET /v1/cluster shows a member's, `aviary cluster join` a new node's";
        Problem::new(Code::InvalidArgument, format!("{why}; {expected}: {where_found}"))
    };
    let MemberData { node, incarnation } = serde_json::from_slice(body).map_err(|why| wrong(why.to_string()))?;
    let digits = incarnation.bytes().all(|byte| byte.is_ascii_hexdigit());
    match u64::from_str_radix(&incarnation, 16) {
        Ok(number) if digits => Ok((node, Incarnation(number))),
        _ => Err(wrong(format!("incarnation is {incarnation:?}"))),
    }
}

/// Sends the requests that name no service to the one in the body. A coordinator of an older build doesn't know the verb, so this
/// node looks first whether every member does.
pub async fn set_default(state: &ApiState, caller: &Caller, body: &Bytes) -> Result<Changed, Problem> {
    let ServiceName { service } = serde_json::from_slice(body)
        .map_err(|why| Problem::new(Code::InvalidArgument, format!("{why}; expected {{\"service\": …}}")))?;
    let feature = Feature::DefaultService;
    let waits_for = state.waits_for(feature);
    if !waits_for.is_empty() {
        return Err(Problem::new(Code::Refused, not_ready(state, feature, &waits_for)));
    }
    submit(state, caller, "/v1/cluster/set-default", body, OperatorRequest::SetDefault { service }).await
}

/// How long a new server has to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Has what serves a service's stable version served by other servers, once each of them takes this node's connection; the coordinator
/// looks as well.
pub async fn set_servers(state: &ApiState, caller: &Caller, body: &Bytes) -> Result<Changed, Problem> {
    let wrong = |why: String| Problem::new(Code::InvalidArgument, why);
    let ServiceServers { service, servers } = serde_json::from_slice(body)
        .map_err(|why| wrong(format!("{why}; expected {{\"service\": …, \"servers\": […]}}")))?;
    let urls: Vec<String> =
        servers.iter().map(|url| checked_url(url).map_err(|why| wrong(why.to_string()))).collect::<Result<_, _>>()?;
    let feature = Feature::StableServers;
    let waits_for = state.waits_for(feature);
    if !waits_for.is_empty() {
        return Err(Problem::new(Code::Refused, not_ready(state, feature, &waits_for)));
    }
    for url in &urls {
        check_reachable(url).await.map_err(|why| {
            let expected = "expected a server that takes connections";
            Problem::new(Code::Refused, format!("{url}: {why}, {expected}: nothing was changed"))
        })?;
    }
    submit(state, caller, "/v1/cluster/set-servers", body, OperatorRequest::SetServers { service, urls }).await
}

/// Opens a connection to a server and closes it.
async fn check_reachable(url: &str) -> io::Result<()> {
    let address = url.split_once("://").map_or(url, |(_, address)| address);
    match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(connected) => connected.map(drop),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no connection within 2 s")),
    }
}

/// Has a change decided, by the coordinator if it answers in time, else by this node: any node may run a ballot, and
/// the key makes a repetition harmless. A coordinator that stands still keeps its connections, so that it is given up once
/// its peers take another node for the coordinator.
async fn submit(
    state: &ApiState,
    caller: &Caller,
    path: &str,
    body: &Bytes,
    asked: OperatorRequest,
) -> Result<Changed, Problem> {
    let mut changed = decide(state, caller, path, body, asked).await?;
    if caller.consistency == WriteConsistency::Everywhere {
        // A write that changed nothing was in force already, by this node's word: where its others are is told all the same.
        let slot = changed.slot.unwrap_or_else(|| state.node.published.view().head);
        changed.reach = Some(reach::wait(state, caller.headers.get(header::AUTHORIZATION), slot).await);
    }
    Ok(changed)
}

async fn decide(
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
        let is_decrease = matches!(
            asked,
            OperatorRequest::Abort { .. } | OperatorRequest::Undo { .. } | OperatorRequest::UndoNow { .. }
        );
        let limit = if is_decrease { DECREASE_FORWARD_TIMEOUT } else { FORWARD_TIMEOUT };
        if let Some(address) = state.peers.get(&coordinator)
            && let Some(answer) = tokio::select! {
                answer = forward(state, address, path, &caller.headers, body, &tx, limit) => answer,
                () = is_replaced(state, &coordinator) => None,
            }
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
    result(state, tx, with_state_of_then(state, outcome))
}

/// Returns once this node takes another one than `coordinator` for the coordinator.
async fn is_replaced(state: &ApiState, coordinator: &NodeId) {
    while state.node.published.view().coordinator == *coordinator {
        // Nothing says it at once to who doesn't follow all events, and a write may wait that long.
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns the outcome with the routing that the transaction led to. The core has that of the last record only; the log has all.
fn with_state_of_then(state: &ApiState, outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Committed { slot, state: None, reason, repeated } => {
            let records = state.node.log.read(slot, 1).unwrap_or_default();
            let record = records.into_iter().next().filter(|chosen| chosen.record.slot == slot);
            Outcome::Committed { slot, state: record.and_then(|chosen| chosen.record.state), reason, repeated }
        }
        other => other,
    }
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
    limit: Duration,
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
    if !headers.contains_key(header::CONTENT_TYPE) {
        // A call over gRPC has none for its rollout; JSON is YAML, too.
        request = request.header(header::CONTENT_TYPE, "application/yaml");
    }
    let request = request.body(Full::from(body.clone())).ok()?;
    let answer = state.client.send(request, limit, BODY_BYTES_MAX).await.ok()?;
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

/// Returns why a feature can't be used yet, with the nodes that it waits for and their builds.
fn not_ready(state: &ApiState, feature: Feature, waits_for: &[NodeId]) -> String {
    let told = |node: &NodeId| match state.node.greetings.of(node) {
        Some(greeting) => format!("node {node} runs {}", greeting.build()),
        None => format!("node {node} has not told its build"),
    };
    let nodes: Vec<_> = waits_for.iter().map(told).collect();
    let release = feature.release();
    format!("{feature} needs aviary {release} on every member: {}; upgrade it first", nodes.join(", "))
}

/// Returns what an outcome is to those who asked for the write.
fn result(state: &ApiState, tx: TxId, outcome: Outcome) -> Result<Changed, Problem> {
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
        Outcome::NotReady { feature, waits_for } => Problem::new(Code::Refused, not_ready(state, feature, &waits_for)),
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
