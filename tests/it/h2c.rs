//! Servers behind `h2c://`: what one client, one answer or one connection does must not hold up the others.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::proxy::{SOON, World, head, settings, upstream, view_of, world_with};

const SMALL_BYTES: usize = 16 << 10;
const BIG_BYTES: usize = 8 << 20;

/// A server of HTTP/2 without TLS.
#[derive(Clone)]
struct Server {
    /// Connections that were made to it.
    connections: Arc<AtomicUsize>,
    /// Requests for `/slow` that came.
    slow: Arc<Semaphore>,
    /// As many of them are answered.
    answered: Arc<Semaphore>,
}

impl Server {
    async fn start() -> (SocketAddr, Self) {
        let empty = || Arc::new(Semaphore::new(0));
        let server = Self { connections: Arc::default(), slow: empty(), answered: empty() };
        let serving = server.clone();
        let address = upstream(move |stream| {
            let server = serving.clone();
            server.connections.fetch_add(1, Relaxed);
            let service = hyper::service::service_fn(move |request| server.clone().answer(request));
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            async move { drop(builder.serve_connection(TokioIo::new(stream), service).await) }
        });
        (address.await, server)
    }

    /// Answers `/small`, `/big`, `/slow` and `/head/KIB/FIELDS`.
    async fn answer(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
        let mut response = Response::new(Full::default());
        match request.uri().path().split('/').skip(1).collect::<Vec<_>>()[..] {
            ["small"] => *response.body_mut() = vec![b's'; SMALL_BYTES].into(),
            ["big"] => *response.body_mut() = vec![b'b'; BIG_BYTES].into(),
            ["slow"] => {
                self.slow.add_permits(1);
                self.answered.acquire().await.unwrap().forget();
            }
            ["head", kib, fields] => {
                let (bytes, fields) = (kib.parse::<usize>().unwrap() << 10, fields.parse().unwrap());
                for i in 0..fields {
                    let value = HeaderValue::from_bytes(&vec![b'h'; bytes / fields]).unwrap();
                    response.headers_mut().insert(HeaderName::try_from(format!("x-{i}")).unwrap(), value);
                }
            }
            ref path => panic!("{path:?}"),
        }
        Ok(response)
    }
}

async fn world_at(server: SocketAddr, settings: ProxySettings) -> World {
    world_with(view_of(None, None, 0, |spec| spec.stable.urls = vec![format!("h2c://{server}")]), settings).await
}

#[tokio::test]
async fn clients_that_read_nothing_hold_up_nobody() {
    let (server, _) = Server::start().await;
    let world = world_at(server, settings()).await;
    let mut idle = Vec::new();
    for _ in 0..6 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let mut stream = socket.connect(world.address).await.unwrap();
        stream.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let answer = timeout(SOON, head(&mut stream)).await.expect("a head");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        idle.push(stream);
    }
    for i in 0..20 {
        let answer = timeout(Duration::from_secs(2), world.get("/small", "")).await;
        let answer = answer.unwrap_or_else(|_| panic!("request {i}: the answer's body never came"));
        assert!(answer.len() > SMALL_BYTES && answer.ends_with('s'), "{} bytes", answer.len());
        // Half a second over all: long enough for six answers to fill whatever takes them in.
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Starts a forwarder to `server` whose first connection swallows everything from `silent` on, and tells when its peer
/// ended that one.
async fn forwarder(server: SocketAddr) -> (SocketAddr, CancellationToken, mpsc::UnboundedReceiver<()>) {
    let (silent, first) = (CancellationToken::new(), AtomicUsize::new(0));
    let (ended, told) = mpsc::unbounded_channel();
    let silence = silent.clone();
    let address = upstream(move |mut stream| {
        let silent = if first.fetch_add(1, Relaxed) == 0 { silence.clone() } else { CancellationToken::new() };
        let ended = ended.clone();
        async move {
            let mut server = TcpStream::connect(server).await.unwrap();
            let forwarding = tokio::io::copy_bidirectional(&mut stream, &mut server);
            if silent.run_until_cancelled(forwarding).await.is_none() {
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                let _ = ended.send(());
            }
        }
    });
    (address.await, silent, told)
}

/// Returns settings by which a connection's end is up to PINGs alone.
fn pinging() -> ProxySettings {
    ProxySettings {
        upstream_ping_interval_ms: 100,
        upstream_ping_timeout_ms: 200,
        first_byte_timeout_ms: 8_000,
        upstream_keep_alive_ms: 60_000,
        ..settings()
    }
}

#[tokio::test]
async fn a_connection_that_falls_silent_is_replaced() {
    let (server, at) = Server::start().await;
    let (address, silent, _ended) = forwarder(server).await;
    let world = world_at(address, pinging()).await;
    assert!(world.get("/small", "").await.starts_with("HTTP/1.1 200"));
    silent.cancel();
    let repeated =
        timeout(Duration::from_secs(3), world.get("/small", "")).await.expect("an end within the PINGs' bound");
    assert!(repeated.starts_with("HTTP/1.1 200"), "a GET is repeated on another connection: {repeated}");
    let next = timeout(Duration::from_secs(3), world.get("/small", "")).await.expect("another connection");
    assert!(next.starts_with("HTTP/1.1 200"), "{next}");
    assert_eq!(at.connections.load(Relaxed), 2);
}

#[tokio::test]
async fn a_connection_that_falls_silent_while_idle_costs_no_request() {
    let (server, at) = Server::start().await;
    let (address, silent, mut ended) = forwarder(server).await;
    let world = world_at(address, pinging()).await;
    assert!(world.get("/small", "").await.starts_with("HTTP/1.1 200"));
    silent.cancel();
    timeout(Duration::from_secs(3), ended.recv()).await.expect("an end within the PINGs' bound");
    let next = world.get("/small", "").await;
    assert!(next.starts_with("HTTP/1.1 200"), "{next}");
    assert_eq!(at.connections.load(Relaxed), 2);
}

#[tokio::test]
async fn a_connection_whose_server_answers_pings_lives_on() {
    let (server, at) = Server::start().await;
    let world = world_at(server, pinging()).await;
    let answer = {
        let slow = world.get("/slow", "");
        tokio::pin!(slow);
        // Silent for several intervals, but for PINGs.
        assert!(timeout(Duration::from_millis(900), slow.as_mut()).await.is_err());
        at.answered.add_permits(1);
        slow.await
    };
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(at.connections.load(Relaxed), 1);
}

#[tokio::test]
async fn a_head_that_is_too_large_fails_alone() {
    let (server, at) = Server::start().await;
    let world = Arc::new(world_at(server, ProxySettings { first_byte_timeout_ms: 8_000, ..settings() }).await);
    let mut others = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let world = world.clone();
        others.spawn(async move { world.get("/slow", "").await });
    }
    timeout(SOON, at.slow.acquire_many(3)).await.unwrap().unwrap().forget();
    for (kib, fields) in [(17, 1), (17, 17), (31, 1), (31, 60)] {
        let answer = world.get(&format!("/head/{kib}/{fields}"), "").await;
        let found = answer.matches('h').count();
        assert!(
            answer.starts_with("HTTP/1.1 200") && found > (kib << 10) - 100,
            "{kib} KiB in {fields}: {found} bytes"
        );
    }
    for (kib, fields) in [(33, 1), (33, 33), (40, 1), (40, 40), (100, 1), (100, 100), (900, 60)] {
        let answer = world.get(&format!("/head/{kib}/{fields}"), "").await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{kib} KiB in {fields} fields: {} bytes", answer.len());
        assert!(answer.contains("its answer's head is larger than 32 KiB"), "{answer}");
    }
    // Larger than what is read of a head: still only this stream ends.
    let answer = world.get("/head/1100/100", "").await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("larger than 1 MiB"), "{answer}");
    at.answered.add_permits(3);
    while let Some(answer) = others.join_next().await {
        assert!(answer.unwrap().starts_with("HTTP/1.1 200"), "another request on the connection failed");
    }
    assert_eq!(at.connections.load(Relaxed), 1);
}
