//! A node that is restarted behind a load balancer, and a second process that wants its ports.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::harness::{Cluster, MANUAL, Upstream, aviary, http, rollout};

#[test]
fn restarts_behind_a_load_balancer_fail_no_request() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start_with("[data]\ndrain_ms = 700\n");
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    let ports: Vec<u16> = cluster.nodes.iter().map(|node| node.data).collect();
    // The load balancer asks each node ten times a second, and takes it out at the first refusal.
    let ready: Arc<Vec<AtomicBool>> = Arc::new(ports.iter().map(|_| AtomicBool::new(true)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for (i, port) in ports.iter().copied().enumerate() {
        let (ready, done) = (ready.clone(), done.clone());
        threads.push(std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let answer = http(port, "GET", "/readyz", &[], "");
                ready[i].store(answer.is_ok_and(|answer| answer.status == 200), Ordering::Relaxed);
                // The interval of the check.
                std::thread::sleep(Duration::from_millis(100));
            }
            0
        }));
    }
    for client in 0..3 {
        let (ready, done, ports) = (ready.clone(), done.clone(), ports.clone());
        threads.push(std::thread::spawn(move || {
            let (mut sent, mut next) = (0, client);
            while !done.load(Ordering::Relaxed) {
                next = (next + 1) % ports.len();
                if !ready[next].load(Ordering::Relaxed) {
                    continue;
                }
                let answer = http(ports[next], "POST", "/predict", &[], "{}");
                let answer = answer.unwrap_or_else(|error| panic!("node {next} after {sent}: {error}"));
                assert_eq!(answer.status, 200, "node {next} after {sent}: {answer:?}");
                sent += 1;
            }
            sent
        }));
    }
    for i in 0..3 {
        let mut process = cluster.nodes[i].process.take().unwrap();
        let pid = process.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(process.ended_within(Duration::from_secs(15)), "node {i} doesn't end");
        cluster.spawn(i, None);
        cluster.wait_ready(i);
    }
    done.store(true, Ordering::Relaxed);
    let sent: Vec<u32> = threads.into_iter().map(|thread| thread.join().expect("no request fails")).collect();
    assert!(sent[3..].iter().all(|sent| *sent > 50), "{sent:?}");
    cluster.assert_no_panic();
}

#[test]
fn a_nodes_port_is_not_shared() {
    let cluster = Cluster::start();
    let second = aviary().arg("node").arg("--config").arg(cluster.config(1)).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success(), "{said}");
    let expected = format!("data port 127.0.0.1:{} is taken: another process listens there", cluster.nodes[1].data);
    assert!(said.contains(&expected), "{said}");
    // The first one is none the worse for it.
    assert_eq!(http(cluster.nodes[1].data, "GET", "/readyz?quorum", &[], "").unwrap().status, 200);
}
