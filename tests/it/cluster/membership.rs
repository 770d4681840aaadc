//! Clusters that grow and shrink while they run.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::harness::{Cluster, MANUAL, Process, aviary, free_port, http, rollout, wait};

/// A node that is to join: its ports, and its file.
struct Joiner {
    name: &'static str,
    ports: [u16; 3],
    config: PathBuf,
}

impl Joiner {
    fn new(cluster: &Cluster, name: &'static str) -> Self {
        let ports = [free_port(), free_port(), free_port()];
        Self { name, ports, config: cluster.dir.path().join(format!("{name}.toml")) }
    }

    /// Returns its entry in the others' files.
    fn as_peer(&self) -> String {
        let [_, api, control] = self.ports;
        format!("[peers.{}]\ncontrol = \"127.0.0.1:{control}\"\napi = \"127.0.0.1:{api}\"\n", self.name)
    }

    fn state(&self) -> Option<Value> {
        let answer = http(self.ports[0], "GET", "/routing/state", &[], "").ok()?;
        (answer.status == 200).then(|| answer.json())
    }

    /// Prepares its data directory, starts it, waits until it follows, and has it added.
    fn join(&self, cluster: &Cluster, slot: u64) -> Process {
        let dir = cluster.dir.path();
        let mut join = aviary();
        join.args(["cluster", "join", "--genesis"]).arg(cluster.data_dir(0)).arg("--ca").arg(dir.join("ca"));
        let output = join.arg("--config").arg(&self.config).output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let incarnation = told.trim().rsplit(' ').next().unwrap().to_string();
        let console = fs::File::create(dir.join(format!("{}.console", self.name))).unwrap();
        let mut command = aviary();
        command.arg("node").arg("--config").arg(&self.config).stdout(console.try_clone().unwrap()).stderr(console);
        let process = Process(command.spawn().unwrap());
        let name = self.name;
        let follows = wait(&format!("{name} follows"), Duration::from_secs(5), || {
            self.state().filter(|state| state["slot"].as_u64() >= Some(slot))
        });
        assert_eq!(follows["mode"], "learner");
        let answer = cluster.post(
            0,
            "/v1/cluster/add",
            None,
            &format!(r#"{{"node": "{name}", "incarnation": "{incarnation}"}}"#),
        );
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        wait(&format!("{name} votes"), Duration::from_secs(3), || self.state().filter(|s| s["mode"] == "normal"));
        process
    }
}

#[test]
fn three_nodes_become_five_and_two_of_them_three_again() {
    let mut cluster = Cluster::found();
    let joiners = [Joiner::new(&cluster, "d"), Joiner::new(&cluster, "e")];
    let peers: Vec<_> = (cluster.nodes.iter())
        .map(|node| {
            let (name, control, api) = (node.name, node.control, node.api);
            format!("[peers.{name}]\ncontrol = \"127.0.0.1:{control}\"\napi = \"127.0.0.1:{api}\"\n")
        })
        .collect();
    for i in 0..3 {
        let old = fs::read_to_string(cluster.config(i)).unwrap();
        fs::write(cluster.config(i), format!("{old}\n{}{}", joiners[0].as_peer(), joiners[1].as_peer())).unwrap();
    }
    for (joiner, other) in [(&joiners[0], &joiners[1]), (&joiners[1], &joiners[0])] {
        let [data, api, control] = joiner.ports;
        let text = format!(
            "[node]\nid = \"{}\"\ndata_dir = {:?}\n[listen]\ndata = \"127.0.0.1:{data}\"\napi = \"127.0.0.1:{api}\"\n\
             control = \"127.0.0.1:{control}\"\n{}{}",
            joiner.name,
            cluster.dir.path().join(format!("data-{}", joiner.name)),
            peers.concat(),
            other.as_peer()
        );
        fs::write(&joiner.config, text).unwrap();
    }
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    let mut processes: Vec<_> = joiners.iter().map(|joiner| joiner.join(&cluster, 1)).collect();

    // Any two of five may die.
    cluster.kill(1);
    cluster.kill(2);
    let decide = |cluster: &Cluster, verb: &str, key: &str| {
        let path = format!("/v1/rollouts/svc/{verb}");
        wait(key, Duration::from_secs(4), || {
            let answer = cluster.post(0, &path, Some(key), "{}");
            Some(answer).filter(|answer| answer.status != 503).map(|a| a.json())
        })
    };
    let decided = decide(&cluster, "abort", "by-three-of-five");
    assert_eq!(decided["status"], "COMMITTED");
    for joiner in &joiners {
        wait(&format!("{} knows", joiner.name), Duration::from_secs(1), || {
            joiner.state().filter(|s| s["slot"] == decided["slot"])
        });
    }

    // Without the dead two, the other three are a cluster of three: any one of them may die.
    for name in ["b", "c"] {
        let answer = cluster.post(0, "/v1/cluster/remove", None, &format!(r#"{{"node": "{name}"}}"#));
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    }
    processes[0].kill();
    assert_eq!(decide(&cluster, "retry", "by-two-of-three")["code"], "ABORTED", "an increase needs d, which is dead");
    assert_eq!(cluster.post(0, "/v1/cluster/cordon", None, r#"{"node": "d"}"#).status, 200);
    assert_eq!(decide(&cluster, "retry", "without-d")["status"], "COMMITTED");
    // A removed node that comes back has no say.
    processes[1].kill();
    cluster.spawn(1, None);
    cluster.spawn(2, None);
    // They are up and connected by then, if anybody lets them.
    std::thread::sleep(Duration::from_secs(2));
    let answer = cluster.post(0, "/v1/rollouts/svc/abort", None, "{}");
    assert_eq!(answer.status, 503, "one of three is no majority, also of removed nodes: {answer:?}");
    cluster.assert_no_panic();
}

#[test]
fn one_survivor_founds_a_new_cluster_on_stable() {
    let mut cluster = Cluster::start();
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    let old = cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
    (0..3).for_each(|i| cluster.kill(i));
    let id = fs::read_to_string(cluster.dir.path().join("ca/cluster")).unwrap();
    let root = cluster.dir.path().join("new");
    let force_new = |typed: &str| {
        let mut command = aviary();
        command.args(["cluster", "force-new", "--from"]).arg(cluster.data_dir(0)).arg("--data-root").arg(&root);
        for i in 0..3 {
            command.arg("--config").arg(cluster.config(i));
        }
        let streams = [std::process::Stdio::piped(), std::process::Stdio::piped(), std::process::Stdio::piped()];
        let [stdin, stdout, stderr] = streams;
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
        child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = force_new("yes\n");
    assert!(!output.status.success() && !root.exists());
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing was changed"));
    let output = force_new(&id);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut nodes = Vec::new();
    for i in 0..3 {
        let console = fs::File::create(cluster.dir.path().join(format!("new-{i}.console"))).unwrap();
        let mut command = aviary();
        command.arg("node").arg("--config").arg(cluster.config(i)).arg("--data-root").arg(&root);
        nodes.push(Process(command.stdout(console.try_clone().unwrap()).stderr(console).spawn().unwrap()));
    }
    (0..3).for_each(|i| cluster.wait_ready(i));
    let state = cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
    assert_eq!(state["weights"], serde_json::json!({"v1": 1.0}), "everything is on stable");
    assert!(state["version"].as_u64() > old["version"].as_u64());
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/retry", None, "{}").status, 200);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
}

/// Runs `aviary cluster join` for node c, whose data is lost; returns whether it succeeded, and all that it said.
fn join_again(cluster: &Cluster, options: &[&str]) -> (bool, String) {
    let mut join = aviary();
    join.args(["cluster", "join", "--genesis"]).arg(cluster.data_dir(0)).arg("--config").arg(cluster.config(2));
    let output = join.args(options).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.success(), said)
}

#[test]
fn a_founding_node_whose_disk_is_lost_is_replaced_as_the_commands_say() {
    let mut cluster = Cluster::start();
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    cluster.kill(2);
    fs::remove_dir_all(cluster.data_dir(2)).unwrap();
    let ca = cluster.dir.path().join("ca");
    let ca = ca.to_str().unwrap();
    let (joined, said) = join_again(&cluster, &["--ca", ca]);
    assert!(!joined && said.contains("if its data is lost, run the same command with --replace c"), "{said}");
    let (joined, said) = join_again(&cluster, &["--ca", ca, "--replace", "b"]);
    assert!(!joined && said.contains("--replace is b, expected c"), "{said}");
    // What fails leaves nothing behind that the next try would find.
    let (joined, said) = join_again(&cluster, &["--replace", "c", "--ca", "/nowhere"]);
    assert!(!joined && !cluster.data_dir(2).exists(), "{said}");
    let (joined, said) = join_again(&cluster, &["--ca", ca, "--replace", "c"]);
    assert!(joined, "{said}");
    let verbs = said.lines().find_map(|line| line.strip_prefix("then: aviary ")).expect("the next command");
    assert!(verbs.starts_with("cluster readmit c --incarnation "), "{said}");

    cluster.spawn(2, None);
    let api = format!("http://127.0.0.1:{}", cluster.nodes[0].api);
    let status = wait("the way to readmit c", Duration::from_secs(5), || {
        let output = aviary().args(["--api", &api, "cluster", "status"]).output().unwrap();
        Some(String::from_utf8(output.stdout).unwrap()).filter(|status| status.contains(verbs))
    });
    assert!(status.contains("its memory is gone"), "{status}");
    let output = aviary().args(["--api", &api]).args(verbs.split(' ')).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.wait_ready(2);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
}

#[test]
fn a_command_that_fails_or_is_not_read_leaves_no_half_of_a_cluster() {
    let cluster = Cluster::found();
    (0..3).for_each(|i| fs::remove_dir_all(cluster.data_dir(i)).unwrap());
    fs::remove_dir_all(cluster.dir.path().join("ca")).unwrap();
    let init = || {
        let mut init = aviary();
        init.args(["cluster", "init"]);
        for i in 0..3 {
            init.arg("--config").arg(cluster.config(i));
        }
        init
    };
    // The last node's folder can't be made.
    fs::write(cluster.data_dir(2), "in the way").unwrap();
    let failed = init().output().unwrap();
    assert!(!failed.status.success() && failed.stdout.is_empty(), "{failed:?}");
    let left: Vec<_> = [cluster.data_dir(0), cluster.data_dir(1), cluster.dir.path().join("ca")]
        .into_iter()
        .filter(|path| path.exists())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    fs::remove_file(cluster.data_dir(2)).unwrap();

    // The reader of its output is gone: all of it is there all the same.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    init().stdout(writer).status().unwrap();
    let mut cluster = cluster;
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
}
