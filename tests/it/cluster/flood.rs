//! More connections than anybody needs: a node's memory stays small, and nobody who asks at once is kept out.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::harness::{Cluster, Http, MANUAL, Upstream, http, rollout};

/// Connections to each port; `AVIARY_CONNECTIONS=10000` for the real thing (`ulimit -n` must allow them).
fn connections() -> usize {
    std::env::var("AVIARY_CONNECTIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(600)
}

/// Returns the resident memory of node `i` in MiB.
fn resident(cluster: &Cluster, i: usize) -> f64 {
    let pid = cluster.nodes[i].process.as_ref().unwrap().0.id();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[test]
fn half_open_and_slow_connections_cost_little_and_keep_nobody_out() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let node = &cluster.nodes[0];
    let before = resident(&cluster, 0);
    for (name, port, slow) in [
        ("data", node.data, &b"POST /predict HTTP/1.1\r\nhost: x\r\nx-slow: "[..]),
        ("api", node.api, b"GET /v1/cluster HTTP/1.1\r\nx-slow: "),
        ("control", node.control, b"AVRY\x00\x02\x00\x00\x00\x00\x31"),
    ] {
        for (kind, bytes) in [("half-open", &[][..]), ("slow", slow)] {
            let mut held = Vec::new();
            for _ in 0..connections() {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                // The oldest are closed meanwhile.
                let _ = stream.write_all(bytes);
                held.push(stream);
            }
            let began = Instant::now();
            let verb = if kind == "slow" { "retry" } else { "abort" };
            let answer = cluster.post(0, &format!("/v1/rollouts/svc/{verb}"), None, "{}");
            let took = began.elapsed();
            assert_eq!(answer.status, 200, "{name}, {kind}: {answer:?}");
            assert!(took < Duration::from_secs(1), "{name}, {kind}: a commit took {took:?}");
            let served = http(node.data, "POST", "/predict", &[], "{}").unwrap();
            assert_eq!(served.status, 200, "{name}, {kind}");
            let grown = resident(&cluster, 0) - before;
            println!("{} {kind} on {name}: {verb} in {took:.1?}, memory +{grown:.1} MiB", held.len());
            assert!(grown < 32.0, "{name}, {kind}: memory grew by {grown} MiB");
        }
    }
    cluster.assert_no_panic();
}

/// Sends requests over 32 connections until told to stop.
struct Flood {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<usize>>,
}

impl Flood {
    fn start(port: u16, method: &'static str, path: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flood = |_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut http = Http::connect(port).unwrap();
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    sent += usize::from(http.send(method, path, &[], "").is_ok());
                }
                sent
            })
        };
        let threads = (0..32).map(flood).collect();
        Self { stop, threads }
    }

    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    }
}

/// Returns the slowest of all but one in a hundred of 300 requests.
fn slow_percent(port: u16, method: &str, path: &str) -> Duration {
    let mut http = Http::connect(port).unwrap();
    let mut times: Vec<_> = (0..300)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(http.send(method, path, &[], "").unwrap().status, 200, "{path}");
            began.elapsed()
        })
        .collect();
    times.sort();
    times[296]
}

#[test]
fn neither_port_starves_the_other() {
    let cluster = Cluster::start();
    // Without servers the node answers by itself: as fast as it can.
    let text = rollout("x", "y", MANUAL);
    cluster.apply(0, &text.replace("url: \"x\"", "answer: node").replace("url: \"y\"", "answer: node"));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let (data, api) = (cluster.nodes[0].data, cluster.nodes[0].api);
    let flood = Flood::start(data, "POST", "/predict");
    let under_data = slow_percent(api, "GET", "/v1/cluster");
    let predicted = flood.stop();
    let flood = Flood::start(api, "GET", "/v1/cluster");
    let under_api = slow_percent(data, "POST", "/predict");
    let asked = flood.stop();
    println!(
        "api p99 {under_data:?} beside {predicted} /predict; /predict p99 {under_api:?} beside {asked} on the api"
    );
    assert!(under_data < Duration::from_millis(500), "the api's p99 was {under_data:?}");
    assert!(under_api < Duration::from_millis(500), "/predict's p99 was {under_api:?}");
}
