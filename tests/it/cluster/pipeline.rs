//! The script that pipelines are made of, over random faults: apply, wait, read the exit code, read the JSON. Its exit code is the truth
//! each time, whatever happens to nodes and connections, and whatever other people do meanwhile.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::harness::{Cluster, MANUAL, Traffic, Upstream, http, wait};
use super::waiting::{Way, spawn};

/// What happens while the script waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    KillNode(usize),
    CutWay,
    Abort,
    AbortAndApplyAnother,
    Pause,
    BadCanary,
    PromoteFull,
    KillAndAbort(usize),
    CutAndReplace,
}

/// A generator of numbers whose seed repeats a run (splitmix64).
struct Draws(u64);

impl Draws {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % most
    }

    fn fault(&mut self) -> Fault {
        let node = self.below(3) as usize;
        match self.below(10) {
            0 => Fault::Nothing,
            1 => Fault::KillNode(node),
            2 => Fault::CutWay,
            3 => Fault::Abort,
            4 => Fault::AbortAndApplyAnother,
            5 => Fault::Pause,
            6 => Fault::BadCanary,
            7 => Fault::PromoteFull,
            8 => Fault::KillAndAbort(node),
            _ => Fault::CutAndReplace,
        }
    }
}

/// A cluster with two servers, which take turns: the canary of one rollout is the stable version of the next.
struct Place {
    cluster: Cluster,
    ways: Vec<Way>,
    servers: [Upstream; 2],
    draws: Draws,
}

fn version(number: usize) -> String {
    format!("1.{number}.0")
}

impl Place {
    fn url(&self, number: usize) -> String {
        self.servers[number % 2].url()
    }

    fn rollout(&self, stable: usize, canary: usize, steps: &str) -> String {
        let (from, to) = (version(stable), version(canary));
        super::harness::rollout(&self.url(stable), &self.url(canary), steps)
            .replace("version: v1", &format!("version: {from}"))
            .replace("version: v2", &format!("version: {to}"))
            .replace("minSamples: 20", "minSamples: 5")
    }

    /// Does something as another user, at whichever node answers.
    fn other_user(&self, verb: &str, body: &str) {
        let path = format!("/v1/rollouts/svc{verb}");
        let path = if verb.is_empty() { "/v1/rollouts" } else { &path };
        for node in &self.cluster.nodes {
            let kind = if verb.is_empty() { "application/yaml" } else { "application/json" };
            if http(node.api, "POST", path, &[("content-type", kind)], body).is_ok_and(|answer| answer.status < 500) {
                return;
            }
        }
    }

    fn restart(&mut self, node: usize) {
        self.cluster.spawn(node, None);
        self.cluster.wait_ready(node);
    }

    fn happen(&mut self, fault: Fault, stable: usize, canary: usize) {
        match fault {
            Fault::Nothing => {}
            Fault::KillNode(node) => {
                self.cluster.kill(node);
                self.restart(node);
            }
            Fault::CutWay => {
                self.ways.iter().for_each(Way::cut);
                // The script is alone for so long.
                std::thread::sleep(Duration::from_millis(300 + self.draws.below(1_000)));
                self.ways.iter().for_each(Way::mend);
            }
            Fault::Abort => self.other_user("/abort", "{}"),
            Fault::AbortAndApplyAnother => {
                self.other_user("/abort", "{}");
                self.other_user("", &self.rollout(stable, canary + 2, MANUAL));
            }
            Fault::Pause => self.other_user("/pause", "{}"),
            Fault::BadCanary => self.servers[canary % 2].fault(r#"{"error_percent": 100}"#),
            Fault::PromoteFull => self.other_user("/promote", r#"{"full": true}"#),
            Fault::KillAndAbort(node) => {
                self.cluster.kill(node);
                self.other_user("/abort", "{}");
                self.restart(node);
            }
            Fault::CutAndReplace => {
                self.ways.iter().for_each(Way::cut);
                self.other_user("/abort", "{}");
                self.other_user("", &self.rollout(stable, canary + 2, MANUAL));
                self.ways.iter().for_each(Way::mend);
            }
        }
    }

    /// Leaves no rollout under way, and returns the stable version's number.
    fn calm(&self, before: usize, canary: usize) -> usize {
        self.servers.iter().for_each(|server| server.fault(r#"{"error_percent": 0}"#));
        let state = self.cluster.agreed(&[0, 1, 2], Duration::from_secs(20));
        if !["Completed", "RolledBack"].map(Value::from).contains(&state["phase"]) {
            self.other_user("/abort", "{}");
        }
        let ended = wait("the end of the rollout", Duration::from_secs(20), || {
            let state = self.cluster.agreed(&[0, 1, 2], Duration::from_secs(20));
            ["Completed", "RolledBack"].map(Value::from).contains(&state["phase"]).then_some(state)
        });
        let stable = ended["stable_model_id"].as_str().unwrap().to_string();
        [before, canary].into_iter().find(|number| version(*number) == stable).unwrap_or_else(|| panic!("{ended}"))
    }
}

/// What the log says became of the rollout that a key began.
#[derive(Debug, PartialEq, Eq)]
struct Truth {
    began: bool,
    completed: bool,
    rolled_back: bool,
    paused: bool,
    replaced: bool,
}

fn truth(history: &[Value], key: &str) -> Truth {
    let at = history.iter().position(|entry| entry["txid"] == key && entry["kind"] == "Start");
    let after = at.map(|at| &history[at + 1..]).unwrap_or_default();
    let end = after.iter().position(|entry| entry["kind"] == "Start").unwrap_or(after.len());
    let ours = |phase: &str| after[..end].iter().any(|entry| entry["phase"] == phase);
    Truth {
        began: at.is_some(),
        completed: ours("Completed"),
        rolled_back: ours("RolledBack"),
        paused: ours("Paused"),
        replaced: end < after.len(),
    }
}

fn assert_true(what: &str, output: &Output, truth: &Truth, history: &[Value]) {
    let code = output.status.code();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let holds = match code {
        Some(0) => truth.began && truth.completed,
        // Its own end, or it never began.
        Some(1) => !truth.began || (truth.rolled_back && !truth.completed),
        Some(3) => truth.began && truth.paused,
        Some(4) => truth.began && truth.replaced,
        _ => false,
    };
    assert!(holds, "{what}: exit code {code:?}, {truth:?}\n{said}\n{history:#?}");
    // Everything on standard output is JSON, and its last word agrees.
    let lines: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{what}: {error}: {line}")))
        .collect();
    let last = lines.last().unwrap_or_else(|| panic!("{what}: nothing was printed"));
    match code {
        Some(0) => assert_eq!(last["phase"], "Completed", "{what}: {said}"),
        Some(1) if truth.began => assert_eq!(last["phase"], "RolledBack", "{what}: {said}"),
        _ => {}
    }
}

/// Runs the script so often; `AVIARY_PIPELINE_RUNS` sets how often, `AVIARY_PIPELINE_SEED` repeats a run.
#[test]
fn the_exit_code_of_a_pipeline_is_the_truth_over_random_faults() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (runs, seed) = (number("AVIARY_PIPELINE_RUNS", 10), number("AVIARY_PIPELINE_SEED", 1));
    let cluster = Cluster::start();
    let ways = cluster.nodes.iter().map(|node| Way::to(node.api)).collect();
    let servers = [Upstream::start("even"), Upstream::start("odd")];
    let mut place = Place { cluster, ways, servers, draws: Draws(seed) };
    let steps = "    - setWeight: 50\n    - pause: { duration: 1s }\n    - setWeight: 100";
    // The data plane needs to know a service before it takes requests.
    place.other_user("", &place.rollout(0, 1, MANUAL));
    place.other_user("/abort", "{}");
    let _traffic = Traffic::start(&place.cluster, 30);
    let (mut stable, mut next) = (0, 1);
    for run in 0..runs {
        let fault = place.draws.fault();
        // Its server isn't the one that serves.
        let canary = (next..).find(|number| number % 2 != stable % 2).unwrap();
        next = canary + 4;
        let what = format!("run {run} of seed {seed}, {fault:?}");
        let key = format!("pipeline-{seed}-{run}");
        let file = place.rollout(stable, canary, steps);
        let ports: Vec<_> = place.ways.iter().map(|way| way.port).collect();
        let arguments = ["apply", "-f", "-", "--wait", "-o", "json", "--idempotency-key", &key];
        let began = Instant::now();
        let waiter = spawn(&ports, &arguments, &file);
        // Anywhere in the rollout, which takes about four seconds.
        std::thread::sleep(Duration::from_millis(place.draws.below(4_000)));
        place.happen(fault, stable, canary);
        let output = waiter.wait_with_output().unwrap();
        eprintln!("{what}: {:?} after {:?}", output.status.code(), began.elapsed());
        // A node that was started again may not know the last record yet.
        place.cluster.agreed(&[0, 1, 2], Duration::from_secs(20));
        let history = place.cluster.history(0);
        assert_true(&what, &output, &truth(&history, &key), &history);
        stable = place.calm(stable, canary);
    }
    place.cluster.assert_no_panic();
}
