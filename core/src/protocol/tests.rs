//! Stories of three cores, told as the whole list of what they put out; and many more by random delivery.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;

use super::Timings;
use super::log::checkpoint::Checkpoint;
use super::log::codec;
use super::log::ledger::Ledger;
use super::log::record::{
    Accepted, AcceptorState, Ballot, Chosen, ConfigChange, Initiator, Intent, Member, Members, Operation, Record,
    SavedRun, Slot,
};
use super::message::{Answer, Decision, GateVote, HealthSnapshot, Message, Refusal, Vote};
use super::{
    Command, Core, Event, Input, Observation, OperatorRequest, Outcome, Output, RequestId, Retention, Settings,
};
use crate::domain::analysis::Analysis;
use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::{Manifest, RolloutSpec};
use crate::domain::run::WindowVerdict;
use crate::domain::time::{Mono, Now, Wall};
use crate::domain::window::Evidence;
use crate::fixtures;

mod checks;
mod deadline;
mod feature;
mod initiator;
mod leases;
mod limits;
mod manifest;
mod many;
mod operator;
mod pauses;
mod promotion;
mod repeated;
mod restore;
mod run;
mod salt;
mod stable;
mod text;

const CLUSTER: ClusterId = ClusterId([7; 16]);

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn service() -> ServiceId {
    ServiceId::new("s").unwrap()
}

fn spec() -> Arc<Manifest> {
    fixtures::manifest(&[fixtures::manual(500), fixtures::held(10_000, 0)], Analysis::default())
}

fn genesis() -> Chosen {
    let member = |name| (node(name), Member { incarnation: Incarnation(1), cordoned: false });
    let operation = Operation::Genesis { cluster: CLUSTER, members: Members(["a", "b", "c"].map(member).into()) };
    let intent = Intent {
        initiator: Initiator::Node,
        tx: TxId::new("genesis").unwrap(),
        actor: "founder".into(),
        digest: 0,
        at: Wall(0),
        operation,
    };
    let record =
        Record { slot: Slot(0), prev_hash: Default::default(), intent, state: None, phase: None, certificate: None };
    Chosen { ballot: None, decided_at: Wall(0), record }
}

/// Three cores, their disks, and the messages under way.
struct Rig {
    cores: BTreeMap<NodeId, Core>,
    acceptors: BTreeMap<NodeId, AcceptorState>,
    logs: BTreeMap<NodeId, Vec<Chosen>>,
    checkpoints: BTreeMap<NodeId, Checkpoint>,
    runs: BTreeMap<NodeId, BTreeMap<ServiceId, SavedRun>>,
    /// Nodes that are configured beside the first three.
    others: BTreeSet<NodeId>,
    /// The newest protocol version of nodes of an older build.
    speaks: BTreeMap<NodeId, u16>,
    /// Of nodes whose incarnation isn't 1.
    incarnations: BTreeMap<NodeId, Incarnation>,
    /// Every record that any log ever held.
    decided: BTreeMap<Slot, Record>,
    retention: Retention,
    wire: VecDeque<(NodeId, NodeId, Message)>,
    /// Says of a message, by its sender and its receiver, whether it gets lost.
    loses: fn(&NodeId, &NodeId, &Message) -> bool,
    now: u64,
    /// How far nodes' times of day are ahead, in milliseconds.
    ahead_ms: BTreeMap<NodeId, u64>,
    /// Each node's lease, as it was told last.
    leases: BTreeMap<NodeId, Option<Mono>>,
    /// What was put out, without heartbeats, leases, evidence and publications.
    story: Vec<String>,
    replies: BTreeMap<u64, Outcome>,
    /// What each node judged; with its place among all decisions, where it is in the log.
    judged: Vec<(NodeId, Option<super::record::Sequence>, WindowVerdict)>,
}

impl Rig {
    fn new() -> Self {
        Self::keeping(Retention::default())
    }

    fn keeping(retention: Retention) -> Self {
        let mut rig = Self {
            retention,
            checkpoints: BTreeMap::new(),
            runs: BTreeMap::new(),
            others: BTreeSet::new(),
            incarnations: BTreeMap::new(),
            speaks: BTreeMap::new(),
            decided: BTreeMap::new(),
            cores: BTreeMap::new(),
            acceptors: BTreeMap::new(),
            logs: BTreeMap::new(),
            wire: VecDeque::new(),
            loses: |_, _, _| false,
            now: 1_000_000,
            ahead_ms: BTreeMap::new(),
            leases: BTreeMap::new(),
            story: Vec::new(),
            replies: BTreeMap::new(),
            judged: Vec::new(),
        };
        ["a", "b", "c"].map(node).iter().for_each(|name| rig.found(name));
        rig.run_for(600);
        assert_eq!(rig.cores[&node("b")].view().coordinator, node("a"));
        rig.story.clear();
        rig
    }

    /// Starts a node that never ran.
    fn found(&mut self, name: &NodeId) {
        let acceptor = AcceptorState {
            cluster: CLUSTER,
            node: name.clone(),
            incarnation: Incarnation(1),
            boot: 0,
            promised: None,
            accepted: None,
            head: Slot(0),
            head_hash: genesis().record.hash(),
            writes: 0,
            seen: BTreeMap::new(),
        };
        self.acceptors.insert(name.clone(), acceptor);
        self.logs.insert(name.clone(), vec![genesis()]);
        self.restart(name);
    }

    fn now_of(&self, name: &NodeId) -> Now {
        let ahead_ms = self.ahead_ms.get(name).copied().unwrap_or_default();
        Now { mono: Mono(self.now), wall: Wall(self.now / 1000 + ahead_ms) }
    }

    /// Returns true while a node holds a lease of 2 s.
    fn is_leased(&self, name: &str) -> bool {
        let from = self.leases.get(&node(name)).copied().flatten();
        from.is_some_and(|from| Mono(self.now) < from.after_ms(2_000))
    }

    /// Ends a node's process, if it runs, and starts it from its disk.
    fn restart(&mut self, name: &NodeId) {
        let settings = Settings {
            node: name.clone(),
            cluster: CLUSTER,
            timings: Timings::default(),
            seed: 1,
            fresh_incarnation: Incarnation(9),
            retention: self.retention,
            peers: self.others.clone(),
            speaks: self.speaks.get(name).copied().unwrap_or(crate::protocol::feature::PROTOCOL),
        };
        let acceptor = self.acceptors.get(name).cloned();
        let runs = self.runs.get(name).cloned().unwrap_or_default();
        let ledger = self.checkpoints.get(name).map(|checkpoint| checkpoint.ledger().unwrap());
        let ledger = ledger.unwrap_or_else(|| Ledger::new(&genesis()).unwrap());
        let log: Vec<_> = self.logs[name].iter().filter(|c| c.record.slot > ledger.head).cloned().collect();
        let (core, outputs) = Core::start(settings, acceptor, ledger, &log, runs, self.now_of(name));
        self.leases.remove(name);
        self.cores.insert(name.clone(), core);
        self.carry_out(name, outputs);
    }

    fn kill(&mut self, name: &str) {
        self.cores.remove(&node(name));
        self.wire.retain(|(_, to, _)| *to != node(name));
    }

    fn handle(&mut self, name: &NodeId, input: Input) {
        let now = self.now_of(name);
        let Some(core) = self.cores.get_mut(name) else { return };
        let outputs = core.handle(now, input);
        self.carry_out(name, outputs);
    }

    fn carry_out(&mut self, name: &NodeId, outputs: Vec<Output>) {
        for output in outputs {
            if let Some(line) = told(&output) {
                self.story.push(format!("{name} {line}"));
            }
            match output {
                Output::Persist(acceptor) => drop(self.acceptors.insert(name.clone(), *acceptor)),
                Output::Append(chosen) => {
                    let known = self.decided.entry(chosen.record.slot).or_insert_with(|| chosen.record.clone());
                    assert_eq!(*known, chosen.record, "one record in a slot");
                    self.logs.get_mut(name).unwrap().push(*chosen);
                }
                Output::Send { to, message } if (self.loses)(name, &to, &message) => {}
                Output::Send { to, message } => self.wire.push_back((name.clone(), to, *message)),
                Output::SendLog { to, from, through } => self.send_log(name, &to, from, through),
                Output::Checkpoint { checkpoint, keep_from } => {
                    self.logs.get_mut(name).unwrap().retain(|chosen| chosen.record.slot >= keep_from);
                    self.checkpoints.insert(name.clone(), checkpoint);
                }
                Output::Install(checkpoint) => {
                    self.logs.get_mut(name).unwrap().clear();
                    self.checkpoints.insert(name.clone(), checkpoint);
                }
                Output::Reply(request, outcome) => drop(self.replies.insert(request.0, outcome)),
                Output::Announce(Event::Analyzed { sequence, window_verdict, .. }) => {
                    self.judged.push((name.clone(), sequence, window_verdict));
                }
                Output::SaveRun(service, run) => {
                    let runs = self.runs.entry(name.clone()).or_default();
                    match run {
                        Some(run) => drop(runs.insert(service, *run)),
                        None => drop(runs.remove(&service)),
                    }
                }
                Output::Lease(from) => drop(self.leases.insert(name.clone(), from)),
                Output::Publish(_) | Output::Announce(_) => {}
            }
        }
    }

    fn send_log(&mut self, name: &NodeId, to: &NodeId, from: Slot, through: Slot) {
        let kept = self.logs[name].iter().filter(|c| (from..=through).contains(&c.record.slot));
        let mut messages: Vec<_> = kept.map(|c| Decision::CatchUp(Box::new(c.clone()))).collect();
        if !self.logs[name].iter().any(|c| c.record.slot == from) {
            messages = self.checkpoints[name].parts().into_iter().map(Decision::Checkpoint).collect();
        }
        let messages = messages.into_iter().map(Message::Decision).filter(|message| !(self.loses)(name, to, message));
        self.wire.extend(messages.map(|message| (name.clone(), to.clone(), message)));
    }

    /// Delivers the message at a place of the wire.
    fn deliver(&mut self, at: usize) {
        let Some((from, to, message)) = self.wire.remove(at) else { return };
        let message = codec::decode(&codec::encode(&message)).expect("what is sent can be read");
        let incarnation = self.incarnations.get(&from).copied().unwrap_or(Incarnation(1));
        self.handle(&to, Input::Received { from, incarnation, message: Box::new(message) });
    }

    /// Delivers everything, in order, until nothing is under way.
    fn settle(&mut self) {
        while !self.wire.is_empty() {
            self.deliver(0);
        }
    }

    fn tick(&mut self) {
        self.now += 20_000;
        let names: Vec<_> = self.cores.keys().cloned().collect();
        names.iter().for_each(|name| self.handle(name, Input::Tick));
    }

    fn run_for(&mut self, ms: u64) {
        for _ in 0..ms / 20 {
            self.tick();
            self.settle();
        }
    }

    /// Asks a node for something under request and transaction `number`.
    fn ask(&mut self, name: &str, number: u64, asked: OperatorRequest) {
        let tx = TxId::new(format!("t{number}")).unwrap();
        self.handle(
            &node(name),
            Input::Operator(Command { request: RequestId(number), tx, actor: "alice".into(), asked }),
        );
    }

    fn asked(&mut self, name: &str, number: u64, asked: OperatorRequest) -> Outcome {
        self.ask(name, number, asked);
        self.settle();
        self.run_for(1_600);
        self.replies[&number].clone()
    }

    fn abort(&self) -> OperatorRequest {
        OperatorRequest::Abort { service: service(), reason: "test".into() }
    }

    fn canary_bp(&self, name: &str) -> u16 {
        let view = self.cores[&node(name)].view();
        view.services.get(&service()).and_then(|view| view.serving.canary.as_ref()).map_or(0, |(_, bp)| *bp)
    }

    fn take_story(&mut self) -> Vec<String> {
        std::mem::take(&mut self.story)
    }

    /// I1 (asserted at each append), I2 and I4 as far as the logs show them.
    fn check(&self) {
        let mut seen = std::collections::BTreeSet::new();
        let mut before = genesis().record.hash();
        for record in self.decided.values() {
            assert_eq!(record.prev_hash, before, "chained, without a hole");
            assert!(seen.insert(record.intent.key()), "one outcome for a transaction");
            before = record.hash();
        }
    }
}

/// Tells an output in a line; none for what only keeps time.
fn told(output: &Output) -> Option<String> {
    let slot_of = |accepted: &Option<Accepted>| accepted.as_ref().map(|accepted| accepted.record.slot.0);
    Some(match output {
        Output::Persist(acceptor) => {
            let promised = acceptor.promised.as_ref().map_or("-".into(), Ballot::to_string);
            match slot_of(&acceptor.accepted) {
                Some(slot) => format!("persists: promised {promised}, accepted slot {slot}"),
                None => format!("persists: promised {promised}"),
            }
        }
        Output::Append(chosen) => {
            format!("appends slot {} {}", chosen.record.slot, chosen.record.intent.operation.name())
        }
        Output::Send { to, message } => format!("to {to}: {}", said(message)?),
        Output::SendLog { to, from, through } => format!("to {to}: log {from}..{through}"),
        Output::Checkpoint { checkpoint, keep_from } => {
            format!("keeps checkpoint {}, records from {keep_from}", checkpoint.slot)
        }
        Output::Install(checkpoint) => format!("installs checkpoint {}", checkpoint.slot),
        Output::Reply(request, outcome) => format!("replies {}: {}", request.0, outcome_in_short(outcome)),
        Output::Announce(Event::Voted { vote, reason, .. }) => format!("votes {vote}: {reason}"),
        Output::Announce(_) | Output::Publish(_) | Output::Lease(_) | Output::SaveRun(..) => return None,
    })
}

fn said(message: &Message) -> Option<String> {
    Some(match message {
        Message::Prepare(prepare) => {
            let operation = prepare.intent.operation.name();
            format!("PREPARE {} slot {} {operation}", prepare.ballot, prepare.slot)
        }
        Message::Vote(vote) => match &vote.answer {
            Answer::Gate { accepted, gate } => {
                let gate = match gate {
                    GateVote::Yes(_) => "yes",
                    GateVote::No(_) => "no",
                    GateVote::Abstain(_) => "abstain",
                };
                let with = accepted.as_ref().map_or(String::new(), |a| format!(" with {}", a.record.intent.tx));
                format!("VOTE {gate}{with}")
            }
            Answer::Accept => "VOTE accept".into(),
            Answer::Refuse(Refusal::Stale(ballot)) => format!("VOTE refuse: promised {ballot}"),
            Answer::Refuse(refusal) => format!("VOTE refuse: {refusal:?}"),
        },
        Message::Decision(Decision::Propose(ballot, record)) => {
            format!("DECISION propose {ballot} slot {} {}", record.slot, record.intent.operation.name())
        }
        Message::Decision(Decision::Chosen(chosen)) => format!("DECISION chosen slot {}", chosen.record.slot),
        Message::Decision(Decision::CatchUp(chosen)) => format!("DECISION catch-up slot {}", chosen.record.slot),
        Message::Decision(Decision::Checkpoint(part)) => format!("DECISION checkpoint {}", part.slot),
        Message::Heartbeat(_) | Message::HealthSnapshot(_) => return None,
    })
}

fn outcome_in_short(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Committed { slot, repeated, .. } => format!("COMMITTED slot {slot} repeated {repeated}"),
        Outcome::Aborted { slot, reasons, repeated } => format!("ABORTED slot {slot} {reasons:?} repeated {repeated}"),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_first_commit_forces_two_writes_at_each_node_and_the_next_one_only_one() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    rig.settle();
    let expected = "\
a to b: PREPARE 1.a.1 slot 1 Start
a to c: PREPARE 1.a.1 slot 1 Start
a persists: promised 1.a.1
a votes yes: no canary traffic yet
b persists: promised 1.a.1
b votes yes: no canary traffic yet
b to a: VOTE yes
c persists: promised 1.a.1
c votes yes: no canary traffic yet
c to a: VOTE yes
a to b: DECISION propose 1.a.1 slot 1 Start
a to c: DECISION propose 1.a.1 slot 1 Start
a persists: promised 1.a.1, accepted slot 1
b persists: promised 1.a.1, accepted slot 1
b to a: VOTE accept
c persists: promised 1.a.1, accepted slot 1
c to a: VOTE accept
a to b: DECISION chosen slot 1
a to c: DECISION chosen slot 1
a appends slot 1 Start
a replies 1: COMMITTED slot 1 repeated false
b appends slot 1 Start
c appends slot 1 Start";
    assert_eq!(rig.take_story().join("\n"), expected);

    let abort = rig.abort();
    rig.ask("a", 2, abort);
    rig.settle();
    let expected = "\
a to b: PREPARE 1.a.1 slot 2 Rollback
a to c: PREPARE 1.a.1 slot 2 Rollback
a votes yes: needs no gate
b votes yes: needs no gate
b to a: VOTE yes
c votes yes: needs no gate
c to a: VOTE yes
a to b: DECISION propose 1.a.1 slot 2 Rollback
a to c: DECISION propose 1.a.1 slot 2 Rollback
a persists: promised 1.a.1, accepted slot 2
b persists: promised 1.a.1, accepted slot 2
b to a: VOTE accept
c persists: promised 1.a.1, accepted slot 2
c to a: VOTE accept
a to b: DECISION chosen slot 2
a to c: DECISION chosen slot 2
a appends slot 2 Rollback
a replies 2: COMMITTED slot 2 repeated false
b appends slot 2 Rollback
c appends slot 2 Rollback";
    assert_eq!(rig.take_story().join("\n"), expected);
    rig.check();
}

#[test]
fn an_increase_that_was_voted_on_and_lost_its_coordinator_is_aborted_by_a_survivor() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    // b and c promise and vote; the votes reach nobody.
    rig.deliver(0);
    rig.deliver(0);
    rig.kill("a");
    rig.wire.clear();
    rig.run_for(3_500);
    let (b, c) = (&rig.logs[&node("b")], &rig.logs[&node("c")]);
    assert_eq!((b.len(), c.len()), (2, 2));
    assert!(matches!(&b[1].record.intent.operation, Operation::Refused { refused, reasons, .. }
        if refused == "Start" && reasons == &["its coordinator was lost"]));
    let outcome = rig.asked("b", 1, OperatorRequest::Apply(spec()));
    assert!(matches!(outcome, Outcome::Aborted { slot: Slot(1), repeated: true, .. }), "{outcome:?}");
    rig.check();
}

#[test]
fn a_rollback_that_was_voted_on_and_lost_its_coordinator_is_done_by_a_survivor() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    rig.settle();
    let abort = rig.abort();
    rig.ask("a", 2, abort.clone());
    // b and c promise and vote; the votes reach nobody.
    rig.deliver(0);
    rig.deliver(0);
    rig.kill("a");
    rig.wire.clear();
    rig.run_for(3_500);
    let (b, c) = (&rig.logs[&node("b")], &rig.logs[&node("c")]);
    assert_eq!((b.len(), c.len()), (3, 3), "nobody had to ask again");
    assert!(
        matches!(&b[2].record.intent.operation, Operation::Change(_, change) if change.decreases_exposure()),
        "{:?}",
        b[2]
    );
    let outcome = rig.asked("b", 2, abort);
    assert!(matches!(outcome, Outcome::Committed { slot: Slot(2), repeated: true, .. }), "{outcome:?}");
    rig.check();
}

#[test]
fn an_increase_that_a_later_ballot_completes_is_served_by_nobody_and_reverted() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    (0..4).for_each(|_| rig.deliver(0));
    // The proposal reaches b alone; then a is gone.
    let proposals = rig.wire.iter().filter(|(_, to, _)| *to == node("b")).count();
    assert_eq!(proposals, 1);
    rig.wire.retain(|(_, to, _)| *to == node("b"));
    rig.deliver(0);
    rig.kill("a");
    rig.wire.clear();
    for _ in 0..400 {
        rig.tick();
        rig.settle();
        assert_eq!((rig.canary_bp("b"), rig.canary_bp("c")), (0, 0), "nobody serves what was decided in doubt");
    }
    let names: Vec<_> = rig.logs[&node("b")].iter().map(|chosen| chosen.record.intent.operation.name()).collect();
    assert_eq!(names, ["Genesis", "Start", "Revert"]);
    assert!(rig.logs[&node("b")][1].is_in_doubt());
    rig.check();
}

#[test]
fn a_repeated_prepare_gets_the_same_vote_and_costs_no_write() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    let prepare = rig.wire[0].clone();
    rig.deliver(0);
    rig.take_story();
    rig.wire.push_front(prepare);
    rig.deliver(0);
    assert_eq!(rig.take_story(), ["b to a: VOTE yes"]);
}

#[test]
fn a_higher_promise_refuses_a_lower_ballot() {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    rig.ask("b", 2, OperatorRequest::Apply(spec()));
    // b's ballot 1.b.1 is above 1.a.1: c promises it first, then refuses a's.
    rig.wire.retain(|(_, to, message)| *to == node("c") && matches!(message, Message::Prepare(_)));
    rig.take_story();
    rig.deliver(1);
    rig.deliver(0);
    let expected = [
        "c persists: promised 1.b.1",
        "c votes yes: no canary traffic yet",
        "c to b: VOTE yes",
        "c to a: VOTE refuse: promised 1.b.1",
    ];
    assert_eq!(rig.take_story(), expected);
}

#[test]
fn a_node_without_its_register_neither_votes_nor_accepts() {
    let mut rig = Rig::new();
    rig.acceptors.remove(&node("c"));
    rig.restart(&node("c"));
    rig.run_for(600);
    rig.take_story();
    rig.ask("a", 1, OperatorRequest::Apply(spec()));
    rig.settle();
    let by_c: Vec<_> = rig.take_story().into_iter().filter(|line| line.starts_with("c ")).collect();
    assert_eq!(by_c[0], "c to a: VOTE refuse: NotVoter");
    assert!(by_c.iter().all(|line| !line.contains("yes") && !line.contains("accept")), "{by_c:?}");
    let Outcome::Aborted { reasons, .. } = &rig.replies[&1] else { panic!("{:?}", rig.replies[&1]) };
    assert_eq!(reasons, &["c: it has no vote"]);
}

#[test]
fn nodes_whose_logs_came_back_shorter_decide_nothing_until_they_have_the_rest() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let abort = rig.abort();
    rig.asked("a", 2, abort);
    rig.asked("a", 3, OperatorRequest::Retry { service: service() });
    // Two of three disks lose the end of their logs; the third node, which has it, is dead.
    rig.kill("a");
    for name in ["b", "c"].map(node) {
        // The acceptor file remembers what the log held when it was written last; it has accepted slot 3 itself.
        assert_eq!(rig.acceptors[&name].head, Slot(2));
        rig.logs.get_mut(&name).unwrap().truncate(2);
        rig.restart(&name);
    }
    rig.run_for(1_600);
    let abort = rig.abort();
    let outcome = rig.asked("b", 4, abort);
    assert!(matches!(&outcome, Outcome::Refused(why) if why.contains("rebuilding its log")), "{outcome:?}");
    assert_eq!((rig.canary_bp("b"), rig.canary_bp("c")), (0, 0), "nothing is served by half a log");
    rig.restart(&node("a"));
    rig.run_for(1_600);
    let abort = rig.abort();
    let outcome = rig.asked("c", 5, abort);
    assert!(matches!(outcome, Outcome::Committed { slot: Slot(4), .. }), "{outcome:?}");
    rig.check();
}

#[test]
fn what_a_client_was_told_outlives_a_restart_of_everybody() {
    let mut rig = Rig::new();
    let first = rig.asked("a", 1, OperatorRequest::Apply(spec()));
    assert!(matches!(first, Outcome::Committed { slot: Slot(1), repeated: false, .. }), "{first:?}");
    for name in ["a", "b", "c"].map(node) {
        rig.restart(&name);
    }
    rig.run_for(600);
    let again = rig.asked("c", 1, OperatorRequest::Apply(spec()));
    assert!(matches!(again, Outcome::Committed { slot: Slot(1), repeated: true, .. }), "{again:?}");
    let abort = rig.abort();
    assert_eq!(rig.asked("b", 1, abort), Outcome::KeyReused { slot: Slot(1) });
    assert_eq!(rig.logs[&node("a")].len(), 2);
}

#[test]
fn a_coordinator_that_restarts_uses_another_ballot() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.restart(&node("a"));
    rig.run_for(600);
    rig.take_story();
    let abort = rig.abort();
    rig.asked("a", 2, abort);
    let story = rig.take_story();
    assert!(story.contains(&"a to b: PREPARE 2.a.2 slot 2 Rollback".to_string()), "{story:#?}");
}

#[test]
fn without_a_majority_a_write_says_so_and_decides_nothing() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.kill("b");
    rig.kill("c");
    let abort = rig.abort();
    rig.ask("a", 2, abort.clone());
    while !rig.replies.contains_key(&2) {
        rig.handle(&node("a"), Input::Tick);
        rig.now += 20_000;
    }
    assert_eq!(rig.replies[&2], Outcome::NoQuorum { reached: vec![node("a")], needed: 2 });
    assert_eq!(rig.logs[&node("a")].len(), 2);
    // Votes for that attempt may still be under way: whatever follows in the same slot has a ballot of its own.
    rig.wire.clear();
    rig.take_story();
    rig.ask("a", 3, abort);
    rig.run_for(2_500);
    let prepares = rig.take_story().into_iter().filter(|line| line.contains("PREPARE")).collect::<Vec<_>>();
    assert!(!prepares.is_empty() && prepares.iter().all(|line| !line.contains(" 1.a.1 ")), "{prepares:#?}");
}

#[test]
fn a_node_that_lags_behind_what_its_peers_keep_starts_from_their_checkpoint() {
    let mut rig = Rig::keeping(Retention { checkpoint_every: 8, history: 4 });
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.kill("c");
    for number in 2..14 {
        let pause = OperatorRequest::Pause { service: service(), reason: "test".into() };
        let asked = if number % 2 == 0 { pause } else { OperatorRequest::Resume { service: service() } };
        rig.ask("a", number, asked);
        rig.settle();
        rig.run_for(100);
    }
    assert_eq!(rig.logs[&node("a")][0].record.slot, Slot(5), "slots 1 to 4 are gone");
    rig.restart(&node("c"));
    rig.take_story();
    rig.run_for(1_000);
    let story = rig.take_story();
    assert!(story.contains(&"c installs checkpoint 8".to_string()), "{story:#?}");
    let (a, c) = (rig.cores[&node("a")].view(), rig.cores[&node("c")].view());
    assert_eq!((c.head, c.head_hash), (a.head, a.head_hash));
    assert_eq!(c.services[&service()].service, a.services[&service()].service);
    // Its votes count again, and what it takes over survives its own restart.
    rig.restart(&node("c"));
    rig.run_for(600);
    rig.kill("b");
    let outcome = rig.asked("c", 3, OperatorRequest::Resume { service: service() });
    assert!(matches!(outcome, Outcome::Committed { slot: Slot(3), repeated: true, .. }), "{outcome:?}");
    let abort = rig.abort();
    let outcome = rig.asked("a", 99, abort);
    assert!(matches!(outcome, Outcome::Committed { repeated: false, .. }), "{outcome:?}");
}

/// With a thousand services, a view made of all of them for each change of one stopped a node for seconds.
#[test]
fn a_change_of_one_service_makes_nothing_anew_for_the_others() {
    let mut rig = Rig::new();
    let mut other = RolloutSpec::clone(&spec());
    other.service = ServiceId::new("other").unwrap();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.asked("a", 2, OperatorRequest::Apply(Arc::new(other.checked().unwrap())));
    let view = |rig: &Rig| rig.cores[&node("b")].view().services.clone();
    let before = view(&rig);
    // What is seen meanwhile is shown with the next refresh.
    let mut seen = Observation { service: "other".parse().unwrap(), routing_version: 1, evidence: Evidence::default() };
    seen.evidence.canary.record(1_000, false);
    rig.handle(&node("b"), Input::Telemetry(vec![seen]));
    let (service, reason) = (service(), "test".to_string());
    rig.handle(&node("b"), Input::CircuitBreakerTripped { service: service.clone(), routing_version: 1, reason });
    let after = view(&rig);
    assert_eq!(after[&service].serving.canary.as_ref().unwrap().1, 0);
    assert!(!Arc::ptr_eq(&before[&service], &after[&service]));
    assert!(Arc::ptr_eq(&before["other"], &after["other"]));
    rig.settle();
    assert!(Arc::ptr_eq(&before["other"], &view(&rig)["other"]), "nor does the rollback");
    rig.run_for(500);
    assert_eq!(view(&rig)["other"].local.canary.count, 1);
}

/// A few at a time must not become: the first ones again and again; nor one without a turn, where the clock is seldom looked at.
#[test]
fn peers_are_told_of_every_service_a_few_at_a_time() {
    let mut rig = Rig::new();
    let name = |i: u64| ServiceId::new(format!("s{i:02}")).unwrap();
    for i in 0..50 {
        let mut other = RolloutSpec::clone(&spec());
        other.service = name(i);
        rig.asked("a", i, OperatorRequest::Apply(Arc::new(other.checked().unwrap())));
    }
    for (tick_ms, most) in [(20, 11), (100, 50)] {
        let mut told = BTreeMap::<ServiceId, u64>::new();
        for _ in 0..2_000 / tick_ms {
            rig.now += 1_000 * tick_ms;
            rig.handle(&node("b"), Input::Tick);
            let mut now = BTreeSet::new();
            for (from, _, message) in std::mem::take(&mut rig.wire) {
                if let (true, Message::HealthSnapshot(snapshot)) = (from == node("b"), message) {
                    *told.entry(snapshot.service.clone()).or_default() += 1;
                    now.insert(snapshot.service);
                }
            }
            assert!(now.len() <= most, "{} at once", now.len());
        }
        // To two peers, each 250 ms, which turns make 300: in 2 s at least six times.
        assert!((0..50).all(|i| told.get(&name(i)).is_some_and(|times| *times >= 12)), "{told:?}");
    }
}

#[test]
fn a_local_hold_outlives_a_checkpoint_taken_over_from_a_peer() {
    let mut rig = Rig::keeping(Retention { checkpoint_every: 4, history: 0 });
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    // c hears nothing more; it stops its canary traffic by itself, and its peers go on without changing the weights.
    let c = rig.cores.remove(&node("c")).unwrap();
    for number in 2..10 {
        let pause = OperatorRequest::Pause { service: service(), reason: "test".into() };
        let asked = if number % 2 == 0 { pause } else { OperatorRequest::Resume { service: service() } };
        rig.ask("a", number, asked);
        rig.settle();
        rig.run_for(100);
    }
    rig.cores.insert(node("c"), c);
    let (service, reason) = (service(), "test".to_string());
    rig.handle(&node("c"), Input::CircuitBreakerTripped { service, routing_version: 1, reason });
    rig.wire.clear();
    assert_eq!(rig.canary_bp("c"), 0);
    rig.take_story();
    let parts = rig.checkpoints[&node("a")].parts();
    for part in parts {
        let message = Box::new(Message::Decision(Decision::Checkpoint(part)));
        let input = Input::Received { from: node("a"), incarnation: Incarnation(1), message };
        rig.handle(&node("c"), input);
        assert_eq!(rig.canary_bp("c"), 0);
    }
    assert!(rig.take_story().contains(&"c installs checkpoint 8".to_string()));
}

#[test]
fn a_readmission_binds_what_the_node_is_now_and_never_an_old_disk() {
    let mut rig = Rig::new();
    let readmit = |incarnation| OperatorRequest::Config(ConfigChange::Readmit(node("c"), Incarnation(incarnation)));
    let old = rig.acceptors.remove(&node("c")).unwrap();
    rig.incarnations.insert(node("c"), Incarnation(9));
    rig.restart(&node("c"));
    rig.run_for(600);
    let told = |outcome: Outcome| match outcome {
        Outcome::Refused(why) => why,
        other => format!("{other:?}"),
    };
    let why = told(rig.asked("a", 1, readmit(8)));
    assert!(why.starts_with("node c has incarnation 0000000000000009, expected 0000000000000008"), "{why}");
    let outcome = rig.asked("a", 2, readmit(9));
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    // Somebody brings the old disk back.
    rig.acceptors.insert(node("c"), old);
    rig.incarnations.remove(&node("c"));
    rig.restart(&node("c"));
    rig.run_for(600);
    let why = told(rig.asked("a", 3, readmit(1)));
    assert_eq!(why, "node c had that incarnation before: an old disk never counts again");
    rig.kill("b");
    let outcome = rig.asked("a", 4, OperatorRequest::Config(ConfigChange::Cordon(node("b"))));
    assert!(matches!(outcome, Outcome::NoQuorum { .. }), "{outcome:?}");
}

#[test]
fn a_cluster_grows_and_shrinks_by_one_node_at_a_time() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let abort = rig.abort();
    let config = |change| OperatorRequest::Config(change);
    let add = |name, incarnation| config(ConfigChange::Add(node(name), Incarnation(incarnation)));
    let why = |outcome: Outcome| match outcome {
        Outcome::Refused(why) => why,
        other => format!("{other:?}"),
    };
    assert_eq!(why(rig.asked("a", 2, add("d", 1))), "node d is not heard from: start it, then ask again");

    // The others' files name d, and they are restarted; then d starts.
    rig.others = BTreeSet::from(["a", "b", "c", "d"].map(node));
    for name in ["a", "b", "c"].map(node) {
        rig.restart(&name);
        rig.run_for(600);
    }
    rig.found(&node("d"));
    rig.run_for(600);
    let heads = |rig: &Rig, name: &str| rig.cores[&node(name)].view().head;
    assert_eq!(heads(&rig, "d"), heads(&rig, "a"), "it follows without a vote");
    assert_eq!(rig.canary_bp("d"), 0);
    assert!(matches!(rig.asked("a", 3, add("d", 1)), Outcome::Committed { .. }));
    assert_eq!(rig.cores[&node("d")].view().members.len(), 4);

    // Three of four decide; two don't. An increase needs all four.
    rig.kill("a");
    rig.run_for(2_000);
    assert!(matches!(rig.asked("d", 4, abort.clone()), Outcome::Committed { .. }));
    let outcome = rig.asked("b", 5, OperatorRequest::Retry { service: service() });
    assert!(matches!(&outcome, Outcome::Aborted { reasons, .. } if reasons[0].starts_with("a: ")), "{outcome:?}");
    rig.kill("b");
    rig.run_for(2_000);
    rig.ask("c", 6, OperatorRequest::Pause { service: service(), reason: "test".into() });
    rig.run_for(3_000);
    assert!(!matches!(rig.replies[&6], Outcome::Committed { .. }), "{:?}", rig.replies[&6]);

    // Without a for good: three members, and two decide.
    rig.restart(&node("b"));
    rig.run_for(2_000);
    assert!(matches!(rig.asked("b", 7, config(ConfigChange::Remove(node("a")))), Outcome::Committed { .. }));
    rig.kill("c");
    rig.run_for(2_000);
    let outcome = rig.asked("d", 8, config(ConfigChange::Cordon(node("c"))));
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    assert!(matches!(rig.asked("d", 9, OperatorRequest::Retry { service: service() }), Outcome::Committed { .. }));
    // The removed node comes back: it learns that it is none, and its disk never counts again.
    rig.restart(&node("a"));
    rig.run_for(2_000);
    assert_eq!((heads(&rig, "a"), rig.canary_bp("a")), (heads(&rig, "d"), 0));
    assert!(why(rig.asked("d", 10, add("a", 1))).contains("an old disk never counts again"));
    rig.check();
}

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    Deliver(usize),
    Lose(usize),
    Repeat(usize),
    Tick,
    Restart(u8),
    Ask(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (0usize..12).prop_map(Step::Deliver),
        1 => (0usize..12).prop_map(Step::Lose),
        1 => (0usize..12).prop_map(Step::Repeat),
        4 => Just(Step::Tick),
        1 => (0u8..3).prop_map(Step::Restart),
        1 => (0u8..3, 0u8..4).prop_map(|(node, asked)| Step::Ask(node, asked)),
    ];
    proptest::collection::vec(step, 50..600)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_lost_repeated_reordered_or_restarted_there_is_one_log(steps in steps()) {
        let mut rig = Rig::keeping(Retention { checkpoint_every: 4, history: 2 });
        let mut number = 0;
        for step in steps {
            let at = |i: usize| i % rig.wire.len().max(1);
            match step {
                Step::Deliver(i) => { let at = at(i); rig.deliver(at) }
                Step::Lose(i) => drop(rig.wire.remove(at(i))),
                Step::Repeat(i) => rig.wire.extend(rig.wire.get(at(i)).cloned()),
                Step::Tick => rig.tick(),
                Step::Restart(i) => rig.restart(&node(["a", "b", "c"][usize::from(i)])),
                Step::Ask(i, asked) => {
                    number += 1;
                    let asked = match asked {
                        0 => OperatorRequest::Apply(spec()),
                        1 => rig.abort(),
                        2 => OperatorRequest::Retry { service: service() },
                        _ => OperatorRequest::Promote { service: service(), full: true },
                    };
                    rig.ask(["a", "b", "c"][usize::from(i)], number, asked);
                }
            }
            rig.check();
        }
        let told: Vec<_> = rig.replies.clone().into_iter().collect();
        rig.run_for(6_000);
        rig.check();
        let heads: Vec<_> = rig.cores.values().map(|core| core.view().head).collect();
        prop_assert!(heads.iter().all(|head| *head == heads[0]), "{:?}", heads);
        for (number, outcome) in told {
            let tx = TxId::new(format!("t{number}")).unwrap();
            let record = rig.decided.values().find(|record| record.intent.tx == tx);
            let aborted = record.map(|record| matches!(record.intent.operation, Operation::Refused { .. }));
            match outcome {
                Outcome::Committed { .. } => prop_assert_eq!(aborted, Some(false), "t{} was answered COMMITTED", number),
                Outcome::Aborted { .. } => prop_assert_eq!(aborted, Some(true), "t{} was answered ABORTED", number),
                Outcome::Refused(_) | Outcome::Unchanged { .. } => prop_assert_eq!(aborted, None, "t{} was refused", number),
                _ => {}
            }
        }
    }
}
