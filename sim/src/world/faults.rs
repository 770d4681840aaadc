//! Faults: crashes, wiped disks, cuts, pauses, clocks.

use super::*;
use crate::coverage::MOMENTS;

/// All kinds of faults; a run can be without some of them (`Options::without`, one bit each).
pub const FAULTS: [&str; 22] = [
    "crash",
    "crash-mid",
    "pause",
    "wipe",
    "cut",
    "one-way",
    "wall-jump",
    "crash-all",
    "false-reset",
    "profile",
    "lost-suffix",
    "failed-write",
    "clog",
    "circuit breaker",
    "absurd",
    "membership",
    "crash-at",
    "bit-flip",
    "drop",
    "twice",
    "slow-write",
    "forged",
];
/// Longest delay on a clogged link, in microseconds.
pub(super) const CLOG_US_MAX: u64 = 3_000_000;
const WIPE: usize = 3;
const LOST_SUFFIX: usize = 10;
const MEMBERSHIP: usize = 15;
const BIT_FLIP: usize = 17;
const FORGED: usize = 21;
/// The kinds that came later and have draws of their own: without them, a seed is what it was before them.
pub const LATER: u32 = 0b1111_1111 << LOST_SUFFIX;

/// How bad the world is: drawn for each seed, so that seeds differ in kind and not only in detail.
pub(super) struct Mix {
    pub drop_bp: u64,
    pub twice_bp: u64,
    pub delay_us_max: u64,
    pub write_us_max: u64,
    /// Proposals of an increase that arrive without a voter's Yes, in basis points.
    pub forged_bp: u64,
    pub fault_us: u64,
    /// crash, crash mid-list, pause, wipe, cut in two, one way, wall jump, all crash, false reset, profile.
    pub faults: [u64; 10],
    pub operator_us: u64,
    pub tick_us: u64,
    /// lost suffix, failed write, clogged link, circuit breaker, absurd telemetry, membership, crash at a moment, bit flip.
    pub later: [u64; 8],
    pub later_us: u64,
}

impl Mix {
    pub fn draw(dice: &mut Dice, more: &mut Dice, newest: &mut Dice, without: u32) -> Self {
        let mut faults = [0; 10];
        for weight in &mut faults {
            *weight = if dice.chance(6_000) { dice.between(1, 10) } else { 0 };
        }
        faults[9] = 6;
        faults[3] = faults[3].min(4);
        let mut mix = Self {
            drop_bp: *dice.pick(&[0, 0, 10, 200, 1_000, 2_500]),
            twice_bp: *dice.pick(&[0, 50, 500, 2_000]),
            delay_us_max: *dice.pick(&[1_000, 5_000, 20_000, 200_000]),
            write_us_max: *dice.pick(&[0, 1_000, 10_000, 60_000]),
            forged_bp: *newest.pick(&[0, 500, 3_000]),
            fault_us: *dice.pick(&[150_000, 500_000, 1_500_000, 4_000_000]),
            faults,
            operator_us: *dice.pick(&[100_000, 300_000, 1_000_000]),
            tick_us: dice.between(5_000, 25_000),
            later: [0; 8],
            later_us: *more.pick(&[150_000, 500_000, 2_000_000]),
        };
        for weight in &mut mix.later {
            *weight = if more.chance(5_000) { more.between(1, 10) } else { 0 };
        }
        // Who leaves and comes back with a new disk, beside disks that are lost, can be one loss too many.
        let moves = more.chance(2_500);
        mix.later[MEMBERSHIP - LOST_SUFFIX] = if moves { 8 } else { 0 };
        if moves && without & 1 << MEMBERSHIP == 0 {
            (mix.faults[WIPE], mix.later[0], mix.later[BIT_FLIP - LOST_SUFFIX]) = (0, 0, 0);
        }
        mix.leave_out(without);
        mix
    }

    fn leave_out(&mut self, without: u32) {
        let kinds = self.faults.iter_mut().chain(&mut self.later);
        let rates = [&mut self.drop_bp, &mut self.twice_bp, &mut self.write_us_max, &mut self.forged_bp];
        for (place, rate) in kinds.chain(rates).enumerate() {
            if without & 1 << place != 0 {
                *rate = 0;
            }
        }
    }
}

impl<S: Subject> World<S> {
    pub(super) fn crash(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_none() {
            return Ok(());
        }
        self.trace.line(self.now, self.nodes[i].id.as_str(), "crashes", String::new);
        self.summary.crashes += 1;
        if self.dice.chance(5_000) {
            self.written(i)?;
        }
        let node = &mut self.nodes[i];
        let extra = (node.log.len() - node.durable) as u64;
        let survives = node.durable + self.dice.between(0, extra) as usize;
        node.log.truncate(survives);
        node.durable = survives;
        node.process = None;
        node.generation += 1;
        let after = *self.dice.pick(&[10_000, 200_000, 1_000_000, 4_000_000]);
        let after = self.dice.between(1_000, after);
        self.plan(after, Happening::Restart(i));
        Ok(())
    }

    pub(super) fn wipe(&mut self, i: usize) -> Step {
        if !self.may_damage(i) {
            return Ok(());
        }
        self.crash(i)?;
        let keeps_log = self.dice.chance(3_000);
        let node = &mut self.nodes[i];
        node.damaged = true;
        node.acceptor = None;
        if !keeps_log {
            node.log.truncate(1);
            (node.checkpoint, node.first) = (None, 0);
            node.runs.clear();
            node.durable = 1;
        }
        self.summary.wipes += 1;
        self.trace.line(self.now, self.nodes[i].id.as_str(), "wiped", || format!("keeps its log: {keeps_log}"));
        Ok(())
    }

    /// Forgets the damage of nodes that have everything again and whose votes count.
    pub(super) fn mend(&mut self) {
        let (members, head) = (self.truth.members().clone(), self.truth.log.len());
        for node in &mut self.nodes {
            let bound = node.acceptor.as_ref().is_some_and(|acceptor| members.counts(&node.id, acceptor.incarnation));
            node.damaged &= !(bound && node.durable >= head);
        }
    }

    pub(super) fn inject_fault(&mut self) -> Step {
        let kind = self.dice.weighted(&self.mix.faults);
        if self.mix.faults[kind] == 0 {
            return Ok(());
        }
        *self.coverage.faults.entry(FAULTS[kind]).or_default() += 1;
        let count = self.nodes.len();
        let i = self.dice.below(count);
        match kind {
            0 => self.crash(i)?,
            1 => self.nodes[i].crash_after = Some(self.dice.between(0, 6)),
            2 => {
                let generation = self.nodes[i].generation;
                if let Some(process) = &mut self.nodes[i].process {
                    process.paused = true;
                    self.trace.line(self.now, self.nodes[i].id.as_str(), "stopped", String::new);
                    let after = self.dice.between(10_000, 4_000_000);
                    self.plan(after, Happening::Continue(i, generation));
                }
            }
            3 => self.wipe(i)?,
            4 | 5 => {
                self.cut.clear();
                let side: Vec<bool> = (0..count).map(|_| self.dice.chance(5_000)).collect();
                for from in 0..count {
                    for to in 0..count {
                        if from != to && side[from] != side[to] && (kind == 4 || side[from]) {
                            self.cut.insert((from, to));
                        }
                    }
                }
                self.cut_number += 1;
                let number = self.cut_number;
                self.trace.line(self.now, "*", "cut", || format!("{side:?} one way: {}", kind == 5));
                let after = self.dice.between(50_000, 6_000_000);
                self.plan(after, Happening::Heal(number));
            }
            6 => {
                self.nodes[i].wall =
                    self.nodes[i].wall.saturating_add(self.dice.between(0, 7_200_000)).saturating_sub(3_600_000)
            }
            7 => {
                for j in 0..count {
                    if self.dice.chance(7_000) {
                        self.crash(j)?;
                    }
                }
            }
            8 => {
                let peer = name(self.dice.below(count));
                if peer != self.nodes[i].id {
                    self.give(i, Input::Unreachable(peer))?;
                }
            }
            _ => {
                let service = self.dice.below(self.services.len());
                let profiles = [
                    TrafficProfile::Healthy,
                    TrafficProfile::Healthy,
                    TrafficProfile::Healthy,
                    TrafficProfile::Errors,
                    TrafficProfile::Slow,
                    TrafficProfile::AllFail,
                    TrafficProfile::Silent,
                    TrafficProfile::OneNode(i),
                ];
                self.profiles[service] = *self.dice.pick(&profiles);
                self.trace.line(self.now, "*", "profile", || format!("s{service} {:?}", self.profiles[service]));
            }
        }
        Ok(())
    }

    /// The kinds that have draws of their own.
    pub(super) fn inject_later_fault(&mut self) -> Step {
        let kind = self.more.weighted(&self.mix.later);
        if self.mix.later[kind] == 0 {
            return Ok(());
        }
        *self.coverage.faults.entry(FAULTS[LOST_SUFFIX + kind]).or_default() += 1;
        let count = self.nodes.len();
        let i = self.more.below(count);
        match kind {
            0 => self.lose_suffix(i),
            1 => {
                self.nodes[i].write_fails = true;
                Ok(())
            }
            2 => {
                let j = self.more.below(count);
                let until = self.now + self.more.between(100_000, 5_000_000);
                self.clogged.insert((i, j), until);
                self.trace.line(self.now, "*", "clogs", || format!("{} to {}", name(i), name(j)));
                Ok(())
            }
            3 => self.trip(i),
            4 => self.absurd_telemetry(i),
            6 => {
                self.nodes[i].crash_at = Some(self.more.below(MOMENTS));
                Ok(())
            }
            5 => self.move_members(i),
            7 => self.flip_bit(i),
            other => unreachable!("fault {other} has an arm of its own"),
        }
    }

    /// Returns whether this node's disk may be damaged too, which a majority survives.
    fn may_damage(&mut self, i: usize) -> bool {
        self.mend();
        let damaged = self.nodes.iter().enumerate().filter(|(j, node)| *j == i || node.damaged).count();
        damaged <= (self.nodes.len() - 1) / 2
    }

    /// A bit of a disk turns, in the acceptor state or in an entry of the journal. Checksums see it, as the tests of
    /// the real disk's format hold; so a node starts without its acceptor state, or with the part of its log before that entry.
    fn flip_bit(&mut self, i: usize) -> Step {
        if !self.may_damage(i) {
            return Ok(());
        }
        self.crash(i)?;
        let node = &mut self.nodes[i];
        if node.acceptor.is_none() {
            return Ok(());
        }
        let what;
        if self.more.chance(5_000) {
            // The older of two slots may be hit, or what is in neither: then nothing is lost.
            let lost = self.more.chance(5_000);
            what = format!("in its acceptor state, which is lost: {lost}");
            if lost {
                (node.damaged, node.acceptor) = (true, None);
            }
        } else {
            let least = node.checkpoint.as_ref().map_or(1, |checkpoint| checkpoint.slot.0 as usize + 1);
            if least >= node.log.len() {
                return Ok(());
            }
            let slot = self.more.between(least as u64, node.log.len() as u64 - 1) as usize;
            what = format!("in slot {slot} of {}", node.log.len());
            node.log.truncate(slot);
            node.durable = slot;
            node.damaged = true;
        }
        self.trace.line(self.now, self.nodes[i].id.as_str(), "bit flips", || what);
        self.coverage.event("bit flipped");
        Ok(())
    }

    /// A disk loses the end of its log, also what was synced; the acceptor state stays.
    fn lose_suffix(&mut self, i: usize) -> Step {
        if !self.may_damage(i) {
            return Ok(());
        }
        self.crash(i)?;
        let node = &mut self.nodes[i];
        let least = node.checkpoint.as_ref().map_or(1, |checkpoint| checkpoint.slot.0 as usize + 1);
        if least >= node.log.len() {
            return Ok(());
        }
        let left = self.more.between(least as u64, node.log.len() as u64 - 1) as usize;
        node.log.truncate(left);
        node.durable = left;
        node.damaged = true;
        let shorter = node.acceptor.as_ref().is_some_and(|acceptor| acceptor.head.0 >= left as u64);
        self.trace.line(self.now, self.nodes[i].id.as_str(), "lost", || format!("all after {left} records"));
        if shorter {
            self.coverage.event("log rebuilt");
        }
        Ok(())
    }

    /// Returns a message as it arrives: a proposal of an increase may have lost a voter's Yes, which no acceptor may let pass.
    pub(super) fn forged(&mut self, mut message: Box<Message>) -> Box<Message> {
        if let Message::Decision(Decision::Propose(_, record)) = &mut *message
            && let Some(certificate) = &mut record.certificate
            && !self.calm
            && self.newest.chance(self.mix.forged_bp)
        {
            certificate.yes.pop_first();
            *self.coverage.faults.entry(FAULTS[FORGED]).or_default() += 1;
        }
        message
    }

    fn trip(&mut self, i: usize) -> Step {
        let service = self.services[self.more.below(self.services.len())].clone();
        let view = self.nodes[i].process.as_ref().and_then(|process| process.view.clone());
        let Some(shown) = view.as_ref().and_then(|view| view.services.get(&service)) else { return Ok(()) };
        let version = shown.service.routing.version;
        // Sometimes it trips for a weight that is over by the time it is heard.
        let routing_version = version.saturating_sub(u64::from(self.more.chance(3_000)));
        self.give(i, Input::CircuitBreakerTripped { service, routing_version, reason: "canary answers failed".into() })
    }

    /// Evidence of unknown services, of weights that are over or yet to come, and of impossible size: nothing follows.
    fn absurd_telemetry(&mut self, i: usize) -> Step {
        let mut evidence = Evidence::default();
        (0..self.more.between(1, 500)).for_each(|_| evidence.canary.record(u64::MAX >> 20, true));
        let service = self.services[self.more.below(self.services.len())].clone();
        let view = self.nodes[i].process.as_ref().and_then(|process| process.view.clone());
        let version = view.and_then(|view| Some(view.services.get(&service)?.service.routing.version)).unwrap_or(0);
        let unknown = ServiceId::new("nobody").expect("valid");
        let observed = [(unknown, 1), (service.clone(), version + 7), (service, u64::MAX)];
        let observe = |(service, routing_version)| Observation { service, routing_version, evidence: evidence.clone() };
        self.give(i, Input::Telemetry(observed.map(observe).into()))
    }

    /// Operators take nodes out of the cluster, give them new disks, and add them again.
    fn move_members(&mut self, i: usize) -> Step {
        let members = self.truth.members();
        let outside = self.nodes.iter().position(|node| !members.0.contains_key(&node.id));
        let asked = match outside {
            None if members.0.len() > 2 => ConfigChange::Remove(name(self.more.below(self.nodes.len()))),
            None => return Ok(()),
            Some(j) => match self.added_as(j)? {
                Some(incarnation) => ConfigChange::Add(name(j), incarnation),
                None => return Ok(()),
            },
        };
        self.submit(i, OperatorRequest::Config(asked)).map(drop)
    }

    /// Returns the incarnation to add a node that is outside with; none while it has none that could count: then it
    /// gets a new disk.
    pub(super) fn added_as(&mut self, j: usize) -> Result<Option<Incarnation>, Violation> {
        let id = self.nodes[j].id.clone();
        let view = self.nodes[j].process.as_ref().and_then(|process| process.view.clone());
        let Some(view) = view else { return Ok(None) };
        let counted = self.truth.memberships.iter().any(|members| members.counts(&id, view.incarnation));
        if !counted {
            return Ok(Some(view.incarnation));
        }
        // Operators look at the nodes that stay before they throw a disk away.
        let others = self.nodes.iter().filter(|node| node.id != id && node.process.is_some());
        let known = others.filter_map(|node| node.process.as_ref()?.view.as_ref());
        if !known.clone().any(|view| !view.members.is_empty() && !view.members.contains_key(&id)) {
            return Ok(None);
        }
        self.crash(j)?;
        let node = &mut self.nodes[j];
        (node.acceptor, node.checkpoint, node.first, node.durable) = (None, None, 0, 1);
        node.log.truncate(1);
        node.runs.clear();
        self.trace.line(self.now, id.as_str(), "new disk", String::new);
        Ok(None)
    }
}
