//! Publishing decisions outside the cluster: the coordinator does, from where the last one stopped.

use std::time::Duration;

use metrics::{counter, gauge};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::follow::{LogTail, Lost};
use crate::backoff::Backoff;
use crate::node::handle::NodeHandle;
use crate::ports::{DecisionSink, OutsideError};
use crate::protocol::Mode;
use crate::protocol::record::{Sequence, Slot};

/// Between two looks at who coordinates.
const LOOK: Duration = Duration::from_millis(100);
/// First wait after a failure.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Longest wait between two tries to publish.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often the place is told anew while nothing is decided: brokers forget places that nobody commits to.
const KEEP: Duration = Duration::from_secs(6 * 3600);

/// Publishes what is decided to `sink`, while this node coordinates, until `shutdown`.
pub async fn run(node: NodeHandle, sink: Box<dyn DecisionSink>, name: &'static str, shutdown: CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = publish(node, sink, name) => {}
    }
}

async fn publish(node: NodeHandle, mut sink: Box<dyn DecisionSink>, name: &'static str) {
    let mut retry = Backoff::new(RETRY_MIN, RETRY_MAX);
    loop {
        if !coordinates(&node) {
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let (back, ended) = turn(&node, sink, name, &mut retry).await;
        sink = back;
        if let Err(why) = ended {
            counter!("aviary_publish_failures_total", "sink" => name).increment(1);
            warn!(sink = name, "decisions wait to be published: {why}");
            tokio::time::sleep(retry.wait()).await;
        }
    }
}

fn coordinates(node: &NodeHandle) -> bool {
    let view = node.published.view();
    view.coordinator == view.node && node.published.mode() == Mode::Normal
}

/// Calls what blocks, on a thread where that is allowed.
async fn blocking<T: Send + 'static>(
    mut sink: Box<dyn DecisionSink>,
    call: impl FnOnce(&mut dyn DecisionSink) -> T + Send + 'static,
) -> (Box<dyn DecisionSink>, T) {
    let called = tokio::task::spawn_blocking(move || {
        let result = call(sink.as_mut());
        (sink, result)
    });
    called.await.expect("a sink does not panic")
}

/// Publishes until another node coordinates, or something fails.
async fn turn(
    node: &NodeHandle,
    sink: Box<dyn DecisionSink>,
    name: &'static str,
    retry: &mut Backoff,
) -> (Box<dyn DecisionSink>, Result<(), OutsideError>) {
    let (mut sink, opened) = blocking(sink, |sink| sink.open()).await;
    let told = match opened {
        Ok(told) => told.unwrap_or(Slot(0)),
        Err(why) => return (sink, Err(why)),
    };
    info!(sink = name, after = told.0, "publishing decisions");
    let mut tail = LogTail::new(node, Some(Sequence::last_of(told)));
    while coordinates(node) {
        let decisions = tokio::select! {
            next = tokio::time::timeout(KEEP, tail.next()) => match next {
                Ok(Ok(decisions)) => decisions,
                Ok(Err(Lost::Compacted { after, first })) => {
                    warn!(sink = name, after = after.0, first_slot = first.0, "decisions are gone from the log unpublished");
                    counter!("aviary_publish_gaps_total", "sink" => name).increment(1);
                    tail.skip_to(Sequence::last_of(Slot(first.0 - 1)));
                    continue;
                }
                Ok(Err(why)) => return (sink, Err(OutsideError::new(name, why))),
                Err(_) => Vec::new(),
            },
            () = deposed(node) => break,
        };
        let (count, through) = (decisions.len() as u64, tail.told().slot());
        let (back, published) = blocking(sink, move |sink| sink.publish(&decisions, through)).await;
        sink = back;
        if let Err(why) = published {
            return (sink, Err(why));
        }
        retry.reset();
        counter!("aviary_decisions_published_total", "sink" => name).increment(count);
        gauge!("aviary_decisions_published_sequence", "sink" => name).set(Sequence::last_of(through).0 as f64);
    }
    (sink, Ok(()))
}

async fn deposed(node: &NodeHandle) {
    while coordinates(node) {
        tokio::time::sleep(LOOK).await;
    }
}
