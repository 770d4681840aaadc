//! `GET /v1/cluster/backup`: a backup of the cluster from this node's disk, while it serves.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};

use super::state::{ApiState, BackupSource, error};
use crate::backup::{Header, RECORDS_MAX, Writer, version_for};
use crate::node::handle::NodeHandle;
use crate::ports::StoreError;
use crate::protocol::View;
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::record::{Chosen, Slot};

/// Pieces that wait for a slow client; the node reads no further meanwhile.
const WAITING_MAX: usize = 2;
/// Longest wait for a client to take a piece.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a record is looked for that is decided, but not appended yet.
const APPEND_TRIES: u32 = 100;
/// Between two looks.
const APPEND_PAUSE: Duration = Duration::from_millis(10);

/// Why a backup ends before it is whole.
#[derive(Debug, thiserror::Error)]
enum CaptureError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the authority's certificate {}: {error}", .file.display())]
    Authority { file: PathBuf, error: io::Error },
    #[error("the log has slot {found:?} next, expected slot {expected}: try again, or another node")]
    Gap { expected: Slot, found: Option<Slot> },
    #[error("the client took nothing for {} s", PATIENCE.as_secs())]
    Slow,
    #[error("the client went away")]
    Gone,
    #[error("the task ended: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Answers with the backup. What can't be read is an error before the first byte, or a body that breaks off: the reader of a backup
/// sees that its end is missing.
pub async fn stream(State(state): State<ApiState>) -> Response {
    let Some(source) = state.backup.clone() else {
        return error(StatusCode::NOT_FOUND, "this node has no disk that could be backed up");
    };
    let Ok(turn) = source.turn.clone().try_acquire_owned() else {
        return error(
            StatusCode::TOO_MANY_REQUESTS,
            "another backup of this node is under way, expected one at a time",
        );
    };
    let capture = match Capture::begin(&state.node, &source).await {
        Ok(capture) => capture,
        Err(why) => return error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
    };
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let (shutdown, slot) = (state.shutdown.clone(), capture.head);
    tokio::spawn(async move {
        let sent = tokio::select! {
            () = shutdown.cancelled() => return,
            sent = capture.send(&sender, turn) => sent,
        };
        match sent {
            Ok(records) => info!(%slot, records, "backup sent"),
            Err(why) => {
                warn!(%slot, %why, "backup not sent");
                // Breaks the body off; nobody may be there any more.
                let _ = sender.try_send(Err(io::Error::other(why.to_string())));
            }
        }
    });
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    (kind, Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

/// A backup that is being made.
struct Capture {
    node: NodeHandle,
    writer: Writer,
    /// Pieces that come before the log.
    first: Vec<Vec<u8>>,
    /// The log's first records, which were read together with the checkpoint.
    records: Vec<Chosen>,
    /// Where the log goes on.
    next: Slot,
    /// Its last slot in this backup.
    head: Slot,
}

type Piece = Result<Bytes, io::Error>;

impl Capture {
    async fn begin(node: &NodeHandle, source: &BackupSource) -> Result<Self, CaptureError> {
        let authority = match source.authority.clone() {
            None => None,
            Some(file) => Some(spawn_blocking(move || read_certificates(file)).await??),
        };
        let (checkpoint, mut records, next) = Self::checkpoint_and_log(node).await?;
        let view = view_from(node, checkpoint.as_ref().map_or(Slot(0), |checkpoint| checkpoint.slot)).await?;
        // What a short log holds is all of it, and is not read again: it may begin later by then.
        let is_whole = records.len() < RECORDS_MAX;
        let last = records.last().filter(|last| is_whole && last.record.slot >= next);
        let (slot, hash) = match last {
            Some(last) => (last.record.slot, last.record.hash()),
            None => (view.head, view.head_hash),
        };
        records.retain(|chosen| chosen.record.slot <= slot);
        let header = Header {
            cluster: view.cluster,
            node: view.node.clone(),
            build: env!("CARGO_PKG_VERSION").into(),
            at_ms: node.published.clock().now().wall,
            slot,
            hash: Header::hash_of(&hash),
        };
        let mut writer = Writer::new(version_for(&view.uses));
        let mut pieces = vec![writer.begin(&header), writer.config(&source.config)];
        pieces.extend(authority.map(|pem| writer.authority(&pem)));
        pieces.extend(checkpoint.as_ref().map(|checkpoint| writer.checkpoint(checkpoint)));
        Ok(Self { node: node.clone(), writer, first: pieces, records, next, head: slot })
    }

    /// Reads a checkpoint, and the log's first records with all that was decided before the call, as far as they are few; and
    /// says which slot they begin with. The log may lose its beginning between the two reads: then both are read again.
    async fn checkpoint_and_log(node: &NodeHandle) -> Result<(Option<Checkpoint>, Vec<Chosen>, Slot), CaptureError> {
        let decided = node.published.view().head;
        let mut last = Err(CaptureError::Gap { expected: decided, found: None });
        for _ in 0..APPEND_TRIES {
            let log = node.log.clone();
            let read = move || Ok::<_, StoreError>((log.checkpoint()?, log.read(Slot(0), RECORDS_MAX)?));
            let (checkpoint, records) = spawn_blocking(read).await??;
            let slot = |chosen: Option<&Chosen>| chosen.map(|chosen| chosen.record.slot);
            let told = slot(records.last()).max(checkpoint.as_ref().map(|checkpoint| checkpoint.slot));
            let is_short = records.len() < RECORDS_MAX && told < Some(decided);
            last = first_slot(checkpoint.as_ref(), slot(records.first())).map(|next| (checkpoint, records, next));
            if last.is_ok() && !is_short {
                return last;
            }
            tokio::time::sleep(APPEND_PAUSE).await;
        }
        last
    }

    /// Sends all pieces; returns how many records were among them.
    async fn send(mut self, to: &mpsc::Sender<Piece>, _turn: OwnedSemaphorePermit) -> Result<u64, CaptureError> {
        for piece in std::mem::take(&mut self.first) {
            send(to, piece).await?;
        }
        let mut records = 0;
        let first = std::mem::take(&mut self.records);
        if let Some(last) = first.last() {
            self.next = last.record.slot.next();
            records += first.len() as u64;
            send(to, self.writer.log(&first)).await?;
        }
        while self.next <= self.head {
            let batch = self.next_records().await?;
            records += batch.len() as u64;
            send(to, self.writer.log(&batch)).await?;
        }
        send(to, self.writer.end()).await?;
        Ok(records)
    }

    /// Reads the log's next records up to the head. A record is published a moment before it is appended.
    async fn next_records(&mut self) -> Result<Vec<Chosen>, CaptureError> {
        for _ in 0..APPEND_TRIES {
            let (log, from) = (self.node.log.clone(), self.next);
            let mut batch = spawn_blocking(move || log.read(from, RECORDS_MAX)).await??;
            batch.retain(|chosen| chosen.record.slot <= self.head);
            let Some((first, last)) = batch.first().zip(batch.last()) else {
                tokio::time::sleep(APPEND_PAUSE).await;
                continue;
            };
            if first.record.slot != from {
                return Err(CaptureError::Gap { expected: from, found: Some(first.record.slot) });
            }
            self.next = last.record.slot.next();
            return Ok(batch);
        }
        Err(CaptureError::Gap { expected: self.next, found: None })
    }
}

/// Returns the node's view once it shows a slot: that of a record that only tells a verdict is shown a moment later.
async fn view_from(node: &NodeHandle, expected: Slot) -> Result<Arc<View>, CaptureError> {
    for _ in 0..APPEND_TRIES {
        let view = node.published.view();
        if view.head >= expected {
            return Ok(view);
        }
        tokio::time::sleep(APPEND_PAUSE).await;
    }
    Err(CaptureError::Gap { expected, found: None })
}

/// Returns the first slot of the log to send: the first one that is kept, if it follows the checkpoint without a gap.
fn first_slot(checkpoint: Option<&Checkpoint>, first: Option<Slot>) -> Result<Slot, CaptureError> {
    let expected = checkpoint.map_or(Slot(0), |checkpoint| checkpoint.slot.next());
    match first {
        Some(first) if first <= expected => Ok(first),
        // A log that was just replaced by a checkpoint goes on after it.
        None if checkpoint.is_some() => Ok(expected),
        found => Err(CaptureError::Gap { expected, found }),
    }
}

async fn send(to: &mpsc::Sender<Piece>, piece: Vec<u8>) -> Result<(), CaptureError> {
    match tokio::time::timeout(PATIENCE, to.send(Ok(piece.into()))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(CaptureError::Gone),
        Err(_) => Err(CaptureError::Slow),
    }
}

fn read_certificates(file: PathBuf) -> Result<String, CaptureError> {
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(certificates(&text)),
        Err(error) => Err(CaptureError::Authority { file, error }),
    }
}

/// Returns the certificates of a PEM file, without whatever else somebody put into it.
fn certificates(pem: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    let blocks = pem.split_inclusive(END).filter(|block| block.ends_with(END));
    let blocks = blocks.filter_map(|block| block.rfind("-----BEGIN ").map(|at| &block[at..]));
    blocks.map(|block| format!("{block}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certificates_of_a_pem_file_are_backed_up() {
        let (certificate, key) = (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "-----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----\n",
        );
        assert_eq!(certificates(&format!("{key}note\n{certificate}{key}")), certificate);
        assert_eq!(certificates(key), "");
    }

    #[test]
    fn a_log_that_does_not_reach_back_to_the_checkpoint_gives_no_backup() {
        let checkpoint = Checkpoint { slot: Slot(8), format: 3, bytes: Bytes::new() };
        let first = |checkpoint, first| first_slot(checkpoint, first).ok();
        assert_eq!(first(None, Some(Slot(0))), Some(Slot(0)));
        assert_eq!(first(Some(&checkpoint), Some(Slot(3))), Some(Slot(3)));
        assert_eq!(first(Some(&checkpoint), None), Some(Slot(9)));
        assert_eq!(first(Some(&checkpoint), Some(Slot(10))), None);
        assert_eq!(first(None, Some(Slot(1))), None);
        assert_eq!(first(None, None), None);
    }
}
