//! What a proxy is blamed for by its users: who counts as failed, which requests are repeated, how answers that were cut look. Each
//! kind on every way through the proxy that it can take.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aviary::domain::ids::VersionId;
use aviary::domain::weights::Weight;
use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proxy::{
    FAILED, OK, SOON, World, answering, ask, grpc, head, hold_lease, served_by, settings, upstream, view, view_of,
    world, world_with,
};

const NOT_IMPLEMENTED: &str = "HTTP/1.1 501 Not Implemented\r\ncontent-length: 2\r\n\r\nno";
/// Time in which the node is told of what was counted.
const TOLD: Duration = Duration::from_millis(300);

/// Returns an HTTP/2 connection to the proxy.
pub(crate) async fn http2(world: &World) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

/// Sends a request without a body by HTTP/2, and returns its status and X-Served-By.
async fn by_http2(world: &World, method: &str, headers: &[(&str, &str)]) -> (u16, String) {
    hold_lease(&world.node);
    let mut request = Request::builder().method(method).uri("http://x/predict");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut sender = http2(world).await;
    let (answer, _) = sender.send_request(request.body(()).unwrap(), true).unwrap();
    let answer = timeout(SOON, answer).await.unwrap().unwrap();
    let by = answer.headers().get("x-served-by").map_or("", |by| by.to_str().unwrap()).to_string();
    (answer.status().as_u16(), by)
}

#[tokio::test]
async fn what_a_header_forced_is_no_evidence() {
    let mut world = world(view(Some(answering(OK).await), Some(answering(FAILED).await), 1)).await;
    for _ in 0..8 {
        hold_lease(&world.node);
        assert_eq!(served_by(&world.get("/predict", "x-canary: always\r\n").await), "v2");
        let old = world.raw("GET /predict HTTP/1.0\r\nx-canary: always\r\n\r\n").await;
        assert_eq!(served_by(&old), "v2");
        assert_eq!(by_http2(&world, "GET", &[("x-canary", "always")]).await, (500, "v2".into()));
    }
    assert_eq!(world.told_within(TOLD).await, (0, 0, 0), "(answers, errors, trips) of the canary");
}

#[tokio::test]
async fn what_nobody_implements_is_no_failure() {
    let server = answering(NOT_IMPLEMENTED).await;
    let mut world = world(view(Some(server), Some(server), 10_000)).await;
    for _ in 0..4 {
        hold_lease(&world.node);
        let answer = world.raw("BREW /pot HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 501") && served_by(&answer) == "v2", "{answer}");
        assert_eq!(by_http2(&world, "BREW", &[]).await, (501, "v2".into()));
    }
    assert_eq!(world.told_within(TOLD).await, (8, 0, 0), "(answers, errors, trips) of the canary");
}

#[tokio::test]
async fn the_header_that_forces_is_the_operators_choice() {
    let by = |name: &str, networks: &[&str]| ProxySettings {
        canary_header: name.into(),
        canary_header_peers: networks.iter().map(|network| network.parse().unwrap()).collect(),
        ..settings()
    };
    let (ok, failed) = (answering(OK).await, answering(FAILED).await);
    let served = |settings, headers: &'static str| async move {
        let mut world = world_with(view(Some(ok), Some(failed), 1), settings).await;
        let answer = world.get("/predict", headers).await;
        (served_by(&answer).to_string(), world.told_within(TOLD).await.1)
    };
    let always = "x-canary: always\r\n";
    assert_eq!(served(by("x-pick", &[]), "x-pick: always\r\n").await, ("v2".into(), 0));
    assert_eq!(served(by("x-pick", &[]), always).await.0, "v1");
    assert_eq!(served(by("", &[]), always).await.0, "v1");
    assert_eq!(served(by("x-canary", &["192.0.2.0/24"]), always).await.0, "v1");
    assert_eq!(served(by("x-canary", &["192.0.2.0/24", "127.0.0.0/8"]), always).await, ("v2".into(), 0));
    // A record router that the operator names has drawn by the weight: what comes of its records is evidence.
    let routed = "x-canary: always\r\nx-aviary-source: t/0/1\r\n";
    assert_eq!(served(by("x-canary", &["127.0.0.1"]), routed).await, ("v2".into(), 1));
    assert_eq!(served(by("x-canary", &[]), routed).await, ("v2".into(), 0));
}

/// Starts a server that answers one request of each connection, and ends that when the next one is there.
async fn unkind() -> SocketAddr {
    upstream(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(OK.as_bytes()).await;
        head(&mut stream).await;
    })
    .await
}

#[tokio::test]
async fn a_kept_connection_that_died_costs_no_client_a_request() {
    let world = world(view(Some(unkind().await), None, 0)).await;
    for _ in 0..5 {
        assert_eq!(by_http2(&world, "GET", &[]).await.0, 200);
    }
    assert_eq!(by_http2(&world, "POST", &[]).await.0, 502, "what might happen twice is not repeated");
}

#[tokio::test]
async fn a_repeat_takes_a_connection_that_served_nothing() {
    for http2 in [false, true] {
        let world = world(view(Some(unkind().await), None, 0)).await;
        // Three connections are kept, and all are dead.
        let three = [(); 3].map(|()| async {
            match http2 {
                true => by_http2(&world, "GET", &[]).await.0,
                false => world.get("/predict", "").await.split(' ').nth(1).unwrap().parse().unwrap(),
            }
        });
        let [a, b, c] = three;
        assert_eq!(tokio::join!(a, b, c), (200, 200, 200));
        let again = match http2 {
            true => by_http2(&world, "GET", &[]).await.0.to_string(),
            false => world.get("/predict", "").await,
        };
        assert!(again.contains("200"), "by HTTP/2: {http2}: {again}");
    }
}

#[tokio::test]
async fn every_clients_requests_are_mirrored() {
    let (sender, mut copies) = mpsc::unbounded_channel();
    let canary = upstream(move |mut stream| {
        let sender = sender.clone();
        async move {
            let head = head(&mut stream).await;
            let mut body = [0; 5];
            stream.read_exact(&mut body).await.unwrap();
            let _ = stream.write_all(OK.as_bytes()).await;
            let _ = sender.send((head, body));
        }
    });
    let stable = upstream(|mut stream| async move {
        head(&mut stream).await;
        stream.read_exact(&mut [0; 5]).await.unwrap();
        let _ = stream.write_all(OK.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n").as_bytes()).await;
    });
    let (stable, canary) = (stable.await, canary.await);
    let world = world(view_of(Some(stable), Some(canary), 1, |spec| spec.mirror = Weight::FULL)).await;
    for way in ["HTTP/1.1", "HTTP/1.0", "HTTP/2"] {
        hold_lease(&world.node);
        if way == "HTTP/2" {
            let mut sender = http2(&world).await;
            let request = Request::post("http://x/").header("x-canary", "never").header("content-length", "5");
            let (answer, mut body) = sender.send_request(request.body(()).unwrap(), false).unwrap();
            body.send_data("hello".into(), true).unwrap();
            assert_eq!(timeout(SOON, answer).await.unwrap().unwrap().status(), 200);
        } else {
            let fields = "x-canary: never\r\nconnection: close\r\ncontent-length: 5";
            world.raw(&format!("POST / {way}\r\nhost: x\r\n{fields}\r\n\r\nhello")).await;
        }
        let copy = timeout(SOON, copies.recv()).await.unwrap_or_else(|_| panic!("no copy of a request by {way}"));
        let (head, body) = copy.unwrap();
        assert!(head.contains("x-aviary-mirrored: true") && &body == b"hello", "{head}");
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let large = || async {
        upstream(|mut stream| async move {
            head(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 50000000\r\n\r\n").await;
            let _ = stream.write_all(&vec![7; 50_000_000]).await;
        })
        .await
    };
    let settings = ProxySettings { unread_timeout_ms: 300, requests_max: 1, ..settings() };
    let mut world = world_with(view(None, Some(large().await), 10_000), settings).await;
    let mut sender = http2(&world).await;
    let (answer, _) = sender.send_request(Request::get("http://x/").body(()).unwrap(), true).unwrap();
    let mut body = timeout(SOON, answer).await.unwrap().unwrap().into_body();
    let ended = timeout(SOON, async {
        // What is read is never released, so that the window stays full.
        while let Some(data) = body.data().await {
            if data.is_err() {
                return true;
            }
        }
        false
    });
    assert!(
        ended.await.expect("the stream is open long after unread_timeout_ms"),
        "the answer ended as if it were whole"
    );
    // Its place is free, and nobody is to blame.
    hold_lease(&world.node);
    let mut next = TcpStream::connect(world.address).await.unwrap();
    next.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(timeout(SOON, head(&mut next)).await.unwrap().starts_with("HTTP/1.1 200"));
    // Neither read nor closed for far longer than it may be: the proxy ends the connection.
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let rest = timeout(SOON, next.read_to_end(&mut Vec::new())).await.expect("an end");
    assert!(rest.is_err() || rest.unwrap() < 50_000_000, "all of it came");
    assert_eq!(world.told_within(TOLD).await.1, 0, "errors of the canary");
}

#[tokio::test]
async fn a_stream_that_waits_for_continue_gets_it() {
    let server = upstream(|mut stream| async move {
        let head = head(&mut stream).await.to_lowercase();
        assert!(!head.contains("expect"), "{head}");
        stream.read_exact(&mut [0; 4]).await.unwrap();
        stream.write_all(OK.as_bytes()).await.unwrap();
    });
    let world = world(view(Some(server.await), None, 0)).await;
    let mut sender = http2(&world).await;
    let request = Request::post("http://x/").header("expect", "100-continue").header("content-length", "4");
    let (mut answer, mut body) = sender.send_request(request.body(()).unwrap(), false).unwrap();
    let told =
        timeout(SOON, poll_fn(|cx| answer.poll_informational(cx))).await.expect("an interim answer").unwrap().unwrap();
    assert_eq!(told.status(), 100);
    body.send_data("body".into(), true).unwrap();
    assert_eq!(timeout(SOON, answer).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn early_hints_reach_a_stream() {
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let world = world(view(Some(answering(early).await), None, 0)).await;
    let mut sender = http2(&world).await;
    let (mut answer, _) = sender.send_request(Request::get("http://x/").body(()).unwrap(), true).unwrap();
    let told =
        timeout(SOON, poll_fn(|cx| answer.poll_informational(cx))).await.expect("an interim answer").unwrap().unwrap();
    assert_eq!((told.status().as_u16(), &told.headers()["link"]), (103, &"</a>".parse().unwrap()));
    assert_eq!(timeout(SOON, answer).await.unwrap().unwrap().status(), 200);
}

async fn h2c_world(server: SocketAddr) -> World {
    world(view_of(None, None, 0, |spec| spec.stable.urls = vec![format!("h2c://{server}")])).await
}

#[tokio::test]
async fn trailers_reach_a_client_that_takes_them() {
    let world = h2c_world(grpc("0").await).await;
    let request =
        |te: &str| format!("POST /x HTTP/1.1\r\nhost: x\r\n{te}content-length: 5\r\nconnection: close\r\n\r\nhello");
    let answer = world.raw(&request("te: trailers\r\n")).await;
    assert!(answer.contains("transfer-encoding: chunked") && answer.contains("\r\n5\r\nhello\r\n"), "{answer}");
    assert!(answer.ends_with("0\r\ngrpc-status: 0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn only_websockets_are_upgraded_to() {
    let echo = upstream(|mut stream| async move {
        let head = head(&mut stream).await;
        let _ = stream
            .write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len()).as_bytes())
            .await;
    });
    let world = world(view(Some(echo.await), None, 0)).await;
    for token in ["h2c", "TLS/1.0", "websocketx", "h2c, foo"] {
        let fields = format!("connection: upgrade, http2-settings\r\nupgrade: {token}\r\nhttp2-settings: AAMAAABk\r\n");
        let closing = world.get("/x", &fields).await.to_lowercase();
        let (_, seen) = closing.split_once("\r\n\r\n").unwrap();
        assert!(
            closing.starts_with("http/1.1 200") && !seen.contains("upgrade") && !seen.contains("http2-"),
            "{closing}"
        );
    }
    let refused = h2c_world(grpc("0").await).await;
    let request = "GET /x HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n";
    let answer = refused.raw(request).await;
    assert!(answer.starts_with("HTTP/1.1 501"), "{answer}");
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_sends_first() {
    const BYTES: usize = 20 << 20;
    // One reads nothing more and stays, the other closes at once.
    for stays in [true, false] {
        let hasty = upstream(move |mut stream| async move {
            head(&mut stream).await;
            let _ =
                stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nno!").await;
            // As long as the test may take.
            tokio::time::sleep(if stays { SOON } else { Duration::ZERO }).await;
        });
        let world = world(view(Some(hasty.await), None, 0)).await;
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream
            .write_all(format!("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {BYTES}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        for piece in 0..20 {
            // Longer than a second in all: no limit of that kind ends it.
            tokio::time::sleep(Duration::from_millis(75)).await;
            stream.write_all(&vec![b'x'; BYTES / 20]).await.unwrap_or_else(|error| panic!("piece {piece}: {error}"));
        }
        let mut answer = String::new();
        timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with("\r\n\r\nno!"), "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }
}

/// Starts a server whose answer has no length, and ends with the connection: by a reset, or as it should.
async fn endless(is_reset: bool) -> SocketAddr {
    upstream(move |mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").await;
        // The proxy reads what was sent before the end comes.
        tokio::time::sleep(Duration::from_millis(100)).await;
        if is_reset {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    })
    .await
}

#[tokio::test]
async fn an_answer_that_was_cut_does_not_look_whole() {
    let whole = |is_reset| async move {
        let mut world = world(view(None, Some(endless(is_reset).await), 10_000)).await;
        let answer = world.get("/predict", "").await;
        assert!(answer.contains("transfer-encoding: chunked") && answer.contains("5\r\nhello\r\n"), "{answer}");
        let stream = http2(&world).await.send_request(Request::get("http://x/").body(()).unwrap(), true).unwrap().0;
        let mut body = timeout(SOON, stream).await.unwrap().unwrap().into_body();
        let ended_well = loop {
            match body.data().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        (answer.ends_with("\r\n0\r\n\r\n"), ended_well, world.told_within(TOLD).await)
    };
    assert_eq!(whole(false).await, (true, true, (2, 0, 0)));
    assert_eq!(whole(true).await, (false, false, (2, 2, 0)));
}

#[tokio::test]
async fn an_answer_whose_head_is_no_head_is_the_same_failure_on_each_path() {
    for head in ["content-length: 2\r\ncontent-length: 3", "content-length: 2\r\ntransfer-encoding: chunked"] {
        let answer: &'static str = Box::leak(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\nok").into_boxed_str());
        let world = world(view(Some(answering(answer).await), None, 0)).await;
        assert!(world.get("/predict", "").await.starts_with("HTTP/1.1 502"), "{head}");
        assert_eq!(by_http2(&world, "GET", &[]).await.0, 502, "{head}");
    }
    let world = world(view(
        Some(answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok").await),
        None,
        0,
    ))
    .await;
    assert!(world.get("/predict", "").await.starts_with("HTTP/1.1 200"));
    assert_eq!(by_http2(&world, "GET", &[]).await.0, 200);
}

#[tokio::test]
async fn models_that_are_no_services_are_the_default_services_own() {
    let world = world(view(Some(answering(OK).await), None, 0)).await;
    for path in
        ["/v1/models/mnist:predict", "/v2/models/mnist/infer", "/v2/models/fr%61ud/infer", "/v1/models/fraud%3Apredict"]
    {
        assert!(world.get(path, "").await.starts_with("HTTP/1.1 200"), "{path}");
    }
    let unknown = world.get("/predict", "x-aviary-service: mnist\r\n").await;
    assert!(unknown.starts_with("HTTP/1.1 404") && !unknown.contains("fraud"), "{unknown}");
}

#[tokio::test]
async fn what_the_upstream_says_of_itself_is_told() {
    let server = answering("HTTP/1.1 200 OK\r\nx-served-by: cache-7\r\ncontent-length: 2\r\n\r\nok").await;
    let world = world(view(Some(server), None, 0)).await;
    let answer = world.get("/predict", "").await;
    assert!(served_by(&answer) == "v1" && answer.contains("\r\nx-upstream-served-by: cache-7\r\n"), "{answer}");
}

#[tokio::test]
async fn the_status_paths_can_be_the_services() {
    let server = answering(OK).await;
    let of = |status_paths| world_with(view(Some(server), None, 0), ProxySettings { status_paths, ..settings() });
    assert!(of(true).await.get("/livez", "").await.contains("alive"));
    assert!(of(false).await.get("/livez", "").await.ends_with("\r\n\r\nok"));
}

#[tokio::test]
async fn an_answer_before_the_body_was_read_ends_the_connection() {
    let world = world(view(Some(answering(OK).await), None, 0)).await;
    for target in ["/livez", "/predict"] {
        let fields = if target == "/predict" { "x-aviary-service: none\r\n" } else { "" };
        let request = format!("POST {target} HTTP/1.1\r\nhost: x\r\n{fields}content-length: 100\r\n\r\npart");
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = timeout(SOON, head(&mut stream)).await.unwrap();
        assert!(answer.contains("connection: close"), "{answer}");
        // With all of it there, the connection stays.
        let mut whole = TcpStream::connect(world.address).await.unwrap();
        let request = request.replace("content-length: 100", "content-length: 4");
        for _ in 0..2 {
            assert!(!ask(&mut whole, &request).await.contains("connection: close"));
        }
    }
}

#[tokio::test]
async fn an_empty_key_is_no_key() {
    let world = world(view(None, None, 5_000)).await;
    let mut by = Vec::new();
    for _ in 0..40 {
        hold_lease(&world.node);
        by.push(served_by(&world.get("/predict", "x-user:\r\n").await).to_string());
    }
    assert!(by.iter().any(|by| by == "v1") && by.iter().any(|by| by == "v2"), "{by:?}");
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let refused = upstream(|_| async {}).await;
    let world = world(view(Some(refused), None, 0)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    for target in ["/predict", "/livez", "/predict"] {
        stream.write_all(format!("HEAD {target} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let answer = timeout(SOON, head(&mut stream)).await.unwrap();
        // A body would be read as the beginning of the next answer.
        assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    }
}

#[test]
fn descriptors_that_the_proxy_lacks_are_no_failure_of_the_canary() {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use crate::cluster::harness::{Process, Upstream, aviary, free_port, wait};
    let (v1, v2) = (Upstream::start("one"), Upstream::start("two"));
    let listen = format!("127.0.0.1:{}", free_port());
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -n 48; exec \"$0\" \"$@\""]).arg(aviary().get_program());
    limited.args(["proxy", "--listen", &listen, "--workers", "1", "--weight", "100"]);
    limited.args(["--stable", &v1.url(), "--canary", &v2.url()]);
    let _proxy = Process(limited.stderr(std::process::Stdio::null()).spawn().unwrap());
    let connect = || {
        let stream = TcpStream::connect(&listen).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        Some(stream)
    };
    let ask = |stream: &mut TcpStream| {
        stream.write_all(b"GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let (mut answer, mut piece) = (String::new(), [0; 4096]);
        while !answer.contains("\r\n\r\n") {
            let length = stream.read(&mut piece).unwrap();
            answer += std::str::from_utf8(&piece[..length]).unwrap();
        }
        answer
    };
    // More clients than there are descriptors; none is left for a server.
    wait("the proxy", Duration::from_secs(5), connect);
    let mut clients: Vec<_> = (0..60).map(|_| connect().unwrap()).collect();
    // Fifty tries of 10 ms, in which the proxy accepts as many as it can.
    let mut tries = 0;
    wait("half a second", SOON, || {
        tries += 1;
        (tries > 50).then_some(())
    });
    for client in &mut clients[..12] {
        let answer = ask(client);
        assert!(answer.starts_with("HTTP/1.1 503") && !answer.contains("x-served-by"), "{answer}");
    }
    drop(clients);
    let served = wait("a descriptor", Duration::from_secs(5), || {
        let answer = ask(&mut connect()?);
        answer.starts_with("HTTP/1.1 200").then_some(answer)
    });
    assert_eq!(served_by(&served), "canary");
}

/// Opens a port that takes one connection, which is returned, and no other until that was accepted.
fn full_port() -> (std::net::TcpListener, std::net::TcpStream) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let listener = std::net::TcpListener::from(socket);
    let first = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, first)
}

/// Asks by HTTP/1.1 or HTTP/2, and returns the version that served.
async fn served_by_way(address: SocketAddr, http2: bool) -> String {
    if http2 {
        let (sender, connection) = h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post("http://x/predict").body(()).unwrap();
        let (answer, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
        return timeout(SOON, answer).await.unwrap().unwrap().headers()["x-served-by"].to_str().unwrap().into();
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    served_by(&answer).into()
}

#[tokio::test]
async fn who_serves_is_looked_at_again_before_each_attempt() {
    for http2 in [false, true] {
        let (stable, second) = (answering(OK).await, answering(OK).await);
        let (full, _first) = full_port();
        let full = full.local_addr().unwrap();
        let share = |bp| {
            view_of(Some(stable), None, bp, |spec| {
                spec.canary.urls = vec![format!("http://{full}"), format!("http://{second}")];
            })
        };
        let world = world(share(10_000)).await;
        let mut asked = Vec::new();
        // Half of them meet the server that doesn't take the connection, for 500 ms.
        for _ in 0..2 {
            asked.push(tokio::spawn(served_by_way(world.address, http2)));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        world.node.published.publish(Arc::new(share(0)));
        let mut served = Vec::new();
        for asked in asked {
            served.push(asked.await.unwrap());
        }
        served.sort();
        assert_eq!(served, ["v1", "v2"], "by HTTP/2: {http2}");
    }
}

#[tokio::test]
async fn a_connection_that_comes_after_the_rollback_carries_no_request() {
    for http2 in [false, true] {
        let stable = answering(OK).await;
        let (full, _first) = full_port();
        let canary = full.local_addr().unwrap();
        let settings = ProxySettings { connect_timeout_ms: 5_000, first_byte_timeout_ms: 5_000, ..settings() };
        let world = world_with(view(Some(stable), Some(canary), 10_000), settings).await;
        let asked = tokio::spawn(served_by_way(world.address, http2));
        tokio::time::sleep(Duration::from_millis(200)).await;
        world.node.published.publish(Arc::new(view(Some(stable), Some(canary), 0)));
        // The system repeats the attempt after a second, and then there is room.
        let received = std::thread::spawn(move || {
            full.accept().unwrap();
            let (mut second, _) = full.accept().unwrap();
            second.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            std::io::Read::read(&mut second, &mut [0; 64]).unwrap_or(0)
        });
        assert_eq!(asked.await.unwrap(), "v1", "by HTTP/2: {http2}");
        assert_eq!(received.join().unwrap(), 0, "bytes that the canary got, by HTTP/2: {http2}");
    }
}

/// Starts a server that speaks a WebSocket's bytes back, and streams an endless answer to all other requests.
async fn streaming() -> SocketAddr {
    upstream(|mut stream| async move {
        if head(&mut stream).await.to_lowercase().contains("upgrade: websocket") {
            let head = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
            stream.write_all(head).await.unwrap();
        } else {
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        }
        // More often than any limit on silence.
        while stream.write_all(b"1\r\nx\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

/// Opens an endless answer at a proxy, and returns how long it lasted.
async fn lasted(address: SocketAddr, http2: bool, more: &str) -> Duration {
    let began = tokio::time::Instant::now();
    if http2 {
        let (sender, connection) = h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("http://x/").body(()).unwrap();
        let (answer, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
        let mut body = timeout(SOON, answer).await.unwrap().unwrap().into_body();
        let reading = async {
            while let Some(data) = body.data().await {
                let Ok(data) = data else { return };
                let _ = body.flow_control().release_capacity(data.len());
            }
            panic!("an answer that was cut looks whole");
        };
        timeout(SOON, reading).await.expect("an end");
        return began.elapsed();
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET / HTTP/1.1\r\nhost: x\r\n{more}\r\n").as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("an end");
    assert!(bytes.len() > 200 && !bytes.ends_with(b"0\r\n\r\n"), "an answer that was cut looks whole");
    began.elapsed()
}

const WEBSOCKET: &str =
    "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n";

#[tokio::test]
async fn what_stays_at_the_canary_ends_a_while_after_its_rollback() {
    let server = streaming().await;
    let settings = ProxySettings { canary_grace_ms: 700, ..settings() };
    let world = world_with(view(Some(server), Some(server), 10_000), settings.clone()).await;
    let ways = [(false, ""), (false, WEBSOCKET), (true, "")];
    let open = ways.map(|(http2, more)| tokio::spawn(lasted(world.address, http2, more)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Without its lease for a moment, as when a peer restarts.
    world.node.published.set_lease(None);
    tokio::time::sleep(Duration::from_millis(500)).await;
    hold_lease(&world.node);
    tokio::time::sleep(Duration::from_millis(400)).await;
    world.node.published.publish(Arc::new(view(Some(server), Some(server), 0)));
    for (way, open) in ways.iter().zip(open) {
        let lasted = open.await.unwrap();
        // 1200 ms until the rollback, 700 ms of grace, and two looks of 250 ms.
        assert!((1_850..3_000).contains(&lasted.as_millis()), "{way:?}: {lasted:?}");
    }
    // What is at stable stays, also where stable was the canary before.
    let world = world_with(view(Some(server), Some(server), 10_000), settings).await;
    let open = ways.map(|(http2, more)| tokio::spawn(lasted(world.address, http2, more)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let completed = view_of(None, Some(server), 0, |spec| {
        (spec.stable.version, spec.canary.version) = (VersionId::new("v2").unwrap(), VersionId::new("v3").unwrap());
    });
    world.node.published.publish(Arc::new(completed));
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(open.iter().all(|open| !open.is_finished()), "what is at the version that became stable stays");
    open.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn idle_connections_make_room_for_a_client_that_asks() {
    let settings = ProxySettings { connections_max: 4, ..settings() };
    let world = world_with(view(Some(answering(OK).await), None, 0), settings).await;
    let mut idle = Vec::new();
    for _ in 0..6 {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let answer = timeout(SOON, head(&mut stream)).await.expect("a place within seconds");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        idle.push(stream);
    }
    let mut senders = Vec::new();
    for _ in 0..6 {
        let mut sender = timeout(SOON, http2(&world)).await.expect("a place within seconds");
        let (answer, _) = sender.send_request(Request::get("http://x/").body(()).unwrap(), true).unwrap();
        assert_eq!(timeout(SOON, answer).await.expect("a place within seconds").unwrap().status(), 200);
        senders.push(sender);
    }
}

#[tokio::test]
async fn requests_that_wait_for_their_clients_make_room() {
    let settings = ProxySettings { requests_max: 4, first_byte_timeout_ms: 30_000, ..settings() };
    let large = upstream(|mut stream| async move {
        while head(&mut stream).await.contains("GET /large") {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n").await;
            let _ = stream.write_all(&vec![7; 10_000_000]).await;
        }
        let _ = stream.write_all(OK.as_bytes()).await;
    });
    let world = world_with(view(Some(large.await), None, 0), settings).await;
    let mut held = Vec::new();
    for request in
        ["GET /large HTTP/1.1\r\nhost: x\r\n\r\n", "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"]
    {
        for _ in 0..4 {
            let mut stream = TcpStream::connect(world.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            held.push(stream);
            // Until what the client doesn't take fills the buffers between, and longer than it is waited for.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let answer = world.get("/", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "after {request}: {answer}");
    }
    let mut senders = Vec::new();
    for path in ["http://x/large", "http://x/"] {
        for _ in 0..4 {
            let stream = TcpStream::connect(world.address).await.unwrap();
            let mut builder = h2::client::Builder::new();
            let (mut sender, connection) = builder.initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
            tokio::spawn(connection);
            let request = Request::builder().method(if path.ends_with('e') { "GET" } else { "POST" }).uri(path);
            let stays = sender.send_request(request.body(()).unwrap(), path.ends_with('e')).unwrap();
            senders.push((sender, stays));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let answer = world.get("/", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "after HTTP/2 to {path}: {answer}");
    }
}
