//! What happens, as server-sent events. A decision's `id` is its place among all decisions: a client may
//! resume on any node.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue};
use schemars::{Schema, SchemaGenerator, json_schema};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::code::Code;
use crate::domain::time::Wall;
use crate::model::Problem;
use crate::protocol::record::Sequence;
use crate::protocol::{Announcement, Event};

use super::state::ApiState;

/// How often a silent stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Events that wait for one slow client; the rest waits in the log.
const WAITING_MAX: usize = 64;
/// Records read from the log at a time.
const BATCH: usize = 64;

/// `GET /v1/events`: from here on; with `Last-Event-ID: N`, the decisions after N first.
pub async fn follow(State(state): State<ApiState>, headers: HeaderMap) -> Result<Response, Problem> {
    let resume = headers.get("last-event-id").map(after).transpose()?;
    let busy = |_| Problem::new(Code::Busy, "too many streams are open; try another node");
    let place = state.streams.clone().try_acquire_owned().map_err(busy)?;
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let shutdown = state.shutdown.clone();
    // Before the answer: what is decided once a client knows that it is connected is told.
    let live = state.node.events();
    let told = resume.unwrap_or_else(|| Sequence::last_of(state.node.published.view().head));
    tokio::spawn(async move {
        let _place = place;
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sender.closed() => {}
            _ = feed(&state, live, told, resume.is_some(), &sender) => {}
        }
    });
    let stream = ReceiverStream::new(receiver).map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("alive");
    Ok(axum::response::Sse::new(stream).keep_alive(keep_alive).into_response())
}

/// Returns the sequence after which a client resumes.
fn after(id: &HeaderValue) -> Result<Sequence, Problem> {
    let sequence = id.to_str().ok().and_then(|id| id.parse().ok()).map(Sequence);
    sequence.ok_or_else(|| {
        let why = format!("Last-Event-ID is {id:?}, expected the id of an event of this stream, a number");
        Problem::new(Code::InvalidArgument, why)
    })
}

/// Returns the stream's schema: a text, with a reference to what the data of each event is.
pub fn schema(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "x-event-data": generator.subschema_for::<Announcement>() })
}

/// Feeds one client until it goes away. Only its own queue fills when it is slow; what it missed meanwhile is read from the
/// log.
async fn feed(
    state: &ApiState,
    mut live: Receiver<Arc<Announcement>>,
    mut told: Sequence,
    resumed: bool,
    client: &mpsc::Sender<Sse>,
) -> Option<()> {
    if resumed {
        told = replay(state, told, client).await?;
    } else {
        // No event, but the place that a client resumes after, should the stream be cut before its first decision.
        client.send(Sse::default().id(told.to_string())).await.ok()?;
    }
    loop {
        match live.recv().await {
            Ok(announcement) => {
                let sequence = announcement.event.sequence();
                if sequence.is_some_and(|sequence| sequence <= told) {
                    continue;
                }
                client.send(sse(&announcement)).await.ok()?;
                told = sequence.unwrap_or(told);
            }
            Err(RecvError::Lagged(_)) => told = replay(state, told, client).await?,
            Err(RecvError::Closed) => return None,
        }
    }
}

/// Sends the decisions after `told` from the log; returns the last place that was looked at.
async fn replay(state: &ApiState, mut told: Sequence, client: &mpsc::Sender<Sse>) -> Option<Sequence> {
    let node = state.node.published.view().node.clone();
    loop {
        let (log, from) = (state.node.log.clone(), told.next_slot());
        let records = tokio::task::spawn_blocking(move || log.read(from, BATCH)).await.ok()?.ok()?;
        let Some(last) = records.last().map(|chosen| chosen.record.slot) else { return Some(told) };
        for (sequence, event) in records.iter().flat_map(Event::of) {
            if sequence > told {
                client.send(sse(&Announcement::new(event, Wall::default(), &node))).await.ok()?;
            }
        }
        told = told.max(Sequence::last_of(last));
        if records.len() < BATCH {
            return Some(told);
        }
    }
}

/// The same for an event that is live and for one that is read from the log.
fn sse(announcement: &Announcement) -> Sse {
    let event = Sse::default().data(serde_json::to_string(announcement).unwrap_or_default());
    match announcement.event.sequence() {
        Some(sequence) => event.id(sequence.to_string()),
        None => event,
    }
}
