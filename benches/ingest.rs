//! What a reported event costs: `cargo bench --bench ingest`.

use std::hint::black_box;
use std::sync::Arc;

use aviary::adapters::clock::BootClock;
use aviary::adapters::memory::MemoryStore;
use aviary::domain::ids::{NodeId, TxId};
use aviary::domain::rollout::{Change, Mark, Service};
use aviary::node::handle::{NodeHandle, Published};
use aviary::ports::{Clock, Store};
use aviary::protocol::View;
use aviary::telemetry::Intake;
use aviary::telemetry::event::Event;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const ROLLOUT: &str = "{apiVersion: aviary/v1, kind: Rollout, metadata: {name: fraud-model}, spec: {stable: {version: v1, url: 'http://x:1'}, \
    canary: {version: v2, url: 'http://y:2'}, steps: [{setWeight: 5}, {setWeight: 100}]}}";

fn intake() -> Intake {
    let spec = Arc::new(aviary::config::rollout::parse(ROLLOUT, "bench").expect("a rollout"));
    let mark = Mark { tx: TxId::new("bench").expect("a name"), at: BootClock.now().wall };
    let service = Service::after(None, &spec.service.clone(), &Change::Start(spec), &mark).expect("a start");
    let view = View::fixed(NodeId::new("a").expect("a name"), service);
    let published = Published::new(Arc::new(view), Arc::new(BootClock));
    let (handle, _, _) = NodeHandle::new(published, MemoryStore::default().reader());
    Intake::new(handle, "bench")
}

/// Returns an `aviary.v1.TelemetryEvent`.
fn event(number: u64, now_ms: u64, with_id: bool) -> Vec<u8> {
    let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
    let text = |bytes: &mut Vec<u8>, tag: u8, text: &str| {
        bytes.extend([tag, text.len() as u8]);
        bytes.extend(text.as_bytes());
    };
    let varint = |bytes: &mut Vec<u8>, mut value: u64| {
        while value >= 0x80 {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
    };
    let mut bytes = Vec::new();
    text(&mut bytes, 0x0a, "fraud-model");
    text(&mut bytes, 0x12, if mixed.is_multiple_of(20) { "v2" } else { "v1" });
    bytes.push(0x18);
    varint(&mut bytes, if mixed.is_multiple_of(199) { 503 } else { 200 });
    bytes.push(0x21);
    bytes.extend((20.0 + (mixed % 300_000) as f64 / 1000.0).to_le_bytes());
    let mut time = vec![0x08];
    varint(&mut time, now_ms / 1000);
    time.push(0x10);
    varint(&mut time, now_ms % 1000 * 1_000_000);
    bytes.extend([0x2a, time.len() as u8]);
    bytes.extend(time);
    if with_id {
        text(&mut bytes, 0x32, &format!("{mixed:016x}"));
    }
    bytes
}

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
