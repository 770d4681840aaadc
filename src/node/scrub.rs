//! Reading everything again, now and then: a disk that loses what it holds should be found out before it is needed.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use crate::ports::{LogReader, StoreError};
use crate::protocol::checkpoint::CheckpointError;
use crate::protocol::record::{Hash, Slot};

/// Time between two rounds: an hour.
const EVERY: Duration = Duration::from_secs(3_600);
/// Records read at once, and the pause between two reads: a round is slow on purpose.
const BATCH: usize = 256;
const PAUSE: Duration = Duration::from_millis(50);

/// Reads checkpoint and log every hour until `shutdown`; what can't be read is told, and counted as
/// `aviary_scrub_failures_total`.
pub async fn run(log: Arc<dyn LogReader>, shutdown: CancellationToken) {
    let failures = metrics::counter!("aviary_scrub_failures_total");
    let rounds = async {
        loop {
            tokio::time::sleep(EVERY).await;
            match round(&log).await {
                Ok(records) => debug!(records, "the disk was read again, all of it is good"),
                Err(why) => {
                    failures.increment(1);
                    error!(
                        "the disk does not hold what was written: {why}; restart this node: it moves what is damaged \
                         aside and fetches it from its peers"
                    );
                }
            }
        }
    };
    let _ = shutdown.run_until_cancelled(rounds).await;
}

/// Finding of a round: the disk does not hold what was written, or could not be read.
#[derive(Debug, thiserror::Error)]
enum ScrubError {
    /// The checkpoint or a record can't be read.
    #[error(transparent)]
    Read(#[from] StoreError),
    /// The checkpoint can be read, and is no ledger.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// A record of another history than the one before it.
    #[error("slot {slot} follows {found}, expected the hash of the one before it")]
    Follows { slot: Slot, found: Hash },
    /// The thread that reads has panicked.
    #[error(transparent)]
    Thread(#[from] JoinError),
}

/// Reads all of it once; returns how many records there were.
async fn round(log: &Arc<dyn LogReader>) -> Result<u64, ScrubError> {
    let reader = log.clone();
    if let Some(checkpoint) = blocking(move || reader.checkpoint()).await? {
        checkpoint.ledger()?;
    }
    let mut last: Option<(Slot, Hash)> = None;
    let mut records = 0;
    loop {
        let (reader, from) = (log.clone(), last.map_or(Slot(0), |(slot, _)| slot.next()));
        let batch = blocking(move || reader.read(from, BATCH)).await?;
        for chosen in &batch {
            let (slot, found) = (chosen.record.slot, chosen.record.prev_hash);
            // What was let go between two reads is no hole.
            if last.is_some_and(|(previous, hash)| previous.next() == slot && hash != found) {
                return Err(ScrubError::Follows { slot, found });
            }
            last = Some((slot, chosen.record.hash()));
        }
        records += batch.len() as u64;
        if batch.len() < BATCH {
            return Ok(records);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ScrubError> {
    Ok(tokio::task::spawn_blocking(read).await??)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::checkpoint::Checkpoint;
    use crate::protocol::record::Chosen;

    /// A log whose third record follows another history, if `altered`.
    struct Log(Vec<Chosen>);

    impl LogReader for Log {
        fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError> {
            Ok(self.0.iter().filter(|chosen| chosen.record.slot >= from).take(most).cloned().collect())
        }

        fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError> {
            Ok(None)
        }
    }

    #[tokio::test]
    async fn a_log_is_read_to_its_end_and_an_altered_record_is_found() {
        let log = crate::adapters::conformance::chain(600);
        let reader: Arc<dyn LogReader> = Arc::new(Log(log.clone()));
        assert_eq!(round(&reader).await.unwrap(), 600);
        let mut altered = log;
        altered[300].record.intent.digest += 1;
        let reader: Arc<dyn LogReader> = Arc::new(Log(altered));
        assert!(matches!(round(&reader).await, Err(ScrubError::Follows { slot: Slot(301), .. })));
    }
}
