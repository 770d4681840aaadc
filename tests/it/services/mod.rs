//! With a real Kafka and a real Redis. Each test here names what it needs, and is ignored without: scripts/services.sh.
#![expect(clippy::disallowed_methods, reason = "these tests wait for real processes, on the real clock")]

pub mod kafka;
mod keepers;
mod prometheus;
pub mod redis;
mod router;
mod sink;
mod wire;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use aviary::schema::v1::decision_service_client::DecisionServiceClient;
use aviary::schema::v1::watch_decisions_response::Event;
use aviary::schema::v1::{Decision, DecisionKind, WatchDecisionsRequest};
use tokio_stream::StreamExt as _;

use crate::cluster::harness::{Cluster, free_port, wait};

/// Returns a name that no other run has used.
fn unique(name: &str) -> String {
    format!("{name}-{:x}", rand::random::<u64>())
}

/// Returns a variable that names a service.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: eval \"$(scripts/services.sh env)\""))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Returns the decisions that a node tells, from the first to the one with this sequence.
pub fn streamed(cluster: &Cluster, node: usize, last: u64) -> Vec<Decision> {
    runtime().block_on(async {
        let address = format!("http://127.0.0.1:{}", cluster.nodes[node].api);
        let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
        let mut client = DecisionServiceClient::new(channel);
        let request = WatchDecisionsRequest { service: String::new(), after_sequence: Some(0) };
        let mut stream = client.watch_decisions(request).await.unwrap().into_inner();
        let mut found: Vec<Decision> = Vec::new();
        while found.last().is_none_or(|decision| decision.sequence < last) {
            let next = tokio::time::timeout(Duration::from_secs(10), stream.next()).await;
            if let Event::Decision(decision) = next.unwrap().unwrap().unwrap().event.unwrap() {
                found.push(decision);
            }
        }
        found
    })
}

/// A client that follows the decisions, and resumes at any node with the last sequence it has, as often as it is cut off.
pub struct Following {
    last: Arc<AtomicU64>,
    thread: Option<JoinHandle<Followed>>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.last.store(0, Ordering::Relaxed);
    }
}

/// What such a client was told.
pub struct Followed {
    pub decisions: Vec<Decision>,
    /// How often it was cut off or refused, and went to another node.
    pub resumed: u64,
}

impl Following {
    pub fn start(cluster: &Cluster) -> Self {
        let ports: Vec<_> = cluster.nodes.iter().map(|node| node.api).collect();
        let last = Arc::new(AtomicU64::new(u64::MAX));
        let until = last.clone();
        Self { last, thread: Some(std::thread::spawn(move || runtime().block_on(follow(&ports, &until)))) }
    }

    /// Returns what it was told up to this sequence, or within half a minute.
    pub fn up_to(mut self, last: u64) -> Followed {
        self.last.store(last, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        // Looks ten times a second.
        (0..300).take_while(|_| !thread.is_finished()).for_each(|_| std::thread::sleep(Duration::from_millis(100)));
        drop(self);
        thread.join().unwrap()
    }
}

async fn follow(ports: &[u16], last: &AtomicU64) -> Followed {
    let mut followed = Followed { decisions: Vec::new(), resumed: 0 };
    for port in ports.iter().cycle() {
        let told = followed.decisions.last().map_or(0, |decision| decision.sequence);
        if told >= last.load(Ordering::Relaxed) {
            break;
        }
        let request = WatchDecisionsRequest { service: String::new(), after_sequence: Some(told) };
        // A node that was killed is silent: its heartbeats are five seconds apart.
        if let Err(status) = listen(*port, request, last, &mut followed.decisions).await {
            followed.resumed += 1;
            assert!(status.code() != tonic::Code::OutOfRange, "{status}");
            // Pause between two tries.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    followed
}

async fn listen(
    port: u16,
    request: WatchDecisionsRequest,
    last: &AtomicU64,
    found: &mut Vec<Decision>,
) -> Result<(), tonic::Status> {
    let address = format!("http://127.0.0.1:{port}");
    let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap().connect_timeout(Duration::from_secs(1));
    let unavailable = |why: tonic::transport::Error| tonic::Status::unavailable(why.to_string());
    let mut client = DecisionServiceClient::new(endpoint.connect().await.map_err(unavailable)?);
    let silent = |_| tonic::Status::deadline_exceeded("it is silent");
    let asked = tokio::time::timeout(Duration::from_secs(6), client.watch_decisions(request)).await;
    let mut stream = asked.map_err(silent)??.into_inner();
    while found.last().map_or(0, |decision| decision.sequence) < last.load(Ordering::Relaxed) {
        let next = tokio::time::timeout(Duration::from_secs(6), stream.next()).await;
        match next.map_err(silent)? {
            Some(told) => {
                if let Some(Event::Decision(decision)) = told?.event {
                    found.push(decision);
                }
            }
            None => return Err(tonic::Status::unavailable("the stream ended")),
        }
    }
    Ok(())
}

pub fn kinds(decisions: &[Decision]) -> Vec<DecisionKind> {
    decisions.iter().map(Decision::kind).filter(|kind| *kind != DecisionKind::Verdict).collect()
}

/// A service of this test's own, that it may kill.
pub struct Own {
    name: &'static str,
    pub port: u16,
    dir: tempfile::TempDir,
    /// What a Prometheus scrapes.
    targets: String,
    /// More lines of a broker's settings.
    properties: String,
}

impl Own {
    /// Returns a service that is not running yet.
    fn new(name: &'static str) -> Self {
        Self {
            name,
            port: free_port(),
            dir: tempfile::tempdir().unwrap(),
            targets: String::new(),
            properties: String::new(),
        }
    }

    pub fn start(name: &'static str) -> Self {
        let own = Self::new(name);
        own.up();
        own
    }

    /// Returns a service that runs, with more lines in its settings.
    pub fn with(name: &'static str, properties: &str) -> Self {
        let mut own = Self::new(name);
        own.properties = properties.into();
        own.up();
        own
    }

    fn script(&self, verb: &str) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(root.join("scripts/services.sh"));
        command.arg(verb).arg(self.name).env("AVIARY_SERVICES_DIR", self.dir.path()).env("AVIARY_NO_DOCKER", "1");
        command.env_remove("KAFKA_BOOTSTRAP").env_remove("REDIS_URL");
        let port = self.port.to_string();
        command.env("KAFKA_PORT", &port).env("REDIS_PORT", &port).env("PROMETHEUS_PORT", &port);
        command.env("KAFKA_PROPERTIES", &self.properties);
        let output = command.env("PROMETHEUS_TARGETS", &self.targets).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn up(&self) {
        self.script("up");
    }

    /// Ends it like a power cut.
    pub fn kill(&self) {
        let pid = std::fs::read_to_string(self.dir.path().join(format!("{}.pid", self.name))).unwrap();
        assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.script("down");
    }
}

/// Starts a rollout, once the nodes know whether they may: where there is a Redis, they hold until they have asked it.
pub fn apply_when_ready(cluster: &Cluster, yaml: &str) {
    wait("a cluster that takes rollouts", Duration::from_secs(10), || {
        (cluster.post(0, "/v1/rollouts", None, yaml).status == 200).then_some(())
    });
}
