//! Every order of everything, at small bounds: three nodes, two transactions, and a few deaths.
//!
//! A search over the real core: from each state, the next message on any link may come, or be lost, each question may be
//! asked, a node may die between any two outputs and start again, a disk may be lost, and time may pass. Links keep their
//! messages in order, as TCP does; `world` has them in any order. States that were seen are not gone into again. What is
//! checked in each: one value for a slot, what votes depend on is durable, an increase has everybody's Yes, and a client is
//! never told two things.

use std::collections::{BTreeMap, HashSet};

use aviary_core::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary_core::domain::plan::{Backend, RolloutSpec, Stage};
use aviary_core::domain::time::{Mono, Now, Wall};
use aviary_core::domain::weights::Weight;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Decision, Message};
use aviary_core::protocol::record::{AcceptorState, Chosen, ConfigChange, Slot};
use aviary_core::protocol::{
    Command, Core, Input, OperatorRequest, Outcome, Output, RequestId, Retention, Settings, Timings,
};
use std::sync::Arc;

use crate::broken;
use crate::invariants::{AGREEMENT, ANSWERS, UNANIMITY, Violation};
use crate::truth::Truth;
use crate::world::{first_acceptor, genesis_of, name};

/// What a search goes through.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Deaths of a process, at any point.
    pub crashes: u8,
    /// Disks that lose everything they hold.
    pub wipes: u8,
    /// Times that everybody's patience ends.
    pub timeouts: u8,
    /// Transactions that clients request, up to 3.
    pub requests: u8,
    /// Messages lost, beside those on the way to a process that dies.
    pub losses: u8,
    /// States after which the search stops, complete or not.
    pub states: usize,
}

/// What a search came to.
#[derive(Debug, Default)]
pub struct SearchResult {
    /// Different states that were reached.
    pub states: usize,
    /// Steps that were tried between them.
    pub steps: usize,
    /// Longest way from the beginning.
    pub depth: usize,
    /// States in which slots were chosen: how many slots, how many states.
    pub chosen: BTreeMap<u64, usize>,
    /// True when nothing was left to look at.
    pub complete: bool,
}

/// A broken rule, at the end of a way from the beginning.
#[derive(Debug, thiserror::Error)]
#[error("{violation}, after {path:?}")]
pub struct BrokenWay {
    /// What broke.
    pub violation: Violation,
    path: Vec<Move>,
}

const NODES: usize = 3;
/// Longer than any patience of the core's.
const PATIENCE_MS: u64 = 1_600;

#[derive(Clone)]
struct Disk {
    acceptor: Option<AcceptorState>,
    log: Vec<Chosen>,
    durable: usize,
}

#[derive(Clone)]
struct State {
    now_ms: u64,
    cores: Vec<Core>,
    disks: Vec<Disk>,
    wire: Vec<(usize, usize, Incarnation, Message)>,
    truth: Truth,
    told: BTreeMap<u64, (bool, Slot)>,
    asked: u8,
    crashes: u8,
    wipes: u8,
    timeouts: u8,
    losses: u8,
}

/// A way on from a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Deliver(usize),
    Lose(usize),
    Request(u8),
    Timeout,
    Restart(usize),
    Wipe(usize),
}

fn index(node: &NodeId) -> usize {
    usize::from(node.as_str().as_bytes()[0] - b'a')
}

/// The requests: an increase at one node, a change of members and a rollback at others, so that they meet.
fn question(number: u8) -> (usize, OperatorRequest) {
    let service = ServiceId::new("s").expect("valid");
    let backend = |version: &str| Backend::new(VersionId::new(version).expect("valid"), vec![]);
    let stage = |bp| Stage { weight: Weight::from_bp(bp).expect("in range"), hold_ms: 60_000, manual: true };
    let spec = RolloutSpec {
        bake_ms: 0,
        progress_deadline_ms: 600_000,
        ..RolloutSpec::new(service.clone(), backend("v1"), backend("v2"), vec![stage(500), stage(10_000)])
    };
    match number {
        0 => (0, OperatorRequest::Apply(Arc::new(spec.checked().expect("a rollout within the rules")))),
        1 => (1, OperatorRequest::Config(ConfigChange::Cordon(name(2)))),
        _ => (2, OperatorRequest::Abort { service, reason: "x".into() }),
    }
}

impl State {
    fn new(bounds: Bounds) -> Self {
        let (genesis, members) = genesis_of(NODES);
        let disk = |i| Disk { acceptor: Some(first_acceptor(i, &genesis)), log: vec![genesis.clone()], durable: 1 };
        let mut state = Self {
            now_ms: 10_000,
            cores: Vec::new(),
            disks: (0..NODES).map(disk).collect(),
            wire: Vec::new(),
            truth: Truth::new(genesis.record.clone(), members),
            told: BTreeMap::new(),
            asked: 0,
            crashes: bounds.crashes,
            wipes: bounds.wipes,
            timeouts: bounds.timeouts,
            losses: bounds.losses,
        };
        for i in 0..NODES {
            let (core, outputs) = state.started(i);
            state.cores.push(core);
            let _ = state.carry_out(i, outputs, usize::MAX);
        }
        // They know of each other.
        let _ = state.pass_time(10);
        state.wire.clear();
        state
    }

    fn now(&self) -> Now {
        Now { mono: Mono(self.now_ms * 1000), wall: Wall(self.now_ms) }
    }

    fn started(&self, i: usize) -> (Core, Vec<Output>) {
        let disk = &self.disks[i];
        let settings = Settings {
            node: name(i),
            cluster: ClusterId([7; 16]),
            timings: Timings::default(),
            seed: i as u64,
            fresh_incarnation: Incarnation(100 + i as u64),
            retention: Retention::default(),
            peers: Default::default(),
            speaks: aviary_core::protocol::feature::PROTOCOL,
        };
        let ledger = Ledger::new(&disk.log[0]).expect("a log begins with its genesis");
        Core::start(settings, disk.acceptor.clone(), ledger, &disk.log[1..], BTreeMap::new(), self.now())
    }

    fn incarnation(&self, i: usize) -> Incarnation {
        self.cores[i].view().incarnation
    }

    /// Carries out the first `most` outputs.
    fn carry_out(&mut self, i: usize, outputs: Vec<Output>, most: usize) -> Result<(), Violation> {
        let node = name(i);
        for output in outputs.into_iter().take(most) {
            match output {
                Output::Persist(acceptor) => {
                    let disk = &mut self.disks[i];
                    (disk.acceptor, disk.durable) = (Some((*acceptor).clone()), disk.log.len());
                    let chosen = self.truth.persisted(&node, &acceptor)?;
                    if let Some((record, _)) = chosen.filter(|(record, _)| record.intent.operation.increases_exposure())
                    {
                        let yes = record.certificate.as_ref().map_or(0, |certificate| certificate.yes.len());
                        let needed = self.truth.membership_for(record.slot).map_or(0, |m| m.gate_voters().count());
                        if yes < needed {
                            return Err(broken!(UNANIMITY, "slot {} was raised by {yes} of {needed}", record.slot));
                        }
                    }
                }
                Output::Append(chosen) => {
                    let (slot, hash) = (chosen.record.slot, chosen.record.hash());
                    if self.truth.chosen(slot).is_none_or(|known| known.hash != hash) {
                        return Err(broken!(AGREEMENT, "{node} learned what nobody chose for slot {slot}"));
                    }
                    self.disks[i].log.push(*chosen);
                }
                Output::Send { to, message } => self.send(i, index(&to), *message),
                Output::SendLog { to, from, through } => {
                    let log = self.disks[i].log.clone();
                    let wanted = log.into_iter().filter(|c| (from..=through).contains(&c.record.slot));
                    wanted.for_each(|c| self.send(i, index(&to), Message::Decision(Decision::CatchUp(Box::new(c)))));
                }
                Output::Reply(request, outcome) => self.note(request, &outcome)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        // Signs of life are exchanged when time passes.
        if matches!(message, Message::Heartbeat(_) | Message::HealthSnapshot(_)) {
            return;
        }
        let letter = (from, to, self.incarnation(from), message);
        if !self.wire.contains(&letter) {
            self.wire.push(letter);
        }
    }

    /// Checks I4 and I5 for an answer: one outcome, and a chosen one.
    fn note(&mut self, request: RequestId, outcome: &Outcome) -> Result<(), Violation> {
        let (committed, slot) = match outcome {
            Outcome::Committed { slot, .. } => (true, *slot),
            Outcome::Aborted { slot, .. } => (false, *slot),
            _ => return Ok(()),
        };
        if self.truth.chosen(slot).is_none() {
            return Err(broken!(ANSWERS, "{request:?} was told {outcome:?}, and nothing is chosen there"));
        }
        match self.told.insert(request.0, (committed, slot)) {
            Some(before) if before != (committed, slot) => Err(broken!(ANSWERS, "told {before:?}, then {outcome:?}")),
            _ => Ok(()),
        }
    }

    fn moves(&self, bounds: Bounds) -> Vec<Move> {
        let link = |at: &usize| (self.wire[*at].0, self.wire[*at].1);
        let first = |at: &usize| (0..*at).all(|before| link(&before) != link(at));
        let next: Vec<_> = (0..self.wire.len()).filter(first).collect();
        let mut moves: Vec<_> = next.iter().map(|at| Move::Deliver(*at)).collect();
        if self.losses > 0 {
            moves.extend(next.iter().map(|at| Move::Lose(*at)));
        }
        moves.extend((0..bounds.requests).filter(|n| self.asked & 1 << n == 0).map(Move::Request));
        if self.timeouts > 0 {
            moves.push(Move::Timeout);
        }
        if self.crashes > 0 {
            moves.extend((0..NODES).map(Move::Restart));
        }
        if self.wipes > 0 {
            moves.extend((0..NODES).map(Move::Wipe));
        }
        moves
    }

    /// Returns every state that a move can lead to: the move as a whole, and, while somebody may still die, a death
    /// after each of its outputs.
    fn after(&self, step: Move) -> Result<Vec<State>, Violation> {
        match step {
            Move::Deliver(at) => {
                let mut next = self.clone();
                let (from, to, incarnation, message) = next.wire.remove(at);
                let input = Input::Received { from: name(from), incarnation, message: Box::new(message) };
                next.given(to, input)
            }
            Move::Lose(at) => {
                let mut next = self.clone();
                next.losses -= 1;
                next.wire.remove(at);
                Ok(vec![next])
            }
            Move::Request(number) => {
                let mut next = self.clone();
                next.asked |= 1 << number;
                let (i, asked) = question(number);
                let tx = TxId::new(format!("t{number}")).expect("valid");
                let input = Input::Operator(Command {
                    request: RequestId(u64::from(number)),
                    tx,
                    actor: "client".into(),
                    asked,
                });
                next.given(i, input)
            }
            Move::Timeout => {
                let mut next = self.clone();
                next.timeouts -= 1;
                next.pass_time(PATIENCE_MS)?;
                Ok(vec![next])
            }
            Move::Restart(i) => {
                let mut next = self.clone();
                next.crashes -= 1;
                next.restart(i)?;
                Ok(vec![next])
            }
            Move::Wipe(i) => {
                let mut next = self.clone();
                next.wipes -= 1;
                let disk = &mut next.disks[i];
                (disk.acceptor, disk.durable) = (None, 1);
                next.restart(i)?;
                Ok(vec![next])
            }
        }
    }

    fn given(self, i: usize, input: Input) -> Result<Vec<State>, Violation> {
        let mut next = self;
        let now = next.now();
        let outputs = next.cores[i].handle(now, input);
        let mut states = Vec::new();
        if next.crashes > 0 {
            // Dying before the first output is as if the input had never come, but for the input being gone.
            let last = outputs.iter().rposition(|output| matches!(output, Output::Persist(_) | Output::Send { .. }));
            for most in 0..=last.unwrap_or(0) {
                let mut dead = next.clone();
                dead.crashes -= 1;
                dead.carry_out(i, outputs.clone(), most)?;
                dead.restart(i)?;
                states.push(dead);
            }
        }
        next.carry_out(i, outputs, usize::MAX)?;
        states.push(next);
        Ok(states)
    }

    fn restart(&mut self, i: usize) -> Result<(), Violation> {
        self.wire.retain(|(_, to, ..)| *to != i);
        let disk = &mut self.disks[i];
        disk.log.truncate(disk.durable);
        let (core, outputs) = self.started(i);
        self.cores[i] = core;
        self.carry_out(i, outputs, usize::MAX)
    }

    /// Lets time pass, with every sign of life arriving.
    fn pass_time(&mut self, ms: u64) -> Result<(), Violation> {
        self.now_ms += ms;
        let now = self.now();
        let mut beats = Vec::new();
        for i in 0..NODES {
            let outputs = self.cores[i].handle(now, Input::Tick);
            for output in &outputs {
                if let Output::Send { to, message } = output
                    && matches!(**message, Message::Heartbeat(_))
                {
                    beats.push((i, index(to), message.clone()));
                }
            }
            self.carry_out(i, outputs, usize::MAX)?;
        }
        for (from, to, message) in beats {
            let input = Input::Received { from: name(from), incarnation: self.incarnation(from), message };
            let outputs = self.cores[to].handle(now, input);
            self.carry_out(to, outputs, usize::MAX)?;
        }
        Ok(())
    }

    /// Removes votes that change nothing and never will: those of ballots that are over. A ballot never comes back.
    fn forget_late_votes(&mut self) {
        let now = self.now();
        let cores = &self.cores;
        self.wire.retain(|(from, to, incarnation, message)| {
            if !matches!(message, Message::Vote(_)) {
                return true;
            }
            let mut core = cores[*to].clone();
            let (message, from) = (Box::new(message.clone()), name(*from));
            let outputs = core.handle(now, Input::Received { from, incarnation: *incarnation, message });
            let quiet = outputs.iter().all(|output| matches!(output, Output::Publish(_) | Output::Announce(_)));
            !quiet || core.fingerprint() != cores[*to].fingerprint()
        });
    }

    fn fingerprint(&self) -> (u64, u64) {
        let cores: Vec<_> = self.cores.iter().map(Core::fingerprint).collect();
        let disks: Vec<_> = self.disks.iter().map(|disk| (&disk.acceptor, disk.log.len(), disk.durable)).collect();
        let mut wire: Vec<_> = self.wire.iter().collect();
        wire.sort_by_key(|(from, to, ..)| (*from, *to));
        let counts = (self.now_ms, self.asked, self.crashes, self.wipes, self.timeouts, self.losses);
        let text = format!("{cores:?} {disks:?} {wire:?} {:?} {:?} {counts:?}", self.truth.accepts, self.told);
        let one = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let two =
            text.bytes().fold(0x9e37_79b9u64, |h, b| h.rotate_left(5) ^ u64::from(b).wrapping_mul(0x51_7cc1_b727_220b));
        (one, two)
    }
}

/// Searches everything within the bounds; an error says what broke, and by which steps.
pub fn search(bounds: Bounds) -> Result<SearchResult, BrokenWay> {
    let mut found = SearchResult { complete: true, ..SearchResult::default() };
    let first = State::new(bounds);
    let mut seen = HashSet::from([first.fingerprint()]);
    let mut ways: Vec<(State, Vec<Move>, Vec<Move>)> = vec![(first.clone(), first.moves(bounds), Vec::new())];
    while let Some((state, moves, path)) = ways.last_mut() {
        let Some(step) = moves.pop() else {
            ways.pop();
            continue;
        };
        let mut path = path.clone();
        path.push(step);
        let states = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.after(step)));
        let states = states.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Err(broken!(
                "panic",
                "{}",
                text.or_else(|| panic.downcast_ref::<&str>().map(|t| t.to_string())).unwrap_or_default()
            ))
        });
        let states = states.map_err(|violation| BrokenWay { violation, path: path.clone() })?;
        found.steps += states.len();
        for mut next in states {
            next.forget_late_votes();
            if !seen.insert(next.fingerprint()) {
                continue;
            }
            *found.chosen.entry(next.truth.head().0).or_default() += 1;
            found.depth = found.depth.max(path.len());
            if seen.len() >= bounds.states {
                found.states = seen.len();
                found.complete = false;
                return Ok(found);
            }
            let moves = next.moves(bounds);
            ways.push((next, moves, path.clone()));
        }
    }
    found.states = seen.len();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_transaction_and_one_death_in_every_order() {
        let bounds = Bounds { crashes: 1, wipes: 0, timeouts: 0, requests: 1, losses: 0, states: 200_000 };
        let found = search(bounds).unwrap();
        assert!(found.complete && found.states > 200, "{found:?}");
        assert!(found.chosen[&1] > 0, "{found:?}");
    }
}
