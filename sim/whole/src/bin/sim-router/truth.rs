//! What must hold: the observer that sees every record, every commit, and what was asked for.

use std::collections::{BTreeMap, VecDeque};

use aviary::ports::{Commit, Topic};
use aviary_core::domain::assignment::TicketHash;
use aviary_core::domain::router_state::{ControlCommand, ControlEntry, RouterPhase};
use aviary_core::domain::side::Side;
use aviary_core::domain::split::Split;
use aviary_core::domain::weights::Weight;
use sim::{Violation, broken};

use super::broker::{Item, MemoryBroker, Transaction};
use super::coverage::RouterCoverage;

/// Longer than a router's look at the canary's lag counts, its turn included.
const LAG_MS: u64 = 900;
const TURN_MS: u64 = 300;

/// What is known about the world, for checks.
pub struct RouterTruth {
    hash: TicketHash,
    keyed: bool,
    /// Where stable begins to read the source; what is before it was processed before the run.
    begins: Vec<i64>,
    /// Who processed each record of the source.
    processed: Vec<BTreeMap<i64, Side>>,
    /// The newest processed record of each key.
    newest: Vec<BTreeMap<&'static [u8], i64>>,
    /// The highest weight that was asked for.
    highest: Weight,
    /// Phase that was committed last; none before the first.
    pub phase: Option<RouterPhase>,
    /// The committed state of each partition.
    pub splits: Vec<Option<(Split, i64)>>,
    /// The canary's lag, and when that was.
    lags: VecDeque<(u64, u64)>,
    /// Faults and events that this run reached.
    pub coverage: RouterCoverage,
    /// Records taken, and written to stable's and canary's topic, and written back, in each partition.
    counts: Vec<Counts>,
}

#[derive(Default)]
struct Counts {
    taken: u64,
    written: [u64; 2],
    reclaimed: u64,
}

/// What a router knew when its turn began.
#[derive(Debug, Clone, Copy, Default)]
pub struct KnownRecord {
    /// The cluster could not be asked.
    pub blind: bool,
    /// An abort had been asked for.
    pub aborted: bool,
    /// Virtual time at which it was seen, in milliseconds of the router's clock.
    pub now_ms: u64,
    /// How long a change of weight waits before its partition is held.
    pub change_ms_max: u64,
    /// Virtual time of the whole world, in milliseconds.
    pub world_ms: u64,
    /// The canary's lag above which the weight isn't raised.
    pub lag_max: Option<u64>,
}

impl RouterTruth {
    /// Returns the observer of a world in which nothing happened yet.
    pub fn new(hash: TicketHash, keyed: bool, weight: Weight, begins: Vec<i64>) -> Self {
        let count = begins.len();
        Self {
            hash,
            keyed,
            begins,
            processed: vec![BTreeMap::new(); count],
            newest: vec![BTreeMap::new(); count],
            highest: weight,
            phase: None,
            lags: VecDeque::new(),
            coverage: RouterCoverage::default(),
            splits: vec![None; count],
            counts: (0..count).map(|_| Counts::default()).collect(),
        }
    }

    /// Counts that an event of the coverage happened.
    pub fn saw(&mut self, event: &str) {
        self.coverage.event(event);
    }

    /// Says where stable begins to read the source.
    pub fn begin_at(&mut self, begins: Vec<i64>) {
        self.begins = begins;
    }

    /// Records that a router has taken over.
    pub fn opened(&mut self) {
        if matches!(self.phase, Some(RouterPhase::Reclaiming { .. }))
            && self.counts.iter().any(|counts| counts.reclaimed > 0)
        {
            self.saw("reclaiming resumed");
        }
    }

    /// Looks at the canary's lag.
    pub fn look(&mut self, broker: &MemoryBroker, now_ms: u64) {
        let next = &broker.groups[&(Side::Canary, Topic::Of(Side::Canary))];
        let lags = self.splits.iter().zip(next).map(|(split, next)| {
            let last = split.as_ref().and_then(|(split, _)| split.last(Side::Canary));
            u64::try_from(last.map_or(0, |last| last + 1) - next.unwrap_or(0)).unwrap_or(0)
        });
        self.lags.push_back((now_ms, lags.sum()));
        while self.lags.front().is_some_and(|(at, _)| at + LAG_MS < now_ms) {
            self.lags.pop_front();
        }
    }

    /// Says whether a router that looked at the lag in time could not have found it low enough.
    fn lagged(&self, known: KnownRecord) -> bool {
        let Some(most) = known.lag_max else { return false };
        let Some((newest_ms, _)) = self.lags.back() else { return false };
        // Within a turn the world may go on for long, and what was looked at in its beginning still counts.
        newest_ms - known.world_ms < TURN_MS && self.lags.iter().all(|(_, lag)| *lag > most)
    }

    /// Records that a weight was asked for.
    pub fn asked(&mut self, weight: Weight) {
        self.highest = self.highest.max(weight);
    }

    /// Checks that a service may process this record.
    pub fn processed(
        &mut self,
        broker: &MemoryBroker,
        (side, topic): (Side, Topic),
        partition: usize,
        item: Item,
    ) -> Result<(), Violation> {
        let (origin, offset) = item.origin;
        let who = format!("the {} service, on {}", side.word(), topic.word());
        if origin != partition {
            return Err(broken!("partition", "{who} found a record of partition {origin} in {partition}"));
        }
        if broker.topic(Topic::Source)[origin].get(&broker.fates, offset).is_none() {
            return Err(broken!("extra", "{who} processed {origin}/{offset}, which isn't committed in the source"));
        }
        if offset < self.begins[origin] {
            return Err(broken!("twice", "{who} processed {origin}/{offset}, which was processed before the run"));
        }
        if let Some(first) = self.processed[origin].insert(offset, side) {
            return Err(broken!("twice", "{who} processed {origin}/{offset}, and {} had before", first.word()));
        }
        if let Some(key) = item.key.filter(|_| self.keyed)
            && let Some(newer) = self.newest[origin].insert(key, offset).filter(|newer| *newer > offset)
        {
            return Err(broken!("order", "{who} processed {origin}/{offset} of key {key:?} after {newer}"));
        }
        Ok(())
    }

    /// Checks what a router has committed.
    pub fn committed(
        &mut self,
        broker: &MemoryBroker,
        known: KnownRecord,
        transaction: &Transaction,
        commit: &Commit,
    ) -> Result<(), Violation> {
        // Places that don't move may be committed again.
        if known.blind && matches!(self.phase, Some(RouterPhase::Running { .. })) && !transaction.wrote.is_empty() {
            return Err(broken!("blind", "records were copied while the cluster could not be asked"));
        }
        if known.aborted && transaction.wrote.iter().any(|(side, ..)| *side == Side::Canary) {
            return Err(broken!("abort", "the canary was given records after an abort was known"));
        }
        for (side, partition, offset) in &transaction.wrote {
            self.wrote(broker, *side, *partition, *offset)?;
        }
        for (partition, place) in &commit.places {
            self.placed(broker, *partition, place.next, &place.metadata, (known, transaction))?;
        }
        match commit.entry.as_ref().map(|entry| serde_json::from_str(entry)) {
            Some(Ok(ControlEntry::Phase(phase))) => self.entered(phase, known)?,
            Some(Ok(ControlEntry::Command(ControlCommand::Promote))) => self.asked(Weight::FULL),
            Some(Ok(
                ControlEntry::Command(_)
                | ControlEntry::Hook { .. }
                | ControlEntry::Rollout { .. }
                | ControlEntry::Lost { .. },
            ))
            | None => {}
            Some(Err(why)) => return Err(broken!("entry", "{why}")),
        }
        Ok(())
    }

    fn wrote(&mut self, broker: &MemoryBroker, side: Side, partition: usize, offset: i64) -> Result<(), Violation> {
        let counts = &mut self.counts[partition];
        counts.written[side as usize] += 1;
        if matches!(self.phase, Some(RouterPhase::Reclaiming { .. })) {
            counts.reclaimed += 1;
            self.saw("records reclaimed");
            return Ok(());
        }
        let log = &broker.topic(Topic::Of(side))[partition];
        let item = log.get(&broker.fates, offset).expect("it was just committed");
        let ticket = self.ticket(item);
        if side == Side::Canary && ticket >= self.highest.bp() {
            let highest = self.highest;
            return Err(broken!("share", "the canary was given ticket {ticket}, and at most {highest} was asked for"));
        }
        Ok(())
    }

    /// A record's place among the weights, found without the router's code.
    fn ticket(&self, item: &Item) -> u16 {
        if let Some(key) = item.key.filter(|_| self.keyed) {
            return self.hash.ticket(key);
        }
        let mut place = [0; 16];
        place[..8].copy_from_slice(&(item.origin.0 as u64).to_le_bytes());
        place[8..].copy_from_slice(&item.origin.1.to_le_bytes());
        self.hash.ticket(&place)
    }

    fn placed(
        &mut self,
        broker: &MemoryBroker,
        partition: usize,
        next: i64,
        metadata: &str,
        (known, transaction): (KnownRecord, &Transaction),
    ) -> Result<(), Violation> {
        let split = Split::from_metadata(metadata).map_err(|why| broken!("offset metadata", "{why}"))?;
        let counts = &mut self.counts[partition];
        if let Some((_, before)) = &self.splits[partition] {
            if next < *before {
                return Err(broken!("place", "partition {partition} went from {before} back to {next}"));
            }
            counts.taken += broker.topic(Topic::Source)[partition].count(&broker.fates, *before, next);
        }
        let canary = counts.written[Side::Canary as usize] - counts.reclaimed;
        let expected = (counts.taken, counts.written[Side::Stable as usize], canary);
        let found = (split.taken(), split.given(Side::Stable), split.given(Side::Canary));
        if found != expected || found.0 != found.1 + found.2 {
            return Err(broken!(
                "counts",
                "partition {partition} took and gave {found:?} by its offset metadata, expected {expected:?}"
            ));
        }
        let (weight, weight_version) = split.weight();
        if weight > self.highest {
            return Err(broken!("share", "the weight is {weight}, and at most {} was asked for", self.highest));
        }
        let reclaims = matches!(self.phase, Some(RouterPhase::Reclaiming { .. }));
        for (side, _, offset) in transaction.wrote.iter().filter(|(_, of, _)| *of == partition) {
            let item = broker.topic(Topic::Of(*side))[partition].get(&broker.fates, *offset).expect("just committed");
            let free = !reclaims && (!self.keyed || item.key.is_none());
            let drawn = if self.ticket(item) < weight.bp() { Side::Canary } else { Side::Stable };
            if item.weight_version != weight_version || free && drawn != *side {
                return Err(broken!(
                    "stamp",
                    "{item:?} went to {} under {weight}, weight version {weight_version}",
                    side.word()
                ));
            }
        }
        let took = !reclaims && transaction.wrote.iter().any(|(_, of, _)| *of == partition);
        if let (Some((before, _)), Some(since)) = (&self.splits[partition], split.changing_since_ms())
            && before.changing_since_ms() == Some(since)
            && took
            && since.saturating_add(known.change_ms_max) <= known.now_ms
        {
            return Err(broken!("held", "partition {partition} took records while a change since {since} ms waited"));
        }
        if split.former().is_some() {
            self.saw("buckets waited");
        }
        let before = self.splits[partition].as_ref().map_or(weight, |(before, _)| before.weight().0);
        if before != weight {
            self.saw("weight changed");
        }
        if weight > before && self.lagged(known) {
            return Err(broken!("lag", "the weight was raised from {before} to {weight} while the canary lagged"));
        }
        self.splits[partition] = Some((split, next));
        Ok(())
    }

    fn entered(&mut self, phase: RouterPhase, known: KnownRecord) -> Result<(), Violation> {
        let number = |phase: &RouterPhase| match phase {
            RouterPhase::Taking => 1,
            RouterPhase::Starting { .. } => 2,
            RouterPhase::Running { .. } => 3,
            RouterPhase::Draining { winner: Side::Canary, .. } => 4,
            RouterPhase::Reclaiming { .. } => 5,
            RouterPhase::Draining { winner: Side::Stable, .. } => 6,
            RouterPhase::Returning { .. } => 7,
            RouterPhase::Done { .. } => 8,
        };
        let winner = match &phase {
            RouterPhase::Draining { winner, .. } | RouterPhase::Returning { winner, .. } => Some(*winner),
            _ => None,
        };
        let before = self.phase.as_ref().map_or(0, number);
        if number(&phase) <= before {
            return Err(broken!("phase", "{phase:?} after {:?}", self.phase));
        }
        if known.aborted && winner == Some(Side::Canary) {
            return Err(broken!("abort", "{phase:?} was entered after an abort was known"));
        }
        match (&self.phase, &phase) {
            (Some(RouterPhase::Draining { .. }), RouterPhase::Reclaiming { .. }) => self.saw("abort of a promotion"),
            (Some(RouterPhase::Running { .. }), RouterPhase::Reclaiming { .. })
                if self.splits.iter().flatten().any(|(split, _)| split.former().is_some()) =>
            {
                self.saw("abort while a change waits");
            }
            (_, RouterPhase::Done { winner: Side::Canary, .. }) if known.aborted => {
                self.saw("abort after it was too late")
            }
            _ => {}
        }
        self.phase = Some(phase);
        Ok(())
    }

    /// Checks that every committed record of the source was processed; twice is told where it happens.
    pub fn complete(&self, broker: &MemoryBroker) -> Result<(), Violation> {
        for (partition, log) in broker.topic(Topic::Source).iter().enumerate() {
            let first = self.begins[partition].max(log.low());
            let mut committed = (first..log.high()).filter(|offset| log.get(&broker.fates, *offset).is_some());
            if let Some(offset) = committed.find(|offset| !self.processed[partition].contains_key(offset)) {
                return Err(broken!("missing", "nobody processed {partition}/{offset}"));
            }
        }
        Ok(())
    }
}
