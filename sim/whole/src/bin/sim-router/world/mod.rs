//! One seed's world: the broker, the services, who writes to the topics and what goes wrong.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aviary::ports::Topic;
use aviary::router::engine::{CommittedWeight, Engine, Plan};
use aviary_core::domain::assignment::TicketHash;
use aviary_core::domain::router_state::HookCall;
use aviary_core::domain::side::Side;
use aviary_core::domain::weights::Weight;

mod faults;
mod workload;

pub use faults::Fault;
use faults::Rates;
use workload::KEYS;

use super::broker::MemoryBroker;
use super::seeded_bugs::Bug;
use super::services::SimulatedService;
use super::truth::{KnownRecord, RouterTruth};
use sim::Violation;
use sim::dice::Dice;

/// The world, as its routers reach it.
pub type Shared = Arc<Mutex<SplitWorld>>;

const CHANGE_MS: [u64; 5] = [0, 50, 500, 5_000, 1_000_000];
const BATCHES: [usize; 5] = [1, 2, 5, 20, 100];

/// Everything that exists in a run: broker, routers, services, and the observer.
pub struct SplitWorld {
    /// Source of all chance in the run.
    pub dice: Dice,
    /// Virtual time, in milliseconds since the run began.
    pub now_ms: u64,
    /// Topics and groups that all processes share.
    pub broker: MemoryBroker,
    /// Both services, on each topic that they may read.
    pub services: Vec<SimulatedService>,
    /// Observer that knows what is committed, and checks it.
    pub truth: RouterTruth,
    /// Every router process that was ever started.
    pub routers: Vec<Router>,
    /// What the routers are to do.
    pub plan: Plan,
    /// Seeded bug that this run has; none in a sound run.
    pub bug: Option<Bug>,
    /// What went wrong first; none as long as nothing did.
    pub violation: Option<Violation>,
    /// True while faults are injected.
    pub faulty: bool,
    /// A router is turned in the middle of another's call.
    pub nested: bool,
    /// Hook calls may be overtaken by another router, or have their effect long after they failed.
    pub late: bool,
    /// The newest call's number, of each version.
    pub called: [u64; 2],
    /// Hook calls that failed, and when they have their effect.
    pending: Vec<(u64, HookCall, Side, Topic, u64)>,
    /// True if the run keeps its lines.
    pub words: bool,
    /// Lines of what happened, if `words` is set.
    pub lines: Vec<String>,
    rates: Rates,
    unavailable_until_ms: u64,
    /// The cluster's decisions; none when routers are on their own.
    committed: Option<CommittedWeight>,
    /// The cluster can be asked.
    lease: bool,
    /// Records that are still to be emitted.
    quota: u64,
    keys: usize,
    /// Numbers of the emitters' open transactions.
    emitters: Vec<usize>,
}

/// A process of the router, which may be one of several at a time.
pub struct Router {
    /// Its engine; none while it is turned, and after its end.
    pub engine: Option<Engine>,
    /// True once it was killed: its turns have no effect any more.
    pub dead: bool,
    /// Turns until it is killed.
    pub turns: u64,
    /// How far its clock is ahead of the world's.
    pub ahead_ms: u64,
    /// Its producer epoch, which fences older ones.
    pub producer_epoch: u64,
    /// What it knew at its turn's begin.
    pub known: KnownRecord,
}

/// Locks the world, also after a panic.
pub fn lock(world: &Shared) -> MutexGuard<'_, SplitWorld> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SplitWorld {
    /// Returns the world of a seed.
    pub fn new(seed: u64, bug: Option<Bug>, words: bool) -> Self {
        let mut dice = Dice::new(seed);
        let most = if dice.chance(7000) { 3 } else { 8 };
        let count = dice.between(1, most) as usize;
        let bases: Vec<i64> =
            (0..count).map(|_| if dice.chance(3000) { dice.between(1, 50) as i64 } else { 0 }).collect();
        let mut broker = MemoryBroker::new(&bases);
        (broker.unfenced, broker.uncommitted) = (bug == Some(Bug::Unfenced), bug == Some(Bug::Uncommitted));
        let plan = Plan {
            hash: TicketHash::Salted(dice.any()),
            keyed: dice.chance(7000),
            weight: weight(&mut dice),
            lag_max: lag_max(&mut dice),
            change_ms_max: *dice.pick(&CHANGE_MS),
            interval: Duration::from_millis(20),
            batch_max: *dice.pick(&BATCHES),
        };
        let services = Side::BOTH.into_iter().flat_map(|side| [(side, Topic::Source), (side, Topic::Of(side))]);
        let services: Vec<_> = services.map(|(side, topic)| SimulatedService::new(side, topic, &mut dice)).collect();
        let rates = Rates::new(&mut dice);
        let committed = dice.chance(4000).then_some(CommittedWeight {
            weight: plan.weight,
            weight_version: 1,
            hash: plan.hash,
            end: None,
        });
        let mut world = Self {
            now_ms: 1_000,
            truth: RouterTruth::new(plan.hash, plan.keyed, plan.weight, vec![0; count]),
            broker,
            services,
            routers: Vec::new(),
            plan,
            bug,
            violation: None,
            faulty: true,
            nested: false,
            late: false,
            called: [0; 2],
            pending: Vec::new(),
            words,
            lines: Vec::new(),
            rates,
            unavailable_until_ms: 0,
            committed,
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
        self.call(HookCall::Start, Side::Stable, Topic::Source, 0);
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

    /// Keeps the first thing that went wrong.
    pub fn violate(&mut self, violation: Violation) {
        self.say(format!("VIOLATION {violation}"));
        self.violation.get_or_insert(violation);
    }

    /// Keeps a line of what happens, if `words` is set.
    pub fn say(&mut self, what: String) {
        if self.words {
            self.lines.push(format!("{:>7} {what}", self.now_ms));
        }
    }

    /// Starts or stops a service, unless a newer call of its version has come before.
    pub fn call(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) {
        if number < self.called[side as usize] {
            return;
        }
        self.called[side as usize] = number;
        let service = self.services.iter_mut().find(|service| (service.side, service.topic) == (side, topic));
        let service = service.expect("no router calls a service for the other's topic");
        service.call(call, &mut self.broker, &mut self.dice, self.now_ms);
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
