//! The health gate: evidence in, votes and brakes out. One for each service.
//!
//! A gate can veto on what this node saw alone; to say Yes it needs enough evidence from all nodes together, so that a
//! node without traffic can vote. Silence is not health.

use std::collections::BTreeMap;

use crate::domain::analysis::{Analysis, Verdict};
use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::rollout::Change;
use crate::domain::text::bounded;
use crate::domain::time::Mono;
use crate::domain::weights::Weight;
use crate::domain::window::{Evidence, Window};

use super::core::Core;
use super::ledger::ServiceState;
use super::message::{GateVote, HealthSnapshot, Message};
use super::record::{Chosen, Operation};
use super::tracker::RunTracker;
use super::{Event, Measurement, Observation};

/// One service's evidence at its present routing version, and what follows from it.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub routing_version: u64,
    window: Window,
    /// The latest answer to each query, and when it came.
    measured: BTreeMap<String, (Mono, Result<f64, String>)>,
    /// The latest snapshot of each peer, and when it came.
    snapshots: BTreeMap<NodeId, (Mono, HealthSnapshot)>,
    /// Why this node stopped the canary by itself; none while it hasn't.
    pub local_hold: Option<String>,
    /// When it did.
    pub held_at: Mono,
    /// What the analysis says at the moment.
    pub verdict: Option<Verdict>,
    /// When peers are told of it next.
    next_snapshot: Mono,
    /// When the present stage began, as far as this node knows.
    pub stage_since: Mono,
    /// When the rollout last got on.
    pub progress_since: Mono,
    /// Automatic changes wait until here after one failed.
    pub retry_at: Mono,
    /// How many failed in a row.
    pub failures: u32,
}

impl Gate {
    pub fn new(service_state: &ServiceState, since: Mono) -> Self {
        Self {
            routing_version: service_state.service.routing.version,
            window: Window::default(),
            measured: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            local_hold: None,
            held_at: since,
            verdict: None,
            next_snapshot: Mono::default(),
            stage_since: since,
            progress_since: since,
            retry_at: Mono::default(),
            failures: 0,
        }
    }

    /// Returns this node's own window.
    pub fn local(&self) -> &Evidence {
        self.window.total()
    }

    /// Returns what other systems say of the canary; Promote where none is asked.
    pub fn measured(&self, analysis: &Analysis, now: Mono) -> Verdict {
        let measured = analysis.queries.iter().map(|query| {
            let answer = self.measured.get(&query.name);
            let fresh = answer.filter(|(at, _)| now.millis_since(*at) <= query.fresh_ms());
            query.judge(fresh.map(|(_, value)| value))
        });
        measured.fold(Verdict::Promote, Verdict::or_worse)
    }

    /// Returns the brake of a peer that spoke within `age_ms`, and whose.
    pub fn peer_brake(&self, now: Mono, age_ms: u64) -> Option<(&NodeId, &str)> {
        let fresh = self.snapshots.iter().filter(|(_, (at, _))| now.millis_since(*at) <= age_ms);
        fresh.filter_map(|(node, (_, snapshot))| Some((node, snapshot.local_hold.as_deref()?))).next()
    }
}

impl Core {
    /// Returns what all nodes saw, as far as their word is fresh.
    pub(super) fn cluster_evidence(&self, gate: &Gate) -> Evidence {
        self.evidence_within(gate, self.settings.timings.evidence_age_ms_max)
    }

    fn evidence_within(&self, gate: &Gate, age_ms: u64) -> Evidence {
        let mut evidence = gate.local().clone();
        for (at, snapshot) in gate.snapshots.values() {
            if self.now.mono.millis_since(*at) <= age_ms && snapshot.routing_version == gate.routing_version {
                evidence.merge(&snapshot.evidence);
            }
        }
        evidence
    }

    pub(super) fn on_telemetry(&mut self, observations: &[Observation]) {
        for Observation { service, routing_version, evidence } in observations {
            let Some(gate) = self.gates.get_mut(service) else { continue };
            if gate.routing_version == *routing_version {
                gate.window.add(self.now.mono, evidence);
            }
            if let Some(tracker) = self.trackers.get_mut(service) {
                tracker.observe(*routing_version, evidence);
            }
            self.judge(service);
        }
    }

    pub(super) fn on_measured(&mut self, measurement: Measurement) {
        let Measurement { service, routing_version, name, value } = measurement;
        let value = value.map_err(bounded);
        let now = self.now.mono;
        if let Some(gate) = self.gates.get_mut(&service).filter(|gate| gate.routing_version == routing_version) {
            gate.measured.insert(name, (now, value));
            self.judge(&service);
        }
    }

    pub(super) fn on_snapshot(&mut self, from: &NodeId, incarnation: Incarnation, snapshot: HealthSnapshot) {
        let counts = self.counts(from, incarnation);
        let Some(gate) = self.gates.get_mut(&snapshot.service).filter(|_| counts) else { return };
        if let Some(tracker) = self.trackers.get_mut(&snapshot.service) {
            tracker.hear(&self.settings.node, from, &snapshot, self.now.mono);
        }
        let routing_version = gate.routing_version;
        if snapshot.asks.as_ref().is_some_and(|asks| asks.whom.as_ref() == Some(&self.settings.node)) {
            self.hand_over(from, &snapshot.service, snapshot.rollout_generation);
        }
        if snapshot.routing_version != routing_version {
            return;
        }
        let service = snapshot.service.clone();
        let gate = self.gates.get_mut(&service).expect("a gate just read");
        let local_hold = snapshot.local_hold.map(bounded);
        let snapshot = HealthSnapshot { local_hold, transfer: None, ..snapshot };
        let is_braked = snapshot.local_hold.is_some();
        gate.snapshots.insert(from.clone(), (self.now.mono, snapshot));
        self.judge(&service);
        if is_braked {
            self.tick_autopilot(&[service]);
        }
    }

    pub(super) fn on_circuit_breaker(&mut self, service: &ServiceId, routing_version: u64, reason: String) {
        if self.gates.get(service).is_some_and(|gate| gate.routing_version == routing_version) {
            self.local_hold(service, bounded(reason));
        }
    }

    pub(super) fn tick_gates(&mut self, services: &[ServiceId]) {
        let (now, interval) = (self.now.mono, self.settings.timings.snapshot_ms);
        for id in services {
            let gate = self.gates.get_mut(id).expect("every service has a gate");
            gate.window.expire(now, self.ledger.services[id].service.rollout.spec.analysis.window_ms);
            if now < gate.next_snapshot {
                continue;
            }
            gate.next_snapshot = now.after_ms(interval);
            self.judge(id);
            self.send_snapshot(id);
            self.refresh(id);
        }
    }

    fn send_snapshot(&mut self, id: &ServiceId) {
        let has_news = *self.gates[id].local() != Evidence::default();
        if has_news || self.ledger.services[id].service.rollout.phase.is_active() {
            self.broadcast(&Message::HealthSnapshot(self.snapshot(id)));
        }
    }

    /// Returns what this node tells of a service.
    pub(super) fn snapshot(&self, id: &ServiceId) -> HealthSnapshot {
        let (gate, service_state) = (&self.gates[id], &self.ledger.services[id]);
        let serving = self.serving(service_state, gate);
        let evidence = gate.local().clone();
        let lease_ms_left = self.lease.ms_left(self.now.mono, service_state.service.rollout.spec.lease_ms);
        let leased = serving.lease_ms.is_none() || lease_ms_left > 0;
        let (rollout_generation, tick_samples, asks) = self.trackers.get(id).map(RunTracker::told).unwrap_or_default();
        HealthSnapshot {
            service: id.clone(),
            routing_version: gate.routing_version,
            evidence,
            local_hold: gate.local_hold.clone(),
            lease_ms_left,
            effective_bp: serving.canary.map_or(0, |(_, bp)| if leased { bp } else { 0 }),
            rollout_generation,
            tick_samples,
            asks,
            transfer: None,
        }
    }

    /// Judges the evidence anew; evidence of harm stops this node's canary traffic at once.
    pub(super) fn judge(&mut self, id: &ServiceId) {
        let (gate, service_state) = (&self.gates[id], &self.ledger.services[id]);
        let rollout = &service_state.service.rollout;
        if !rollout.phase.is_active() {
            return;
        }
        let evidence = self.cluster_evidence(gate);
        let verdict = self.verdict(gate, service_state, &evidence);
        let word = gate.verdict.as_ref().map(Verdict::word);
        let (news, samples) = (word != Some(verdict.word()), evidence.canary.count);
        let routing_version = gate.routing_version;
        let harm = match &verdict {
            Verdict::Rollback(why) => Some(why.clone()),
            _ => None,
        };
        if news {
            let (service, verdict) = (id.clone(), verdict.clone());
            self.announce(Event::Verdict { service, routing_version, verdict, samples });
            self.outdated.services.insert(id.clone());
        }
        self.gates.get_mut(id).expect("a gate just read").verdict = Some(verdict);
        if let Some(why) = harm {
            self.local_hold(id, why);
        }
    }

    /// The worst of: the limits on what the cluster saw, the limits on what this node saw where that is a veto, the
    /// comparison with stable, and what other systems measured.
    fn verdict(&self, gate: &Gate, service_state: &ServiceState, cluster: &Evidence) -> Verdict {
        let analysis = &service_state.service.rollout.spec.analysis;
        let alone = match analysis.judge_alone(gate.local()) {
            veto @ (Verdict::Rollback(_) | Verdict::Pause(_)) => veto,
            Verdict::Promote | Verdict::Hold(_) => Verdict::Promote,
        };
        let compared = match self.compared(service_state) {
            // At 100 % there is no stable traffic left to compare with: the limits alone watch the canary.
            Verdict::Hold(_) if service_state.service.routing.canary_weight() == Weight::FULL => Verdict::Promote,
            verdict => verdict,
        };
        let seen = analysis.judge(cluster).or_worse(alone).or_worse(compared);
        seen.or_worse(gate.measured(analysis, self.now.mono))
    }

    /// Stops this node's canary traffic at once, and tells everybody.
    pub(super) fn local_hold(&mut self, id: &ServiceId, reason: String) {
        let now = self.now.mono;
        let service_state = &self.ledger.services[id];
        let exposed = service_state.service.routing.canary_model_id.is_some();
        let gate = self.gates.get_mut(id).expect("every service has a gate");
        if !exposed || gate.local_hold.is_some() {
            return;
        }
        gate.local_hold = Some(reason.clone());
        gate.held_at = now;
        self.outdated.services.insert(id.clone());
        self.publish();
        self.announce(Event::LocalHold { service: id.clone(), reason });
        self.send_snapshot(id);
        self.tick_autopilot(std::slice::from_ref(id));
    }

    /// Returns this node's vote on an act.
    pub(super) fn gate_vote(&self, operation: &Operation, age_ms: u64) -> GateVote {
        let Operation::Change(id, change) = operation else { return GateVote::Yes("needs no gate".into()) };
        if !change.increases_exposure() {
            return GateVote::Yes("needs no gate".into());
        }
        if let Some(why) = &self.unavailable {
            return GateVote::Abstain(why.clone());
        }
        let Some(service_state) = self.ledger.services.get(id) else {
            return GateVote::Yes("no canary traffic yet".into());
        };
        if service_state.increase.as_ref().is_some_and(|increase| increase.in_doubt) {
            return GateVote::No("the last raise was decided in doubt and must be reverted first".into());
        }
        let Change::Promote { full, .. } = change else { return GateVote::Yes("no canary traffic yet".into()) };
        let gate = &self.gates[id];
        if let Some(why) = &gate.local_hold {
            return GateVote::No(format!("brake: {why}"));
        }
        if service_state.service.routing.canary_weight() == Weight::ZERO {
            return GateVote::Yes("no canary traffic yet".into());
        }
        let evidence = self.evidence_within(gate, age_ms);
        let seen = describe(&evidence);
        match self.verdict(gate, service_state, &evidence) {
            Verdict::Promote => GateVote::Yes(seen),
            Verdict::Hold(why) if *full => GateVote::Yes(format!("{why}; the operator skipped the wait")),
            Verdict::Hold(why) => GateVote::Abstain(why),
            Verdict::Pause(why) | Verdict::Rollback(why) => GateVote::No(why),
        }
    }

    /// Begins evidence anew where a decided record changed the weights.
    pub(super) fn renew_gate(&mut self, chosen: &Chosen) {
        let operation = &chosen.record.intent.operation;
        let Some(id) = operation.service().filter(|_| !operation.is_verdict()) else { return };
        self.renew_watch(id, false);
        let Some(service_state) = self.ledger.services.get(id) else { return };
        let now = self.now.mono;
        let version = service_state.service.routing.version;
        let late = self.now.wall.0.saturating_sub(service_state.service.routing.timestamp.0);
        let gate = self.gates.entry(id.clone()).or_insert_with(|| Gate::new(service_state, now));
        if gate.routing_version != version || gate.stage_since == Mono::default() {
            let (failures, retry_at) = (gate.failures, gate.retry_at);
            let was_held = gate.local_hold.take().map(|why| (why, gate.held_at));
            // A record caught up with late began its stage when it was made, as far as wall clocks agree.
            *gate = Gate::new(service_state, now.before_ms(late.min(LATE_MS_MAX)));
            if chosen.record.intent.operation.increases_exposure() {
                gate.progress_since = now;
            } else {
                (gate.failures, gate.retry_at) = (failures, retry_at);
            }
            let started = matches!(chosen.record.intent.operation, Operation::Change(_, Change::Start(_)));
            if let (Some((why, at)), false) =
                (was_held, started || service_state.service.routing.canary_model_id.is_none())
            {
                gate.local_hold = Some(why);
                gate.held_at = at;
            }
        }
        if matches!(chosen.record.intent.operation, Operation::Change(_, Change::Resume)) {
            gate.progress_since = now;
        }
        if matches!(chosen.record.intent.operation, Operation::Abort { .. }) {
            gate.failures = gate.failures.saturating_add(1);
            let wait = (RETRY_MS << gate.failures.min(5)).min(RETRY_MS_MAX);
            gate.retry_at = now.after_ms(wait);
        }
    }
}

/// Longest time that a record is believed to be old, by comparing wall clocks: a year.
const LATE_MS_MAX: u64 = 365 * 24 * 3600 * 1000;
/// First wait after an automatic change was refused; it doubles each time.
const RETRY_MS: u64 = 500;
/// Longest such wait.
const RETRY_MS_MAX: u64 = 15_000;

/// Returns evidence in words.
fn describe(evidence: &Evidence) -> String {
    let canary = &evidence.canary;
    let percent = canary.error_rate().unwrap_or(0.0) * 100.0;
    let mean = canary.mean_ms().unwrap_or(0.0);
    format!("{} canary answers, {percent:.2} % errors, mean {mean:.1} ms", canary.count)
}
