//! A router's loop: one transaction after the other, and the steps of start, promotion and abort between them.
//!
//! Time arrives as an argument. After any error everything is read anew from the broker: there is no state here that isn't
//! there, so that an error, a crash and a takeover by another process are one and the same case.

use std::fmt;
use std::time::Duration;

use tracing::{info, warn};

use crate::domain::assignment::TicketHash;
use crate::domain::router_state::{
    ControlCommand, ControlEntry, HookCall, LostRange, Places, RolloutIdentity, RouterEnd, RouterPhase, RouterState,
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
    /// The stable service, which nobody saw in its group: whether its places still move.
    Unseen,
    /// The stable service, which commits although its group has no members.
    Unassigned,
    /// A former version, which has to read the records of keys that move; their partitions aren't read meanwhile.
    Held {
        /// The former version of the keys.
        side: Side,
        /// Partitions of the source that wait.
        partitions: Vec<usize>,
        /// When the first of them began to wait for its change, in milliseconds since 1970.
        since_ms: u64,
        /// Most records that the version can still have to read there.
        records: u64,
        /// Number of consumers in its group.
        members: usize,
    },
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
            Self::Unseen => f.write_str(
                "the stable service: nobody was in its group, so its places are watched for some seconds",
            ),
            Self::Unassigned => f.write_str(
                "the stable service: its group has no members and its places move. A service that assigns its partitions itself \
                 (Flink, Spark) can't be counted; stop it",
            ),
            Self::Held { side, partitions, records, members, .. } => {
                let partitions: Vec<_> = partitions.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "the {} service, which has up to {records} records of moving keys to read and {members} members; partitions {} of \
                     the source wait. Start it, or give its records to stable: `aviary router abort -f FILE`",
                    side.word(),
                    partitions.join(", ")
                )
            }
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
    rollout: Option<RolloutIdentity>,
    /// True once anything of the rollout was found or done.
    begun: bool,
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
    /// The places of the stable service's group, and since when they are so; none: its members are what is watched.
    watched: Option<(u64, Vec<Option<i64>>)>,
    /// The places were gone, and are what the copies say; the source is another one if false.
    rebuilt: Option<bool>,
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
/// How long the places of a service are watched whose group nobody was in.
const WATCH_MS: u64 = 5_000;
/// How often places are committed that don't move: brokers forget those, and a router that was replaced hears of it.
const KEEP_MS: u64 = 5_000;

impl Engine {
    /// Returns a router that has done nothing yet.
    pub fn new(broker: Box<dyn Broker>, hooks: Box<dyn Hooks>, plan: Plan) -> Self {
        Self { broker, hooks, plan, rollout: None, begun: false, state: None }
    }

    /// Returns this router, which refuses a rollout of other versions or groups.
    pub fn of(self, rollout: RolloutIdentity) -> Self {
        Self { rollout: Some(rollout), ..self }
    }

    /// Returns whether nothing of the rollout has begun, as far as this process knows.
    pub fn is_untouched(&self) -> bool {
        !self.begun
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
                // What was never taken from stable is stable's.
                _ if aborted => self.enter(never_begun(), Commit::default()),
                _ => self.begin(),
            },
            Some(RouterPhase::Taking) if aborted => self.enter(never_begun(), Commit::default()),
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
        self.check_identity(&control)?;
        self.begun |= control.phase.is_some();
        let (mut splits, mut next, mut rebuilt) = (Vec::new(), Places::new(), None);
        let is_done = matches!(control.phase, Some(RouterPhase::Done { .. }));
        if let Some(from) = control.phase.as_ref().and_then(RouterPhase::from) {
            if opened.places.len() < from.len() {
                let why = format!("found {} partitions, expected {}", opened.places.len(), from.len());
                return Err(OutsideError::new("router", why));
            }
            if opened.places.iter().take(from.len()).any(Option::is_none) && !is_done {
                rebuilt = Some(self.rebuild(&control, from, &mut splits, &mut next)?);
            } else {
                for (partition, place) in opened.places.iter().take(from.len()).enumerate() {
                    let Some(place) = place else { continue };
                    let split = Split::from_metadata(&place.metadata)
                        .map_err(|why| OutsideError::new(format!("partition {partition}"), why))?;
                    splits.push(split);
                    next.push(place.next);
                }
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
            watched: None,
            rebuilt,
        })
    }

    fn check_identity(&self, control: &RouterState) -> Result<(), OutsideError> {
        match (&self.rollout, &control.rollout) {
            (Some(expected), Some(found)) if found != expected => {
                let words = |of: &RolloutIdentity| {
                    let [v1, v2] = &of.versions;
                    let [a, b] = &of.groups;
                    format!("{v1} to {v2} with groups {a} and {b}")
                };
                let why = format!(
                    "its topics are those of {}, expected {}: another rollout needs another metadata.name",
                    words(found),
                    words(expected)
                );
                Err(OutsideError::lasting("router", why))
            }
            _ => Ok(()),
        }
    }

    /// Makes the state anew from what the copies say; returns whether the source is still the one that they are from. Its places went
    /// with it if it was deleted, those of stable's group too.
    fn rebuild(
        &mut self,
        control: &RouterState,
        from: &Places,
        splits: &mut Vec<Split>,
        next: &mut Places,
    ) -> Result<bool, OutsideError> {
        let copies = self.broker.rebuild()?;
        let reads = self.broker.reads(Side::Stable, Topic::Source)?;
        let bounds = self.broker.bounds(Topic::Source)?;
        let same = reads.iter().take(from.len()).all(Option::is_some);
        let weight = control.weight.unwrap_or(self.plan.weight);
        for (partition, (copies, from)) in copies.iter().zip(from).enumerate() {
            splits.push(Split::rebuilt(control.weights, weight, copies.given, copies.last));
            let low = bounds.get(partition).map_or(0, |(low, _)| *low);
            next.push(if same { copies.next.unwrap_or(*from) } else { low });
        }
        warn!(same_source = same, "the router's places are gone; the copies say how far the source was read");
        Ok(same)
    }

    /// Checks all that a rollout needs before anything is stopped, and says whose it is.
    fn begin(&mut self) -> Result<Turn, OutsideError> {
        self.broker.rehearse()?;
        for side in Side::BOTH {
            self.broker.members(side).map_err(|why| OutsideError { lasting: true, ..why })?;
        }
        let (reads, bounds) = (self.broker.reads(Side::Stable, Topic::Source)?, self.broker.bounds(Topic::Source)?);
        begin_of(&reads, &bounds)?;
        if let (Some(rollout), None) = (self.rollout.clone(), &self.state().control.rollout) {
            let entry = ControlEntry::Rollout { rollout };
            self.write(&entry, Commit::default())?;
            self.state().control.add(entry);
        }
        self.enter(RouterPhase::Taking, Commit::default())
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
        self.begun = true;
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
        if self.state().called.is_empty() && self.state().watched.is_none() && self.broker.members(Side::Stable)? == 0 {
            // Nobody to be seen is no proof that nobody reads.
            let reads = self.broker.reads(Side::Stable, Topic::Source)?;
            self.state().watched = Some((now_ms, reads));
        }
        if let Some(wait) = self.stop(now_ms, Side::Stable, Topic::Source)? {
            return Ok(wait);
        }
        let reads = self.broker.reads(Side::Stable, Topic::Source)?;
        if let Some((since_ms, before)) = &mut self.state().watched {
            if *before != reads {
                (*since_ms, *before) = (now_ms, reads);
                return Ok(Turn::Waits(Wait::Unassigned));
            }
            if now_ms < *since_ms + WATCH_MS {
                return Ok(Turn::Waits(Wait::Unseen));
            }
        }
        if self.broker.members(Side::Stable)? > 0 {
            return Ok(Turn::Waits(Wait::StartedAgain));
        }
        let from = begin_of(&reads, &self.broker.bounds(Topic::Source)?)?;
        let split = Split::new(0, self.plan.weight);
        let mut commit = Commit::default();
        for (partition, next) in from.iter().enumerate() {
            commit.places.push((partition, Place { next: *next, metadata: split.metadata() }));
        }
        for side in Side::BOTH {
            commit.groups.push((side, Topic::Of(side), (0..from.len()).map(|partition| (partition, 0)).collect()));
        }
        let state = self.state();
        (state.splits, state.next) = (vec![split; from.len()], from.clone());
        self.enter(RouterPhase::Starting { from }, commit)
    }

    /// Copies the records of one transaction to the topics of their sides, and commits it.
    fn split(&mut self, now_ms: u64, from: Places, steering: &Steering) -> Result<Turn, OutsideError> {
        if !self.state().reads
            && let Some(turn) = self.find_place()?
        {
            return Ok(turn);
        }
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
            // Whose members can't be counted is not stopped: nobody could say when the other may go on.
            for side in Side::BOTH {
                self.broker.members(side)?;
            }
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
            0 => Ok(self.holds(&held)?.map_or(Turn::Idle, Turn::Waits)),
            copied => Ok(Turn::Busy(copied)),
        }
    }

    /// Returns what partitions wait for that aren't read because of a change.
    fn holds(&mut self, held: &[bool]) -> Result<Option<Wait>, OutsideError> {
        let splits = &self.state().splits;
        let Some(side) = splits.iter().zip(held).find_map(|(split, held)| split.former().filter(|_| *held)) else {
            return Ok(None);
        };
        let (reads, members) = (self.broker.reads(side, Topic::Of(side))?, self.broker.members(side)?);
        let splits = &self.state().splits;
        let waits = |partition: &usize| held[*partition] && splits[*partition].former() == Some(side);
        let partitions: Vec<usize> = (0..held.len()).filter(waits).collect();
        let lags: Vec<u64> = lags(splits, side, &reads).collect();
        let records = partitions.iter().filter_map(|partition| lags.get(*partition)).sum();
        let since = partitions.iter().filter_map(|partition| splits[*partition].changing_since_ms());
        let since_ms = since.min().unwrap_or(0);
        Ok(Some(Wait::Held { side, partitions, since_ms, records, members }))
    }

    /// Sees to it that the source can be read on from the places, before it is. Records that are gone are passed over only where an
    /// operator allowed that.
    fn find_place(&mut self) -> Result<Option<Turn>, OutsideError> {
        let bounds = self.broker.bounds(Topic::Source)?;
        let (rebuilt, skips) = (self.state().rebuilt, self.state().control.skips_lost);
        let mut lost = Vec::new();
        for (partition, (next, (low, high))) in self.state().next.iter().zip(&bounds).enumerate() {
            if next < low || next > high {
                lost.push(LostRange { partition, from: *next, until: *low });
            }
        }
        if (!lost.is_empty() || rebuilt == Some(false)) && !skips {
            return Err(OutsideError::lasting("the source", gone(&lost)));
        }
        if rebuilt.is_some() {
            // Which keys waited for their former version isn't known any more.
            for side in Side::BOTH {
                if let Some(wait) = self.left(side)? {
                    return Ok(Some(wait));
                }
            }
        }
        if lost.is_empty() && rebuilt.is_none() {
            return Ok(None);
        }
        let state = self.state();
        for range in &lost {
            state.next[range.partition] = bounds[range.partition].0;
        }
        let places = state.places(|_| true);
        let commit = Commit { places, ..Commit::default() };
        match lost.is_empty() && rebuilt == Some(true) {
            true => self.broker.commit(&commit)?,
            false => {
                let entry = ControlEntry::Lost { lost };
                self.write(&entry, commit)?;
                self.state().control.add(entry);
                let lost = self.state().control.lost;
                warn!(records = lost, "the router goes on without records of the source that are gone");
            }
        }
        self.state().rebuilt = None;
        Ok(Some(Turn::Busy(0)))
    }

    /// Keeps where the open transaction's records are.
    fn wrote(&mut self) -> Result<(), OutsideError> {
        let written = self.broker.flush()?;
        for (partition, (split, written)) in self.state().splits.iter_mut().zip(written).enumerate() {
            for side in Side::BOTH {
                if let Some(last) = written[side as usize] {
                    if let Some(before) = split.last(side).filter(|before| *before >= last) {
                        let why = format!(
                            "partition {partition} got a record at {last} after one at {before}: the topic was deleted and made anew. \
                             What was in it and not read is gone; give the rest to stable: `aviary router abort -f FILE`"
                        );
                        return Err(OutsideError::new(format!("the topic of {}", side.word()), why));
                    }
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
        let bounds = self.broker.bounds(Topic::Of(Side::Canary))?;
        let most = self.plan.batch_max;
        let mut count = 0;
        for (partition, next) in reads.iter().enumerate() {
            let Some(last) = self.state().splits[partition].last(Side::Canary) else { continue };
            let kept = bounds.get(partition).filter(|(low, high)| *high > last && next.is_none_or(|next| next >= *low));
            let (Some(mut at), Some(_)) = (*next, kept) else {
                // An abort goes on: stable must not wait for what nobody can read.
                warn!(
                    partition,
                    "what the canary has not read of its topic is gone: its group or its topic was deleted"
                );
                continue;
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
        let mut lags: Vec<u64> = lags(&self.state().splits, side, &reads).collect();
        if lags.iter().any(|lag| *lag > 0) {
            // Of a topic that was made anew nobody can read what was in it.
            let bounds = self.broker.bounds(Topic::Of(side))?;
            for (partition, lag) in lags.iter_mut().enumerate() {
                let last = self.state().splits[partition].last(side);
                if bounds.get(partition).is_none_or(|(_, high)| last.is_some_and(|last| *high <= last)) {
                    *lag = 0;
                }
            }
        }
        let records: u64 = lags.iter().sum();
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
        let bounds = self.broker.bounds(Topic::Source)?;
        let added = bounds.iter().copied().enumerate().skip(through.len());
        // Below the first record that is left most clients would jump to the end; above the last the topic is another one.
        let kept = through.iter().enumerate().map(|(partition, next)| match bounds.get(partition) {
            Some((low, high)) if next < low || next > high => (partition, *low),
            _ => (partition, *next),
        });
        let places: Vec<(usize, i64)> = kept.chain(added.map(|(partition, (low, _))| (partition, low))).collect();
        let lost =
            places.iter().zip(&through).map(|((_, place), next)| u64::try_from(place - next).unwrap_or(0)).sum::<u64>();
        if lost > 0 {
            warn!(records = lost, "records that nobody read are gone from the source (retention?)");
        }
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

/// Returns where a router begins that takes over from a group which has read up to `reads`.
fn begin_of(reads: &[Option<i64>], bounds: &[(i64, i64)]) -> Result<Places, OutsideError> {
    if bounds.is_empty() || bounds.len() != reads.len() {
        let why = format!("has {} partitions, expected {}, as the versions' topics", bounds.len(), reads.len());
        return Err(OutsideError::lasting("the source", why));
    }
    let mut from = Places::new();
    for (partition, (next, (low, high))) in reads.iter().zip(bounds).enumerate() {
        match next {
            // What it didn't read is gone; nobody can read it.
            Some(next) => from.push(*next.max(low)),
            None if low == high => from.push(*low),
            None => {
                let why = format!(
                    "the stable service's group has no place in partition {partition}, which has records; expected one: let it read \
                     this topic, or set its place (kafka-consumer-groups --reset-offsets)"
                );
                return Err(OutsideError::lasting("router", why));
            }
        }
    }
    Ok(from)
}

/// Returns the end of a rollout that never took anything from stable.
fn never_begun() -> RouterPhase {
    RouterPhase::Done { from: Places::new(), through: Places::new(), winner: Side::Stable }
}

fn gone(lost: &[LostRange]) -> String {
    let ways = "`aviary router resume --skip-lost -f FILE` goes on with the first record that is left; `aviary router abort -f FILE` \
                gives all to stable";
    match lost.first() {
        None => format!("it was deleted and made anew; {ways}"),
        Some(LostRange { partition, from, until }) if until > from => {
            format!("records {from} to {} of partition {partition} are gone (retention?); {ways}", until - 1)
        }
        Some(LostRange { partition, from, .. }) => {
            format!("partition {partition} ends before {from}, the next to be read: was the topic made anew? {ways}")
        }
    }
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
