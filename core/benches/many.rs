//! What many rollouts at once cost the core: three of them, their messages handed over in memory, in virtual time.
//! `cargo bench -p aviary-core --bench many -- [SERVICES] [SECONDS] [spread] [sequential]`; prints the processor time of a
//! node for each second that it lives through, what it sends and publishes meanwhile, and when windows are decided.

#![expect(clippy::disallowed_methods, reason = "a benchmark measures on the real clock")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aviary_core::domain::analysis::{Analysis, Limit, Metric, Statistic};
use aviary_core::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary_core::domain::plan::{Backend, RolloutSpec, Stage};
use aviary_core::domain::time::{Mono, Now, Wall};
use aviary_core::domain::verdict::OnFailure;
use aviary_core::domain::weights::Weight;
use aviary_core::domain::window::Evidence;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::Message;
use aviary_core::protocol::record::{
    AcceptorState, Chosen, Initiator, Intent, Member, Members, Operation, Record, Slot,
};
use aviary_core::protocol::{
    Command, Core, Event, Input, Observation, OperatorRequest, Output, RequestId, Retention, Settings, Timings, codec,
};

const CLUSTER: ClusterId = ClusterId([7; 16]);
const WINDOW_MS: u64 = 10_000;
/// Events a second, of all services together.
const EVENTS: u64 = 20_000;

fn genesis(nodes: &[NodeId]) -> Chosen {
    let member = |node: &NodeId| (node.clone(), Member { incarnation: Incarnation(1), cordoned: false });
    let members = Members(nodes.iter().map(member).collect());
    let operation = Operation::Genesis { cluster: CLUSTER, members };
    let tx = TxId::new("genesis").expect("an id");
    let intent = Intent { initiator: Initiator::Node, tx, actor: "f".into(), digest: 0, at: Wall(0), operation };
    let prev_hash = Default::default();
    let record = Record { slot: Slot(0), prev_hash, intent, state: None, phase: None, certificate: None };
    Chosen { ballot: None, decided_at: Wall(0), record }
}

fn rollout(service: &ServiceId, sequential: bool) -> RolloutSpec {
    let backend = |name| Backend::new(VersionId::new(name).expect("an id"), Vec::new());
    let stage = |bp, manual| Stage { weight: Weight::from_bp(bp).expect("a weight"), hold_ms: 0, manual };
    let fixed = [
        ("errors", Limit::ErrorRate { max_bp: 500 }),
        ("latency", Limit::Latency { statistic: Statistic::Mean, max_us: 500_000 }),
    ];
    let compared = [
        ("errors-vs-stable", Limit::ErrorsVsStable { increase_ppm: 5_000 }),
        ("latency-vs-stable", Limit::LatencyVsStable { quantile_bp: 9_500, increase_ppm: 100_000 }),
    ];
    let limits = fixed.iter().chain(compared.iter().filter(|_| sequential));
    let metric =
        |(name, limit): &(&str, Limit)| Metric { name: (*name).into(), limit: *limit, on_failure: OnFailure::Pause };
    let metrics = limits.map(metric).collect();
    let analysis = Analysis { window_ms: WINDOW_MS, min_samples: 20, metrics, ..Analysis::default() };
    let stages = vec![stage(2_000, true), stage(10_000, false)];
    RolloutSpec { analysis, ..RolloutSpec::new(service.clone(), backend("v1"), backend("v2"), stages) }
}

/// Returns the processor time of this process so far, whatever else the machine does.
fn processor_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").expect("Linux says how long a process ran");
    let first = text.split_whitespace().next().and_then(|first| first.parse().ok());
    first.map_or(0.0, |nanoseconds: f64| nanoseconds / 1e9)
}

/// Draws that are the same each time.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// What was measured of all three nodes.
#[derive(Default)]
struct Measured {
    busy: BTreeMap<&'static str, Duration>,
    messages: u64,
    bytes: u64,
    publications: u64,
    slots: u64,
    starts: BTreeMap<ServiceId, u64>,
    late: Vec<f64>,
    longest: Duration,
}

struct Three {
    nodes: Vec<NodeId>,
    cores: Vec<Core>,
    wire: VecDeque<(usize, usize, Message)>,
    now_us: u64,
    measured: Measured,
}

impl Three {
    fn start() -> Self {
        let nodes: Vec<_> = ["a", "b", "c"].map(|name| NodeId::new(name).expect("an id")).into();
        let genesis = genesis(&nodes);
        let mut three =
            Self { cores: Vec::new(), wire: VecDeque::new(), now_us: 1_000_000, measured: Measured::default(), nodes };
        for node in three.nodes.clone() {
            let acceptor = AcceptorState {
                cluster: CLUSTER,
                node: node.clone(),
                incarnation: Incarnation(1),
                boot: 0,
                promised: None,
                accepted: None,
                head: Slot(0),
                head_hash: genesis.record.hash(),
                writes: 0,
                seen: BTreeMap::new(),
            };
            let settings = Settings {
                node,
                cluster: CLUSTER,
                timings: Timings::default(),
                seed: 1,
                fresh_incarnation: Incarnation(9),
                retention: Retention::default(),
                peers: BTreeSet::new(),
                speaks: aviary_core::protocol::feature::PROTOCOL,
            };
            let ledger = Ledger::new(&genesis).expect("genesis begins a ledger");
            let (core, outputs) = Core::start(settings, Some(acceptor), ledger, &[], BTreeMap::new(), three.now());
            three.cores.push(core);
            three.carry_out(three.cores.len() - 1, outputs);
        }
        three
    }

    fn now(&self) -> Now {
        Now { mono: Mono(self.now_us), wall: Wall(self.now_us / 1_000) }
    }

    fn handle(&mut self, node: usize, what: &'static str, input: Input) {
        let now = self.now();
        let began = Instant::now();
        let outputs = self.cores[node].handle(now, input);
        let took = began.elapsed();
        *self.measured.busy.entry(what).or_default() += took;
        self.measured.longest = self.measured.longest.max(took);
        self.carry_out(node, outputs);
        *self.measured.busy.entry("outputs").or_default() += began.elapsed() - took;
    }

    fn carry_out(&mut self, node: usize, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send { to, message } => {
                    let to = self.nodes.iter().position(|node| *node == to).expect("a peer");
                    self.wire.push_back((node, to, *message));
                }
                Output::Publish(_) => self.measured.publications += 1,
                Output::Append(chosen) if node == 0 => self.note(&chosen),
                _ => {}
            }
        }
    }

    fn note(&mut self, chosen: &Chosen) {
        self.measured.slots += 1;
        for (_, event) in Event::of(chosen) {
            if let Event::Analyzed { service, window_verdict, .. } = event {
                let end = self.measured.starts[&service] + window_verdict.to_ms;
                self.measured.late.push((chosen.decided_at.0 - end) as f64 / 1_000.0);
            } else if let Event::Routing { state, .. } = event {
                self.measured.starts.entry(state.service).or_insert(state.timestamp.0);
            }
        }
    }

    fn settle(&mut self) {
        while let Some((from, to, message)) = self.wire.pop_front() {
            let began = Instant::now();
            let bytes = codec::encode(&message);
            let encoded = began.elapsed();
            let message: Message = codec::decode(&bytes).expect("what is sent can be read");
            *self.measured.busy.entry("encode").or_default() += encoded;
            *self.measured.busy.entry("decode").or_default() += began.elapsed() - encoded;
            self.measured.messages += 1;
            self.measured.bytes += bytes.len() as u64;
            let what = match &message {
                Message::HealthSnapshot(_) => "snapshots",
                _ => "messages",
            };
            let (from, incarnation) = (self.nodes[from].clone(), Incarnation(1));
            self.handle(to, what, Input::Received { from, incarnation, message: Box::new(message) });
        }
    }

    fn step(&mut self) {
        self.now_us += 20_000;
        for node in 0..3 {
            self.handle(node, "ticks", Input::Tick);
        }
        self.settle();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let numbers: Vec<u64> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let (services, seconds) = (numbers.first().copied().unwrap_or(1_000), numbers.get(1).copied().unwrap_or(30));
    let mut three = Three::start();
    (0..40).for_each(|_| three.step());
    let ids: Vec<_> = (0..services).map(|n| ServiceId::new(format!("s{n}")).expect("an id")).collect();
    let began = processor_seconds();
    for (number, id) in ids.iter().enumerate() {
        let manifest = Arc::new(rollout(id, has("sequential")).checked().expect("a sound rollout"));
        let tx = TxId::new(format!("t{number}")).expect("an id");
        let request = RequestId(number as u64);
        let command = Command { request, tx, actor: "bench".into(), asked: OperatorRequest::Apply(manifest) };
        three.handle(0, "commands", Input::Operator(command));
        three.settle();
        // 7 ms each: a tick comes with every third.
        three.now_us += 7_000;
        if number % 3 == 2 {
            three.now_us -= 20_000;
            three.step();
        }
    }
    println!("{services} rollouts started: {:.2} s of processor time for all nodes", processor_seconds() - began);
    let starts = std::mem::take(&mut three.measured).starts;
    three.measured.starts = starts;
    let began = processor_seconds();
    let (mut draws, mut at) = (Draws(1), 0u64);
    for step in 0..seconds * 50 {
        for node in 0..3 {
            // Each node hands its counts over ten times a second, not all at the same moment.
            if !(step + node as u64).is_multiple_of(5) {
                continue;
            }
            let mut counted: BTreeMap<u64, Evidence> = BTreeMap::new();
            for _ in 0..EVENTS / 30 {
                let evidence = counted.entry(at % services).or_default();
                let latency_us = if has("spread") { 20_000 + draws.next() % 100_000 } else { 20_000 };
                let side = if (at / services).is_multiple_of(5) { &mut evidence.canary } else { &mut evidence.stable };
                side.record(latency_us, false);
                at += 1;
            }
            let observations = counted.into_iter().map(|(service, evidence)| {
                let service = ids[service as usize].clone();
                let routing_version = three.cores[node].view().services[&service].service.routing.version;
                Observation { service, routing_version, evidence }
            });
            let observations = observations.collect();
            three.handle(node, "telemetry", Input::Telemetry(observations));
        }
        three.step();
    }
    let Measured { busy, messages, bytes, publications, slots, mut late, longest, .. } = three.measured;
    let node_seconds = (3 * seconds) as f64;
    let all: Duration = busy.values().sum();
    println!("{:.2} % of a core a node; of the time:", (processor_seconds() - began) / node_seconds * 100.0);
    for (what, took) in &busy {
        println!("  {what:10} {:4.1} %", took.as_secs_f64() / all.as_secs_f64() * 100.0);
    }
    println!("longest call {:.1} ms", longest.as_secs_f64() * 1e3);
    let second = |n: u64| n as f64 / node_seconds;
    println!(
        "a node and second: {:.0} messages, {:.0} KiB, {:.1} publications",
        second(messages),
        second(bytes) / 1024.0,
        second(publications)
    );
    late.sort_by(f64::total_cmp);
    let at = |share: f64| late[((late.len() - 1) as f64 * share) as usize];
    println!(
        "{:.1} slots/s; {} windows decided after their end: p50 {:.2} s, p99 {:.2} s, last {:.2} s",
        slots as f64 / seconds as f64,
        late.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}
