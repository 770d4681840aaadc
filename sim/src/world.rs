//! The simulated world: nodes with disks and clocks, a network between them, people, traffic and misfortune.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use aviary::domain::analysis::Analysis;
use aviary::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary::domain::plan::{Backend, OnPartition, RolloutSpec, Stage};
use aviary::domain::rollout::{Phase, Service};
use aviary::domain::stats::Stats;
use aviary::domain::time::{Mono, Now, Wall};
use aviary::domain::weights::Weight;
use aviary::domain::window::Evidence;
use aviary::protocol::checkpoint::Checkpoint;
use aviary::protocol::ledger::Ledger;
use aviary::protocol::message::{Decision, Message};
use aviary::protocol::record::{Act, Chosen, ConfigChange, Intent, Member, Membership, Record, Register, Slot};
use aviary::protocol::{
    Command, Event, Input, Observation, Op, Outcome, Output, RequestId, Retention, Timings, View, codec,
};

use crate::dice::Dice;
use crate::invariants::{self, Invariant};
use crate::subject::{Setup, Subject};
use crate::trace::Trace;
use crate::truth::{Fact, Served, Truth};

/// A broken rule.
#[derive(Debug)]
pub struct Violation {
    /// Which.
    pub invariant: &'static str,
    /// How.
    pub what: String,
}

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Length of the faulty part, in virtual milliseconds.
    pub ms: u64,
    /// Nodes; drawn from the seed when none.
    pub nodes: Option<usize>,
    /// Keep the trace's words.
    pub words: bool,
    /// Print them.
    pub print: bool,
}

/// What a run came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct Summary {
    /// Hash of everything that happened.
    pub hash: u64,
    /// Virtual microseconds.
    pub us: u64,
    /// Chosen slots.
    pub slots: u64,
    /// Chosen raises.
    pub raises: u64,
    /// Crashes.
    pub crashes: u64,
    /// Wiped disks.
    pub wipes: u64,
    /// Checkpoints taken over from a peer.
    pub installs: u64,
    /// Chosen unarmed.
    pub unarmed: u64,
    /// Steps with canary traffic.
    pub exposed: u64,
}

enum Happening {
    Tick(usize, u64),
    Deliver(usize, NodeId, Incarnation, Box<Message>),
    Refused(usize, NodeId),
    Written(usize, u64),
    Telemetry,
    Operator,
    Fault,
    Restart(usize),
    Continue(usize, u64),
    Heal(u64),
}

struct Entry(u64, u64, Happening);
impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// How bad the world is: drawn for each seed, so that seeds differ in kind and not only in detail.
struct Mix {
    drop_bp: u64,
    twice_bp: u64,
    delay_us_max: u64,
    write_us_max: u64,
    fault_us: u64,
    /// crash, crash mid-list, pause, wipe, cut in two, one way, wall jump, all crash, false reset, mood.
    faults: [u64; 10],
    operator_us: u64,
    tick_us: u64,
}

impl Mix {
    fn draw(dice: &mut Dice) -> Self {
        let mut faults = [0; 10];
        for weight in &mut faults {
            *weight = if dice.chance(6_000) { dice.between(1, 10) } else { 0 };
        }
        faults[9] = 6;
        faults[3] = faults[3].min(4);
        Self {
            drop_bp: *dice.pick(&[0, 0, 10, 200, 1_000, 2_500]),
            twice_bp: *dice.pick(&[0, 50, 500, 2_000]),
            delay_us_max: *dice.pick(&[1_000, 5_000, 20_000, 200_000]),
            write_us_max: *dice.pick(&[0, 1_000, 10_000, 60_000]),
            fault_us: *dice.pick(&[150_000, 500_000, 1_500_000, 4_000_000]),
            faults,
            operator_us: *dice.pick(&[100_000, 300_000, 1_000_000]),
            tick_us: dice.between(5_000, 25_000),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mood {
    Healthy,
    Errors,
    Slow,
    AllFail,
    Silent,
    OneNode(usize),
}

struct Process<S> {
    core: S,
    incarnation: Incarnation,
    view: Option<Arc<View>>,
    lease: Option<Mono>,
    pending: VecDeque<Output>,
    writing: Option<Box<Register>>,
    inbox: VecDeque<Input>,
    paused: bool,
}

struct Node<S> {
    id: NodeId,
    register: Option<Register>,
    /// The whole log as this node would have it, also what it keeps only the sum of.
    log: Vec<Chosen>,
    /// The sum it starts from.
    checkpoint: Option<Checkpoint>,
    /// The first slot whose record it can still read.
    first: usize,
    durable: usize,
    process: Option<Process<S>>,
    epoch: u64,
    mono_base: u64,
    mono_from: u64,
    ppm: i64,
    wall: u64,
    crash_after: Option<u64>,
    damaged: bool,
}

impl<S> Node<S> {
    fn now(&self, at: u64) -> Now {
        node_now(self.mono_base, self.mono_from, self.ppm, self.wall, at)
    }

    /// What the data plane would serve: `node::handle::Published::effective_bp`.
    fn effective_bp(&self, at: u64, serving: &aviary::protocol::Serving) -> u16 {
        let Some((_, bp)) = &serving.canary else { return 0 };
        let Some(process) = &self.process else { return 0 };
        match (serving.lease_ms, process.lease) {
            (None, _) => *bp,
            (Some(lease_ms), Some(from)) if self.now(at).mono < from.after_ms(lease_ms) => *bp,
            (Some(_), _) => 0,
        }
    }
}

/// Returns the genesis of a cluster of this many nodes, and its members.
pub fn genesis_of(nodes: usize) -> (Chosen, Membership) {
    let member = |i: usize| (name(i), Member { incarnation: Incarnation(i as u64 + 1), benched: false });
    let members = Membership((0..nodes).map(member).collect());
    let act = Act::Genesis { cluster: ClusterId([7; 16]), members: members.clone() };
    let intent = Intent { tx: TxId::new("genesis").expect("a valid name"), digest: 0, at: Wall(0), act };
    let record = Record { slot: Slot(0), prev_hash: Default::default(), intent, state: None, certificate: None };
    (Chosen { ballot: None, record }, members)
}

fn name(index: usize) -> NodeId {
    NodeId::new(char::from(b'a' + index as u8).to_string()).expect("a valid name")
}

/// One run.
pub struct World<S> {
    options: Options,
    dice: Dice,
    mix: Mix,
    timings: Timings,
    retention: Retention,
    now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    nodes: Vec<Node<S>>,
    cut: BTreeSet<(usize, usize)>,
    cut_number: u64,
    truth: Truth,
    invariants: Vec<Box<dyn Invariant>>,
    /// What happened.
    pub trace: Trace,
    services: Vec<ServiceId>,
    moods: Vec<Mood>,
    requests: u64,
    old: Vec<(TxId, Op)>,
    replies: BTreeMap<u64, Outcome>,
    calm: bool,
    summary: Summary,
}

type Step = Result<(), Violation>;

fn broken(invariant: &'static str, what: impl Into<String>) -> Violation {
    Violation { invariant, what: what.into() }
}

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
        let mix = Mix::draw(&mut dice);
        let (genesis, members) = genesis_of(count);
        let heartbeat_ms = dice.between(100, 240);
        let timings = Timings { heartbeat_ms, ..Timings::default() };
        let nodes = (0..count).map(|i| Self::node(i, &genesis, &mut dice)).collect();
        let services =
            (0..dice.between(1, 3)).map(|i| ServiceId::new(format!("s{i}")).expect("valid")).collect::<Vec<_>>();
        let moods = services.iter().map(|_| Mood::Healthy).collect();
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
            moods,
            requests: 0,
            old: Vec::new(),
            replies: BTreeMap::new(),
            calm: false,
            summary: Summary::default(),
            dice,
        }
    }

    fn node(index: usize, genesis: &Chosen, dice: &mut Dice) -> Node<S> {
        let register = Register {
            cluster: ClusterId([7; 16]),
            node: name(index),
            incarnation: Incarnation(index as u64 + 1),
            boot: 0,
            promised: None,
            accepted: None,
            head: Slot(0),
            head_hash: genesis.record.hash(),
        };
        Node {
            id: name(index),
            register: Some(register),
            log: vec![genesis.clone()],
            checkpoint: None,
            first: 0,
            durable: 1,
            process: None,
            epoch: 0,
            mono_base: dice.between(1_000_000, 1_000_000_000_000),
            mono_from: 0,
            ppm: dice.between(0, 20_000) as i64 - 10_000,
            wall: 1_790_000_000_000 + dice.between(0, 60_000),
            crash_after: None,
            damaged: false,
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
        self.queue.push(Reverse(Entry(self.now + after, self.sequence, happening)));
    }

    fn run_until(&mut self, end: u64) -> Step {
        while self.queue.peek().is_some_and(|Reverse(entry)| entry.0 <= end) {
            let Reverse(Entry(at, _, happening)) = self.queue.pop().expect("peeked");
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
            invariant.see(&fact, &self.truth).map_err(|what| Violation { invariant: invariant.name(), what })?;
        }
        Ok(())
    }

    /// Looks at what every node would serve.
    fn look(&mut self) -> Step {
        for node in &self.nodes {
            let Some(view) = node.process.as_ref().and_then(|process| process.view.as_ref()) else { continue };
            for (service, shown) in &view.services {
                let Some((canary, _)) = &shown.serving.canary else { continue };
                let bp = node.effective_bp(self.now, &shown.serving);
                self.summary.exposed += u64::from(bp > 0);
                let served = Served {
                    node: &node.id,
                    service,
                    canary: &canary.version,
                    bp,
                    leased: shown.serving.lease_ms.is_some(),
                    on_partition: shown.serving.spec.on_partition,
                };
                let fact = Fact::Served(served);
                for invariant in &mut self.invariants {
                    invariant
                        .see(&fact, &self.truth)
                        .map_err(|what| Violation { invariant: invariant.name(), what })?;
                }
            }
        }
        Ok(())
    }

    fn happen(&mut self, happening: Happening) -> Step {
        match happening {
            Happening::Tick(i, epoch) => {
                if self.nodes[i].epoch == epoch && self.nodes[i].process.is_some() {
                    let after = self.dice.between(self.mix.tick_us / 2, self.mix.tick_us);
                    self.plan(after, Happening::Tick(i, epoch));
                    let free = self.nodes[i].process.as_ref().is_some_and(|p| !p.paused && p.writing.is_none());
                    return if free { self.give(i, Input::Tick) } else { Ok(()) };
                }
                Ok(())
            }
            Happening::Deliver(to, from, incarnation, message) => {
                let at = self.now;
                let node = &self.nodes[to];
                self.trace.line(at, node.id.as_str(), "receives", || format!("from {from}: {}", brief(&message)));
                self.give(to, Input::Received { from, incarnation, message })
            }
            Happening::Refused(to, peer) => self.give(to, Input::Unreachable(peer)),
            Happening::Written(i, epoch) => {
                if self.nodes[i].epoch != epoch {
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
                self.misfortune()
            }
            Happening::Restart(i) => self.start(i),
            Happening::Continue(i, epoch) => {
                if self.nodes[i].epoch == epoch
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

    fn start(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_some() {
            return Ok(());
        }
        let fresh_incarnation = Incarnation(self.dice.any() | 1 << 63);
        let seed = self.dice.any();
        let reboots = self.dice.chance(2_000);
        if reboots {
            self.nodes[i].mono_base = self.dice.between(1_000_000, 1_000_000_000);
            self.nodes[i].mono_from = self.now;
        }
        let at = self.now;
        let node = &mut self.nodes[i];
        node.epoch += 1;
        node.crash_after = None;
        let setup = Setup {
            node: node.id.clone(),
            cluster: ClusterId([7; 16]),
            timings: self.timings,
            seed,
            fresh_incarnation,
            retention: self.retention,
        };
        let incarnation = node.register.as_ref().map_or(fresh_incarnation, |register| register.incarnation);
        let (register, log, now) = (node.register.clone(), node.log.clone(), node.now(at));
        let checkpoint = node.checkpoint.clone();
        self.trace.line(at, node.id.as_str(), "starts", || {
            let known = register
                .as_ref()
                .map(|r| format!("promised {:?} head {}", r.promised.as_ref().map(|b| b.to_string()), r.head));
            format!("{} records, register {known:?}", log.len())
        });
        let (core, outputs) = guarded(|| {
            let ledger = match &checkpoint {
                Some(checkpoint) => checkpoint.ledger().expect("a checkpoint that was kept"),
                None => Ledger::new(&log[0]).expect("a log begins with its genesis"),
            };
            let after = ledger.head.0 as usize + 1;
            S::start(setup, register, ledger, &log[after..], now)
        })?;
        node.process = Some(Process {
            core,
            incarnation,
            view: None,
            lease: None,
            pending: outputs.into(),
            writing: None,
            inbox: VecDeque::new(),
            paused: false,
        });
        let (id, epoch) = (node.id.clone(), node.epoch);
        self.fact(Fact::Started(&id, &log))?;
        self.plan(1_000, Happening::Tick(i, epoch));
        self.carry_out(i)
    }

    fn give(&mut self, i: usize, input: Input) -> Step {
        let Some(process) = &mut self.nodes[i].process else { return Ok(()) };
        if process.inbox.len() < 2_000 {
            process.inbox.push_back(input);
        }
        self.carry_out(i)
    }

    /// Carries out what is pending, then hands over what waits, until the node is busy, stopped or idle.
    fn carry_out(&mut self, i: usize) -> Step {
        loop {
            let at = self.now;
            let node = &mut self.nodes[i];
            let Some(process) = &mut node.process else { return Ok(()) };
            if process.paused || process.writing.is_some() {
                return Ok(());
            }
            if let Some(output) = process.pending.pop_front() {
                match &mut node.crash_after {
                    Some(0) => {
                        self.crash(i)?;
                        return Ok(());
                    }
                    Some(left) => *left -= 1,
                    None => {}
                }
                self.carry_out_one(i, output)?;
                continue;
            }
            let Some(input) = process.inbox.pop_front() else { return Ok(()) };
            let clock = node_now(node.mono_base, node.mono_from, node.ppm, node.wall, at);
            let core = &mut process.core;
            process.pending = guarded(|| core.handle(clock, input))?.into();
        }
    }

    fn carry_out_one(&mut self, i: usize, output: Output) -> Step {
        let at = self.now;
        let id = self.nodes[i].id.clone();
        match output {
            Output::Persist(register) => {
                let slow = self.dice.between(0, self.mix.write_us_max);
                let epoch = self.nodes[i].epoch;
                let process = self.nodes[i].process.as_mut().expect("it acts");
                process.writing = Some(register);
                if slow == 0 || self.calm {
                    return self.written(i);
                }
                self.plan(slow, Happening::Written(i, epoch));
            }
            Output::Append(chosen) => {
                self.trace.line(at, id.as_str(), "appends", || {
                    format!(
                        "slot {} {} in {:?}",
                        chosen.record.slot,
                        chosen.record.intent.act.name(),
                        chosen.ballot.as_ref().map(|b| b.to_string())
                    )
                });
                self.fact(Fact::Appended(&id, &chosen))?;
                self.nodes[i].log.push(*chosen);
            }
            Output::Send { to, message } => self.send(i, &to, *message)?,
            Output::Checkpoint { checkpoint, keep_from } => {
                self.trace.line(at, id.as_str(), "sums up", || format!("slot {}", checkpoint.slot));
                let node = &mut self.nodes[i];
                (node.checkpoint, node.first) = (Some(checkpoint), keep_from.0 as usize);
                node.durable = node.log.len();
            }
            Output::Install(checkpoint) => self.install(i, checkpoint)?,
            Output::SendLog { to, from, .. } if (from.0 as usize) < self.nodes[i].first => {
                let parts = self.nodes[i].checkpoint.as_ref().map(Checkpoint::parts).unwrap_or_default();
                for part in parts {
                    self.send(i, &to, Message::Decision(Decision::Checkpoint(part)))?;
                }
            }
            Output::SendLog { to, from, through } => {
                let most = from.0 + 64;
                let records = self.nodes[i]
                    .log
                    .iter()
                    .filter(|c| c.record.slot >= from && c.record.slot <= through && c.record.slot.0 < most);
                for chosen in records.cloned().collect::<Vec<_>>() {
                    self.send(i, &to, Message::Decision(Decision::CatchUp(Box::new(chosen))))?;
                }
            }
            Output::Publish(view) => {
                self.nodes[i].process.as_mut().expect("it acts").view = Some(view);
            }
            Output::Lease(from) => {
                self.nodes[i].process.as_mut().expect("it acts").lease = from;
            }
            Output::Reply(request, outcome) => {
                self.trace.line(at, id.as_str(), "answers", || format!("{} {outcome:?}", request.0));
                self.trace.fold(request.0);
                self.fact(Fact::Replied(request, &outcome))?;
                self.replies.insert(request.0, outcome);
            }
            Output::Announce(event) => {
                self.trace.line(at, id.as_str(), "announces", || format!("{event:?}"));
                if let Event::Braked { service, .. } = &event {
                    self.fact(Fact::Braked(&id, service))?;
                }
            }
        }
        Ok(())
    }

    /// Takes a peer's checkpoint for what was really decided: it must sum that up.
    fn install(&mut self, i: usize, checkpoint: Checkpoint) -> Step {
        let id = self.nodes[i].id.clone();
        self.trace.line(self.now, id.as_str(), "installs", || format!("slot {}", checkpoint.slot));
        let ledger = checkpoint.ledger().expect("the core checked it");
        let decided = self.truth.chosen(checkpoint.slot).map(|known| known.hash);
        if decided != Some(ledger.head_hash) {
            let what = format!("{id} installs a sum of slot {} that ends in {}", checkpoint.slot, ledger.head_hash);
            return Err(broken("I2 chain", what));
        }
        for slot in self.nodes[i].log.len()..=checkpoint.slot.0 as usize {
            let known = &self.truth.log[slot];
            let voted = known.record.certificate.as_ref().map(|certificate| &certificate.ballot);
            let ballot = voted.filter(|ballot| known.ballots.contains(ballot)).or(known.ballots.first()).cloned();
            let chosen = Chosen { ballot, record: known.record.clone() };
            self.fact(Fact::Appended(&id, &chosen))?;
            self.nodes[i].log.push(chosen);
        }
        let node = &mut self.nodes[i];
        node.first = node.log.len();
        node.durable = node.log.len();
        node.checkpoint = Some(checkpoint);
        self.summary.installs += 1;
        Ok(())
    }

    fn written(&mut self, i: usize) -> Step {
        let node = &mut self.nodes[i];
        let Some(register) = node.process.as_mut().and_then(|process| process.writing.take()) else { return Ok(()) };
        node.register = Some((*register).clone());
        node.durable = node.log.len();
        let id = node.id.clone();
        self.trace.fold_bytes(&codec::encode(&*register));
        self.trace.line(self.now, id.as_str(), "persists", || {
            let accepted = register
                .accepted
                .as_ref()
                .map(|a| format!("{} slot {} {}", a.ballot, a.record.slot, a.record.intent.act.name()));
            format!(
                "promised {:?} accepted {accepted:?} head {}",
                register.promised.as_ref().map(|b| b.to_string()),
                register.head
            )
        });
        let chosen = self.truth.persisted(&id, &register).map_err(|what| broken("I1 agreement", what))?;
        self.fact(Fact::Persisted(&id, &register))?;
        if let Some((record, ballot)) = chosen {
            let known = self.truth.chosen(record.slot).expect("just chosen");
            self.summary.raises += u64::from(record.intent.act.raises_exposure());
            self.summary.unarmed += u64::from(!known.armed);
            self.trace.line(self.now, "*", "chosen", || {
                format!("slot {} {} {} in {ballot}", record.slot, record.intent.act.name(), record.intent.tx)
            });
            self.fact(Fact::Chosen(&record, &ballot))?;
        }
        Ok(())
    }

    fn send(&mut self, i: usize, to: &NodeId, message: Message) -> Step {
        let at = self.now;
        let from = self.nodes[i].id.clone();
        let incarnation = self.nodes[i].process.as_ref().expect("it acts").incarnation;
        let bytes = codec::encode(&message);
        self.trace.fold_bytes(&bytes);
        self.trace.line(at, from.as_str(), "sends", || format!("to {to}: {}", brief(&message)));
        self.fact(Fact::Sent(&from, incarnation, &message))?;
        let Some(target) = self.nodes.iter().position(|node| node.id == *to) else {
            return Err(broken("network", format!("{from} sends to {to}, who doesn't exist")));
        };
        if self.cut.contains(&(i, target)) {
            return Ok(());
        }
        if self.nodes[target].process.is_none() {
            if self.dice.chance(3_000) {
                self.plan(1_000, Happening::Refused(i, to.clone()));
            }
            return Ok(());
        }
        if self.calm {
            let delay = self.dice.between(100, 5_000);
            self.plan(delay, Happening::Deliver(target, from, incarnation, Box::new(message)));
            return Ok(());
        }
        if self.dice.chance(self.mix.drop_bp) {
            return Ok(());
        }
        let copies = 1 + u64::from(self.dice.chance(self.mix.twice_bp));
        for copy in 0..copies {
            let most = if copy > 0 { self.mix.delay_us_max * 5 } else { self.mix.delay_us_max };
            let delay = self.dice.between(100, most);
            self.plan(delay, Happening::Deliver(target, from.clone(), incarnation, Box::new(message.clone())));
        }
        Ok(())
    }

    fn crash(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_none() {
            return Ok(());
        }
        self.trace.line(self.now, self.nodes[i].id.as_str(), "crashes", String::new);
        self.summary.crashes += 1;
        if self.dice.chance(5_000) {
            self.written(i)?;
        }
        let node = &mut self.nodes[i];
        let extra = (node.log.len() - node.durable) as u64;
        let survives = node.durable + self.dice.between(0, extra) as usize;
        node.log.truncate(survives);
        node.durable = survives;
        node.process = None;
        node.epoch += 1;
        let after = *self.dice.pick(&[10_000, 200_000, 1_000_000, 4_000_000]);
        let after = self.dice.between(1_000, after);
        self.plan(after, Happening::Restart(i));
        Ok(())
    }

    fn wipe(&mut self, i: usize) -> Step {
        self.mend();
        let damaged = self.nodes.iter().enumerate().filter(|(j, node)| *j == i || node.damaged).count();
        if damaged > (self.nodes.len() - 1) / 2 {
            return Ok(());
        }
        self.crash(i)?;
        let keeps_log = self.dice.chance(3_000);
        let node = &mut self.nodes[i];
        node.damaged = true;
        node.register = None;
        if !keeps_log {
            node.log.truncate(1);
            (node.checkpoint, node.first) = (None, 0);
            node.durable = 1;
        }
        self.summary.wipes += 1;
        self.trace.line(self.now, self.nodes[i].id.as_str(), "wiped", || format!("keeps its log: {keeps_log}"));
        Ok(())
    }

    /// Forgets the damage of nodes that have everything again and whose votes count.
    fn mend(&mut self) {
        let (members, head) = (self.truth.membership().clone(), self.truth.log.len());
        for node in &mut self.nodes {
            let bound = node.register.as_ref().is_some_and(|register| members.counts(&node.id, register.incarnation));
            node.damaged &= !(bound && node.durable >= head);
        }
    }

    fn misfortune(&mut self) -> Step {
        let kind = self.dice.weighted(&self.mix.faults);
        let count = self.nodes.len();
        let i = self.dice.below(count);
        match kind {
            0 => self.crash(i)?,
            1 => self.nodes[i].crash_after = Some(self.dice.between(0, 6)),
            2 => {
                let epoch = self.nodes[i].epoch;
                if let Some(process) = &mut self.nodes[i].process {
                    process.paused = true;
                    self.trace.line(self.now, self.nodes[i].id.as_str(), "stopped", String::new);
                    let after = self.dice.between(10_000, 4_000_000);
                    self.plan(after, Happening::Continue(i, epoch));
                }
            }
            3 => self.wipe(i)?,
            4 | 5 => {
                self.cut.clear();
                let side: Vec<bool> = (0..count).map(|_| self.dice.chance(5_000)).collect();
                for from in 0..count {
                    for to in 0..count {
                        if from != to && side[from] != side[to] && (kind == 4 || side[from]) {
                            self.cut.insert((from, to));
                        }
                    }
                }
                self.cut_number += 1;
                let number = self.cut_number;
                self.trace.line(self.now, "*", "cut", || format!("{side:?} one way: {}", kind == 5));
                let after = self.dice.between(50_000, 6_000_000);
                self.plan(after, Happening::Heal(number));
            }
            6 => {
                self.nodes[i].wall =
                    self.nodes[i].wall.saturating_add(self.dice.between(0, 7_200_000)).saturating_sub(3_600_000)
            }
            7 => {
                for j in 0..count {
                    if self.dice.chance(7_000) {
                        self.crash(j)?;
                    }
                }
            }
            8 => {
                let peer = name(self.dice.below(count));
                if peer != self.nodes[i].id {
                    self.give(i, Input::Unreachable(peer))?;
                }
            }
            _ => {
                let service = self.dice.below(self.services.len());
                let moods = [
                    Mood::Healthy,
                    Mood::Healthy,
                    Mood::Healthy,
                    Mood::Errors,
                    Mood::Slow,
                    Mood::AllFail,
                    Mood::Silent,
                    Mood::OneNode(i),
                ];
                self.moods[service] = *self.dice.pick(&moods);
                self.trace.line(self.now, "*", "mood", || format!("s{service} {:?}", self.moods[service]));
            }
        }
        Ok(())
    }

    fn telemetry(&mut self) -> Step {
        self.plan(100_000, Happening::Telemetry);
        for i in 0..self.nodes.len() {
            let Some(view) = self.nodes[i].process.as_ref().filter(|p| !p.paused).and_then(|p| p.view.clone()) else {
                continue;
            };
            let mut observations = Vec::new();
            for (service, shown) in &view.services {
                let index = self.services.iter().position(|s| s == service).unwrap_or(0);
                let mood = self.moods[index];
                if mood == Mood::Silent {
                    continue;
                }
                let bp = u64::from(self.nodes[i].effective_bp(self.now, &shown.serving));
                let mut evidence = Evidence::default();
                for _ in 0..self.dice.between(10, 30) {
                    let canary = self.dice.chance(bp);
                    let bad = match mood {
                        Mood::Errors => canary,
                        Mood::OneNode(node) => canary && node == i,
                        Mood::AllFail => true,
                        _ => false,
                    };
                    let latency_us = if canary && mood == Mood::Slow { 900_000 } else { 5_000 };
                    let stats: &mut Stats = if canary { &mut evidence.canary } else { &mut evidence.stable };
                    stats.record(latency_us, bad);
                }
                observations.push(Observation {
                    service: service.clone(),
                    routing_version: shown.serving.routing_version,
                    evidence,
                });
            }
            if !observations.is_empty() {
                self.give(i, Input::Telemetry(observations))?;
            }
        }
        Ok(())
    }

    fn spec(&mut self, service: &ServiceId, stable: &VersionId, short: bool) -> Arc<RolloutSpec> {
        let backend = |version: &str| Backend { version: VersionId::new(version).expect("valid"), urls: vec![] };
        let choices: Vec<&str> = ["v1", "v2", "v3"].into_iter().filter(|v| *v != stable.as_str()).collect();
        let canary = backend(choices[self.dice.below(choices.len())]);
        let count = if short { 2 } else { self.dice.between(2, 4) };
        let mut bp = 0;
        let mut stages = Vec::new();
        for n in 1..=count {
            bp =
                if n == count { 10_000 } else { bp + self.dice.between(if short { 1_500 } else { 100 }, 3_000) as u16 };
            let hold_ms = if short { 200 } else { self.dice.between(200, 3_000) };
            let manual = !short && self.dice.chance(1_000);
            stages.push(Stage { weight: Weight::from_bp(bp).expect("in range"), hold_ms, manual });
        }
        let analysis = Analysis {
            window_ms: self.dice.between(1_000, 3_000),
            min_samples: self.dice.between(3, 20),
            ..Analysis::default()
        };
        let hold = !short && self.dice.chance(1_000);
        let spec = RolloutSpec {
            service: service.clone(),
            stable: backend(stable.as_str()),
            canary,
            stages,
            bake_ms: if short { 200 } else { self.dice.between(0, 2_000) },
            hash_on: None,
            matches: vec![],
            analysis,
            lease_ms: self.dice.between(1_000, 3_000),
            on_partition: if hold { OnPartition::Hold } else { OnPartition::Stable },
            progress_deadline_ms: if short { 60_000 } else { self.dice.between(2_000, 30_000) },
        };
        Arc::new(spec.checked().expect("drawn within the rules"))
    }

    fn stable_of(&self, i: usize, service: &ServiceId) -> VersionId {
        let view = self.nodes[i].process.as_ref().and_then(|process| process.view.as_ref());
        let shown = view.and_then(|view| view.services.get(service));
        shown.map_or_else(|| VersionId::new("v1").expect("valid"), |shown| shown.service.stable.version.clone())
    }

    fn operate(&mut self) -> Step {
        let i = self.dice.below(self.nodes.len());
        if self.dice.chance(800) {
            return self.read(i);
        }
        if !self.old.is_empty() && self.dice.chance(1_500) {
            let (tx, op) = self.old[self.dice.below(self.old.len())].clone();
            return self.ask(i, tx, op).map(drop);
        }
        let service = self.services[self.dice.below(self.services.len())].clone();
        let reason = || "an operator's whim".to_string();
        let peer = name(self.dice.below(self.nodes.len()));
        let op = match self.dice.weighted(&[30, 15, 5, 6, 8, 8, 6, 5, 2, 4, 8]) {
            0 => {
                let stable = self.stable_of(i, &service);
                Op::Apply(self.spec(&service, &stable, false))
            }
            1 => Op::Promote { service, full: false },
            2 => Op::Promote { service, full: true },
            3 => Op::Pause { service, reason: reason() },
            4 => Op::Resume { service },
            5 => Op::Abort { service, reason: reason() },
            6 => Op::Retry { service },
            7 => Op::Undo { service },
            8 => Op::Config(ConfigChange::Bench(peer)),
            9 => Op::Config(ConfigChange::Unbench(peer)),
            _ => match self.unbound().first() {
                Some((node, incarnation)) => Op::Config(ConfigChange::Readmit(node.clone(), *incarnation)),
                None => return Ok(()),
            },
        };
        self.submit(i, op).map(drop)
    }

    /// Returns the running nodes whose votes don't count, with the incarnation to readmit.
    fn unbound(&self) -> Vec<(NodeId, Incarnation)> {
        let running = self
            .nodes
            .iter()
            .filter_map(|node| Some((node.id.clone(), node.process.as_ref()?.view.as_ref()?.incarnation)));
        running.filter(|(node, incarnation)| !self.truth.membership().counts(node, *incarnation)).collect()
    }

    fn submit(&mut self, i: usize, op: Op) -> Result<u64, Violation> {
        let tx = TxId::new(format!("t{}", self.requests)).expect("valid");
        self.old.push((tx.clone(), op.clone()));
        self.ask(i, tx, op)
    }

    fn ask(&mut self, i: usize, tx: TxId, op: Op) -> Result<u64, Violation> {
        if self.nodes[i].process.is_none() {
            return Ok(0);
        }
        self.requests += 1;
        let request = RequestId(self.requests);
        self.trace
            .line(self.now, self.nodes[i].id.as_str(), "asked", || format!("{} {tx} {}", request.0, brief_op(&op)));
        self.fact(Fact::Asked(request, tx.as_str(), &op))?;
        self.give(i, Input::Operator(Command { request, tx, op }))?;
        Ok(request.0)
    }

    fn read(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_none() {
            return Ok(());
        }
        self.requests += 1;
        let request = RequestId(self.requests);
        self.fact(Fact::Reads(request))?;
        self.give(i, Input::Read(request))
    }

    /// Heals everything; then the promised bounds must hold, and a rollout must complete.
    fn liveness(&mut self) -> Step {
        self.calm = true;
        self.cut.clear();
        self.cut_number += 1;
        self.moods.iter_mut().for_each(|mood| *mood = Mood::Healthy);
        self.trace.line(self.now, "*", "calm", String::new);
        for i in 0..self.nodes.len() {
            self.nodes[i].crash_after = None;
            if let Some(process) = &mut self.nodes[i].process {
                process.paused = false;
            }
            self.start(i)?;
            self.carry_out(i)?;
        }
        // Messages already under way may be late by five of the largest delays.
        let slack = self.mix.delay_us_max * 5 + self.mix.write_us_max;
        self.run_until(self.now + slack)?;
        self.within(4_500, "a healed cluster agrees and holds leases", |world| world.agree())?;
        // What people asked for before may wait in a queue for as long as this, and would meddle.
        self.run_until(self.now + 2_000_000)?;
        let mut tries = 0;
        while let Some((node, incarnation)) = self.unbound().first().cloned() {
            tries += 1;
            if tries > 3 * self.nodes.len() {
                return Err(broken(
                    "liveness",
                    format!("{node} can't be readmitted: {:?}", self.replies.last_key_value()),
                ));
            }
            let helper = self.voter();
            self.decide(helper, Op::Config(ConfigChange::Readmit(node, incarnation)))?;
        }
        let benched: Vec<NodeId> =
            self.truth.membership().0.iter().filter(|(_, m)| m.benched).map(|(n, _)| n.clone()).collect();
        for node in benched {
            self.decide(0, Op::Config(ConfigChange::Unbench(node)))?;
        }
        self.within(4_500, "readmitted nodes agree and hold leases", |world| world.agree())?;
        self.complete_a_rollout()
    }

    /// Returns a node whose vote counts.
    fn voter(&self) -> usize {
        let counts = |node: &Node<S>| {
            let register = node.register.as_ref();
            register.is_some_and(|register| self.truth.membership().counts(&node.id, register.incarnation))
        };
        self.nodes.iter().position(counts).unwrap_or(0)
    }

    fn complete_a_rollout(&mut self) -> Step {
        let service = self.services[0].clone();
        for _ in 0..6 {
            let i = self.dice.below(self.nodes.len());
            self.decide(i, Op::Abort { service: service.clone(), reason: "a fresh start".into() })?;
            self.within(4_500, "the abort is known everywhere", |world| world.agree())?;
            let stable = self.stable_of(i, &service);
            let spec = self.spec(&service, &stable, true);
            let request = self.decide(i, Op::Apply(spec.clone()))?;
            if !matches!(self.replies.get(&request), Some(Outcome::Committed { .. })) {
                continue;
            }
            let shown = |node: &Node<S>| {
                let view = node.process.as_ref()?.view.as_ref()?;
                view.services.get(&service).map(|shown| shown.service.clone())
            };
            let completed = |service: &Service| {
                service.stable.version == spec.canary.version && service.routing.canary_model_id.is_none()
            };
            // A duel may decide a start in doubt; it is reverted, and people start again.
            let reverted = |service: &Service| service.rollout.phase == Phase::RolledBack;
            self.within(20_000, "a healthy rollout completes", |world| {
                let mut all = world.nodes.iter().map(shown);
                all.clone().all(|s| s.as_ref().is_some_and(completed)) || all.any(|s| s.as_ref().is_some_and(reverted))
            })?;
            if self.nodes.iter().filter_map(shown).all(|service| completed(&service)) {
                return Ok(());
            }
        }
        Err(broken("liveness", format!("no rollout starts in 6 tries: {:?}", self.replies.last_key_value())))
    }

    fn agree(&self) -> bool {
        let head = self.truth.head();
        self.nodes.iter().all(|node| {
            let Some(process) = &node.process else { return false };
            let Some(view) = &process.view else { return false };
            let bound = self.truth.membership().counts(&node.id, view.incarnation);
            let leased = process.lease.is_some_and(|from| node.now(self.now).mono < from.after_ms(1_000));
            view.head == head && (leased || !bound)
        })
    }

    fn within(&mut self, ms: u64, what: &str, holds: impl Fn(&Self) -> bool) -> Step {
        let end = self.now + ms * 1000;
        while self.now < end {
            self.run_until(self.now + 10_000)?;
            if holds(self) {
                return Ok(());
            }
        }
        Err(broken("liveness", format!("not within {ms} ms: {what}")))
    }

    /// Asks and waits for an answer; every question must have one within the stated bound.
    fn decide(&mut self, i: usize, op: Op) -> Result<u64, Violation> {
        let words = brief_op(&op);
        let request = self.submit(i, op)?;
        self.within(3_500, &format!("an answer to {words}"), |world| world.replies.contains_key(&request))?;
        self.trace.line(self.now, "*", "answered", || format!("{words}: {:?}", self.replies.get(&request)));
        Ok(request)
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
            self.truth.membership()
        )];
        for node in &self.nodes {
            let register = node.register.as_ref().map(|r| {
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
                    let view =
                        p.view.as_ref().map(|v| format!("{:?} head {} coordinator {}", v.role, v.head, v.coordinator));
                    let left = p
                        .lease
                        .map(|from| self.nodes.first().map_or(0, |_| node.now(self.now).mono.millis_since(from)));
                    format!("paused {} inbox {} view {view:?} lease began {left:?} ms ago", p.paused, p.inbox.len())
                }
            };
            lines.push(format!(
                "{:<3}  log {} ({} durable) · {register:?} · {process}",
                node.id,
                node.log.len(),
                node.durable
            ));
        }
        lines
    }
}

fn node_now(base: u64, from: u64, ppm: i64, wall: u64, at: u64) -> Now {
    let ran = at - from;
    let skewed = (ran as i64 + ran as i64 * ppm / 1_000_000) as u64;
    Now { mono: Mono(base + skewed), wall: Wall(wall + at / 1000) }
}

fn guarded<T>(act: impl FnOnce() -> T) -> Result<T, Violation> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| text.to_string()));
        broken("panic", text.unwrap_or_default())
    })
}

fn brief_op(op: &Op) -> String {
    match op {
        Op::Apply(spec) => format!("Apply {} {} → {}", spec.service, spec.stable.version, spec.canary.version),
        other => format!("{other:?}"),
    }
}

fn brief(message: &Message) -> String {
    match message {
        Message::Prepare(p) => format!(
            "PREPARE {} slot {} {} {} recovery {}",
            p.ballot,
            p.slot,
            p.intent.act.name(),
            p.intent.tx,
            p.recovery
        ),
        Message::Vote(v) => format!("VOTE {} slot {} {:?}", v.ballot, v.slot, v.answer),
        Message::Decision(Decision::Propose(b, r)) => {
            format!("PROPOSE {b} slot {} {} {}", r.slot, r.intent.act.name(), r.intent.tx)
        }
        Message::Decision(Decision::Chosen(c)) => {
            format!("CHOSEN slot {} {}", c.record.slot, c.record.intent.act.name())
        }
        Message::Decision(Decision::Checkpoint(part)) => {
            format!("CHECKPOINT slot {} part {} of {}", part.slot, part.index, part.parts)
        }
        Message::Decision(Decision::CatchUp(c)) => {
            format!("CATCHUP slot {} {}", c.record.slot, c.record.intent.act.name())
        }
        Message::Heartbeat(h) => format!(
            "HEARTBEAT nonce {:?} ack {:?} head {} open {:?} unarmed {:?} {:?}",
            h.nonce,
            h.acknowledges,
            h.head,
            h.open.as_ref().map(|b| b.to_string()),
            h.unarmed,
            h.role
        ),
        Message::HealthSnapshot(h) => {
            format!("HEALTH v{} brake {:?} effective {} bp", h.routing_version, h.brake, h.effective_bp)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::Real;

    #[test]
    fn the_same_seed_gives_the_same_trace_and_another_seed_another() {
        let run = |seed| {
            let options = Options { seed, ms: 3_000, nodes: Some(3), words: false, print: false };
            let mut world = World::<Real>::new(options);
            let _ = world.run();
            world.trace.hash()
        };
        assert_eq!(run(4), run(4));
        assert_ne!(run(4), run(5));
    }
}
