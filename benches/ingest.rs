//! What a reported event costs: `cargo bench --bench ingest`.

use std::hint::black_box;

use aviary::adapters::clock::BootClock;
use aviary::domain::time::Mono;
use aviary::domain::window::{Tally, Window};
use aviary::ports::Clock;
use aviary::telemetry::event::ReportedEvent;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

mod common;

use common::{event, intake};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn ingest(criterion: &mut Criterion) {
    const BATCH: u64 = 10_000;
    let now_ms = BootClock.now().wall.0;
    let mut group = criterion.benchmark_group("ingest");
    group.throughput(Throughput::Elements(BATCH));
    for (name, with_id, services) in [
        ("decoded and counted", false, 1),
        ("decoded, known by its id, and counted", true, 1),
        ("decoded and counted, of 1000 services", false, 1000),
    ] {
        let intake = intake(services);
        // Ids are new for so many batches that they have left the memory when they come again.
        let batches: Vec<Vec<Vec<u8>>> = (0..150)
            .map(|batch| (0..BATCH).map(|i| event(batch * BATCH + i, now_ms, with_id, services)).collect())
            .collect();
        let mut next = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                next += 1;
                let batch = &batches[next % batches.len()];
                black_box(intake.take(batch.iter().map(|bytes| ReportedEvent::from_protobuf(bytes))))
            });
        });
    }
    group.finish();
}

/// What a window costs each tenth of a second, when it is full: it takes what was counted, forgets what is old, and is asked.
fn window(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("window");
    for seconds in [10, 300, 3600] {
        let mut traffic = Tally::default();
        (0..1_000u64).for_each(|i| traffic.stable.record(20_000 + i * 7_919 % 300_000, i.is_multiple_of(199)));
        (0..50u64).for_each(|i| traffic.canary.record(20_000 + i * 7_919 % 300_000, i.is_multiple_of(199)));
        let evidence = traffic.take();
        let (mut window, mut now) = (Window::default(), Mono::default());
        let mut turn = move || {
            now = now.after_ms(100);
            window.add(now, &evidence);
            window.expire(now, seconds * 1000);
            black_box(window.total().canary.count)
        };
        (0..seconds * 10 + 10).for_each(|_| _ = turn());
        group.bench_function(format!("{seconds} s"), |bencher| bencher.iter(&mut turn));
    }
    group.finish();
}

criterion_group!(benches, ingest, window);
criterion_main!(benches);
