//! What a pipeline is told that waits for a rollout: each exit code is the truth.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::harness::{Cluster, MANUAL, aviary, free_port, http, rollout, wait};

/// A way to a node's API that can be cut: open connections end, and no new one is taken until it is mended.
pub struct Way {
    pub port: u16,
    state: Arc<Mutex<WayState>>,
}

#[derive(Default)]
struct WayState {
    is_cut: bool,
    open: Vec<TcpStream>,
}

impl Way {
    /// Returns a way to a port of this machine.
    pub fn to(target: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let state = Arc::new(Mutex::new(WayState::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                let mut state = shared.lock().unwrap();
                // Dropped at once where the way is cut.
                let Some(callee) = (!state.is_cut).then(|| TcpStream::connect(("127.0.0.1", target)).ok()).flatten()
                else {
                    continue;
                };
                for (from, into) in [(&caller, &callee), (&callee, &caller)] {
                    let (mut from, mut into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let mut bytes = [0; 4096];
                        while let Ok(n @ 1..) = from.read(&mut bytes) {
                            if into.write_all(&bytes[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                state.open.extend([caller, callee]);
            }
        });
        Self { port, state }
    }

    pub fn cut(&self) {
        let mut state = self.state.lock().unwrap();
        state.is_cut = true;
        for stream in state.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn mend(&self) {
        self.state.lock().unwrap().is_cut = false;
    }
}

/// Runs a verb in the background, over these API ports, with this text on its standard input.
pub fn spawn(ports: &[u16], arguments: &[&str], input: &str) -> Child {
    let api: Vec<_> = ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
    let mut command = aviary();
    command.args(arguments).args(["--api", &api.join(",")]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child
}

fn run(cluster: &Cluster, arguments: &[&str], input: &str) -> Output {
    spawn(&cluster.nodes.iter().map(|node| node.api).collect::<Vec<_>>(), arguments, input).wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A rollout of `svc` from v1 to `canary` that nobody's requests judge.
fn unseen(canary: &str, steps: &str) -> String {
    rollout("http://127.0.0.1:1", "http://127.0.0.1:2", steps).replace("version: v2", &format!("version: {canary}"))
}

#[test]
fn a_wait_ends_where_a_person_is_waited_for() {
    let cluster = Cluster::start();
    let file = unseen("v2", MANUAL);
    let waited = run(&cluster, &["apply", "-f", "-", "--wait"], &file);
    assert_eq!(waited.status.code(), Some(3), "{}", said(&waited));
    assert!(said(&waited).contains("the rollout waits for a person: an operator: promote or abort"), "{waited:?}");
    assert!(String::from_utf8_lossy(&waited.stdout).contains("waits for an operator"), "{waited:?}");
    for (arguments, code) in [
        (&["status", "svc"][..], 3),
        (&["status", "svc", "--success-on-pause"], 0),
        (&["status", "svc", "-o", "json"], 3),
        (&["apply", "-f", "-", "--wait", "--success-on-pause"], 0),
    ] {
        let output = run(&cluster, arguments, &file);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
    }
    // Held by a person where the file doesn't ask for one.
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    let file = unseen("v2", "    - setWeight: 20\n    - pause: { duration: 1h }");
    let waiter = spawn(&[cluster.nodes[1].api], &["apply", "-f", "-", "--wait"], &file);
    cluster.until(1, "the rollout", Duration::from_secs(10), |state| state["phase"] == "Progressing");
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/pause", None, "{}").status, 200);
    let waited = waiter.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(3), "{}", said(&waited));
    assert!(said(&waited).contains("waits for the pause to end, 36"), "{waited:?}");
}

#[test]
fn a_waiter_that_was_cut_off_never_ends_by_another_rollout() {
    let cluster = Cluster::start();
    let way = Way::to(cluster.nodes[1].api);
    let long = "    - setWeight: 20\n    - pause: { duration: 1h }";
    let apply = |canary: &str| {
        let waiter = spawn(&[way.port], &["apply", "-f", "-", "--wait"], &unseen(canary, long));
        cluster.until(1, "the rollout", Duration::from_secs(10), |state| state["canary_model_id"] == canary);
        // Long enough to be told of it.
        std::thread::sleep(Duration::from_millis(500));
        way.cut();
        waiter
    };
    let abort = || assert_eq!(cluster.post(0, "/v1/rollouts/svc/abort", None, "{}").status, 200);

    // Its own end is told first, from the log.
    let waiter = apply("v2");
    abort();
    cluster.apply(0, &unseen("v3", long));
    way.mend();
    let waited = waiter.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(1), "{}", said(&waited));
    abort();

    // It completes while nobody listens, and the next one is rolled back.
    let waiter = apply("v4");
    for _ in 0..2 {
        let full = cluster.post(0, "/v1/rollouts/svc/promote", None, r#"{"full": true}"#);
        assert_eq!(full.status, 200, "{full:?}");
    }
    cluster.agreed(&[0, 1, 2], Duration::from_secs(5));
    let back = unseen("v5", long)
        .replace("version: v1, url: \"http://127.0.0.1:1\"", "version: v4, url: \"http://127.0.0.1:2\"");
    cluster.apply(0, &back);
    abort();
    way.mend();
    let waited = waiter.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(0), "{}", said(&waited));

    // `status` began before the next rollout, without an answer to go by.
    cluster.apply(0, &back);
    let waiter = spawn(&[way.port], &["status", "svc"], "");
    std::thread::sleep(Duration::from_secs(1));
    way.cut();
    abort();
    way.mend();
    let waited = waiter.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(1), "{}", said(&waited));
}

#[test]
fn a_refused_promotion_leaves_the_rollouts_status_as_it_was() {
    let cluster = Cluster::start();
    cluster.apply(0, &unseen("v2", MANUAL));
    let refused = cluster.promote(0, None);
    assert_eq!(refused.status, 409, "{refused:?}");
    let list = http(cluster.nodes[2].api, "GET", "/v1/rollouts", &[], "").unwrap().json();
    let one = http(cluster.nodes[1].api, "GET", "/v1/rollouts/svc", &[], "").unwrap().json();
    for found in [&list["rollouts"][0], &one, &cluster.state(0).unwrap()] {
        assert_eq!((&found["status"], &found["phase"]), (&"COMMITTED".into(), &"Progressing".into()), "{found}");
        assert_eq!((&found["waits_for_operator"], &found["rollout_generation"]), (&true.into(), &1.into()), "{found}");
    }
    let field = run(&cluster, &["get", "svc", "--field", "/weights/v2"], "");
    assert_eq!(String::from_utf8_lossy(&field.stdout), "0.2\n");
    wait("the refusal in the history", Duration::from_secs(5), || {
        cluster.history(0).iter().any(|entry| entry["status"] == "ABORTED").then_some(())
    });
}
