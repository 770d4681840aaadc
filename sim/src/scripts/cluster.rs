//! The cluster that a script drives: three processes with their disks, and every message under way, in the order of sending.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use aviary_core::domain::ids::{Incarnation, NodeId, ServiceId};
use aviary_core::domain::time::{Mono, Now, Wall};
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Decision, Message};
use aviary_core::protocol::record::{AcceptorState, Chosen};
use aviary_core::protocol::{Event, Input, Output, Retention, Timings, View};

use super::words;
use crate::invariants::{self, Invariant};
use crate::subject::{Setup, Subject};
use crate::truth::{Fact, Served, Truth};
use crate::world::{first_acceptor, genesis_of, name};

/// What time it is when the script begins, in microseconds of every node's clock.
const BEGIN_US: u64 = 1_000_000;
/// Between two ticks while time passes.
const TICK_US: u64 = 20_000;

/// A running core, with its incarnation, its lease and its view.
pub struct ScriptProcess<S> {
    core: S,
    incarnation: Incarnation,
    /// View that it published last; none before the first.
    pub view: Option<Arc<View>>,
    lease: Option<Mono>,
}

/// A node: what outlives its process, and the process while it runs.
pub struct ScriptNode<S> {
    /// Its promises; none once they are lost.
    pub acceptor: Option<AcceptorState>,
    /// Records that its disk holds, genesis first.
    pub log: Vec<Chosen>,
    /// None while it is down.
    pub process: Option<ScriptProcess<S>>,
    /// It dies instead of the next output whose line begins so.
    pub dies_before: Option<String>,
}

/// Three nodes and what is between them.
pub struct ScriptCluster<S> {
    /// All of them by their names.
    pub nodes: BTreeMap<NodeId, ScriptNode<S>>,
    wire: VecDeque<(NodeId, NodeId, Incarnation, Message)>,
    /// Links that lose what is sent.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    /// Links that keep what is sent until it is delivered by name.
    pub held: BTreeSet<(NodeId, NodeId)>,
    now_us: u64,
    truth: Truth,
    invariants: Vec<Box<dyn Invariant>>,
    /// What happened since it was taken, a line each.
    pub story: Vec<String>,
    /// What answers are told by: transactions by their requests.
    pub asked: BTreeMap<u64, String>,
    /// A rule is broken: nothing more happens.
    pub over: bool,
    fresh: u64,
}

impl<S: Subject> ScriptCluster<S> {
    /// Returns a cluster that has run for long enough to have a coordinator, a, and leases everywhere.
    pub fn new() -> Self {
        let (genesis, members) = genesis_of(3);
        let node = |i: usize| {
            let acceptor = Some(first_acceptor(i, &genesis));
            (name(i), ScriptNode { acceptor, log: vec![genesis.clone()], process: None, dies_before: None })
        };
        let mut cluster = Self {
            nodes: (0..3).map(node).collect(),
            wire: VecDeque::new(),
            cut: BTreeSet::new(),
            held: BTreeSet::new(),
            now_us: BEGIN_US,
            truth: Truth::new(genesis.record.clone(), members),
            invariants: invariants::all(),
            story: Vec::new(),
            asked: BTreeMap::new(),
            over: false,
            fresh: 100,
        };
        (0..3).map(name).for_each(|node| cluster.start(&node));
        cluster.run_for(600);
        cluster.story.clear();
        cluster
    }

    fn now(&self) -> Now {
        Now { mono: Mono(self.now_us), wall: Wall(self.now_us / 1000) }
    }

    /// Starts a process on what the node's disk holds.
    pub fn start(&mut self, id: &NodeId) {
        self.fresh += 1;
        let fresh_incarnation = Incarnation(self.fresh);
        let setup = Setup {
            node: id.clone(),
            cluster: aviary_core::domain::ids::ClusterId([7; 16]),
            timings: Timings::default(),
            seed: 1,
            fresh_incarnation,
            retention: Retention::default(),
            peers: (0..3).map(name).collect(),
            runs: BTreeMap::new(),
        };
        let now = self.now();
        let node = self.nodes.get_mut(id).expect("one of the three");
        node.dies_before = None;
        let incarnation = node.acceptor.as_ref().map_or(fresh_incarnation, |acceptor| acceptor.incarnation);
        let (acceptor, log) = (node.acceptor.clone(), node.log.clone());
        let ledger = Ledger::new(&log[0]).expect("a log begins with its genesis");
        self.fact(&Fact::Started(id, &log));
        let Some((core, outputs)) = self.guarded(|| S::start(setup, acceptor, ledger, &log[1..], now)) else { return };
        let process = ScriptProcess { core, incarnation, view: None, lease: None };
        self.nodes.get_mut(id).expect("one of the three").process = Some(process);
        self.carry_out(id, outputs);
    }

    /// Ends a process; what is under way to it is lost.
    pub fn crash(&mut self, id: &NodeId) {
        self.nodes.get_mut(id).expect("one of the three").process = None;
        self.wire.retain(|(_, to, ..)| to != id);
    }

    /// Hands one input to a process that runs.
    pub fn give(&mut self, id: &NodeId, input: Input) {
        let now = self.now();
        let Some(mut process) = self.nodes.get_mut(id).and_then(|node| node.process.take()) else { return };
        let outputs = self.guarded(|| process.core.handle(now, input));
        self.nodes.get_mut(id).expect("one of the three").process = Some(process);
        self.carry_out(id, outputs.unwrap_or_default());
        self.look();
    }

    fn guarded<T>(&mut self, operation: impl FnOnce() -> T) -> Option<T> {
        if self.over {
            return None;
        }
        let result = catch_unwind(AssertUnwindSafe(operation));
        if let Err(cause) = &result {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(ToString::to_string));
            self.story.push(format!("PANIC {}", text.unwrap_or_default()));
            self.over = true;
        }
        result.ok()
    }

    /// Lets every invariant look at what happened.
    pub fn fact(&mut self, fact: &Fact) {
        for invariant in &mut self.invariants {
            if let (false, Err(violation)) = (self.over, invariant.see(fact, &self.truth)) {
                self.story.push(format!("VIOLATION {violation}"));
                self.over = true;
            }
        }
    }

    fn carry_out(&mut self, id: &NodeId, outputs: Vec<Output>) {
        for output in outputs {
            let line = match &output {
                Output::Reply(request, outcome) => {
                    let tx = self.asked.get(&request.0).map_or("?", String::as_str);
                    Some(format!("answers {tx}: {}", words::outcome(outcome)))
                }
                output => words::told(output),
            };
            let node = self.nodes.get_mut(id).expect("one of the three");
            if let (Some(line), Some(moment)) = (&line, &node.dies_before)
                && line.starts_with(moment.as_str())
            {
                self.story.push(format!("{id} dies before it {moment}"));
                return self.crash(id);
            }
            self.story.extend(line.map(|line| format!("{id} {line}")));
            self.carry_out_one(id, output);
            if self.over {
                return;
            }
        }
    }

    fn carry_out_one(&mut self, id: &NodeId, output: Output) {
        match output {
            Output::Persist(acceptor) => self.persist(id, &acceptor),
            Output::Append(chosen) => {
                self.fact(&Fact::Appended(id, &chosen));
                self.nodes.get_mut(id).expect("one of the three").log.push(*chosen);
            }
            Output::Send { to, message } => self.send(id, to, *message),
            Output::SendLog { to, from, through } => {
                let log = &self.nodes[id].log;
                let kept: Vec<_> = log.iter().filter(|c| (from..=through).contains(&c.record.slot)).cloned().collect();
                for chosen in kept {
                    self.send(id, to.clone(), Message::Decision(Decision::CatchUp(Box::new(chosen))));
                }
            }
            Output::Publish(view) => self.process(id).view = Some(view),
            Output::Lease(from) => self.process(id).lease = from,
            Output::Reply(request, outcome) => self.fact(&Fact::Replied(request, &outcome)),
            Output::Announce(Event::LocalHold { service, .. }) => self.fact(&Fact::LocalHold(id, &service)),
            Output::Announce(_) | Output::SaveRun(..) => {}
            Output::Checkpoint { .. } | Output::Install(_) => panic!("a script is too short for checkpoints"),
        }
    }

    fn process(&mut self, id: &NodeId) -> &mut ScriptProcess<S> {
        self.nodes.get_mut(id).and_then(|node| node.process.as_mut()).expect("it acts")
    }

    fn persist(&mut self, id: &NodeId, acceptor: &AcceptorState) {
        self.nodes.get_mut(id).expect("one of the three").acceptor = Some(acceptor.clone());
        let chosen = match self.truth.persisted(id, acceptor) {
            Ok(chosen) => chosen,
            Err(what) => {
                self.story.push(format!("VIOLATION I1 agreement: {what}"));
                self.over = true;
                return;
            }
        };
        self.fact(&Fact::Persisted(id, acceptor));
        if let Some((record, ballot)) = chosen {
            self.fact(&Fact::Chosen(&record, &ballot));
        }
    }

    fn send(&mut self, from: &NodeId, to: NodeId, message: Message) {
        let incarnation = self.process(from).incarnation;
        self.fact(&Fact::Sent(from, incarnation, &message));
        let link = (from.clone(), to);
        if !self.cut.contains(&link) && self.nodes[&link.1].process.is_some() {
            self.wire.push_back((link.0, link.1, incarnation, message));
        }
    }

    /// Delivers what is on a link, in order, up to its next message that has a line. Returns that line.
    pub fn deliver(&mut self, from: &NodeId, to: &NodeId) -> Option<String> {
        while let Some(at) = self.wire.iter().position(|(sender, receiver, ..)| sender == from && receiver == to) {
            let line = words::said(&self.wire[at].3);
            self.deliver_at(at);
            if line.is_some() {
                return line;
            }
        }
        None
    }

    /// Loses all that is on a link.
    pub fn lose(&mut self, from: &NodeId, to: &NodeId) {
        self.wire.retain(|(sender, receiver, ..)| sender != from || receiver != to);
    }

    fn deliver_at(&mut self, at: usize) {
        let Some((from, to, incarnation, message)) = self.wire.remove(at) else { return };
        self.give(&to, Input::Received { from, incarnation, message: Box::new(message) });
    }

    /// Delivers everything on links that aren't held, in order, until nothing is under way.
    pub fn settle(&mut self) {
        let free = |cluster: &Self| {
            let held = |from: &NodeId, to: &NodeId| cluster.held.contains(&(from.clone(), to.clone()));
            cluster.wire.iter().position(|(from, to, ..)| !held(from, to))
        };
        while let (false, Some(at)) = (self.over, free(self)) {
            self.deliver_at(at);
        }
    }

    /// Lets time pass, with ticks and everything delivered at once.
    pub fn run_for(&mut self, ms: u64) {
        let end = self.now_us + ms * 1000;
        while self.now_us < end && !self.over {
            self.now_us += TICK_US;
            self.truth.now = self.now_us - BEGIN_US;
            for id in (0..3).map(name) {
                self.give(&id, Input::Tick);
            }
            self.settle();
        }
    }

    /// Returns a node's share for a canary at this moment, in basis points.
    pub fn share(&self, id: &NodeId, service: &ServiceId) -> u16 {
        let Some(process) = &self.nodes[id].process else { return 0 };
        let shown = process.view.as_ref().and_then(|view| view.services.get(service));
        let Some((serving, (_, bp))) = shown.and_then(|s| Some((&s.serving, s.serving.canary.as_ref()?))) else {
            return 0;
        };
        let leased = |ms| process.lease.is_some_and(|from| Mono(self.now_us) < from.after_ms(ms));
        if serving.lease_ms.is_none_or(leased) { *bp } else { 0 }
    }

    /// Lets the invariants look at what every node serves.
    fn look(&mut self) {
        for id in (0..3).map(name) {
            let view = self.nodes[&id].process.as_ref().and_then(|process| process.view.clone());
            for (service, shown) in view.iter().flat_map(|view| view.services.iter()) {
                let Some((canary, _)) = &shown.serving.canary else { continue };
                let served = Served {
                    node: &id,
                    service,
                    canary: &canary.version,
                    slot: shown.slot,
                    bp: self.share(&id, service),
                    is_writing: false,
                    leased: shown.serving.lease_ms.is_some(),
                    on_partition: shown.serving.spec.on_partition,
                };
                self.fact(&Fact::Served(served));
            }
        }
    }
}
