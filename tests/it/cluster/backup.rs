//! Backups: made while the cluster serves, verified, and restored into another cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::harness::{Cluster, MANUAL, Process, Traffic, Upstream, aviary, http, rollout, wait};

/// A line of each node's file: a checkpoint every few records, and a secret where nobody expects one.
const FEW: &str = "\n# the password of this machine is hunter2\n[history]\nrecords = 6\ncheckpoint_every = 8\n";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn backup(cluster: &Cluster, node: usize, out: &Path, more: &[&str]) -> Output {
    let api = format!("http://127.0.0.1:{}", cluster.nodes[node].api);
    aviary().args(["cluster", "backup", "--api", &api, "-o", "json", "--out"]).arg(out).args(more).output().unwrap()
}

fn verify(file: &Path, more: &[&str]) -> Output {
    aviary().args(["cluster", "verify-backup", "-o", "json"]).arg(file).args(more).output().unwrap()
}

fn restore(cluster: &Cluster, from: &Path, root: &Path) -> Output {
    let mut command = aviary();
    command.args(["cluster", "restore", "--from"]).arg(from).arg("--data-root").arg(root);
    for i in 0..3 {
        command.arg("--config").arg(cluster.config(i));
    }
    command.output().unwrap()
}

/// Starts the nodes of a cluster on the data under `root`.
fn start_at(cluster: &Cluster, root: &Path) -> Vec<Process> {
    let spawn = |i: usize| {
        let console = fs::File::create(root.with_file_name(format!("restored-{i}.console"))).unwrap();
        let mut command = aviary();
        command.arg("node").arg("--config").arg(cluster.config(i)).arg("--data-root").arg(root);
        Process(command.stdout(console.try_clone().unwrap()).stderr(console).spawn().unwrap())
    };
    (0..3).map(spawn).collect()
}

/// Returns the names of what a directory holds.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_backup_made_under_load_becomes_another_cluster_that_serves() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start_with(FEW);
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    let applied = rollout(&v1.url(), &v2.url(), MANUAL).replace("name: svc", "name: tail");
    cluster.apply(1, &applied);
    let first = cluster.post(0, "/v1/rollouts/tail/promote", Some("finish"), "{\"full\": true}");
    assert_eq!(first.status, 200, "{}", text(&first.body));
    let traffic = Traffic::start(&cluster, 50);

    // Changes go on while a node writes it that does not coordinate.
    let done = Arc::new(AtomicBool::new(false));
    let (api, stop) = (cluster.nodes[0].api, done.clone());
    let changes = std::thread::spawn(move || {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) || count < 30 {
            let verb = if count % 2 == 0 { "pause" } else { "resume" };
            let answer = http(api, "POST", &format!("/v1/rollouts/svc/{verb}"), &[], "{}").unwrap();
            assert_eq!(answer.status, 200, "{}", text(&answer.body));
            count += 1;
        }
        count
    });
    cluster.until(0, "a checkpoint", Duration::from_secs(10), |state| state["slot"].as_u64() > Some(20));
    let dir = cluster.dir.path().join("backups");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("b.aviary");
    let output = backup(&cluster, 2, &file, &[]);
    done.store(true, Ordering::Relaxed);
    let changed = changes.join().unwrap();
    assert!(output.status.success(), "{} {}", text(&output.stderr), text(&output.stdout));
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{changed} changes; {made}");
    assert_eq!((&made["node"], &made["services"]), (&json!("c"), &json!(2)));
    assert!(made["checkpoint"].as_u64() >= Some(16), "{made}");
    assert_eq!(made["bytes"].as_u64(), Some(fs::metadata(&file).unwrap().len()));
    let failed: Vec<_> = traffic.stop().into_iter().filter(|seen| seen.status != 200).collect();
    assert!(failed.is_empty(), "{} requests failed: {:?}", failed.len(), failed.first());

    // No half file, no file lost, and nothing secret in it.
    let refused = backup(&cluster, 2, &file, &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("exists, expected a new file"), "{}", text(&refused.stderr));
    assert_eq!(names(&dir), ["b.aviary"]);
    let bytes = fs::read(&file).unwrap();
    let kept = text(&bytes);
    for i in 0..3 {
        let key = fs::read_to_string(cluster.data_dir(i).join("tls/node.key")).unwrap();
        assert!(!kept.contains(key.lines().nth(1).unwrap()));
    }
    assert!(!kept.contains("PRIVATE KEY") && !kept.contains("hunter2"));
    let (config, authority) = (verify(&file, &["--show", "config"]), verify(&file, &["--show", "authority"]));
    assert!(text(&config.stdout).contains("id = \"c\""), "{}", text(&config.stdout));
    let certificate = fs::read_to_string(cluster.data_dir(2).join("tls/ca.pem")).unwrap();
    assert_eq!(text(&authority.stdout).trim(), certificate.trim());

    // What is verified is the same; what is cut is refused.
    assert_eq!(serde_json::from_slice::<Value>(&verify(&file, &[]).stdout).unwrap(), made);
    let cut = dir.join("cut.aviary");
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let root = cluster.dir.path().join("new");
    for output in [verify(&cut, &[]), restore(&cluster, &cut, &root)] {
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("the file is cut"), "{}", text(&output.stderr));
    }
    assert!(!root.exists());

    let old = made["cluster"].as_str().unwrap().to_string();
    (0..3).for_each(|i| cluster.kill(i));
    let output = restore(&cluster, &file, &root);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let told = text(&output.stdout);
    assert!(told.contains("rolled back, because they were under way:") && told.contains("svc"), "{told}");
    let again = restore(&cluster, &file, &root);
    assert_eq!(again.status.code(), Some(1), "a data directory in use is refused");
    assert!(text(&again.stderr).contains("is not empty"), "{}", text(&again.stderr));

    let _nodes = start_at(&cluster, &root);
    (0..3).for_each(|i| cluster.wait_ready(i));
    check_restored(&cluster, &old, &made);
}

/// Checks that the restored cluster goes on from the backup: with the services, without the outcomes.
fn check_restored(cluster: &Cluster, old: &str, made: &Value) {
    let state = cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
    assert_eq!((&state["weights"], &state["phase"]), (&json!({"v1": 1.0}), &json!("RolledBack")));
    let answer = http(cluster.nodes[1].api, "GET", "/v1/rollouts/svc", &[], "").unwrap().json();
    let reason = format!("restored from backup of cluster {old} at slot {}", made["slot"]);
    assert!(answer.to_string().contains(&reason), "{answer}");
    let members = http(cluster.nodes[1].api, "GET", "/v1/cluster", &[], "").unwrap().json();
    assert_ne!(members["cluster"], old, "another cluster");
    for node in &cluster.nodes {
        let answer = http(node.data, "POST", "/predict", &[("x-aviary-service", "svc")], "{}").unwrap();
        assert_eq!((answer.status, answer.header("x-served-by")), (200, Some("v1")));
    }
    // It decides, and a key of the old cluster is a new one here.
    let retried = wait("a retry", Duration::from_secs(5), || {
        Some(cluster.post(2, "/v1/rollouts/svc/retry", Some("finish"), "{}")).filter(|answer| answer.status == 200)
    });
    assert_eq!(retried.json()["status"], "COMMITTED");
    let slot = retried.json()["slot"].as_u64();
    assert!(slot > made["slot"].as_u64(), "slots go on: {slot:?}");
    cluster.assert_no_panic();
}

#[test]
fn a_backup_needs_the_role_of_an_admin() {
    let token = |role: &str| {
        let output = aviary().args(["token", "--role", role, "--name", role]).output().unwrap();
        let told = text(&output.stdout);
        let word = |label: &str| told.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_string();
        (word("token:"), word("line:"))
    };
    let (operator, admin) = (token("operator"), token("admin"));
    let mut cluster = Cluster::found();
    let tokens = cluster.dir.path().join("tokens");
    fs::write(&tokens, format!("{}\n{}\n", operator.1, admin.1)).unwrap();
    let config = fs::read_to_string(cluster.config(0)).unwrap();
    fs::write(cluster.config(0), format!("{config}\n[api]\ntokens_file = {tokens:?}\n")).unwrap();
    cluster.spawn(0, None);
    wait("the API", Duration::from_secs(10), || http(cluster.nodes[0].api, "GET", "/livez", &[], "").ok());
    let run = |token: &str, out: &PathBuf| {
        let api = format!("http://127.0.0.1:{}", cluster.nodes[0].api);
        let mut command = aviary();
        command.env("AVIARY_TOKEN", token).args(["cluster", "backup", "--api", &api, "--out"]).arg(out);
        command.output().unwrap()
    };
    let out = cluster.dir.path().join("b.aviary");
    let refused = run(&operator.0, &out);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("the token's role is operator, expected admin"),
        "{}",
        text(&refused.stderr)
    );
    assert!(!out.exists());
    // One node of three that never decided anything: its log is the genesis.
    let made = run(&admin.0, &out);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let kept = text(&fs::read(&out).unwrap());
    assert!([&operator.0, &admin.0, &operator.1, &admin.1].iter().all(|secret| !kept.contains(secret.as_str())));
}
