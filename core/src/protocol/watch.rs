//! The watch over one rollout's canary: this node's part in its trial. One for each service with a rollout under way; unlike
//! a gate it goes on when the weight changes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use crate::domain::analysis::Verdict;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::time::{Mono, Now};
use crate::domain::timeline::Sighting;
use crate::domain::trial::{Judgement, Odds, Trial};
use crate::domain::window::Evidence;

use super::coordinator::Wish;
use super::core::{Core, one_round};
use super::ledger::Agreed;
use super::message::{Asks, Handover, HealthSnapshot, Message, Role};
use super::record::{Act, SavedTrial};
use super::{Event, Output};

/// Length of a tick, in milliseconds.
const TICK_MS: u64 = 250;
/// Ticks that are told again and again, in case a message is lost.
const TOLD_AGAIN: usize = 4;
/// A record that isn't older than this was made just now; wall clocks needn't agree any better.
const JUST_NOW_MS: u64 = 2_000;

/// Closed windows that wait to be decided; the oldest are forgotten, and decided as unseen.
const CLOSED_MAX: usize = 64;
/// Windows that wait for their slots at a time.
const JUDGED_AT_ONCE: usize = 16;
/// How long after its end a window is decided that this node has nothing to say of.
const UNSEEN_MS: u64 = 10_000;

/// How long a peer has for handing its trial over before the next one is asked.
const ASKED_MS: u64 = 500;
/// How long peers are asked before a trial is begun anew.
const ASKING_MS: u64 = 4_000;
/// Trials that are asked for at a time; to go on with its own, a node needs to ask nobody.
const ASKED_AT_ONCE: usize = 128;
/// Sightings of peers that are kept for a trial that isn't there yet.
const HEARD_MAX: usize = 256;

/// Between two times that a trial is saved, at least: of many one at each tick of the core.
const SAVED_EVERY_MS: u64 = 1_000;

/// What this node saw of one rollout, and what it makes of that and of its peers' word.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    since_version: u64,
    /// When the rollout began, on this node's clock.
    began: Mono,
    /// The tick that this node is in, and what it saw in it.
    open: (u64, Sighting),
    /// Its last ticks.
    recent: VecDeque<(u64, Sighting)>,
    trial: Trial<NodeId>,
    /// Windows that are closed here, and not decided yet as far as this node knows.
    closed: VecDeque<Judgement>,
    /// This node came late, and asks for a peer's trial; its own waits meanwhile.
    asking: Option<Asking>,
    /// When the trial is saved next.
    save_at: Mono,
}

/// How a node that came late gets the trial as far as it went.
#[derive(Debug, Clone, Default)]
struct Asking {
    /// Since when it asks; none while it can't, or while others are asked for first.
    since: Option<Mono>,
    /// Whom it asks, and since when.
    whom: Option<(NodeId, Mono)>,
    /// Peers that ask themselves, and how far the trials go that they saved: they have nothing else to hand over.
    also: BTreeMap<NodeId, u64>,
    /// What peers tell meanwhile.
    heard: BTreeMap<(u64, NodeId), Sighting>,
    /// The trial that this node saved before it restarted, and when the rollout began by that, on its present clock.
    saved: Option<(Mono, Handover)>,
}

impl Asking {
    /// Returns who saved most, and how much, where all who are `expected` ask; ties go to the first by name. Who isn't expected to see
    /// anything isn't chosen by the others, and so not by itself.
    fn best<'n>(&self, own: &'n NodeId, expected: &'n [NodeId]) -> Option<(u64, &'n NodeId)> {
        let saved = |node: &'n NodeId| match node == own {
            true => Some((self.saved(), Reverse(node))),
            false => self.also.get(node).map(|saved| (*saved, Reverse(node))),
        };
        let all: Option<Vec<_>> = expected.iter().map(saved).collect();
        all?.into_iter().max().map(|(saved, Reverse(node))| (saved, node))
    }

    /// Chooses whom to ask: who saved most where all of `expected` ask, else each in turn who doesn't. Returns false once it was
    /// enough.
    fn turn(&mut self, own: &NodeId, expected: &[NodeId], now: Mono) -> bool {
        if now.millis_since(*self.since.get_or_insert(now)) >= ASKING_MS {
            return false;
        }
        if let Some((_, best)) = self.best(own, expected) {
            self.whom = Some((best.clone(), now));
            return true;
        }
        let peers: Vec<_> = expected.iter().filter(|node| *node != own && !self.also.contains_key(*node)).collect();
        let place = self.whom.as_ref().and_then(|(whom, _)| peers.iter().position(|peer| *peer == whom));
        let is_over = self.whom.as_ref().is_none_or(|(_, at)| now.millis_since(*at) >= ASKED_MS);
        if (place.is_none() || is_over) && !peers.is_empty() {
            self.whom = Some((peers[place.map_or(0, |place| (place + 1) % peers.len())].clone(), now));
        }
        true
    }

    fn has_begun(&self) -> bool {
        self.since.is_some()
    }

    /// Returns how far the trial goes that this node saved, in milliseconds since the rollout began; 0: there is none.
    fn saved(&self) -> u64 {
        self.saved.as_ref().map_or(0, |(_, handover)| handover.at_ms.max(1))
    }
}

impl Watch {
    /// Returns the watch over a rollout that this node learned of just now; `restarts` when it may have known it before, and
    /// `saved` its trial.
    fn new(agreed: &Agreed, now: Now, restarts: bool, saved: Option<SavedTrial>) -> Self {
        let rollout = &agreed.service.rollout;
        let age_ms = now.wall.0.saturating_sub(rollout.since.0);
        let is_late = age_ms >= JUST_NOW_MS;
        let began = now.mono.before_ms(if is_late { age_ms } else { 0 });
        let at_ms = now.mono.millis_since(began);
        let analysis = rollout.spec.analysis.clone();
        let policy = analysis.sequential(rollout.spec.planned_ms());
        let trial = Trial::new(analysis, policy, TICK_MS, at_ms);
        let saved =
            saved.filter(|saved| saved.since_version == rollout.since_version && saved.trial.trial.is_like(&trial));
        let saved = saved.map(|SavedTrial { at, trial, .. }| {
            let since_ms = trial.at_ms.saturating_add(now.wall.0.saturating_sub(at.0));
            (now.mono.before_ms(since_ms), trial)
        });
        Self {
            since_version: rollout.since_version,
            began,
            open: (at_ms / TICK_MS, Sighting::default()),
            recent: VecDeque::new(),
            trial,
            closed: VecDeque::new(),
            asking: (is_late || restarts).then(|| Asking { saved, ..Asking::default() }),
            save_at: now.mono,
        }
    }

    /// Takes what this node saw.
    pub fn observe(&mut self, version: u64, evidence: &Evidence) {
        if version >= self.since_version && *evidence != Evidence::default() {
            self.open.1.merge(&Sighting { version, evidence: evidence.clone() });
        }
    }

    /// Takes what a peer saw, and its trial where this node asks for one.
    pub fn hear(&mut self, own: &NodeId, from: &NodeId, snapshot: &HealthSnapshot, now: Mono) {
        if snapshot.since_version != self.since_version {
            return;
        }
        match (&mut self.asking, &snapshot.handover) {
            (Some(_), Some(handover)) => self.take_over(own, handover, now),
            (Some(asking), None) => match &snapshot.asks {
                Some(asks) => drop(asking.also.insert(from.clone(), asks.saved)),
                None => drop(asking.also.remove(from)),
            },
            (None, _) => {}
        }
        for (tick, sighting) in &snapshot.sightings {
            match &mut self.asking {
                Some(asking) if asking.heard.len() < HEARD_MAX => {
                    asking.heard.insert((*tick, from.clone()), sighting.clone());
                }
                Some(_) => {}
                None => _ = self.trial.put(from, *tick, sighting),
            }
        }
    }

    /// Goes on with a peer's trial, as if this node had conducted it: in the peer's ticks, after those that it knows of.
    fn take_over(&mut self, own: &NodeId, handover: &Handover, now: Mono) {
        if self.trial.is_like(&handover.trial) {
            self.go_on(own, now.before_ms(handover.at_ms), handover.clone(), now);
        }
    }

    /// Goes on with a trial of a rollout that began then.
    fn go_on(&mut self, own: &NodeId, began: Mono, Handover { trial, closed, .. }: Handover, now: Mono) {
        self.trial = trial;
        self.closed = closed.into();
        self.began = began;
        self.open.0 = self.trial.next_of(own).max(now.millis_since(began) / TICK_MS);
        self.stop_asking();
    }

    /// Goes on without a peer's trial: with what this node saved before it restarted, or with what it saw since. Returns what was
    /// decided by that.
    fn go_on_alone(&mut self, own: &NodeId, now: Mono) -> Vec<Judgement> {
        let saved = self.asking.as_mut().and_then(|asking| asking.saved.take());
        let Some((began, mut handover)) = saved else {
            self.stop_asking();
            return Vec::new();
        };
        let judgements = handover.trial.wake(now.millis_since(began));
        self.go_on(own, began, handover, now);
        judgements
    }

    /// Takes what peers told meanwhile into the trial that is there.
    fn stop_asking(&mut self) {
        for ((tick, from), sighting) in self.asking.take().into_iter().flat_map(|asking| asking.heard) {
            self.trial.put(&from, tick, &sighting);
        }
    }

    /// Returns what is handed to a peer that came late, when windows are decided up to `judged_ms`; none while this node asks
    /// itself.
    fn handover(&self, judged_ms: u64, now: Mono) -> Option<Handover> {
        let at_ms = now.millis_since(self.began);
        let closed = self.closed.iter().filter(|judgement| judgement.from_ms >= judged_ms).cloned().collect();
        self.asking.is_none().then(|| Handover { at_ms, trial: self.trial.clone(), closed })
    }

    /// Returns what peers are told: which rollout, the last ticks, and who is asked for the trial.
    pub fn told(&self) -> (u64, Vec<(u64, Sighting)>, Option<Asks>) {
        let asks = self
            .asking
            .as_ref()
            .map(|asking| Asks { whom: asking.whom.as_ref().map(|(whom, _)| whom.clone()), saved: asking.saved() });
        (self.since_version, self.recent.iter().cloned().collect(), asks)
    }

    /// Returns the window that is next to be decided, once it is closed; one that nobody here saw the whole of is decided, with
    /// all that follow it, when whoever did had its time.
    fn next_window(&mut self, agreed: &Agreed, now: Mono) -> Option<Judgement> {
        if self.asking.is_some() {
            return None;
        }
        let from_ms = agreed.judged_ms;
        while self.closed.front().is_some_and(|judgement| judgement.from_ms < from_ms) {
            self.closed.pop_front();
        }
        let length = agreed.service.rollout.spec.analysis.window_ms;
        match self.closed.front() {
            Some(next) if next.from_ms == from_ms => Some(next.clone()),
            Some(later) => Some(Judgement::unseen(from_ms, later.from_ms)),
            None => {
                let over_ms = now.millis_since(self.began).saturating_sub(UNSEEN_MS);
                let to_ms = over_ms / length * length;
                (to_ms > from_ms).then(|| Judgement::unseen(from_ms, to_ms))
            }
        }
    }

    /// Returns the comparison's reckoning.
    pub fn odds(&self) -> Option<Odds> {
        self.trial.odds()
    }

    /// Closes this node's tick when it is over.
    fn turn(&mut self, own: &NodeId, at_ms: u64) {
        let now = at_ms / TICK_MS;
        if now <= self.open.0 {
            return;
        }
        let (tick, sighting) = std::mem::replace(&mut self.open, (now, Sighting::default()));
        self.trial.put(own, tick, &sighting);
        self.recent.push_back((tick, sighting));
        // Ticks that this node didn't look at, because it was busy: nothing was seen in them that isn't in the one before.
        for skipped in (tick + 1).max(now.saturating_sub(TOLD_AGAIN as u64))..now {
            self.trial.put(own, skipped, &Sighting::default());
            self.recent.push_back((skipped, Sighting::default()));
        }
        while self.recent.len() > TOLD_AGAIN {
            self.recent.pop_front();
        }
    }
}

impl Core {
    /// Begins the watch over a rollout that this node learned of, ends those that are over; `restarts` when it may have known
    /// the rollout before.
    pub(super) fn renew_watch(&mut self, id: &ServiceId, restarts: bool) {
        let Some(agreed) = self.ledger.services.get(id) else { return };
        let rollout = &agreed.service.rollout;
        if !rollout.phase.is_active() {
            if self.watches.remove(id).is_some() {
                self.out.push(Output::SaveTrial(id.clone(), None));
            }
        } else if self.watches.get(id).is_none_or(|watch| watch.since_version != rollout.since_version) {
            let saved = self.trials.remove(id);
            self.watches.insert(id.clone(), Watch::new(agreed, self.now, restarts, saved));
        }
    }

    pub(super) fn tick_watches(&mut self, services: &[ServiceId]) {
        let now = self.now.mono;
        let expected: Vec<NodeId> =
            self.ledger.membership.gate_voters().filter(|node| self.is_live_voter(node)).cloned().collect();
        let own = self.settings.node.clone();
        // Without a vote or a majority nothing goes on anyway: whoever has the trial, or saved most of it, may still come.
        let voters = self.ledger.membership.0.keys().filter(|node| self.is_live_voter(node)).count();
        let can_ask = self.role() == Role::Voter && voters >= self.ledger.membership.quorum();
        let asked = self.watches.values().filter(|watch| watch.asking.as_ref().is_some_and(Asking::has_begun)).count();
        let mut free = ASKED_AT_ONCE.saturating_sub(asked);
        let mut judged = Vec::new();
        for id in services {
            let Some(watch) = self.watches.get_mut(id) else { continue };
            let mut judgements = Vec::new();
            if let Some(asking) = &mut watch.asking {
                let alone = asking.best(&own, &expected).is_some_and(|(saved, best)| saved == 0 || *best == own);
                if !can_ask {
                    (asking.since, asking.whom) = (None, None);
                    continue;
                }
                if !alone && !asking.has_begun() {
                    if free == 0 {
                        continue;
                    }
                    free -= 1;
                }
                if !alone && asking.turn(&own, &expected, now) {
                    continue;
                }
                judgements = watch.go_on_alone(&own, now);
            }
            let at_ms = now.millis_since(watch.began);
            watch.turn(&own, at_ms);
            judgements.extend(watch.trial.advance(at_ms, expected.iter()));
            for judgement in judgements {
                if judgement.is_window {
                    watch.closed.push_back(judgement);
                    continue;
                }
                judged.push((id.clone(), watch.since_version, judgement));
            }
            while watch.closed.len() > CLOSED_MAX {
                watch.closed.pop_front();
            }
        }
        for (service, since_version, judgement) in judged {
            self.outdated.services.insert(service.clone());
            self.announce(Event::Judged { slot: None, service: service.clone(), since_version, judgement });
            self.judge(&service);
        }
        self.save_trial();
    }

    /// Saves the trial whose turn it is.
    fn save_trial(&mut self) {
        let Some(id) = one_round(&self.watches, self.saved_last.as_ref()).next().cloned() else { return };
        let watch = self.watches.get_mut(&id).expect("a watch just found");
        if self.now.mono < watch.save_at {
            return;
        }
        watch.save_at = self.now.mono.after_ms(SAVED_EVERY_MS);
        self.saved_last = Some(id.clone());
        let judged_ms = self.ledger.services[&id].judged_ms;
        if let Some(trial) = watch.handover(judged_ms, self.now.mono) {
            let saved = SavedTrial { since_version: watch.since_version, at: self.now.wall, trial };
            self.out.push(Output::SaveTrial(id, Some(Box::new(saved))));
        }
    }

    /// Hands the trial of a service to a peer that asks this node for it.
    pub(super) fn hand_over(&mut self, to: &NodeId, id: &ServiceId, since_version: u64) {
        let watch = self.watches.get(id).filter(|watch| watch.since_version == since_version);
        let judged_ms = self.ledger.services[id].judged_ms;
        let Some(handover) = watch.and_then(|watch| watch.handover(judged_ms, self.now.mono)) else { return };
        let snapshot = HealthSnapshot { handover: Some(Box::new(handover)), ..self.snapshot(id) };
        self.send(to, Message::HealthSnapshot(snapshot));
    }

    /// Asks for the next closed window of each rollout to be decided. A verdict can wait: it never contends for a slot that
    /// somebody's transaction is open in, which would put a raise in doubt.
    pub(super) fn judge_windows(&mut self) {
        if self.register.accepted.is_some() || self.prepared.is_some() || !self.desk.is_free() {
            return;
        }
        let mut due = Vec::new();
        for (id, watch) in &mut self.watches {
            let (agreed, now) = (&self.ledger.services[id], self.now.mono);
            if let Some(judgement) = watch.next_window(agreed, now) {
                // What other systems measured isn't counted by windows; it is asked when one is decided.
                let measured = self.gates[id].measured(&agreed.service.rollout.spec.analysis, now);
                let judgement = Judgement { verdict: judgement.verdict.or_worse(measured), ..judgement };
                let overdue_ms = self.now.mono.millis_since(watch.began).saturating_sub(judgement.to_ms);
                due.push((overdue_ms, id.clone(), watch.since_version, judgement));
            }
        }
        // Many may be due at once. A few wait for their slots at a time, so that whoever else asks isn't kept waiting.
        self.more_windows = due.len() > JUDGED_AT_ONCE;
        due.sort_by_key(|(overdue_ms, ..)| std::cmp::Reverse(*overdue_ms));
        for (_, service, since_version, judgement) in due.into_iter().take(JUDGED_AT_ONCE) {
            self.wish(Wish::Act(Act::Judge { service, since_version, judgement: Box::new(judgement) }));
        }
    }

    /// Returns what the comparison with stable says of a rollout; Promote where there is none to make.
    pub(super) fn compared(&self, agreed: &Agreed) -> Verdict {
        let rollout = &agreed.service.rollout;
        if !rollout.spec.analysis.compares() {
            return Verdict::Promote;
        }
        let watch =
            self.watches.get(&rollout.spec.service).filter(|watch| watch.since_version == rollout.since_version);
        let Some(watch) = watch else { return Verdict::Hold("nothing to compare yet".into()) };
        let why = match &watch.asking {
            Some(_) => "this node came late, and asks its peers for what they know",
            None => "nothing to compare yet",
        };
        match watch.trial.verdict() {
            // It is of the weight before, where nothing was seen at this one yet.
            Some(Verdict::Promote) if watch.trial.version() < agreed.service.routing.version => {
                Verdict::Hold("nothing to compare at this weight yet".into())
            }
            verdict => verdict.unwrap_or_else(|| Verdict::Hold(why.into())),
        }
    }
}
