//! The command line against running nodes.

use std::io::Write as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use super::harness::{Cluster, MANUAL, Upstream, aviary, http, rollout, wait};

/// Runs a verb against all nodes, with this text on its standard input.
fn run(cluster: &Cluster, arguments: &[&str], input: &str) -> Output {
    let api: Vec<_> = cluster.nodes.iter().map(|node| format!("http://127.0.0.1:{}", node.api)).collect();
    let mut command = aviary();
    command.args(arguments).args(["--api", &api.join(",")]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Returns what a verb prints, which has to succeed.
fn prints(cluster: &Cluster, arguments: &[&str], input: &str) -> String {
    let output = run(cluster, arguments, input);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_file_that_is_in_force_can_be_applied_again_and_changes_nothing() {
    let cluster = Cluster::start();
    let labels = "name: svc, labels: { team: fraud, tier: \"1e3\" }, annotations: { note: \"yes: 'a'\\n# b\", date: \"2026-11-29\" }";
    let file = rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL).replace("name: svc", labels);
    let first = prints(&cluster, &["apply", "-f", "-"], &file);
    assert!(first.starts_with("COMMITTED  slot "), "{first}");
    let in_force = prints(&cluster, &["get", "svc", "-o", "yaml"], "");
    assert!(in_force.starts_with("apiVersion: aviary/v1\n"), "{in_force}");
    let again = prints(&cluster, &["apply", "-f", "-"], &in_force);
    assert!(again.starts_with("UNCHANGED  "), "{again}\n{in_force}");
    let changed = in_force.replace("http://127.0.0.1:2", "http://127.0.0.1:3");
    let refused = run(&cluster, &["apply", "-f", "-"], &changed);
    assert!(!String::from_utf8_lossy(&refused.stdout).starts_with("UNCHANGED"), "{refused:?}");

    let list = |selector| prints(&cluster, &["list", "--selector", selector], "");
    assert!(list("team=fraud,tier!=x").contains("svc"));
    assert!(list("team!=fraud").starts_with("no rollouts"));
    let wrong = run(&cluster, &["list", "--selector", "=x"], "");
    assert_eq!(wrong.status.code(), Some(64), "{wrong:?}");

    assert_eq!(prints(&cluster, &["get", "svc", "--field", "metadata.labels.team"], ""), "fraud\n");
    assert_eq!(prints(&cluster, &["get", "svc", "--field", "stable_model_id"], ""), "v1\n");
    assert!(!run(&cluster, &["get", "svc", "--field", "team"], "").status.success(), "a field is not searched for");
    assert!(prints(&cluster, &["get", "svc"], "").contains("team=fraud,tier=1e3"));
    assert!(prints(&cluster, &["history", "svc"], "").contains("Start"));
    assert!(prints(&cluster, &["cluster", "status"], "").contains("coordinator"));
    assert!(prints(&cluster, &["get", "svc", "--all-nodes"], "").contains("all nodes agree"));
    let unknown = run(&cluster, &["get", "none"], "");
    let said = String::from_utf8_lossy(&unknown.stderr).to_string();
    assert!(unknown.status.code() == Some(1) && said.contains("rollout \"none\" is unknown, known: svc"), "{said}");
    let too_early = run(&cluster, &["resume", "svc"], "");
    assert_eq!(too_early.status.code(), Some(0), "{too_early:?}");
    assert!(String::from_utf8_lossy(&too_early.stdout).starts_with("UNCHANGED"), "{too_early:?}");

    // What applying would do is told, and then done.
    let file = prints(&cluster, &["get", "svc", "-o", "yaml"], "");
    assert!(prints(&cluster, &["diff", "-f", "-"], &file).starts_with("UNCHANGED: the rollout to v2 is Progressing"));
    let other = run(&cluster, &["diff", "-f", "-"], &file.replace("version: v1", "version: v0"));
    let said = String::from_utf8_lossy(&other.stdout).to_string();
    assert!(
        other.status.code() == Some(1) && said.starts_with("REFUSED: the rollout to v2 is Progressing"),
        "{other:?}"
    );
    prints(&cluster, &["abort", "svc", "--reason", "odd scores"], "");
    for verb in ["diff", "apply"] {
        let before = run(&cluster, &[verb, "-f", "-"], &file);
        let said = String::from_utf8_lossy(&before.stdout).to_string();
        assert_eq!(before.status.code(), Some(1), "{verb}: {before:?}");
        assert!(said.starts_with("UNCHANGED") && said.contains("v2 was rolled back: odd scores"), "{verb}: {said}");
    }
    assert!(prints(&cluster, &["diff", "-f", "-"], &file.replace("name: svc", "name: other")).starts_with("START"));
}

#[test]
fn a_write_for_everywhere_returns_once_all_live_nodes_route_with_it() {
    let mut cluster = Cluster::start();
    let file = rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL);
    let applied = prints(&cluster, &["apply", "-f", "-", "--everywhere"], &file);
    // No wait here: that all of them route with it is what the answer says.
    let states: Vec<_> = (0..3).map(|i| cluster.state(i).map(|state| state["hash"].clone())).collect();
    assert!(states[0].is_some() && states.iter().all(|state| *state == states[0]), "{states:?}");
    assert!(applied.contains("served by a, b, c\n"), "{applied}");
    cluster.kill(2);
    let paused = run(&cluster, &["pause", "svc", "--everywhere", "-o", "json"], "");
    let answer: serde_json::Value = serde_json::from_slice(&paused.stdout).unwrap();
    assert_eq!(answer["reach"]["served_by"], serde_json::json!(["a", "b"]), "{answer}");
    assert_eq!((&answer["reach"]["away"][0], paused.status.code()), (&"c".into(), Some(0)), "{answer}");
    let hashes = [0, 1].map(|i| cluster.state(i).unwrap()["hash"].clone());
    assert_eq!(hashes[0], hashes[1]);
    cluster.spawn(2, None);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(10));
}

#[test]
fn stable_moves_to_other_servers_without_a_canary_and_never_to_where_nobody_listens() {
    let (old, new) = (Upstream::start("old"), Upstream::start("new"));
    let cluster = Cluster::start();
    prints(&cluster, &["apply", "-f", "-"], &rollout(&old.url(), &new.url(), MANUAL));
    prints(&cluster, &["abort", "svc"], "");
    let nobody = run(&cluster, &["service", "set-servers", "svc", &new.url(), "http://127.0.0.1:1"], "");
    let said = String::from_utf8_lossy(&nobody.stdout).to_string();
    assert!(nobody.status.code() == Some(1) && said.contains("http://127.0.0.1:1: "), "{nobody:?}");
    // Both demo servers answer as their own version does.
    let served_by = |node: usize| {
        let answer = http(cluster.nodes[node].data, "POST", "/predict", &[], "{}").ok()?;
        Some(answer.json()["model"].as_str()?.to_string())
    };
    assert_eq!(served_by(0).as_deref(), Some("old"), "nothing was changed");
    let moved = prints(&cluster, &["service", "set-servers", "svc", &new.url()], "");
    assert!(moved.starts_with("COMMITTED  slot "), "{moved}");
    for node in 0..3 {
        wait("the new server's answer", Duration::from_secs(5), || served_by(node).filter(|found| found == "new"));
    }
    let again = prints(&cluster, &["service", "set-servers", "svc", &new.url()], "");
    assert!(again.starts_with("UNCHANGED"), "{again}");
    let history = prints(&cluster, &["history", "svc"], "");
    assert!(history.contains("SetServers") && history.contains(&new.url()), "{history}");
    cluster.assert_no_panic();
}
