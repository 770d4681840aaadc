//! One seed's life: routers are started, turned and killed while things go wrong; then all must come to a good end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use aviary::ports::{OutsideError, Topic};
use aviary::router::engine::{Engine, Turn, Wait};
use aviary_core::domain::router_state::RouterPhase;
use aviary_core::domain::side::Side;
use sim::{Violation, broken};

use super::coverage::RouterCoverage;
use super::seeded_bugs::{self, Bug};
use super::truth::KnownRecord;
use super::world::{Router, Shared, SplitWorld, lock};

/// Turns within which a router must come to its end once nothing goes wrong any more.
const TURNS_MAX: u64 = 3_000;

/// How far a router's clock may be from the world's, to either side of their middle.
const SKEW_MS: u64 = 3_000;

/// What became of a seed.
pub struct LifeOutcome {
    /// What broke first; none if nothing did.
    pub violation: Option<Violation>,
    /// Faults and events that this run reached.
    pub coverage: RouterCoverage,
    /// What happened, if that was asked for.
    pub lines: Vec<String>,
}

/// Runs a seed to its end: faults, healing, and the final checks.
pub fn run(seed: u64, bug: Option<Bug>, late: bool, words: bool) -> LifeOutcome {
    let shared = Arc::new(Mutex::new(SplitWorld::new(seed, bug, words)));
    lock(&shared).late = late;
    live(&shared);
    if lock(&shared).violation.is_none()
        && let Err(what) = end_well(&shared)
    {
        lock(&shared).violate(what);
    }
    // The routers hold on to the world.
    let routers = std::mem::take(&mut lock(&shared).routers);
    drop(routers);
    let mut world = lock(&shared);
    let lines = std::mem::take(&mut world.lines);
    LifeOutcome { violation: world.violation.take(), coverage: world.truth.coverage.clone(), lines }
}

fn live(shared: &Shared) {
    let steps = lock(shared).dice.between(50, 400);
    for _ in 0..steps {
        let who = {
            let mut world = lock(shared);
            let pause = world.dice.between(0, 100);
            world.now_ms += pause;
            world.happen();
            let alive = alive(&world);
            match alive.len() {
                0 if world.dice.chance(3000) => None,
                0 => continue,
                1 if world.dice.chance(50) => {
                    world.truth.saw("takeover between turns");
                    None
                }
                count => {
                    let at = world.dice.below(count);
                    Some(alive[at])
                }
            }
        };
        let who = who.unwrap_or_else(|| start(shared));
        turn(shared, who);
        if lock(shared).violation.is_some() {
            return;
        }
    }
}

fn alive(world: &SplitWorld) -> Vec<usize> {
    let alive = |router: &Router| !router.dead && router.engine.is_some();
    world.routers.iter().enumerate().filter(|(_, router)| alive(router)).map(|(who, _)| who).collect()
}

/// Starts a router; those that are there have only some turns left.
fn start(shared: &Shared) -> usize {
    let (who, bug, plan, partitions) = {
        let mut world = lock(shared);
        let (who, left) = (world.routers.len(), world.dice.between(0, 20));
        for router in &mut world.routers {
            router.turns = router.turns.min(left);
        }
        world.replan();
        let (change_ms_max, lag_max) = (world.plan.change_ms_max, world.plan.lag_max);
        let known = KnownRecord { change_ms_max, lag_max, ..KnownRecord::default() };
        let ahead_ms = world.dice.between(0, 2 * SKEW_MS);
        world.routers.push(Router { engine: None, dead: false, turns: u64::MAX, ahead_ms, producer_epoch: 0, known });
        world.say(format!("router {who} is started"));
        (who, world.bug, world.plan, world.partitions())
    };
    let (broker, hooks) = seeded_bugs::ports(shared, who, partitions, bug);
    lock(shared).routers[who].engine = Some(Engine::new(broker, hooks, plan));
    who
}

/// Lets another router go on in the middle of a call, sometimes.
pub fn interrupt(shared: &Shared, who: usize, hook: bool) {
    let (other, turns) = {
        let mut world = lock(shared);
        if !world.is_interrupted(hook) {
            return;
        }
        world.nested = true;
        world.truth.saw("takeover in the middle of a call");
        let others: Vec<usize> = alive(&world).into_iter().filter(|other| *other != who).collect();
        let other = (!others.is_empty()).then(|| others[world.dice.below(others.len())]);
        (other, world.dice.between(1, if hook { 100 } else { 15 }))
    };
    let other = other.unwrap_or_else(|| start(shared));
    for _ in 0..turns {
        let mut world = lock(shared);
        let pause = world.dice.between(0, 100);
        world.now_ms += pause;
        drop(world);
        turn(shared, other);
    }
    lock(shared).nested = false;
}

/// Turns a router; returns what came of it, none if it is dead.
fn turn(shared: &Shared, who: usize) -> Option<Result<Turn, OutsideError>> {
    let (mut engine, now_ms, steering) = {
        let mut world = lock(shared);
        let known = world.known();
        let (now_ms, steering) = (world.now_ms, world.steering());
        let router = &mut world.routers[who];
        let KnownRecord { change_ms_max, lag_max, .. } = router.known;
        router.known = KnownRecord { now_ms: now_ms + router.ahead_ms, change_ms_max, lag_max, ..known };
        router.turns = router.turns.saturating_sub(1);
        (router.engine.take()?, now_ms + router.ahead_ms, steering)
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.turn(now_ms, &steering)));
    let mut world = lock(shared);
    let Ok(result) = outcome
        .map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
        })
        .map_err(|text| world.violate(broken!("panic", "{text}")))
    else {
        return None;
    };
    match &result {
        Ok(Turn::Waits(Wait::Members { .. })) => world.truth.saw("group still had members"),
        Ok(Turn::Waits(Wait::Lag(_))) => {
            world.truth.saw("weight waited for the canary's lag");
        }
        Ok(turn) => world.say(format!("router {who}: {turn:?}")),
        Err(error) => {
            world.say(format!("router {who}: {error}"));
            world.operate(&error.why);
        }
    }
    let router = &mut world.routers[who];
    if router.dead || router.turns == 0 {
        router.dead = true;
        return None;
    }
    router.engine = Some(engine);
    Some(result)
}

/// Lets nothing go wrong any more, and expects that all comes to a good end.
fn end_well(shared: &Shared) -> Result<(), Violation> {
    let (who, over) = settle(shared)?;
    let mut world = lock(shared);
    let world = &mut *world;
    if over {
        let Some(RouterPhase::Done { winner, .. }) = world.truth.phase.clone() else {
            return Err(broken!("end", "router {who} says it is over in {:?}", world.truth.phase));
        };
        world.emit_last();
        for service in &world.services {
            let (side, topic) = (service.side, service.topic);
            if service.runs() != ((side, topic) == (winner, Topic::Source)) {
                let runs = if service.runs() { "runs" } else { "doesn't run" };
                return Err(broken!(
                    "end",
                    "{} won, and the {} service {runs} on {}",
                    winner.word(),
                    side.word(),
                    topic.word()
                ));
            }
        }
        world.truth.saw(if winner == Side::Canary { "promoted" } else { "aborted" });
    } else {
        world.truth.saw("settled without an end");
    }
    for service in &mut world.services {
        service.finish(&mut world.broker, &mut world.truth)?;
    }
    world.truth.complete(&world.broker)
}

/// Turns a router until it is over, or nothing is left to be done; returns which, and whether it is over.
fn settle(shared: &Shared) -> Result<(usize, bool), Violation> {
    let who = {
        let mut world = lock(shared);
        world.heal();
        if world.dice.chance(7000) {
            world.send_end();
        }
        world.say("nothing goes wrong from here on".into());
        let alive = alive(&world);
        alive.last().copied().filter(|_| world.dice.chance(5000))
    };
    let who = who.unwrap_or_else(|| start(shared));
    let (mut calm, mut last) = (0, String::new());
    for number in 0..TURNS_MAX {
        {
            let mut world = lock(shared);
            world.now_ms += 100;
            if number > 50 {
                world.quiet();
            }
            world.routers[who].turns = u64::MAX;
            world.happen();
        }
        let result = turn(shared, who);
        let mut world = lock(shared);
        if let Some(violation) = &world.violation {
            return Err(violation.clone());
        }
        last = match result {
            Some(Ok(Turn::Over)) => return Ok((who, true)),
            Some(Ok(Turn::Idle)) => match world.unsettled().filter(|_| number > 50) {
                None => {
                    calm += u32::from(number > 50);
                    "no records".into()
                }
                Some(unsettled) => unsettled,
            },
            // A rollout that is over isn't begun.
            Some(Ok(Turn::Waits(_))) if number > 50 && world.truth.phase.is_none() && world.is_rolled_back() => {
                world.truth.saw("a rollout that was rolled back isn't begun");
                calm += 1;
                "nothing".into()
            }
            Some(Ok(Turn::Waits(wait))) => wait.to_string(),
            Some(Ok(Turn::Busy(count))) => format!("busy with {count} records"),
            Some(Err(error)) => error.to_string(),
            None => "it died".into(),
        };
        if calm > 5 {
            return Ok((who, false));
        }
        let world = &mut *world;
        if number % 10 == 9 {
            for service in &mut world.services {
                service.finish(&mut world.broker, &mut world.truth)?;
            }
        }
    }
    let phase = lock(shared).truth.phase.as_ref().map_or("new", RouterPhase::words);
    Err(broken!("liveness", "after {TURNS_MAX} calm turns in {phase:?} it waits for: {last}"))
}
