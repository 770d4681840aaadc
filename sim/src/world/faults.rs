//! Misfortune: crashes, wiped disks, cuts, pauses, clocks.

use super::*;

/// How bad the world is: drawn for each seed, so that seeds differ in kind and not only in detail.
pub(super) struct Mix {
    pub drop_bp: u64,
    pub twice_bp: u64,
    pub delay_us_max: u64,
    pub write_us_max: u64,
    pub fault_us: u64,
    /// crash, crash mid-list, pause, wipe, cut in two, one way, wall jump, all crash, false reset, mood.
    pub faults: [u64; 10],
    pub operator_us: u64,
    pub tick_us: u64,
}

impl Mix {
    pub fn draw(dice: &mut Dice) -> Self {
        let mut faults = [0; 10];
        for weight in &mut faults {
            *weight = if dice.chance(6_000) { dice.between(1, 10) } else { 0 };
        }
        faults[9] = 6;
        faults[3] = faults[3].min(4);
        Self {
            drop_bp: *dice.pick(&[0, 0, 10, 200, 1_000, 2_500]),
            twice_bp: *dice.pick(&[0, 50, 500, 2_000]),
            delay_us_max: *dice.pick(&[1_000, 5_000, 20_000, 200_000]),
            write_us_max: *dice.pick(&[0, 1_000, 10_000, 60_000]),
            fault_us: *dice.pick(&[150_000, 500_000, 1_500_000, 4_000_000]),
            faults,
            operator_us: *dice.pick(&[100_000, 300_000, 1_000_000]),
            tick_us: dice.between(5_000, 25_000),
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
        node.epoch += 1;
        let after = *self.dice.pick(&[10_000, 200_000, 1_000_000, 4_000_000]);
        let after = self.dice.between(1_000, after);
        self.plan(after, Happening::Restart(i));
        Ok(())
    }

    pub(super) fn wipe(&mut self, i: usize) -> Step {
        self.mend();
        let damaged = self.nodes.iter().enumerate().filter(|(j, node)| *j == i || node.damaged).count();
        if damaged > (self.nodes.len() - 1) / 2 {
            return Ok(());
        }
        self.crash(i)?;
        let keeps_log = self.dice.chance(3_000);
        let node = &mut self.nodes[i];
        node.damaged = true;
        node.register = None;
        if !keeps_log {
            node.log.truncate(1);
            (node.checkpoint, node.first) = (None, 0);
            node.durable = 1;
        }
        self.summary.wipes += 1;
        self.trace.line(self.now, self.nodes[i].id.as_str(), "wiped", || format!("keeps its log: {keeps_log}"));
        Ok(())
    }

    /// Forgets the damage of nodes that have everything again and whose votes count.
    pub(super) fn mend(&mut self) {
        let (members, head) = (self.truth.membership().clone(), self.truth.log.len());
        for node in &mut self.nodes {
            let bound = node.register.as_ref().is_some_and(|register| members.counts(&node.id, register.incarnation));
            node.damaged &= !(bound && node.durable >= head);
        }
    }

    pub(super) fn misfortune(&mut self) -> Step {
        let kind = self.dice.weighted(&self.mix.faults);
        let count = self.nodes.len();
        let i = self.dice.below(count);
        match kind {
            0 => self.crash(i)?,
            1 => self.nodes[i].crash_after = Some(self.dice.between(0, 6)),
            2 => {
                let epoch = self.nodes[i].epoch;
                if let Some(process) = &mut self.nodes[i].process {
                    process.paused = true;
                    self.trace.line(self.now, self.nodes[i].id.as_str(), "stopped", String::new);
                    let after = self.dice.between(10_000, 4_000_000);
                    self.plan(after, Happening::Continue(i, epoch));
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
                let moods = [
                    Mood::Healthy,
                    Mood::Healthy,
                    Mood::Healthy,
                    Mood::Errors,
                    Mood::Slow,
                    Mood::AllFail,
                    Mood::Silent,
                    Mood::OneNode(i),
                ];
                self.moods[service] = *self.dice.pick(&moods);
                self.trace.line(self.now, "*", "mood", || format!("s{service} {:?}", self.moods[service]));
            }
        }
        Ok(())
    }
}
