//! What a reported event costs: `cargo bench --bench ingest`.

use std::hint::black_box;

use aviary::adapters::clock::BootClock;
use aviary::ports::Clock;
use aviary::telemetry::event::Event;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

mod common;

use common::{event, intake};

fn ingest(criterion: &mut Criterion) {
    const BATCH: u64 = 10_000;
    let now_ms = BootClock.now().wall.0;
    let mut group = criterion.benchmark_group("ingest");
    group.throughput(Throughput::Elements(BATCH));
    for (name, with_id) in [("decoded and counted", false), ("decoded, known by its id, and counted", true)] {
        let intake = intake();
        // Ids are new for so many batches that they have left the memory when they come again.
        let batches: Vec<Vec<Vec<u8>>> =
            (0..150).map(|batch| (0..BATCH).map(|i| event(batch * BATCH + i, now_ms, with_id)).collect()).collect();
        let mut next = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                next += 1;
                let batch = &batches[next % batches.len()];
                black_box(intake.take(batch.iter().map(|bytes| Event::from_protobuf(bytes))))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, ingest);
criterion_main!(benches);
