//! Reads the log on: from a position to its end, then what is appended.

use std::sync::Arc;

use tokio::sync::broadcast::{Receiver, error::RecvError};

use super::decision;
use crate::node::handle::NodeHandle;
use crate::ports::{LogReader, StoreError};
use crate::protocol::record::{Sequence, Slot};
use crate::protocol::{Announcement, Event};
use crate::schema::v1::Decision;

/// Records read at a time.
const BATCH: usize = 64;

/// Why the log can't be read on.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// The log no longer has what comes next.
    #[error("decisions after {after} are no longer in this node's log, which begins at slot {first}")]
    Compacted {
        /// Position after which the reader wanted to continue.
        after: Sequence,
        /// Slot of the first one there is.
        first: Slot,
    },
    /// The log can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node is stopping; the reader should continue at another node.
    #[error("the node is stopping")]
    Stopped,
}

/// Tells every decision once, in order: first those that are in the log already, then each as it is made.
pub struct LogTail {
    log: Arc<dyn LogReader>,
    live: Receiver<Arc<Announcement>>,
    told: Sequence,
}

impl LogTail {
    /// Returns the tail of the log with the decisions after `after`; none: of those from now on.
    pub fn new(node: &NodeHandle, after: Option<Sequence>) -> Self {
        let live = node.events();
        let told = after.unwrap_or_else(|| Sequence::last_of(node.published.view().head));
        Self { log: node.log.clone(), live, told }
    }

    /// Returns the last place in the log that was looked at.
    pub fn told(&self) -> Sequence {
        self.told
    }

    /// Goes on after this place, whatever is missing before it.
    pub fn skip_to(&mut self, told: Sequence) {
        self.told = told;
    }

    /// Returns the next decisions, at least one; waits until there is one.
    pub async fn next(&mut self) -> Result<Vec<Decision>, Lost> {
        loop {
            let (log, after, from) = (self.log.clone(), self.told, self.told.next_slot());
            let read = tokio::task::spawn_blocking(move || log.read(from, BATCH));
            let records = read.await.map_err(|_| Lost::Stopped)??;
            match records.first().map(|chosen| chosen.record.slot) {
                Some(first) if first > from => return Err(Lost::Compacted { after, first }),
                Some(_) => {}
                None => {
                    // Whatever it is that was announced, the log says whether it was a decision.
                    match self.live.recv().await {
                        Ok(_) | Err(RecvError::Lagged(_)) => continue,
                        Err(RecvError::Closed) => return Err(Lost::Stopped),
                    }
                }
            }
            self.told = records.last().map_or(after, |chosen| Sequence::last_of(chosen.record.slot));
            let events = records.iter().flat_map(Event::of).filter(|(sequence, _)| *sequence > after);
            let decisions: Vec<_> = events.filter_map(|(_, event)| decision(&event)).collect();
            if !decisions.is_empty() {
                return Ok(decisions);
            }
        }
    }
}
