//! The data plane over real sockets, serving by a view built by hand: no consensus, no other process.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aviary::adapters::clock::BootClock;
use aviary::adapters::memory::MemoryStore;
use aviary::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary::domain::plan::{Backend, HashOn, HealthCheck, RolloutSpec, Stage};
use aviary::domain::rollout::{Change, Service, Stamp};
use aviary::domain::time::Wall;
use aviary::domain::weights::Weight;
use aviary::domain::window::Evidence;
use aviary::node::handle::{NodeHandle, NodeRequest, NodeRequests, Published};
use aviary::ports::Store;
use aviary::protocol::message::Membership;
use aviary::protocol::record::{Hash, Slot};
use aviary::protocol::{ServiceView, Serving, View};
use aviary::proxy;
use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Longest wait for what must happen.
pub(crate) const SOON: Duration = Duration::from_secs(10);
pub(crate) const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
pub(crate) const FAILED: &str = "HTTP/1.1 500 Failed\r\ncontent-length: 2\r\n\r\nno";

/// A proxy, its node's handle, and what it told the node.
pub(crate) struct World {
    pub(crate) address: SocketAddr,
    pub(crate) node: NodeHandle,
    told: NodeRequests,
    _stop: DropGuard,
}

fn version(name: &str) -> VersionId {
    VersionId::new(name).unwrap()
}

pub(crate) fn view(stable: Option<SocketAddr>, canary: Option<SocketAddr>, bp: u16) -> View {
    view_of(stable, canary, bp, |_| {})
}

/// Returns a view whose rollout was made otherwise than usual. A role without a server has the other one's.
pub(crate) fn view_of(
    stable: Option<SocketAddr>,
    canary: Option<SocketAddr>,
    bp: u16,
    change: impl FnOnce(&mut RolloutSpec),
) -> View {
    let id = ServiceId::new("fraud").unwrap();
    let backend = |name, at: Option<SocketAddr>| {
        Backend::new(version(name), at.iter().map(|address| format!("http://{address}")).collect())
    };
    let stage = |weight| Stage { weight, hold_ms: 0, manual: true };
    let stages = vec![stage(Weight::from_bp(bp).unwrap()), stage(Weight::FULL)];
    let mut spec = RolloutSpec {
        hash_on: Some(HashOn::Header("x-user".into())),
        ..RolloutSpec::new(id.clone(), backend("v1", stable.or(canary)), backend("v2", canary.or(stable)), stages)
    };
    change(&mut spec);
    let spec = Arc::new(spec.checked().unwrap());
    let stamp = Stamp { tx: TxId::new("tx-1").unwrap(), at: Wall(0) };
    let service = Service::after(None, &id, &Change::Start(spec.clone()), &stamp).unwrap();
    let serving = Serving {
        routing_version: service.routing.version,
        stable: spec.stable.clone(),
        canary: Some((spec.canary.clone(), bp)),
        lease_ms: Some(2_000),
        spec,
        held_back: None,
    };
    let service = ServiceView {
        service,
        slot: Slot(1),
        hash: Hash::default(),
        serving,
        local: Evidence::default(),
        cluster: Evidence::default(),
        verdict: None,
        sequential: None,
        waiting_for: String::new(),
        enforced: true,
    };
    let node = NodeId::new("a").unwrap();
    View {
        node: node.clone(),
        cluster: ClusterId([0; 16]),
        incarnation: Incarnation(1),
        membership: Membership::Voter,
        head: Slot(1),
        head_hash: Hash::default(),
        coordinator: node,
        members: BTreeMap::new(),
        outsiders: Default::default(),
        open: None,
        default_service: Some(id.clone()),
        uses: Vec::new(),
        services: Arc::new(BTreeMap::from([(id, Arc::new(service))])),
    }
}

pub(crate) fn settings() -> ProxySettings {
    ProxySettings {
        connect_timeout_ms: 500,
        first_byte_timeout_ms: 600,
        idle_timeout_ms: 600,
        header_timeout_ms: 300,
        connections_max: 64,
        requests_max: 64,
        ..ProxySettings::default()
    }
}

/// Starts a proxy that holds a lease, which nothing renews, for the whole of a short test.
pub(crate) async fn world(view: View) -> World {
    world_with(view, settings()).await
}

pub(crate) async fn world_with(view: View, settings: ProxySettings) -> World {
    let published = Published::new(Arc::new(view), Arc::new(BootClock));
    let (node, told, _) = NodeHandle::new(published, MemoryStore::default().reader());
    hold_lease(&node);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(proxy::serve(vec![listener.into_std().unwrap()], node.clone(), settings, stop.clone()));
    World { address, node, told, _stop: stop.drop_guard() }
}

pub(crate) fn hold_lease(node: &NodeHandle) {
    let now = node.published.clock().now().mono;
    node.published.set_lease(Some(now));
}

impl World {
    /// Sends a GET with these extra header lines, and returns the whole answer.
    pub(crate) async fn get(&self, path: &str, headers: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")).await
    }

    pub(crate) async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an answer in time").unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Returns what the node was told until `wait` passed: (canary's answers, its errors, circuit breaker trips).
    pub(crate) async fn told_within(&mut self, wait: Duration) -> (u64, u64, usize) {
        let (mut count, mut errors, mut trips) = (0, 0, 0);
        let _ = timeout(wait, async {
            while let Some(request) = self.told.recv().await {
                match request {
                    NodeRequest::Observed(all) => {
                        count += all.iter().map(|o| o.evidence.canary.count).sum::<u64>();
                        errors += all.iter().map(|o| o.evidence.canary.errors).sum::<u64>();
                    }
                    NodeRequest::CircuitBreakerTripped { .. } => trips += 1,
                    _ => {}
                }
            }
        })
        .await;
        (count, errors, trips)
    }
}

/// Starts an upstream that handles each connection by `handle`.
pub(crate) async fn upstream<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(handle(stream));
        }
    });
    address
}

/// Reads a request's head, whatever its length; what follows stays unread or is lost.
pub(crate) async fn head(stream: &mut TcpStream) -> String {
    let mut found = Vec::new();
    let mut byte = [0];
    while !found.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
            break;
        }
        found.push(byte[0]);
    }
    String::from_utf8_lossy(&found).into_owned()
}

/// Starts an upstream that gives this answer to each request without a body.
pub(crate) async fn answering(answer: &'static str) -> SocketAddr {
    upstream(move |mut stream| async move {
        while !head(&mut stream).await.is_empty() {
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// Returns an address that nothing listens on.
pub(crate) async fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

pub(crate) fn served_by(answer: &str) -> &str {
    let line = answer.lines().find_map(|line| line.strip_prefix("x-served-by: "));
    line.unwrap_or_else(|| panic!("no x-served-by in {answer}"))
}

#[tokio::test]
async fn ten_thousand_draws_split_by_the_weight() {
    let world = world(view(None, None, 2_000)).await;
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut canary = 0;
    for _ in 0..10_000 {
        hold_lease(&world.node);
        let request = http::Request::get("/predict").header("host", "x").body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        canary += usize::from(answer.headers()["x-served-by"] == "v2");
        answer.into_body().collect().await.unwrap();
    }
    // One point is 2.5 standard deviations of this draw; 1.6 points are four, one run in 16 000.
    assert!((1_840..=2_160).contains(&canary), "{canary} of 10000, expected about 2000");
}

#[tokio::test]
async fn a_user_who_has_the_canary_keeps_it_when_the_weight_rises() {
    let world = world(view(None, None, 1_000)).await;
    let mut before = Vec::new();
    for share in [1_000, 5_000, 9_000] {
        world.node.published.publish(Arc::new(view(None, None, share)));
        let mut found = Vec::new();
        for user in 0..100 {
            hold_lease(&world.node);
            let answer = world.get("/predict", &format!("x-user: u{user}\r\n")).await;
            found.push(served_by(&answer) == "v2");
        }
        assert!(before.iter().zip(&found).all(|(was, is)| !was || *is), "someone was sent back at {share} bp");
        assert!(found.iter().filter(|is| **is).count() > before.iter().filter(|is| **is).count());
        before = found;
    }
}

#[tokio::test]
async fn without_a_lease_everything_is_stable_at_once() {
    let world = world(view(None, None, 10_000)).await;
    assert_eq!(served_by(&world.get("/predict", "").await), "v2");
    world.node.published.set_lease(None);
    assert_eq!(served_by(&world.get("/predict", "").await), "v1");
    assert_eq!(served_by(&world.get("/predict", "x-canary: always\r\n").await), "v1");
}

#[tokio::test]
async fn five_failures_trip_the_circuit_breaker_for_good() {
    let mut world = world(view(Some(answering(OK).await), Some(answering(FAILED).await), 10_000)).await;
    for _ in 0..5 {
        assert_eq!(served_by(&world.get("/predict", "").await), "v2");
    }
    for _ in 0..20 {
        hold_lease(&world.node);
        assert_eq!(served_by(&world.get("/predict", "x-canary: always\r\n").await), "v1");
    }
    // The same serving, published afresh with new evidence, as every 250 ms.
    let again = (*world.node.published.view()).clone();
    world.node.published.publish(Arc::new(again));
    assert_eq!(served_by(&world.get("/predict", "").await), "v1");
    assert_eq!(world.told_within(Duration::from_millis(400)).await, (5, 5, 1));
}

#[tokio::test]
async fn a_dead_canary_costs_users_nothing() {
    let mut world = world(view(Some(answering(OK).await), Some(nowhere().await), 10_000)).await;
    for _ in 0..10 {
        let answer = world.get("/predict", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(served_by(&answer), "v1");
    }
    assert_eq!(world.told_within(Duration::from_millis(400)).await, (5, 5, 1));
}

#[tokio::test]
async fn a_dead_stable_is_never_replaced_by_the_canary() {
    let world = world(view(Some(nowhere().await), Some(answering(OK).await), 0)).await;
    let answer = world.get("/predict", "").await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert_eq!(served_by(&answer), "v1");
}

#[tokio::test]
async fn headers_of_one_connection_do_not_pass() {
    let echo = upstream(|mut stream| async move {
        let head = head(&mut stream).await.to_lowercase();
        let answer = format!(
            "HTTP/1.1 200 OK\r\nconnection: close, x-inner\r\nx-inner: 1\r\nx-kept: 1\r\ncontent-length: {}\r\n\r\n{head}",
            head.len()
        );
        let _ = stream.write_all(answer.as_bytes()).await;
    });
    let world = world(view(Some(echo.await), None, 0)).await;
    let request = "GET /predict HTTP/1.1\r\nhost: x\r\nconnection: close, x-mine\r\nx-mine: 1\r\nx-yours: 1\r\n\r\n";
    let answer = world.raw(request).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("x-kept: 1") && !head.contains("x-inner"), "{head}");
    assert!(body.contains("x-yours: 1") && !body.contains("x-mine"), "{body}");
    assert!(body.contains("x-forwarded-for: 127.0.0.1") && body.contains("via: 1.1"), "{body}");
}

#[tokio::test]
async fn fifty_megabytes_stream_through() {
    const LENGTH: usize = 50 << 20;
    let large = upstream(|mut stream| async move {
        head(&mut stream).await;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {LENGTH}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        let piece = vec![7; 1 << 20];
        for _ in 0..50 {
            stream.write_all(&piece).await.unwrap();
        }
    });
    let world = world(view(Some(large.await), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(b"GET /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(Duration::from_secs(60), stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let body = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(answer.len() - body, LENGTH);
    assert!(answer[body..].iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn an_upstream_that_dies_mid_body_is_an_error() {
    let dying = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart").await;
    });
    let mut world = world(view(None, Some(dying.await), 10_000)).await;
    let answer = world.get("/predict", "").await;
    assert!(answer.len() < answer.find("\r\n\r\n").unwrap() + 100, "cut short, not filled up: {answer}");
    assert_eq!(world.told_within(Duration::from_millis(300)).await, (1, 1, 0));
}

#[tokio::test]
async fn a_silent_upstream_is_a_504() {
    let silent = upstream(|mut stream| async move {
        head(&mut stream).await;
        std::future::pending::<()>().await;
    });
    let mut world = world(view(None, Some(silent.await), 10_000)).await;
    let answer = world.get("/predict", "").await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(served_by(&answer), "v2");
    assert_eq!(world.told_within(Duration::from_millis(300)).await, (1, 1, 0));
}

#[tokio::test]
async fn http2_without_tls_is_served() {
    let world = world(view(Some(answering(OK).await), None, 0)).await;
    let stream = TcpStream::connect(world.address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("http://x/predict").body(Empty::<Bytes>::new()).unwrap();
    let answer = timeout(SOON, sender.send_request(request)).await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), answer.version()), (200, http::Version::HTTP_2));
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn slow_headers_are_cut() {
    let world = world(view(None, None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(b"GET /predict HTTP/1.1\r\nhost: ").await.unwrap();
    let closed = timeout(Duration::from_secs(3), stream.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok(), "the connection is open long after header_timeout_ms");
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_cut() {
    let world = world(view(None, None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let closed = timeout(Duration::from_secs(3), stream.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok(), "the connection is open, and holds its place, long after header_timeout_ms");
}

/// Starts an upstream that reads whole bodies of `length` bytes before it answers.
async fn reading(length: usize) -> SocketAddr {
    upstream(move |mut stream| async move {
        head(&mut stream).await;
        if stream.read_exact(&mut vec![0; length]).await.is_ok() {
            let _ = stream.write_all(OK.as_bytes()).await;
        }
    })
    .await
}

#[tokio::test]
async fn uploads_that_clients_abort_are_no_errors_of_the_canary() {
    let mut world = world(view(Some(answering(OK).await), Some(reading(100).await), 10_000)).await;
    for _ in 0..6 {
        hold_lease(&world.node);
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        let part = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\npart";
        stream.write_all(part).await.unwrap();
        // Long enough for the part to be on its way to the canary.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, errors, trips) = world.told_within(Duration::from_millis(400)).await;
    assert_eq!((errors, trips), (0, 0), "(canary errors, circuit breaker trips)");
}

#[tokio::test]
async fn an_upload_that_is_slow_but_moving_is_no_error_of_the_canary() {
    let mut world = world(view(None, Some(reading(100).await), 10_000)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let part = b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n";
    stream.write_all(part).await.unwrap();
    for _ in 0..10 {
        // A slow upload: 1 s for 100 bytes, longer than the upstream's time-outs of 600 ms.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let _ = stream.write_all(&[b'x'; 10]).await;
    }
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(world.told_within(Duration::from_millis(300)).await.1, 0, "canary errors");
}

#[tokio::test]
async fn a_client_that_reads_slowly_is_no_error_of_the_upstream() {
    let large = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 20971520\r\n\r\n").await;
        let _ = stream.write_all(&vec![7; 20 << 20]).await;
    });
    let mut world = world(view(None, Some(large.await), 10_000)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(b"GET /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    // A client that doesn't read for longer than the upstream's time-outs of 600 ms.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.len() > 20 << 20, "{} bytes, expected 20 MiB", answer.len());
    assert_eq!(world.told_within(Duration::from_millis(300)).await.1, 0, "canary errors");
}

#[test]
fn the_data_plane_alone_splits_by_its_weight_and_says_what_is_wrong() {
    use crate::cluster::harness::{Http, Process, Upstream, aviary, free_port, wait};
    let (v1, v2) = (Upstream::start("one"), Upstream::start("two"));
    let listen = format!("127.0.0.1:{}", free_port());
    let address = listen.parse().unwrap();
    let arguments = |stable: &str, weight: &str| {
        let mut command = aviary();
        command.args(["proxy", "--listen", &listen, "--canary", &v2.url(), "--workers", "1"]);
        command.args(["--stable", stable, "--weight", weight]);
        command
    };
    for (stable, weight, expected) in [("x", "5", "expected http://host:port"), (&v1.url(), "105", "0 to 100")] {
        let output = arguments(stable, weight).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(64) && said.contains(expected), "{said}");
    }
    let null = std::process::Stdio::null;
    let _proxy = Process(arguments(&v1.url(), "20").stdout(null()).stderr(null()).spawn().unwrap());
    let mut http = wait("the proxy", std::time::Duration::from_secs(5), || Http::connect_to(address).ok());
    let mut canary = 0;
    for _ in 0..1_000 {
        let answer = http.send("POST", "/predict", &[], "{}").unwrap();
        let by = answer.header("x-served-by").unwrap();
        assert_eq!(answer.json()["model"], if by == "canary" { "two" } else { "one" });
        canary += usize::from(by == "canary");
    }
    // Five standard deviations around 200.
    assert!((137..=263).contains(&canary), "{canary} of 1000 went to the canary");
}

/// Sends a GET on a connection that stays open, and returns the answer, whose body has a length.
pub(crate) async fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = timeout(SOON, head(stream)).await.expect("a head in time");
    let length = answer.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await.unwrap();
    answer += std::str::from_utf8(&body).unwrap();
    answer
}

#[tokio::test]
async fn users_stick_by_cookie_or_address() {
    let by = |hash_on| view_of(None, None, 5_000, |spec| spec.hash_on = Some(hash_on));
    let with_cookie = world(by(HashOn::Cookie("sid".into()))).await;
    let mut versions = Vec::new();
    for user in 0..20 {
        hold_lease(&with_cookie.node);
        let cookie = format!("cookie: a=1; sid=u{user}\r\n");
        let first = with_cookie.get("/predict", &cookie).await;
        let again = with_cookie.get("/predict", &format!("cookie: sid=u{user}\r\n")).await;
        assert_eq!(served_by(&first), served_by(&again));
        versions.push(served_by(&first).to_string());
    }
    assert!(versions.iter().any(|v| v == "v1") && versions.iter().any(|v| v == "v2"), "{versions:?}");
    let by_address = world(by(HashOn::ClientAddress)).await;
    let first = served_by(&by_address.get("/predict", "").await).to_string();
    for _ in 0..20 {
        hold_lease(&by_address.node);
        assert_eq!(served_by(&by_address.get("/predict", "x-user: other\r\n").await), first);
    }
}

#[tokio::test]
async fn copies_go_to_the_canary_and_count_for_nothing() {
    let (sender, mut copies) = mpsc::unbounded_channel();
    let canary = upstream(move |mut stream| {
        let sender = sender.clone();
        async move {
            loop {
                let head = head(&mut stream).await;
                if head.is_empty() {
                    return;
                }
                let mut body = [0; 5];
                stream.read_exact(&mut body).await.unwrap();
                let _ = sender.send((head, body));
                stream.write_all(FAILED.as_bytes()).await.unwrap();
            }
        }
    });
    let stable = reading(5).await;
    let canary = canary.await;
    let mut world = world(view_of(Some(stable), Some(canary), 1, |spec| spec.mirror = Weight::FULL)).await;
    for _ in 0..20 {
        hold_lease(&world.node);
        let request = "POST /predict HTTP/1.1\r\nhost: x\r\nx-canary: never\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello";
        let answer = world.raw(request).await;
        assert!(answer.starts_with("HTTP/1.1 200") && served_by(&answer) == "v1", "{answer}");
    }
    for _ in 0..20 {
        let (head, body) = timeout(SOON, copies.recv()).await.unwrap().unwrap();
        assert!(head.contains("x-aviary-mirrored: true") && &body == b"hello", "{head}");
    }
    // Twenty failures of the canary, and neither gate nor circuit breaker heard of one.
    assert_eq!(world.told_within(Duration::from_millis(300)).await, (0, 0, 0));
}

#[tokio::test]
async fn a_server_that_fails_or_says_so_gets_no_requests() {
    async fn counting(answer: &'static str, well: bool) -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
        let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = seen.clone();
        let address = upstream(move |mut stream| {
            let count = count.clone();
            async move {
                loop {
                    let head = head(&mut stream).await;
                    if head.is_empty() {
                        return;
                    }
                    let probe = head.starts_with("GET /healthz");
                    count.fetch_add(usize::from(!probe), std::sync::atomic::Ordering::Relaxed);
                    let answer = if probe && !well { FAILED } else { answer };
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
        (address.await, seen)
    }
    let seen_of = |seen: &Arc<std::sync::atomic::AtomicUsize>| seen.load(std::sync::atomic::Ordering::Relaxed);
    let ((good, good_seen), (bad, bad_seen)) = (counting(OK, true).await, counting(FAILED, true).await);
    let (unwell, unwell_seen) = counting(OK, false).await;
    let urls = |all: &[SocketAddr]| all.iter().map(|address| format!("http://{address}")).collect::<Vec<_>>();
    let failing =
        world(view_of(Some(good), None, 0, |spec| spec.stable.urls = urls(&[good, bad, nowhere_now()]))).await;
    for _ in 0..40 {
        failing.get("/predict", "").await;
    }
    assert_eq!((seen_of(&good_seen), seen_of(&bad_seen)), (35, 5), "(good, bad) after five failures in a row");

    let asked = world(view_of(Some(good), None, 0, |spec| {
        spec.stable.urls = urls(&[good, unwell]);
        spec.stable.health_check = Some(HealthCheck { path: "/healthz".into(), interval_ms: 100 });
    }));
    let asked = asked.await;
    // Nine probes of 100 ms: enough to eject the unwell server.
    tokio::time::sleep(Duration::from_millis(900)).await;
    let before = seen_of(&unwell_seen);
    for _ in 0..20 {
        assert!(asked.get("/predict", "").await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!((seen_of(&unwell_seen) - before, seen_of(&good_seen)), (0, 55));
}

fn nowhere_now() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn requests_that_can_be_read_in_two_ways_reach_nobody() {
    let (sender, mut seen) = mpsc::unbounded_channel();
    let curious = upstream(move |mut stream| {
        let sender = sender.clone();
        async move {
            let _ = sender.send(head(&mut stream).await);
            let _ = stream.write_all(OK.as_bytes()).await;
        }
    });
    let world = world(view(Some(curious.await), None, 0)).await;
    for (lines, status) in [
        ("content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        ("transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n", "400"),
        ("transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", "501"),
        ("content-length: 4\r\ncontent-length: 5\r\n\r\nabcde", "400"),
        ("content-length: 0x4\r\n\r\nabcd", "400"),
        ("transfer-encoding: chunked\r\n\r\nzz\r\n", "400"),
        ("x-bad: a\r\n b\r\n\r\n", "400"),
        ("bad name: a\r\n\r\n", "400"),
    ] {
        let answer = world.raw(&format!("POST /predict HTTP/1.1\r\nhost: x\r\n{lines}")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{lines:?}: {answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }
    assert!(seen.try_recv().is_err(), "an upstream saw one of them");
    // A chunk that goes wrong later ends the request, and the client's connection.
    let late = "POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(late.as_bytes()).await.unwrap();
    // The proxy forwards the sound chunk first, so that the wrong one arrives on its own.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _ = stream.write_all(b"5 5\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let _ = timeout(SOON, stream.read_to_end(&mut Vec::new())).await.unwrap();
    let heads: Vec<_> = std::iter::from_fn(|| seen.try_recv().ok()).collect();
    assert!(heads.len() == 1 && !heads[0].contains("smuggled"), "{heads:?}");
}

#[tokio::test]
async fn chunks_trailers_and_hints_pass_both_ways() {
    let echo = upstream(|mut stream| async move {
        let head = head(&mut stream).await;
        assert!(head.contains("transfer-encoding: chunked"), "{head}");
        let mut body = Vec::new();
        while !body.ends_with(b"\r\n\r\n") {
            body.push(stream.read_u8().await.unwrap());
        }
        let early = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n";
        for part in [early.as_bytes(), head.as_bytes(), &body[..3], &body[3..]] {
            stream.write_all(part).await.unwrap();
            // Each part in a packet of its own.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await;
    });
    let world = world(view(Some(echo.await), None, 0)).await;
    let body = "3;x=y\r\nabc\r\n2 \r\nde\r\n0\r\nx-sum: 7\r\n\r\n";
    let request =
        format!("POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{body}");
    let answer = world.raw(&request).await;
    let (early, rest) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(early, "HTTP/1.1 103 Early Hints\r\nlink: </a>");
    let (head, found) = rest.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("transfer-encoding: chunked") && head.contains("trailer: x-sum"), "{head}");
    // Each chunk's head is written anew.
    assert_eq!(found, "3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 7\r\n\r\n");
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_gets_its_continue() {
    let patient = upstream(|mut stream| async move {
        let head = head(&mut stream).await;
        assert!(head.to_lowercase().contains("expect: 100-continue"), "{head}");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        stream.write_all(OK.as_bytes()).await.unwrap();
    });
    let world = world(view(Some(patient.await), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let request = "POST /predict HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(timeout(SOON, head(&mut stream)).await.unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    assert!(ask(&mut stream, "body").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_answer_before_the_whole_request_ends_the_connection_politely() {
    let hasty = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!").await;
        // Keeps the connection open for as long as the test may take, without reading on.
        tokio::time::sleep(SOON).await;
    });
    let world = world(view(Some(hasty.await), None, 0)).await;
    let (mut answers, mut requests) = TcpStream::connect(world.address).await.unwrap().into_split();
    // Still sending when the answer comes: a connection closed on unread bytes would be reset.
    let sending = tokio::spawn(async move {
        requests.write_all(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n").await.unwrap();
        for _ in 0..9 {
            let _ = requests.write_all(&[b'x'; 100_000]).await;
        }
        requests
    });
    let mut answer = String::new();
    timeout(SOON, answers.read_to_string(&mut answer)).await.unwrap().unwrap();
    drop(sending.await.unwrap());
    assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with("\r\n\r\nno!"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
}

#[tokio::test]
async fn requests_in_a_row_and_half_closed_ones_are_all_answered() {
    let world = world(view(Some(answering(OK).await), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let three = "GET /predict HTTP/1.1\r\nhost: x\r\n\r\n".repeat(3);
    stream.write_all(three.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answers = String::new();
    timeout(SOON, stream.read_to_string(&mut answers)).await.unwrap().unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
    // An older client.
    let old = world.raw("GET /predict HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200") && old.ends_with("ok"), "{old}");
    // Answers without a body are answers without a body.
    let silent = upstream(|mut stream| async move {
        while !head(&mut stream).await.is_empty() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await;
        }
    });
    world.node.published.publish(Arc::new(view(Some(silent.await), None, 0)));
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    for _ in 0..3 {
        stream.write_all(b"HEAD /predict HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let answer = timeout(SOON, head(&mut stream)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("content-length: 2"), "{answer}");
    }
}

#[tokio::test]
async fn a_kept_connection_that_ended_costs_nothing() {
    // Answers once on each connection, says it stays open, and closes it.
    let fickle = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(OK.as_bytes()).await;
    });
    let world = world(view(Some(fickle.await), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    for i in 0..50 {
        let method = if i < 25 { "GET" } else { "POST" };
        // The proxy sees the end of the upstream's connection before it sends anything, so that nothing can be sent twice.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let answer =
            ask(&mut stream, &format!("{method} /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    // Ends a connection when the second request is there: what can be repeated is, once, on another one.
    let unkind = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(OK.as_bytes()).await;
        head(&mut stream).await;
    });
    world.node.published.publish(Arc::new(view(Some(unkind.await), None, 0)));
    let answer = ask(&mut stream, "GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let again = ask(&mut stream, "GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(again.starts_with("HTTP/1.1 200"), "{again}");
    let once = ask(&mut stream, "POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await;
    assert!(once.starts_with("HTTP/1.1 502"), "{once}");
}

#[tokio::test]
async fn a_clients_connection_waits_for_its_next_request_as_long_as_it_may() {
    let settings = ProxySettings { keep_alive_timeout_ms: 1_500, total_timeout_ms: 500, ..settings() };
    let world = world_with(view(Some(answering(OK).await), None, 0), settings).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    for _ in 0..2 {
        let answer = ask(&mut stream, "GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // Twice the total time-out of a request, and less than that of an idle connection: the former must not go on counting.
        tokio::time::sleep(Duration::from_millis(1_000)).await;
    }
    let ended = timeout(Duration::from_secs(2), stream.read(&mut [0; 1])).await;
    assert_eq!(ended.expect("no longer than it may").unwrap(), 0);
}

#[tokio::test]
async fn a_websocket_passes() {
    let socket = upstream(|mut stream| async move {
        let head = head(&mut stream).await.to_lowercase();
        assert!(head.contains("connection: upgrade") && head.contains("upgrade: websocket"), "{head}");
        let accept = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        stream.write_all(accept.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        let _ = tokio::io::copy(&mut from, &mut to).await;
    });
    let world = world(view(Some(socket.await), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let request = "GET /predict HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let answer = timeout(SOON, head(&mut stream)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 101") && answer.contains("x-served-by: v1"), "{answer}");
    for _ in 0..5 {
        let mut back = [0; 5];
        stream.write_all(b"\x81\x03abc").await.unwrap();
        timeout(SOON, stream.read_exact(&mut back)).await.unwrap().unwrap();
        assert_eq!(&back, b"\x81\x03abc");
    }
}

/// Starts a server of HTTP/2 without TLS that ends each answer with this gRPC status, in trailers.
pub(crate) async fn grpc(status: &'static str) -> SocketAddr {
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    upstream(move |stream| async move {
        let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| async move {
            assert_eq!(
                (request.version(), &request.headers()["te"]),
                (http::Version::HTTP_2, &"trailers".parse().unwrap())
            );
            let message = request.into_body().collect().await.unwrap().to_bytes();
            let trailers = http::HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())]);
            let frames = [Frame::data(message), Frame::trailers(trailers)].map(Ok::<_, std::convert::Infallible>);
            let mut response = http::Response::new(StreamBody::new(tokio_stream::iter(frames)));
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            Ok::<_, std::convert::Infallible>(response)
        });
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

#[tokio::test]
async fn grpc_passes_with_its_trailers_and_its_failures_count() {
    let (good, bad) = (grpc("0").await, grpc("13").await);
    let mut world = world(view_of(None, None, 10_000, |spec| {
        (spec.stable.urls, spec.canary.urls) = (vec![format!("h2c://{good}")], vec![format!("h2c://{bad}")]);
    }))
    .await;
    let stream = TcpStream::connect(world.address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let share = |bp| {
        view_of(None, None, bp, |spec| {
            (spec.stable.urls, spec.canary.urls) = (vec![format!("h2c://{good}")], vec![format!("h2c://{bad}")]);
        })
    };
    for (bp, expected) in [(0, "0"), (10_000, "13")] {
        world.node.published.publish(Arc::new(share(bp)));
        let request = http::Request::post("http://x/aviary.Test/Echo").header("content-type", "application/grpc");
        let request = request.header("te", "trailers");
        let request = request.body(http_body_util::Full::new(Bytes::from_static(b"\0\0\0\0\x02hi"))).unwrap();
        let answer = timeout(SOON, sender.send_request(request)).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], expected);
        assert_eq!(body.to_bytes().as_ref(), b"\0\0\0\0\x02hi");
    }
    assert_eq!(
        world.told_within(Duration::from_millis(300)).await,
        (1, 1, 0),
        "(answers, errors, trips) of the canary"
    );
    // A gRPC client understands an error of the proxy's own.
    world.node.published.publish(Arc::new(view_of(None, None, 0, |spec| {
        spec.stable.urls = vec![format!("h2c://{}", nowhere_now())];
    })));
    let request = http::Request::post("http://x/aviary.Test/Echo").header("content-type", "application/grpc");
    let request = request.body(http_body_util::Full::new(Bytes::new())).unwrap();
    let answer = timeout(SOON, sender.send_request(request)).await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["grpc-status"]), (200, &"14".parse().unwrap()));
}

#[tokio::test]
async fn a_total_limit_ends_what_never_ends() {
    let endless = upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(b"more").await.is_ok() {
            // Never silent for as long as the idle time-out.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let settings = ProxySettings { total_timeout_ms: 400, ..settings() };
    let mut world = world_with(view(None, Some(endless.await), 10_000), settings).await;
    let answer = timeout(Duration::from_secs(3), world.get("/predict", "")).await.expect("an end");
    // No last chunk: the answer must not look whole.
    assert!(answer.ends_with("4\r\nmore\r\n"), "{answer}");
    // An older client knows no chunks.
    let mut old = TcpStream::connect(world.address).await.unwrap();
    old.write_all(b"GET /predict HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(3), old.read_to_end(&mut answer)).await.expect("an end");
    assert!(answer.ends_with(b"more"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(
        world.told_within(Duration::from_millis(300)).await,
        (2, 2, 0),
        "(answers, errors, trips) of the canary"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_weight_is_in_force_at_once_on_every_worker_and_costs_no_request() {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    let (v1, v2) = (answering(OK).await, answering(OK).await);
    let numbered = move |number: u64, bp| {
        let mut view = view(Some(v1), Some(v2), bp);
        Arc::make_mut(&mut view.services)
            .values_mut()
            .for_each(|service| Arc::make_mut(service).serving.routing_version = number);
        Arc::new(view)
    };
    let published = Published::new(numbered(1, 5_000), Arc::new(BootClock));
    let (node, _told, _) = NodeHandle::new(published, MemoryStore::default().reader());
    let listeners = aviary::adapters::listen::listen_many("data", "127.0.0.1:0", 3, false).await.unwrap();
    let address = listeners[0].local_addr().unwrap();
    let stop = CancellationToken::new();
    let settings = ProxySettings { busy_poll_us: 50, ..settings() };
    let serving = tokio::spawn(proxy::serve(listeners, node.clone(), settings, stop.clone()));

    let (current, answers) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let (current, answers) = (current.clone(), answers.clone());
        clients.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            loop {
                let at_least = current.load(Ordering::SeqCst);
                let answer = ask(&mut stream, "GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                let number = answer.lines().find_map(|line| line.strip_prefix("x-routing-version: ")).unwrap();
                let number: u64 = number.parse().unwrap();
                assert!(number >= at_least, "served by version {number} after {at_least} was in force");
                // Odd versions give the canary half, even ones nothing.
                assert!(!number.is_multiple_of(2) || served_by(&answer) == "v1", "{answer}");
                answers.fetch_add(1, Ordering::Relaxed);
                if at_least == 200 {
                    return;
                }
            }
        });
    }
    for number in 2..=200 {
        // Some requests fall into each version.
        tokio::time::sleep(Duration::from_millis(10)).await;
        hold_lease(&node);
        node.published.publish(numbered(number, if !number.is_multiple_of(2) { 5_000 } else { 0 }));
        current.store(number, Ordering::SeqCst);
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    stop.cancel();
    timeout(SOON, serving).await.expect("idle connections don't hold the end up").unwrap().unwrap();
    assert!(answers.load(Ordering::Relaxed) > 1_000, "{answers:?} answers under 199 changes");
}

#[tokio::test]
async fn a_request_under_way_outlives_the_stop() {
    let slow = upstream(|mut stream| async move {
        head(&mut stream).await;
        // Longer than the test takes to stop the proxy.
        tokio::time::sleep(Duration::from_millis(400)).await;
        let _ = stream.write_all(OK.as_bytes()).await;
    });
    let world = world(view(Some(slow.await), None, 0)).await;
    let mut idle = TcpStream::connect(world.address).await.unwrap();
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(b"GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    // The request has reached the server, which takes 400 ms for its answer.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(world);
    // A client that asked for nothing yet has half a second for that.
    assert_eq!(timeout(Duration::from_secs(1), idle.read(&mut [0; 1])).await.expect("ended soon").unwrap(), 0);
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
}
