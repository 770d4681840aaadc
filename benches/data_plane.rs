//! What a request costs inside the data plane, without the system calls: `cargo bench --bench data_plane`.

use std::hint::black_box;

use aviary::domain::ids::{ServiceId, VersionId};
use aviary::domain::weights::sticky_ticket;
use aviary::proxy::body::{BodyFraming, Keep};
use aviary::proxy::outcome::{ANSWERS, CircuitBreaker, OutcomeCounts};
use aviary::proxy::request::{Gateway, Protocol};
use aviary::proxy::wire::{self, Asked, Opening, ResponseFields, Room};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const REQUEST: &[u8] =
    b"POST /predict HTTP/1.1\r\nHost: models.example:8081\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\
    Content-Type: application/json\r\nX-User-ID: 12345\r\nContent-Length: 200\r\n\r\n";
const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 41\r\nServer: uvicorn\r\n\r\n";

fn heads(criterion: &mut Criterion) {
    let mut out = Vec::with_capacity(4096);
    criterion.bench_function("request head: read, rewritten", |bencher| {
        bencher.iter(|| {
            let mut room = Room::default();
            let opening = wire::request(black_box(REQUEST), true, &mut room);
            let Ok(Opening::Request(asked, _)) = opening else { panic!("{opening:?}") };
            out.clear();
            asked.write(&Gateway { peer: "10.0.0.9", service: "fraud", configured: &[], is_trusted: true }, &mut out);
            black_box(&out);
        });
    });
    let lines = b"x-served-by: v2\r\nx-routing-version: 7\r\n";
    let mark = ResponseFields { lines, date: &[b'0'; 29], close: false, protocol: Protocol::Http11 };
    criterion.bench_function("answer head: read, rewritten", |bencher| {
        bencher.iter(|| {
            let mut room = Room::default();
            let answered = wire::answer(black_box(ANSWER), Asked::default(), &mut room).unwrap().unwrap();
            out.clear();
            answered.write(mark, &mut out);
            black_box(&out);
        });
    });
}

fn chunks(criterion: &mut Criterion) {
    let chunk = [&b"4000\r\n"[..], &[b'x'; 0x4000], b"\r\n"].concat();
    let mut bytes = [chunk.repeat(4), b"0\r\n\r\n".to_vec()].concat();
    let mut group = criterion.benchmark_group("chunked body");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("64 KiB in chunks of 16", |bencher| {
        bencher.iter(|| {
            let mut body = BodyFraming::CHUNKED;
            let part = body.take(black_box(&mut bytes), Keep::Framed).unwrap();
            assert_eq!((part.used, part.kept), (bytes.len(), bytes.len()));
        });
    });
    group.finish();
}

fn decisions(criterion: &mut Criterion) {
    criterion.bench_function("sticky ticket of a user", |bencher| {
        bencher.iter(|| sticky_ticket(7, black_box(b"user-1234567")));
    });
    let counts = OutcomeCounts::new(&ServiceId::new("s").unwrap(), &VersionId::new("v").unwrap(), 2, ANSWERS);
    let circuit_breaker = CircuitBreaker::default();
    let mut latency_us = 0;
    criterion.bench_function("an answer counted", |bencher| {
        bencher.iter(|| {
            latency_us = (latency_us + 977) % 100_000;
            counts.add(0, 200, black_box(latency_us), false);
            circuit_breaker.canary(false, 200)
        });
    });
}

criterion_group!(benches, heads, chunks, decisions);
criterion_main!(benches);
