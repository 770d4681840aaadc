//! Rolling upgrades and downgrades between the last release and this build, with real processes of both.
//!
//! `AVIARY_BEFORE` is the last release's program, which `scripts/tools.sh release` builds; `AVIARY_UPGRADES` says how often the
//! nodes go forth and back (default 5).

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use aviary::domain::weights::sticky_ticket;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::harness::{Answer, Cluster, Http, NAMES, Upstream, aviary, contents, http, wait};

/// Basis points of the canary: a request whose user has a ticket from here on must never get the canary.
const WEIGHT_BP: u16 = 5_000;
/// Requests of one client in a second.
const RATE: u64 = 100;

/// Returns the last release's program and this build's.
fn programs() -> [PathBuf; 2] {
    let before = std::env::var_os("AVIARY_BEFORE");
    let before = before.expect("AVIARY_BEFORE names the last release's program: ./run_tests.sh upgrade");
    [before.into(), env!("CARGO_BIN_EXE_aviary").into()]
}

fn rollout(stable: &Upstream, canary: &Upstream) -> String {
    format!(
        "apiVersion: aviary/v1\nkind: Rollout\nmetadata: {{ name: svc }}\nspec:\n  \
         stable: {{ version: v1, url: \"{}\" }}\n  canary: {{ version: v2, url: \"{}\" }}\n  \
         routing: {{ hashOn: {{ header: x-user }} }}\n  steps:\n    - setWeight: {}\n    - pause: {{}}\n    - setWeight: 100\n",
        stable.url(),
        canary.url(),
        WEIGHT_BP / 100
    )
}

/// Clients of all nodes, each of which prefers another one and goes to the next where its connection is refused, once.
struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Served>>,
}

/// What clients saw.
#[derive(Debug, Default)]
struct Served {
    answers: u64,
    canary: u64,
    retried: u64,
    /// Connections that were cut before their request was read: the system had accepted them for a process that stopped.
    cut: u64,
    /// Requests that got no good answer, and canary answers that no committed weight allows, in words.
    wrong: Vec<String>,
}

/// A node's clients hold it for reading during a request. A kill takes it for writing: a request that is under way in a process that
/// dies is lost with it, whichever version that is, and says nothing about upgrades.
type Gates = [Arc<RwLock<()>>; 3];

impl Clients {
    fn start(cluster: &Cluster, gates: &Gates) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ports: Vec<_> = cluster.nodes.iter().map(|node| node.data).collect();
        let threads = (0..3).map(|first| {
            let (stop, ports, gates) = (stop.clone(), ports.clone(), gates.clone());
            std::thread::spawn(move || {
                let mut served = Served::default();
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    served.ask(&ports, &gates, first, &format!("user-{first}-{number}"));
                    // The rate of this client.
                    std::thread::sleep(Duration::from_micros(1_000_000 / RATE));
                }
                served
            })
        });
        let threads = threads.collect();
        Self { stop, threads }
    }

    fn stop(self) -> Served {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Served::default();
        for served in self.threads.into_iter().map(|thread| thread.join().unwrap()) {
            sum.answers += served.answers;
            sum.canary += served.canary;
            sum.retried += served.retried;
            sum.cut += served.cut;
            sum.wrong.extend(served.wrong);
        }
        sum
    }
}

impl Served {
    fn ask(&mut self, ports: &[u16], gates: &Gates, first: usize, user: &str) {
        let send = |at: usize| {
            let at = (first + at) % 3;
            let _open = gates[at].read().unwrap();
            Http::connect(ports[at])?.send("POST", "/predict", &[("x-user", user)], "{}")
        };
        let mut answer = send(0);
        match answer.as_ref().map_err(std::io::Error::kind) {
            Err(ErrorKind::ConnectionRefused) => {
                self.retried += 1;
                answer = send(1);
            }
            Err(ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
                self.cut += 1;
                answer = send(1);
            }
            _ => {}
        }
        match answer {
            Ok(answer) if answer.status == 200 => {
                self.answers += 1;
                let is_canary = answer.header("x-served-by") == Some("v2");
                self.canary += u64::from(is_canary);
                let ticket = sticky_ticket(xxhash_rust::xxh3::xxh3_64(b"svc"), user.as_bytes());
                if is_canary && ticket >= WEIGHT_BP {
                    self.wrong.push(format!("{user} with ticket {ticket} got the canary"));
                }
            }
            Ok(Answer { status, body, .. }) => {
                self.wrong.push(format!("{user}: {status} {}", String::from_utf8_lossy(&body)));
            }
            Err(error) => self.wrong.push(format!("{user}: {error}")),
        }
    }
}

/// A cluster whose nodes change their program.
struct Rolling {
    cluster: Cluster,
    programs: [PathBuf; 2],
    /// Which program each node runs: 0 is the last release's.
    runs: [usize; 3],
    gates: Gates,
    random: SmallRng,
    /// Transactions that were answered COMMITTED.
    acknowledged: BTreeSet<String>,
    kills: u32,
}

impl Rolling {
    /// Founds a cluster of the last release, and brings its canary to the weight.
    fn start(stable: &Upstream, canary: &Upstream) -> Self {
        let programs = programs();
        let mut cluster = Cluster::found_by(&programs[0], "");
        (0..3).for_each(|i| cluster.spawn_program(&programs[0], i));
        (0..3).for_each(|i| cluster.wait_ready(i));
        cluster.apply(0, &rollout(stable, canary));
        let random = SmallRng::seed_from_u64(7);
        let acknowledged = BTreeSet::new();
        let rolling =
            Self { cluster, programs, runs: [0; 3], gates: Default::default(), random, acknowledged, kills: 0 };
        (0..3).for_each(|i| rolling.until_whole(i));
        rolling
    }

    /// Waits until node `i` votes and serves the canary.
    fn until_whole(&self, i: usize) {
        let head =
            |i: usize| http(self.cluster.nodes[i].api, "GET", "/v1/cluster", &[], "").ok()?.json()["head"].as_u64();
        let is_whole = |state: &Value| state["mode"] == "normal" && state["effective_weights"]["v2"] != 0.0;
        self.cluster.until(i, "a node that votes", Duration::from_secs(20), is_whole);
        let newest = head((i + 1) % 3).unwrap_or(0);
        wait("a node that caught up", Duration::from_secs(20), || head(i).filter(|head| *head >= newest));
    }

    /// Ends node `i`'s process as an operator does, and starts it again as another version.
    fn replace(&mut self, i: usize, program: usize) {
        let process = self.cluster.nodes[i].process.as_mut().unwrap();
        let sent = Command::new("kill").args(["-TERM", &process.0.id().to_string()]).status().unwrap();
        assert!(sent.success() && process.ended_within(Duration::from_secs(20)), "node {} did not end", NAMES[i]);
        self.cluster.nodes[i].process = None;
        self.runs[i] = program;
        self.restart(i);
    }

    /// Kills a node between two requests, and starts it again as what it was.
    fn kill(&mut self, i: usize) {
        let gate = self.gates[i].clone();
        let quiet = gate.write().unwrap();
        self.cluster.kill(i);
        drop(quiet);
        self.kills += 1;
        self.restart(i);
    }

    fn restart(&mut self, i: usize) {
        let program = self.programs[self.runs[i]].clone();
        self.cluster.spawn_program(&program, i);
        self.cluster.wait_ready(i);
        self.until_whole(i);
    }

    /// Has a pause and a resume decided by two nodes.
    fn write(&mut self) {
        for verb in ["pause", "resume"] {
            let node = self.random.random_range(0..3);
            let key = format!("{verb}-{}", self.acknowledged.len());
            let answer = wait("a write that is decided", Duration::from_secs(10), || {
                let answer = self.cluster.post(node, &format!("/v1/rollouts/svc/{verb}"), Some(&key), "{}");
                (answer.status == 200).then_some(answer)
            });
            assert_eq!(answer.json()["status"], "COMMITTED", "{answer:?}");
            self.acknowledged.insert(key);
        }
    }

    /// Fails if a node's history lacks a transaction that was acknowledged, or if two nodes' differ in a byte.
    fn check_histories(&self) {
        self.cluster.agreed(&[0, 1, 2], Duration::from_secs(10));
        // Beside the records this build tells from where they are whole, once a history has lost its beginning.
        let records = |body: &[u8]| match String::from_utf8(body.to_vec()).unwrap().rsplit_once(",\"whole_from\":") {
            Some((records, _)) => format!("{records}}}"),
            None => String::from_utf8(body.to_vec()).unwrap(),
        };
        let read = |i: usize| {
            records(&http(self.cluster.nodes[i].api, "GET", "/v1/rollouts/svc/history", &[], "").unwrap().body)
        };
        // A node learns of the last record a moment later.
        let histories = wait("equal histories on all nodes", Duration::from_secs(10), || {
            let histories = [0, 1, 2].map(read);
            histories.iter().all(|history| *history == histories[0]).then_some(histories)
        });
        let history: Value = serde_json::from_str(&histories[0]).unwrap();
        let told: BTreeSet<_> =
            history["history"].as_array().unwrap().iter().filter_map(|entry| entry["txid"].as_str()).collect();
        let lost: Vec<_> = self.acknowledged.iter().filter(|key| !told.contains(key.as_str())).collect();
        // The API tells the newest 1000 records.
        assert!(lost.is_empty() || told.len() >= 1_000, "acknowledged and not in the history: {lost:?}");
    }

    /// Replaces the nodes one by one, with a kill between two of them.
    fn roll(&mut self, program: usize) {
        let first = self.random.random_range(0..3);
        for i in (first..first + 3).map(|i| i % 3) {
            self.replace(i, program);
            self.write();
            let victim = self.random.random_range(0..3);
            self.kill(victim);
            self.write();
            self.check_histories();
        }
    }
}

#[test]
#[ignore = "needs the last release's program: ./run_tests.sh upgrade"]
fn nodes_go_forth_and_back_by_one_version_under_load() {
    let rounds: u32 = std::env::var("AVIARY_UPGRADES").map_or(5, |rounds| rounds.parse().unwrap());
    let (stable, canary) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut rolling = Rolling::start(&stable, &canary);
    let clients = Clients::start(&rolling.cluster, &rolling.gates);
    for _ in 0..rounds {
        rolling.roll(1);
        rolling.roll(0);
    }
    let Served { answers, canary, retried, cut, wrong } = clients.stop();
    let (kills, writes) = (rolling.kills, rolling.acknowledged.len());
    println!(
        "{rounds} rounds forth and back, {kills} kills, {writes} writes: {answers} answers, {canary} of the canary, \
         {retried} retried, {cut} cut, {} wrong",
        wrong.len()
    );
    assert_eq!(wrong, Vec::<String>::new());
    // Each node of the last release cuts what it has just accepted when it stops; 11 of 300 stops were measured.
    assert!(cut <= rounds as u64, "{cut} connections were cut in {rounds} rounds");
    assert!(canary > answers / 4, "the canary served under half of its weight: {canary} of {answers}");
    rolling.cluster.assert_no_panic();
}

/// Runs a verb of this build's CLI against node a; returns its exit code and all that it printed.
fn cli(cluster: &Cluster, arguments: &[&str]) -> (Option<i32>, String) {
    let api = format!("http://127.0.0.1:{}", cluster.nodes[0].api);
    let output = aviary().args(arguments).args(["--api", &api]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Ends the rollout that the last release began, and begins another one, which has users of its own: the way back waits for its end.
fn begins_with_other_users(rolling: &Rolling, stable: &Upstream, canary: &Upstream) {
    let slot = || rolling.cluster.state(0).map_or(Value::Null, |state| state["assignment"]["salt_slot"].clone());
    assert_eq!(slot(), Value::Null, "the users of a rollout under way stay as they were");
    let (code, text) = cli(&rolling.cluster, &["abort", "svc"]);
    assert_eq!(code, Some(0), "{text}");
    rolling.cluster.apply(0, &rollout(stable, canary).replace("setWeight: 50", "setWeight: 40"));
    let slot = wait("a slot for a salt", Duration::from_secs(10), || Some(slot()).filter(Value::is_u64));
    assert!(slot.as_u64() > Some(1), "{slot}");
    let (code, text) = cli(&rolling.cluster, &["cluster", "downgrade", "--check"]);
    assert_eq!(code, Some(1), "{text}");
    let what = "the rollout of svc uses feature rollout-salt: versions before aviary 0.3.0 refuse to vote for it";
    assert!(text.contains(what) && text.contains("aviary abort svc"), "{text}");
}

fn start_of(program: &Path, config: &Path) -> (Option<i32>, String) {
    let output = Command::new(program).arg("node").arg("--config").arg(config).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
#[ignore = "needs the last release's program: ./run_tests.sh upgrade"]
fn what_the_last_release_can_not_read_waits_for_its_last_node_and_then_keeps_it_out() {
    let (stable, canary) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut rolling = Rolling::start(&stable, &canary);
    rolling.replace(0, 1);
    rolling.replace(1, 1);
    let before = Command::new(&rolling.programs[0]).arg("version").args(["-o", "json"]).output().unwrap();
    let before: Value = serde_json::from_slice(&before.stdout).unwrap();
    let build = format!("{} ({})", before["version"].as_str().unwrap(), before["commit"].as_str().unwrap());

    let set = ["service", "set-default", "svc"];
    let (code, text) = cli(&rolling.cluster, &set);
    let expected = format!("default-service needs aviary 0.3.0 on every member: node c runs {build}; upgrade it first");
    assert!(code == Some(1) && text.contains(&expected), "{code:?} {text}");
    let waits = format!("feature default-service (aviary 0.3.0) waits for node c ({build})");
    for verb in [&["cluster", "status"][..], &["cluster", "upgrade", "--check"]] {
        let (_, text) = cli(&rolling.cluster, verb);
        assert!(text.contains(&waits), "{verb:?}: {text}");
    }
    let down = ["cluster", "downgrade", "--check"];
    assert_eq!(cli(&rolling.cluster, &down).0, Some(0), "the way back is open");

    rolling.replace(2, 1);
    begins_with_other_users(&rolling, &stable, &canary);
    let (code, text) = wait("every member knows it", Duration::from_secs(10), || {
        Some(cli(&rolling.cluster, &set)).filter(|(code, _)| *code == Some(0))
    });
    assert!(text.contains("COMMITTED"), "{code:?} {text}");
    let (code, text) = cli(&rolling.cluster, &down);
    assert!(code == Some(1) && text.contains("versions before aviary 0.3.0 can't read the log"), "{text}");
    assert!(text.contains("restore a backup from before"), "{text}");

    rolling.until_whole(2);
    rolling.cluster.kill(2);
    let data = rolling.cluster.data_dir(2);
    let files = contents(&data);
    let (code, told) = start_of(&rolling.programs[0], &rolling.cluster.config(2));
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("has format 4, expected 3: aviary 0.2.0 can't read it and changed nothing"), "{told}");
    assert!(told.contains("start the version of aviary that wrote it"), "{told}");
    assert_eq!(contents(&data), files, "nothing was changed");
    rolling.restart(2);
    assert!(fs::read_to_string(data.join("journal.format")).unwrap().starts_with("journal 4 "));
    rolling.cluster.assert_no_panic();
}
