//! A router's loop: one transaction after the other, and the steps of start, promotion and abort between them.
//!
//! Time arrives as an argument. After any error everything is read anew from the broker: there is no state here that isn't
//! there, so that an error, a crash and a takeover by another process are one and the same case.

use std::fmt;
use std::time::Duration;

use tracing::{info, warn};

use crate::domain::assignment::TicketHash;
use crate::domain::router_state::{
    ControlCommand, ControlEntry, HookCall, Places, RouterEnd, RouterPhase, RouterState,
};
use crate::domain::side::Side;
use crate::domain::split::{Split, Ticket};
use crate::domain::weights::Weight;
use crate::ports::{Assignment, Broker, Commit, Hooks, OutsideError, Place, SourceRecord, Topic};

/// Settings of a router's loop.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Makes tickets of keys where no cluster is followed; the data plane's for a rollout of the same service without a salt.
    pub hash: TicketHash,
    /// Whether a key decides who gets a record; else each record is drawn for itself.
    pub keyed: bool,
    /// The canary's share until another is asked for.
    pub weight: Weight,
    /// Records given to the canary and not read by it, above which the weight isn't raised.
    pub lag_max: Option<u64>,
    /// How long a change of weight waits for keys that are never idle, before their partition waits for it, in milliseconds.
    pub change_ms_max: u64,
    /// How long a transaction takes records up.
    pub interval: Duration,
    /// Most records in a transaction.
    pub batch_max: usize,
}

/// Weight or end that the cluster committed for the rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedWeight {
    /// Share that the canary should get.
    pub weight: Weight,
    /// Routing version of that share.
    pub weight_version: u64,
    /// Makes tickets of keys, as the data plane does for the rollout's users.
    pub hash: TicketHash,
    /// Set once the rollout is over.
    pub end: Option<RouterEnd>,
}

/// Who sets the canary's share: operators, or a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Steering {
    /// Commands of operators in the control topic.
    Alone,
    /// The cluster; none: it can't be asked, or not in time. Then nothing moves.
    Cluster(Option<CommittedWeight>),
}

/// What came of a turn of the loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// Records were copied, this many, or a step was done.
    Busy(usize),
    /// The source had no new records.
    Idle,
    /// Nothing can be done yet.
    Waits(Wait),
    /// The rollout has ended; the loop can stop.
    Over,
}

/// What a router waits for, shown as the object of "waiting for".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// A node of the cluster that says what it has committed.
    Cluster,
    /// Another rollout: this one was rolled back before the router began.
    NextRollout,
    /// The end of all consumers of a service that was told to stop.
    Members {
        /// The service's version.
        side: Side,
        /// Number of consumers in its group.
        members: usize,
    },
    /// The stable service, which was started again while its place was read.
    StartedAgain,
    /// Records that the canary has to read before the weight is raised, this many.
    Lag(u64),
    /// Records that a service has to read before its topic is left.
    Unread {
        /// The service's version.
        side: Side,
        /// Most records that it can still have to read.
        records: u64,
    },
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => f.write_str("the cluster: what it has committed isn't known"),
            Self::NextRollout => f.write_str("the cluster's next rollout: the last one was rolled back"),
            Self::Members { side, members } => {
                write!(f, "the {} service's group has {members} members, expected none", side.word())
            }
            Self::StartedAgain => f.write_str("the stable service, which was started again"),
            Self::Lag(records) => write!(f, "the canary, which has {records} records to read"),
            Self::Unread { side, records } => {
                write!(f, "the {} service, which has up to {records} records to read", side.word())
            }
        }
    }
}

/// Loop of a record router: one transaction per turn.
pub struct Engine {
    broker: Box<dyn Broker>,
    hooks: Box<dyn Hooks>,
    plan: Plan,
    state: Option<EngineState>,
}

/// State of the rollout, as the broker holds it.
struct EngineState {
    /// Sum of the control topic's entries.
    control: RouterState,
    splits: Vec<Split>,
    next: Places,
    /// The canary's lag, and when it was looked at.
    lag: u64,
    looked_ms: u64,
    /// When all places were committed last, whether they had moved or not.
    kept_ms: u64,
    /// The source is read on from `next`.
    reads: bool,
    /// Services that were called in this phase, since this state was read.
    called: Vec<(HookCall, Side, Topic)>,
    /// When that was forgotten last, so that they are called again.
    called_ms: u64,
}

/// A router's state, for people and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The present phase; none before the first.
    pub phase: Option<RouterPhase>,
    /// State of the split of each partition.
    pub splits: Vec<Split>,
    /// The next offset of each partition.
    pub next: Places,
    /// Records that the canary has not read.
    pub lag: u64,
}

/// Between two looks at the canary's lag.
const LOOK_MS: u64 = 500;
/// How often a service that doesn't stop is told to.
const CALL_AGAIN_MS: u64 = 10_000;
/// How often places are committed that don't move: brokers forget those, and a router that was replaced hears of it.
const KEEP_MS: u64 = 5_000;

impl Engine {
    /// Returns a router that has done nothing yet.
    pub fn new(broker: Box<dyn Broker>, hooks: Box<dyn Hooks>, plan: Plan) -> Self {
        Self { broker, hooks, plan, state: None }
    }

    /// Does what is next: one transaction or one step. After an error the next turn begins anew.
    pub fn turn(&mut self, now_ms: u64, steering: &Steering) -> Result<Turn, OutsideError> {
        let turn = self.try_turn(now_ms, steering);
        if turn.is_err() {
            self.state = None;
        }
        turn
    }

    /// Returns the state; none before the first turn, and after an error.
    pub fn report(&self) -> Option<Report> {
        self.state.as_ref().map(|state| Report {
            phase: state.control.phase.clone(),
            splits: state.splits.clone(),
            next: state.next.clone(),
            lag: state.lag,
        })
    }

    fn try_turn(&mut self, now_ms: u64, steering: &Steering) -> Result<Turn, OutsideError> {
        let state = match self.state.take() {
            Some(state) => state,
            None => self.open()?,
        };
        let state = self.state.insert(state);
        for entry in self.broker.entries()? {
            // Phases are nobody's but this router's, as long as it is one.
            if let Some(entry @ ControlEntry::Command(_)) = read_entry(&entry)? {
                state.control.add(entry);
            }
        }
        if let Steering::Cluster(Some(CommittedWeight { end: Some(end), .. })) = steering
            && state.control.phase.is_some()
            && state.control.is_changed_by(end)
        {
            let command = match end {
                RouterEnd::Promote => ControlCommand::Promote,
                RouterEnd::Abort(reason) => ControlCommand::Abort { reason: reason.clone() },
            };
            state.control.add(ControlEntry::Command(command.clone()));
            self.write(&ControlEntry::Command(command), Commit::default())?;
            return Ok(Turn::Busy(0));
        }
        let aborted = matches!(state.control.end, Some(RouterEnd::Abort(_)));
        match state.control.phase.clone() {
            None => match steering {
                Steering::Cluster(None) => Ok(Turn::Waits(Wait::Cluster)),
                Steering::Cluster(Some(CommittedWeight { end: Some(RouterEnd::Abort(_)), .. })) => {
                    Ok(Turn::Waits(Wait::NextRollout))
                }
                _ => self.enter(RouterPhase::Taking, Commit::default()),
            },
            Some(RouterPhase::Taking) => self.take_over(now_ms),
            Some(
                RouterPhase::Starting { from }
                | RouterPhase::Running { from }
                | RouterPhase::Draining { from, winner: Side::Canary },
            ) if aborted => self.enter(RouterPhase::Reclaiming { from }, Commit::default()),
            Some(RouterPhase::Starting { from }) => {
                for side in Side::BOTH {
                    self.call(HookCall::Start, side, Topic::Of(side))?;
                }
                self.enter(RouterPhase::Running { from }, Commit::default())
            }
            Some(RouterPhase::Running { from }) => self.split(now_ms, from, steering),
            Some(RouterPhase::Reclaiming { from }) => self.reclaim(now_ms, from),
            Some(RouterPhase::Draining { from, winner }) => self.drain(from, winner),
            Some(RouterPhase::Returning { from, through, winner }) => self.hand_back(now_ms, from, through, winner),
            Some(RouterPhase::Done { winner, .. }) => {
                self.call(HookCall::Start, winner, Topic::Source)?;
                Ok(Turn::Over)
            }
        }
    }

    /// Becomes the only router, and reads what the former one left.
    fn open(&mut self) -> Result<EngineState, OutsideError> {
        let opened = self.broker.open()?;
        let mut control = RouterState::default();
        for entry in &opened.entries {
            if let Some(entry) = read_entry(entry)? {
                control.add(entry);
            }
        }
        let (mut splits, mut next) = (Vec::new(), Places::new());
        if let Some(from) = control.phase.as_ref().and_then(RouterPhase::from) {
            if from.is_empty() || opened.places.len() < from.len() {
                let why = format!("found {} partitions, expected {}", opened.places.len(), from.len());
                return Err(OutsideError::new("router", why));
            }
            for (partition, place) in opened.places.iter().take(from.len()).enumerate() {
                let Some(place) = place else {
                    let why = format!(
                        "partition {partition} has no committed place, expected one: was the router's group deleted?"
                    );
                    return Err(OutsideError::new("router", why));
                };
                let split = Split::from_metadata(&place.metadata)
                    .map_err(|why| OutsideError::new(format!("partition {partition}"), why))?;
                splits.push(split);
                next.push(place.next);
            }
        }
        info!(
            phase = control.phase.as_ref().map_or("new", RouterPhase::words),
            partitions = opened.places.len(),
            "router opened"
        );
        Ok(EngineState {
            control,
            splits,
            next,
            lag: 0,
            looked_ms: 0,
            kept_ms: 0,
            called_ms: 0,
            reads: false,
            called: Vec::new(),
        })
    }

    fn state(&mut self) -> &mut EngineState {
        self.state.as_mut().expect("a turn has a state")
    }

    /// Writes an entry, and what is committed with it.
    fn write(&mut self, entry: &ControlEntry, commit: Commit) -> Result<(), OutsideError> {
        let line = serde_json::to_string(entry).expect("an entry has a text");
        self.broker.commit(&Commit { entry: Some(line), ..commit })
    }

    fn enter(&mut self, phase: RouterPhase, commit: Commit) -> Result<Turn, OutsideError> {
        info!(phase = phase.words(), "router goes on");
        let entry = ControlEntry::Phase(phase);
        self.write(&entry, commit)?;
        let state = self.state();
        state.control.add(entry);
        state.called.clear();
        Ok(Turn::Busy(0))
    }

    /// Starts or stops a service, once. The entry before it says so, and that no other router has taken over.
    fn call(&mut self, call: HookCall, side: Side, topic: Topic) -> Result<(), OutsideError> {
        if self.state().called.contains(&(call, side, topic)) {
            return Ok(());
        }
        let entry = ControlEntry::Hook { call, side, topic: topic.word().into() };
        self.write(&entry, Commit::default())?;
        let state = self.state();
        state.control.add(entry);
        let number = state.control.calls;
        info!(call = call.word(), side = side.word(), topic = topic.word(), "service called");
        self.hooks.call(call, side, topic, number)?;
        self.state().called.push((call, side, topic));
        Ok(())
    }

    /// Stops a service; returns what is waited for, if its group isn't empty yet. It is told again from time to time: somebody may have
    /// started it meanwhile.
    fn stop(&mut self, now_ms: u64, side: Side, topic: Topic) -> Result<Option<Turn>, OutsideError> {
        let state = self.state();
        if state.called_ms + CALL_AGAIN_MS <= now_ms {
            state.called.clear();
            state.called_ms = now_ms;
        }
        self.call(HookCall::Stop, side, topic)?;
        let members = self.broker.members(side)?;
        Ok((members > 0).then_some(Turn::Waits(Wait::Members { side, members })))
    }

    fn take_over(&mut self, now_ms: u64) -> Result<Turn, OutsideError> {
        if let Some(wait) = self.stop(now_ms, Side::Stable, Topic::Source)? {
            return Ok(wait);
        }
        let reads = self.broker.reads(Side::Stable, Topic::Source)?;
        if self.broker.members(Side::Stable)? > 0 {
            return Ok(Turn::Waits(Wait::StartedAgain));
        }
        let bounds = self.broker.bounds(Topic::Source)?;
        if bounds.is_empty() || bounds.len() != reads.len() {
            let why = format!("has {} partitions, expected {}, as the versions' topics", bounds.len(), reads.len());
            return Err(OutsideError::new("the source", why));
        }
        let mut from = Places::new();
        for (partition, (next, (low, high))) in reads.iter().zip(&bounds).enumerate() {
            match next {
                // What it didn't read is gone; nobody can read it.
                Some(next) => from.push(*next.max(low)),
                None if low == high => from.push(*low),
                None => {
                    let why = format!(
                        "the stable service's group has no place in partition {partition}, which has records; expected one: let it read \
                         this topic, or set its place (kafka-consumer-groups --reset-offsets)"
                    );
                    return Err(OutsideError::new("router", why));
                }
            }
        }
        let split = Split::new(0, self.plan.weight);
        let mut commit = Commit::default();
        for (partition, next) in from.iter().enumerate() {
            commit.places.push((partition, Place { next: *next, metadata: split.metadata() }));
        }
        for side in Side::BOTH {
            let bounds = self.broker.bounds(Topic::Of(side))?;
            if let Some((partition, _)) = bounds.iter().enumerate().find(|(_, (_, high))| *high > 0) {
                let why = format!(
                    "partition {partition} has records, expected a topic without any: of an earlier rollout of this name?"
                );
                return Err(OutsideError::new(format!("the topic of {}", side.word()), why));
            }
            commit.groups.push((side, Topic::Of(side), (0..from.len()).map(|partition| (partition, 0)).collect()));
        }
        let state = self.state();
        (state.splits, state.next) = (vec![split; from.len()], from.clone());
        self.enter(RouterPhase::Starting { from }, commit)
    }

    /// Copies the records of one transaction to the topics of their sides, and commits it.
    fn split(&mut self, now_ms: u64, from: Places, steering: &Steering) -> Result<Turn, OutsideError> {
        if self.state().kept_ms + KEEP_MS <= now_ms {
            let places = self.state().places(|_| true);
            self.broker.commit(&Commit { places, ..Commit::default() })?;
            self.state().kept_ms = now_ms;
        }
        self.look(now_ms)?;
        let plan = self.plan;
        let state = self.state();
        let asked = state.control.end == Some(RouterEnd::Promote);
        let (weight, weight_version, promoted) = match steering {
            Steering::Cluster(None) => return Ok(Turn::Waits(Wait::Cluster)),
            // In a cluster it is nobody else's to say: what is asked here doesn't increase the weight there.
            Steering::Cluster(Some(committed)) => {
                (committed.weight, committed.weight_version, asked && committed.end == Some(RouterEnd::Promote))
            }
            Steering::Alone => (state.control.weight.unwrap_or(plan.weight), state.control.weights, asked),
        };
        let weight = if promoted { Weight::FULL } else { weight };
        let lags = plan.lag_max.is_some_and(|most| state.lag > most);
        let mut changed = vec![false; state.splits.len()];
        for (split, changed) in state.splits.iter_mut().zip(&mut changed) {
            let (present, number) = split.weight();
            let new = present != weight || (number < weight_version && !promoted);
            if new
                && !(lags && weight > present)
                && split.turn_to(weight, weight_version.max(number), now_ms, plan.keyed)
            {
                *changed = true;
            }
        }
        if promoted && state.splits.iter().all(|split| split.weight().0 == Weight::FULL && split.former().is_none()) {
            let places = state.places(|_| true);
            return self
                .enter(RouterPhase::Draining { from, winner: Side::Canary }, Commit { places, ..Commit::default() });
        }
        self.settle(&mut changed)?;
        let state = self.state.as_mut().expect("a turn has a state");
        if !state.reads {
            self.broker.seek(&state.next)?;
            state.reads = true;
        }
        let hash = match steering {
            Steering::Cluster(Some(committed)) => committed.hash,
            Steering::Cluster(None) | Steering::Alone => plan.hash,
        };
        let held: Vec<bool> = state.splits.iter().map(|split| is_held(split, now_ms, plan.change_ms_max)).collect();
        let (splits, next) = (&mut state.splits, &mut state.next);
        let copied = self.broker.copy(plan.interval, plan.batch_max, &held, &mut |record: SourceRecord<'_>| {
            assert!(record.offset >= next[record.partition], "records come in order, each once");
            next[record.partition] = record.offset + 1;
            changed[record.partition] = true;
            let key = record.key.filter(|_| plan.keyed);
            let ticket = Ticket::of(hash, key, record.partition, record.offset);
            let split = &mut splits[record.partition];
            Assignment { side: split.take(ticket), weight_version: split.weight().1 }
        })?;
        if copied > 0 {
            self.wrote()?;
        }
        let places = self.state().places(|partition| changed[partition]);
        if !places.is_empty() {
            self.broker.commit(&Commit { places, ..Commit::default() })?;
        }
        match copied {
            0 if lags => Ok(Turn::Waits(Wait::Lag(self.state().lag))),
            0 => Ok(Turn::Idle),
            copied => Ok(Turn::Busy(copied)),
        }
    }

    /// Keeps where the open transaction's records are.
    fn wrote(&mut self) -> Result<(), OutsideError> {
        let written = self.broker.flush()?;
        for (split, written) in self.state().splits.iter_mut().zip(written) {
            for side in Side::BOTH {
                if let Some(last) = written[side as usize] {
                    split.wrote(side, last);
                }
            }
        }
        Ok(())
    }

    /// Looks at the canary's lag, from time to time.
    fn look(&mut self, now_ms: u64) -> Result<(), OutsideError> {
        if self.state().looked_ms + LOOK_MS > now_ms {
            return Ok(());
        }
        let reads = self.broker.reads(Side::Canary, Topic::Of(Side::Canary))?;
        let state = self.state();
        state.looked_ms = now_ms;
        state.lag = lags(&state.splits, Side::Canary, &reads).sum();
        Ok(())
    }

    /// Moves what waited for records to be read.
    fn settle(&mut self, changed: &mut [bool]) -> Result<(), OutsideError> {
        for side in Side::BOTH {
            if self.state().splits.iter().all(|split| split.former() != Some(side)) {
                continue;
            }
            let reads = self.broker.reads(side, Topic::Of(side))?;
            for ((split, next), changed) in self.state().splits.iter_mut().zip(reads).zip(&mut *changed) {
                if split.former() == Some(side) {
                    *changed |= split.settle(next.unwrap_or(0));
                }
            }
        }
        Ok(())
    }

    /// Gives stable what the canary has not read.
    fn reclaim(&mut self, now_ms: u64, from: Places) -> Result<Turn, OutsideError> {
        if let Some(wait) = self.stop(now_ms, Side::Canary, Topic::Of(Side::Canary))? {
            return Ok(wait);
        }
        let reads = self.broker.reads(Side::Canary, Topic::Of(Side::Canary))?;
        let most = self.plan.batch_max;
        let mut count = 0;
        for (partition, next) in reads.iter().enumerate() {
            let Some(last) = self.state().splits[partition].last(Side::Canary) else { continue };
            let Some(mut at) = *next else {
                let why = format!(
                    "has no place in partition {partition} of its topic, which it was given: was its group deleted?"
                );
                return Err(OutsideError::new("the canary service's group", why));
            };
            while at <= last {
                let weight_version = self.state().splits[partition].weight().1;
                let reclaimed = self.broker.reclaim(partition, at, last + 1, most, weight_version)?;
                let written = self.broker.flush()?[partition][Side::Stable as usize];
                let state = self.state();
                if let Some(written) = written {
                    state.splits[partition].reclaim(reclaimed.count, at, written);
                }
                let places = state.places(|other| other == partition);
                let canary = (Side::Canary, Topic::Of(Side::Canary), vec![(partition, reclaimed.next)]);
                self.broker.commit(&Commit { places, groups: vec![canary], entry: None })?;
                assert!(reclaimed.next > at, "taking back goes on");
                (at, count) = (reclaimed.next, count + reclaimed.count);
            }
        }
        if count > 0 {
            warn!(records = count, "the canary's backlog was given to stable");
        }
        let state = self.state();
        for split in &mut state.splits {
            let weight_version = split.weight().1 + 1;
            split.stop_canary(weight_version);
        }
        let places = state.places(|_| true);
        self.enter(RouterPhase::Draining { from, winner: Side::Stable }, Commit { places, ..Commit::default() })
    }

    /// Returns what is left to be read of a version's topic; none when nothing is.
    fn left(&mut self, side: Side) -> Result<Option<Turn>, OutsideError> {
        let reads = self.broker.reads(side, Topic::Of(side))?;
        let records: u64 = lags(&self.state().splits, side, &reads).sum();
        Ok((records > 0).then_some(Turn::Waits(Wait::Unread { side, records })))
    }

    fn drain(&mut self, from: Places, winner: Side) -> Result<Turn, OutsideError> {
        for side in Side::BOTH {
            if let Some(wait) = self.left(side)? {
                return Ok(wait);
            }
        }
        let through = self.state().next.clone();
        self.enter(RouterPhase::Returning { from, through, winner }, Commit::default())
    }

    fn hand_back(&mut self, now_ms: u64, from: Places, through: Places, winner: Side) -> Result<Turn, OutsideError> {
        for side in Side::BOTH {
            if let Some(wait) = self.stop(now_ms, side, Topic::Of(side))? {
                return Ok(wait);
            }
            // A service that went back in its topic must have read it again before it is stopped for good.
            if self.left(side)?.is_some() {
                return Err(OutsideError::new(format!("the {} service", side.word()), "committed less than it had"));
            }
        }
        // Partitions that the source has got meanwhile are the winner's from their beginning.
        let added = self.broker.bounds(Topic::Source)?.into_iter().enumerate().skip(through.len());
        let places = through.iter().copied().enumerate().chain(added.map(|(partition, (low, _))| (partition, low)));
        let places = places.collect();
        let groups = vec![(winner, Topic::Source, places)];
        self.enter(RouterPhase::Done { from, through, winner }, Commit { groups, ..Commit::default() })
    }
}

impl Report {
    /// Returns how many records a version was given.
    pub fn given(&self, side: Side) -> u64 {
        self.splits.iter().map(|split| split.given(side)).sum()
    }
}

impl EngineState {
    fn places(&self, wanted: impl Fn(usize) -> bool) -> Vec<(usize, Place)> {
        let places = self.splits.iter().zip(&self.next).enumerate().filter(|(partition, _)| wanted(*partition));
        places
            .map(|(partition, (split, next))| (partition, Place { next: *next, metadata: split.metadata() }))
            .collect()
    }
}

impl Topic {
    /// Returns its word in entries of the control topic.
    pub fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Of(side) => side.word(),
        }
    }
}

/// Returns an upper bound of the records that a group has not read, for each partition: markers of transactions have offsets too.
pub fn lags(splits: &[Split], side: Side, next: &[Option<i64>]) -> impl Iterator<Item = u64> {
    splits.iter().zip(next).map(move |(split, next)| {
        let after = split.last(side).map_or(0, |last| last + 1);
        u64::try_from(after - next.unwrap_or(0)).unwrap_or(0)
    })
}

fn is_held(split: &Split, now_ms: u64, change_ms_max: u64) -> bool {
    split.changing_since_ms().is_some_and(|since| now_ms >= since.saturating_add(change_ms_max))
}

/// Reads an entry of the control topic; none where anybody wrote something else. A phase that can't be read is an error: it may
/// be one of a newer router's.
fn read_entry(line: &str) -> Result<Option<ControlEntry>, OutsideError> {
    match serde_json::from_str(line) {
        Ok(entry) => Ok(Some(entry)),
        Err(why) if line.contains("\"phase\"") => Err(OutsideError::new(
            "control topic",
            format!("found {line:?}, expected a phase that this version knows: {why}"),
        )),
        Err(_) => {
            warn!("control topic: found {line:?}, expected an entry; it is passed over");
            Ok(None)
        }
    }
}
