//! One seed's world: the broker, the services, who writes to the topics and what goes wrong.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aviary::domain::course::{Ask, Call, End, Entry, Phase};
use aviary::domain::split::Side;
use aviary::domain::weights::Weight;
use aviary::ports::Topic;
use aviary::router::engine::{Agreed, Engine, Plan, Steering};

use super::broker::Broker;
use super::log::Fate;
use super::services::Service;
use super::teeth::Bug;
use super::truth::{Known, Truth};
use crate::dice::Dice;

/// The world, as its routers reach it.
pub type Shared = Arc<Mutex<World>>;

/// Keys of records; few, so that each has many.
const KEYS: [&[u8]; 12] = [b"a", b"b", b"", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j", b"k"];

const CHANGE_MS: [u64; 5] = [0, 50, 500, 5_000, 1_000_000];
const BATCHES: [usize; 5] = [1, 2, 5, 20, 100];

/// How often a hook call is overtaken, where it may be, in 1/10 000.
const LATE: u64 = 2_000;

/// Everything that exists.
pub struct World {
    /// The source of chance.
    pub dice: Dice,
    /// The time.
    pub now_ms: u64,
    /// The topics and groups.
    pub broker: Broker,
    /// Both services, on each topic that they may read.
    pub services: Vec<Service>,
    /// The observer.
    pub truth: Truth,
    /// Every router process that was ever started.
    pub routers: Vec<Router>,
    /// What the routers are to do.
    pub plan: Plan,
    /// A seeded bug.
    pub bug: Option<Bug>,
    /// What went wrong first.
    pub violation: Option<String>,
    /// Things go wrong.
    pub faulty: bool,
    /// A router is turned in the middle of another's call.
    pub nested: bool,
    /// Hook calls may be overtaken by another router, or have their effect long after they failed.
    pub late: bool,
    /// Hook calls that failed, and when they have their effect.
    pending: Vec<(u64, Call, Side, Topic)>,
    /// Says what happens.
    pub words: bool,
    /// What happened.
    pub lines: Vec<String>,
    rates: Rates,
    away_until_ms: u64,
    /// The cluster's decisions; none when routers are on their own.
    agreed: Option<Agreed>,
    /// The cluster can be asked.
    lease: bool,
    /// Records that are still to be emitted.
    quota: u64,
    keys: usize,
    /// Open transactions of emitters.
    emitters: Vec<usize>,
}

/// A router process.
pub struct Router {
    /// Its engine; none while it is turned, and after its end.
    pub engine: Option<Engine>,
    /// It was killed.
    pub dead: bool,
    /// Turns until it is killed.
    pub turns: u64,
    /// How far its clock is ahead of the world's.
    pub ahead_ms: u64,
    /// What it knew at its turn's begin.
    pub known: Known,
}

/// How often things happen, in 1/10 000 of the calls.
struct Rates {
    before: u64,
    after: u64,
    die: u64,
    interrupt: u64,
    away: u64,
    expire: u64,
    hook: u64,
    emit: u64,
    ask: u64,
    end: u64,
    lease: u64,
    work: u64,
}

/// When a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Without any effect.
    Before,
    /// With its whole effect.
    After,
}

/// Locks the world, also after a panic.
pub fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Returns the world of a seed.
    pub fn new(seed: u64, bug: Option<Bug>, words: bool) -> Self {
        let mut dice = Dice::new(seed);
        let most = if dice.chance(7000) { 3 } else { 8 };
        let count = dice.between(1, most) as usize;
        let bases: Vec<i64> =
            (0..count).map(|_| if dice.chance(3000) { dice.between(1, 50) as i64 } else { 0 }).collect();
        let mut broker = Broker::new(&bases);
        (broker.unfenced, broker.uncommitted) = (bug == Some(Bug::Unfenced), bug == Some(Bug::Uncommitted));
        let plan = Plan {
            salt: dice.any(),
            keyed: dice.chance(7000),
            weight: weight(&mut dice),
            lag_max: lag_max(&mut dice),
            change_ms_max: *dice.pick(&CHANGE_MS),
            interval: Duration::from_millis(20),
            batch_max: *dice.pick(&BATCHES),
        };
        let services = Side::BOTH.into_iter().flat_map(|side| [(side, Topic::Source), (side, Topic::Of(side))]);
        let services: Vec<_> = services.map(|(side, topic)| Service::new(side, topic, &mut dice)).collect();
        let rates = Rates::new(&mut dice);
        let agreed = dice.chance(4000).then_some(Agreed { weight: plan.weight, epoch: 1, end: None });
        let mut world = Self {
            now_ms: 1_000,
            truth: Truth::new(plan.salt, plan.keyed, plan.weight, vec![0; count]),
            broker,
            services,
            routers: Vec::new(),
            plan,
            bug,
            violation: None,
            faulty: true,
            nested: false,
            late: false,
            pending: Vec::new(),
            words,
            lines: Vec::new(),
            rates,
            away_until_ms: 0,
            agreed,
            lease: true,
            quota: dice.between(20, 300),
            keys: dice.between(1, KEYS.len() as u64) as usize,
            emitters: Vec::new(),
            dice,
        };
        world.prepare();
        world
    }

    /// Lets the stable service read the source for a while.
    fn prepare(&mut self) {
        for _ in 0..self.dice.between(0, 40) {
            self.emit();
        }
        let mut begins = Vec::new();
        for partition in 0..self.partitions() {
            let low = self.broker.topic(Topic::Source)[partition].low();
            let place = self.dice.chance(8000).then(|| {
                let lost = low > 0 && self.dice.chance(2000);
                if lost {
                    self.truth.saw("retention took unread records");
                }
                low - i64::from(lost)
            });
            self.broker.groups.get_mut(&(Side::Stable, Topic::Source)).expect("it is known")[partition] = place;
            begins.push(low);
        }
        self.truth.begin_at(begins);
        self.call(Call::Start, Side::Stable, Topic::Source);
    }

    /// Returns how many partitions there are.
    pub fn partitions(&self) -> usize {
        self.broker.places.len()
    }

    /// Changes what may be changed for the next router that is started, sometimes.
    pub fn replan(&mut self) {
        let dice = &mut self.dice;
        if dice.chance(3000) {
            self.plan.lag_max = lag_max(dice);
            self.plan.change_ms_max = *dice.pick(&CHANGE_MS);
            self.plan.batch_max = *dice.pick(&BATCHES);
        }
    }

    /// Notes the first thing that went wrong.
    pub fn violate(&mut self, what: String) {
        self.say(format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// Says what happens.
    pub fn say(&mut self, what: String) {
        if self.words {
            self.lines.push(format!("{:>7} {what}", self.now_ms));
        }
    }

    /// Starts or stops a service.
    pub fn call(&mut self, call: Call, side: Side, topic: Topic) {
        let service = self.services.iter_mut().find(|service| (service.side, service.topic) == (side, topic));
        let service = service.expect("no router calls a service for the other's topic");
        service.call(call, &mut self.broker, &mut self.dice, self.now_ms);
    }

    /// Draws whether a hook call has its effect later than it ends.
    pub fn defers(&mut self, call: Call, side: Side, topic: Topic) -> bool {
        let defers = self.late && self.faulty && self.dice.chance(LATE);
        if defers {
            let due_ms = self.now_ms + self.dice.between(1, 5_000);
            self.pending.push((due_ms, call, side, topic));
        }
        defers
    }

    /// Lets hook calls have their effect.
    fn catch_up(&mut self) {
        while let Some(place) = self.pending.iter().position(|(due_ms, ..)| *due_ms <= self.now_ms) {
            let (_, call, side, topic) = self.pending.swap_remove(place);
            self.say(format!("late: {} {} on {}", call.word(), side.word(), topic.word()));
            self.call(call, side, topic);
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
        if self.now_ms < self.away_until_ms {
            self.truth.saw("broker away");
            return Some(Fault::Before);
        }
        if self.dice.chance(self.rates.expire) && self.broker.expire() {
            self.truth.saw("transaction expired");
        }
        let fault = match self.dice.between(0, 9_999) {
            draw if draw < self.rates.before => Fault::Before,
            draw if draw < self.rates.before + self.rates.after => Fault::After,
            draw if draw < self.rates.before + self.rates.after + self.rates.die => {
                let phase = self.truth.phase.as_ref().map_or("new", Phase::words);
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

    /// Lets everything else go on for a moment.
    pub fn happen(&mut self) {
        self.now_ms += self.dice.between(0, 10);
        self.catch_up();
        if self.dice.chance(self.rates.emit) {
            for _ in 0..self.dice.between(1, 4).min(self.quota) {
                self.quota -= 1;
                self.emit();
            }
        }
        for service in 0..self.services.len() {
            let service = &mut self.services[service];
            service.tick(&mut self.broker, &mut self.dice, self.now_ms);
            if service.runs() && self.dice.chance(self.rates.work) {
                match service.work(&mut self.broker, &mut self.truth, &mut self.dice) {
                    Ok(_) => {}
                    Err(what) => self.violate(what),
                }
            }
        }
        if self.faulty {
            self.chance();
        }
    }

    /// What people and machines do out of nowhere.
    fn chance(&mut self) {
        if !self.emitters.is_empty() && self.dice.chance(1000) {
            self.end_emitter();
        }
        if self.dice.chance(self.rates.ask) {
            self.ask_weight();
        }
        if self.dice.chance(self.rates.end) {
            self.ask_end();
        }
        if self.agreed.is_some() && self.dice.chance(if self.lease { self.rates.lease } else { 500 }) {
            self.lease = !self.lease;
            if !self.lease {
                self.truth.saw("lease lost");
            }
        }
        if self.dice.chance(self.rates.away) {
            self.away_until_ms = self.now_ms + self.dice.between(1, 300);
        }
    }

    fn emit(&mut self) {
        let partition = self.dice.below(self.partitions());
        let key = (!self.dice.chance(1500)).then(|| KEYS[self.dice.below(self.keys)]);
        let transaction = match self.dice.between(0, 9) {
            0 if self.faulty && self.emitters.len() < 2 => {
                let number = self.broker.begin();
                self.emitters.push(number);
                Some(number)
            }
            0..3 => self.emitters.last().copied(),
            _ => None,
        };
        if transaction.is_some() {
            self.truth.saw("uncommitted records in the source");
        }
        self.broker.emit(partition, key, transaction);
    }

    fn end_emitter(&mut self) {
        let number = self.emitters.swap_remove(self.dice.below(self.emitters.len()));
        let fate = if self.dice.chance(5000) { Fate::Committed } else { Fate::Aborted };
        if fate == Fate::Aborted {
            self.truth.saw("aborted records in the source");
        }
        self.broker.end(number, fate);
    }

    fn ask(&mut self, ask: Ask) {
        self.say(format!("somebody asks: {ask:?}"));
        let line = serde_json::to_string(&Entry::Ask(ask)).expect("an entry has a text");
        self.broker.control.append(line, None);
    }

    fn ask_weight(&mut self) {
        let weight = weight(&mut self.dice);
        let by_hand = self.dice.chance(2000);
        match &mut self.agreed {
            Some(_) if by_hand => self.ask(Ask::SetWeight { weight }),
            Some(agreed) => {
                (agreed.weight, agreed.epoch) = (weight, agreed.epoch + 1);
                self.truth.asked(weight);
                self.say(format!("the cluster agrees on {weight}"));
            }
            None => {
                self.truth.asked(weight);
                self.ask(Ask::SetWeight { weight });
            }
        }
    }

    /// Asks for an end.
    pub fn ask_end(&mut self) {
        let end = match self.dice.chance(5000) {
            true => End::Promote,
            false => End::Abort("chance".into()),
        };
        if end == End::Promote {
            self.truth.asked(Weight::FULL);
        }
        let by_hand = self.dice.chance(2000);
        match &mut self.agreed {
            Some(agreed) if !by_hand => {
                if agreed.end.is_none() {
                    self.truth.saw("cluster's end taken over");
                    agreed.end = Some(end);
                }
            }
            Some(_) | None => self.ask(match end {
                End::Promote => Ask::Promote,
                End::Abort(reason) => Ask::Abort { reason },
            }),
        }
    }

    /// Says what a router that is turned now is told.
    pub fn steering(&self) -> Steering {
        match &self.agreed {
            None => Steering::Alone,
            Some(agreed) => Steering::Cluster(self.lease.then(|| agreed.clone())),
        }
    }

    /// Returns the weight that the routers are to come to.
    pub fn wanted(&self) -> Weight {
        let asked = self.control().filter_map(|entry| match entry {
            Entry::Ask(Ask::SetWeight { weight }) => Some(weight),
            _ => None,
        });
        match &self.agreed {
            Some(agreed) => agreed.weight,
            None => asked.last().unwrap_or(self.plan.weight),
        }
    }

    fn control(&self) -> impl Iterator<Item = Entry> {
        let visible =
            (0..self.broker.control.stable()).filter_map(|at| self.broker.control.get(&self.broker.fates, at));
        visible.map(|line| serde_json::from_str(line).expect("entries come back"))
    }

    /// Returns what a router that is turned now knows.
    pub fn known(&self) -> Known {
        let steering = self.steering();
        let agreed = matches!(&steering, Steering::Cluster(Some(Agreed { end: Some(End::Abort(_)), .. })));
        let aborted = agreed || self.control().any(|entry| matches!(entry, Entry::Ask(Ask::Abort { .. })));
        Known { blind: steering == Steering::Cluster(None), aborted }
    }

    /// Ends everything that goes wrong.
    pub fn heal(&mut self) {
        (self.faulty, self.lease, self.away_until_ms) = (false, true, 0);
        while !self.emitters.is_empty() {
            self.end_emitter();
        }
    }

    /// Emits no more.
    pub fn quiet(&mut self) {
        self.quota = 0;
    }

    /// Emits some more committed records.
    pub fn emit_last(&mut self) {
        for _ in 0..20 {
            let partition = self.dice.below(self.partitions());
            self.broker.emit(partition, Some(KEYS[0]), None);
        }
    }
}

impl Rates {
    fn new(dice: &mut Dice) -> Self {
        Self {
            before: *dice.pick(&[0, 30, 200]),
            after: *dice.pick(&[0, 30, 200]),
            die: *dice.pick(&[0, 30, 150]),
            interrupt: *dice.pick(&[0, 30, 200]),
            away: *dice.pick(&[0, 0, 10]),
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

fn lag_max(dice: &mut Dice) -> Option<u64> {
    dice.chance(3000).then(|| dice.between(0, 20))
}

fn weight(dice: &mut Dice) -> Weight {
    let bp = match dice.between(0, 9) {
        0 => 0,
        1 => Weight::WHOLE,
        2..5 => dice.between(1, 1_000) as u16,
        _ => dice.between(0, 10_000) as u16,
    };
    Weight::from_bp(bp).expect("it is at most the whole")
}

impl World {
    /// Returns what is still to be done in a run that has no end.
    pub fn unsettled(&self) -> Option<String> {
        let wanted = self.wanted();
        self.truth.splits.iter().enumerate().find_map(|(partition, split)| {
            let Some((split, next)) = split else { return Some(format!("partition {partition} has no place")) };
            let (weight, _) = split.weight();
            if self.broker.next(Topic::Source, partition, *next).is_some() {
                return Some(format!("partition {partition} has records that nobody took"));
            }
            (weight != wanted || split.former().is_some()).then(|| {
                format!(
                    "partition {partition} has weight {weight}, expected {wanted}, and waits for {:?}",
                    split.former()
                )
            })
        })
    }

    /// Does what an error asks an operator for.
    pub fn operate(&mut self, error: &str) {
        if !error.contains("has no place in partition") {
            return;
        }
        self.truth.saw("place set by an operator");
        let lows: Vec<i64> = self.broker.topic(Topic::Source).iter().map(|log| log.low()).collect();
        let group = self.broker.groups.get_mut(&(Side::Stable, Topic::Source)).expect("it is known");
        for (next, low) in group.iter_mut().zip(lows) {
            next.get_or_insert(low);
        }
    }
}
