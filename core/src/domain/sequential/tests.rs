use super::*;
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
