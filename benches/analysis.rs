//! What judging costs: `cargo bench --bench analysis`.

use std::hint::black_box;

use aviary::domain::sequential::{Policy, Sequential};
use aviary::domain::window::Tally;
use criterion::{Criterion, criterion_group, criterion_main};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Returns a request: whether it is the canary's, whether it failed, its latency in microseconds.
fn event(number: u64) -> (bool, bool, u64) {
    let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
    let is_canary = mixed.is_multiple_of(20);
    // The same second again and again must not add up to evidence of harm: the canary is a little better.
    let (error, latency_us) = match is_canary {
        false => (mixed.is_multiple_of(199), 20_000 + mixed % 300_000),
        true => (false, 20_000 + mixed % 250_000),
    };
    (is_canary, error, latency_us)
}

fn record(tally: &mut Tally, (is_canary, error, latency_us): (bool, bool, u64)) {
    if is_canary { &mut tally.canary } else { &mut tally.stable }.record(latency_us, error);
}

fn analysis(criterion: &mut Criterion) {
    let mut tally = Tally::default();
    let mut number = 0;
    criterion.bench_function("a request counted", |bencher| {
        bencher.iter(|| {
            number += 1;
            record(&mut tally, black_box(event(number)));
        });
    });
    for (name, requests, from) in [("warm", 200, 300), ("warm", 20_000, 300), ("cold", 200, 1)] {
        let mut second = Tally::default();
        (0..requests).map(event).for_each(|event| record(&mut second, event));
        let second = second.take();
        let mut test = Sequential::new(Policy::default());
        for at in 1..from {
            test.advance(at * 1000, &second);
        }
        let test = test;
        let mut running = test.clone();
        let mut at = from;
        criterion.bench_function(&format!("a verdict, {name}, {requests} requests a second"), |bencher| {
            bencher.iter(|| {
                if at > from + 25 {
                    (running, at) = (test.clone(), from);
                }
                at += 1;
                running.advance(at * 1000, black_box(&second))
            });
        });
    }
    println!("state of a service: {} bytes, and the bets in force", std::mem::size_of::<Sequential>());
}

criterion_group!(benches, analysis);
criterion_main!(benches);
