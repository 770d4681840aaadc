//! What a rollout file says of requests, and interim answers: the same on every way in and out.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use aviary::domain::assignment::{HashFunction, Salt, TicketHash, UserAssignment};
use aviary::domain::plan::{HashOn, RolloutSpec, SetCookie, Timeouts};
use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proxy::{SOON, World, head, hold_lease, settings, upstream, view_of, world_with};

const WAYS: [Way; 3] = [Way::Http10, Way::Http11, Way::Http2];
const MS: Duration = Duration::from_millis(1);

/// A way by which a request reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Http10,
    Http11,
    Http2,
}

/// What came back.
#[derive(Debug, Default)]
struct Seen {
    /// Statuses of interim answers.
    interim: Vec<u16>,
    status: u16,
    fields: Vec<(String, String)>,
    body: Vec<u8>,
    /// All of the body came.
    is_whole: bool,
    grpc_status: Option<String>,
}

impl Seen {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// What a server tells of a request for `/late`.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Begun,
    /// It ended, though no answer came.
    Ended,
}

/// Starts a server of HTTP/1.1 (`http`) or HTTP/2 (`h2c`), and returns its URL and what it tells.
///
/// `/late` is never answered, `/silent` says two bytes of ten, `/call` the first two of a stream, `/hint` sends 100 (by HTTP/1.1) and
/// 103 before its answer.
async fn server(protocol: &str) -> (String, mpsc::UnboundedReceiver<Told>) {
    let (tell, told) = mpsc::unbounded_channel();
    let address: SocketAddr = match protocol {
        "http" => upstream(move |stream| http1(stream, tell.clone())).await,
        _ => upstream(move |stream| http2(stream, tell.clone())).await,
    };
    (format!("{protocol}://{address}"), told)
}

async fn http1(mut stream: TcpStream, tell: mpsc::UnboundedSender<Told>) {
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    loop {
        let asked = head(&mut stream).await;
        let answer = match asked.split(' ').nth(1).unwrap_or("") {
            "" => return,
            "/late" => String::new(),
            "/silent" => OK.replace("length: 2", "length: 10"),
            "/call" => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n".into(),
            "/hint" => format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n{OK}"),
            _ => OK.into(),
        };
        let _ = stream.write_all(answer.as_bytes()).await;
        if answer.is_empty() {
            let _ = tell.send(Told::Begun);
            while stream.read(&mut [0; 64]).await.is_ok_and(|length| length > 0) {}
            let _ = tell.send(Told::Ended);
        }
    }
}

async fn http2(stream: TcpStream, tell: mpsc::UnboundedSender<Told>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let tell = tell.clone();
        tokio::spawn(async move {
            let path = request.uri().path().to_string();
            let mut answer = Response::new(());
            match path.as_str() {
                "/late" => {
                    let _ = tell.send(Told::Begun);
                    let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                    let _ = tell.send(Told::Ended);
                    return;
                }
                "/hint" => {
                    let mut hint = Response::new(());
                    *hint.status_mut() = StatusCode::EARLY_HINTS;
                    hint.headers_mut().insert("link", "</a>".parse().unwrap());
                    respond.send_informational(hint).unwrap();
                }
                _ => {}
            }
            match path.as_str() {
                "/call" => {}
                "/silent" => drop(answer.headers_mut().insert("content-length", 10.into())),
                _ => drop(answer.headers_mut().insert("content-length", 2.into())),
            }
            let mut send = respond.send_response(answer, false).unwrap();
            let is_silent = ["/silent", "/call"].contains(&path.as_str());
            let _ = send.send_data(Bytes::from_static(b"ok"), !is_silent);
            if is_silent {
                let _ = std::future::poll_fn(|cx| send.poll_reset(cx)).await;
            }
        });
    }
}

/// Returns a proxy whose rollout, changed so, has both versions at one server.
async fn world_of(url: &str, bp: u16, settings: ProxySettings, change: impl FnOnce(&mut RolloutSpec)) -> World {
    let view = view_of(None, None, bp, |spec| {
        spec.stable.urls = vec![url.into()];
        spec.canary.urls = vec![url.into()];
        change(spec);
    });
    world_with(view, settings).await
}

async fn ask(world: &World, way: Way, path: &str, fields: &[(&str, &str)]) -> Seen {
    hold_lease(&world.node);
    let asked = async {
        match way {
            Way::Http2 => by_http2(world, path, fields).await,
            _ => by_http1(world, way, path, fields).await,
        }
    };
    timeout(SOON, asked).await.expect("an end in time")
}

fn http1_request(way: Way, path: &str, fields: &[(&str, &str)]) -> String {
    let version = if way == Way::Http10 { "1.0" } else { "1.1" };
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("GET {path} HTTP/{version}\r\nhost: x\r\nconnection: close\r\n{fields}\r\n")
}

async fn by_http1(world: &World, way: Way, path: &str, fields: &[(&str, &str)]) -> Seen {
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(http1_request(way, path, fields).as_bytes()).await.unwrap();
    let (mut seen, mut length) = (Seen::default(), None);
    loop {
        let text = head(&mut stream).await;
        let mut lines = text.trim_end().split("\r\n");
        seen.status = lines.next().unwrap().split(' ').nth(1).map_or(0, |status| status.parse().unwrap());
        let fields = lines.map(|line| line.split_once(": ").unwrap());
        seen.fields = fields.map(|(name, value)| (name.to_lowercase(), value.to_string())).collect();
        if seen.status >= 200 || seen.status == 0 {
            length = seen.field("content-length").map(|length| length.parse::<usize>().unwrap()).or(length);
            break;
        }
        seen.interim.push(seen.status);
    }
    let _ = stream.read_to_end(&mut seen.body).await;
    seen.is_whole = length == Some(seen.body.len());
    seen
}

fn http2_request(path: &str, fields: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::get(format!("http://x{path}"));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

async fn by_http2(world: &World, path: &str, fields: &[(&str, &str)]) -> Seen {
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (mut answer, _) = send.send_request(http2_request(path, fields), true).unwrap();
    let mut seen = Seen::default();
    while let Some(hint) = std::future::poll_fn(|cx| answer.poll_informational(cx)).await {
        seen.interim.push(hint.unwrap().status().as_u16());
    }
    let (head, mut body) = answer.await.unwrap().into_parts();
    seen.status = head.status.as_u16();
    let told =
        |(name, value): (&http::HeaderName, &http::HeaderValue)| (name.to_string(), value.to_str().unwrap().into());
    seen.fields = head.headers.iter().map(told).collect();
    seen.grpc_status = seen.field("grpc-status").map(str::to_string);
    loop {
        match body.data().await {
            Some(Ok(data)) => seen.body.extend_from_slice(&data),
            Some(Err(_)) => return seen,
            None => break,
        }
    }
    if let Ok(Some(trailers)) = body.trailers().await {
        seen.grpc_status = trailers.get("grpc-status").map(|status| status.to_str().unwrap().to_string());
    }
    seen.is_whole = true;
    seen
}

const OUTS: [&str; 2] = ["http", "h2c"];

#[tokio::test]
async fn a_client_without_the_cookie_is_given_one_and_stays_where_it_was() {
    let cookie = |spec: &mut RolloutSpec| {
        spec.hash_on = Some(HashOn::Cookie("sid".into()));
        spec.set_cookie = Some(SetCookie { max_age_ms: Some(3_600_000) });
    };
    let mut worlds = Vec::new();
    for out in OUTS {
        worlds.push((out, world_of(&server(out).await.0, 5_000, settings(), cookie).await));
    }
    let by_nodes = view_of(None, None, 5_000, cookie);
    worlds.push(("the node itself", world_with(by_nodes, settings()).await));
    for (out, world) in &worlds {
        let mut versions = BTreeSet::new();
        for way in WAYS {
            for client in 0..12 {
                let named = if client % 2 == 0 { &[][..] } else { &[("cookie", "a=1; sid=")] };
                let first = ask(world, way, "/", named).await;
                let given = first.field("set-cookie").unwrap_or_else(|| panic!("{way:?} to {out}: {first:?}"));
                let (pair, attributes) = given.split_once("; ").unwrap();
                assert_eq!(attributes, "Path=/; Max-Age=3600; HttpOnly; SameSite=Lax");
                let version = first.field("x-served-by").unwrap();
                versions.insert(version.to_string());
                for way in WAYS {
                    let again = ask(world, way, "/", &[("cookie", pair)]).await;
                    assert_eq!(again.field("x-served-by"), Some(version), "{way:?} to {out} with {pair}");
                    assert_eq!(again.field("set-cookie"), None, "{way:?} to {out}");
                }
            }
        }
        assert_eq!(versions.len(), 2, "to {out}");
    }
    // A rollout that leaves it to applications sets none.
    let (url, _) = server("http").await;
    let world = world_of(&url, 5_000, settings(), |spec| spec.hash_on = Some(HashOn::Cookie("sid".into()))).await;
    assert_eq!(ask(&world, Way::Http11, "/", &[]).await.field("set-cookie"), None);
}

#[tokio::test]
async fn users_are_assigned_by_the_rollouts_function_and_salt() {
    let rules = [
        (HashFunction::Xxh3, Salt::Unsaid, None),
        (HashFunction::Xxh3, Salt::Rollout(Some(7)), Some(7)),
        (HashFunction::Xxh3, Salt::Rollout(Some(8)), Some(8)),
        (HashFunction::Xxh64, Salt::None, None),
    ];
    let mut canaries = BTreeSet::new();
    for (function, salt, salt_slot) in rules {
        let mut first = None;
        for out in OUTS {
            let salted = |spec: &mut RolloutSpec| (spec.hash_function, spec.salt) = (function, salt);
            let world = world_of(&server(out).await.0, 5_000, settings(), salted).await;
            let service = world.node.published.view().services.keys().next().unwrap().clone();
            let hash = TicketHash::of(&service, UserAssignment { function, salt_slot });
            for way in WAYS {
                let mut of_canary = Vec::new();
                for user in (0..24).map(|user| format!("u{user}")) {
                    let seen = ask(&world, way, "/", &[("x-user", &user)]).await;
                    let is_canary = seen.field("x-served-by") == Some("v2");
                    assert_eq!(is_canary, hash.ticket(user.as_bytes()) < 5_000, "{user} by {way:?} to {out}: {salt:?}");
                    of_canary.extend(is_canary.then_some(user));
                }
                assert_eq!(first.get_or_insert_with(|| of_canary.clone()), &of_canary, "{way:?} to {out}");
            }
        }
        canaries.insert(first.unwrap());
    }
    assert_eq!(canaries.len(), rules.len(), "each begins with users of its own");
}

/// Returns a rollout's change that limits its requests.
fn limited(first_byte_ms: u64, idle_ms: u64, total_ms: u64) -> impl Fn(&mut RolloutSpec) + Copy {
    move |spec| {
        let [first_byte_ms, idle_ms, total_ms] = [first_byte_ms, idle_ms, total_ms].map(Some);
        spec.timeouts = Timeouts { first_byte_ms, idle_ms, total_ms };
    }
}

const PATIENT: fn() -> ProxySettings =
    || ProxySettings { first_byte_timeout_ms: 60_000, idle_timeout_ms: 60_000, ..settings() };

#[tokio::test]
async fn a_service_has_its_own_time_limits() {
    for out in OUTS {
        let (url, _told) = server(out).await;
        for way in WAYS {
            let mut world = world_of(&url, 10_000, PATIENT(), limited(150, 60_000, 0)).await;
            let late = ask(&world, way, "/late", &[]).await;
            let words = String::from_utf8_lossy(&late.body).into_owned();
            assert_eq!(late.status, 504, "{way:?} to {out}: {words}");
            assert!(words.contains("v2 sent no answer within 150 ms"), "{way:?} to {out}: {words}");
            assert_eq!(world.told_within(400 * MS).await, (1, 1, 0), "the server's failure: {way:?} to {out}");

            let world = world_of(&url, 10_000, PATIENT(), limited(60_000, 60_000, 150)).await;
            let late = ask(&world, way, "/late", &[]).await;
            assert_eq!(late.status, 504, "{way:?} to {out}");
            assert!(String::from_utf8_lossy(&late.body).contains("within 150 ms"), "{way:?} to {out}");

            for limits in [limited(60_000, 150, 0), limited(60_000, 60_000, 150)] {
                let mut world = world_of(&url, 10_000, PATIENT(), limits).await;
                let cut = ask(&world, way, "/silent", &[]).await;
                assert_eq!((cut.status, &*cut.body, cut.is_whole), (200, &b"ok"[..], false), "{way:?} to {out}");
                assert_eq!(world.told_within(400 * MS).await, (1, 1, 0), "the server's failure: {way:?} to {out}");
            }
            // A service may take longer than the node's limit, too.
            let short = ProxySettings { total_timeout_ms: 1, ..PATIENT() };
            let world = world_of(&url, 10_000, short, limited(60_000, 60_000, 0)).await;
            assert_eq!(ask(&world, way, "/", &[]).await.status, 200, "{way:?} to {out}");
        }
    }
}

#[tokio::test]
async fn a_grpc_call_has_the_time_that_its_client_gives_it() {
    const CALL: (&str, &str) = ("content-type", "application/grpc");
    for out in OUTS {
        let world = world_of(&server(out).await.0, 10_000, PATIENT(), |_| {}).await;
        for way in WAYS {
            let late = ask(&world, way, "/late", &[CALL, ("grpc-timeout", "150m")]).await;
            match way {
                Way::Http2 => assert_eq!((late.status, late.grpc_status.as_deref()), (200, Some("4")), "to {out}"),
                _ => assert_eq!(late.status, 504, "{way:?} to {out}"),
            }
            let cut = ask(&world, way, "/call", &[CALL, ("grpc-timeout", "150000u")]).await;
            match way {
                Way::Http2 => assert_eq!((&*cut.body, cut.grpc_status.as_deref()), (&b"ok"[..], Some("4")), "to {out}"),
                // Without its last chunk, or its length, it doesn't look whole to clients that can tell.
                _ => assert!(!cut.body.ends_with(b"0\r\n\r\n"), "{way:?} to {out}"),
            }
            // What has a length is cut, for it can have no trailers before that.
            let cut = ask(&world, way, "/silent", &[CALL, ("grpc-timeout", "150m")]).await;
            assert!(!cut.is_whole && cut.grpc_status.is_none(), "{way:?} to {out}: {cut:?}");
        }
        // The service's limit is the shorter one; and what is no call has no deadline.
        let world = world_of(&server(out).await.0, 10_000, PATIENT(), limited(60_000, 60_000, 150)).await;
        let late = ask(&world, Way::Http2, "/late", &[CALL, ("grpc-timeout", "1H")]).await;
        assert_eq!((late.status, late.grpc_status.as_deref()), (200, Some("4")), "to {out}");
        let late = ask(&world, Way::Http2, "/late", &[("grpc-timeout", "1n")]).await;
        assert_eq!(late.status, 504, "to {out}");
        assert!(String::from_utf8_lossy(&late.body).contains("within 150 ms"), "to {out}: {late:?}");
    }
}

#[tokio::test]
async fn early_hints_reach_clients_that_can_take_them() {
    for out in OUTS {
        let world = world_of(&server(out).await.0, 10_000, settings(), |_| {}).await;
        for way in WAYS {
            let seen = ask(&world, way, "/hint", &[]).await;
            // HTTP/1.0 has no interim answers; 100 is for clients that wait for it.
            let expected = if way == Way::Http10 { &[][..] } else { &[103] };
            assert_eq!((seen.interim.as_slice(), seen.status), (expected, 200), "{way:?} to {out}");
            assert_eq!((&*seen.body, seen.is_whole), (&b"ok"[..], true), "{way:?} to {out}");
        }
    }
}

/// Sends a request for `/late`, and has its client leave: HTTP/1.x ends its side, HTTP/2 resets the stream.
async fn leave(world: &World, way: Way, told: &mut mpsc::UnboundedReceiver<Told>) -> Option<TcpStream> {
    hold_lease(&world.node);
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    if way != Way::Http2 {
        stream.write_all(http1_request(way, "/late", &[]).as_bytes()).await.unwrap();
        assert_eq!(timeout(SOON, told.recv()).await.unwrap(), Some(Told::Begun));
        stream.shutdown().await.unwrap();
        return Some(stream);
    }
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (_, mut request) = send.send_request(http2_request("/late", &[]), true).unwrap();
    assert_eq!(timeout(SOON, told.recv()).await.unwrap(), Some(Told::Begun));
    request.send_reset(h2::Reason::CANCEL);
    None
}

#[tokio::test]
async fn what_a_client_left_ends_at_its_server_where_the_rollout_says_so() {
    for out in OUTS {
        for (way, cancels) in WAYS.into_iter().flat_map(|way| [(way, true), (way, false)]) {
            let (url, mut told) = server(out).await;
            let mut world = world_of(&url, 10_000, PATIENT(), |spec| spec.cancel_on_disconnect = cancels).await;
            let _client = leave(&world, way, &mut told).await;
            let wait = if cancels { SOON } else { 500 * MS };
            let has_ended = timeout(wait, told.recv()).await == Ok(Some(Told::Ended));
            assert_eq!(has_ended, cancels || way == Way::Http2, "{way:?} to {out}, told to: {cancels}");
            assert_eq!(world.told_within(200 * MS).await, (0, 0, 0), "nobody's failure: {way:?} to {out}");
        }
    }
}
