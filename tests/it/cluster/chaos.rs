//! Storms over real processes: deaths, stops and a network that drops, delays, resets and cuts one way, under load.
//!
//! Each link between two nodes goes through a proxy here. Afterwards everything is healed, and what people were told is
//! asked for again: every COMMITTED is there, every ABORTED is not, and all nodes have one log. `AVIARY_ROUNDS=100` makes
//! 500 kills and 100 cuts.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::harness::{Cluster, MANUAL, NAMES, Traffic, Upstream, http, rollout, wait};

/// What a link does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Mode {
    Pass,
    /// Nothing comes through, in either direction, and nobody is told.
    Hole,
    /// Nothing reaches the callee.
    Towards,
    /// Nothing comes back.
    Back,
    /// Late, by up to a quarter of a second for each piece.
    Slow,
    /// Connections break, now and again.
    Reset,
}

const MODES: [Mode; 5] = [Mode::Hole, Mode::Towards, Mode::Back, Mode::Slow, Mode::Reset];

/// A proxy in front of one node, for one caller.
struct Link {
    port: u16,
    mode: Arc<AtomicU8>,
}

impl Link {
    fn to(callee: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mode = Arc::new(AtomicU8::new(Mode::Pass as u8));
        let modes = mode.clone();
        std::thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                let Ok(callee) = TcpStream::connect(("127.0.0.1", callee)) else { continue };
                for (from, to, towards) in [(&caller, &callee, true), (&callee, &caller, false)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let mode = modes.clone();
                    std::thread::spawn(move || pass(from, to, towards, &mode));
                }
            }
        });
        Self { port, mode }
    }

    fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Relaxed);
    }
}

/// Passes bytes on as the link's mode says; what a hole swallows is gone with the connection.
fn pass(mut from: TcpStream, mut to: TcpStream, towards: bool, mode: &AtomicU8) {
    let _ = (from.set_nodelay(true), to.set_nodelay(true));
    let mut bytes = [0; 16 * 1024];
    let mut noise = from.local_addr().map_or(1, |address| u64::from(address.port()));
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let now = mode.load(Ordering::Relaxed);
        let swallowed =
            now == Mode::Hole as u8 || now == Mode::Towards as u8 && towards || now == Mode::Back as u8 && !towards;
        if swallowed {
            // A cut line loses bytes for good: once it heals, the connection can only be made anew.
            while mode.load(Ordering::Relaxed) == now {
                std::thread::sleep(Duration::from_millis(5));
            }
            break;
        }
        if now == Mode::Slow as u8 {
            std::thread::sleep(Duration::from_millis((noise >> 33) % 250));
        }
        if now == Mode::Reset as u8 && (noise >> 33) % 8 == 0 || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// What somebody was told about a change.
#[derive(Debug, Clone)]
struct Told {
    key: String,
    verb: &'static str,
    word: String,
    slot: u64,
}

fn change(port: u16, verb: &str, key: &str) -> Option<(String, u64)> {
    let path = format!("/v1/rollouts/svc/{verb}");
    let answer = http(port, "POST", &path, &[("idempotency-key", key)], "{}").ok()?;
    let json: Value = serde_json::from_slice(&answer.body).ok()?;
    Some((json["status"].as_str()?.to_string(), json["slot"].as_u64()?))
}

/// Asks nodes for changes until told to stop; keeps what is decided.
fn operate(ports: [u16; 3], seed: u64, stop: &AtomicBool, told: &Mutex<Vec<Told>>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let key = format!("w{seed}-{number}");
        let verb = ["abort", "retry", "pause", "resume", "promote"][random.random_range(0..5)];
        let found = change(ports[random.random_range(0..3)], verb, &key);
        if let Some((word, slot)) = found.filter(|(word, _)| ["COMMITTED", "ABORTED"].contains(&word.as_str())) {
            told.lock().unwrap().push(Told { key, verb, word, slot });
        }
        std::thread::sleep(Duration::from_millis(random.random_range(1..30)));
    }
}

fn signal(cluster: &Cluster, i: usize, name: &str) {
    let pid = cluster.nodes[i].process.as_ref().unwrap().0.id();
    let sent = std::process::Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn storms_leave_one_log_and_every_answer_true() {
    let rounds: usize = std::env::var("AVIARY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::found();
    let mut links = BTreeMap::new();
    for i in 0..3 {
        let mut text = std::fs::read_to_string(cluster.config(i)).unwrap();
        for j in (0..3).filter(|j| *j != i) {
            let link = Link::to(cluster.nodes[j].control);
            let old = format!("[peers.{}]\ncontrol = \"127.0.0.1:{}\"", NAMES[j], cluster.nodes[j].control);
            assert!(text.contains(&old), "{text}");
            text = text.replace(&old, &format!("[peers.{}]\ncontrol = \"127.0.0.1:{}\"", NAMES[j], link.port));
            links.insert((i, j), link);
        }
        std::fs::write(cluster.config(i), text).unwrap();
    }
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_secs(1));

    let traffic = Traffic::start(&cluster, 50);
    let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let ports = [0, 1, 2].map(|i| cluster.nodes[i].api);
    let writers: Vec<_> = (0..3)
        .map(|seed| {
            let (stop, told) = (stop.clone(), told.clone());
            std::thread::spawn(move || operate(ports, seed, &stop, &told))
        })
        .collect();
    let mut random = SmallRng::seed_from_u64(11);
    let (mut kills, mut cuts, mut stops, mut slowest) = (0, 0, 0, Duration::ZERO);
    for _ in 0..rounds {
        // Deaths, one after the other; each is back in time.
        for _ in 0..4 {
            let victim = random.random_range(0..3);
            cluster.kill(victim);
            kills += 1;
            std::thread::sleep(Duration::from_millis(random.random_range(0..40)));
            cluster.spawn(victim, None);
            let began = Instant::now();
            cluster.wait_ready(victim);
            slowest = slowest.max(began.elapsed());
        }
        // A cut, in which somebody dies or is stopped.
        let mode = MODES[random.random_range(0..MODES.len())];
        for link in links.values().filter(|_| random.random_range(0..3) > 0) {
            link.set(mode);
        }
        cuts += 1;
        std::thread::sleep(Duration::from_millis(random.random_range(50..400)));
        let victim = random.random_range(0..3);
        match random.random() {
            true => {
                cluster.kill(victim);
                kills += 1;
                std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
                cluster.spawn(victim, None);
            }
            false => {
                signal(&cluster, victim, "-STOP");
                stops += 1;
                std::thread::sleep(Duration::from_millis(random.random_range(50..1_500)));
                signal(&cluster, victim, "-CONT");
            }
        }
        links.values().for_each(|link| link.set(Mode::Pass));
        (0..3).for_each(|i| cluster.wait_ready(i));
        cluster.agreed(&[0, 1, 2], Duration::from_secs(4));
    }
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let seen = traffic.stop();
    let told = told.lock().unwrap().clone();
    println!(
        "{kills} kills, {cuts} cuts, {stops} stops; {} answers, {} requests; slowest start {slowest:?}",
        told.len(),
        seen.len()
    );
    assert!(slowest <= Duration::from_secs(2), "{slowest:?}");

    // What was told is so, on every node.
    cluster.agreed(&[0, 1, 2], Duration::from_secs(4));
    for (n, Told { key, verb, word, slot }) in told.iter().enumerate() {
        let again = wait(key, Duration::from_secs(3), || change(ports[n % 3], verb, key));
        assert_eq!(again, (word.clone(), *slot), "{verb} {key}");
    }
    let hashes = [0, 1, 2].map(|i| {
        let records = cluster.history(i);
        records
            .iter()
            .map(|r| (r["slot"].to_string(), r["hash"].to_string(), r["txid"].to_string()))
            .collect::<Vec<_>>()
    });
    assert!(hashes[0] == hashes[1] && hashes[1] == hashes[2], "the nodes' histories differ");
    // Only requests to a node that died may break, and a canary never fails here.
    let bad: Vec<_> = seen.iter().filter(|answer| answer.status >= 500).collect();
    assert!(bad.is_empty(), "{} of {} answers were bad: {:?}", bad.len(), seen.len(), bad.first());
    cluster.assert_no_panic();
    drop((v1, v2));
}
