//! Events, and who takes them, for the benchmarks of ingest.

use std::sync::Arc;

use aviary::adapters::clock::BootClock;
use aviary::adapters::memory::MemoryStore;
use aviary::domain::ids::{NodeId, TxId};
use aviary::domain::rollout::{Change, Service, Stamp};
use aviary::node::handle::{NodeHandle, Published};
use aviary::ports::{Clock, Store};
use aviary::protocol::View;
use aviary::telemetry::Intake;

const ROLLOUT: &str = "{apiVersion: aviary/v1, kind: Rollout, metadata: {name: fraud-model}, spec: {stable: {version: v1, url: 'http://x:1'}, \
    canary: {version: v2, url: 'http://y:2'}, steps: [{setWeight: 5}, {setWeight: 100}]}}";

/// Returns the intake of a node with so many rollouts under way.
pub fn intake(services: u64) -> Intake {
    let spec = Arc::new(aviary::config::rollout::parse(ROLLOUT, "bench").expect("a rollout"));
    let stamp = Stamp { tx: TxId::new("bench").expect("a name"), at: BootClock.now().wall };
    let service = Service::after(None, &spec.service.clone(), &Change::Start(spec), &stamp).expect("a start");
    let mut view = View::fixed(NodeId::new("a").expect("a name"), service);
    let one = view.services.values().next().expect("the one it was made of");
    let named = (0..services).map(|number| (name(number).parse().expect("a name"), one.clone()));
    view.services = Arc::new(named.collect());
    let published = Published::new(Arc::new(view), Arc::new(BootClock));
    let (handle, _, _) = NodeHandle::new(published, MemoryStore::default().reader());
    Intake::new(handle, "bench")
}

fn name(service: u64) -> String {
    format!("fraud-model-{service}")
}

/// Returns an `aviary.v1.TelemetryEvent` of one of so many services.
pub fn event(number: u64, now_ms: u64, with_id: bool, services: u64) -> Vec<u8> {
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
    text(&mut bytes, 0x0a, &name(number % services));
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
