//! Real proxies as upstream and in front: an Envoy, an HAProxy and an nginx, over HTTP/1.1 and HTTP/2. The stage `peers` of
//! run_tests.sh finds their programs, names those that are missing, and runs these tests.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::harness::{Process, free_port};
use crate::proxy::{SOON, World, hold_lease, upstream, view_of, world_with};

/// Bytes of a large body.
const BIG: usize = 1 << 20;
/// Requests of each kind on each way.
const ROUNDS: usize = 12;

/// A proxy of other people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Envoy,
    Haproxy,
    Nginx,
}

const PEERS: [Peer; 3] = [Peer::Envoy, Peer::Haproxy, Peer::Nginx];

/// A peer that runs, in front of one server.
struct RunningPeer {
    http1: SocketAddr,
    http2: SocketAddr,
    _process: Process,
    _dir: tempfile::TempDir,
}

impl Peer {
    /// Returns its program; none where the stage found none, which it says.
    fn program(self) -> Option<String> {
        let name = match self {
            Self::Envoy => "AVIARY_ENVOY",
            Self::Haproxy => "AVIARY_HAPROXY",
            Self::Nginx => "AVIARY_NGINX",
        };
        std::env::var(name).ok().filter(|program| !program.is_empty())
    }

    /// Starts it in front of `server`, to which it speaks HTTP/2 or HTTP/1.1.
    async fn start(self, program: &str, server: SocketAddr, by_http2: bool) -> RunningPeer {
        let dir = tempfile::tempdir().unwrap();
        let (http1, http2) = (free_port(), free_port());
        let (file, arguments): (_, &[&str]) = match self {
            Self::Envoy => {
                ("envoy.yaml", &["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error", "-c"])
            }
            Self::Haproxy => ("haproxy.cfg", &["-db", "-f"]),
            Self::Nginx => ("nginx.conf", &["-c"]),
        };
        let path = dir.path().join(file);
        let text = match self {
            Self::Envoy => envoy(http1, http2, server, by_http2),
            Self::Haproxy => haproxy(http1, http2, server, by_http2),
            Self::Nginx => nginx(http1, http2, server, dir.path()),
        };
        std::fs::write(&path, text).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.args(arguments).arg(&path).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let process = Process(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")));
        let [http1, http2] = [http1, http2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        for address in [http1, http2] {
            let began = Instant::now();
            while TcpStream::connect(address).await.is_err() {
                let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
                assert!(began.elapsed() < SOON, "{self:?} doesn't listen: {}", log());
                // Nothing tells of another process's port.
                sleep(Duration::from_millis(20)).await;
            }
        }
        RunningPeer { http1, http2, _process: process, _dir: dir }
    }

    /// HTTP/2 to an upstream that is no gRPC server is not for nginx.
    fn speaks_http2_upstream(self) -> bool {
        self != Self::Nginx
    }
}

fn envoy(http1: u16, http2: u16, server: SocketAddr, by_http2: bool) -> String {
    let protocol = if by_http2 { "http2_protocol_options" } else { "http_protocol_options" };
    let listener = |port: u16, codec: &str| {
        format!(
            "  - address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: a
          codec_type: {codec}
          route_config: {{ virtual_hosts: [ {{ name: a, domains: [\"*\"], routes: [ {{ match: {{ prefix: \"/\" }}, route: {{ cluster: a }} }} ] }} ] }}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
"
        )
    };
    format!(
        "static_resources:
  listeners:
{}{}  clusters:
  - name: a
    type: STATIC
    connect_timeout: 5s
    load_assignment:
      cluster_name: a
      endpoints: [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }} ] }} ]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ {protocol}: {{}} }}
",
        listener(http1, "HTTP1"),
        listener(http2, "HTTP2"),
        server.port(),
    )
}

fn haproxy(http1: u16, http2: u16, server: SocketAddr, by_http2: bool) -> String {
    let protocol = if by_http2 { " proto h2" } else { "" };
    format!(
        "defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend a
  bind 127.0.0.1:{http1}
  bind 127.0.0.1:{http2} proto h2
  default_backend b
backend b
  server s {server}{protocol}
"
    )
}

/// It speaks HTTP/1.1 to its upstream, and HTTP/2 for gRPC.
fn nginx(http1: u16, http2: u16, server: SocketAddr, dir: &std::path::Path) -> String {
    let dir = dir.display();
    format!(
        "daemon off; master_process off; error_log {dir}/error.log; pid {dir}/pid;
events {{ worker_connections 512; }}
http {{
  access_log off; client_max_body_size 16m;
  client_body_temp_path {dir}/1; proxy_temp_path {dir}/2; fastcgi_temp_path {dir}/3; uwsgi_temp_path {dir}/4; scgi_temp_path {dir}/5;
  upstream a {{ server {server}; keepalive 8; }}
  # Of its own: nginx would take up a kept connection of HTTP/1.1 for gRPC.
  upstream g {{ server {server}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{http1};
    listen 127.0.0.1:{http2} http2;
    location / {{ proxy_pass http://a; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host; }}
    location /grpc {{ grpc_pass grpc://g; }}
  }}
}}
"
    )
}

type AnswerBody = BoxBody<Bytes, std::convert::Infallible>;

/// Answers each kind of request.
async fn origin_answer(request: Request<Incoming>) -> Result<Response<AnswerBody>, std::convert::Infallible> {
    let full = |bytes: Bytes| Full::new(bytes).boxed();
    let status = |status| Response::builder().status(status);
    Ok(match request.uri().path() {
        "/204" => status(StatusCode::NO_CONTENT).body(full(Bytes::new())).unwrap(),
        "/304" => status(StatusCode::NOT_MODIFIED).header("etag", "\"a\"").body(full(Bytes::new())).unwrap(),
        "/big" => Response::new(full(vec![b'b'; BIG].into())),
        "/early" => {
            // Its rest is taken, so that no proxy loses the answer by a reset.
            tokio::spawn(request.into_body().collect());
            status(StatusCode::PAYLOAD_TOO_LARGE).body(full(Bytes::from("no"))).unwrap()
        }
        "/grpc" => {
            let message = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
            let frames = [Frame::data(message), Frame::trailers(trailers)].map(Ok);
            let body = BodyExt::boxed(StreamBody::new(tokio_stream::iter(frames)));
            Response::builder().header("content-type", "application/grpc").body(body).unwrap()
        }
        _ => {
            let told = format!("{} {}", request.method(), request.uri().path());
            let is_head = request.method() == http::Method::HEAD;
            let body = request.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or(usize::MAX);
            let told = format!("{told} {body}");
            let length = told.len();
            // hyper would send the body of an answer to HEAD by HTTP/2.
            let body = if is_head { Bytes::new() } else { told.into() };
            Response::builder().header("content-length", length).body(full(body)).unwrap()
        }
    })
}

/// Starts the server at the end of the way, which speaks both protocols.
async fn origin() -> SocketAddr {
    upstream(|stream| async move {
        let service = hyper::service::service_fn(origin_answer);
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

/// Starts an Aviary in front of a server, for ten seconds.
async fn aviary(url: String) -> World {
    let view = view_of(None, None, 5_000, |spec| {
        (spec.stable.urls, spec.canary.urls) = (vec![url.clone()], vec![url]);
    });
    world_with(view, ProxySettings::default()).await
}

/// A kind of request, and what its answer must be.
struct Kind {
    method: &'static str,
    path: &'static str,
    /// Bytes of the request's body; none: it has none.
    body: Option<usize>,
    /// The body's length isn't told.
    is_chunked: bool,
    status: u16,
    /// Bytes of the answer's body.
    bytes: usize,
}

const GET: Kind =
    Kind { method: "GET", path: "/get", body: None, is_chunked: false, status: 200, bytes: "GET /get 0".len() };

fn kinds() -> [Kind; 9] {
    let post =
        |body, is_chunked, bytes| Kind { method: "POST", path: "/post", body: Some(body), is_chunked, bytes, ..GET };
    [
        GET,
        post(5, false, "POST /post 5".len()),
        post(5, true, "POST /post 5".len()),
        post(BIG, false, "POST /post 1048576".len()),
        Kind { method: "HEAD", path: "/get", bytes: 0, ..GET },
        Kind { path: "/204", status: 204, bytes: 0, ..GET },
        Kind { path: "/304", status: 304, bytes: 0, ..GET },
        Kind { path: "/big", bytes: BIG, ..GET },
        Kind { method: "POST", path: "/early", body: Some(256 * 1024), is_chunked: false, status: 413, bytes: 2 },
    ]
}

const GRPC: Kind = Kind { method: "POST", path: "/grpc", body: Some(64), is_chunked: true, status: 200, bytes: 64 };

/// A client's connection.
enum Connection {
    Http1(hyper::client::conn::http1::SendRequest<AnswerBody>),
    Http2(hyper::client::conn::http2::SendRequest<AnswerBody>),
}

impl Connection {
    async fn open(address: SocketAddr, by_http2: bool) -> Self {
        let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
        if by_http2 {
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            return Self::Http2(sender);
        }
        let (sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Self::Http1(sender)
    }

    /// Returns false where the last answer ended it.
    async fn is_ready(&mut self) -> bool {
        match self {
            Self::Http1(sender) => sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    async fn send(&mut self, request: Request<AnswerBody>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => sender.send_request(request).await,
            Self::Http2(sender) => sender.send_request(request).await,
        }
    }
}

fn request(kind: &Kind, by_http2: bool) -> Request<AnswerBody> {
    let uri = if by_http2 { format!("http://a.example{}", kind.path) } else { kind.path.to_string() };
    let mut request = Request::builder().method(kind.method).uri(uri);
    if !by_http2 {
        request = request.header("host", "a.example");
    }
    if kind.path == "/grpc" {
        request = request.header("content-type", "application/grpc").header("te", "trailers");
    }
    let body = match kind.body {
        None => Full::default().boxed(),
        Some(length) if kind.is_chunked => {
            let halves = [length / 2, length - length / 2].map(|length| Ok(Frame::data(vec![b'a'; length].into())));
            BodyExt::boxed(StreamBody::new(tokio_stream::iter(halves)))
        }
        Some(length) => Full::new(vec![b'a'; length].into()).boxed(),
    };
    request.body(body).unwrap()
}

/// Sends all kinds again and again, and returns the answers that were not as they must be.
async fn unexpected(name: &str, address: SocketAddr, by_http2: bool, kinds: &[Kind]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut connection = Connection::open(address, by_http2).await;
    for round in 0..ROUNDS {
        for kind in kinds {
            if !connection.is_ready().await {
                connection = Connection::open(address, by_http2).await;
            }
            let found = timeout(SOON, async {
                let answer = connection.send(request(kind, by_http2)).await.map_err(|error| error.to_string())?;
                let status = answer.status().as_u16();
                let body = answer.into_body().collect().await.map_err(|error| error.to_string())?;
                let grpc = body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
                Ok::<_, String>((status, grpc.is_some_and(|status| status == "0"), body.to_bytes().len()))
            });
            let found = found.await.unwrap_or_else(|_| Err("no answer in time".into()));
            let expected = (kind.status, kind.path == "/grpc", kind.bytes);
            if found != Ok(expected) {
                let Kind { method, path, .. } = kind;
                wrong.push(format!("{name}, round {round}: {method} {path}: {found:?}, expected {expected:?}"));
                connection = Connection::open(address, by_http2).await;
            }
        }
    }
    wrong
}

/// Sends everything that both ends of a way can do.
async fn all(name: &str, http1: SocketAddr, http2: SocketAddr, carries_grpc: bool) -> Vec<String> {
    let mut wrong = unexpected(&format!("HTTP/1.1 to {name}"), http1, false, &kinds()).await;
    wrong.extend(unexpected(&format!("HTTP/2 to {name}"), http2, true, &kinds()).await);
    if carries_grpc {
        wrong.extend(unexpected(&format!("gRPC to {name}"), http2, true, &[GRPC]).await);
    }
    wrong
}

/// Keeps the lease of a world as long as it is there.
fn keep_lease(world: &Arc<World>) {
    let world = Arc::downgrade(world);
    tokio::spawn(async move {
        while let Some(world) = world.upgrade() {
            hold_lease(&world.node);
            drop(world);
            // Less than the lease.
            sleep(Duration::from_millis(500)).await;
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the stage peers finds the programs"]
async fn other_proxies_as_upstream_give_every_answer() {
    let origin = origin().await;
    let mut wrong = Vec::new();
    for (peer, program) in PEERS.into_iter().filter_map(|peer| Some((peer, peer.program()?))) {
        for by_http2 in [false, true].into_iter().filter(|by_http2| !by_http2 || peer.speaks_http2_upstream()) {
            let running = peer.start(&program, origin, by_http2).await;
            for (scheme, address) in [("http", running.http1), ("h2c", running.http2)] {
                let world = Arc::new(aviary(format!("{scheme}://{address}")).await);
                keep_lease(&world);
                let carries_grpc = scheme == "h2c" && (by_http2 || peer == Peer::Nginx);
                let name = format!("Aviary, then {peer:?} by {scheme}, which has HTTP/2 upstream: {by_http2}");
                wrong.extend(all(&name, world.address, world.address, carries_grpc).await);
            }
        }
    }
    assert!(wrong.is_empty(), "{} unexpected answers: {wrong:#?}", wrong.len());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the stage peers finds the programs"]
async fn other_proxies_in_front_get_every_answer() {
    let origin = origin().await;
    let mut wrong = Vec::new();
    for scheme in ["http", "h2c"] {
        let world = Arc::new(aviary(format!("{scheme}://{origin}")).await);
        keep_lease(&world);
        for (peer, program) in PEERS.into_iter().filter_map(|peer| Some((peer, peer.program()?))) {
            for by_http2 in [false, true].into_iter().filter(|by_http2| !by_http2 || peer.speaks_http2_upstream()) {
                let running = peer.start(&program, world.address, by_http2).await;
                let carries_grpc = scheme == "h2c" && (by_http2 || peer == Peer::Nginx);
                let name = format!("{peer:?} with HTTP/2 upstream: {by_http2}, then Aviary with {scheme}");
                wrong.extend(all(&name, running.http1, running.http2, carries_grpc).await);
            }
        }
    }
    assert!(wrong.is_empty(), "{} unexpected answers: {wrong:#?}", wrong.len());
}
