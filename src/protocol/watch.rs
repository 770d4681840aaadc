//! The watch over one rollout's canary: this node's part in its trial. One for each service with a rollout under way; unlike
//! a gate it goes on when the weight changes.

use std::collections::VecDeque;

use crate::domain::analysis::Verdict;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::time::{Mono, Now};
use crate::domain::timeline::Sighting;
use crate::domain::trial::{Judgement, Odds, Trial};
use crate::domain::window::Evidence;

use super::Event;
use super::coordinator::Wish;
use super::core::Core;
use super::ledger::Agreed;
use super::message::HealthSnapshot;
use super::record::Act;

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
}

impl Watch {
    fn new(agreed: &Agreed, now: Now) -> Self {
        let rollout = &agreed.service.rollout;
        let age_ms = now.wall.0.saturating_sub(rollout.since.0);
        let began = now.mono.before_ms(if age_ms < JUST_NOW_MS { 0 } else { age_ms });
        let at_ms = now.mono.millis_since(began);
        let analysis = rollout.spec.analysis.clone();
        let policy = analysis.sequential(rollout.spec.planned_ms());
        Self {
            since_version: rollout.since_version,
            began,
            open: (at_ms / TICK_MS, Sighting::default()),
            recent: VecDeque::new(),
            trial: Trial::new(analysis, policy, TICK_MS, at_ms),
            closed: VecDeque::new(),
        }
    }

    /// Takes what this node saw.
    pub fn observe(&mut self, version: u64, evidence: &Evidence) {
        if version >= self.since_version && *evidence != Evidence::default() {
            self.open.1.merge(&Sighting { version, evidence: evidence.clone() });
        }
    }

    /// Takes what a peer saw.
    pub fn hear(&mut self, from: &NodeId, snapshot: &HealthSnapshot) {
        if snapshot.since_version == self.since_version {
            snapshot.sightings.iter().for_each(|(tick, sighting)| {
                self.trial.put(from, *tick, sighting);
            });
        }
    }

    /// Returns what peers are told: which rollout, and the last ticks.
    pub fn sightings(&self) -> (u64, Vec<(u64, Sighting)>) {
        (self.since_version, self.recent.iter().cloned().collect())
    }

    /// Returns the window that is next to be decided, once it is closed; one that nobody here saw the whole of is decided, with
    /// all that follow it, when whoever did had its time.
    fn next_window(&mut self, agreed: &Agreed, now: Mono) -> Option<Judgement> {
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
    /// Begins the watch over a rollout that this node learned of, ends those that are over.
    pub(super) fn renew_watch(&mut self, id: &ServiceId) {
        let Some(agreed) = self.ledger.services.get(id) else { return };
        let rollout = &agreed.service.rollout;
        if !rollout.phase.is_active() {
            self.watches.remove(id);
        } else if self.watches.get(id).is_none_or(|watch| watch.since_version != rollout.since_version) {
            self.watches.insert(id.clone(), Watch::new(agreed, self.now));
        }
    }

    pub(super) fn tick_watches(&mut self) {
        let now = self.now.mono;
        let expected: Vec<NodeId> =
            self.ledger.membership.gate_voters().filter(|node| self.is_live_voter(node)).cloned().collect();
        let own = self.settings.node.clone();
        let mut judged = Vec::new();
        for (id, watch) in &mut self.watches {
            let at_ms = now.millis_since(watch.began);
            watch.turn(&own, at_ms);
            for judgement in watch.trial.advance(at_ms, expected.iter()) {
                if judgement.is_window {
                    watch.closed.push_back(judgement);
                    continue;
                }
                let (service, since_version) = (id.clone(), watch.since_version);
                judged.push(Event::Judged { slot: None, service, since_version, judgement });
            }
            while watch.closed.len() > CLOSED_MAX {
                watch.closed.pop_front();
            }
        }
        if !judged.is_empty() {
            self.dirty = true;
            judged.into_iter().for_each(|event| self.announce(event));
            self.judge_all();
        }
    }

    /// Asks for the next closed window of each rollout to be decided. A verdict can wait: it never contends for a slot that
    /// somebody's transaction is open in, which would put a raise in doubt.
    pub(super) fn judge_windows(&mut self) {
        if self.register.accepted.is_some() || self.prepared.is_some() || !self.desk.is_free() {
            return;
        }
        let mut due = Vec::new();
        for (id, watch) in &mut self.watches {
            if let Some(judgement) = watch.next_window(&self.ledger.services[id], self.now.mono) {
                let overdue_ms = self.now.mono.millis_since(watch.began).saturating_sub(judgement.to_ms);
                due.push((overdue_ms, id.clone(), watch.since_version, judgement));
            }
        }
        // Many may be due at once. A few wait for their slots at a time, so that whoever else asks isn't kept waiting.
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
        let verdict = watch.and_then(|watch| watch.trial.verdict());
        verdict.unwrap_or_else(|| Verdict::Hold("nothing to compare yet".into()))
    }
}
