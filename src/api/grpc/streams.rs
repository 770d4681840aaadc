//! `DecisionService` and `TelemetryService`: the streams, one out of the log, one into the counts.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::super::state::ApiState;
use crate::decisions::follow::{LogTail, Lost};
use crate::domain::ids::ServiceId;
use crate::protocol::Outcome;
use crate::protocol::record::{Sequence, Slot};
use crate::schema::v1::decision_service_server::DecisionService;
use crate::schema::v1::telemetry_service_server::TelemetryService;
use crate::schema::v1::watch_decisions_response::Event as Told;
use crate::schema::v1::{self, Heartbeat, ReportTelemetryRequest, ReportTelemetryResponse};
use crate::schema::v1::{WatchDecisionsRequest, WatchDecisionsResponse};
use crate::telemetry::event::{Rejection, ReportedEvent as Reported};

/// How often a stream says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Decisions that wait for one slow client; the rest waits in the log.
const WAITING_MAX: usize = 64;

/// Implements `DecisionService`: streams decisions from the log.
pub struct Decisions(pub ApiState);

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl DecisionService for Decisions {
    type WatchDecisionsStream = Streamed<WatchDecisionsResponse>;

    async fn watch_decisions(
        &self,
        request: Request<WatchDecisionsRequest>,
    ) -> Result<Response<Self::WatchDecisionsStream>, Status> {
        let WatchDecisionsRequest { service, after_sequence } = request.into_inner();
        if !service.is_empty() {
            ServiceId::new(&service).map_err(|why| Status::invalid_argument(format!("service: {why}")))?;
        }
        let state = self.0.clone();
        let after = match after_sequence {
            Some(after) => Some(self.kept_since(Sequence(after)).await?),
            None => None,
        };
        let place = state.streams.clone().try_acquire_owned();
        let place = place.map_err(|_| Status::resource_exhausted("too many streams are open; try another node"))?;
        // Before the answer: what is decided once a client knows that it is connected is told.
        let mut decisions = LogTail::new(&state.node, after);
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let response = |told| Ok(WatchDecisionsResponse { event: Some(told) });
        tokio::spawn(async move {
            let _place = place;
            let tell = async {
                loop {
                    let batch = match decisions.next().await {
                        Ok(batch) => batch,
                        Err(why) => {
                            let status = match &why {
                                Lost::Compacted { .. } => Status::out_of_range(why.to_string()),
                                Lost::Store(_) => Status::internal(why.to_string()),
                                Lost::Stopped => Status::unavailable(why.to_string()),
                            };
                            return drop(sender.send(Err(status)).await);
                        }
                    };
                    for decision in batch.into_iter().filter(|one| service.is_empty() || one.service == service) {
                        if sender.send(response(Told::Decision(decision))).await.is_err() {
                            return;
                        }
                    }
                }
            };
            let beat = async {
                let mut tick = tokio::time::interval(HEARTBEAT);
                loop {
                    tick.tick().await;
                    let sequence = Sequence::last_of(state.node.published.view().head).0;
                    // A client that has decisions waiting needs no sign of life.
                    let _ = sender.try_send(response(Told::Heartbeat(Heartbeat { sequence })));
                }
            };
            tokio::select! {
                () = state.shutdown.cancelled() => {}
                () = sender.closed() => {}
                () = beat => {}
                () = tell => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Decisions {
    /// Returns the place to go on after: 0 is before the oldest decision that is kept. Refuses one whose successors are no
    /// longer in the log, or that nobody has reached.
    async fn kept_since(&self, after: Sequence) -> Result<Sequence, Status> {
        let head = || self.0.node.published.view().head;
        let slot = after.slot();
        // Another node may have told what this one is about to learn.
        let current = slot <= head() || matches!(self.0.node.read().await, Outcome::Current(_));
        let head = head();
        // A verdict is in the log before it is shown.
        let known = self.first_from(slot).await? == Some(slot);
        if slot > head && !known {
            let newest = Sequence::last_of(head);
            return Err(match current {
                true => Status::out_of_range(format!(
                    "after_sequence is {after}, expected at most {newest}, the last one that this node knows"
                )),
                false => Status::unavailable(format!(
                    "this node knows sequences up to {newest}, expected {after}, and can't reach a majority: try another node"
                )),
            });
        }
        let next = after.next_slot();
        let first = self.first_from(next).await?;
        if after == Sequence(0) {
            return Ok(first.map_or(after, |first| Sequence::last_of(Slot(first.0.saturating_sub(1)))));
        }
        if next <= head && first != Some(next) {
            let first = first.map_or_else(|| head.to_string(), |slot| slot.to_string());
            let why = format!("decisions after {after} are no longer in this node's log, which begins at slot {first}");
            return Err(Status::out_of_range(why));
        }
        Ok(after)
    }

    /// Returns the first slot in the log from this one on.
    async fn first_from(&self, slot: Slot) -> Result<Option<Slot>, Status> {
        let log = self.0.node.log.clone();
        let read = tokio::task::spawn_blocking(move || log.read(slot, 1)).await;
        let records = read.map_err(|why| Status::internal(why.to_string()))?;
        let records = records.map_err(|why| Status::internal(why.to_string()))?;
        Ok(records.first().map(|chosen| chosen.record.slot))
    }
}

/// Implements `TelemetryService`: counts reported events.
pub struct Telemetry(pub ApiState);

#[tonic::async_trait]
impl TelemetryService for Telemetry {
    async fn report_telemetry(
        &self,
        request: Request<Streaming<ReportTelemetryRequest>>,
    ) -> Result<Response<ReportTelemetryResponse>, Status> {
        let mut batches = request.into_inner();
        let (mut accepted, mut rejected) = (0, BTreeMap::new());
        while let Some(batch) = batches.next().await {
            let receipt = self.0.intake.take(batch?.events.iter().map(reported));
            accepted += receipt.accepted;
            for (kind, count) in receipt.rejected {
                *rejected.entry(kind.to_string()).or_default() += count;
            }
        }
        Ok(Response::new(ReportTelemetryResponse { accepted, rejected }))
    }
}

fn reported(event: &v1::TelemetryEvent) -> Result<Reported<'_>, Rejection> {
    let at_ms = event.event_time.as_ref().and_then(|time| {
        let millis = u64::try_from(time.seconds).ok()?.checked_mul(1000)?;
        millis.checked_add(u64::try_from(time.nanos).ok()? / 1_000_000)
    });
    let at_ms = at_ms.ok_or_else(|| Rejection::Malformed("no event_time, expected one since 1970".into()))?;
    Reported::new(&event.service, &event.version, event.status.into(), event.latency_ms, at_ms, &event.event_id)
}
