//! Storms over real processes: deaths, stops and a network that drops, delays, resets and cuts one way, under load.
//!
//! Each link between two nodes goes through a proxy here. Afterwards everything is healed, and what people were told is
//! asked for again: every COMMITTED is there, every ABORTED is not, and all nodes have one log. `AVIARY_ROUNDS=100` makes
//! 500 kills and 100 cuts.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::harness::{Answer, Cluster, Http, MANUAL, NAMES, Process, Traffic, Upstream, aviary, rollout, wait};

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
    /// Pieces come twice, now and again.
    Twice,
}

const MODES: [Mode; 6] = [Mode::Hole, Mode::Towards, Mode::Back, Mode::Slow, Mode::Reset, Mode::Twice];

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
                // Pause between two looks at the mode.
                std::thread::sleep(Duration::from_millis(5));
            }
            break;
        }
        if now == Mode::Slow as u8 {
            // The link's delay.
            std::thread::sleep(Duration::from_millis((noise >> 33) % 250));
        }
        if now == Mode::Twice as u8 && (noise >> 33).is_multiple_of(8) && to.write_all(&bytes[..count]).is_err() {
            break;
        }
        if now == Mode::Reset as u8 && (noise >> 33).is_multiple_of(8) || to.write_all(&bytes[..count]).is_err() {
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

/// The API ports of the nodes, with a token for them.
#[derive(Clone)]
struct ApiPorts {
    addresses: [SocketAddr; 3],
    bearer: String,
}

impl ApiPorts {
    fn send(&self, i: usize, method: &str, path: &str, key: &str, body: &str) -> std::io::Result<Answer> {
        let kind = if body.starts_with("apiVersion") { "application/yaml" } else { "application/json" };
        let headers = [("idempotency-key", key), ("authorization", self.bearer.as_str()), ("content-type", kind)];
        Http::connect_to(self.addresses[i])?.send(method, path, &headers, body)
    }

    /// Asks node `i` for a change; returns what it came to, and its slot.
    fn change(&self, i: usize, verb: &str, key: &str) -> Option<(String, u64)> {
        let answer = self.send(i, "POST", &format!("/v1/rollouts/svc/{verb}"), key, "{}").ok()?;
        let json: Value = serde_json::from_slice(&answer.body).ok()?;
        let word = json["code"].as_str().or(json["status"].as_str())?;
        Some((word.to_string(), json["slot"].as_u64()?))
    }

    /// What was told is so, on every node, and all have one history.
    fn judge(&self, told: &[Told]) {
        for (n, Told { key, verb, word, slot }) in told.iter().enumerate() {
            let again = wait(key, Duration::from_secs(4), || self.change(n % 3, verb, key));
            assert_eq!(again, (word.clone(), *slot), "{verb} {key}");
        }
        let histories = [0, 1, 2].map(|i| {
            let json = self.send(i, "GET", "/v1/rollouts/svc/history", "-", "").unwrap().json();
            let list = if json.is_array() { json } else { json["history"].clone() };
            let key = |record: &Value| ["slot", "hash", "txid"].map(|name| record[name].to_string());
            list.as_array().unwrap().iter().map(key).collect::<Vec<_>>()
        });
        assert!(histories[0] == histories[1] && histories[1] == histories[2], "the nodes' histories differ");
        assert!(histories[0].len() > 1, "nothing was decided");
    }
}

/// Asks nodes for changes until told to stop; keeps what is decided.
fn operate(ports: &ApiPorts, seed: u64, stop: &AtomicBool, told: &Mutex<Vec<Told>>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let key = format!("w{seed}-{number}");
        let verb = ["abort", "retry", "pause", "resume", "promote"][random.random_range(0..5)];
        let found = ports.change(random.random_range(0..3), verb, &key);
        if let Some((word, slot)) = found.filter(|(word, _)| ["COMMITTED", "ABORTED"].contains(&word.as_str())) {
            told.lock().unwrap().push(Told { key, verb, word, slot });
        }
        // The operators' rate.
        std::thread::sleep(Duration::from_millis(random.random_range(1..30)));
    }
}

fn signal(cluster: &Cluster, i: usize, name: &str) {
    let pid = cluster.nodes[i].process.as_ref().unwrap().0.id();
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
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
    let addresses = [0, 1, 2].map(|i| SocketAddr::from(([127, 0, 0, 1], cluster.nodes[i].api)));
    let ports = ApiPorts { addresses, bearer: "none".into() };
    let writers: Vec<_> = (0..3)
        .map(|seed| {
            let (stop, told, ports) = (stop.clone(), told.clone(), ports.clone());
            std::thread::spawn(move || operate(&ports, seed, &stop, &told))
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
            // How long the node is down.
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
        // How long the links are cut before a node fails as well.
        std::thread::sleep(Duration::from_millis(random.random_range(50..400)));
        let victim = random.random_range(0..3);
        match random.random() {
            true => {
                cluster.kill(victim);
                kills += 1;
                // How long the node is down.
                std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
                cluster.spawn(victim, None);
            }
            false => {
                signal(&cluster, victim, "-STOP");
                stops += 1;
                // How long the node is stopped.
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

    cluster.agreed(&[0, 1, 2], Duration::from_secs(4));
    ports.judge(&told);
    // Only requests to a node that died may break, and a canary never fails here.
    let bad: Vec<_> = seen.iter().filter(|answer| answer.status >= 500).collect();
    assert!(bad.is_empty(), "{} of {} answers were bad: {:?}", bad.len(), seen.len(), bad.first());
    cluster.assert_no_panic();
    drop((v1, v2));
}

/// Three network namespaces on a bridge; gone when dropped.
struct Namespaces {
    names: [String; 3],
    bridge: String,
    subnet: String,
}

fn ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

impl Namespaces {
    /// Makes them; none where this user may not, or `ip` is missing.
    fn new() -> Option<Self> {
        let id = std::process::id() % 10_000;
        let subnet = format!("10.77.{}", id % 200);
        let names = NAMES.map(|name| format!("av{id}{name}"));
        let made = Self { names, bridge: format!("avb{id}"), subnet };
        let Self { bridge, subnet, .. } = &made;
        let ready = ip(&format!("link add {bridge} type bridge"))
            && ip(&format!("addr add {subnet}.254/24 dev {bridge}"))
            && ip(&format!("link set {bridge} up"))
            && made.names.iter().enumerate().all(|(i, name)| {
                let (outer, address) = (format!("v{name}"), format!("{subnet}.{}", i + 1));
                ip(&format!("netns add {name}"))
                    && ip(&format!("link add {outer} type veth peer name eth0 netns {name}"))
                    && ip(&format!("link set {outer} master {bridge} up"))
                    && ip(&format!("-n {name} addr add {address}/24 dev eth0"))
                    && ip(&format!("-n {name} link set eth0 up"))
                    && ip(&format!("-n {name} link set lo up"))
            });
        ready.then_some(made)
    }

    fn address(&self, i: usize) -> String {
        format!("{}.{}", self.subnet, i + 1)
    }

    /// Node `i` can't send to node `j`, or can again.
    fn blackhole(&self, i: usize, j: usize, cut: bool) {
        let verb = if cut { "add" } else { "del" };
        ip(&format!("-n {} route {verb} blackhole {}/32", self.names[i], self.address(j)));
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
        ip(&format!("link del {}", self.bridge));
    }
}

#[test]
fn machines_with_blackholed_routes_leave_one_log_and_every_answer_true() {
    let Some(spaces) = Namespaces::new() else {
        println!("skipped: network namespaces need root and the tool `ip`");
        return;
    };
    let rounds: usize = std::env::var("AVIARY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let dir = tempfile::tempdir().unwrap();
    let output = aviary().args(["token", "--role", "admin", "--name", "chaos"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let word = |label: &str| text.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_string();
    let (token, line) = (word("token:"), word("line:"));
    let tokens = dir.path().join("tokens");
    std::fs::write(&tokens, format!("{line}\n")).unwrap();
    std::fs::set_permissions(&tokens, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let configs: Vec<PathBuf> = NAMES.iter().map(|name| dir.path().join(format!("{name}.toml"))).collect();
    for i in 0..3 {
        let address = spaces.address(i);
        let mut text = format!(
            "[node]\nid = \"{}\"\ndata_dir = {:?}\n[listen]\ndata = \"{address}:8080\"\napi = \"{address}:50051\"\n\
             control = \"{address}:7001\"\n[api]\ntokens_file = {tokens:?}\n",
            NAMES[i],
            dir.path().join(format!("data-{}", NAMES[i]))
        );
        for j in (0..3).filter(|j| *j != i) {
            let (name, address) = (NAMES[j], spaces.address(j));
            text += &format!("[peers.{name}]\ncontrol = \"{address}:7001\"\napi = \"{address}:50051\"\n");
        }
        std::fs::write(&configs[i], text).unwrap();
    }
    let mut init = aviary();
    init.args(["cluster", "init"]);
    for config in &configs {
        init.arg("--config").arg(config);
    }
    let output = init.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let spawn = |i: usize| {
        let console = std::fs::OpenOptions::new().create(true).append(true).open(dir.path().join(NAMES[i])).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &spaces.names[i], aviary().get_program().to_str().unwrap(), "node", "--config"]);
        command.arg(&configs[i]).stdin(Stdio::null()).stdout(console.try_clone().unwrap()).stderr(console);
        Process(command.spawn().unwrap())
    };
    let data = [0, 1, 2].map(|i| format!("{}:8080", spaces.address(i)).parse::<SocketAddr>().unwrap());
    let predict = |i: usize| Http::connect_to(data[i])?.send("POST", "/predict", &[], "{}");
    let alive = |i: usize| {
        wait(&format!("{} lives", NAMES[i]), Duration::from_secs(10), || {
            let answer = Http::connect_to(data[i]).ok()?.send("GET", "/livez", &[], "").ok()?;
            (answer.status == 200).then_some(())
        });
    };
    let mut nodes: Vec<_> = (0..3).map(spawn).collect();
    (0..3).for_each(alive);
    let addresses = [0, 1, 2].map(|i| format!("{}:50051", spaces.address(i)).parse().unwrap());
    let ports = ApiPorts { addresses, bearer: format!("Bearer {token}") };
    let text = rollout("x", "y", MANUAL).replace("url: \"x\"", "answer: node").replace("url: \"y\"", "answer: node");
    wait("a rollout", Duration::from_secs(5), || {
        ports.send(0, "POST", "/v1/rollouts", "first", &text).ok().filter(|answer| answer.status == 200)
    });

    let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let writers: Vec<_> = (10..13)
        .map(|seed| {
            let (stop, told, ports) = (stop.clone(), told.clone(), ports.clone());
            std::thread::spawn(move || operate(&ports, seed, &stop, &told))
        })
        .collect();
    let mut random = SmallRng::seed_from_u64(12);
    let (mut kills, mut cuts, mut exposed) = (0, 0, 0);
    for _ in 0..rounds {
        // One node cut off altogether, one way or both ways; then somebody dies.
        let lone = random.random_range(0..3);
        let both = random.random();
        let others: Vec<_> = (0..3).filter(|j| *j != lone).collect();
        for other in &others {
            spaces.blackhole(lone, *other, true);
            if both {
                spaces.blackhole(*other, lone, true);
            }
        }
        cuts += 1;
        // Its lease ends by itself: from then on it serves stable only.
        std::thread::sleep(Duration::from_millis(2_150));
        for _ in 0..10 {
            let answer = predict(lone).unwrap();
            assert_eq!(answer.status, 200, "{answer:?}");
            exposed += usize::from(answer.header("x-served-by") == Some("v2"));
        }
        let victim = random.random_range(0..3);
        nodes[victim].kill();
        kills += 1;
        for other in &others {
            spaces.blackhole(lone, *other, false);
            if both {
                spaces.blackhole(*other, lone, false);
            }
        }
        nodes[victim] = spawn(victim);
        alive(victim);
    }
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let told = told.lock().unwrap().clone();
    println!(
        "{kills} kills, {cuts} cut off; {} answers; the canary answered {exposed} times where it may not",
        told.len()
    );
    assert_eq!(exposed, 0, "a node that is cut off serves stable once its lease is over");
    // Longer than a reconnection and a ballot take: afterwards nothing is open that could still be decided.
    std::thread::sleep(Duration::from_secs(3));
    ports.judge(&told);
    for name in NAMES {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(!text.contains("panicked"), "{text}");
    }
}
