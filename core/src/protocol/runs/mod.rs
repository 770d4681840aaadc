//! The analysis runs of all services: one for each rollout under way.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::domain::analysis::StepComparison;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::run::{SequentialEvidence, WindowVerdict};
use crate::domain::time::Mono;
use crate::domain::verdict::Verdict;

use super::Observation;
use super::Output;
use super::context::{Context, one_round};
use super::event::Event;
use super::log::codec;
use super::log::ledger::ServiceState;
use super::log::record::{Operation, RunTransfer, SavedRun, ServiceVerdict, VERDICTS_MAX};
use super::message::{HealthSnapshot, Membership};
use super::proposal::Proposal;
use tracker::RunTracker;

mod tracker;

/// Runs that are asked for at a time; to go on with its own, a node needs to ask nobody.
const ASKED_AT_ONCE: usize = 128;

/// What this node knows of all analysis runs.
#[derive(Debug, Clone)]
pub(super) struct Runs {
    of: BTreeMap<ServiceId, RunTracker>,
    /// Runs that this node saved before it restarted, until it goes on with them.
    saved: BTreeMap<ServiceId, SavedRun>,
    /// The service whose run was saved last.
    saved_last: Option<ServiceId>,
    /// Services with a window that may be decided: found when they have their turn, forgotten when there is none any more.
    due: BTreeSet<ServiceId>,
    /// When the next verdicts may be proposed.
    verdicts_at: Mono,
    /// More windows were due than a record had room for: the next ones needn't wait for a tick.
    more_windows: bool,
}

/// Between two records of verdicts, as long as one has room for all that are due: many rollouts cost a few slots a second.
const VERDICTS_EVERY_MS: u64 = 250;

/// Returns the canary's share of the requests by its weight, and since which routing version; none where other requests go to it as
/// well.
fn weight_of(service_state: &ServiceState) -> Option<(u64, f64)> {
    let service = &service_state.service;
    let routing = &service.routing;
    service.rollout.spec.matches.is_empty().then(|| (routing.version, routing.canary_weight().fraction()))
}

/// A closed window, or a change of mind of the comparison with stable.
pub(super) struct DecidedWindow {
    pub service: ServiceId,
    pub rollout_generation: u64,
    pub window_verdict: WindowVerdict,
}

impl Runs {
    pub fn new(saved: BTreeMap<ServiceId, SavedRun>) -> Self {
        let (of, due, verdicts_at) = (BTreeMap::new(), BTreeSet::new(), Mono::default());
        Self { of, saved, saved_last: None, due, verdicts_at, more_windows: false }
    }

    /// Begins the run of a rollout that this node learned of, ends those that are over; `restarts` when it may have known the
    /// rollout before.
    pub fn renew(&mut self, ctx: &mut Context, id: &ServiceId, restarts: bool) {
        let Some(service_state) = ctx.ledger.services.get(id) else { return };
        let rollout = &service_state.service.rollout;
        if !rollout.phase.is_active() {
            if self.of.remove(id).is_some() {
                ctx.put(Output::SaveRun(id.clone(), None));
            }
        } else if self.of.get(id).is_none_or(|known| known.rollout_generation() != rollout.rollout_generation) {
            let saved = self.saved.remove(id);
            self.of.insert(id.clone(), RunTracker::new(service_state, ctx.now, restarts, saved));
        }
    }

    /// Begins the runs of what a start or a checkpoint brought, and forgets those of services that are gone.
    pub fn restart(&mut self, ctx: &mut Context) {
        self.of.retain(|id, _| ctx.ledger.services.contains_key(id));
        for id in ctx.ledger.services.keys().cloned().collect::<Vec<_>>() {
            self.renew(ctx, &id, true);
        }
    }

    /// Gives up the saved runs whose rollouts are over.
    pub fn forget_saved(&mut self, ctx: &mut Context) {
        std::mem::take(&mut self.saved).into_keys().for_each(|id| ctx.put(Output::SaveRun(id, None)));
    }

    /// Takes in the data plane's counts.
    pub fn observe(&mut self, observation: &Observation) {
        if let Some(tracker) = self.of.get_mut(&observation.service) {
            tracker.observe(observation.routing_version, &observation.evidence);
        }
    }

    /// Takes in what a peer saw, and its run where this node asks for one.
    pub fn hear(&mut self, ctx: &Context, from: &NodeId, snapshot: &HealthSnapshot) {
        if let Some(tracker) = self.of.get_mut(&snapshot.service) {
            tracker.hear(&ctx.settings.node, from, snapshot, ctx.now.mono);
        }
    }

    /// Adds to a snapshot what peers are told of the run.
    pub fn tell(&self, snapshot: HealthSnapshot) -> HealthSnapshot {
        let told = self.of.get(&snapshot.service).map(RunTracker::told).unwrap_or_default();
        let (rollout_generation, tick_samples, asks) = told;
        HealthSnapshot { rollout_generation, tick_samples, asks, ..snapshot }
    }

    /// Returns what is handed to a peer that asks this node for a rollout's run.
    pub fn transfer(&self, ctx: &Context, id: &ServiceId, rollout_generation: u64) -> Option<RunTransfer> {
        let tracker = self.of.get(id).filter(|known| known.rollout_generation() == rollout_generation)?;
        tracker.transfer(ctx.ledger.services[id].decided_ms, ctx.now.mono)
    }

    /// Lets the runs of these services go on; returns those where the comparison with stable changed its mind, which is
    /// announced.
    pub fn tick(&mut self, ctx: &Context, services: &[ServiceId]) -> Vec<DecidedWindow> {
        let expected: Vec<_> =
            ctx.ledger.members.gate_voters().filter(|node| ctx.is_live_voter(node)).cloned().collect();
        // Without a vote or a majority nothing goes on anyway: a peer that has the run, or saved most of it, may still come.
        let voters = ctx.ledger.members.0.keys().filter(|node| ctx.is_live_voter(node)).count();
        let can_ask = ctx.membership() == Membership::Voter && voters >= ctx.ledger.members.quorum();
        let wants = |id: &ServiceId| self.of.get(id).is_some_and(RunTracker::wants_run);
        let mut free = match services.iter().any(wants) {
            true => ASKED_AT_ONCE.saturating_sub(self.of.values().filter(|tracker| tracker.is_asking()).count()),
            false => 0,
        };
        let mut changed = Vec::new();
        for service in services {
            let Some(tracker) = self.of.get_mut(service) else { continue };
            let rollout_generation = tracker.rollout_generation();
            let weight = weight_of(&ctx.ledger.services[service]);
            let changes = tracker.tick(&ctx.settings.node, &expected, can_ask, &mut free, weight, ctx.now.mono);
            let due = |window_verdict| DecidedWindow { service: service.clone(), rollout_generation, window_verdict };
            changed.extend(changes.into_iter().map(due));
            if tracker.next_window(&ctx.ledger.services[service], ctx.now.mono).is_some() {
                self.due.insert(service.clone());
            }
        }
        changed
    }

    /// Tells people that the comparison with stable changed its mind.
    pub fn announce(ctx: &mut Context, change: DecidedWindow) {
        let DecidedWindow { service, rollout_generation, window_verdict } = change;
        ctx.outdated.evidence.insert(service.clone());
        ctx.announce(Event::Analyzed { sequence: None, service, rollout_generation, window_verdict, decided: None });
    }

    /// Saves the run whose turn it is.
    pub fn save(&mut self, ctx: &mut Context) {
        let Some(id) = one_round(&self.of, self.saved_last.as_ref()).next().cloned() else { return };
        let tracker = self.of.get_mut(&id).expect("a run just found");
        if !tracker.is_to_be_saved(ctx.now.mono) {
            return;
        }
        self.saved_last = Some(id.clone());
        if let Some(saved) = tracker.save(ctx.ledger.services[&id].decided_ms, ctx.now) {
            ctx.put(Output::SaveRun(id, Some(Box::new(saved))));
        }
    }

    /// Returns true when more windows were due than the last record had room for.
    pub fn has_more_windows(&self) -> bool {
        self.more_windows
    }

    /// Returns the next closed window of each rollout as one proposal, with what other systems measured, when it is time for it: as
    /// many as a record has room for, those first that are due longest.
    pub fn due(&mut self, ctx: &Context, measured: impl Fn(&ServiceId) -> Verdict) -> Option<Proposal> {
        let now = ctx.now.mono;
        if now < self.verdicts_at {
            return None;
        }
        let mut due = Vec::new();
        let of = &mut self.of;
        self.due.retain(|id| {
            let Some(tracker) = of.get_mut(id) else { return false };
            let service_state = &ctx.ledger.services[id];
            let Some(window_verdict) = tracker.next_window(service_state, now) else { return false };
            let overdue_ms = tracker.ms_since(window_verdict.to_ms, now);
            let routing = service_state.service.routing.clone();
            let rollout_generation = tracker.rollout_generation();
            due.push((overdue_ms, ServiceVerdict { routing, rollout_generation, window_verdict }));
            true
        });
        due.sort_by_key(|(overdue_ms, _)| Reverse(*overdue_ms));
        let all = due.len();
        let (most, mut room) = VERDICTS_MAX;
        let mut verdicts = Vec::new();
        for (_, mut verdict) in due.into_iter().take(most) {
            // What other systems measured isn't counted by windows; it is asked when one is decided.
            let judged = &mut verdict.window_verdict.verdict;
            *judged = judged.clone().or_worse(measured(&verdict.routing.service));
            let Some(left) = room.checked_sub(codec::encode(&verdict).len()) else { break };
            room = left;
            verdicts.push(verdict);
        }
        self.more_windows = verdicts.len() < all;
        if verdicts.is_empty() {
            return None;
        }
        if !self.more_windows {
            self.verdicts_at = now.after_ms(VERDICTS_EVERY_MS);
        }
        verdicts.sort_by(|one, other| one.routing.service.cmp(&other.routing.service));
        Some(Proposal::Operation(Operation::Verdicts(verdicts)))
    }

    /// Returns what the comparison with stable says of a rollout; Promote where there is none to make.
    pub fn compared(&self, service_state: &ServiceState) -> StepComparison {
        let rollout = &service_state.service.rollout;
        let analysis = &rollout.spec.analysis;
        if !analysis.compares() {
            return StepComparison::NOTHING;
        }
        let version = service_state.service.routing.version;
        let tracker = self.of.get(&rollout.spec.service);
        match tracker.filter(|known| known.rollout_generation() == rollout.rollout_generation) {
            Some(tracker) => StepComparison {
                verdict: tracker.compared(version),
                samples: analysis.enough_in_step(tracker.step_answers(version)),
            },
            None => StepComparison {
                verdict: Verdict::Hold("nothing to compare yet".into()),
                samples: analysis.enough_in_step(0),
            },
        }
    }

    /// Returns the evidence of the comparison with stable.
    pub fn sequential(&self, id: &ServiceId) -> Option<SequentialEvidence> {
        self.of.get(id).and_then(RunTracker::sequential)
    }
}
