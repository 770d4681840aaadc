//! `consistency=everywhere`: a write is answered once all live nodes route with it, or the time is up.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use super::state::{ApiState, BODY_BYTES_MAX};
use crate::code::Code;
use crate::domain::ids::NodeId;
use crate::model::{ClusterView, Problem, Reach};
use crate::protocol::record::Slot;

/// Longest wait for the other nodes: together with the waits for the write itself it is less than clients wait for an answer.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for one answer of a node.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);
/// Between two questions to a node: a node follows a decision within a few milliseconds.
const ASK_PAUSE: Duration = Duration::from_millis(10);

/// What became of one node.
enum Seen {
    Serves,
    Away,
    Missing(String),
}

/// Waits until all live nodes route with the record in `slot`; the others are asked under the client's own token.
pub async fn wait(state: &ApiState, token: Option<&HeaderValue>, slot: Slot) -> Reach {
    let view = state.node.published.view();
    let mut reach = Reach { served_by: vec![view.node.clone()], ..Reach::default() };
    let (end, mut asked) = (Instant::now() + REACH_TIMEOUT, JoinSet::new());
    for node in view.members.keys().filter(|node| **node != view.node) {
        let (state, node, token) = (state.clone(), node.clone(), token.cloned());
        asked.spawn(async move {
            let seen = follow(&state, &node, token, slot, end).await;
            (node, seen)
        });
    }
    while let Some(followed) = asked.join_next().await {
        match followed {
            Ok((node, Seen::Serves)) => reach.served_by.push(node),
            Ok((node, Seen::Away)) => reach.away.push(node),
            Ok((node, Seen::Missing(why))) => drop(reach.missing.insert(node, why)),
            Err(why) => tracing::error!(%why, "a task that asked a node ended"),
        }
    }
    reach.served_by.sort();
    reach.away.sort();
    reach
}

/// Asks one node until it routes with the record in `slot`, until it isn't live, or until the time is up.
async fn follow(state: &ApiState, node: &NodeId, token: Option<HeaderValue>, slot: Slot, end: Instant) -> Seen {
    let Some(address) = state.peers.get(node) else {
        return Seen::Missing("the address of its API is not known here".into());
    };
    let mut why = format!("no answer within {} s", REACH_TIMEOUT.as_secs());
    loop {
        let is_live = state.node.published.view().members.get(node).is_some_and(|member| member.alive);
        match timeout_at(end, head(state, address, token.as_ref())).await {
            Ok(Ok(head)) if head >= slot => return Seen::Serves,
            Ok(Ok(head)) => why = format!("it is at slot {head}, expected slot {slot}"),
            Ok(Err(_)) if !is_live => return Seen::Away,
            Ok(Err(found)) => why = found.detail,
            Err(_) => return Seen::Missing(why),
        }
        if timeout_at(end, sleep(ASK_PAUSE)).await.is_err() {
            return Seen::Missing(why);
        }
    }
}

/// Returns the last slot that a node routes with, or why it didn't say so.
async fn head(state: &ApiState, address: &str, token: Option<&HeaderValue>) -> Result<Slot, Problem> {
    let mut request = Request::get(format!("http://{address}/v1/cluster"));
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, token);
    }
    let silent = |why: String| Problem::new(Code::Unavailable, why);
    let request = request.body(Full::<Bytes>::default()).map_err(|why| silent(why.to_string()))?;
    let answer = state.client.send(request, ASK_TIMEOUT, BODY_BYTES_MAX).await;
    let answer = answer.map_err(|why| silent(why.to_string()))?;
    if !answer.status.is_success() {
        return Err(Problem::read(answer.status, &answer.body));
    }
    let view: ClusterView = serde_json::from_slice(&answer.body).map_err(|why| silent(why.to_string()))?;
    Ok(view.head)
}
