//! Who is who: certificates between the nodes, tokens at the API, and no secret where people look.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::harness::{Cluster, MANUAL, Upstream, aviary, http, rollout, wait};

fn console(cluster: &Cluster, name: &str) -> String {
    fs::read_to_string(cluster.dir.path().join(format!("{name}.console"))).unwrap_or_default()
}

fn issue(cluster: &Cluster, i: usize) {
    let ca = cluster.dir.path().join("ca");
    let mut command = aviary();
    command.args(["cluster", "issue"]).arg("--ca").arg(ca).arg("--config").arg(cluster.config(i));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_certificate_made_again_is_taken_up_while_the_cluster_runs() {
    let mut cluster = Cluster::start();
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    issue(&cluster, 0);
    // Longer than the two seconds between two looks at the certificates.
    std::thread::sleep(Duration::from_millis(2_100));
    // A connection that begins now uses it, on both sides of it.
    cluster.kill(2);
    issue(&cluster, 2);
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    wait("the new certificate in use", Duration::from_secs(5), || {
        console(&cluster, "a").contains("certificate taken up").then_some(())
    });
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
    cluster.assert_no_panic();
}

#[test]
fn a_valid_certificate_in_another_nodes_place_gets_nowhere() {
    let mut cluster = Cluster::found();
    // b's files are c's: the authority's own, for another node.
    for file in ["node.pem", "node.key"] {
        fs::copy(cluster.data_dir(2).join("tls").join(file), cluster.data_dir(1).join("tls").join(file)).unwrap();
    }
    cluster.spawn(1, None);
    let ended = cluster.nodes[1].process.as_mut().unwrap().ended_within(Duration::from_secs(5));
    assert!(ended, "{}", console(&cluster, "b"));
    assert!(console(&cluster, "b").contains("node.pem: names node c, expected b"), "{}", console(&cluster, "b"));

    // A key that others may read is refused.
    let key = cluster.data_dir(0).join("tls/node.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    cluster.spawn(0, None);
    assert!(cluster.nodes[0].process.as_mut().unwrap().ended_within(Duration::from_secs(5)));
    assert!(console(&cluster, "a").contains("has mode 0644, expected 0600"), "{}", console(&cluster, "a"));
}

/// Passes connections on to a port, and keeps what the callers send.
fn tap(to: u16) -> (u16, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let calls: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let kept = calls.clone();
    std::thread::spawn(move || {
        for (call, caller) in listener.incoming().map_while(Result::ok).enumerate() {
            kept.lock().unwrap().push(Vec::new());
            let Ok(callee) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let (mut from, mut into) = (caller.try_clone().unwrap(), callee.try_clone().unwrap());
            let kept = kept.clone();
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(n @ 1..) = from.read(&mut bytes) {
                    kept.lock().unwrap()[call].extend(&bytes[..n]);
                    if into.write_all(&bytes[..n]).is_err() {
                        break;
                    }
                }
                let _ = into.shutdown(Shutdown::Both);
            });
            let (mut from, mut into) = (callee, caller);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut into);
                let _ = into.shutdown(Shutdown::Both);
            });
        }
    });
    (port, calls)
}

#[test]
fn what_a_node_once_said_can_be_said_again_by_a_stranger_without_effect() {
    replay("");
}

#[test]
fn replayed_frames_change_nothing_without_tls_either() {
    replay("\n[control]\nplaintext = true\n");
}

fn replay(more: &str) {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::found_with(more);
    let b = cluster.nodes[1].control;
    let (port, calls) = tap(b);
    let text = fs::read_to_string(cluster.config(0)).unwrap();
    let old = format!("control = \"127.0.0.1:{b}\"");
    assert!(text.contains(&old));
    fs::write(cluster.config(0), text.replace(&old, &format!("control = \"127.0.0.1:{port}\""))).unwrap();
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    // An increase, its rollback, and an increase again: what went before must not come back.
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/retry", None, "{}").status, 200);
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    let before = cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
    let said = calls.lock().unwrap().concat();
    assert!(said.len() > 2_000, "{} bytes recorded", said.len());
    for part in [&said[..], &said[..said.len() / 2]] {
        for _ in 0..20 {
            let mut stream = TcpStream::connect(("127.0.0.1", b)).unwrap();
            let _ = stream.write_all(part);
            let _ = stream.read(&mut [0; 64]);
        }
    }
    // What was said again had its effect by then, if it had one.
    std::thread::sleep(Duration::from_millis(500));
    let after = cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
    assert_eq!(
        (&after["slot"], &after["hash"], &after["weights"]),
        (&before["slot"], &before["hash"], &before["weights"])
    );
    let answer = wait("the next commit", Duration::from_secs(3), || {
        Some(cluster.post(1, "/v1/rollouts/svc/retry", Some("next"), "{}")).filter(|answer| answer.status == 200)
    });
    assert_eq!(answer.json()["status"], "COMMITTED", "{answer:?}");
    cluster.assert_no_panic();
}

#[test]
fn tokens_say_who_did_what_and_no_secret_is_told() {
    let output = aviary().args(["token", "--role", "operator", "--name", "alice"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let word = |label: &str| text.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_string();
    let (token, line) = (word("token:"), word("line:"));

    let mut cluster = Cluster::found();
    let tokens = cluster.dir.path().join("tokens");
    fs::write(&tokens, format!("{line}\n")).unwrap();
    for i in 0..3 {
        let config = fs::read_to_string(cluster.config(i)).unwrap();
        fs::write(cluster.config(i), format!("{config}\n[api]\ntokens_file = {tokens:?}\n")).unwrap();
        cluster.spawn(i, None);
    }
    (0..3).for_each(|i| cluster.wait_ready(i));
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let bearer = format!("Bearer {token}");
    let ask = |i: usize, path: &str, authorization: &str, body: &str| {
        let headers = [("authorization", authorization), ("content-type", "application/yaml")];
        http(cluster.nodes[i].api, "POST", path, &headers, body).unwrap()
    };
    let yaml = rollout(&v1.url(), &v2.url(), MANUAL);
    assert_eq!(ask(0, "/v1/rollouts", "Bearer avy_wrong", &yaml).status, 401);
    assert_eq!(ask(0, "/v1/rollouts", &bearer, &yaml).status, 200);
    // Through a node that forwards it.
    assert_eq!(ask(2, "/v1/rollouts/svc/abort", &bearer, "{\"reason\": \"looks wrong\"}").status, 200);
    assert_eq!(ask(1, "/v1/cluster/cordon", &bearer, "{\"node\": \"c\"}").status, 403);

    let log = fs::read_to_string(cluster.log(0)).unwrap();
    let asked: Vec<_> = log.lines().filter(|line| line.contains("write asked for")).collect();
    assert_eq!(asked.len(), 2, "{log}");
    assert!(asked.iter().all(|line| line.contains("\"actor\":\"alice\"")), "{asked:?}");
    let decided = |line: &&str| line.contains("routing committed") && line.contains("looks wrong");
    let decided = log.lines().find(decided).unwrap_or_else(|| panic!("{log}"));
    assert!(decided.contains("\"actor\":\"alice\""), "{decided}");

    // Nothing that people look at tells a secret.
    let secret = token.strip_prefix("avy_").unwrap();
    let keys: Vec<_> = (0..3)
        .map(|i| fs::read_to_string(cluster.data_dir(i).join("tls/node.key")).unwrap())
        .map(|pem| pem.lines().nth(1).unwrap().to_string())
        .collect();
    let check = aviary().args(["config", "check"]).args((0..3).map(|i| cluster.config(i))).output().unwrap();
    let mut looked_at = vec![String::from_utf8(check.stdout).unwrap(), String::from_utf8(check.stderr).unwrap()];
    for (i, name) in ["a", "b", "c"].iter().enumerate() {
        looked_at.extend([console(&cluster, name), fs::read_to_string(cluster.log(i)).unwrap()]);
        let pid = cluster.nodes[i].process.as_ref().unwrap().0.id();
        looked_at.push(String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap()).into());
    }
    for text in looked_at {
        assert!(!text.contains(secret), "the token shows in {text}");
        assert!(keys.iter().all(|key| !text.contains(key.as_str())), "a key shows in {text}");
    }
}

#[test]
fn a_hangup_signal_reads_tokens_certificates_and_the_log_file_anew_and_ends_no_node() {
    let line = |token: &str| format!("admin alice {}\n", blake3::hash(token.as_bytes()));
    let mut cluster = Cluster::found();
    let tokens = cluster.dir.path().join("tokens");
    fs::write(&tokens, line("leaked")).unwrap();
    for i in 0..3 {
        let config = fs::read_to_string(cluster.config(i)).unwrap();
        fs::write(cluster.config(i), format!("{config}\n[api]\ntokens_file = {tokens:?}\n")).unwrap();
        cluster.spawn(i, None);
    }
    (0..3).for_each(|i| cluster.wait_ready(i));
    let ask = |i: usize, authorization: &str| {
        http(cluster.nodes[i].api, "GET", "/v1/cluster", &[("authorization", authorization)], "").unwrap().status
    };
    assert_eq!([ask(0, "Bearer leaked"), ask(0, "bearer leaked"), ask(0, "Basic leaked")], [200, 200, 401]);

    // As logrotate does it: a rename, then the signal.
    let renamed = cluster.dir.path().join("a.log.1");
    fs::rename(cluster.log(0), &renamed).unwrap();
    fs::write(&tokens, line("fresh")).unwrap();
    issue(&cluster, 0);
    let pids: Vec<_> = cluster.nodes.iter().map(|node| node.process.as_ref().unwrap().0.id().to_string()).collect();
    assert!(std::process::Command::new("kill").arg("-HUP").args(&pids).status().unwrap().success());
    wait("the tokens taken up", Duration::from_secs(5), || {
        (0..3).all(|i| ask(i, "Bearer leaked") == 401 && ask(i, "BEARER fresh") == 200).then_some(())
    });
    wait("the log file reopened", Duration::from_secs(5), || {
        fs::read_to_string(cluster.log(0)).ok().filter(|log| log.contains("read again at SIGHUP"))
    });
    assert!(!fs::read_to_string(&renamed).unwrap().contains("read again at SIGHUP"));
    assert!(console(&cluster, "a").contains("certificate taken up"), "{}", console(&cluster, "a"));
    for i in 0..3 {
        assert!(!cluster.nodes[i].process.as_mut().unwrap().ended_within(Duration::from_millis(100)), "node {i} ended");
    }
    // Without a signal, too: within the two seconds between two looks.
    fs::write(&tokens, "").unwrap();
    wait("the last token revoked", Duration::from_secs(5), || {
        http(cluster.nodes[1].api, "GET", "/v1/cluster", &[("authorization", "Bearer fresh")], "")
            .ok()
            .filter(|answer| answer.status == 401)
    });
    cluster.assert_no_panic();
}
