//! The API port over real sockets, with a made-up node loop behind it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aviary::adapters::clock::BootClock;
use aviary::adapters::memory::MemoryStore;
use aviary::api::token_file::TokenFile;
use aviary::api::{self, ApiState};
use aviary::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use aviary::domain::rollout::{Change, Service, Stamp};
use aviary::domain::time::Wall;
use aviary::domain::window::Evidence;
use aviary::model::{ClusterView, HealthView, History, RolloutList, RolloutView, RoutingView};
use aviary::node::handle::{NodeHandle, NodeRequest, Published};
use aviary::ports::Store;
use aviary::protocol::message::Membership;
use aviary::protocol::record::{Chosen, Hash, Initiator, Intent, Operation, Record, Slot};
use aviary::protocol::{Announcement, Event, MemberView, OperatorRequest, Outcome, ServiceView, Serving, View};
use aviary::schema::v1::rollout_service_client::RolloutServiceClient;
use aviary::schema::v1::{GetRolloutRequest, ListRolloutsRequest, PauseRolloutRequest};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub const ROLLOUT: &str = "apiVersion: aviary/v1\nkind: Rollout\nmetadata: { name: svc }\nspec:\n  \
    stable: { version: v1, answer: node }\n  canary: { version: v2, answer: node }\n  steps:\n    - setWeight: 5\n    - setWeight: 100\n";

type Asked = Arc<Mutex<Vec<(TxId, OperatorRequest)>>>;

pub struct Node {
    pub port: u16,
    events: broadcast::Sender<Arc<Announcement>>,
    handle: NodeHandle,
    asked: Asked,
    shutdown: CancellationToken,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn stamp(slot: u64) -> Stamp {
    Stamp { tx: TxId::new(format!("tx-{slot}")).unwrap(), at: Wall(slot) }
}

pub fn started() -> (Change, Service) {
    let spec = aviary::config::rollout::parse(ROLLOUT, "rollout").unwrap_or_else(|e| panic!("{e}"));
    let change = Change::Start(Arc::new(spec));
    let service = Service::after(None, &id(), &change, &stamp(1)).unwrap();
    (change, service)
}

fn id() -> ServiceId {
    ServiceId::new("svc").unwrap()
}

pub fn rollback() -> (Change, Service) {
    let change = Change::Rollback { reason: "errors: 9 %".into() };
    let service = Service::after(Some(&started().1), &id(), &change, &stamp(2)).unwrap();
    (change, service)
}

fn record(slot: u64, change: Change, service: Service) -> Chosen {
    let operation = Operation::Change(id(), change);
    let intent = Intent {
        initiator: Initiator::Client,
        tx: stamp(slot).tx,
        actor: "alice".into(),
        digest: 0,
        at: Wall(slot),
        operation,
    };
    Chosen {
        ballot: None,
        decided_at: Wall(slot + 1),
        record: Record {
            slot: Slot(slot),
            prev_hash: Hash([0; 32]),
            intent,
            phase: Some(service.rollout.phase),
            state: Some(service.routing),
            certificate: None,
        },
    }
}

fn view(name: &str, coordinator: &str, head: u64, service: Service) -> Arc<View> {
    let spec = service.rollout.spec.clone();
    let serving = Serving {
        routing_version: 1,
        stable: service.stable.clone(),
        canary: None,
        lease_ms: None,
        spec,
        held_back: None,
    };
    let shown = ServiceView {
        service,
        slot: Slot(head),
        hash: Hash([0; 32]),
        serving,
        local: Evidence::default(),
        cluster: Evidence::default(),
        verdict: None,
        sequential: None,
        waiting_for: String::new(),
        enforced: true,
    };
    Arc::new(View {
        node: NodeId::new(name).unwrap(),
        cluster: ClusterId([1; 16]),
        incarnation: Incarnation(1),
        membership: Membership::Voter,
        head: Slot(head),
        head_hash: Hash([0; 32]),
        coordinator: NodeId::new(coordinator).unwrap(),
        members: BTreeMap::new(),
        outsiders: Default::default(),
        open: None,
        default_service: Some(id()),
        uses: Vec::new(),
        services: Arc::new(BTreeMap::from([(id(), Arc::new(shown))])),
    })
}

/// A log of genesis-like slot 0, a start in slot 1 and a rollback in slot 2.
fn log() -> Vec<Chosen> {
    let ((start, first), (back, second)) = (started(), rollback());
    vec![record(0, Change::Resume, first.clone()), record(1, start, first), record(2, back, second)]
}

pub async fn node(name: &str, coordinator: &str, peers: &[(&str, u16)], tokens: Option<&str>) -> Node {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let store = MemoryStore::new(None, log());
    let published = Published::new(view(name, coordinator, 2, rollback().1), Arc::new(BootClock));
    let (handle, mut requests, events) = NodeHandle::new(published, store.reader());
    let asked = Asked::default();
    let told = asked.clone();
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            if let NodeRequest::Submit { tx, asked, reply, .. } = request {
                let outcome = match tx.as_str() {
                    "refused" => {
                        Outcome::Aborted { slot: Slot(3), reasons: vec!["b: errors: 9 %".into()], repeated: false }
                    }
                    "again" => Outcome::Committed { slot: Slot(1), state: None, reason: String::new(), repeated: true },
                    "alone" => Outcome::NoQuorum { reached: vec![NodeId::new("a").unwrap()], needed: 2 },
                    _ => Outcome::Committed {
                        slot: Slot(3),
                        state: Some(started().1.routing),
                        reason: String::new(),
                        repeated: false,
                    },
                };
                told.lock().unwrap().push((tx, asked));
                let _ = reply.send(outcome);
            }
        }
    });
    let peers = peers.iter().map(|(n, p)| (NodeId::new(n).unwrap(), format!("127.0.0.1:{p}"))).collect();
    let shutdown = CancellationToken::new();
    let tokens = tokens.map(|text| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        TokenFile::open(file.path()).unwrap()
    });
    let state = ApiState::new(handle.clone(), peers, tokens, api::metrics::install(), shutdown.clone());
    tokio::spawn(api::serve(listener, state));
    Node { port, events, handle, asked, shutdown }
}

/// Sends a request; returns the head and the body of its answer.
pub async fn exchange(port: u16, method: &str, path: &str, headers: &str, body: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let length = body.len();
    let kind = if headers.contains("content-type") { "" } else { "content-type: application/json\r\n" };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\ncontent-length: {length}\r\n\
         {kind}{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let _ = stream.write_all(body.as_bytes()).await;
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).await;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    (head.to_string(), body.to_string())
}

pub async fn http(port: u16, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, Value) {
    let (head, body) = exchange(port, method, path, headers, body).await;
    let status = head.split(' ').nth(1).map_or(0, |s| s.parse().unwrap());
    let json = serde_json::from_str(&body).unwrap_or(Value::Null);
    (status, body, json)
}

/// What a stream says within `ms`, and whether it is still open then.
async fn stream(stream: &mut TcpStream, ms: u64) -> (String, bool) {
    let mut text = Vec::new();
    let end = Instant::now() + Duration::from_millis(ms);
    loop {
        let mut bytes = [0; 4096];
        match tokio::time::timeout_at(end, stream.read(&mut bytes)).await {
            Err(_) => return (String::from_utf8(text).unwrap(), true),
            Ok(Ok(0) | Err(_)) => return (String::from_utf8(text).unwrap(), false),
            Ok(Ok(n)) => text.extend_from_slice(&bytes[..n]),
        }
        if text.ends_with(b"0\r\n\r\n") {
            return (String::from_utf8(text).unwrap(), false);
        }
    }
}

async fn follow(port: u16, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(format!("GET /v1/events HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n").as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_stream_resumed_at_the_head_stays_open() {
    let a = node("a", "a", &[], None).await;
    let mut open = follow(a.port, "last-event-id: 8192\r\n").await;
    let (text, alive) = stream(&mut open, 500).await;
    assert!(alive, "ended at once: {text}");
}

#[tokio::test]
async fn a_stream_resumes_after_the_slot_it_names_and_tells_each_decision_once() {
    let a = node("a", "a", &[], None).await;
    let mut open = follow(a.port, "last-event-id: 4096\r\n").await;
    let (text, _) = stream(&mut open, 300).await;
    assert!(text.contains("id: 8192") && !text.contains("id: 4096\n"), "{text}");
    let event = Event::Peer { node: NodeId::new("c").unwrap(), alive: false };
    a.events.send(Arc::new(Announcement { at: Wall(1), node: NodeId::new("a").unwrap(), event })).unwrap();
    let (text, alive) = stream(&mut open, 300).await;
    assert!(alive && text.contains("\"peer\"") && !text.contains("id:"), "{text}");
}

#[tokio::test]
async fn an_id_that_no_event_has_resumes_no_stream() {
    let a = node("a", "a", &[], None).await;
    for id in ["x", "-1", "1.5"] {
        let (status, text, json) = http(a.port, "GET", "/v1/events", &format!("last-event-id: {id}\r\n"), "").await;
        assert_eq!((status, &json["code"]), (400, &json!("INVALID_ARGUMENT")), "{id}: {text}");
    }
}

#[tokio::test]
async fn a_replayed_rollback_says_why_and_where_it_led() {
    let a = node("a", "a", &[], None).await;
    let mut open = follow(a.port, "last-event-id: 4096\r\n").await;
    let (text, _) = stream(&mut open, 300).await;
    assert!(text.contains("errors: 9 %"), "no reason: {text}");
    assert!(text.contains("RolledBack"), "no phase: {text}");
}

#[tokio::test]
async fn a_decision_reads_the_same_live_and_resumed() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(view("a", "a", 1, started().1));
    let mut live = follow(a.port, "").await;
    assert!(stream(&mut live, 200).await.1, "the stream is open before anything is decided");
    a.handle.published.publish(view("a", "a", 2, rollback().1));
    let (_, event) = Event::of(&log()[2]).remove(0);
    a.events.send(Arc::new(Announcement::new(event, Wall(9), &NodeId::new("a").unwrap()))).unwrap();
    let mut resumed = follow(a.port, "last-event-id: 4096\r\n").await;
    let mut told = Vec::new();
    for open in [&mut live, &mut resumed] {
        let (text, _) = stream(open, 300).await;
        let lines = text.lines().filter(|line| line.starts_with("id:") || line.starts_with("data:"));
        told.push(lines.map(str::to_owned).collect::<Vec<_>>());
    }
    assert_eq!(told[0], told[1]);
    let kind_and_state =
        r#""kind":"Rollback","initiator":"client","actor":"alice","state":{"service":"svc","version":2,"#;
    assert!(told[0].len() == 2 && told[0].concat().contains(kind_and_state), "{told:?}");
}

#[tokio::test]
async fn a_stream_that_lagged_goes_on_though_nothing_was_decided_meanwhile() {
    let a = node("a", "a", &[], None).await;
    let mut open = follow(a.port, "").await;
    let (_, alive) = stream(&mut open, 200).await;
    assert!(alive);
    for _ in 0..1500 {
        let event = Event::Lease { held: true };
        a.events.send(Arc::new(Announcement { at: Wall(1), node: NodeId::new("a").unwrap(), event })).unwrap();
    }
    let (text, alive) = stream(&mut open, 500).await;
    assert!(alive, "ended: {} bytes", text.len());
}

#[tokio::test]
async fn a_rolled_back_canary_has_no_weight_in_the_metrics() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(view("a", "a", 1, started().1));
    let (_, before, _) = http(a.port, "GET", "/metrics", "", "").await;
    assert!(before.contains(r#"version="v2"} 0.05"#), "{before}");
    a.handle.published.publish(view("a", "a", 2, rollback().1));
    let (_, after, _) = http(a.port, "GET", "/metrics", "", "").await;
    assert!(!after.contains(r#"version="v2"} 0.05"#), "{after}");
}

#[tokio::test]
async fn every_error_is_a_problem_with_a_code() {
    let a = node("a", "a", &[], None).await;
    let large = "x".repeat(300 * 1024);
    let cases = [
        ("POST", "/v1/rollouts", large.as_str(), 413, "TOO_LARGE"),
        ("POST", "/v1/rollouts", "kind: nonsense", 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/rollouts/%ff", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/rollouts/none", "", 404, "NOT_FOUND"),
        ("GET", "/v1/rollouts/none/history", "", 404, "NOT_FOUND"),
        ("GET", "/v1/rollouts?limit=0", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/rollouts?limit=x", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/rollouts?page=2", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/rollouts?selector=a=b=c", "", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/telemetry", "nonsense", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/telemetry", "[{}]", 422, "INVALID_ARGUMENT"),
        ("GET", "/nowhere", "", 404, "NOT_FOUND"),
        ("GET", "/routing/state?service=none", "", 404, "NOT_FOUND"),
        ("PUT", "/routing/state", "", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/v1/rollouts", "", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/v1/rollouts/svc/explode", "", 404, "NOT_FOUND"),
        ("POST", "/v1/rollouts/svc/abort", "[]x", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/cluster/readmit", "{\"node\":\"c\"}", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/cluster/readmit", "{\"node\":\"c\",\"incarnation\":\"+1\"}", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/cluster/cordon", "{\"node\":\"c\",\"incarnation\":\"1\"}", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/cluster/explode", "{\"node\":\"c\"}", 404, "NOT_FOUND"),
        ("POST", "/v1/rollouts/svc/abort?consistency=x", "{}", 400, "INVALID_ARGUMENT"),
        ("GET", "/routing/state?consistency=x", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/readyz?quorum", "", 503, "UNAVAILABLE"),
        ("PUT", "/v1/rollouts/svc/abort", "", 405, "METHOD_NOT_ALLOWED"),
    ];
    let mut wrong = Vec::new();
    for (method, path, body, expected, code) in cases {
        let (status, text, json) = http(a.port, method, path, "", body).await;
        let kind = format!("urn:aviary:problem:{}", code.to_lowercase().replace('_', "-"));
        let whole = json["type"] == kind && json["status"] == expected && json["title"].is_string();
        if status != expected || json["code"] != code || !json["detail"].is_string() || !whole {
            wrong.push(format!("{method} {path}: {status}, expected {expected} {code}: {text}"));
        }
        let (head, _) = exchange(a.port, method, path, "", body).await;
        if !head.to_lowercase().contains("content-type: application/problem+json") {
            wrong.push(format!("{method} {path}: {head}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(a.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let a = node("a", "a", &[], None).await;
    let mut silent = TcpStream::connect(("127.0.0.1", a.port)).await.unwrap();
    let mut bytes = [0; 16];
    let read = tokio::time::timeout(Duration::from_secs(8), silent.read(&mut bytes)).await;
    assert!(read.is_ok(), "still open after 8 s");
}

#[tokio::test]
async fn a_write_goes_to_the_coordinator_once_under_its_key() {
    let a = node("a", "a", &[], None).await;
    let b = node("b", "a", &[("a", a.port)], None).await;
    let (status, _, json) = http(b.port, "POST", "/v1/rollouts/svc/abort", "idempotency-key: k1\r\n", "{}").await;
    assert_eq!((status, &json["status"], &json["txid"]), (200, &json!("COMMITTED"), &json!("k1")));
    assert_eq!((a.asked.lock().unwrap().len(), b.asked.lock().unwrap().len()), (1, 0));
    let c = node("c", "b", &[("b", b.port)], None).await;
    http(c.port, "POST", "/v1/rollouts/svc/abort", "", "{}").await;
    assert_eq!((a.asked.lock().unwrap().len(), b.asked.lock().unwrap().len()), (1, 1), "forwarded twice");
}

#[tokio::test]
async fn what_the_coordinator_refuses_is_told_by_the_node_that_was_asked() {
    let a = node("a", "a", &[], None).await;
    let b = node("b", "a", &[("a", a.port)], None).await;
    for (key, expected) in [
        (
            "refused",
            json!({
                "type": "urn:aviary:problem:aborted", "title": "aborted", "status": 409, "code": "ABORTED",
                "detail": "b: errors: 9 %", "reasons": ["b: errors: 9 %"], "slot": 3, "repeated": false, "txid": "refused",
            }),
        ),
        (
            "alone",
            json!({
                "type": "urn:aviary:problem:no-quorum", "title": "no quorum", "status": 503, "code": "NO_QUORUM",
                "detail": "no quorum: reached a, expected 2 nodes", "reached": ["a"], "needed": 2, "txid": "alone",
            }),
        ),
    ] {
        let header = format!("idempotency-key: {key}\r\n");
        let (status, _, found) = http(b.port, "POST", "/v1/rollouts/svc/promote", &header, "{}").await;
        assert_eq!((u64::from(status), &found), (expected["status"].as_u64().unwrap(), &expected));
    }
    assert!(b.asked.lock().unwrap().is_empty());
}

/// A view of five services, svc-0 to svc-4; the even ones are of team fraud.
fn five_services() -> Arc<View> {
    let services = (0..5).map(|n| {
        let team = if n % 2 == 0 { "fraud" } else { "ads" };
        let file = ROLLOUT.replace("name: svc", &format!("name: svc-{n}, labels: {{ team: {team} }}"));
        let spec = aviary::config::rollout::parse(&file, "rollout").unwrap_or_else(|e| panic!("{e}"));
        let id = ServiceId::new(format!("svc-{n}")).unwrap();
        let service = Service::after(None, &id, &Change::Start(Arc::new(spec)), &stamp(1)).unwrap();
        (id.clone(), view("a", "a", 2, service).services[&self::id()].clone())
    });
    let services = Arc::new(services.collect());
    Arc::new(View { services, ..(*view("a", "a", 2, started().1)).clone() })
}

#[tokio::test]
async fn a_list_comes_page_by_page_and_by_its_selector() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(five_services());
    for (query, names, next) in [
        ("", &["svc-0", "svc-1", "svc-2", "svc-3", "svc-4"][..], None),
        ("?limit=2", &["svc-0", "svc-1"], Some("svc-1")),
        ("?limit=2&after=svc-1", &["svc-2", "svc-3"], Some("svc-3")),
        ("?limit=2&after=svc-3", &["svc-4"], None),
        ("?limit=5", &["svc-0", "svc-1", "svc-2", "svc-3", "svc-4"], None),
        ("?selector=team%3Dfraud", &["svc-0", "svc-2", "svc-4"], None),
        ("?selector=team%3Dfraud&limit=1&after=svc-1", &["svc-2"], Some("svc-2")),
        ("?selector=team%3Dfraud&limit=1&after=svc-3", &["svc-4"], None),
        ("?selector=team%21%3Dfraud,team", &["svc-1", "svc-3"], None),
        ("?selector=owner", &[], None),
        ("?after=zzz", &[], None),
    ] {
        let (status, text, _) = http(a.port, "GET", &format!("/v1/rollouts{query}"), "", "").await;
        assert_eq!(status, 200, "{query}: {text}");
        let list: RolloutList = serde_json::from_str(&text).unwrap_or_else(|why| panic!("{why}: {text}"));
        let found: Vec<_> = list.rollouts.iter().map(|rollout| rollout.name.as_str()).collect();
        assert_eq!((&found[..], list.next.as_ref().map(ServiceId::as_str)), (names, next), "{query}");
    }
}

/// Returns how many services a view has, each with a rollout of its own.
fn many_services(count: usize) -> Arc<View> {
    let one = view("a", "a", 2, started().1).services[&id()].clone();
    let services = (0..count).map(|n| (ServiceId::new(format!("svc-{n:05}")).unwrap(), one.clone())).collect();
    Arc::new(View { services: Arc::new(services), ..(*view("a", "a", 2, started().1)).clone() })
}

#[tokio::test]
async fn ten_thousand_services_are_listed_page_by_page_each_once() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(many_services(10_000));
    let (begun, mut names, mut after, mut pages, mut largest) = (Instant::now(), Vec::new(), String::new(), 0, 0);
    loop {
        let (status, text, _) = http(a.port, "GET", &format!("/v1/rollouts?{after}"), "", "").await;
        assert_eq!(status, 200, "{text}");
        let list: RolloutList = serde_json::from_str(&text).unwrap();
        (pages, largest) = (pages + 1, largest.max(text.len()));
        names.extend(list.rollouts.into_iter().map(|rollout| rollout.name));
        match list.next {
            Some(next) => after = format!("after={next}"),
            None => break,
        }
    }
    let took = begun.elapsed();
    println!("{} services in {pages} pages of up to {largest} bytes, in {took:?}", names.len());
    let expected: Vec<_> = (0..10_000).map(|n| format!("svc-{n:05}")).collect();
    assert!(names.iter().map(ServiceId::as_str).eq(expected.iter().map(String::as_str)), "{} names", names.len());
    assert!(pages == 10 && largest < 4 << 20 && took < Duration::from_secs(20), "{pages} {largest} {took:?}");
}

/// Returns the view of node a with these members beside it: whether each is live.
fn with_members(head: u64, others: &[(&str, bool)]) -> Arc<View> {
    let member =
        |alive| MemberView { incarnation: Incarnation(1), cordoned: false, alive, head: None, counts_not: None };
    let others = others.iter().map(|(name, alive)| (NodeId::new(*name).unwrap(), member(*alive)));
    let members = others.chain([(NodeId::new("a").unwrap(), member(true))]).collect();
    Arc::new(View { members, ..(*view("a", "a", head, started().1)).clone() })
}

#[tokio::test]
async fn a_write_for_everywhere_waits_for_live_nodes_and_names_the_others() {
    let (b, c) = (node("b", "a", &[], None).await, node("c", "a", &[], None).await);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead = gone.local_addr().unwrap().port();
    drop(gone);
    let a = node("a", "a", &[("b", b.port), ("c", c.port), ("d", dead), ("e", dead)], None).await;
    a.handle.published.publish(with_members(3, &[("b", true), ("c", true), ("d", false), ("e", true), ("f", true)]));
    let late = b.handle.clone();
    let path = "/v1/rollouts/svc/pause?consistency=everywhere";
    let (begun, answer) = (Instant::now(), http(a.port, "POST", path, "", "{}"));
    let later = async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        late.published.publish(view("b", "a", 3, started().1));
    };
    let ((status, text, json), ()) = tokio::join!(answer, later);
    assert_eq!(status, 200, "{text}");
    assert_eq!(json["reach"]["served_by"], json!(["a", "b"]), "{text}");
    assert_eq!(json["reach"]["away"], json!(["d"]), "{text}");
    let missing = json["reach"]["missing"].as_object().unwrap();
    assert_eq!(missing["c"], "it is at slot 2, expected slot 3");
    assert!(missing["e"].as_str().unwrap().contains("refused"), "{text}");
    assert_eq!((missing["f"].as_str().unwrap(), missing.len()), ("the address of its API is not known here", 3));
    let took = begun.elapsed();
    assert!((2_900..4_500).contains(&took.as_millis()), "bounded by 3 s: {took:?}");

    a.handle.published.publish(with_members(3, &[("b", true), ("d", false)]));
    let begun = Instant::now();
    let (_, text, json) = http(a.port, "POST", path, "", "{}").await;
    assert_eq!(json["reach"], json!({ "served_by": ["a", "b"], "away": ["d"], "missing": {} }), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(1), "nobody is waited for: {:?}", begun.elapsed());
    let (_, _, json) = http(a.port, "POST", "/v1/rollouts/svc/pause", "", "{}").await;
    assert!(json.get("reach").is_none(), "told only where it is asked for: {json}");

    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{}", a.port)).unwrap();
    let mut client = RolloutServiceClient::new(endpoint.connect().await.unwrap());
    let mut pause = async |everywhere| {
        let asked = PauseRolloutRequest { service: "svc".into(), everywhere, ..Default::default() };
        client.pause_rollout(asked).await.unwrap().into_inner().result.unwrap().reach
    };
    let reach = pause(true).await.unwrap();
    assert_eq!((reach.served_by, reach.away), (vec!["a".to_string(), "b".into()], vec!["d".to_string()]));
    assert_eq!(pause(false).await, None, "told only where it is asked for");
}

#[tokio::test]
async fn grpc_lists_the_same_pages_as_http() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(five_services());
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{}", a.port)).unwrap();
    let mut client = RolloutServiceClient::new(endpoint.connect().await.unwrap());
    for (selector, limit, after, names, next) in [
        ("", 0, "", &["svc-0", "svc-1", "svc-2", "svc-3", "svc-4"][..], ""),
        ("", 2, "svc-1", &["svc-2", "svc-3"], "svc-3"),
        ("team=fraud", 1, "svc-1", &["svc-2"], "svc-2"),
        ("team=fraud", 2, "svc-1", &["svc-2", "svc-4"], ""),
    ] {
        let (selector, after) = (selector.into(), after.into());
        let request = ListRolloutsRequest { current: false, selector, limit, after };
        let list = client.list_rollouts(request).await.unwrap().into_inner();
        let found: Vec<_> = list.rollouts.iter().map(|rollout| rollout.service.as_str()).collect();
        assert_eq!((&found[..], list.next.as_str()), (names, next));
    }
    for (selector, limit, after) in [("a=b=c", 0, ""), ("", 1_001, ""), ("", 0, "a b")] {
        let (selector, after) = (selector.into(), after.into());
        let wrong = client.list_rollouts(ListRolloutsRequest { current: false, selector, limit, after }).await;
        assert_eq!(wrong.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
    let request = GetRolloutRequest { service: "svc-0".into(), current: false };
    let told = client.get_rollout(request).await.unwrap().into_inner().rollout.unwrap();
    let (_, _, json) = http(a.port, "GET", "/v1/rollouts/svc-0", "", "").await;
    assert_eq!((told.labels["team"].as_str(), told.slot, told.steps), ("fraud", 2, 2));
    assert_eq!(serde_json::from_str::<Value>(&told.manifest).unwrap(), json["manifest"]);
    assert_eq!((json!(told.hash), json!(told.transaction_id)), (json["hash"].clone(), json["txid"].clone()));
    assert_eq!((told.canary_weight_bp, told.mode), (500, json["mode"].as_str().unwrap().to_string()));
}

#[tokio::test]
async fn a_rollout_is_told_with_its_labels_and_the_file_that_is_in_force() {
    let a = node("a", "a", &[], None).await;
    a.handle.published.publish(five_services());
    let (_, text, json) = http(a.port, "GET", "/v1/rollouts/svc-0", "", "").await;
    let view: RolloutView = serde_json::from_str(&text).unwrap_or_else(|why| panic!("{why}: {text}"));
    assert_eq!(serde_json::to_value(&view).unwrap(), json, "what a client reads is what was sent");
    assert_eq!(json["metadata"], json!({"labels": {"team": "fraud"}, "annotations": {}}));
    let file = aviary::config::rollout::parse(&json["manifest"].to_string(), "m").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(file.value(), json["manifest"], "the file is the one that is in force");
    assert_eq!(file.labels["team"], "fraud");
}

#[tokio::test]
async fn clients_read_what_nodes_answer() {
    let a = node("a", "a", &[], None).await;
    async fn reads<T: serde::de::DeserializeOwned + serde::Serialize>(port: u16, path: &str) {
        let (status, text, json) = http(port, "GET", path, "", "").await;
        assert_eq!(status, 200, "{path}: {text}");
        let read: T = serde_json::from_str(&text).unwrap_or_else(|why| panic!("{path}: {why}: {text}"));
        assert_eq!(serde_json::to_value(&read).unwrap(), json, "{path}");
    }
    reads::<RoutingView>(a.port, "/routing/state?service=svc").await;
    reads::<HealthView>(a.port, "/health/snapshot?service=svc").await;
    reads::<RolloutView>(a.port, "/v1/rollouts/svc").await;
    reads::<History>(a.port, "/v1/rollouts/svc/history").await;
    reads::<ClusterView>(a.port, "/v1/cluster").await;
}

#[tokio::test]
async fn a_write_is_decided_here_when_the_coordinator_is_gone_or_breaks() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = gone.local_addr().unwrap().port();
    drop(gone);
    let b = node("b", "a", &[("a", port)], None).await;
    let (status, _, json) = http(b.port, "POST", "/v1/rollouts/svc/abort", "idempotency-key: k1\r\n", "{}").await;
    assert_eq!((status, &json["txid"]), (200, &json!("k1")));
    let breaks = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = breaks.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = breaks.accept().await {
            drop(stream)
        }
    });
    let c = node("c", "a", &[("a", port)], None).await;
    assert_eq!(http(c.port, "POST", "/v1/rollouts/svc/abort", "", "{}").await.0, 200);
    assert_eq!((b.asked.lock().unwrap().len(), c.asked.lock().unwrap().len()), (1, 1));
}

/// A coordinator that keeps its connections, and answers nothing.
async fn stopped() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.push(stream);
        }
    });
    port
}

#[tokio::test]
async fn an_abort_is_decided_here_within_its_bound_when_the_coordinator_stands_still() {
    let b = node("b", "a", &[("a", stopped().await)], None).await;
    let began = tokio::time::Instant::now();
    let (status, text, _) = http(b.port, "POST", "/v1/rollouts/svc/abort", "", "{}").await;
    assert!(status == 200 && began.elapsed() < Duration::from_millis(2_400), "{:?}: {text}", began.elapsed());
}

#[tokio::test]
async fn a_write_is_decided_here_once_another_node_coordinates() {
    let b = node("b", "a", &[("a", stopped().await)], None).await;
    let published = b.handle.published.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        published.publish(view("b", "b", 2, rollback().1));
    });
    let began = tokio::time::Instant::now();
    let (status, text, _) = http(b.port, "POST", "/v1/rollouts/svc/promote", "", "{}").await;
    assert!(status == 200 && began.elapsed() < Duration::from_millis(900), "{:?}: {text}", began.elapsed());
}

#[tokio::test]
async fn a_repeated_write_is_answered_with_the_state_of_then() {
    let a = node("a", "a", &[], None).await;
    let (status, _, json) = http(a.port, "POST", "/v1/rollouts/svc/promote", "idempotency-key: again\r\n", "{}").await;
    assert_eq!((status, &json["state"]["version"], &json["state"]["txid"]), (200, &json!(1), &json!("tx-1")), "{json}");
}

#[tokio::test]
async fn a_page_in_a_browser_neither_changes_nor_reads_anything() {
    let a = node("a", "a", &[], None).await;
    let abort = |headers: &'static str| http(a.port, "POST", "/v1/rollouts/svc/abort", headers, "{}");
    assert_eq!(abort("content-type: text/plain\r\norigin: http://evil.example\r\n").await.0, 403);
    assert_eq!(abort("content-type: text/plain\r\n").await.0, 415);
    let mut stream = TcpStream::connect(("127.0.0.1", a.port)).await.unwrap();
    stream.write_all(b"GET /v1/cluster HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 403 ") && text.contains("PERMISSION_DENIED"), "{text}");
    assert!(a.asked.lock().unwrap().is_empty());
    assert_eq!(abort("").await.0, 200);
}

#[tokio::test]
async fn a_node_without_a_majority_is_ready_until_its_servers_fail() {
    let a = node("a", "a", &[], None).await;
    let asked = async |path: &str| http(a.port, "GET", path, "", "").await.0;
    assert_eq!((asked("/readyz").await, asked("/readyz?quorum").await), (200, 503));
    a.handle.published.set_has_servers(false);
    assert_eq!((asked("/readyz").await, asked("/readyz?quorum").await, asked("/livez").await), (503, 503, 200));
    a.handle.published.set_has_servers(true);
    let now = aviary::ports::Clock::now(&BootClock).mono;
    a.handle.published.set_lease(Some(now));
    assert_eq!((asked("/readyz").await, asked("/readyz?quorum").await), (200, 200));
}

#[tokio::test]
async fn a_role_may_what_it_may_and_no_more() {
    let hash = |t: &str| blake3::hash(t.as_bytes());
    let file = format!("viewer {}\noperator {}\nadmin {}\n", hash("v"), hash("o"), hash("a"));
    let a = node("a", "a", &[], Some(&file)).await;
    let cases = [
        ("GET", "/v1/rollouts", "", 401),
        ("GET", "/v1/rollouts", "nobody", 401),
        ("GET", "/v1/rollouts", "v", 200),
        ("HEAD", "/v1/rollouts", "v", 200),
        ("POST", "/v1/rollouts/svc/abort", "v", 403),
        ("POST", "/v1/rollouts/svc/abort", "o", 200),
        ("POST", "/v1/cluster/cordon", "o", 403),
        ("POST", "/v1/cluster/cordon", "a", 200),
        ("GET", "/livez", "", 200),
        ("GET", "/lease/none", "", 503),
        ("GET", "/metrics", "", 401),
        ("GET", "/nowhere", "", 401),
        ("GET", "/v1/events", "", 401),
    ];
    let mut wrong = Vec::new();
    for (method, path, token, expected) in cases {
        let header = if token.is_empty() { String::new() } else { format!("authorization: Bearer {token}\r\n") };
        let (status, text, _) = http(a.port, method, path, &header, "{\"node\":\"c\"}").await;
        // `abort` takes no `node`: its 400 shows that the role was enough.
        let enough = status == expected || (path.ends_with("abort") && expected == 200 && status == 400);
        if !enough {
            wrong.push(format!("{method} {path} as {token:?}: {status}, expected {expected}: {text}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
