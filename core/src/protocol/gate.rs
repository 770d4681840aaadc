//! The health gate: evidence in, votes and local holds out. One for each service.
//!
//! A gate can veto on what this node saw alone; to say Yes it needs enough evidence from all nodes together, so that a
//! node without traffic can vote. Silence is not health.

use std::collections::BTreeMap;

use crate::domain::analysis::{Analysis, StepComparison};
use crate::domain::apply::check_stable;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::query::{NoValue, Query};
use crate::domain::rollout::Change;
use crate::domain::stats::Stats;
use crate::domain::text::bounded;
use crate::domain::time::Mono;
use crate::domain::verdict::Verdict;
use crate::domain::weights::Weight;
use crate::domain::window::{Evidence, Window};

use super::context::{Context, one_round};
use super::event::Event;
use super::log::ledger::ServiceState;
use super::log::record::{Chosen, Operation};
use super::message::{GateVote, HealthSnapshot};
use super::view::Serving;
use super::{Measurement, Observation};

/// One service's evidence at its present routing version, and what follows from it.
#[derive(Debug, Clone)]
struct Gate {
    routing_version: u64,
    window: Window,
    /// The latest answer to each query, and when it came.
    measured: BTreeMap<String, (Mono, Result<f64, NoValue>)>,
    /// The latest snapshot of each peer, and when it came. All are of `routing_version`.
    snapshots: BTreeMap<NodeId, (Mono, HealthSnapshot)>,
    /// Why this node stopped the canary by itself; none while it hasn't.
    local_hold: Option<String>,
    /// Moment at which the hold began.
    held_at: Mono,
    /// What the analysis says at the moment.
    verdict: Option<Verdict>,
    /// When peers are told of it next.
    next_snapshot: Mono,
    /// When its evidence is shown anew.
    next_shown: Mono,
    /// Since when this node knows of the present stage: a pause is measured from here, by the monotonic clock alone. What
    /// came before this node's start, or before it caught up, doesn't count: a wrong time of day can't shorten a pause.
    stage_since: Mono,
}

impl Gate {
    fn new(service_state: &ServiceState, since: Mono) -> Self {
        Self {
            routing_version: service_state.service.routing.version,
            window: Window::default(),
            measured: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            local_hold: None,
            held_at: since,
            verdict: None,
            next_snapshot: Mono::default(),
            next_shown: Mono::default(),
            stage_since: since,
        }
    }

    /// Returns this node's own window.
    fn local(&self) -> &Evidence {
        self.window.total()
    }

    /// Returns what other systems say of the canary; Promote where none is asked.
    fn measured(&self, analysis: &Analysis, now: Mono) -> Verdict {
        let measured = self.answers(analysis, now).map(|(query, answer)| query.judge(answer));
        measured.fold(Verdict::Promote, Verdict::or_worse)
    }

    /// Returns the fresh answer to each query.
    fn answers<'a>(
        &'a self,
        analysis: &'a Analysis,
        now: Mono,
    ) -> impl Iterator<Item = (&'a Query, Option<&'a Result<f64, NoValue>>)> {
        analysis.queries.iter().map(move |query| {
            let answer = self.measured.get(&query.name);
            let fresh = answer.filter(|(at, _)| now.millis_since(*at) <= query.fresh_ms());
            (query, fresh.map(|(_, value)| value))
        })
    }

    /// Returns what is known of the canary's evidence, of which all nodes counted `canary_answers` lately.
    fn supply(&self, analysis: &Analysis, now: Mono, canary_answers: u64) -> Supply {
        if let Some(why) = self.answers(analysis, now).find_map(|(query, answer)| query.outage(answer)) {
            return Supply::Outage(why);
        }
        // Where other systems alone measure, theirs is the silence that counts.
        let (is_silent, is_short) = match analysis.metrics.is_empty() {
            true => (self.answers(analysis, now).all(|(_, answer)| Query::is_silent(answer)), false),
            false => (canary_answers == 0, canary_answers < analysis.min_samples),
        };
        match (is_silent, is_short) {
            (true, _) => Supply::Silent,
            (false, true) => Supply::Short,
            (false, false) => Supply::Enough,
        }
    }

    /// Returns the local hold of a peer that spoke within `age_ms`, and whose.
    fn peer_hold(&self, now: Mono, age_ms: u64) -> Option<(&NodeId, &str)> {
        let fresh = self.snapshots.iter().filter(|(_, (at, _))| now.millis_since(*at) <= age_ms);
        fresh.filter_map(|(node, (_, snapshot))| Some((node, snapshot.local_hold.as_deref()?))).next()
    }

    /// Returns what peers saw, as far as they spoke within `age_ms`.
    fn heard(&self, now: Mono, age_ms: u64) -> impl Iterator<Item = &Evidence> {
        let fresh = self.snapshots.values().filter(move |(at, _)| now.millis_since(*at) <= age_ms);
        fresh.map(|(_, snapshot)| &snapshot.evidence)
    }

    /// Returns the evidence that is no older than `age_ms`: this node's own, and its peers'.
    fn evidence(&self, now: Mono, age_ms: u64) -> Evidence {
        let mut evidence = self.local().clone();
        self.heard(now, age_ms).for_each(|heard| evidence.merge(heard));
        evidence
    }

    /// Returns what that evidence says of the canary, as far as `analysis` reads it: it is asked with each message and each
    /// batch of counts, and adding up distributions is most of its cost.
    fn canary(&self, analysis: &Analysis, now: Mono, age_ms: u64) -> Stats {
        let own = &self.local().canary;
        let mut canary = own.totals();
        match analysis.reads_quantiles() {
            true => {
                canary = own.clone();
                self.heard(now, age_ms).for_each(|heard| canary += &heard.canary);
            }
            false => self.heard(now, age_ms).for_each(|heard| canary.add_totals(&heard.canary)),
        }
        canary
    }

    /// The worst of: the limits on what the cluster saw, the limits on what this node saw where that is a veto, the
    /// comparison with stable, and what other systems measured.
    fn judge(&self, now: Mono, service_state: &ServiceState, canary: &Stats, compared: StepComparison) -> Verdict {
        let analysis = &service_state.service.rollout.spec.analysis;
        let alone = match analysis.judge_alone(self.local()) {
            veto @ (Verdict::Rollback(_) | Verdict::Pause(_)) => veto,
            Verdict::Promote | Verdict::Hold(_) => Verdict::Promote,
        };
        let StepComparison { verdict, samples } = compared;
        let compared = match verdict {
            // At 100 % there is no stable traffic left to compare with: the limits alone watch the canary.
            Verdict::Hold(_) if service_state.service.routing.canary_weight() == Weight::FULL => Verdict::Promote,
            verdict => verdict,
        };
        let seen = analysis.judge_canary(canary).or_worse(samples).or_worse(alone).or_worse(compared);
        seen.or_worse(self.measured(analysis, now))
    }
}

/// The gates of all services.
#[derive(Debug, Clone)]
pub(super) struct Gates {
    of: BTreeMap<ServiceId, Gate>,
    /// The service that had its turn last, and when.
    turned: (Option<ServiceId>, Mono),
}

/// What there is to judge a canary by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Supply {
    /// Another system gives no usable answer, and why: that says nothing about the canary.
    Outage(String),
    /// Nothing was seen of the canary.
    Silent,
    /// Something was seen, fewer answers than a verdict needs.
    Short,
    /// As many answers as a verdict needs.
    Enough,
}

/// What others may know of a gate.
#[derive(Debug, Clone)]
pub(super) struct Health<'g> {
    /// Why this node stopped the canary by itself, and when; none while it hasn't.
    pub local_hold: Option<(&'g str, Mono)>,
    /// A peer that stopped its canary traffic by itself, as far as its word is fresh, and why.
    pub peer_hold: Option<(&'g NodeId, &'g str)>,
    /// What the analysis says at the moment.
    pub verdict: Option<&'g Verdict>,
    /// Since when this node knows of the present stage.
    pub stage_since: Mono,
    /// What there is to judge the canary by.
    pub supply: Supply,
    /// The canary's answers that all nodes saw in the window.
    pub canary_answers: u64,
}

/// How long it takes until all services had their turn.
const ROUND_MS: u64 = 100;
/// Services that have their turn together at most: what is told of them fits into the queue of messages to a peer, which drops
/// what doesn't, with room for what else is said.
const TURN_MAX: u64 = 200;
/// Services a second whose evidence is shown anew, when nothing else about them changes: of a few each with every snapshot, of
/// a thousand each once a second.
const SHOWN_PER_SECOND: u64 = 1_000;

impl Gates {
    pub fn new(now: Mono) -> Self {
        Self { of: BTreeMap::new(), turned: (None, now) }
    }

    /// Returns all services, in order.
    pub fn services(&self) -> Vec<ServiceId> {
        self.of.keys().cloned().collect()
    }

    /// Returns the services whose turn it is, so that each has one at least each [`ROUND_MS`]: of many a few at a time, so that
    /// a request in between isn't kept waiting; at most [`TURN_MAX`], also after the node stood still.
    pub fn next_turn(&mut self, now: Mono) -> Vec<ServiceId> {
        let (last, before) = &self.turned;
        let most = self.of.len() as u64 * now.millis_since(*before) / ROUND_MS + 1;
        let turn: Vec<_> = one_round(&self.of, last.as_ref()).take(most.min(TURN_MAX) as usize).cloned().collect();
        self.turned = (turn.last().cloned(), now);
        turn
    }

    /// Returns the routing version that a service's evidence is of; none for an unknown service.
    pub fn routing_version(&self, id: &ServiceId) -> Option<u64> {
        self.of.get(id).map(|gate| gate.routing_version)
    }

    /// Returns what others may know of a service's gate.
    pub fn health(&self, ctx: &Context, id: &ServiceId) -> Health<'_> {
        let gate = &self.of[id];
        let (now, age_ms) = (ctx.now.mono, ctx.settings.timings.evidence_age_ms_max);
        let heard = gate.heard(now, age_ms).map(|evidence| evidence.canary.count);
        let canary_answers = gate.local().canary.count + heard.sum::<u64>();
        let analysis = &ctx.ledger.services[id].service.rollout.spec.analysis;
        Health {
            local_hold: gate.local_hold.as_deref().map(|why| (why, gate.held_at)),
            peer_hold: gate.peer_hold(now, age_ms),
            verdict: gate.verdict.as_ref(),
            stage_since: gate.stage_since,
            supply: gate.supply(analysis, now, canary_answers),
            canary_answers,
        }
    }

    /// Returns why this node stopped a canary by itself; none while it hasn't.
    pub fn local_hold(&self, id: &ServiceId) -> Option<&str> {
        self.of[id].local_hold.as_deref()
    }

    /// Returns this node's own window.
    pub fn local(&self, id: &ServiceId) -> &Evidence {
        self.of[id].local()
    }

    /// Returns what all nodes saw, as far as their word is fresh.
    pub fn cluster(&self, ctx: &Context, id: &ServiceId) -> Evidence {
        self.of[id].evidence(ctx.now.mono, ctx.settings.timings.evidence_age_ms_max)
    }

    /// Returns what other systems say of the canary; Promote where none is asked.
    pub fn measured(&self, ctx: &Context, id: &ServiceId) -> Verdict {
        self.of[id].measured(&ctx.ledger.services[id].service.rollout.spec.analysis, ctx.now.mono)
    }

    /// Takes in the data plane's counts. Returns false for an unknown service.
    pub fn observe(&mut self, now: Mono, observation: &Observation) -> bool {
        let Some(gate) = self.of.get_mut(&observation.service) else { return false };
        if gate.routing_version == observation.routing_version {
            gate.window.add(now, &observation.evidence);
        }
        true
    }

    /// Takes in another system's metric. Returns false when it is of another routing version.
    pub fn measure(&mut self, now: Mono, measurement: Measurement) -> bool {
        let Measurement { service, routing_version, name, value } = measurement;
        let gate = self.of.get_mut(&service).filter(|gate| gate.routing_version == routing_version);
        gate.map(|gate| gate.measured.insert(name, (now, value))).is_some()
    }

    /// Takes in a peer's evidence. Returns false when it is of another routing version than the present one, so that it
    /// counts for nothing.
    pub fn hear(&mut self, now: Mono, from: &NodeId, snapshot: HealthSnapshot) -> bool {
        let gate = self.of.get_mut(&snapshot.service);
        let Some(gate) = gate.filter(|gate| gate.routing_version == snapshot.routing_version) else { return false };
        let local_hold = snapshot.local_hold.map(bounded);
        let snapshot = HealthSnapshot { transfer: None, tick_samples: Vec::new(), local_hold, ..snapshot };
        gate.snapshots.insert(from.clone(), (now, snapshot));
        true
    }

    /// Lets a gate's window go on. Returns true when it is time to judge it and to tell peers.
    pub fn tick(&mut self, ctx: &mut Context, id: &ServiceId) -> bool {
        let now = ctx.now.mono;
        let shown_every_ms = self.of.len() as u64 * 1_000 / SHOWN_PER_SECOND;
        let gate = self.of.get_mut(id).expect("every service has a gate");
        gate.window.expire(now, ctx.ledger.services[id].service.rollout.spec.analysis.window_ms);
        let is_due = now >= gate.next_snapshot;
        if is_due {
            gate.next_snapshot = now.after_ms(ctx.settings.timings.snapshot_ms);
        }
        if is_due && now >= gate.next_shown {
            gate.next_shown = now.after_ms(shown_every_ms);
            ctx.outdated.evidence.insert(id.clone());
        }
        is_due
    }

    /// Returns true when this node has evidence to tell of.
    pub fn has_news(&self, id: &ServiceId) -> bool {
        *self.of[id].local() != Evidence::default()
    }

    /// Returns what this node tells of a service; the fields of its analysis run are to be added.
    pub fn snapshot(&self, id: &ServiceId, serving: &Serving, lease_ms_left: u64) -> HealthSnapshot {
        let gate = &self.of[id];
        let leased = serving.lease_ms.is_none() || lease_ms_left > 0;
        HealthSnapshot {
            service: id.clone(),
            routing_version: gate.routing_version,
            evidence: gate.local().clone(),
            local_hold: gate.local_hold.clone(),
            lease_ms_left,
            effective_bp: serving.canary.as_ref().map_or(0, |(_, bp)| if leased { *bp } else { 0 }),
            rollout_generation: 0,
            tick_samples: Vec::new(),
            asks: None,
            transfer: None,
        }
    }

    /// Judges the evidence anew, together with what the comparison with stable says; returns the harm that it shows.
    pub fn judge(&mut self, ctx: &mut Context, id: &ServiceId, compared: StepComparison) -> Option<String> {
        let service_state = &ctx.ledger.services[id];
        if !service_state.service.rollout.phase.is_active() {
            return None;
        }
        let analysis = &service_state.service.rollout.spec.analysis;
        let (now, age_ms) = (ctx.now.mono, ctx.settings.timings.evidence_age_ms_max);
        let gate = self.of.get_mut(id).expect("every service has a gate");
        let canary = gate.canary(analysis, now, age_ms);
        let verdict = gate.judge(now, service_state, &canary, compared);
        if gate.verdict.as_ref().map(Verdict::word) != Some(verdict.word()) {
            let (service, verdict, samples) = (id.clone(), verdict.clone(), canary.count);
            ctx.announce(Event::Verdict { service, routing_version: gate.routing_version, verdict, samples });
            ctx.outdated.evidence.insert(id.clone());
        }
        let harm = match &verdict {
            Verdict::Rollback(why) => Some(why.clone()),
            _ => None,
        };
        gate.verdict = Some(verdict);
        harm
    }

    /// Stops this node's canary traffic. Returns false when there is none, or it was stopped before.
    pub fn hold(&mut self, ctx: &mut Context, id: &ServiceId, reason: &str) -> bool {
        let exposed = ctx.ledger.services[id].service.routing.canary_model_id.is_some();
        let gate = self.of.get_mut(id).expect("every service has a gate");
        if !exposed || gate.local_hold.is_some() {
            return false;
        }
        gate.local_hold = Some(reason.into());
        gate.held_at = ctx.now.mono;
        ctx.outdated.services.insert(id.clone());
        true
    }

    /// Returns this node's vote on an operation, by evidence no older than `age_ms` and what the comparison with stable says.
    pub fn vote(&self, ctx: &Context, operation: &Operation, age_ms: u64, compared: StepComparison) -> GateVote {
        let Operation::Change(id, change) = operation else { return GateVote::Yes("needs no gate".into()) };
        if !change.increases_exposure() {
            return GateVote::Yes("needs no gate".into());
        }
        if let Some(why) = &ctx.unavailable {
            return GateVote::Abstain(why.clone());
        }
        let known = ctx.ledger.services.get(id);
        let spec = match change {
            Change::Start(spec) => Some(spec),
            _ => known.map(|service_state| &service_state.service.rollout.spec),
        };
        if let Some(Err(why)) = spec.map(|spec| spec.known()) {
            return GateVote::No(why.to_string());
        }
        let Some(service_state) = known else { return GateVote::Yes("no canary traffic yet".into()) };
        if let Change::Start(spec) = change
            && let Err(why) = check_stable(&service_state.service.stable, &spec.stable)
        {
            return GateVote::No(why.to_string());
        }
        if service_state.increase.as_ref().is_some_and(|increase| increase.in_doubt) {
            return GateVote::No("the last increase was decided in doubt and must be reverted first".into());
        }
        let Change::Promote { full, .. } = change else { return GateVote::Yes("no canary traffic yet".into()) };
        let gate = &self.of[id];
        if let Some(why) = &gate.local_hold {
            return GateVote::No(format!("local hold: {why}"));
        }
        if service_state.service.routing.canary_weight() == Weight::ZERO {
            return GateVote::Yes("no canary traffic yet".into());
        }
        let canary = gate.canary(&service_state.service.rollout.spec.analysis, ctx.now.mono, age_ms);
        let seen = describe(&canary);
        match gate.judge(ctx.now.mono, service_state, &canary, compared) {
            Verdict::Promote => GateVote::Yes(seen),
            Verdict::Hold(why) if *full => GateVote::Yes(format!("{why}; the operator skipped the wait")),
            Verdict::Hold(why) => GateVote::Abstain(why),
            Verdict::Pause(why) | Verdict::Rollback(why) => GateVote::No(why),
        }
    }

    /// Gives each service that has no gate for its routing version one that knows nothing yet; returns those, and since when
    /// their stages last by the time of day, which only the deadline for progress goes by.
    pub fn restart(&mut self, ctx: &Context) -> Vec<(ServiceId, Mono)> {
        let now = ctx.now;
        let mut before = std::mem::take(&mut self.of);
        let mut fresh = Vec::new();
        for (id, service_state) in &ctx.ledger.services {
            // A local hold, and the evidence behind it, outlives a checkpoint that changes nothing about them.
            let same = |gate: &Gate| gate.routing_version == service_state.service.routing.version;
            let gate = before.remove(id).filter(same).unwrap_or_else(|| {
                let since = now.mono.before_ms(now.wall.0.saturating_sub(service_state.service.routing.timestamp.0));
                fresh.push((id.clone(), since));
                Gate::new(service_state, now.mono)
            });
            self.of.insert(id.clone(), gate);
        }
        fresh
    }

    /// Begins evidence anew where a decided record changed the weights; returns since when the stage lasts by the time of day,
    /// if it did.
    pub fn renew(&mut self, ctx: &Context, chosen: &Chosen) -> Option<Mono> {
        let operation = &chosen.record.intent.operation;
        let id = operation.service().filter(|_| !operation.is_verdict())?;
        let service_state = ctx.ledger.services.get(id)?;
        let now = ctx.now.mono;
        let gate = self.of.entry(id.clone()).or_insert_with(|| Gate::new(service_state, now));
        if gate.routing_version == service_state.service.routing.version && gate.stage_since != Mono::default() {
            return None;
        }
        let before = gate.local_hold.take().map(|why| (why, gate.held_at));
        // A record caught up with late began its stage when it was made, as far as wall clocks agree.
        let late = ctx.now.wall.0.saturating_sub(service_state.service.routing.timestamp.0);
        let since = now.before_ms(late.min(LATE_MS_MAX));
        *gate = Gate::new(service_state, now);
        let started = matches!(operation, Operation::Change(_, Change::Start(_)));
        if let (Some((why, at)), false) = (before, started || service_state.service.routing.canary_model_id.is_none()) {
            (gate.local_hold, gate.held_at) = (Some(why), at);
        }
        Some(since)
    }
}

/// Longest time that a record is believed to be old, by comparing wall clocks: a year.
const LATE_MS_MAX: u64 = 365 * 24 * 3600 * 1000;

/// Returns evidence in words, for votes and logs.
fn describe(canary: &Stats) -> String {
    let percent = canary.error_rate().unwrap_or(0.0) * 100.0;
    let mean = canary.mean_ms().unwrap_or(0.0);
    format!("{} canary answers, {percent:.2} % errors, mean {mean:.1} ms", canary.count)
}
