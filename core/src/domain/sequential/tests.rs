use super::*;
use crate::domain::classes::ErrorClasses;
use crate::domain::window::Tally;
use proptest::prelude::*;

/// Traffic drawn from a seed.
struct Traffic(u64);

impl Traffic {
    fn chance(&mut self) -> f64 {
        chance(&mut self.0)
    }

    /// Draws a standard normal, near enough.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.chance()).sum::<f64>() - 6.0
    }

    /// Returns a second of requests: so many, the canary's share, both versions' error rates, the canary's slowness.
    fn second(&mut self, requests: u64, share: f64, errors: (f64, f64), slowness: f64) -> Evidence {
        let mut tally = Tally::default();
        for _ in 0..requests {
            let is_canary = self.chance() < share;
            let (counts, rate, times) =
                if is_canary { (&mut tally.canary, errors.1, slowness) } else { (&mut tally.stable, errors.0, 1.0) };
            let latency = 80_000.0 * (0.6 * self.normal()).exp() * times;
            let failed = self.chance() < rate;
            counts.record(latency as u64, failed);
        }
        tally.take()
    }
}

/// Returns the first second at which the test said so; each second of traffic comes from `next`.
fn first(
    policy: &Policy,
    seconds: u64,
    decision: SequentialVerdict,
    mut next: impl FnMut(u64) -> Evidence,
) -> Option<u64> {
    let mut test = Sequential::new(policy.clone());
    (1..=seconds).find(|second| test.advance(second * 1000, &next(*second)).decision == decision)
}

#[test]
fn a_canary_that_fails_every_request_is_rolled_back_at_once() {
    let mut traffic = Traffic(1);
    let found =
        first(&Policy::default(), 10, SequentialVerdict::Rollback, |_| traffic.second(200, 0.05, (0.005, 1.0), 1.0));
    assert_eq!(found, Some(1));
}

#[test]
fn harm_is_found_and_what_both_share_is_not() {
    let mut traffic = Traffic(2);
    let policy = Policy::default();
    let errors = first(&policy, 120, SequentialVerdict::Rollback, |_| traffic.second(200, 0.05, (0.005, 0.055), 1.0));
    assert!(errors.is_some_and(|second| second < 60), "{errors:?}");
    let slow = first(&policy, 300, SequentialVerdict::Rollback, |_| traffic.second(200, 0.05, (0.005, 0.005), 1.2));
    assert!(slow.is_some_and(|second| (10..120).contains(&second)), "{slow:?}");
    let late = first(&policy, 700, SequentialVerdict::Rollback, |second| {
        let rate = if second > 500 { 0.055 } else { 0.005 };
        traffic.second(200, 0.05, (0.005, rate), 1.0)
    });
    assert!(late.is_some_and(|second| (500..620).contains(&second)), "{late:?}");
    let incident = first(&policy, 600, SequentialVerdict::Rollback, |second| {
        let rate = if (200..300).contains(&second) { 0.3 } else { 0.005 };
        traffic.second(200, 0.05, (rate, rate), 1.0)
    });
    assert_eq!(incident, None);
}

#[test]
fn a_canary_that_warms_up_is_not_a_slow_one() {
    for seed in 0..5 {
        let mut traffic = Traffic(100 + seed);
        let found = first(&Policy::default(), 200, SequentialVerdict::Rollback, |second| {
            let slowness = 1.0 + 2.0 * (-(second as f64) / 8.0).exp();
            traffic.second(200, 0.05, (0.005, 0.005), slowness)
        });
        assert_eq!(found, None, "seed {seed}");
    }
}

#[test]
fn a_healthy_canary_is_promoted_and_a_silent_one_is_not() {
    let mut traffic = Traffic(3);
    let policy = Policy::default();
    let healthy = first(&policy, 600, SequentialVerdict::Promote, |_| traffic.second(200, 0.2, (0.005, 0.005), 1.0));
    assert!(healthy.is_some_and(|second| second > 30), "{healthy:?}");
    assert_eq!(first(&policy, 600, SequentialVerdict::Promote, |_| Evidence::default()), None);
    assert_eq!(first(&policy, 600, SequentialVerdict::Promote, |_| traffic.second(200, 0.0, (0.005, 0.0), 1.0)), None);
}

/// The property itself, small; `AVIARY_ROUNDS=10000` looks longer. Error rates jump about, for both versions alike.
#[test]
fn healthy_canaries_are_rolled_back_more_rarely_than_alpha() {
    let rounds = std::env::var("AVIARY_ROUNDS").map_or(300, |rounds| rounds.parse().expect("a number"));
    for alpha in [0.2, 0.05] {
        let policy = Policy { alpha, horizon_seconds: 200.0, ..Policy::default() };
        let rolled_back = (0..rounds).filter(|round| {
            let mut traffic = Traffic(7_000 + round);
            let (mut left, mut rate) = (0, 0.01);
            let found = first(&policy, 200, SequentialVerdict::Rollback, |_| {
                if left == 0 {
                    left = 1 + (traffic.chance() * 30.0) as u64;
                    rate = if traffic.chance() < 0.3 { traffic.chance() * 0.5 } else { 0.01 };
                }
                left -= 1;
                traffic.second(60, 0.2, (rate, rate), 1.0)
            });
            found.is_some()
        });
        // Three standard deviations above α.
        let limit = rounds as f64 * alpha + 3.0 * (rounds as f64 * alpha * (1.0 - alpha)).sqrt();
        let found = rolled_back.count();
        assert!((found as f64) <= limit, "{found} of {rounds} at α = {alpha}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn three_nodes_in_any_order_decide_as_one_that_saw_all(seed in any::<u64>(), orders in prop::collection::vec(0usize..6, 40)) {
        const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let (mut one, mut three) = (Sequential::new(Policy::default()), Sequential::new(Policy::default()));
        let mut traffic = Traffic(seed);
        for (second, order) in (1..).zip(&orders) {
            let parts = [0, 1, 2].map(|_| traffic.second(30, 0.2, (0.02, 0.05), 1.1));
            let mut whole = Evidence::default();
            parts.iter().for_each(|part| whole.merge(part));
            let mut merged = Evidence::default();
            ORDERS[*order].iter().for_each(|node| merged.merge(&parts[*node]));
            prop_assert_eq!(&whole, &merged);
            let (found, again) = (one.advance(second * 1000, &whole), three.advance(second * 1000, &merged));
            prop_assert_eq!(found, again);
        }
    }
}

/// Both classes, as by default.
const BOTH: ErrorClasses = ErrorClasses { client: true, redirect: true };

/// Returns the test of a rollout that compares `classes`, and knows the canary's weight.
fn comparing(policy: Policy, classes: ErrorClasses, weight: Option<f64>) -> Sequential {
    let mut test = Sequential::new(policy);
    test.compare_classes(classes);
    test.expect_weight(weight);
    test
}

impl Traffic {
    /// Returns a second of requests: each version's share of answers with a status of its own, the others are 200.
    fn answers(&mut self, requests: u64, weight: f64, stable: (u16, f64), canary: (u16, f64)) -> Evidence {
        let mut tally = Tally::default();
        for _ in 0..requests {
            let is_canary = self.chance() < weight;
            let (counts, (status, share)) =
                if is_canary { (&mut tally.canary, canary) } else { (&mut tally.stable, stable) };
            let status = if self.chance() < share { status } else { 200 };
            counts.record((80_000.0 * (0.6 * self.normal()).exp()) as u64, status >= 500);
            counts.classes.add(status);
        }
        tally.take()
    }
}

#[test]
fn a_canary_that_answers_only_what_is_no_error_by_itself_is_rolled_back() {
    for (status, weight, known) in [404, 307, 401, 429, 301]
        .into_iter()
        .flat_map(|status| [0.05, 0.2, 0.5].map(|weight| (status, weight)))
        .flat_map(|(status, weight)| [(status, weight, true), (status, weight, false)])
    {
        let mut traffic = Traffic(u64::from(status));
        let mut run = |classes| {
            let mut test = comparing(Policy::default(), classes, known.then_some(weight));
            (1..=60).find_map(|second| {
                let evidence = traffic.answers(200, weight, (status, 0.02), (status, 1.0));
                let found = test.advance(second * 1000, &evidence);
                (found.decision == SequentialVerdict::Rollback).then(|| (second, test.reason(&found)))
            })
        };
        let (second, reason) = run(BOTH).expect("it is found");
        assert!(second <= 12, "{status} at {weight}: {second} s");
        let class = if status < 400 { "3xx answers: " } else { "4xx answers: " };
        assert!(reason.starts_with(class), "{reason}");
        let other = ErrorClasses { client: status < 400, redirect: status >= 400 };
        assert_eq!(run(other), None, "{status}: only what is compared counts");
    }
}

#[test]
fn a_share_of_404_that_rises_late_is_found_and_a_small_one_is_tolerated() {
    let rolled_back = |canary: f64, from: u64| {
        let mut traffic = Traffic(77);
        let mut test = comparing(Policy::default(), BOTH, Some(0.1));
        (1..=900).find(|second| {
            let share = if *second > from { canary } else { 0.03 };
            let evidence = traffic.answers(200, 0.1, (404, 0.03), (404, share));
            test.advance(second * 1000, &evidence).decision == SequentialVerdict::Rollback
        })
    };
    let late = rolled_back(0.3, 300);
    assert!(late.is_some_and(|second| (301..360).contains(&second)), "{late:?}");
    assert_eq!((rolled_back(0.034, 0), rolled_back(0.03, 0)), (None, None));
}

/// A client that comes beside the usual traffic: so many requests a second until then, which all get one answer, and all from
/// its version.
struct Guest {
    until: u64,
    rate: u64,
    is_canary: bool,
    status: u16,
}

/// Benign traffic in which 4xx and 3xx come in clumps, because users stay at their version: crawlers, logins that expired, busy
/// clients.
struct Clumps {
    traffic: Traffic,
    guests: Vec<Guest>,
    weight: f64,
    /// Guests that come in a second, how long they stay, and how many requests a second they send: on average.
    come: (f64, f64, f64),
}

impl Clumps {
    fn second(&mut self, second: u64) -> Evidence {
        let Self { traffic, guests, weight, come: (often, long, many) } = self;
        let exponential = |traffic: &mut Traffic, mean: f64| -mean * (1.0 - traffic.chance()).ln();
        if traffic.chance() < *often {
            let until = second + exponential(traffic, *long) as u64;
            let rate = exponential(traffic, *many) as u64;
            let status = [404, 401, 429, 302][(traffic.chance() * 4.0) as usize];
            guests.push(Guest { until, rate, is_canary: traffic.chance() < *weight, status });
        }
        guests.retain(|guest| guest.until >= second);
        let mut tally = Tally::default();
        for guest in guests.iter() {
            let counts = if guest.is_canary { &mut tally.canary } else { &mut tally.stable };
            for _ in 0..guest.rate {
                counts.record(40_000, false);
                counts.classes.add(guest.status);
            }
        }
        let mut evidence = tally.take();
        evidence.merge(&traffic.answers(100, *weight, (404, 0.02), (404, 0.02)));
        evidence
    }
}

/// `AVIARY_ROUNDS=2000` looks longer.
#[test]
fn clients_that_get_404_401_429_in_clumps_are_no_harm() {
    let rounds = std::env::var("AVIARY_ROUNDS").map_or(100, |rounds| rounds.parse().expect("a number"));
    for (weight, come) in [
        (0.05, (0.02, 5.0, 40.0)),
        (0.05, (0.05, 60.0, 20.0)),
        (0.2, (0.02, 120.0, 60.0)),
        (0.5, (0.2, 10.0, 20.0)),
        (0.5, (0.01, 300.0, 100.0)),
    ] {
        let alpha = 0.05;
        let policy = Policy { alpha, horizon_seconds: 600.0, ..Policy::default() };
        let rolled_back = (0..rounds).filter(|round| {
            let mut clumps = Clumps { traffic: Traffic(91_000 + round), guests: Vec::new(), weight, come };
            let mut test = comparing(policy.clone(), BOTH, Some(weight));
            (1..=300).any(|second| {
                let found = test.advance(second * 1000, &clumps.second(second));
                found.decision == SequentialVerdict::Rollback && test.reason(&found).contains("xx answers")
            })
        });
        let limit = rounds as f64 * alpha + 3.0 * (rounds as f64 * alpha * (1.0 - alpha)).sqrt();
        let found = rolled_back.count();
        assert!((found as f64) <= limit, "{found} of {rounds} at {weight} with {come:?}");
    }
}

/// Before 30 s nothing counts for a promotion: what a test looks at in that time stays at 1.
#[test]
fn a_canary_without_any_error_is_promoted_beside_a_stable_without_any() {
    for (requests, share) in [(10, 0.5), (50, 0.2), (200, 0.05)] {
        let mut traffic = Traffic(5);
        let mut test = Sequential::new(Policy::default());
        let promoted = (1..=900).find(|second| {
            let found = test.advance(second * 1000, &traffic.second(requests, share, (0.0, 0.0), 1.0));
            assert!(*second > 30 || found.promotion.iter().all(|e| *e == 0.0), "{second} s: {found:?}");
            found.decision == SequentialVerdict::Promote
        });
        assert!(promoted.is_some_and(|second| second < 600), "{requests}/s at {share}: {promoted:?}");
        let latency = Required::new("latency", Harm::Latency(0.95, Slowdown::Increase(0.1)));
        let policy =
            Policy { required: vec![Required::new("errors", Harm::Errors(0.005)), latency], ..Policy::default() };
        let canary = (requests as f64 * share) as u64;
        let constant = first(&policy, 900, SequentialVerdict::Promote, |_| {
            let mut evidence = Evidence::default();
            (0..canary).for_each(|_| evidence.canary.record(1_000, false));
            (canary..requests).for_each(|_| evidence.stable.record(1_000, false));
            evidence
        });
        assert!(constant.is_some_and(|second| second < 300), "answers that all take 1 ms: {constant:?}");
    }
}
