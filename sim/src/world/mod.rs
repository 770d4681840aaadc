//! The simulated world: nodes with disks and clocks, a network between them, operators, traffic and faults.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use aviary_core::domain::analysis::Analysis;
use aviary_core::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary_core::domain::plan::{Backend, Manifest, OnPartition, RolloutSpec, Stage};
use aviary_core::domain::rollout::{Phase, Service};
use aviary_core::domain::stats::Stats;
use aviary_core::domain::time::{Mono, Now, Wall};
use aviary_core::domain::weights::Weight;
use aviary_core::domain::window::Evidence;
use aviary_core::protocol::checkpoint::Checkpoint;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Decision, Message};
use aviary_core::protocol::record::{
    AcceptorState, Chosen, ConfigChange, Initiator, Intent, Member, Members, Operation, Record, SavedRun, Slot,
};
use aviary_core::protocol::{
    Command, Event, Input, Observation, OperatorRequest, Outcome, Output, RequestId, Retention, Timings, View, codec,
};

use crate::broken;
use crate::coverage::Coverage;
use crate::dice::Dice;
use crate::invariants::{self, Invariant, Violation};
use crate::subject::{Setup, Subject};
use crate::trace::Trace;
use crate::truth::{Fact, Served, Truth};

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Seed from which the whole run follows.
    pub seed: u64,
    /// Length of the faulty part, in virtual milliseconds.
    pub ms: u64,
    /// Nodes; drawn from the seed when none.
    pub nodes: Option<usize>,
    /// Keep the trace as text, not only its hash.
    pub words: bool,
    /// Print the trace while the run goes on.
    pub print: bool,
    /// Kinds of faults that don't happen: bits by their place in [`FAULTS`].
    pub without: u32,
}

impl Options {
    /// Returns the plain run of a seed.
    #[cfg(test)]
    pub fn of(seed: u64) -> Self {
        Self { seed, ms: 20_000, nodes: None, words: false, print: false, without: 0 }
    }

    /// Returns the arguments that make this run again.
    pub fn arguments(&self) -> String {
        let mut text = format!("--seed {} --ms {}", self.seed, self.ms);
        if let Some(nodes) = self.nodes {
            text += &format!(" --nodes {nodes}");
        }
        let left_out = FAULTS.iter().enumerate().filter(|(place, _)| self.without & 1 << place != 0);
        let left_out: Vec<_> = left_out.map(|(_, name)| *name).collect();
        if !left_out.is_empty() {
            text += &format!(" --without {}", left_out.join(","));
        }
        text
    }
}

/// What a run came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct Summary {
    /// Hash of everything that happened.
    pub hash: u64,
    /// Length of the run, in virtual microseconds.
    pub us: u64,
    /// Slots for which a value was chosen.
    pub slots: u64,
    /// Increases of a canary's weight that were chosen.
    pub increases: u64,
    /// Processes that crashed and started again.
    pub crashes: u64,
    /// Disks that lost everything they held.
    pub wipes: u64,
    /// Checkpoints taken over from a peer.
    pub installs: u64,
    /// Records that were chosen in doubt.
    pub in_doubt: u64,
    /// Steps after which some node served canary traffic.
    pub exposed: u64,
}

mod calm;
mod faults;
mod node;
mod words;
mod workload;

use faults::{CLOG_US_MAX, Mix};
pub use faults::{FAULTS, LATER};
use node::Node;
use words::{brief, brief_op};
use workload::TrafficProfile;

enum Happening {
    Tick(usize, u64),
    Deliver(usize, NodeId, Incarnation, Box<Message>),
    Refused(usize, NodeId),
    Written(usize, u64),
    Telemetry,
    Operator,
    Fault,
    Later,
    Restart(usize),
    Continue(usize, u64),
    Heal(u64),
}

/// What happens at a time (microseconds), in the order of its number if several happen then.
struct Planned(u64, u64, Happening);
impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Planned {}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}
/// Returns the genesis of a cluster of this many nodes, and its members.
pub fn genesis_of(nodes: usize) -> (Chosen, Members) {
    let member = |i: usize| (name(i), Member { incarnation: Incarnation(i as u64 + 1), cordoned: false });
    let members = Members((0..nodes).map(member).collect());
    let operation = Operation::Genesis { cluster: ClusterId([7; 16]), members: members.clone() };
    let intent = Intent {
        initiator: Initiator::Node,
        tx: TxId::new("genesis").expect("a valid name"),
        actor: "test".into(),
        digest: 0,
        at: Wall(0),
        operation,
    };
    let record =
        Record { slot: Slot(0), prev_hash: Default::default(), intent, state: None, phase: None, certificate: None };
    (Chosen { ballot: None, decided_at: Wall(0), record }, members)
}

/// Returns the acceptor state of a node that never ran.
pub fn first_acceptor(index: usize, genesis: &Chosen) -> AcceptorState {
    AcceptorState {
        cluster: ClusterId([7; 16]),
        node: name(index),
        incarnation: Incarnation(index as u64 + 1),
        boot: 0,
        promised: None,
        accepted: None,
        head: Slot(0),
        head_hash: genesis.record.hash(),
        writes: 0,
        seen: BTreeMap::new(),
    }
}

/// Returns the name of a node: a, b, c…
pub fn name(index: usize) -> NodeId {
    NodeId::new(char::from(b'a' + index as u8).to_string()).expect("a valid name")
}

/// One run: the nodes, the network between them, and their clients.
pub struct World<S> {
    options: Options,
    dice: Dice,
    /// For what came later than the seeds that are pinned.
    more: Dice,
    /// For what came later still.
    newest: Dice,
    mix: Mix,
    timings: Timings,
    retention: Retention,
    now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<Planned>>,
    nodes: Vec<Node<S>>,
    cut: BTreeSet<(usize, usize)>,
    cut_number: u64,
    truth: Truth,
    invariants: Vec<Box<dyn Invariant>>,
    /// What happened so far, as a hash and perhaps as text.
    pub trace: Trace,
    services: Vec<ServiceId>,
    profiles: Vec<TrafficProfile>,
    requests: u64,
    old: Vec<(TxId, OperatorRequest)>,
    replies: BTreeMap<u64, Outcome>,
    calm: bool,
    summary: Summary,
    /// Links that are slow, until when.
    clogged: BTreeMap<(usize, usize), u64>,
    /// Faults, events and crash places that this run reached.
    pub coverage: Coverage,
}

type Step = Result<(), Violation>;

/// Returns what the nodes of a seed keep of their logs: mostly so little that who lags needs the sum.
fn retention_of(seed: u64) -> Retention {
    let (checkpoint_every, history) = [(4_096, 16_384), (8, 8), (4, 2), (2, 0)][(seed % 4) as usize];
    Retention { checkpoint_every, history }
}

impl<S: Subject> World<S> {
    /// Returns the world of a seed.
    pub fn new(options: Options) -> Self {
        let mut dice = Dice::new(options.seed);
        let drawn = [3, 3, 3, 3, 3, 5, 5, 1, 2, 4, 7][dice.below(11)];
        let count = options.nodes.unwrap_or(drawn);
        let mut more = Dice::new(options.seed ^ 0x6d6f_7265_6661_756c);
        let mut newest = Dice::new(options.seed ^ 0x6e65_7765_7374);
        let mix = Mix::draw(&mut dice, &mut more, &mut newest, options.without);
        let (genesis, members) = genesis_of(count);
        let heartbeat_ms = dice.between(100, 240);
        let timings = Timings { heartbeat_ms, ..Timings::default() };
        let nodes = (0..count).map(|i| Self::node(i, &genesis, &mut dice)).collect();
        let services =
            (0..dice.between(1, 3)).map(|i| ServiceId::new(format!("s{i}")).expect("valid")).collect::<Vec<_>>();
        let profiles = services.iter().map(|_| TrafficProfile::Healthy).collect();
        Self {
            options,
            mix,
            timings,
            retention: retention_of(options.seed),
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            nodes,
            truth: Truth::new(genesis.record.clone(), members),
            cut: BTreeSet::new(),
            cut_number: 0,
            invariants: invariants::all(),
            trace: Trace::new(options.words, options.print),
            services,
            profiles,
            requests: 0,
            old: Vec::new(),
            replies: BTreeMap::new(),
            calm: false,
            summary: Summary::default(),
            clogged: BTreeMap::new(),
            coverage: Coverage::default(),
            dice,
            more,
            newest,
        }
    }

    /// Runs to the end, safety first, then liveness.
    pub fn run(&mut self) -> Result<Summary, Violation> {
        for i in 0..self.nodes.len() {
            let at = self.dice.between(0, 50_000);
            self.plan(at, Happening::Restart(i));
        }
        self.plan(100_000, Happening::Telemetry);
        self.plan(200_000, Happening::Operator);
        let first = self.mix.fault_us;
        self.plan(first, Happening::Fault);
        if self.mix.later.iter().any(|weight| *weight > 0) {
            self.plan(self.mix.later_us, Happening::Later);
        }
        self.run_until(self.options.ms * 1000)?;
        self.liveness()?;
        self.fact(Fact::Over)?;
        self.summary.hash = self.trace.hash();
        self.summary.us = self.now;
        self.summary.slots = self.truth.head().0;
        Ok(self.summary)
    }

    fn plan(&mut self, after: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.push(Reverse(Planned(self.now + after, self.sequence, happening)));
    }

    fn run_until(&mut self, end: u64) -> Step {
        while self.queue.peek().is_some_and(|Reverse(entry)| entry.0 <= end) {
            let Reverse(Planned(at, _, happening)) = self.queue.pop().expect("peeked");
            self.now = at;
            self.truth.now = at;
            self.trace.fold(at);
            self.happen(happening)?;
            self.look()?;
        }
        self.now = end;
        self.truth.now = end;
        Ok(())
    }

    fn fact(&mut self, fact: Fact) -> Step {
        for invariant in &mut self.invariants {
            invariant.see(&fact, &self.truth)?;
        }
        Ok(())
    }

    /// Looks at what every node would serve.
    fn look(&mut self) -> Step {
        for node in &self.nodes {
            let Some(view) = node.process.as_ref().and_then(|process| process.view.as_ref()) else { continue };
            for (service, shown) in view.services.iter() {
                if shown.enforced && shown.service.rollout.phase == Phase::RolledBack {
                    let fact = Fact::Enforced(&node.id, service, shown.slot);
                    for invariant in &mut self.invariants {
                        invariant.see(&fact, &self.truth)?;
                    }
                }
            }
        }
        for node in &self.nodes {
            let Some(process) = &node.process else { continue };
            let Some(view) = &process.view else { continue };
            for (service, shown) in view.services.iter() {
                let Some((canary, _)) = &shown.serving.canary else { continue };
                let bp = node.effective_bp(self.now, &shown.serving);
                self.summary.exposed += u64::from(bp > 0);
                let served = Served {
                    node: &node.id,
                    service,
                    canary: &canary.version,
                    slot: shown.slot,
                    bp,
                    is_writing: process.writing.is_some() || !process.pending.is_empty(),
                    leased: shown.serving.lease_ms.is_some(),
                    on_partition: shown.serving.spec.on_partition,
                };
                let fact = Fact::Served(served);
                for invariant in &mut self.invariants {
                    invariant.see(&fact, &self.truth)?;
                }
            }
        }
        Ok(())
    }

    fn happen(&mut self, happening: Happening) -> Step {
        match happening {
            Happening::Tick(i, generation) => {
                if self.nodes[i].generation == generation && self.nodes[i].process.is_some() {
                    let after = self.dice.between(self.mix.tick_us / 2, self.mix.tick_us);
                    self.plan(after, Happening::Tick(i, generation));
                    let free = self.nodes[i].process.as_ref().is_some_and(|p| !p.paused && p.writing.is_none());
                    return if free { self.give(i, Input::Tick) } else { Ok(()) };
                }
                Ok(())
            }
            Happening::Deliver(to, from, incarnation, message) => {
                let message = self.forged(message);
                let at = self.now;
                let node = &self.nodes[to];
                self.trace.line(at, node.id.as_str(), "receives", || format!("from {from}: {}", brief(&message)));
                self.give(to, Input::Received { from, incarnation, message })
            }
            Happening::Refused(to, peer) => self.give(to, Input::Unreachable(peer)),
            Happening::Written(i, generation) => {
                if self.nodes[i].generation != generation {
                    return Ok(());
                }
                self.written(i)?;
                self.carry_out(i)
            }
            Happening::Telemetry => self.telemetry(),
            Happening::Operator => {
                if self.calm {
                    return Ok(());
                }
                let after = self.dice.between(1, self.mix.operator_us * 2);
                self.plan(after, Happening::Operator);
                self.operate()
            }
            Happening::Fault => {
                if self.calm {
                    return Ok(());
                }
                let after = self.dice.between(1, self.mix.fault_us * 2);
                self.plan(after, Happening::Fault);
                self.inject_fault()
            }
            Happening::Later => {
                if self.calm {
                    return Ok(());
                }
                let after = self.more.between(1, self.mix.later_us * 2);
                self.plan(after, Happening::Later);
                self.inject_later_fault()
            }
            Happening::Restart(i) => self.start(i),
            Happening::Continue(i, generation) => {
                if self.nodes[i].generation == generation
                    && let Some(process) = &mut self.nodes[i].process
                {
                    process.paused = false;
                    self.trace.line(self.now, self.nodes[i].id.as_str(), "continues", String::new);
                    return self.carry_out(i);
                }
                Ok(())
            }
            Happening::Heal(number) => {
                if self.cut_number == number {
                    self.cut.clear();
                    self.trace.line(self.now, "*", "heals", String::new);
                }
                Ok(())
            }
        }
    }

    /// Returns how many slots were chosen so far.
    #[cfg(test)]
    pub fn slots(&self) -> u64 {
        self.truth.head().0
    }

    /// Returns each node's state in words.
    pub fn states(&self) -> Vec<String> {
        let head = self.truth.head();
        let mut lines = vec![format!(
            "*    {} nodes, {} services, chosen head {head}, membership {:?}",
            self.nodes.len(),
            self.services.len(),
            self.truth.members()
        )];
        for node in &self.nodes {
            let acceptor = node.acceptor.as_ref().map(|r| {
                let accepted = r.accepted.as_ref().map(|a| format!("{} slot {}", a.ballot, a.record.slot));
                format!(
                    "boot {} promised {:?} accepted {accepted:?} head {}",
                    r.boot,
                    r.promised.as_ref().map(|b| b.to_string()),
                    r.head
                )
            });
            let process = match &node.process {
                None => "down".into(),
                Some(p) => {
                    let view = p.view.as_ref().map(|v| {
                        format!("{:?} head {} coordinator {} {}", v.membership, v.head, v.coordinator, services(v))
                    });
                    let left = p
                        .lease
                        .map(|from| self.nodes.first().map_or(0, |_| node.now(self.now).mono.millis_since(from)));
                    format!("paused {} inbox {} view {view:?} lease began {left:?} ms ago", p.paused, p.inbox.len())
                }
            };
            lines.push(format!(
                "{:<3}  log {} ({} durable) · {acceptor:?} · {process}",
                node.id,
                node.log.len(),
                node.durable
            ));
        }
        lines
    }
}

/// Returns where the rollouts stand that a node shows.
fn services(view: &View) -> String {
    let one = |(id, shown): (&ServiceId, &Arc<aviary_core::protocol::ServiceView>)| {
        let rollout = &shown.service.rollout;
        let (phase, stage, reason) = (rollout.phase, rollout.stage, &rollout.reason);
        format!("{id} {phase} at stage {stage} ({reason}), waits for {:?}", shown.waiting_for)
    };
    view.services.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::Real;

    #[test]
    fn the_same_seed_gives_the_same_trace_and_another_seed_another() {
        let run = |seed| {
            let options = Options { ms: 3_000, nodes: Some(3), ..Options::of(seed) };
            let mut world = World::<Real>::new(options);
            let _ = world.run();
            world.trace.hash()
        };
        assert_eq!(run(4), run(4));
        assert_ne!(run(4), run(5));
    }
}
