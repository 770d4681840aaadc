//! What the cluster does by itself: go on when a step is due and healthy, stop when it isn't, settle what a lost
//! coordinator left open. The coordinator acts first. Where it stays silent, the node that holds its canary asks for the
//! rollback itself; and where it didn't live through a pause, a node that did asks for the next step.

use std::collections::BTreeMap;

use crate::domain::analysis::NoData;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::rollout::{Change, Phase, Rollout};
use crate::domain::time::Mono;
use crate::domain::verdict::Verdict;
use crate::domain::weights::Weight;

use super::context::Context;
use super::gate::{Health, Supply};
use super::log::ledger::ServiceState;
use super::log::record::{Chosen, Operation};
use super::proposal::Proposal;

/// How long a node that stopped the canary by itself waits for the coordinator's rollback before it asks for one itself.
const HOLD_PATIENCE_MS: u64 = 300;
/// How much longer than a pause each further node waits, by name, for a step that the coordinator doesn't ask for: it may have
/// started after the pause began, so that it knows of a part of it only.
const STEP_PATIENCE_MS: u64 = 2_000;
/// First wait after an automatic change was refused; it doubles each time.
const RETRY_MS: u64 = 500;
/// Longest wait between two tries, in milliseconds.
const RETRY_MS_MAX: u64 = 15_000;
/// First wait after nodes abstained from a promotion that its coordinator saw as due: something is missing there, and each try is a
/// record that people read. It doubles up to [`ABSTENTION_MS_MAX`].
const ABSTENTION_MS: u64 = 10_000;
/// Longest wait after nodes abstained, in milliseconds.
const ABSTENTION_MS_MAX: u64 = 60_000;

/// How the automatic changes of one rollout go.
#[derive(Debug, Clone)]
struct Progress {
    /// When the rollout last got on.
    since: Mono,
    /// Automatic changes wait until here after one failed.
    retry_at: Mono,
    /// How many failed in a row.
    failures: u32,
    /// Since when the verdict is to promote, without a break; none while it isn't.
    ready_since: Option<Mono>,
    /// What stood in the way of the last promotion, by the nodes' own words; empty where nothing did.
    refusal: String,
    /// A pause at the deadline is asked for no sooner than this: it doesn't wait for promotions that are tried again.
    late_at: Mono,
}

impl Progress {
    fn new(since: Mono) -> Self {
        let (ready_since, refusal) = (None, String::new());
        Self { since, retry_at: Mono::default(), failures: 0, ready_since, refusal, late_at: Mono::default() }
    }
}

/// What the cluster does by itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Autopilot {
    of: BTreeMap<ServiceId, Progress>,
    /// A service whose next change was due while something else was being decided.
    waits: Option<ServiceId>,
}

/// What the coordinator of this node is doing about a service.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coordination {
    /// Nothing is being decided or waits here.
    pub is_free: bool,
    /// A decrease of the service is under way or waits here.
    pub is_decreasing: bool,
}

impl Autopilot {
    /// Takes note of the services whose evidence begins anew, and since when, and forgets those that are gone.
    pub fn restart(&mut self, ctx: &Context, fresh: Vec<(ServiceId, Mono)>) {
        self.of.retain(|id, _| ctx.ledger.services.contains_key(id));
        self.of.extend(fresh.into_iter().map(|(id, since)| (id, Progress::new(since))));
    }

    /// Takes note of a decided record; `renewed` says since when its stage lasts, where evidence begins anew.
    pub fn renew(&mut self, ctx: &Context, chosen: &Chosen, renewed: Option<Mono>) {
        let operation = &chosen.record.intent.operation;
        let Some(id) = operation.service().filter(|_| !operation.is_verdict()) else { return };
        if !ctx.ledger.services.contains_key(id) {
            return;
        }
        let now = ctx.now.mono;
        let progress = self.of.entry(id.clone()).or_insert_with(|| Progress::new(now));
        if let Some(since) = renewed {
            match operation.increases_exposure() {
                true => *progress = Progress::new(now),
                false => progress.since = since,
            }
        }
        match operation {
            Operation::Change(_, Change::Resume) => progress.since = now,
            Operation::Refused { reasons, .. } => {
                progress.failures = progress.failures.saturating_add(1);
                progress.retry_at = now.after_ms(wait_ms(progress.failures, reasons));
                progress.refusal = reasons.join("; ");
            }
            _ => {}
        }
    }

    /// Returns the service whose change waited until nothing else is being decided.
    pub fn take_waiting(&mut self) -> Option<ServiceId> {
        self.waits.take()
    }

    /// Returns what a rollout needs next, when it is time to propose it.
    pub fn next(
        &mut self,
        ctx: &Context,
        id: &ServiceId,
        health: &Health<'_>,
        coordination: Coordination,
    ) -> Option<Proposal> {
        let service_state = &ctx.ledger.services[id];
        let progress = self.of.get_mut(id).expect("every service has its progress");
        if !service_state.service.rollout.phase.is_active() {
            return None;
        }
        progress.look(ctx.now.mono, health.verdict);
        if let Some(reason) = rollback_reason(ctx, service_state, health, progress.since) {
            // A rollback is asked for again and again, but not with every tick.
            let may_try = ctx.now.mono >= progress.retry_at || progress.failures == 0;
            let is_asked = !coordination.is_decreasing && may_try;
            return is_asked.then(|| progress.propose(ctx, id, Change::Rollback { reason }));
        }
        let is_coordinator = ctx.is_coordinator();
        let late = overdue(ctx, service_state, health, progress.since).filter(|_| is_coordinator);
        if ctx.now.mono < if late.is_some() { progress.late_at } else { progress.retry_at } {
            return None;
        }
        let is_late = late.is_some();
        let change = match health.verdict {
            _ if !is_coordinator => {
                let patience_ms = patience_ms(ctx);
                let change = overdue_step(ctx, service_state, health, progress.since, patience_ms);
                change.filter(|_| progress.is_ready(ctx, service_state, patience_ms))?
            }
            Some(Verdict::Pause(why)) if service_state.service.rollout.phase != Phase::Paused => {
                Change::Pause { reason: why.clone() }
            }
            _ => match late {
                Some(change) => change,
                None => {
                    let change = step(ctx, service_state, health, progress.since);
                    let promotes = |change: &Change| matches!(change, Change::Promote { .. });
                    change.filter(|change| !promotes(change) || progress.is_ready(ctx, service_state, 0))?
                }
            },
        };
        if !coordination.is_free {
            self.waits = Some(id.clone());
            return None;
        }
        if is_late {
            progress.late_at = ctx.now.mono.after_ms(RETRY_MS);
        }
        Some(progress.propose(ctx, id, change))
    }
}

/// Returns how long to wait after the automatic change failed so often in a row, the last time for these reasons.
fn wait_ms(failures: u32, reasons: &[String]) -> u64 {
    let abstained = |reason: &String| reason.contains(": abstains: ");
    match !reasons.is_empty() && reasons.iter().all(abstained) {
        true => (ABSTENTION_MS << failures.saturating_sub(1).min(5)).min(ABSTENTION_MS_MAX),
        false => (RETRY_MS << failures.min(5)).min(RETRY_MS_MAX),
    }
}

impl Progress {
    /// Takes note of what the analysis says.
    fn look(&mut self, now: Mono, verdict: Option<&Verdict>) {
        match verdict {
            Some(Verdict::Promote) => self.ready_since = self.ready_since.or(Some(now)),
            _ => self.ready_since = None,
        }
    }

    /// Returns true once the peers, who hear of the same evidence up to two snapshots later, can say what this node says: asked
    /// before, they would abstain, and a healthy promotion would be recorded as refused first.
    ///
    /// A node other than the coordinator leaves it `patience_ms` more.
    fn is_ready(&self, ctx: &Context, service_state: &ServiceState, patience_ms: u64) -> bool {
        let delay_ms = ctx.settings.timings.snapshot_ms.saturating_mul(2).saturating_add(patience_ms);
        service_state.service.routing.canary_weight() == Weight::ZERO
            || self.ready_since.is_some_and(|since| ctx.now.mono.millis_since(since) >= delay_ms)
    }

    /// Returns the proposal of a change, and leaves it the time of a ballot before it is tried again.
    fn propose(&mut self, ctx: &Context, id: &ServiceId, change: Change) -> Proposal {
        self.retry_at = self.retry_at.max(ctx.now.mono.after_ms(ctx.settings.timings.resend_ms));
        self.failures = self.failures.max(1);
        Proposal::Operation(Operation::Change(id.clone(), change))
    }
}

/// Returns what undoes an increase that was decided in doubt, and the service it is about; none when there is none.
pub(super) fn revert_in_doubt(ctx: &Context) -> Option<(ServiceId, Proposal)> {
    let (id, increase) = ctx.ledger.in_doubt()?;
    let reason = format!("slot {} was decided in doubt", increase.slot);
    let operation = Operation::Revert { service: id.clone(), increased: increase.slot, reason };
    Some((id.clone(), Proposal::Operation(operation)))
}

/// Returns why the rollout must go back, when this node is the one to say so.
fn rollback_reason(
    ctx: &Context,
    service_state: &ServiceState,
    health: &Health<'_>,
    progress_since: Mono,
) -> Option<String> {
    let own = &ctx.settings.node;
    if let Some((why, held_at)) = health.local_hold {
        let patient = ctx.now.mono.millis_since(held_at) >= HOLD_PATIENCE_MS;
        return (ctx.is_coordinator() || patient).then(|| format!("{own}: {why}"));
    }
    if !ctx.is_coordinator() {
        return None;
    }
    if let Some((node, why)) = health.peer_hold {
        return Some(format!("{node}: {why}"));
    }
    let Rollout { spec, phase, .. } = &service_state.service.rollout;
    if *phase == Phase::Paused || waits_for_operator(service_state) {
        return None;
    }
    if let Some(Change::Rollback { reason }) = overdue(ctx, service_state, health, progress_since) {
        return Some(reason);
    }
    let silent = spec.analysis.no_data == NoData::Fail && is_due(ctx, service_state, health);
    let silent = silent && service_state.service.routing.canary_weight() > Weight::ZERO;
    (silent && health.supply == Supply::Silent).then(|| "no canary data in the whole step".into())
}

/// What keeps a rollout from going on once its step is due.
enum Missing {
    /// Something that says nothing about the canary.
    Outside(String),
    /// The canary's own evidence: it is silent, or there is too little of it.
    Samples(String),
    /// A verdict that promotes, though there is evidence enough.
    Verdict(String),
}

fn missing(ctx: &Context, health: &Health<'_>) -> Missing {
    if let Some(node) = silent_gate_voter(ctx) {
        return Missing::Outside(format!("node {node} is silent"));
    }
    if let Some(why) = &ctx.unavailable {
        return Missing::Outside(why.clone());
    }
    let why = match health.verdict {
        Some(Verdict::Hold(why) | Verdict::Pause(why) | Verdict::Rollback(why)) => why.clone(),
        // What this node sees is good: others hold, by what they can't reach, or are about to say that they saw harm.
        Some(Verdict::Promote) | None => return Missing::Outside("the nodes' votes".into()),
    };
    match &health.supply {
        Supply::Outage(why) => Missing::Outside(why.clone()),
        Supply::Silent | Supply::Short => Missing::Samples(why),
        Supply::Enough => Missing::Verdict(why),
    }
}

/// Returns true when a rollout that doesn't go on for this reason is rolled back at its deadline: the canary had its chance. Else
/// it is paused.
fn rolls_back(service_state: &ServiceState, missing: &Missing) -> bool {
    match missing {
        Missing::Outside(_) => false,
        Missing::Samples(_) => service_state.service.rollout.spec.analysis.no_data == NoData::Fail,
        Missing::Verdict(_) => true,
    }
}

/// Returns the end of a rollout that made no progress in the time that it has.
fn overdue(ctx: &Context, service_state: &ServiceState, health: &Health<'_>, progress_since: Mono) -> Option<Change> {
    let Rollout { spec, phase, .. } = &service_state.service.rollout;
    if *phase == Phase::Paused || waits_for_operator(service_state) {
        return None;
    }
    if ctx.now.mono < deadline(service_state, progress_since) {
        return None;
    }
    let missing = missing(ctx, health);
    let (Missing::Outside(why) | Missing::Samples(why) | Missing::Verdict(why)) = &missing;
    let weight = service_state.service.routing.canary_weight();
    let reason = format!("no progress at {weight} within {} s: {why}", spec.progress_deadline_ms / 1000);
    Some(match rolls_back(service_state, &missing) {
        true => Change::Rollback { reason },
        false => Change::Pause { reason },
    })
}

/// Returns when a rollout that made progress last at `progress_since` has had the time that it has.
fn deadline(service_state: &ServiceState, progress_since: Mono) -> Mono {
    let spec = &service_state.service.rollout.spec;
    progress_since.after_ms(spec.progress_deadline_ms.saturating_add(hold_ms(service_state)))
}

fn waits_for_operator(service_state: &ServiceState) -> bool {
    let Rollout { spec, stage, .. } = &service_state.service.rollout;
    spec.stages[*stage].manual
}

fn hold_ms(service_state: &ServiceState) -> u64 {
    let Rollout { spec, stage, .. } = &service_state.service.rollout;
    let bake = if *stage == spec.last_stage() { spec.bake_ms } else { 0 };
    spec.stages[*stage].hold_ms.saturating_add(bake)
}

fn silent_gate_voter(ctx: &Context) -> Option<&NodeId> {
    ctx.ledger.members.gate_voters().find(|node| !ctx.is_live_voter(node))
}

fn is_due(ctx: &Context, service_state: &ServiceState, health: &Health<'_>) -> bool {
    ctx.now.mono.millis_since(health.stage_since) >= hold_ms(service_state)
}

/// Returns the next change of a healthy rollout whose step is due.
fn step(ctx: &Context, service_state: &ServiceState, health: &Health<'_>, progress_since: Mono) -> Option<Change> {
    let rollout = &service_state.service.rollout;
    if rollout.phase == Phase::Paused || waits_for_operator(service_state) || !is_due(ctx, service_state, health) {
        return None;
    }
    if silent_gate_voter(ctx).is_some() || ctx.unavailable.is_some() {
        return None;
    }
    let unexposed = service_state.service.routing.canary_weight() == Weight::ZERO;
    if unexposed || health.verdict == Some(&Verdict::Promote) {
        return Some(Change::Promote { to: service_state.service.next(false), full: false });
    }
    let analysis = &rollout.spec.analysis;
    let held = ctx.now.mono.millis_since(evidence_since(service_state, health, progress_since));
    match (analysis.inconclusive_after_ms, health.verdict) {
        (Some(after), Some(Verdict::Hold(why))) if held >= after => {
            Some(Change::Pause { reason: format!("inconclusive: {why}") })
        }
        _ => None,
    }
}

/// Returns how much longer than the coordinator this node waits for a step: each further node by name waits longer.
fn patience_ms(ctx: &Context) -> u64 {
    let own = &ctx.settings.node;
    let before = ctx.ledger.members.0.keys().filter(|node| *node < own && ctx.is_live_voter(node)).count() as u64;
    before * STEP_PATIENCE_MS
}

/// Returns the promotion of a healthy rollout that the coordinator should have asked for some time ago.
fn overdue_step(
    ctx: &Context,
    service_state: &ServiceState,
    health: &Health<'_>,
    progress_since: Mono,
    patience_ms: u64,
) -> Option<Change> {
    let since = health.stage_since.after_ms(patience_ms);
    let change = step(
        ctx,
        service_state,
        &Health { stage_since: since, supply: health.supply.clone(), ..*health },
        progress_since,
    )?;
    matches!(change, Change::Promote { .. }).then_some(change)
}

impl Autopilot {
    /// Returns what a rollout waits for, in words for people, and the deadline that runs with the time that is left of it;
    /// `is_decreasing`: a decrease of it is under way or waits here.
    pub fn waiting_for(&self, ctx: &Context, id: &ServiceId, health: &Health<'_>, is_decreasing: bool) -> String {
        let service_state = &ctx.ledger.services[id];
        let refusal = self.of.get(id).map(|progress| progress.refusal.as_str()).unwrap_or_default();
        let what = waiting_for(ctx, service_state, health, is_decreasing, refusal);
        let rollout = &service_state.service.rollout;
        let has_none = !rollout.phase.is_active()
            || rollout.phase == Phase::Paused
            || waits_for_operator(service_state)
            || health.local_hold.is_some()
            || is_decreasing;
        match self.of.get(id).filter(|_| !has_none && is_due(ctx, service_state, health)) {
            Some(progress) => format!("{what}; {}", next_deadline(ctx, service_state, health, progress.since)),
            None => what,
        }
    }
}

/// Returns the deadline that runs, what it does, and the time that is left of it.
fn next_deadline(ctx: &Context, service_state: &ServiceState, health: &Health<'_>, progress_since: Mono) -> String {
    let missing = missing(ctx, health);
    let does = if rolls_back(service_state, &missing) { "rolls it back" } else { "pauses it" };
    let left = |at: Mono| at.millis_since(ctx.now.mono).div_ceil(1000);
    let progress = left(deadline(service_state, progress_since));
    let analysis = &service_state.service.rollout.spec.analysis;
    let is_held = silent_gate_voter(ctx).is_none()
        && ctx.unavailable.is_none()
        && matches!(health.verdict, Some(Verdict::Hold(_)));
    let inconclusive = analysis.inconclusive_after_ms.filter(|_| is_held);
    let inconclusive =
        inconclusive.map(|after| left(evidence_since(service_state, health, progress_since).after_ms(after)));
    match inconclusive {
        Some(seconds) if seconds <= progress => format!("onInconclusive pauses it in {seconds} s"),
        _ => format!("progressDeadline {does} in {progress} s"),
    }
}

/// Returns since when a step that is due waits for evidence. A resumed step has its time for it anew.
fn evidence_since(service_state: &ServiceState, health: &Health<'_>, progress_since: Mono) -> Mono {
    health.stage_since.after_ms(hold_ms(service_state)).max(progress_since)
}

/// Returns, once the window is full, that the canary's traffic never suffices for the limits, behind a semicolon; empty where it
/// may.
fn never(ctx: &Context, service_state: &ServiceState, health: &Health<'_>) -> String {
    let analysis = &service_state.service.rollout.spec.analysis;
    if ctx.now.mono.millis_since(health.stage_since) < analysis.window_ms {
        return String::new();
    }
    let rate = health.canary_answers as f64 / (analysis.window_ms as f64 / 1000.0);
    analysis.never_enough(rate).map(|why| format!("; {why}")).unwrap_or_default()
}

fn waiting_for(
    ctx: &Context,
    service_state: &ServiceState,
    health: &Health<'_>,
    is_decreasing: bool,
    refusal: &str,
) -> String {
    let rollout = &service_state.service.rollout;
    if !rollout.phase.is_active() {
        return String::new();
    }
    if health.local_hold.is_some() || is_decreasing {
        return "the rollback to be decided".into();
    }
    if rollout.phase == Phase::Paused {
        return "an operator: resume, promote or abort".into();
    }
    if waits_for_operator(service_state) {
        return "an operator: promote or abort".into();
    }
    if let Some(node) = silent_gate_voter(ctx) {
        return format!("node {node}, which is silent; cordon it to go on without it");
    }
    if let Some(why) = &ctx.unavailable {
        return format!("what promotions depend on: {why}");
    }
    let left = hold_ms(service_state).saturating_sub(ctx.now.mono.millis_since(health.stage_since));
    if left > 0 {
        return format!("the pause to end, {} s left", left.div_ceil(1000));
    }
    match health.verdict {
        Some(Verdict::Hold(why)) => format!("evidence: {why}{}", never(ctx, service_state, health)),
        Some(Verdict::Pause(why)) => format!("a pause: {why}"),
        _ if refusal.is_empty() => "the nodes' votes".into(),
        _ => format!("the nodes' votes; the last ones: {refusal}"),
    }
}
