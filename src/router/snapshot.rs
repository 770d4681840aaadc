//! A router as its topics and groups show it, whether it runs or not.

use crate::domain::router_state::{RouterPhase, RouterState};
use crate::domain::side::Side;
use crate::domain::split::{OffsetMetadataError, Split};
use crate::ports::{OutsideError, RouterTopics, Topic};

/// Why a router can't be seen.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// The broker doesn't answer as it should: another try may succeed.
    #[error(transparent)]
    Outside(#[from] OutsideError),
    /// The places that a router had are not there any more.
    #[error("router: its places are gone: brokers keep them for some days after the end")]
    Gone,
    /// A place was committed that no router of this version writes: no other try reads it.
    #[error("partition {partition}: {why}")]
    Metadata {
        /// The partition of the source topic.
        partition: usize,
        /// What is wrong with its metadata.
        why: OffsetMetadataError,
    },
}

/// What is seen of a router.
#[derive(Debug, Clone)]
pub struct RouterSnapshot {
    /// What its control topic's entries add up to.
    pub control: RouterState,
    /// Each partition's state, as it was committed last.
    pub splits: Vec<Split>,
    /// The next offset that is read of each partition.
    pub next: Vec<i64>,
}

impl RouterSnapshot {
    /// Looks at a router's topics.
    ///
    /// # Errors
    /// When they can't be read, or a place was committed that no router of this version writes.
    pub fn look(topics: &dyn RouterTopics) -> Result<Self, LookError> {
        let opened = topics.look()?;
        let mut control = RouterState::default();
        for line in &opened.entries {
            if let Ok(entry) = serde_json::from_str(line) {
                control.add(entry);
            }
        }
        let places: Vec<_> = opened.places.into_iter().flatten().collect();
        let splits = places.iter().enumerate().map(|(partition, place)| {
            Split::from_metadata(&place.metadata).map_err(|why| LookError::Metadata { partition, why })
        });
        let splits = splits.collect::<Result<_, _>>()?;
        Ok(Self { control, splits, next: places.iter().map(|place| place.next).collect() })
    }

    /// Returns who goes on alone; none before the end.
    pub fn winner(&self) -> Option<Side> {
        match self.control.phase {
            Some(RouterPhase::Done { winner, .. }) => Some(winner),
            _ => None,
        }
    }

    /// Returns the present phase in words.
    pub fn words(&self) -> &'static str {
        self.control.phase.as_ref().map_or("not started", RouterPhase::words)
    }

    /// Returns upper bounds of what the two services have left to read, for each partition, stable's first.
    pub fn lags(&self, topics: &dyn RouterTopics) -> Result<[Vec<u64>; 2], OutsideError> {
        let mut lags = [Vec::new(), Vec::new()];
        for side in Side::BOTH {
            let (_, reads) = topics.service(side, Topic::Of(side))?;
            lags[side as usize] = super::engine::lags(&self.splits, side, &reads).collect();
        }
        Ok(lags)
    }
}
