//! Seeded bugs: the real core behind a wrapper that breaks one rule. A world that misses one of them checks nothing.
//!
//! The bugs are in the wrapper, not in the core: nothing of them is in the shipped program.

use aviary_core::domain::ids::{Incarnation, NodeId, ServiceId};
use aviary_core::domain::plan::Backend;
use aviary_core::domain::time::{Mono, Now};
use aviary_core::protocol::checkpoint::Checkpoint;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Answer, Decision, GateVote, HealthSnapshot, Message, Vote};
use aviary_core::protocol::record::{Accepted, AcceptorState, Ballot, Chosen, Record};
use aviary_core::protocol::{Command, Core, Hold, Input, Observation, OperatorRequest, Output, View};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::invariants::Violation;
#[cfg(test)]
use crate::scripts::{self, Script};
use crate::subject::{Setup, Subject};
use crate::world::{Options, World};

/// A rule of the protocol that a wrapper around the core breaks.
pub struct SeededBug {
    /// What is wrong, in words; `--bug` searches in them.
    pub name: &'static str,
    /// The first seed that catches it.
    pub pin: Pin,
    /// Runs one seed with the bug; returns what broke, if anything did.
    run: fn(Options) -> Option<Violation>,
    /// Plays an event script with it.
    #[cfg(test)]
    pub play: fn(&Script) -> Script,
}

/// What catches a seeded bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Seed of the run that catches it.
    pub seed: u64,
    /// The rule that then breaks.
    pub rule: &'static str,
}

const PROMISE: u8 = 0;
const ACCEPT: u8 = 1;
const WIPED: u8 = 2;
const IGNORED: u8 = 3;
const MAJORITY: u8 = 4;
const SUFFIX: u8 = 5;
const RECEIPT: u8 = 6;
const GRANTED: u8 = 7;
const EARLY: u8 = 8;
const IN_DOUBT: u8 = 9;
const STALE: u8 = 10;
const REUSED: u8 = 11;
const UNSYNCED: u8 = 12;
const REPEATED: u8 = 13;
const FORGED: u8 = 14;
const OLD_EVIDENCE: u8 = 15;
const DISOBEYED: u8 = 16;
const HALFWAY: u8 = 17;
const UNRETIRED: u8 = 18;
const UNSETTLED: u8 = 19;
const BY_WALL: u8 = 20;
const MOVED: u8 = 21;

/// All of them, each with the first seed that catches it in a run of [`PINNED_MS`], and the rule that it breaks there. A
/// change that draws differently moves them: `sim --seeded-bugs --search` finds the new ones.
pub const ALL: [SeededBug; 22] = [
    bug::<PROMISE>("a promise is forgotten by a restart", 1, "I6 promises"),
    bug::<ACCEPT>("an accepted record is forgotten by a restart", 2, "I10/I12 writes"),
    bug::<WIPED>("a wiped voter votes", 1, "I6 promises"),
    bug::<IGNORED>("what votes tell of accepted records is ignored", 1, "I10/I12 writes"),
    bug::<MAJORITY>("a promotion goes by majority, not unanimity", 2, "I3 unanimity"),
    bug::<SUFFIX>("a log that lost its end is trusted", 3, "I6 promises"),
    bug::<RECEIPT>("the lease is measured from the answer's receipt", 0, BY_SCRIPT),
    bug::<GRANTED>("a lease is granted whatever was accepted since", 30, "I9 enforcement"),
    bug::<EARLY>("a record is served and told before it is durable", 1, "I10/I12 writes"),
    bug::<IN_DOUBT>("an increase that was decided in doubt is served", 1, "I1 agreement"),
    bug::<STALE>("evidence of an earlier step counts for this one", 0, BY_SCRIPT),
    bug::<REUSED>("a ballot is used again after a restart", 2, "I13 ballots"),
    bug::<UNSYNCED>("a vote leaves before the write it promises", 1, "I10/I12 writes"),
    bug::<REPEATED>("the writes that were answered are forgotten", 1, "I6 promises"),
    bug::<FORGED>("an increase is accepted without every Yes", 2, "I3 unanimity"),
    bug::<OLD_EVIDENCE>("a peer's evidence of an earlier step counts", 0, BY_SCRIPT),
    bug::<DISOBEYED>("an accepted rollback is obeyed once it is chosen", 1, "I8 ceiling"),
    bug::<HALFWAY>("enforced is told at half the lease", 9, "I9 enforcement"),
    bug::<UNRETIRED>("a checkpoint forgets replaced incarnations", 1, "I2 chain"),
    bug::<UNSETTLED>("a restart forgets the outcomes of transactions", 2, "I2 chain"),
    bug::<BY_WALL>("the time of day is taken for monotonic time", 3, "liveness"),
    bug::<MOVED>("stable is where the last file says", 1, "I16 stable"),
];

/// In the place of a rule: random runs seldom meet it, and the event script that names it catches it instead.
pub const BY_SCRIPT: &str = "script";

/// Length of the faulty part of a pinned run, in virtual milliseconds.
pub const PINNED_MS: u64 = 60_000;

const fn bug<const BUG: u8>(name: &'static str, seed: u64, rule: &'static str) -> SeededBug {
    SeededBug {
        name,
        pin: Pin { seed, rule },
        run: run::<BUG>,
        #[cfg(test)]
        play: scripts::play::<Bent<BUG>>,
    }
}

fn run<const BUG: u8>(options: Options) -> Option<Violation> {
    World::<Bent<BUG>>::new(options).run().err()
}

impl SeededBug {
    /// Runs the pinned seed; returns what broke.
    pub fn run_pinned(&self, options: Options) -> Option<Violation> {
        (self.run)(Options { seed: self.pin.seed, ms: PINNED_MS, ..options })
    }

    /// Runs seeds from 1 on until the bug is caught; returns that seed, and what broke.
    pub fn search(&self, options: Options, seeds_max: u64) -> Option<(u64, Violation)> {
        let found = |seed| Some((seed, (self.run)(Options { seed, ms: PINNED_MS, ..options })?));
        (1..=seeds_max).find_map(found)
    }
}

/// The real core, with one rule broken on the way in or out.
struct Bent<const BUG: u8> {
    core: Core,
    view: Option<Arc<View>>,
    /// The traffic it saw last.
    seen: Vec<Observation>,
    /// The first evidence that each peer told of each service, as of its last step there.
    heard: BTreeMap<(NodeId, ServiceId), HealthSnapshot>,
    /// The acceptor state it wrote last.
    acceptor: Option<AcceptorState>,
    /// When it learned of decreases that aren't enforced yet, by service.
    decreased: BTreeMap<ServiceId, Mono>,
    /// What its monotonic clock began at, and the time of day.
    began: Now,
    /// The stable of each service's last file, refused or not.
    files: BTreeMap<ServiceId, Backend>,
}

impl<const BUG: u8> Subject for Bent<BUG> {
    fn start(
        setup: Setup,
        acceptor: Option<AcceptorState>,
        ledger: Ledger,
        log: &[Chosen],
        now: Now,
    ) -> (Self, Vec<Output>) {
        let node = setup.node.clone();
        let cluster = setup.cluster;
        let last = log.last().map_or((ledger.head, ledger.head_hash), |last| (last.record.slot, last.record.hash()));
        let mut log = log;
        let acceptor = match (BUG, acceptor) {
            (WIPED, None) => {
                // It takes the place it had, as if it remembered everything.
                let bound = ledger.members.0.get(&node).map_or(Incarnation(1), |member| member.incarnation);
                let (head, head_hash) = last;
                Some(AcceptorState {
                    cluster,
                    node,
                    incarnation: bound,
                    boot: 0,
                    promised: None,
                    accepted: None,
                    head,
                    head_hash,
                    // More than any peer has seen.
                    writes: 1 << 32,
                    seen: Default::default(),
                })
            }
            (_, None) => None,
            (PROMISE, Some(acceptor)) => Some(AcceptorState { promised: None, ..acceptor }),
            (ACCEPT, Some(acceptor)) => Some(AcceptorState { accepted: None, ..acceptor }),
            (SUFFIX, Some(acceptor)) if acceptor.head > last.0 => {
                Some(AcceptorState { head: last.0, head_hash: last.1, ..acceptor })
            }
            (REUSED, Some(acceptor)) => Some(AcceptorState { boot: acceptor.boot.saturating_sub(1), ..acceptor }),
            (REPEATED, Some(acceptor)) if log.len() > 1 => {
                // It believes the log to end before its last record.
                log = &log[..log.len() - 1];
                let (head, head_hash) = log.last().map_or(last, |last| (last.record.slot, last.record.hash()));
                let accepted = None;
                Some(AcceptorState { head: head.min(acceptor.head), head_hash, accepted, ..acceptor })
            }
            (_, acceptor) => acceptor,
        };
        let mut ledger = ledger;
        if BUG == UNSETTLED {
            ledger.settled.clear();
        }
        let (core, outputs) = <Core as Subject>::start(setup, acceptor, ledger, log, now);
        let (decreased, heard, files) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut bent = Self { core, view: None, seen: Vec::new(), heard, acceptor: None, decreased, began: now, files };
        let outputs = bent.bend(now, outputs);
        (bent, outputs)
    }

    fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        if let Some(outputs) = self.accept_forged(&input) {
            return outputs;
        }
        let input = self.bend_input(input);
        let believed = self.clock(now);
        let outputs = Subject::handle(&mut self.core, believed, input);
        self.bend(now, outputs)
    }
}

impl<const BUG: u8> Bent<BUG> {
    fn bend_input(&mut self, mut input: Input) -> Input {
        if let (STALE, Input::Telemetry(observations)) = (BUG, &mut input) {
            self.add_stale(observations);
        }
        if let (MOVED, Input::Operator(Command { asked: OperatorRequest::Apply(spec), .. })) = (BUG, &input) {
            self.files.insert(spec.service.clone(), spec.stable.clone());
        }
        let Input::Received { from, message, .. } = &mut input else { return input };
        match (BUG, &mut **message) {
            (IGNORED, Message::Vote(vote)) => {
                if let Answer::Gate { accepted, .. } = &mut vote.answer {
                    *accepted = None;
                }
            }
            (MAJORITY, Message::Vote(vote)) => {
                if let Answer::Gate { gate, .. } = &mut vote.answer
                    && !matches!(gate, GateVote::Yes(_))
                {
                    *gate = GateVote::Yes("the others are for it".into());
                }
            }
            (OLD_EVIDENCE, Message::HealthSnapshot(snapshot)) => {
                let key = (from.clone(), snapshot.service.clone());
                let before = self.heard.entry(key).or_insert_with(|| snapshot.clone());
                if before.routing_version < snapshot.routing_version {
                    snapshot.evidence.merge(&before.evidence);
                } else {
                    *before = snapshot.clone();
                }
            }
            (IN_DOUBT, Message::Decision(Decision::Chosen(chosen) | Decision::CatchUp(chosen))) => {
                if let Some(certificate) = &chosen.record.certificate {
                    chosen.ballot = Some(certificate.ballot.clone());
                }
            }
            _ => {}
        }
        input
    }

    /// Returns the clock by which the core goes: one that believes the time of day.
    fn clock(&self, now: Now) -> Now {
        let passed = now.wall.0.saturating_sub(self.began.wall.0);
        match BUG {
            BY_WALL => Now { mono: now.mono.max(self.began.mono.after_ms(passed)), ..now },
            _ => now,
        }
    }

    /// Accepts a proposal whose certificate lacks a Yes, as an acceptor would that doesn't look at it.
    fn accept_forged(&mut self, input: &Input) -> Option<Vec<Output>> {
        let Input::Received { from, message, .. } = input else { return None };
        let Message::Decision(Decision::Propose(ballot, record)) = &**message else { return None };
        let known = self.acceptor.as_ref().filter(|known| {
            BUG == FORGED && known.promised.as_ref() <= Some(ballot) && known.head.next() == record.slot
        })?;
        let members = &self.view.as_ref()?.members;
        let yes = &record.certificate.as_ref()?.yes;
        if members.iter().all(|(voter, member)| member.cordoned || yes.contains_key(voter)) {
            return None;
        }
        let accepted = Some(Accepted { ballot: ballot.clone(), record: (**record).clone() });
        let acceptor = AcceptorState { promised: Some(ballot.clone()), accepted, ..known.clone() };
        self.acceptor = Some(acceptor.clone());
        let vote = accept_of(&acceptor, ballot, record);
        Some(vec![Output::Persist(Box::new(acceptor)), Output::Send { to: from.clone(), message: Box::new(vote) }])
    }

    /// What was observed at the step before comes again, as if it were observed at this one.
    fn add_stale(&mut self, observations: &mut Vec<Observation>) {
        let Some(view) = &self.view else { return };
        let now = |seen: &Observation| {
            let routing_version = view.services.get(&seen.service)?.service.routing.version;
            (seen.routing_version.checked_add(1) == Some(routing_version))
                .then(|| Observation { routing_version, ..seen.clone() })
        };
        let stale: Vec<_> = self.seen.iter().filter_map(now).collect();
        self.seen.extend(observations.iter().cloned());
        let spare = self.seen.len().saturating_sub(32);
        self.seen.drain(..spare);
        observations.extend(stale);
    }

    /// Serves stable where the last file says it is.
    fn move_stable(&self, view: &mut Arc<View>) {
        for (service, shown) in Arc::make_mut(&mut Arc::make_mut(view).services).iter_mut() {
            let file = self.files.get(service).filter(|file| file.version == shown.serving.stable.version);
            if let Some(file) = file {
                Arc::make_mut(shown).serving.stable = file.clone();
            }
        }
    }

    fn bend(&mut self, now: Now, mut outputs: Vec<Output>) -> Vec<Output> {
        for output in &mut outputs {
            match output {
                Output::Publish(view) if BUG == MOVED => self.move_stable(view),
                Output::Publish(view) => {
                    self.view = Some(view.clone());
                    self.bend_view(now, view);
                }
                Output::Persist(acceptor) => self.acceptor = Some((**acceptor).clone()),
                Output::Lease(Some(from)) if BUG == BY_WALL => {
                    from.0 -= (self.clock(now).mono.0 - now.mono.0).min(from.0);
                }
                Output::Checkpoint { checkpoint, .. } if BUG == UNRETIRED => forget_retired(checkpoint),
                Output::Lease(Some(from)) if BUG == RECEIPT => *from = now.mono,
                Output::Send { message, .. } if BUG == GRANTED => {
                    if let Message::Heartbeat(heartbeat) = &mut **message
                        && let Some(acknowledgement) = &mut heartbeat.acknowledges
                    {
                        acknowledgement.granted = true;
                    }
                }
                _ => {}
            }
        }
        let first = |output: &Output| match output {
            Output::Publish(_) | Output::Reply(..) => BUG == EARLY,
            Output::Send { .. } => BUG == EARLY || BUG == UNSYNCED,
            _ => false,
        };
        // In order, but before the writes.
        let (mut early, late): (Vec<_>, Vec<_>) = outputs.into_iter().partition(first);
        early.extend(late);
        early
    }
}

impl<const BUG: u8> Bent<BUG> {
    /// Shows services otherwise than the core does.
    fn bend_view(&mut self, now: Now, view: &mut Arc<View>) {
        for (id, shown) in Arc::make_mut(&mut Arc::make_mut(view).services).iter_mut() {
            let since = match shown.enforced {
                true => now.mono,
                false => *self.decreased.entry(id.clone()).or_insert(now.mono),
            };
            if shown.enforced {
                self.decreased.remove(id);
            }
            let half_ms = shown.service.rollout.spec.lease_ms / 2;
            if BUG == HALFWAY && !shown.enforced && now.mono.millis_since(since) >= half_ms {
                Arc::make_mut(shown).enforced = true;
            }
            if BUG == DISOBEYED && shown.serving.held_back == Some(Hold::Decreasing) {
                let bp = shown.service.routing.canary_weight().bp();
                let serving = &mut Arc::make_mut(shown).serving;
                serving.held_back = None;
                serving.canary.iter_mut().for_each(|canary| canary.1 = bp);
            }
        }
    }
}

/// Returns the word that a proposal was accepted.
fn accept_of(acceptor: &AcceptorState, ballot: &Ballot, record: &Record) -> Message {
    let (head, writes) = (acceptor.head, acceptor.writes);
    Message::Vote(Vote { ballot: ballot.clone(), slot: record.slot, head, writes, answer: Answer::Accept })
}

/// Takes the replaced incarnations out of a checkpoint of a cluster without a canary, as a new cluster's has none.
fn forget_retired(checkpoint: &mut Checkpoint) {
    let Ok(ledger) = checkpoint.ledger() else { return };
    let (cluster, members, head) = (ledger.cluster, ledger.members.clone(), ledger.head);
    let forgetful = ledger.refounded(cluster, members, Default::default());
    if let Some(forgetful) = forgetful.ok().filter(|forgetful| forgetful.head == head)
        && let Ok(bent) = Checkpoint::of(&forgetful)
    {
        *checkpoint = bent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_alone_breaks_nothing() {
        const NONE: u8 = 255;
        let options = Options { ms: 5_000, ..Options::of(3) };
        let outcome = World::<Bent<NONE>>::new(options).run();
        assert!(outcome.is_ok(), "{:?}", outcome.err());
    }
}
