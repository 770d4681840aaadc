//! How one partition's records are split between the two versions, and the order of each key kept while the weight changes.
//!
//! Pure: what happened outside arrives as arguments. The state of a partition travels in the metadata of its committed
//! offset, so that it is as old as what was written, also after a crash.

use serde::{Deserialize, Serialize};

use super::assignment::TicketHash;
use super::side::Side;
use super::weights::Weight;

/// Tickets that move are looked at in this many groups, or fewer: each moves once its own records are read.
const BUCKETS_MAX: u16 = 64;
/// Longest text that a broker keeps beside an offset, by its own default (`offset.metadata.max.bytes`).
const METADATA_BYTES_MAX: usize = 4096;
/// Version of the offset metadata's format.
const METADATA: u8 = 2;

/// A record's place among the weights: the same whenever and wherever it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    value: u16,
    keyed: bool,
}

impl Ticket {
    /// Returns the ticket of a record: its key's, as in the data plane, so that records of one key keep their order. Without a key
    /// that matters, its place's: a uniform draw that replays alike.
    pub fn of(hash: TicketHash, key: Option<&[u8]>, partition: usize, offset: i64) -> Self {
        let Some(key) = key else {
            let mut place = [0; 16];
            place[..8].copy_from_slice(&(partition as u64).to_le_bytes());
            place[8..].copy_from_slice(&offset.to_le_bytes());
            return Self { value: hash.ticket(&place), keyed: false };
        };
        Self { value: hash.ticket(key), keyed: true }
    }

    /// Returns whom the record goes to while the weight doesn't change.
    pub fn side(self, weight: Weight) -> Side {
        if self.value < weight.bp() { Side::Canary } else { Side::Stable }
    }
}

/// One partition's state. Offsets are those of the partition of the same number in a version's own topic.
///
/// Invariant: what was taken is what was given to the two together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Which weight it is, counted from the rollout's start.
    weight_version: u64,
    /// The canary's share, of all tickets that don't wait.
    weight: Weight,
    /// A change of weight that keyed tickets still wait for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    change: Option<WeightTransition>,
    /// Records read from the source.
    taken: u64,
    /// Records given to stable and to canary.
    given: [u64; 2],
    /// Offset of the newest record in stable's and canary's topic.
    last: [Option<i64>; 2],
    /// Where in the canary's topic the records begin that were taken back for stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reclaimed: Option<i64>,
}

/// A change of weight, for the tickets between the former and the next one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WeightTransition {
    former: Weight,
    /// When it began, in milliseconds since 1970.
    since_ms: u64,
    /// For each bucket the offset in the former version's topic that must be read before it moves; none: it has moved.
    waits: Vec<Option<i64>>,
    /// Buckets that were given records whose offsets aren't known yet.
    #[serde(skip)]
    unwritten: u64,
}

#[derive(Serialize, Deserialize)]
struct OffsetMetadata {
    v: u8,
    #[serde(flatten)]
    split: Split,
}

/// Offset metadata that no router of this version wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {found:?} beside a committed offset, expected a router's offset metadata of version {METADATA}: {why}")]
pub struct OffsetMetadataError {
    found: String,
    why: String,
}

impl Split {
    /// Returns a partition's state before its first record.
    pub fn new(weight_version: u64, weight: Weight) -> Self {
        Self { weight_version, weight, change: None, taken: 0, given: [0; 2], last: [None; 2], reclaimed: None }
    }

    /// Returns the state of a partition whose own was lost: how many records each version has by its copies, and where the last is.
    /// No change of weight is waited for: both services must have read what they have.
    pub fn rebuilt(weight_version: u64, weight: Weight, given: [u64; 2], last: [Option<i64>; 2]) -> Self {
        Self { taken: given.iter().sum(), given, last, ..Self::new(weight_version, weight) }
    }

    /// Returns the state that offset metadata holds.
    pub fn from_metadata(metadata: &str) -> Result<Self, OffsetMetadataError> {
        let error = |why: String| OffsetMetadataError { found: metadata.chars().take(80).collect(), why };
        let read: OffsetMetadata = serde_json::from_str(metadata).map_err(|why| error(why.to_string()))?;
        let buckets = read.split.change.as_ref().map_or(1, |change| change.waits.len());
        match read {
            OffsetMetadata { v, .. } if v != METADATA => Err(error(format!("its version is {v}"))),
            _ if buckets == 0 || buckets > usize::from(BUCKETS_MAX) => Err(error(format!("{buckets} buckets"))),
            OffsetMetadata { split, .. } if split.taken != split.given.iter().sum::<u64>() => {
                Err(error("it doesn't add up".into()))
            }
            OffsetMetadata { split, .. } => Ok(split),
        }
    }

    /// Returns the text that goes beside the committed offset.
    pub fn metadata(&self) -> String {
        assert!(
            self.change.as_ref().is_none_or(|change| change.unwritten == 0),
            "offset metadata of offsets that aren't known"
        );
        let metadata =
            serde_json::to_string(&OffsetMetadata { v: METADATA, split: self.clone() }).expect("numbers and names");
        assert!(
            metadata.len() <= METADATA_BYTES_MAX,
            "offset metadata of {} bytes, expected {METADATA_BYTES_MAX} at most",
            metadata.len()
        );
        metadata
    }

    /// Returns the version that gets the next record, which is counted.
    pub fn take(&mut self, ticket: Ticket) -> Side {
        let side = self.side(ticket);
        self.taken += 1;
        self.given[side as usize] += 1;
        side
    }

    fn side(&mut self, ticket: Ticket) -> Side {
        let next = ticket.side(self.weight);
        let Some(change) = self.change.as_mut().filter(|_| ticket.keyed) else { return next };
        let former = ticket.side(change.former);
        if former == next {
            return next;
        }
        let (low, high) = (change.former.min(self.weight).bp(), change.former.max(self.weight).bp());
        let bucket = usize::from(ticket.value - low) * change.waits.len() / usize::from(high - low);
        if change.waits[bucket].is_none() {
            return next;
        }
        change.unwritten |= 1 << bucket;
        former
    }

    /// Keeps where the newest records of a transaction were written.
    pub fn wrote(&mut self, side: Side, last: i64) {
        assert!(self.last[side as usize] < Some(last), "records are written after those that are there");
        self.last[side as usize] = Some(last);
        let former = self.former();
        if let Some(change) = self.change.as_mut().filter(|_| former == Some(side)) {
            for (bucket, wait) in change.waits.iter_mut().enumerate() {
                if change.unwritten & (1 << bucket) != 0 {
                    *wait = Some(last);
                }
            }
            change.unwritten = 0;
        }
    }

    /// Takes up the next weight; false while an earlier change is not over. Where the order of keys doesn't matter, nothing waits.
    pub fn turn_to(&mut self, weight: Weight, weight_version: u64, now_ms: u64, ordered: bool) -> bool {
        if self.change.is_some() {
            return false;
        }
        let (former, until) = (self.weight, self.last[former_side(self.weight, weight) as usize]);
        (self.weight, self.weight_version) = (weight, weight_version);
        if let (Some(until), true) = (until, ordered && former != weight) {
            let buckets = former.max(weight).bp().abs_diff(former.min(weight).bp()).min(BUCKETS_MAX);
            let waits = vec![Some(until); usize::from(buckets)];
            self.change = Some(WeightTransition { former, since_ms: now_ms, waits, unwritten: 0 });
        }
        true
    }

    /// Moves the buckets whose records the former version's group has read: `committed` is the next offset that it reads.
    /// Returns true when any did. Not while records are given whose offsets aren't known.
    pub fn settle(&mut self, committed: i64) -> bool {
        let Some(change) = &mut self.change else { return false };
        assert_eq!(change.unwritten, 0, "a bucket moves between transactions");
        let before = change.waits.iter().flatten().count();
        for wait in &mut change.waits {
            *wait = wait.filter(|last| *last >= committed);
        }
        let after = change.waits.iter().flatten().count();
        if after == 0 {
            self.change = None;
        }
        after < before
    }

    /// Returns the version whose reading a change waits for.
    pub fn former(&self) -> Option<Side> {
        self.change.as_ref().map(|change| former_side(change.former, self.weight))
    }

    /// Returns since when a change is waited for, in milliseconds since 1970.
    pub fn changing_since_ms(&self) -> Option<u64> {
        self.change.as_ref().map(|change| change.since_ms)
    }

    /// Counts records of the canary's that were written for stable instead, the last at `last`; `from` is where the first of
    /// them stood in the canary's topic.
    pub fn reclaim(&mut self, count: u64, from: i64, last: i64) {
        assert!(count <= self.given[Side::Canary as usize], "no more is taken back than was given");
        self.given[Side::Canary as usize] -= count;
        self.given[Side::Stable as usize] += count;
        self.reclaimed.get_or_insert(from);
        self.last[Side::Stable as usize] = Some(last);
    }

    /// Gives everything to stable from here on: the canary has nothing left that it could still read.
    pub fn stop_canary(&mut self, weight_version: u64) {
        (self.weight, self.weight_version, self.change) = (Weight::ZERO, weight_version, None);
    }

    /// Returns the canary's share, and which one it is.
    pub fn weight(&self) -> (Weight, u64) {
        (self.weight, self.weight_version)
    }

    /// Returns how many records were read from the source.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Returns how many were given to a version.
    pub fn given(&self, side: Side) -> u64 {
        self.given[side as usize]
    }

    /// Returns the offset of the newest record in a version's topic.
    pub fn last(&self, side: Side) -> Option<i64> {
        self.last[side as usize]
    }

    /// Returns where the records in the canary's topic begin that stable got instead.
    pub fn reclaimed(&self) -> Option<i64> {
        self.reclaimed
    }
}

fn former_side(former: Weight, next: Weight) -> Side {
    if next > former { Side::Stable } else { Side::Canary }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bp(bp: u16) -> Weight {
        Weight::from_bp(bp).unwrap()
    }

    fn keyed(value: u16) -> Ticket {
        Ticket { value, keyed: true }
    }

    fn begun() -> Split {
        let mut split = Split::new(1, bp(1000));
        assert_eq!(split.take(keyed(5000)), Side::Stable);
        split.wrote(Side::Stable, 7);
        assert!(split.turn_to(bp(6000), 2, 0, true));
        split
    }

    #[test]
    fn a_key_that_moves_stays_until_its_records_are_read_and_others_dont_wait() {
        let mut split = begun();
        assert_eq!(split.take(keyed(5000)), Side::Stable);
        assert_eq!(split.take(keyed(500)), Side::Canary, "was the canary's before");
        assert_eq!(split.take(keyed(6000)), Side::Stable, "stays stable's");
        assert_eq!(split.take(Ticket { value: 5000, keyed: false }), Side::Canary, "without a key there is no order");
        split.wrote(Side::Stable, 10);
        split.wrote(Side::Canary, 3);
        assert!(split.settle(10), "the buckets that got nothing waited for offset 7 only");
        assert_eq!(split.take(keyed(1000)), Side::Canary);
        assert_eq!(split.take(keyed(5000)), Side::Stable, "10 is the next to be read");
        split.wrote(Side::Stable, 12);
        split.wrote(Side::Canary, 4);
        assert!(!split.settle(12));
        assert!(!split.turn_to(bp(0), 3, 0, true), "one change after the other");
        assert!(split.settle(13));
        assert_eq!(split.take(keyed(5000)), Side::Canary);
        assert!(split.turn_to(bp(0), 3, 0, true));
    }

    #[test]
    fn the_offset_metadata_brings_everything_back() {
        let split = begun();
        assert_eq!(Split::from_metadata(&split.metadata()).unwrap(), split);
        let full = Split { last: [Some(i64::MAX); 2], ..Split::new(u64::MAX, bp(0)) };
        let mut full = Split { taken: u64::MAX, given: [u64::MAX, 0], reclaimed: Some(i64::MAX), ..full };
        assert!(full.turn_to(bp(10_000), u64::MAX, u64::MAX, true));
        assert_eq!(Split::from_metadata(&full.metadata()).unwrap(), full, "of {} bytes", full.metadata().len());
    }

    #[test]
    fn offset_metadata_of_somebody_else_is_refused_by_name() {
        for metadata in [
            "",
            "lag=7",
            &begun().metadata().replace("\"v\":2", "\"v\":3"),
            &begun().metadata().replace("\"taken\":1", "\"taken\":2"),
        ] {
            let error = Split::from_metadata(metadata).unwrap_err().to_string();
            assert!(error.contains("expected a router's offset metadata"), "{error}");
        }
    }

    #[test]
    fn what_is_taken_back_is_counted_once() {
        let mut split = Split::new(1, bp(10_000));
        for _ in 0..3 {
            split.take(keyed(1));
        }
        split.wrote(Side::Canary, 2);
        split.reclaim(2, 1, 5);
        split.stop_canary(2);
        assert_eq!((split.taken(), split.given(Side::Stable), split.given(Side::Canary)), (3, 2, 1));
        assert_eq!((split.reclaimed(), split.take(keyed(1))), (Some(1), Side::Stable));
    }

    proptest! {
        /// The topics' readers read on at any time; weights change at any time.
        #[test]
        fn records_of_a_key_are_read_in_order_through_any_changes(
            steps in prop::collection::vec((0u16..10_000, 0u8..10, 0u16..=10_000), 1..300),
        ) {
            let mut split = Split::new(0, bp(3000));
            let mut topics: [Vec<(u16, usize)>; 2] = [Vec::new(), Vec::new()];
            let mut read = [0, 0];
            let mut newest = std::collections::BTreeMap::new();
            for (number, (ticket, what, amount)) in steps.into_iter().enumerate() {
                // Few keys, so that each has many records.
                let ticket = ticket / 500 * 500;
                match what {
                    0 => {
                        split.turn_to(bp(amount), number as u64, 0, true);
                    }
                    1 | 2 => {
                        let side = Side::BOTH[usize::from(what) - 1];
                        let topic = &topics[side as usize];
                        let upto = topic.len().min(read[side as usize] + usize::from(amount) % 4);
                        for (key, record) in &topic[read[side as usize]..upto] {
                            prop_assert!(newest.insert(*key, *record).is_none_or(|before| before < *record));
                        }
                        read[side as usize] = upto;
                        if split.former() == Some(side) {
                            split.settle(upto as i64);
                        }
                    }
                    _ => {
                        let side = split.take(keyed(ticket));
                        topics[side as usize].push((ticket, number));
                        split.wrote(side, topics[side as usize].len() as i64 - 1);
                    }
                }
            }
            prop_assert_eq!(split.taken(), split.given(Side::Stable) + split.given(Side::Canary));
        }
    }
}
