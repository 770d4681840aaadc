//! The protocol core of one node: what it takes in, and which component deals with it. Only here components are called, one after the other; what a
//! component says is to follow is followed up here.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::domain::analysis::StepComparison;
use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::text::bounded;
use crate::domain::time::Now;

use super::acceptor::{self, Acceptor};
use super::autopilot::{self, Autopilot, Coordination};
use super::catch_up::CatchUp;
use super::ceiling;
use super::context::Context;
use super::coordinator::{self, Coordinator};
use super::event::Event;
use super::gate::Gates;
use super::lease::Lease;
use super::log::checkpoint::Checkpoint;
use super::log::ledger::Ledger;
use super::log::record::{AcceptorState, Ballot, Chosen, ConfigChange, Operation, Record, SavedRun, SeenDisk, Slot};
use super::message::{Answer, Decision, GateVote, HealthSnapshot, Membership, Message, Prepare, Vote};
use super::proposal::Proposal;
use super::publisher::Publisher;
use super::runs::Runs;
use super::settings::Settings;
use super::view::{ServiceView, Serving, View};
use super::{Input, Observation, Output};

/// One node's part in the protocol. See [`crate::protocol`] for the contract with its caller.
#[derive(Debug, Clone)]
pub struct Core {
    context: Context,
    coordinator: Coordinator,
    acceptor: Acceptor,
    catch_up: CatchUp,
    lease: Lease,
    gates: Gates,
    runs: Runs,
    autopilot: Autopilot,
    publisher: Publisher,
}

impl Core {
    /// Starts a node from what its disk holds. A missing `acceptor` means that its memory is gone: it takes a fresh
    /// incarnation, follows as a learner, and has no vote. The outputs are the start's, to be carried out first.
    ///
    /// `ledger` is the newest checkpoint's, or genesis alone; `log` are the records after it; `runs` are those that it
    /// saved. Panics when the log is no chain; stores verify that when they open.
    pub fn start(
        settings: Settings,
        acceptor: Option<AcceptorState>,
        mut ledger: Ledger,
        log: &[Chosen],
        runs: BTreeMap<ServiceId, SavedRun>,
        now: Now,
    ) -> (Self, Vec<Output>) {
        assert_eq!(ledger.cluster, settings.cluster, "the log is this cluster's");
        let base = (ledger.head, ledger.head_hash);
        for chosen in log {
            ledger.apply(chosen).expect("a verified log is a chain of possible records");
        }
        let acceptor = acceptor.unwrap_or_else(|| AcceptorState {
            cluster: settings.cluster,
            node: settings.node.clone(),
            incarnation: settings.fresh_incarnation,
            boot: 0,
            promised: None,
            accepted: None,
            head: base.0,
            head_hash: base.1,
            writes: 0,
            seen: BTreeMap::new(),
        });
        assert_eq!(
            (&acceptor.node, acceptor.cluster),
            (&settings.node, settings.cluster),
            "the acceptor state is this node's"
        );
        let acceptor = AcceptorState { boot: acceptor.boot + 1, ..acceptor };
        let mut context = Context::new(settings, acceptor, ledger, now);
        let is_config = |chosen: &&Chosen| matches!(chosen.record.intent.operation, Operation::Config(_));
        context.last_config = log.iter().rev().find(is_config).map_or(base.0, |chosen| chosen.record.slot);
        let remembered = log.iter().find(|chosen| chosen.record.slot == context.acceptor.head);
        let remembered = remembered.map(|chosen| chosen.record.hash());
        let remembered = remembered.or((context.acceptor.head == base.0).then_some(base.1));
        if let (false, Some(hash)) = (context.rebuilding, remembered) {
            assert_eq!(hash, context.acceptor.head_hash, "I2: the log holds what the acceptor state remembers");
        }
        // No other process of this node used these numbers: a late answer to one of them extends nothing here.
        let first_nonce = context.draws.between(1, 1 << 60);
        let mut core = Self {
            coordinator: Coordinator::default(),
            acceptor: Acceptor::new(now.mono),
            catch_up: CatchUp::default(),
            lease: Lease::starting_at(first_nonce, now.mono),
            gates: Gates::new(now.mono),
            runs: Runs::new(runs),
            autopilot: Autopilot::default(),
            publisher: Publisher::new(&context),
            context,
        };
        core.context.forget_settled_accept();
        core.context.persist();
        core.restart_services();
        // A log that isn't whole yet may lack the beginning of their rollouts.
        if !core.context.rebuilding {
            core.runs.forget_saved(&mut core.context);
        }
        core.lease.beat(&mut core.context);
        let outputs = core.finish();
        (core, outputs)
    }

    /// Takes one input and returns what is to be done about it, in order.
    pub fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        self.context.now = Now { mono: now.mono.max(self.context.now.mono), wall: now.wall };
        match input {
            Input::Tick => self.on_tick(),
            Input::Received { from, incarnation, message } => self.on_message(&from, incarnation, *message),
            Input::Unreachable(node) => self.on_unreachable(&node),
            Input::Telemetry(observations) => self.on_telemetry(&observations),
            Input::CircuitBreakerTripped { service, routing_version, reason } => {
                if self.gates.routing_version(&service) == Some(routing_version) {
                    self.hold(&service, bounded(reason));
                }
            }
            Input::Measured(measurement) => {
                let service = measurement.service.clone();
                if self.gates.measure(self.context.now.mono, measurement) {
                    self.judge(&service);
                }
            }
            Input::Guarded(unavailable) => self.context.unavailable = unavailable.map(bounded),
            Input::Operator(command) => {
                let own = self.publisher.view().members.get(&self.context.settings.node);
                let no_vote = own.and_then(|member| member.counts_not.clone());
                let next = self.coordinator.on_command(&mut self.context, command, no_vote);
                self.follow(next);
            }
            Input::Read(request) => self.lease.on_read(&mut self.context, request),
        }
        self.begin_ballots();
        if self.runs.has_more_windows() && self.context.is_coordinator() {
            self.use_idle_coordinator();
            self.begin_ballots();
        }
        self.finish()
    }

    /// Returns a number that tells apart cores that may answer alike questions of a commit differently: what an
    /// exhaustive search knows its states by. Evidence and leases are left out.
    pub fn fingerprint(&self) -> u64 {
        let Context { acceptor, ledger, rebuilding, peers, coordinator, draws, now, .. } = &self.context;
        let known: Vec<_> =
            peers.values().map(|p| (p.unreachable, p.incarnation, p.head, p.membership, &p.open)).collect();
        // How often it was written, and what is known of other disks, changes no answer but for a disk that was put back.
        let acceptor = AcceptorState { writes: 0, seen: BTreeMap::new(), ..acceptor.clone() };
        let state = (acceptor, ledger.head_hash, rebuilding, known, coordinator);
        let open = (&self.acceptor, &self.coordinator, self.catch_up.early(), draws, now);
        xxhash_rust::xxh3::xxh3_64(format!("{state:?} {open:?}").as_bytes())
    }

    /// Returns the latest published view.
    pub fn view(&self) -> &Arc<View> {
        self.publisher.view()
    }

    fn on_tick(&mut self) {
        self.context.watch_peers();
        self.lease.tick(&mut self.context);
        let services = self.gates.next_turn(self.context.now.mono);
        self.tick_runs(&services);
        self.tick_gates(&services);
        self.tick_coordinator();
        self.lease.tick_reads(&mut self.context);
        self.tick_autopilot(&services);
    }

    fn on_message(&mut self, from: &NodeId, incarnation: Incarnation, message: Message) {
        if !self.context.hear(from, incarnation) {
            return;
        }
        match message {
            Message::Prepare(prepare) => self.on_prepare(from, incarnation, prepare),
            Message::Vote(vote) => {
                self.context.note_disk(from, incarnation, vote.writes);
                let next = self.coordinator.on_vote(&mut self.context, from, incarnation, vote);
                self.follow(next);
            }
            Message::Decision(Decision::Propose(ballot, record)) => {
                self.on_propose(from, incarnation, ballot, *record);
            }
            Message::Decision(Decision::Chosen(chosen)) => self.on_chosen(from, incarnation, *chosen, false),
            Message::Decision(Decision::CatchUp(chosen)) => self.on_chosen(from, incarnation, *chosen, true),
            Message::Decision(Decision::Checkpoint(part)) => {
                if let Some((checkpoint, ledger)) = self.catch_up.take_part(&mut self.context, from, part) {
                    self.install(from, checkpoint, ledger);
                }
            }
            Message::Heartbeat(heartbeat) if self.context.is_outdated_disk(heartbeat.seen) => {
                self.restart_without_memory(from, heartbeat.seen);
            }
            Message::Heartbeat(heartbeat) => {
                self.lease.on_heartbeat(&mut self.context, from, incarnation, heartbeat);
            }
            Message::HealthSnapshot(snapshot) => self.on_snapshot(from, incarnation, snapshot),
        }
    }

    /// Starts again as a node whose memory is gone: the disk that this one started from is an old copy, so that it may have
    /// forgotten promises. It takes its fresh incarnation and follows without a vote until it is readmitted.
    fn restart_without_memory(&mut self, peer: &NodeId, seen: Option<SeenDisk>) {
        let Context { settings, acceptor, ledger, now, .. } = &self.context;
        let (node, seen) = (settings.node.clone(), seen.map_or(0, |seen| seen.writes));
        let reason = format!(
            "its own data directory is an old copy: node {peer} knows of write {seen}, found write {}. It has no vote until \
             you run `aviary cluster readmit {node} --incarnation {}`",
            acceptor.writes, settings.fresh_incarnation
        );
        let (settings, ledger, now) = (settings.clone(), ledger.clone(), *now);
        let before = self.context.take_outputs();
        let (core, outputs) = Self::start(settings, None, ledger, &[], BTreeMap::new(), now);
        *self = core;
        before.into_iter().for_each(|output| self.context.put(output));
        self.context.put(Output::Lease(None));
        self.context.announce(Event::Rejected { node, reason });
        outputs.into_iter().for_each(|output| self.context.put(output));
        self.context.outdated.all = true;
    }

    fn on_unreachable(&mut self, node: &NodeId) {
        if self.context.lose(node) {
            self.tick_coordinator();
            let services = self.gates.services();
            self.tick_autopilot(&services);
        }
    }

    /// Ends a call: publishes what changed and hands over the outputs.
    fn finish(&mut self) -> Vec<Output> {
        if self.publisher.is_due(&self.context) {
            self.publish();
        }
        self.context.take_outputs()
    }

    // A commit.

    /// Does what is to follow a step of the coordinator, until nothing is.
    fn follow(&mut self, mut next: Option<coordinator::Next>) {
        while let Some(step) = next {
            next = match step {
                coordinator::Next::Vote(prepare) => {
                    let gate = self.gate_vote(&prepare);
                    let accepted = self.acceptor.vote_own(&mut self.context, &prepare, &gate);
                    self.coordinator.on_own_vote(&mut self.context, accepted, gate)
                }
                coordinator::Next::Accept(ballot, record) => {
                    self.accept(ballot, *record);
                    self.coordinator.try_choose(&mut self.context)
                }
                coordinator::Next::Learn(chosen) => {
                    self.learn(*chosen);
                    None
                }
            };
        }
    }

    /// Proposes what this node wants by itself.
    fn submit(&mut self, proposal: Proposal) {
        let next = self.coordinator.submit_own(&mut self.context, proposal);
        self.follow(next);
    }

    /// Begins what waits, as long as no ballot is under way.
    fn begin_ballots(&mut self) {
        while let Some(next) = self.coordinator.begin_next(&mut self.context) {
            self.follow(Some(next));
        }
    }

    fn tick_coordinator(&mut self) {
        let next = self.coordinator.close_votes(&mut self.context);
        self.follow(next);
        self.coordinator.tick(&mut self.context);
    }

    fn on_prepare(&mut self, from: &NodeId, incarnation: Incarnation, prepare: Prepare) {
        let answer = match self.acceptor.refuse_prepare(&mut self.context, from, incarnation, &prepare) {
            Some(refusal) => Answer::Refuse(refusal),
            None => self.acceptor.repeated_vote(&self.context, &prepare).unwrap_or_else(|| {
                let gate = self.gate_vote(&prepare);
                self.acceptor.vote(&mut self.context, &prepare, gate)
            }),
        };
        self.send_vote(from, prepare.ballot, prepare.slot, answer);
    }

    fn gate_vote(&self, prepare: &Prepare) -> GateVote {
        if prepare.recovery {
            return GateVote::Abstain("settling an open slot".into());
        }
        let operation = &prepare.intent.operation;
        let known = operation.service().and_then(|id| self.context.ledger.services.get(id));
        let compared = known.map_or(StepComparison::NOTHING, |known| self.runs.compared(known));
        self.gates.vote(&self.context, operation, prepare.evidence_age_ms_max, compared)
    }

    fn on_propose(&mut self, from: &NodeId, incarnation: Incarnation, ballot: Ballot, record: Record) {
        let slot = record.slot;
        let answer = match self.acceptor.refuse_proposal(&mut self.context, from, incarnation, &ballot, &record) {
            Some(refusal) => Answer::Refuse(refusal),
            None => {
                self.accept(ballot.clone(), record);
                Answer::Accept
            }
        };
        self.send_vote(from, ballot, slot, answer);
    }

    fn send_vote(&mut self, to: &NodeId, ballot: Ballot, slot: Slot, answer: Answer) {
        let (head, writes) = (self.context.ledger.head, self.context.acceptor.writes);
        self.context.send(to, Message::Vote(Vote { ballot, slot, head, writes, answer }));
    }

    /// Accepts a record, durably. A decrease is obeyed before the disk answers.
    fn accept(&mut self, ballot: Ballot, record: Record) {
        match self.acceptor.accept(&mut self.context, ballot, record) {
            acceptor::AfterAccept::Nothing => {}
            acceptor::AfterAccept::Persist => self.context.persist(),
            acceptor::AfterAccept::PublishAndPersist => {
                self.publish();
                self.context.persist();
            }
        }
    }

    fn on_chosen(&mut self, from: &NodeId, incarnation: Incarnation, chosen: Chosen, catch_up: bool) {
        let mut next = self.catch_up.take(&mut self.context, from, incarnation, chosen, catch_up);
        if next.is_none() {
            return;
        }
        while let Some(chosen) = next {
            if let Err(error) = self.context.ledger.check(&chosen.record) {
                self.context.reject(from, format!("record {}: {error}", chosen.record.slot));
                return;
            }
            self.learn(chosen);
            next = self.catch_up.next(&self.context);
        }
        if catch_up {
            self.catch_up.ask_for_more(&mut self.context, from);
        }
    }

    /// Takes in the record of the next slot, which a majority accepted: adds it to the ledger and the log, routes with
    /// it, answers who waited for it. Panics when it contradicts what this node knows: that is I1 or I2 broken.
    fn learn(&mut self, chosen: Chosen) {
        let (record, operation) = (&chosen.record, &chosen.record.intent.operation);
        self.context.apply(&chosen);
        self.acceptor.settle(record.slot);
        self.renew_services(&chosen);
        self.enforce(record);
        // A verdict changes nothing that is shown but the head: the next refresh has it.
        let is_shown = !operation.is_verdict();
        if is_shown {
            self.context.outdate(operation);
            self.publish();
        }
        // A reader that hears of it finds it in the log.
        self.context.put(Output::Append(Box::new(chosen.clone())));
        self.announce(&chosen);
        self.coordinator.settle(&mut self.context, record);
        if is_shown {
            self.context.outdate(operation);
        }
        self.sum_up();
    }

    fn announce(&mut self, chosen: &Chosen) {
        Event::of(chosen).into_iter().for_each(|(_, event)| self.context.announce(event));
    }

    fn enforce(&mut self, record: &Record) {
        let operation = &record.intent.operation;
        if let Some(id) = operation.service().filter(|_| operation.decreases_exposure()) {
            self.lease.enforce(&self.context, id, true);
        }
        if let Operation::Config(ConfigChange::Remove(_)) = operation {
            self.lease.note_removed(self.context.now.mono);
        }
    }

    /// Returns the sum of the log as this node knows it, and the first record to keep beside it: what takes the place of a
    /// checkpoint that was damaged on disk. None while the node lacks records, or where the sum could not be read back.
    pub fn checkpoint(&self) -> Option<(Checkpoint, Slot)> {
        let checkpoint = Checkpoint::of(&self.context.ledger).ok().filter(|_| !self.context.rebuilding)?;
        Some((checkpoint, self.keep_from()))
    }

    fn keep_from(&self) -> Slot {
        Slot(self.context.ledger.head.0.saturating_sub(self.context.settings.retention.history) + 1)
    }

    /// Makes a checkpoint when it is time for one.
    fn sum_up(&mut self) {
        let head = self.context.ledger.head;
        if !head.0.is_multiple_of(self.context.settings.retention.checkpoint_every) || self.context.rebuilding {
            return;
        }
        match Checkpoint::of(&self.context.ledger) {
            Ok(checkpoint) => {
                let keep_from = self.keep_from();
                self.context.put(Output::Checkpoint { checkpoint, keep_from });
            }
            // The log stays as long as it is, which is read back with the checkpoint before.
            Err(error) => {
                let node = self.context.settings.node.clone();
                self.context.announce(Event::Rejected { node, reason: format!("its own checkpoint: {error}") });
            }
        }
    }

    /// Takes in a peer's checkpoint in place of the records that nobody has any more.
    fn install(&mut self, from: &NodeId, checkpoint: Checkpoint, ledger: Ledger) {
        let slot = ledger.head;
        self.context.replace_ledger(ledger);
        self.catch_up.forget(slot);
        self.acceptor.settle(slot);
        self.restart_services();
        self.context.put(Output::Install(checkpoint));
        self.context.outdated.all = true;
        self.publish();
        self.coordinator.release(slot);
        self.context.beat_to(from);
    }

    // The services.

    /// Begins evidence and runs anew where a start or a checkpoint brought something that this node didn't follow.
    fn restart_services(&mut self) {
        let fresh = self.gates.restart(&self.context);
        self.autopilot.restart(&self.context, fresh);
        self.runs.restart(&mut self.context);
        self.lease.enforce_again(&self.context);
    }

    /// Begins evidence and runs anew where a decided record says so.
    fn renew_services(&mut self, chosen: &Chosen) {
        let operation: &Operation = &chosen.record.intent.operation;
        if let Some(id) = operation.service().filter(|_| !operation.is_verdict()) {
            self.runs.renew(&mut self.context, id, false);
        }
        let renewed = self.gates.renew(&self.context, chosen);
        self.autopilot.renew(&self.context, chosen, renewed);
    }

    fn on_telemetry(&mut self, observations: &[Observation]) {
        for observation in observations {
            if self.gates.observe(self.context.now.mono, observation) {
                self.runs.observe(observation);
                self.judge(&observation.service);
            }
        }
    }

    fn on_snapshot(&mut self, from: &NodeId, incarnation: Incarnation, snapshot: HealthSnapshot) {
        let counts = self.context.counts(from, incarnation);
        let service = snapshot.service.clone();
        if !counts || !self.context.ledger.services.contains_key(&service) {
            return;
        }
        self.runs.hear(&self.context, from, &snapshot);
        let own = &self.context.settings.node;
        if snapshot.asks.as_ref().is_some_and(|asks| asks.whom.as_ref() == Some(own)) {
            self.hand_over(from, &service, snapshot.rollout_generation);
        }
        let is_held = snapshot.local_hold.is_some();
        if !self.gates.hear(self.context.now.mono, from, snapshot) {
            return;
        }
        self.judge(&service);
        if is_held {
            self.tick_autopilot(&[service]);
        }
    }

    /// Hands the run of a service to a peer that asks this node for it.
    fn hand_over(&mut self, to: &NodeId, id: &ServiceId, rollout_generation: u64) {
        let Some(transfer) = self.runs.transfer(&self.context, id, rollout_generation) else { return };
        let snapshot = HealthSnapshot { transfer: Some(Box::new(transfer)), ..self.snapshot(id) };
        self.context.send(to, Message::HealthSnapshot(snapshot));
    }

    fn tick_runs(&mut self, services: &[ServiceId]) {
        for change in self.runs.tick(&self.context, services) {
            let service = change.service.clone();
            Runs::announce(&mut self.context, change);
            self.judge(&service);
        }
        self.runs.save(&mut self.context);
    }

    fn tick_gates(&mut self, services: &[ServiceId]) {
        for id in services {
            if self.gates.tick(&mut self.context, id) {
                self.judge(id);
                self.send_snapshot(id);
            }
        }
    }

    /// Judges the evidence anew; evidence of harm stops this node's canary traffic at once.
    fn judge(&mut self, id: &ServiceId) {
        let compared = self.runs.compared(&self.context.ledger.services[id]);
        if let Some(why) = self.gates.judge(&mut self.context, id, compared) {
            self.hold(id, why);
        }
    }

    /// Stops this node's canary traffic at once, and tells everybody.
    fn hold(&mut self, id: &ServiceId, reason: String) {
        if !self.gates.hold(&mut self.context, id, &reason) {
            return;
        }
        self.publish();
        self.context.announce(Event::LocalHold { service: id.clone(), reason });
        self.send_snapshot(id);
        self.tick_autopilot(std::slice::from_ref(id));
    }

    fn send_snapshot(&mut self, id: &ServiceId) {
        if self.gates.has_news(id) || self.context.ledger.services[id].service.rollout.phase.is_active() {
            let snapshot = self.snapshot(id);
            self.context.broadcast(Message::HealthSnapshot(snapshot));
        }
    }

    /// Returns what this node tells of a service.
    pub(super) fn snapshot(&self, id: &ServiceId) -> HealthSnapshot {
        let lease_ms = self.context.ledger.services[id].service.rollout.spec.lease_ms;
        let lease_ms_left = self.lease.ms_left(self.context.now.mono, lease_ms);
        self.runs.tell(self.gates.snapshot(id, &self.serving(id), lease_ms_left))
    }

    fn serving(&self, id: &ServiceId) -> Serving {
        ceiling::serving(&self.context, &self.context.ledger.services[id], self.gates.local_hold(id))
    }

    // What the cluster does by itself.

    /// Does what is next for these services, and for the log.
    fn tick_autopilot(&mut self, services: &[ServiceId]) {
        if self.context.membership() != Membership::Voter {
            return;
        }
        if self.context.is_coordinator() {
            self.settle_open_slot();
            self.revert_in_doubt();
        }
        services.iter().for_each(|id| self.go_on(id));
        if self.context.is_coordinator() {
            self.use_idle_coordinator();
        }
    }

    /// Begins what waits until nothing else is being decided: a change first, verdicts then.
    fn use_idle_coordinator(&mut self) {
        if !self.coordinator.is_free() {
            return;
        }
        if let Some(id) = self.autopilot.take_waiting() {
            self.go_on(&id);
        }
        self.decide_windows();
    }

    /// Proposes what a rollout needs next.
    fn go_on(&mut self, id: &ServiceId) {
        let health = self.gates.health(&self.context, id);
        let coordination =
            Coordination { is_free: self.coordinator.is_free(), is_decreasing: self.coordinator.has(id, true) };
        if let Some(proposal) = self.autopilot.next(&self.context, id, &health, coordination) {
            self.submit(proposal);
        }
    }

    /// Asks for the next closed window of each rollout to be decided. Verdicts can wait: they never contend for a slot that
    /// somebody's transaction is open in, which would put an increase in doubt.
    fn decide_windows(&mut self) {
        if self.acceptor.is_open(&self.context) || !self.coordinator.is_free() {
            return;
        }
        let measured = |service: &ServiceId| self.gates.measured(&self.context, service);
        if let Some(proposal) = self.runs.due(&self.context, measured) {
            self.submit(proposal);
        }
    }

    /// Finishes what a lost or slow coordinator left in the open slot.
    fn settle_open_slot(&mut self) {
        if !self.coordinator.is_free() {
            return;
        }
        if let Some(intent) = self.acceptor.overdue(&self.context) {
            self.submit(Proposal::Settle(intent));
        }
    }

    /// Undoes an increase that was decided in doubt.
    fn revert_in_doubt(&mut self) {
        let Some((id, proposal)) = autopilot::revert_in_doubt(&self.context) else { return };
        if !self.coordinator.has(&id, true) && self.coordinator.is_free() {
            self.submit(proposal);
        }
    }

    // What is shown.

    /// Publishes what this node routes with, at this point of its outputs: a local hold and an accepted decrease before the
    /// disk answers, a decided record before anybody is told of it, everything else at the end of the call.
    fn publish(&mut self) {
        for id in self.publisher.take_outdated(&mut self.context) {
            self.show(&id);
        }
        self.publisher.publish(&mut self.context);
    }

    /// Makes what is shown of a service anew.
    fn show(&mut self, id: &ServiceId) {
        let service_state = &self.context.ledger.services[id];
        let health = self.gates.health(&self.context, id);
        let is_decreasing = self.coordinator.has(id, true);
        let is_active = service_state.service.rollout.phase.is_active();
        let view = ServiceView {
            service: service_state.service.clone(),
            slot: service_state.slot,
            hash: service_state.hash,
            serving: self.serving(id),
            local: self.gates.local(id).clone(),
            cluster: self.gates.cluster(&self.context, id),
            verdict: health.verdict.filter(|_| is_active).cloned(),
            sequential: self.runs.sequential(id),
            waiting_for: self.autopilot.waiting_for(&self.context, id, &health, is_decreasing),
            enforced: self.lease.is_enforced(id),
        };
        self.publisher.show(id, view);
    }
}
