//! What the cluster does by itself: go on when a step is due and healthy, stop when it isn't, settle what a lost
//! coordinator left open. Only the coordinator acts, but for the brake: whoever braked asks for the rollback itself
//! when the coordinator stays silent.

use crate::domain::analysis::{NoData, Verdict};
use crate::domain::ids::ServiceId;
use crate::domain::rollout::{Change, Phase, Rollout};
use crate::domain::time::Mono;
use crate::domain::weights::Weight;

use super::coordinator::Proposal;
use super::core::Core;
use super::gate::Gate;
use super::ledger::ServiceState;
use super::message::Membership;
use super::record::{Ballot, Intent, Operation};

/// How long a braked node waits for the coordinator's rollback before it asks for one itself.
const BRAKE_PATIENCE_MS: u64 = 300;
/// How long an open slot of a live coordinator is left alone.
const OPEN_PATIENCE_MS: u64 = 1_500;

impl Core {
    /// Does what is next for these services, and for the log.
    pub(super) fn tick_autopilot(&mut self, services: &[ServiceId]) {
        if self.membership() != Membership::Voter {
            return;
        }
        if self.is_coordinator() {
            self.settle_open_slot();
            self.revert_doubtful();
        }
        services.iter().for_each(|id| self.fly(id));
        if self.is_coordinator() {
            self.use_idle_coordinator();
        }
    }

    /// Begins what waits until nothing else is being decided: a change first, verdicts then.
    pub(super) fn use_idle_coordinator(&mut self) {
        if !self.coordination.is_free() {
            return;
        }
        if let Some(id) = self.waits.take() {
            self.fly(&id);
        }
        self.judge_windows();
    }

    fn fly(&mut self, id: &ServiceId) {
        let (service_state, gate) = (&self.ledger.services[id], &self.gates[id]);
        if !service_state.service.rollout.phase.is_active() {
            return;
        }
        if let Some(reason) = self.rollback_reason(service_state, gate) {
            if !self.coordination.has(id, true) && self.may_try(gate) {
                self.pause_tries(id);
                self.submit_own(Proposal::Operation(Operation::Change(id.clone(), Change::Rollback { reason })));
            }
            return;
        }
        if !self.is_coordinator() || self.now.mono < gate.retry_at {
            return;
        }
        let rollout = &service_state.service.rollout;
        let change = match &gate.verdict {
            Some(Verdict::Pause(why)) if rollout.phase != Phase::Paused => Some(Change::Pause { reason: why.clone() }),
            _ => self.step(service_state, gate),
        };
        if change.is_some() && !self.coordination.is_free() {
            self.waits = Some(id.clone());
        } else if let Some(change) = change {
            self.pause_tries(id);
            self.submit_own(Proposal::Operation(Operation::Change(id.clone(), change)));
        }
    }

    fn may_try(&self, gate: &Gate) -> bool {
        // A rollback is asked for again and again, but not with every tick.
        self.now.mono >= gate.retry_at || gate.failures == 0
    }

    /// Leaves an automatic change the time of a ballot before it is tried again.
    fn pause_tries(&mut self, id: &ServiceId) {
        let until = self.now.mono.after_ms(self.settings.timings.resend_ms);
        let gate = self.gates.get_mut(id).expect("every service has a gate");
        gate.retry_at = gate.retry_at.max(until);
        gate.failures = gate.failures.max(1);
    }

    /// Returns why the rollout must go back, when this node is the one to say so.
    fn rollback_reason(&self, service_state: &ServiceState, gate: &Gate) -> Option<String> {
        let now = self.now.mono;
        let own = &self.settings.node;
        if let Some(why) = &gate.local_hold {
            let patient = now.millis_since(gate.held_at) >= BRAKE_PATIENCE_MS;
            return (self.is_coordinator() || patient).then(|| format!("{own}: {why}"));
        }
        if !self.is_coordinator() {
            return None;
        }
        if let Some((node, why)) = gate.peer_brake(now, self.settings.timings.evidence_age_ms_max) {
            return Some(format!("{node}: {why}"));
        }
        let Rollout { spec, phase, .. } = &service_state.service.rollout;
        if *phase == Phase::Paused || self.waits_for_operator(service_state) {
            return None;
        }
        let deadline = spec.progress_deadline_ms;
        let still = now.millis_since(gate.progress_since);
        let planned = self.hold_ms(service_state);
        if still >= deadline.saturating_add(planned) {
            let weight = service_state.service.routing.canary_weight();
            return Some(format!("no progress at {weight} within {} s", deadline / 1000));
        }
        let silent = spec.analysis.no_data == NoData::Fail && self.is_due(service_state, gate);
        let silent = silent && service_state.service.routing.canary_weight() > Weight::ZERO;
        (silent && self.cluster_evidence(gate).canary.count == 0).then(|| "no canary data in the whole step".into())
    }

    fn waits_for_operator(&self, service_state: &ServiceState) -> bool {
        let Rollout { spec, stage, .. } = &service_state.service.rollout;
        spec.stages[*stage].manual
    }

    fn hold_ms(&self, service_state: &ServiceState) -> u64 {
        let Rollout { spec, stage, .. } = &service_state.service.rollout;
        let bake = if *stage == spec.last_stage() { spec.bake_ms } else { 0 };
        spec.stages[*stage].hold_ms.saturating_add(bake)
    }

    fn is_due(&self, service_state: &ServiceState, gate: &Gate) -> bool {
        self.now.mono.millis_since(gate.stage_since) >= self.hold_ms(service_state)
    }

    /// Returns the next change of a healthy rollout whose step is due.
    fn step(&self, service_state: &ServiceState, gate: &Gate) -> Option<Change> {
        let rollout = &service_state.service.rollout;
        if rollout.phase == Phase::Paused || self.waits_for_operator(service_state) || !self.is_due(service_state, gate)
        {
            return None;
        }
        if self.silent_gate_voter().is_some() || self.unavailable.is_some() {
            return None;
        }
        let unexposed = service_state.service.routing.canary_weight() == Weight::ZERO;
        if unexposed || gate.verdict == Some(Verdict::Promote) {
            return Some(Change::Promote { to: service_state.service.next(false), full: false });
        }
        let analysis = &rollout.spec.analysis;
        let held = self.now.mono.millis_since(gate.stage_since).saturating_sub(self.hold_ms(service_state));
        match (analysis.inconclusive_after_ms, &gate.verdict) {
            (Some(after), Some(Verdict::Hold(why))) if held >= after => {
                Some(Change::Pause { reason: format!("inconclusive: {why}") })
            }
            _ => None,
        }
    }

    fn silent_gate_voter(&self) -> Option<&crate::domain::ids::NodeId> {
        self.ledger.members.gate_voters().find(|node| !self.is_live_voter(node))
    }

    /// Returns what a rollout waits for, in words for people.
    pub(super) fn waiting_for(&self, id: &ServiceId, service_state: &ServiceState, gate: &Gate) -> String {
        let rollout = &service_state.service.rollout;
        if !rollout.phase.is_active() {
            return String::new();
        }
        if gate.local_hold.is_some() || self.coordination.has(id, true) {
            return "the rollback to be decided".into();
        }
        if rollout.phase == Phase::Paused {
            return "an operator: resume, promote or abort".into();
        }
        if self.waits_for_operator(service_state) {
            return "an operator: promote or abort".into();
        }
        if let Some(node) = self.silent_gate_voter() {
            return format!("node {node}, which is silent; bench it to go on without it");
        }
        if let Some(why) = &self.unavailable {
            return format!("what promotions depend on: {why}");
        }
        let left = self.hold_ms(service_state).saturating_sub(self.now.mono.millis_since(gate.stage_since));
        if left > 0 {
            return format!("the pause to end, {} s left", left.div_ceil(1000));
        }
        match &gate.verdict {
            Some(Verdict::Hold(why)) => format!("evidence: {why}"),
            Some(Verdict::Pause(why)) => format!("a pause: {why}"),
            _ => "the nodes' votes".into(),
        }
    }

    /// Finishes what a lost or slow coordinator left in the open slot.
    fn settle_open_slot(&mut self) {
        if !self.coordination.is_free() {
            return;
        }
        let Some(intent) = self.open_intent() else { return };
        self.submit_own(Proposal::Settle(intent));
    }

    /// Returns the open slot's intent, as far as this node knows it, when it is time to settle it.
    fn open_intent(&self) -> Option<Option<Intent>> {
        let now = self.now.mono;
        let overdue = |ballot: &Ballot, since: Mono| {
            let own = ballot.node == self.settings.node && self.coordination.is_free();
            let lost = own || !self.is_alive(&ballot.node);
            lost || now.millis_since(since) >= OPEN_PATIENCE_MS
        };
        if let Some(accepted) = &self.acceptor.accepted {
            return overdue(&accepted.ballot, self.accepted_at).then(|| Some(accepted.record.intent.clone()));
        }
        if let Some(prepared) = &self.prepared
            && overdue(&prepared.ballot, prepared.at)
        {
            return Some(Some(prepared.intent.clone()));
        }
        let open = self.peers.values().filter_map(|peer| peer.open.as_ref());
        open.into_iter().any(|(ballot, _, since)| overdue(ballot, *since)).then_some(None)
    }

    /// Undoes a raise that was decided in doubt.
    fn revert_doubtful(&mut self) {
        let Some((id, increase)) = self.ledger.in_doubt() else { return };
        if self.coordination.has(id, true) || !self.coordination.is_free() {
            return;
        }
        let reason = format!("slot {} was decided in doubt", increase.slot);
        let operation = Operation::Revert { service: id.clone(), increased: increase.slot, reason };
        self.submit_own(Proposal::Operation(operation));
    }
}
