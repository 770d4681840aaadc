//! Clusters that grow and shrink while they run.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use super::harness::{Cluster, MANUAL, Process, aviary, free_port, http, rollout, wait};

#[test]
fn a_fourth_node_joins_and_another_leaves() {
    let mut cluster = Cluster::found();
    let (data, api, control) = (free_port(), free_port(), free_port());
    let dir = cluster.dir.path().to_path_buf();
    // The new node's file, and its name in the others'.
    let mut text = format!(
        "[node]\nid = \"d\"\ndata_dir = {:?}\n[listen]\ndata = \"127.0.0.1:{data}\"\napi = \"127.0.0.1:{api}\"\n\
         control = \"127.0.0.1:{control}\"\n",
        dir.join("data-d")
    );
    for i in 0..3 {
        let node = &cluster.nodes[i];
        let (name, control, api) = (node.name, node.control, node.api);
        text += &format!("[peers.{name}]\ncontrol = \"127.0.0.1:{control}\"\napi = \"127.0.0.1:{api}\"\n");
        let old = fs::read_to_string(cluster.config(i)).unwrap();
        let peer = format!(
            "[peers.d]\ncontrol = \"127.0.0.1:{}\"\napi = \"127.0.0.1:{}\"\n",
            text_port(&text, "control"),
            text_port(&text, "api")
        );
        fs::write(cluster.config(i), format!("{old}\n{peer}")).unwrap();
    }
    let config = dir.join("d.toml");
    fs::write(&config, text).unwrap();
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));

    let mut join = aviary();
    join.args(["cluster", "join", "--genesis"]).arg(cluster.data_dir(0)).arg("--ca").arg(dir.join("ca"));
    let output = join.arg("--config").arg(&config).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let incarnation = told.trim().rsplit(' ').next().unwrap().to_string();
    let console = fs::File::create(dir.join("d.console")).unwrap();
    let mut command = aviary();
    command.arg("node").arg("--config").arg(&config).stdout(console.try_clone().unwrap()).stderr(console);
    let _d = Process(command.spawn().unwrap());
    let state =
        || http(data, "GET", "/routing/state", &[], "").ok().filter(|answer| answer.status == 200).map(|a| a.json());
    let follows = wait("d follows", Duration::from_secs(5), || state().filter(|s| s["slot"] == 1));
    assert_eq!(follows["mode"], "learner");

    let body = format!("{{\"node\": \"d\", \"incarnation\": \"{incarnation}\"}}");
    let answer = cluster.post(0, "/v1/cluster/add", None, &body);
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    wait("d votes", Duration::from_secs(3), || state().filter(|s| s["mode"] == "normal"));
    // Two of four decide nothing; three do.
    let answer = cluster.post(0, "/v1/cluster/remove", None, "{\"node\": \"c\"}");
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    cluster.kill(2);
    cluster.kill(1);
    let answer = wait("a and d decide", Duration::from_secs(4), || {
        Some(cluster.post(0, "/v1/rollouts/svc/abort", Some("abort-by-two"), "{}"))
            .filter(|answer| answer.status == 200)
    });
    assert_eq!(answer.json()["status"], "COMMITTED");
    wait("d knows", Duration::from_secs(1), || state().filter(|s| s["slot"] == answer.json()["slot"]));
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
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing was done"));
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

/// Returns the port that a node's file listens on.
fn text_port(text: &str, key: &str) -> u16 {
    let line = text.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap();
    line.rsplit(':').next().unwrap().trim_end_matches('"').parse().unwrap()
}
