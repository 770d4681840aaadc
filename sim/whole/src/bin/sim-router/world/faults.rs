//! What goes wrong, and how often.

use aviary::ports::Topic;
use aviary_core::domain::router_state::{HookCall, RouterPhase};
use aviary_core::domain::side::Side;

use super::SplitWorld;
use sim::dice::Dice;

/// How often a hook call is overtaken, where it may be, in 1/10 000.
const LATE: u64 = 2_000;

/// How often things happen, in 1/10 000 of the calls.
pub struct Rates {
    /// A call fails without any effect.
    pub before: u64,
    /// A call fails with its whole effect.
    pub after: u64,
    /// A call is its process's last.
    pub die: u64,
    /// Another router goes on in the middle of a call.
    pub interrupt: u64,
    /// The broker is unavailable for a while.
    pub unavailable: u64,
    /// A transaction of the router expires.
    pub expire: u64,
    /// A hook fails, before or after its effect.
    pub hook: u64,
    /// Emitters append records to the source.
    pub emit: u64,
    /// A weight is asked for.
    pub ask: u64,
    /// An end is asked for.
    pub end: u64,
    /// The router loses the cluster's lease.
    pub lease: u64,
    /// A service processes records of its topic.
    pub work: u64,
}

/// When a call fails: before or after it takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails without any effect.
    Before,
    /// It fails after its whole effect.
    After,
}

impl Rates {
    /// Returns how often things happen in a run.
    pub fn new(dice: &mut Dice) -> Self {
        Self {
            before: *dice.pick(&[0, 30, 200]),
            after: *dice.pick(&[0, 30, 200]),
            die: *dice.pick(&[0, 30, 150]),
            interrupt: *dice.pick(&[0, 30, 200]),
            unavailable: *dice.pick(&[0, 0, 10]),
            expire: *dice.pick(&[0, 20, 100]),
            hook: *dice.pick(&[0, 2_000]),
            emit: *dice.pick(&[500, 2_000, 5_000]),
            ask: *dice.pick(&[0, 20, 100]),
            end: *dice.pick(&[0, 0, 10, 40]),
            lease: *dice.pick(&[0, 20, 200]),
            work: *dice.pick(&[300, 2_000, 6_000]),
        }
    }
}

impl SplitWorld {
    /// Draws whether a hook call has its effect later than it ends.
    pub fn defers(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) -> bool {
        let defers = self.late && self.faulty && self.dice.chance(LATE);
        if defers {
            let due_ms = self.now_ms + self.dice.between(1, 5_000);
            self.pending.push((due_ms, call, side, topic, number));
        }
        defers
    }

    /// Lets hook calls have their effect.
    pub fn catch_up(&mut self) {
        while let Some(place) = self.pending.iter().position(|(due_ms, ..)| *due_ms <= self.now_ms) {
            let (_, call, side, topic, number) = self.pending.swap_remove(place);
            self.say(format!("late: {} {} on {}", call.word(), side.word(), topic.word()));
            self.call(call, side, topic, number);
        }
    }

    /// Draws whether a router's call fails.
    pub fn fault(&mut self, who: usize, name: &str) -> Option<Fault> {
        if self.routers[who].dead {
            return Some(Fault::Before);
        }
        if !self.faulty {
            return None;
        }
        if self.now_ms < self.unavailable_until_ms {
            self.truth.saw("broker unavailable");
            return Some(Fault::Before);
        }
        if self.dice.chance(self.rates.expire) && self.broker.expire() {
            self.truth.saw("transaction expired");
        }
        let fault = match self.dice.between(0, 9_999) {
            draw if draw < self.rates.before => Fault::Before,
            draw if draw < self.rates.before + self.rates.after => Fault::After,
            draw if draw < self.rates.before + self.rates.after + self.rates.die => {
                let phase = self.truth.phase.as_ref().map_or("new", RouterPhase::words);
                self.truth.saw(&format!("died: {phase}"));
                self.say(format!("router {who} dies in {name}, {phase}"));
                self.routers[who].dead = true;
                if self.dice.chance(5000) { Fault::Before } else { Fault::After }
            }
            _ => return None,
        };
        let before = fault == Fault::Before;
        self.truth.saw(if before {
            "call failed before it had an effect"
        } else {
            "call failed after it had its effect"
        });
        Some(fault)
    }

    /// Draws whether a hook fails.
    pub fn hook_fault(&mut self, who: usize) -> Option<Fault> {
        if self.routers[who].dead {
            return Some(Fault::Before);
        }
        if !self.faulty || !self.dice.chance(self.rates.hook) {
            return None;
        }
        let before = self.dice.chance(5000);
        self.truth.saw(if before {
            "hook failed before it had an effect"
        } else {
            "hook failed after it had its effect"
        });
        Some(if before { Fault::Before } else { Fault::After })
    }

    /// Draws whether a commit gets no further than its entry.
    pub fn leaves_entry(&mut self) -> bool {
        self.faulty && self.dice.chance(self.rates.before / 2)
    }

    /// Draws whether a call takes so long that another router goes on.
    pub fn is_interrupted(&mut self, hook: bool) -> bool {
        let rate = if hook { LATE } else { self.rates.interrupt };
        self.faulty && !self.nested && self.dice.chance(rate)
    }
}
