//! What happens, as server-sent events. A decision's `id` is its slot: a client may resume on any node.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::protocol::record::{Chosen, Slot};
use crate::protocol::{Announcement, Event};

use super::state::ApiState;

/// How often a silent stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Events that wait for one slow client; the rest waits in the log.
const WAITING_MAX: usize = 64;
/// Records read from the log at a time.
const BATCH: usize = 64;

/// `GET /v1/events`: from here on; with `Last-Event-ID: N`, the decisions after slot N first.
pub async fn follow(State(state): State<ApiState>, headers: HeaderMap) -> Response {
    let resume = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok()).map(Slot);
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let shutdown = state.shutdown.clone();
    // Before the answer: what is decided once a client knows that it is connected is told.
    let live = state.node.events();
    let told = resume.unwrap_or(state.node.published.view().head);
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sender.closed() => {}
            _ = feed(&state, live, told, resume.is_some(), &sender) => {}
        }
    });
    let stream = ReceiverStream::new(receiver).map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("alive");
    axum::response::Sse::new(stream).keep_alive(keep_alive).into_response()
}

/// Feeds one client until it goes away. Only its own queue fills when it is slow; what it missed meanwhile is read from the
/// log.
async fn feed(
    state: &ApiState,
    mut live: Receiver<Arc<Announcement>>,
    mut told: Slot,
    resumed: bool,
    client: &mpsc::Sender<Sse>,
) -> Option<()> {
    if resumed {
        told = replay(state, told, client).await?;
    }
    loop {
        match live.recv().await {
            Ok(announcement) => {
                let slot = announcement.event.decided();
                if slot.is_some_and(|slot| slot <= told) {
                    continue;
                }
                client.send(sse(&announcement, slot)).await.ok()?;
                told = slot.unwrap_or(told);
            }
            Err(RecvError::Lagged(_)) => told = replay(state, told, client).await?,
            Err(RecvError::Closed) => return None,
        }
    }
}

/// Sends the decisions after `told` from the log; returns the last slot sent, `told` when there is none.
async fn replay(state: &ApiState, mut told: Slot, client: &mpsc::Sender<Sse>) -> Option<Slot> {
    loop {
        let (log, from) = (state.node.log.clone(), told.next());
        let records = tokio::task::spawn_blocking(move || log.read(from, BATCH)).await.ok()?.ok()?;
        let Some(last) = records.last().map(|chosen| chosen.record.slot) else { return Some(told) };
        for chosen in &records {
            if let Some(announcement) = retold(state, chosen) {
                client.send(sse(&announcement, Some(chosen.record.slot))).await.ok()?;
            }
        }
        told = last;
        if records.len() < BATCH {
            return Some(told);
        }
    }
}

/// Returns a record of the log as it was announced, as far as the log knows.
fn retold(state: &ApiState, chosen: &Chosen) -> Option<Announcement> {
    let event = Event::of(chosen, phase_after(state, chosen), None)?;
    Some(Announcement { at: chosen.record.intent.at, node: state.node.published.view().node.clone(), event })
}

/// Returns where the rollout stands when the record is the last one that concerned it; empty for earlier ones, as a
/// record holds the routing only.
fn phase_after(state: &ApiState, chosen: &Chosen) -> String {
    let view = state.node.published.view();
    let service = chosen.record.intent.operation.service().and_then(|id| view.services.get(id));
    let last = service.filter(|service| service.slot == chosen.record.slot);
    last.map(|service| service.service.rollout.phase.to_string()).unwrap_or_default()
}

fn sse(announcement: &Announcement, slot: Option<Slot>) -> Sse {
    let data = serde_json::to_string(announcement).unwrap_or_default();
    let event = Sse::default().data(data);
    match slot {
        Some(slot) => event.id(slot.to_string()),
        None => event,
    }
}
