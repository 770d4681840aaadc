//! The end of a run: everything is healed; then the promised bounds must hold, and a rollout must complete.

use super::*;

impl<S: Subject> World<S> {
    /// Heals everything; then the promised bounds must hold, and a rollout must complete.
    pub(super) fn liveness(&mut self) -> Step {
        self.calm = true;
        self.cut.clear();
        self.cut_number += 1;
        self.profiles.iter_mut().for_each(|profile| *profile = TrafficProfile::Healthy);
        self.trace.line(self.now, "*", "calm", String::new);
        for i in 0..self.nodes.len() {
            (self.nodes[i].crash_after, self.nodes[i].crash_at) = (None, None);
            self.nodes[i].write_fails = false;
            if let Some(process) = &mut self.nodes[i].process {
                process.paused = false;
            }
            self.start(i)?;
            self.carry_out(i)?;
        }
        // Messages already under way may be late by five of the largest delays.
        let clogged = if self.clogged.is_empty() { 0 } else { CLOG_US_MAX };
        let slack = self.mix.delay_us_max * 5 + self.mix.write_us_max + clogged;
        self.run_until(self.now + slack)?;
        self.within(4_500, "a healed cluster agrees and holds leases", |world| world.agree())?;
        // What people asked for before may wait in a queue for as long as this, and would meddle.
        self.run_until(self.now + 2_000_000)?;
        let mut tries = 0;
        while let Some((node, incarnation)) = self.unbound().first().cloned() {
            tries += 1;
            if tries > 3 * self.nodes.len() {
                return Err(broken!("liveness", "{node} can't be readmitted: {:?}", self.replies.last_key_value()));
            }
            let helper = self.voter();
            if self.truth.members().0.contains_key(&node) {
                self.decide(helper, OperatorRequest::Config(ConfigChange::Readmit(node, incarnation)))?;
                continue;
            }
            let j = self.nodes.iter().position(|other| other.id == node).expect("a node just listed");
            match self.added_as(j)? {
                Some(incarnation) => {
                    self.decide(helper, OperatorRequest::Config(ConfigChange::Add(node, incarnation)))?;
                }
                None => {
                    self.start(j)?;
                    self.run_until(self.now + 2_000_000)?;
                }
            }
        }
        let cordoned: Vec<NodeId> =
            self.truth.members().0.iter().filter(|(_, m)| m.cordoned).map(|(n, _)| n.clone()).collect();
        for node in cordoned {
            self.decide(0, OperatorRequest::Config(ConfigChange::Uncordon(node)))?;
        }
        self.within(4_500, "readmitted nodes agree and hold leases", |world| world.agree())?;
        self.complete_a_rollout()
    }

    /// Returns a node whose vote counts.
    pub(super) fn voter(&self) -> usize {
        let counts = |node: &Node<S>| {
            let acceptor = node.acceptor.as_ref();
            acceptor.is_some_and(|acceptor| self.truth.members().counts(&node.id, acceptor.incarnation))
        };
        self.nodes.iter().position(counts).unwrap_or(0)
    }

    pub(super) fn complete_a_rollout(&mut self) -> Step {
        let service = self.services[0].clone();
        for _ in 0..6 {
            let i = self.dice.below(self.nodes.len());
            self.decide(i, OperatorRequest::Abort { service: service.clone(), reason: "a fresh start".into() })?;
            self.within(4_500, "the abort is known everywhere", |world| world.agree())?;
            let stable = self.stable_of(i, &service);
            let spec = self.spec(&service, &stable, true);
            let request = self.decide(i, OperatorRequest::Apply(spec.clone()))?;
            if !matches!(self.replies.get(&request), Some(Outcome::Committed { .. })) {
                continue;
            }
            let shown = |node: &Node<S>| {
                let view = node.process.as_ref()?.view.as_ref()?;
                view.services.get(&service).map(|shown| shown.service.clone())
            };
            let completed = |service: &Service| {
                service.stable.version == spec.canary.version && service.routing.canary_model_id.is_none()
            };
            // A duel may decide a start in doubt; it is reverted, and people start again. They do so, too, where a node that
            // learned of it late takes the time that it has for over, by a clock that is ahead: it is paused.
            let reverted = |service: &Service| matches!(service.rollout.phase, Phase::RolledBack | Phase::Paused);
            self.within(20_000, "a healthy rollout completes", |world| {
                let mut all = world.nodes.iter().map(shown);
                all.clone().all(|s| s.as_ref().is_some_and(completed)) || all.any(|s| s.as_ref().is_some_and(reverted))
            })?;
            if self.nodes.iter().filter_map(shown).all(|service| completed(&service)) {
                return Ok(());
            }
        }
        Err(broken!("liveness", "no rollout starts in 6 tries: {:?}", self.replies.last_key_value()))
    }

    pub(super) fn agree(&self) -> bool {
        let head = self.truth.head();
        self.nodes.iter().all(|node| {
            let Some(process) = &node.process else { return false };
            let Some(view) = &process.view else { return false };
            let bound = self.truth.members().counts(&node.id, view.incarnation);
            let leased = process.lease.is_some_and(|from| node.now(self.now).mono < from.after_ms(1_000));
            view.head == head && (leased || !bound)
        })
    }

    pub(super) fn within(&mut self, ms: u64, what: &str, holds: impl Fn(&Self) -> bool) -> Step {
        let end = self.now + ms * 1000;
        while self.now < end {
            self.run_until(self.now + 10_000)?;
            if holds(self) {
                return Ok(());
            }
        }
        Err(broken!("liveness", "not within {ms} ms: {what}"))
    }

    /// Asks and waits for an answer; every question must have one within the stated bound.
    pub(super) fn decide(&mut self, i: usize, asked: OperatorRequest) -> Result<u64, Violation> {
        let words = brief_op(&asked);
        let request = self.submit(i, asked)?;
        self.within(3_500, &format!("an answer to {words}"), |world| world.replies.contains_key(&request))?;
        self.trace.line(self.now, "*", "answered", || format!("{words}: {:?}", self.replies.get(&request)));
        Ok(request)
    }
}
