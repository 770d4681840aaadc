//! The tracker of one rollout's canary: this node's part in its analysis run. One for each service with a rollout
//! under way; unlike
//! a gate it goes on when the weight changes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use crate::domain::classes::ErrorClasses;
use crate::domain::ids::NodeId;
use crate::domain::run::{AnalysisRun, SequentialEvidence, WindowVerdict};
use crate::domain::ticks::TickSample;
use crate::domain::time::{Mono, Now};
use crate::domain::verdict::Verdict;
use crate::domain::window::Evidence;

use super::super::log::ledger::ServiceState;
use super::super::log::record::{RunTransfer, SavedRun};
use super::super::message::{HealthSnapshot, RunRequest};

/// Length of a tick, in milliseconds.
const TICK_MS: u64 = 250;
/// Ticks that are told again and again, in case a message is lost.
const TOLD_AGAIN: usize = 4;
/// A record that isn't older than this was made just now; wall clocks needn't agree any better.
const JUST_NOW_MS: u64 = 2_000;

/// Closed windows that wait to be decided; the oldest are forgotten, and decided as unseen.
const CLOSED_MAX: usize = 64;
/// How long after its end a window is decided that this node has nothing to say of.
const UNSEEN_MS: u64 = 10_000;

/// How long a peer has for handing its analysis run over before the next one is asked.
const ASKED_MS: u64 = 500;
/// How long peers are asked before an analysis run is begun anew.
const ASKING_MS: u64 = 4_000;
/// Tick samples of peers that are kept for an analysis run that isn't there yet.
const HEARD_MAX: usize = 256;

/// Between two times that an analysis run is saved, at least: of many one at each tick of the core.
const SAVED_EVERY_MS: u64 = 1_000;

/// What this node saw of one rollout, and what it makes of that and of its peers' word.
#[derive(Debug, Clone)]
pub(super) struct RunTracker {
    rollout_generation: u64,
    /// When the rollout began, on this node's clock.
    began: Mono,
    /// The tick that this node is in, and what it saw in it.
    open: (u64, TickSample),
    /// Samples of its last ticks, which peers may have missed.
    recent: VecDeque<(u64, TickSample)>,
    run: AnalysisRun<NodeId>,
    /// Windows that are closed here, and not decided yet as far as this node knows.
    closed: VecDeque<WindowVerdict>,
    /// This node came late, and asks for a peer's analysis run; its own waits meanwhile.
    asking: Option<Asking>,
    /// When the analysis run is saved next.
    save_at: Mono,
    /// The step that is compared: its routing version, and the canary's answers in the rollout before it, as far as this node
    /// knows. Where it took the run over, those before that don't count for the step.
    step: (u64, u64),
    /// Classes of statuses that are compared beside errors.
    classes: ErrorClasses,
}

impl RunTracker {
    /// Returns the watch over a rollout that this node learned of just now; `restarts` when it may have known it before, and
    /// `saved` its analysis run.
    pub fn new(service_state: &ServiceState, now: Now, restarts: bool, saved: Option<SavedRun>) -> Self {
        let rollout = &service_state.service.rollout;
        let age_ms = now.wall.0.saturating_sub(rollout.since.0);
        let is_late = age_ms >= JUST_NOW_MS;
        let began = now.mono.before_ms(if is_late { age_ms } else { 0 });
        let at_ms = now.mono.millis_since(began);
        let analysis = rollout.spec.analysis.clone();
        let policy = analysis.sequential(rollout.spec.planned_ms());
        let mut run = AnalysisRun::new(analysis, policy, TICK_MS, at_ms);
        let classes = rollout.spec.compared_classes;
        run.compare_classes(classes);
        let saved =
            saved.filter(|saved| saved.rollout_generation == rollout.rollout_generation && saved.run.run.is_like(&run));
        let saved = saved.map(|SavedRun { at, run, .. }| {
            let since_ms = run.at_ms.saturating_add(now.wall.0.saturating_sub(at.0));
            (now.mono.before_ms(since_ms), run)
        });
        Self {
            rollout_generation: rollout.rollout_generation,
            began,
            open: (at_ms / TICK_MS, TickSample::default()),
            recent: VecDeque::new(),
            run,
            closed: VecDeque::new(),
            asking: (is_late || restarts).then(|| Asking { saved, ..Asking::default() }),
            save_at: now.mono,
            step: (0, 0),
            classes,
        }
    }

    /// Takes what this node saw.
    pub fn observe(&mut self, version: u64, evidence: &Evidence) {
        if version >= self.rollout_generation && *evidence != Evidence::default() {
            self.open.1.merge(&TickSample { version, evidence: evidence.clone() });
        }
    }

    /// Takes what a peer saw, and its analysis run where this node asks for one.
    pub fn hear(&mut self, own: &NodeId, from: &NodeId, snapshot: &HealthSnapshot, now: Mono) {
        if snapshot.rollout_generation != self.rollout_generation {
            return;
        }
        match (&mut self.asking, &snapshot.transfer) {
            (Some(_), Some(transfer)) => self.take_over(own, transfer, now),
            (Some(asking), None) => match &snapshot.asks {
                Some(asks) => drop(asking.also.insert(from.clone(), asks.saved)),
                None => drop(asking.also.remove(from)),
            },
            (None, _) => {}
        }
        for (tick, tick_sample) in &snapshot.tick_samples {
            match &mut self.asking {
                Some(asking) if asking.heard.len() < HEARD_MAX => {
                    asking.heard.insert((*tick, from.clone()), tick_sample.clone());
                }
                Some(_) => {}
                None => _ = self.run.put(from, *tick, tick_sample),
            }
        }
    }

    /// Goes on with a peer's analysis run, as if this node had conducted it: in the peer's ticks, after those that it
    /// knows of.
    fn take_over(&mut self, own: &NodeId, transfer: &RunTransfer, now: Mono) {
        if self.run.is_like(&transfer.run) {
            self.go_on(own, now.before_ms(transfer.at_ms), transfer.clone(), now);
        }
    }

    /// Goes on with an analysis run of a rollout that began then.
    fn go_on(&mut self, own: &NodeId, began: Mono, RunTransfer { run, closed, .. }: RunTransfer, now: Mono) {
        self.run = run;
        self.run.compare_classes(self.classes);
        self.closed = closed.into();
        self.began = began;
        self.open.0 = self.run.next_of(own).max(now.millis_since(began) / TICK_MS);
        self.step = (self.run.version(), self.run.canary_answers());
        self.stop_asking();
    }

    /// Goes on without a peer's analysis run: with what this node saved before it restarted, or with what it saw
    /// since. Returns what was
    /// decided by that.
    fn go_on_alone(&mut self, own: &NodeId, now: Mono) -> Vec<WindowVerdict> {
        let saved = self.asking.as_mut().and_then(|asking| asking.saved.take());
        let Some((began, mut transfer)) = saved else {
            self.stop_asking();
            return Vec::new();
        };
        let window_verdicts = transfer.run.wake(now.millis_since(began));
        self.go_on(own, began, transfer, now);
        window_verdicts
    }

    /// Takes what peers told meanwhile into the analysis run that is there.
    fn stop_asking(&mut self) {
        for ((tick, from), tick_sample) in self.asking.take().into_iter().flat_map(|asking| asking.heard) {
            self.run.put(&from, tick, &tick_sample);
        }
    }

    /// Returns what is handed to a peer that came late, when windows are decided up to `decided_ms`; none while this node asks
    /// itself.
    pub fn transfer(&self, decided_ms: u64, now: Mono) -> Option<RunTransfer> {
        let at_ms = now.millis_since(self.began);
        let closed =
            self.closed.iter().filter(|window_verdict| window_verdict.from_ms >= decided_ms).cloned().collect();
        self.asking.is_none().then(|| RunTransfer { at_ms, run: self.run.clone(), closed })
    }

    /// Returns what peers are told: which rollout, the last ticks, and who is asked for the analysis run.
    pub fn told(&self) -> (u64, Vec<(u64, TickSample)>, Option<RunRequest>) {
        let asks = self.asking.as_ref().map(|asking| RunRequest {
            whom: asking.whom.as_ref().map(|(whom, _)| whom.clone()),
            saved: asking.saved(),
        });
        (self.rollout_generation, self.recent.iter().cloned().collect(), asks)
    }

    /// Returns the window that is next to be decided, once it is closed; one that nobody here saw the whole of is decided, with
    /// all that follow it, when the peer that did had its time.
    pub fn next_window(&mut self, service_state: &ServiceState, now: Mono) -> Option<WindowVerdict> {
        if self.asking.is_some() {
            return None;
        }
        let from_ms = service_state.decided_ms;
        while self.closed.front().is_some_and(|window_verdict| window_verdict.from_ms < from_ms) {
            self.closed.pop_front();
        }
        let length = service_state.service.rollout.spec.analysis.window_ms;
        match self.closed.front() {
            Some(next) if next.from_ms == from_ms => Some(next.clone()),
            Some(later) => Some(WindowVerdict::unseen(from_ms, later.from_ms)),
            None => {
                let over_ms = now.millis_since(self.began).saturating_sub(UNSEEN_MS);
                let to_ms = over_ms / length * length;
                (to_ms > from_ms).then(|| WindowVerdict::unseen(from_ms, to_ms))
            }
        }
    }

    /// Returns SEQUENTIAL's evidence; none where nothing is compared.
    pub fn sequential(&self) -> Option<SequentialEvidence> {
        self.run.sequential()
    }

    /// Returns the routing version that the rollout began with.
    pub fn rollout_generation(&self) -> u64 {
        self.rollout_generation
    }

    /// Returns how long ago, in milliseconds, a moment of the rollout was that lies `at_ms` after its beginning.
    pub fn ms_since(&self, at_ms: u64, now: Mono) -> u64 {
        now.millis_since(self.began).saturating_sub(at_ms)
    }

    /// Returns true while this node waits for a peer's run, asked for or not.
    pub fn wants_run(&self) -> bool {
        self.asking.is_some()
    }

    /// Returns true while this node asks for a peer's run.
    pub fn is_asking(&self) -> bool {
        self.asking.as_ref().is_some_and(Asking::has_begun)
    }

    /// Returns what is to be saved, when it is time to.
    pub fn save(&mut self, decided_ms: u64, now: Now) -> Option<SavedRun> {
        self.save_at = now.mono.after_ms(SAVED_EVERY_MS);
        let run = self.transfer(decided_ms, now.mono)?;
        Some(SavedRun { rollout_generation: self.rollout_generation, at: now.wall, run })
    }

    /// Returns true when it is time to save the run.
    pub fn is_to_be_saved(&self, now: Mono) -> bool {
        now >= self.save_at
    }

    /// Goes on by the time that passed, once the run is there as far as it can be. Returns what was decided but for closed
    /// windows: the comparison's changes of mind. `free` counts the runs that may still be asked for beside others,
    /// `weight` is the canary's share of the requests at a routing version, where its weight alone decides that.
    pub fn tick(
        &mut self,
        own: &NodeId,
        expected: &[NodeId],
        can_ask: bool,
        free: &mut usize,
        weight: Option<(u64, f64)>,
        now: Mono,
    ) -> Vec<WindowVerdict> {
        let Some(mut window_verdicts) = self.wait_for_run(own, expected, can_ask, free, now) else { return Vec::new() };
        let at_ms = now.millis_since(self.began);
        if let Some((version, weight)) = weight {
            self.run.weigh(version, weight);
        }
        self.turn(own, at_ms);
        window_verdicts.extend(self.run.advance(at_ms, expected.iter()));
        match (self.step.0, self.run.version()) {
            (before, version) if before == version => {}
            (0, version) => self.step.0 = version,
            // A tick in which both weights were served counts for neither.
            (_, version) => self.step = (version, self.run.canary_answers()),
        }
        let (windows, changes) = window_verdicts.into_iter().partition::<Vec<_>, _>(|verdict| verdict.is_window);
        self.closed.extend(windows);
        while self.closed.len() > CLOSED_MAX {
            self.closed.pop_front();
        }
        changes
    }

    /// RunRequest for a peer's run while it makes sense to; none meanwhile. Returns what was decided by going on without one.
    fn wait_for_run(
        &mut self,
        own: &NodeId,
        expected: &[NodeId],
        can_ask: bool,
        free: &mut usize,
        now: Mono,
    ) -> Option<Vec<WindowVerdict>> {
        let Some(asking) = &mut self.asking else { return Some(Vec::new()) };
        if !can_ask {
            (asking.since, asking.whom) = (None, None);
            return None;
        }
        let alone = asking.best(own, expected).is_some_and(|(saved, best)| saved == 0 || best == own);
        if !alone && !asking.has_begun() {
            *free = free.checked_sub(1)?;
        }
        if !alone && asking.turn(own, expected, now) {
            return None;
        }
        Some(self.go_on_alone(own, now))
    }

    /// Returns the canary's answers in the step at a routing version.
    pub fn step_answers(&self, routing_version: u64) -> u64 {
        let (version, before) = self.step;
        if version == routing_version { self.run.canary_answers() - before } else { 0 }
    }

    /// Returns what the comparison with stable says at a routing version.
    pub fn compared(&self, routing_version: u64) -> Verdict {
        let why = match &self.asking {
            Some(_) => "this node came late, and asks its peers for what they know",
            None => "nothing to compare yet",
        };
        match self.run.verdict() {
            // It is of the weight before, where nothing was seen at this one yet.
            Some(Verdict::Promote) if self.run.version() < routing_version => {
                Verdict::Hold("nothing to compare at this weight yet".into())
            }
            verdict => verdict.unwrap_or_else(|| Verdict::Hold(why.into())),
        }
    }

    /// Closes this node's tick when it is over.
    fn turn(&mut self, own: &NodeId, at_ms: u64) {
        let now = at_ms / TICK_MS;
        if now <= self.open.0 {
            return;
        }
        let (tick, tick_sample) = std::mem::replace(&mut self.open, (now, TickSample::default()));
        self.run.put(own, tick, &tick_sample);
        self.recent.push_back((tick, tick_sample));
        // Ticks that this node didn't look at, because it was busy: nothing was seen in them that isn't in the one before.
        for skipped in (tick + 1).max(now.saturating_sub(TOLD_AGAIN as u64))..now {
            self.run.put(own, skipped, &TickSample::default());
            self.recent.push_back((skipped, TickSample::default()));
        }
        while self.recent.len() > TOLD_AGAIN {
            self.recent.pop_front();
        }
    }
}

/// How a node that came late gets the analysis run as far as it went.
#[derive(Debug, Clone, Default)]
struct Asking {
    /// Since when it asks; none while it can't, or while others are asked for first.
    since: Option<Mono>,
    /// Whom it asks, and since when.
    whom: Option<(NodeId, Mono)>,
    /// Peers that ask themselves, and how far the analysis runs go that they saved: they have nothing else to hand over.
    also: BTreeMap<NodeId, u64>,
    /// Samples of peers that arrive while the run is waited for.
    heard: BTreeMap<(u64, NodeId), TickSample>,
    /// The analysis run that this node saved before it restarted, and when the rollout began by that, on its present
    /// clock.
    saved: Option<(Mono, RunTransfer)>,
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

    /// Returns how far the analysis run goes that this node saved, in milliseconds since the rollout began; 0: there
    /// is none.
    fn saved(&self) -> u64 {
        self.saved.as_ref().map_or(0, |(_, transfer)| transfer.at_ms.max(1))
    }
}
