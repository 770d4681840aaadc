//! What load balancers and operators get from the data port: readiness, leases, answers that end connections while the node drains.
//! Each by every way in, and to servers of HTTP/1.1 and HTTP/2.

use std::io::Write;
use std::sync::{Arc, Mutex};

use aviary::domain::weights::Weight;
use aviary::protocol::{Hold, Serving, View};
use aviary::proxy::access::{AccessLog, AccessLogFormat};
use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::edges::http2;
use crate::proxy::{OK, SOON, World, answering, ask, hold_lease, nowhere, settings, view, view_of, world, world_with};
use crate::ways::{both_worlds, both_worlds_with};

/// A way by which a request reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Http10,
    Http11,
    Http2,
}

pub(crate) const WAYS: [Way; 3] = [Way::Http10, Way::Http11, Way::Http2];

/// Sends a GET on a connection of its own, with these header lines, and returns the status and the body.
pub(crate) async fn get(world: &World, way: Way, target: &str, fields: &[(&str, &str)]) -> (u16, String) {
    let version = match way {
        Way::Http10 => "1.0",
        Way::Http11 => "1.1",
        Way::Http2 => return get_http2(world, target, fields).await,
    };
    let mut request = format!("GET {target} HTTP/{version}\r\nhost: x\r\nconnection: close\r\n");
    fields.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
    let answer = world.raw(&format!("{request}\r\n")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
}

async fn get_http2(world: &World, target: &str, fields: &[(&str, &str)]) -> (u16, String) {
    let mut request = Request::get(format!("http://x{target}"));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let mut sender = http2(world).await;
    let (answer, _) = sender.send_request(request.body(()).unwrap(), true).unwrap();
    let answer = timeout(SOON, answer).await.expect("an answer in time").unwrap();
    let status = answer.status().as_u16();
    (status, read(answer.into_body()).await)
}

async fn read(mut body: h2::RecvStream) -> String {
    let mut all = Vec::new();
    while let Some(piece) = timeout(SOON, body.data()).await.expect("a body in time") {
        let piece: Bytes = piece.unwrap();
        body.flow_control().release_capacity(piece.len()).unwrap();
        all.extend_from_slice(&piece);
    }
    String::from_utf8(all).unwrap()
}

/// Publishes the view again with another serving of the service.
fn serve(world: &World, change: impl FnOnce(&mut Serving)) {
    let mut view: View = (*world.node.published.view()).clone();
    let services = Arc::make_mut(&mut view.services);
    let service = services.values_mut().next().unwrap();
    change(&mut Arc::make_mut(service).serving);
    world.node.published.publish(Arc::new(view));
}

#[tokio::test]
async fn a_lease_is_told_to_load_balancers() {
    for way in WAYS {
        let world = world(view(Some(answering(OK).await), None, 1_000)).await;
        let lease = async |name: &str| {
            let (status, body) = get(&world, way, &format!("/lease/{name}"), &[]).await;
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            (status, body)
        };
        let (status, body) = lease("fraud").await;
        let told = (&body["service"], &body["version"], &body["weight"]);
        assert_eq!((status, told), (200, (&"fraud".into(), &"v2".into(), &0.1.into())), "{body}");
        assert!((1..=2_000).contains(&body["lease_ms_left"].as_u64().unwrap()), "{body}");
        assert_eq!(lease("fr%61ud").await.0, 200, "by {way:?}");
        let refused = async |name: &str, why: &str| {
            let (status, body) = lease(name).await;
            let detail = body["detail"].as_str().unwrap();
            assert!(status == 503 && detail.contains(why), "{status} {body} by {way:?}, expected {why:?}");
            assert_eq!(body["code"], "UNAVAILABLE");
            assert!(name == "fraud" || !body.to_string().contains("fraud"), "the services are listed: {body}");
        };
        refused("none", "unknown here").await;
        // Without a majority there is no lease.
        world.node.published.set_lease(None);
        refused("fraud", "the lease has ended").await;
        // With `onPartition: hold` the share needs none.
        serve(&world, |serving| serving.lease_ms = None);
        let (status, body) = lease("fraud").await;
        assert!(status == 200 && body["lease_ms_left"].is_null(), "{body}");
        hold_lease(&world.node);
        serve(&world, |serving| {
            serving.held_back = Some(Hold::Local("it fails".into()));
            serving.canary.as_mut().unwrap().1 = 0;
        });
        refused("fraud", "local hold: it fails").await;
        serve(&world, |serving| serving.held_back = None);
        refused("fraud", "the canary has no share").await;
        serve(&world, |serving| serving.canary = None);
        refused("fraud", "the canary has no share").await;
        serve(&world, |serving| serving.canary = Some((serving.spec.canary.clone(), 10_000)));
        assert_eq!(lease("fraud").await.0, 200);
        world.node.published.leave();
        refused("fraud", "about to stop").await;
    }
}

#[tokio::test]
async fn the_paths_of_load_balancers_can_be_the_services() {
    let settings = ProxySettings { status_paths: false, ..settings() };
    let world = world_with(view(Some(answering(OK).await), None, 0), settings).await;
    for way in WAYS {
        for path in ["/lease/fraud", "/readyz", "/routing/state"] {
            assert_eq!(get(&world, way, path, &[]).await, (200, "ok".into()), "{path} by {way:?}");
        }
    }
    let own = crate::proxy::world(view(Some(answering(OK).await), None, 0)).await;
    for path in ["/lease", "/lease/", "/lease/a/b", "/leases/fraud"] {
        assert_eq!(get(&own, Way::Http11, path, &[]).await.1, "ok", "{path} is no path of the node's");
    }
}

#[tokio::test]
async fn the_data_port_lists_no_services() {
    let world = world(view(Some(answering(OK).await), None, 0)).await;
    for way in WAYS {
        let asked = [
            ("/routing/state?service=none", &[][..], 404),
            ("/health/snapshot?service=none", &[], 404),
            ("/predict", &[("x-aviary-service", "none")], 404),
            ("/lease/none", &[], 503),
        ];
        for (path, fields, expected) in asked {
            let (status, body) = get(&world, way, path, fields).await;
            assert!(status == expected && !body.contains("fraud"), "{path} by {way:?}: {status} {body}");
        }
    }
}

#[tokio::test]
async fn a_draining_proxy_ends_each_connection_with_an_answer() {
    for (out, world) in both_worlds().await {
        let mut early = TcpStream::connect(world.address).await.unwrap();
        let request = "GET /a HTTP/1.1\r\nhost: m.example\r\n\r\n";
        let kept = "GET /a HTTP/1.0\r\nhost: m.example\r\nconnection: keep-alive\r\n\r\n";
        assert!(!ask(&mut early, request).await.contains("connection: close"), "to {out}");
        let mut streams = http2(&world).await;
        world.node.published.leave();
        // Also for answers of the node's own, and of HTTP/1.0 clients that would stay.
        for request in [request, kept, "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"] {
            let mut late = TcpStream::connect(world.address).await.unwrap();
            let answer = ask(&mut late, request).await;
            assert!(answer.contains(" 200 ") && !answer.to_lowercase().contains("keep-alive"), "{answer}");
            assert!(request == kept || answer.contains("connection: close"), "to {out}: {answer}");
            assert_eq!(timeout(SOON, late.read(&mut [0; 1])).await.expect("an end").unwrap(), 0);
        }
        assert!(ask(&mut early, request).await.contains("connection: close"), "to {out}");
        assert_eq!(timeout(SOON, early.read(&mut [0; 1])).await.expect("an end").unwrap(), 0);
        // A stream is answered, and the connection takes no other one after it.
        let asked = || Request::get("http://m.example/a").body(()).unwrap();
        let (answer, _) = streams.send_request(asked(), true).unwrap();
        let answer = timeout(SOON, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200, "to {out}");
        read(answer.into_body()).await;
        let ended = timeout(SOON, async {
            while std::future::poll_fn(|cx| streams.poll_ready(cx)).await.is_ok() {
                tokio::task::yield_now().await;
            }
        });
        ended.await.expect("a connection that takes no more streams");
        assert_eq!(get(&world, Way::Http2, "/a", &[]).await.0, 200, "a new connection to {out}");
    }
}

#[tokio::test]
async fn a_refusal_of_a_draining_proxy_ends_the_connection() {
    let refused = crate::proxy::upstream(|_| async {}).await;
    let world = world(view(Some(refused), None, 0)).await;
    world.node.published.leave();
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.expect("an end").unwrap();
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("connection: close"), "{answer}");
}

/// Lines that an access log wrote.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// Returns the settings of a proxy that logs here.
    fn settings(&self) -> ProxySettings {
        let access = AccessLog::start(self.clone(), AccessLogFormat::Json, Weight::FULL).unwrap();
        ProxySettings { access, ..settings() }
    }

    /// Waits for this many lines, and takes them.
    async fn take(&self, count: usize) -> Vec<serde_json::Value> {
        let there = timeout(SOON, async {
            while self.0.lock().unwrap().iter().filter(|byte| **byte == b'\n').count() < count {
                tokio::task::yield_now().await;
            }
        });
        let is_there = there.await.is_ok();
        let text = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
        let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(is_there && lines.len() == count, "{lines:#?}, expected {count} lines");
        lines
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_line_of_the_access_log() {
    let lines = Lines::default();
    for (out, world) in both_worlds_with(lines.settings()).await {
        let server = world.node.published.view().services.values().next().unwrap().serving.stable.urls[0].clone();
        for (way, protocol) in WAYS.into_iter().zip(["HTTP/1.0", "HTTP/1.1", "HTTP/2.0"]) {
            let fields = [("x-request-id", "r \"1\"")];
            let (status, body) = get(&world, way, "/a?b=c&d", &fields).await;
            let line = &lines.take(1).await[0];
            let expected = serde_json::json!({
                "client": "127.0.0.1", "protocol": protocol, "method": "GET", "path": "/a?b=c&d", "status": status,
                "bytes": body.len(), "tries": 1, "service": "fraud", "version": "v1",
                "server": server.split_once("://").unwrap().1, "request_id": "r \"1\"",
                "time": line["time"], "duration_ms": line["duration_ms"],
            });
            assert!(*line == expected && status == 200, "by {way:?} to {out}: {line}, expected {expected}");
            assert!(line["duration_ms"].as_f64().unwrap() < 5_000.0 && line["time"].as_str().unwrap().ends_with('Z'));
            // What no server gets.
            for (path, fields, expected) in
                [("/livez", &[][..], 200), ("/x", &[("x-aviary-service", "none")], 404), ("/lease/none", &[], 503)]
            {
                let (status, body) = get(&world, way, path, fields).await;
                let line = &lines.take(1).await[0];
                let told = (&line["path"], &line["status"], &line["tries"], &line["bytes"]);
                assert_eq!(told, (&path.into(), &expected.into(), &0.into(), &body.len().into()), "by {way:?}: {line}");
                assert!(status == expected && line["service"].is_null(), "by {way:?}: {line}");
            }
        }
        for malformed in ["GET hello HTTP/1.1\r\nhost: x\r\n\r\n", "nonsense\r\n\r\n"] {
            assert!(world.raw(malformed).await.starts_with("HTTP/1.1 400"));
            let line = &lines.take(1).await[0];
            assert!(line["status"] == 400 && line["path"].is_null() && line["client"] == "127.0.0.1", "{line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_tells_failures() {
    let lines = Lines::default();
    // The first server refuses, the second one answers.
    let (dead, alive) = (nowhere().await, answering(OK).await);
    let urls = vec![format!("http://{dead}"), format!("http://{alive}")];
    let world = world_with(view_of(Some(alive), None, 0, |spec| spec.stable.urls = urls), lines.settings()).await;
    for way in WAYS {
        assert_eq!(get(&world, way, "/", &[]).await.0, 200);
        let line = &lines.take(1).await[0];
        assert_eq!((&line["server"], &line["tries"]), (&alive.to_string().into(), &2.into()), "by {way:?}: {line}");
    }
    let world = world_with(view(Some(dead), None, 0), lines.settings()).await;
    for way in WAYS {
        let (status, body) = get(&world, way, "/", &[]).await;
        let line = &lines.take(1).await[0];
        let told = (&line["status"], &line["bytes"], &line["server"]);
        assert_eq!(told, (&502.into(), &body.len().into(), &dead.to_string().into()), "by {way:?}: {line}");
        assert_eq!(status, 502);
    }
    // A stream whose client leaves.
    let silent = crate::proxy::upstream(|stream| async move {
        let _open = stream;
        tokio::time::sleep(SOON).await;
    });
    let world = world_with(view(Some(silent.await), None, 0), lines.settings()).await;
    let mut sender = http2(&world).await;
    let (_, mut stream) = sender.send_request(Request::get("http://x/").body(()).unwrap(), true).unwrap();
    // The proxy has begun with it.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    stream.send_reset(h2::Reason::CANCEL);
    assert_eq!(lines.take(1).await[0]["status"], 499);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_the_requests_is_logged_and_no_copies() {
    let lines = Lines::default();
    let access = |percent| {
        let sample = Weight::from_percent(percent).unwrap();
        ProxySettings { access: AccessLog::start(lines.clone(), AccessLogFormat::Json, sample).unwrap(), ..settings() }
    };
    let server = answering(OK).await;
    let none = world_with(view(Some(server), None, 0), access(0.0)).await;
    let all = view_of(Some(server), None, 1, |spec| spec.mirror = Weight::FULL);
    let all = world_with(all, access(100.0)).await;
    for way in WAYS {
        assert_eq!(get(&none, way, "/", &[]).await.0, 200);
        assert_eq!(get(&all, way, "/", &[]).await.0, 200);
        assert_eq!(lines.take(1).await[0]["tries"], 1, "by {way:?}");
    }
    lines.take(0).await;
}
