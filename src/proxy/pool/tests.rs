//! The pool against real HTTP/2 servers, and against some that are none.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::HeaderValue;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use super::super::failure::ConnectFailure;
use super::super::upstream::Servers;
use super::*;

const SOON: Duration = Duration::from_secs(10);
const MS: Duration = Duration::from_millis(1);

fn limits() -> PoolLimits {
    PoolLimits {
        connect: 500 * MS,
        first_byte: 5_000 * MS,
        ping_interval: None,
        ping_timeout: 200 * MS,
        idle: 60_000 * MS,
        life: 60_000 * MS,
    }
}

/// A server, and how many connections it took.
struct Upstream {
    server: Arc<Server>,
    connections: Arc<AtomicUsize>,
}

/// Starts a server whose connections are handled by `handle`, with their numbers from 0.
async fn raw<F, C>(handle: F) -> Upstream
where
    F: Fn(TcpStream, usize) -> C + Send + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            tokio::spawn(handle(stream, count.fetch_add(1, Relaxed)));
        }
    });
    Upstream { server: at(address), connections }
}

fn at(address: SocketAddr) -> Arc<Server> {
    // One registry for all: a pool tells its servers apart by their places there.
    static SERVERS: LazyLock<Servers> = LazyLock::new(Servers::default);
    SERVERS.named(&format!("h2c://{address}")).unwrap()
}

/// Starts a server of HTTP/2 with these settings, whose requests `answer` gets with their connections' numbers.
async fn http2<F, A>(settings: impl Fn(&mut h2::server::Builder) + Send + 'static, answer: F) -> Upstream
where
    F: Fn(Request<RecvStream>, SendResponse<Bytes>, usize) -> A + Clone + Send + 'static,
    A: Future<Output = ()> + Send + 'static,
{
    raw(move |stream, number| {
        let (mut builder, answer) = (h2::server::Builder::new(), answer.clone());
        settings(&mut builder);
        async move {
            let Ok(mut connection) = builder.handshake(stream).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(answer(request, respond, number));
            }
        }
    })
    .await
}

async fn ok(_: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize) {
    let _ = respond.send_response(Response::new(()), true);
}

fn get() -> Request<Empty<Bytes>> {
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = "/predict".parse().unwrap();
    request
}

async fn send<B>(
    pool: &Http2Pool,
    server: &Arc<Server>,
    request: Request<B>,
) -> Result<Response<AnswerBody>, StreamFailure>
where
    B: Body<Data = Bytes, Error: std::fmt::Display> + Send + Unpin + 'static,
{
    pool.send(server, request, || true).await
}

async fn status(pool: &Http2Pool, upstream: &Upstream) -> Result<u16, StreamFailure> {
    let answered = timeout(SOON, send(pool, &upstream.server, get())).await.expect("an answer, or a failure");
    Ok(answered?.status().as_u16())
}

#[tokio::test]
async fn a_servers_stream_limit_costs_connections_and_no_time() {
    let most = Arc::new(AtomicUsize::new(0));
    for limit in [1, 2, 5, 100] {
        let at_once = Arc::new([const { AtomicUsize::new(0) }; 32]);
        let (open, peak) = (at_once.clone(), most.clone());
        let slow = move |_: Request<RecvStream>, mut respond: SendResponse<Bytes>, number: usize| {
            let (open, peak) = (open.clone(), peak.clone());
            async move {
                peak.fetch_max(open[number].fetch_add(1, Relaxed) + 1, Relaxed);
                sleep(1_000 * MS).await;
                open[number].fetch_sub(1, Relaxed);
                let _ = respond.send_response(Response::new(()), true);
            }
        };
        most.store(0, Relaxed);
        let upstream = http2(move |builder| _ = builder.max_concurrent_streams(limit), slow).await;
        let pool = Arc::new(Http2Pool::new(limits()));
        let began = Instant::now();
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..12 {
            let (pool, server) = (pool.clone(), upstream.server.clone());
            asking.spawn(async move { send(&pool, &server, get()).await.unwrap().status() });
        }
        while let Some(status) = asking.join_next().await {
            assert_eq!(status.unwrap(), 200);
        }
        assert!(began.elapsed() < 2_000 * MS, "a limit of {limit} took {:?}", began.elapsed());
        assert!(most.load(Relaxed) <= limit as usize, "{} at once, the limit is {limit}", most.load(Relaxed));
        let needed = 12_usize.div_ceil(limit as usize);
        let made = upstream.connections.load(Relaxed);
        assert!((needed..=needed + 1).contains(&made), "{made} connections for a limit of {limit}");
    }
}

#[tokio::test]
async fn a_limit_of_none_is_waited_for_and_not_dialled_around() {
    let upstream = raw(|stream, _| async move {
        let mut builder = h2::server::Builder::new();
        let mut connection = builder.max_concurrent_streams(0).handshake::<_, Bytes>(stream).await.unwrap();
        let raising = async {
            sleep(700 * MS).await;
        };
        tokio::pin!(raising);
        tokio::select! {
            _ = connection.accept() => panic!("a stream above the limit"),
            () = &mut raising => {}
        }
        drop(connection);
    })
    .await;
    let pool = Http2Pool::new(limits());
    let (one, other) = tokio::join!(status(&pool, &upstream), status(&pool, &upstream));
    for failure in [one, other] {
        assert!(matches!(failure, Err(StreamFailure::Connect(_))), "{failure:?}");
    }
    assert_eq!(upstream.connections.load(Relaxed), 1);
}

#[tokio::test]
async fn a_refused_stream_was_not_processed() {
    let refuse = |_: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
        respond.send_reset(Reason::REFUSED_STREAM);
    };
    let upstream = http2(|_| (), refuse).await;
    let pool = Http2Pool::new(limits());
    for _ in 0..3 {
        let failure = status(&pool, &upstream).await;
        assert!(matches!(failure, Err(StreamFailure::NotProcessed(_))), "{failure:?}");
    }
    assert_eq!(upstream.connections.load(Relaxed), 1, "the connection itself is well");
}

#[tokio::test]
async fn any_other_reset_may_have_been_processed() {
    for reason in [Reason::CANCEL, Reason::INTERNAL_ERROR, Reason::NO_ERROR, Reason::ENHANCE_YOUR_CALM] {
        let reset = move |_: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
            respond.send_reset(reason);
        };
        let upstream = http2(|_| (), reset).await;
        let failure = status(&Http2Pool::new(limits()), &upstream).await;
        assert!(matches!(failure, Err(StreamFailure::Broken(_))), "{reason:?}: {failure:?}");
    }
}

/// Returns a frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Takes a client's preface and sends its own SETTINGS.
async fn shake(stream: &mut TcpStream) {
    stream.read_exact(&mut [0; 24]).await.unwrap();
    stream.write_all(&[frame(4, 0, 0, &[]), frame(4, 1, 0, &[])].concat()).await.unwrap();
}

/// Reads frames until one with the head of a request comes; returns its stream.
async fn request_on(stream: &mut TcpStream) -> u32 {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        if head[3] == 1 {
            return u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        }
    }
}

fn go_away(last: u32, reason: u32) -> Vec<u8> {
    frame(7, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat())
}

/// The head of a 200 without a body: `:status: 200` of HPACK's static table.
fn ok_on(id: u32) -> Vec<u8> {
    frame(1, 5, id, &[0x88])
}

#[tokio::test]
async fn a_stream_behind_goaways_last_one_was_not_processed_and_others_go_on() {
    for reason in [0, 11] {
        let upstream = raw(move |mut stream, number| async move {
            shake(&mut stream).await;
            let first = request_on(&mut stream).await;
            if number == 0 {
                request_on(&mut stream).await;
                stream.write_all(&go_away(first, reason)).await.unwrap();
                sleep(100 * MS).await;
            }
            stream.write_all(&ok_on(first)).await.unwrap();
            sleep(SOON).await;
        })
        .await;
        let pool = Http2Pool::new(limits());
        let (one, other) = tokio::join!(status(&pool, &upstream), status(&pool, &upstream));
        // Either may have been the first.
        let (answered, failed) = if one.is_ok() { (one, other) } else { (other, one) };
        assert_eq!(answered.unwrap(), 200);
        assert!(matches!(failed, Err(StreamFailure::NotProcessed(_))), "{failed:?}");
        // The next one takes another connection.
        assert_eq!(status(&pool, &upstream).await.unwrap(), 200);
        assert_eq!(upstream.connections.load(Relaxed), 2);
    }
}

#[tokio::test]
async fn a_connection_that_ends_under_a_request_is_stale_if_it_had_served() {
    let upstream = raw(|mut stream, number| async move {
        shake(&mut stream).await;
        if number == 0 {
            let first = request_on(&mut stream).await;
            stream.write_all(&ok_on(first)).await.unwrap();
        }
        request_on(&mut stream).await;
    })
    .await;
    let pool = Http2Pool::new(limits());
    assert_eq!(status(&pool, &upstream).await.unwrap(), 200);
    let failure = status(&pool, &upstream).await;
    assert!(matches!(failure, Err(StreamFailure::Stale(_))), "{failure:?}");
    let failure = status(&pool, &upstream).await;
    assert!(matches!(failure, Err(StreamFailure::Broken(_))), "{failure:?}");
}

#[tokio::test]
async fn an_answer_that_is_cut_is_no_whole_one() {
    for reason in [Reason::CANCEL, Reason::INTERNAL_ERROR, Reason::REFUSED_STREAM, Reason::NO_ERROR] {
        for length in [None, Some("7")] {
            let cut = move |_: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
                let mut head = Response::new(());
                if let Some(length) = length {
                    head.headers_mut().insert("content-length", HeaderValue::from_static(length));
                }
                let mut body = respond.send_response(head, false).unwrap();
                body.send_data("hello".into(), false).unwrap();
                sleep(50 * MS).await;
                body.send_reset(reason);
            };
            let upstream = http2(|_| (), cut).await;
            let answer = send(&Http2Pool::new(limits()), &upstream.server, get()).await.unwrap();
            let whole = timeout(SOON, answer.into_body().collect()).await.unwrap().is_ok();
            // Without a length, this one is how a server says that it needs no more of the request.
            assert_eq!(whole, reason == Reason::NO_ERROR && length.is_none(), "{reason:?} with length {length:?}");
        }
    }
}

#[tokio::test]
async fn a_request_has_one_name_of_its_host() {
    let (told, mut names) = tokio::sync::mpsc::unbounded_channel();
    let tell = move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| {
        let told = told.clone();
        async move {
            let authority = request.uri().authority().map(ToString::to_string);
            told.send((authority, request.headers().get("host").cloned(), request.headers().len())).unwrap();
            let _ = respond.send_response(Response::new(()), true);
        }
    };
    let upstream = http2(|_| (), tell).await;
    let pool = Http2Pool::new(limits());
    for (host, expected) in [
        (Some("models.example"), "models.example"),
        (Some("[::1]:8080"), "[::1]:8080"),
        (None, upstream.server.authority.as_str()),
    ] {
        let mut request = get();
        if let Some(host) = host {
            request.headers_mut().insert("host", HeaderValue::from_static(host));
        }
        for (name, value) in
            [("connection", "x"), ("keep-alive", "1"), ("transfer-encoding", "chunked"), ("te", "gzip")]
        {
            request.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        assert_eq!(send(&pool, &upstream.server, request).await.unwrap().status(), 200);
        assert_eq!(names.recv().await.unwrap(), (Some(expected.to_string()), None, 0));
    }
}

#[tokio::test]
async fn a_body_of_any_size_arrives_with_its_trailers() {
    let echo = |request: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
        let (mut body, mut bytes) = (request.into_body(), 0);
        while let Some(Ok(data)) = body.data().await {
            bytes += data.len();
            let _ = body.flow_control().release_capacity(data.len());
        }
        let mut head = Response::new(());
        head.headers_mut().insert("bytes", bytes.into());
        let trailers = body.trailers().await.unwrap();
        let mut stream = respond.send_response(head, trailers.is_none()).unwrap();
        if let Some(trailers) = trailers {
            stream.send_trailers(trailers).unwrap();
        }
    };
    let upstream = http2(|_| (), echo).await;
    let pool = Http2Pool::new(limits());
    for size in [0, 1, 65_535, 65_536, 3 << 20] {
        let parts = [Frame::data(Bytes::from(vec![b'x'; size])), Frame::data(Bytes::new())];
        let mut fields = HeaderMap::new();
        fields.insert("sum", HeaderValue::from_static("7"));
        let parts = parts.into_iter().chain([Frame::trailers(fields)]).map(Ok::<_, std::io::Error>);
        let body = StreamBody::new(tokio_stream::iter(parts));
        let answer = timeout(SOON, send(&pool, &upstream.server, Request::new(body))).await.unwrap().unwrap();
        assert_eq!(answer.headers()["bytes"], size.to_string());
        let trailers = answer.into_body().collect().await.unwrap().trailers().cloned().unwrap();
        assert_eq!(trailers["sum"], "7");
        let answer = send(&pool, &upstream.server, Request::new(Full::from(vec![b'x'; size]))).await.unwrap();
        assert_eq!(answer.headers()["bytes"], size.to_string());
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_is_the_clients_failure() {
    let wait = |request: Request<RecvStream>, _respond: SendResponse<Bytes>, _: usize| async move {
        let mut body = request.into_body();
        while let Some(Ok(_)) = body.data().await {}
    };
    let upstream = http2(|_| (), wait).await;
    let parts = [Ok(Frame::data(Bytes::from_static(b"begun"))), Err(std::io::Error::other("gone"))];
    let body = StreamBody::new(tokio_stream::iter(parts));
    let failed = send(&Http2Pool::new(limits()), &upstream.server, Request::new(body)).await;
    assert!(matches!(failed, Err(StreamFailure::Body(_))), "{:?}", failed.err());
}

#[tokio::test]
async fn a_connection_whose_request_timed_out_takes_no_more() {
    let hang = |request: Request<RecvStream>, mut respond: SendResponse<Bytes>, number: usize| async move {
        if number == 0 && request.uri().path() == "/hang" {
            sleep(SOON).await;
        }
        let _ = respond.send_response(Response::new(()), true);
    };
    let upstream = http2(|_| (), hang).await;
    let pool = Http2Pool::new(PoolLimits { first_byte: 300 * MS, ..limits() });
    let mut request = get();
    *request.uri_mut() = "/hang".parse().unwrap();
    // A client that leaves early says nothing of the connection.
    assert!(timeout(50 * MS, send(&pool, &upstream.server, request.clone())).await.is_err());
    assert_eq!(status(&pool, &upstream).await.unwrap(), 200);
    assert_eq!(upstream.connections.load(Relaxed), 1);
    assert!(timeout(400 * MS, send(&pool, &upstream.server, request)).await.is_err());
    assert_eq!(status(&pool, &upstream).await.unwrap(), 200);
    assert_eq!(upstream.connections.load(Relaxed), 2);
}

#[tokio::test]
async fn a_connection_that_is_silent_gets_pings_and_then_ends() {
    // It answers the first request, and then nothing more: no PING either.
    let silent = raw(|mut stream, _| async move {
        shake(&mut stream).await;
        let first = request_on(&mut stream).await;
        stream.write_all(&ok_on(first)).await.unwrap();
        while stream.read(&mut [0; 1024]).await.is_ok_and(|length| length > 0) {}
    })
    .await;
    let pool = Http2Pool::new(PoolLimits { ping_interval: Some(100 * MS), ..limits() });
    assert_eq!(status(&pool, &silent).await.unwrap(), 200);
    let began = Instant::now();
    let failure = status(&pool, &silent).await.unwrap_err();
    assert!(failure.to_string().contains("did not answer a PING within 200 ms"), "{failure}");
    assert!((150 * MS..1_500 * MS).contains(&began.elapsed()), "{:?}", began.elapsed());
    // A live one goes on, however slow an answer is.
    let slow = |_: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
        sleep(900 * MS).await;
        let _ = respond.send_response(Response::new(()), true);
    };
    let live = http2(|_| (), slow).await;
    assert_eq!(status(&pool, &live).await.unwrap(), 200);
    assert_eq!(live.connections.load(Relaxed), 1);
}

#[tokio::test]
async fn connections_end_when_they_are_idle_or_old() {
    let idle = http2(|_| (), ok).await;
    let pool = Http2Pool::new(PoolLimits { idle: 200 * MS, ..limits() });
    for _ in 0..6 {
        assert_eq!(status(&pool, &idle).await.unwrap(), 200);
        sleep(60 * MS).await;
    }
    assert_eq!(idle.connections.load(Relaxed), 1);
    sleep(500 * MS).await;
    assert_eq!(status(&pool, &idle).await.unwrap(), 200);
    assert_eq!(idle.connections.load(Relaxed), 2);
    let old = http2(|_| (), ok).await;
    let pool = Http2Pool::new(PoolLimits { life: 300 * MS, ..limits() });
    let began = Instant::now();
    while began.elapsed() < 1_000 * MS {
        assert_eq!(status(&pool, &old).await.unwrap(), 200);
        sleep(20 * MS).await;
    }
    let made = old.connections.load(Relaxed);
    assert!((3..=5).contains(&made), "{made} connections in 1 s, each may be 300 ms old");
}

#[tokio::test]
async fn what_is_no_http2_server_can_t_be_connected_to() {
    let pool = Http2Pool::new(limits());
    let http1 = raw(|mut stream, _| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
    })
    .await;
    let failure = status(&pool, &http1).await.unwrap_err();
    assert!(matches!(failure, StreamFailure::Connect(ConnectFailure::Refused(_))), "{failure:?}");
    let mute = raw(|stream, _| async move {
        sleep(SOON).await;
        drop(stream);
    })
    .await;
    let failure = status(&pool, &mute).await.unwrap_err();
    assert!(matches!(failure, StreamFailure::Connect(ConnectFailure::Late(500))), "{failure:?}");
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let failure = send(&pool, &at(gone), get()).await.err().unwrap();
    assert!(matches!(failure, StreamFailure::Connect(ConnectFailure::Refused(_))), "{failure:?}");
}

#[tokio::test]
async fn requests_that_were_given_up_leave_their_places() {
    let hang = |request: Request<RecvStream>, mut respond: SendResponse<Bytes>, _: usize| async move {
        if request.uri().path() == "/hang" {
            sleep(SOON).await;
        }
        let _ = respond.send_response(Response::new(()), true);
    };
    let upstream = http2(|builder| _ = builder.max_concurrent_streams(2), hang).await;
    let pool = Arc::new(Http2Pool::new(limits()));
    let mut request = get();
    *request.uri_mut() = "/hang".parse().unwrap();
    for _ in 0..10 {
        let asked = (0..4).map(|_| {
            let (pool, server, request) = (pool.clone(), upstream.server.clone(), request.clone());
            tokio::spawn(async move { drop(send(&pool, &server, request).await) })
        });
        let asked: Vec<_> = asked.collect();
        sleep(20 * MS).await;
        asked.iter().for_each(tokio::task::JoinHandle::abort);
    }
    assert_eq!(status(&pool, &upstream).await.unwrap(), 200);
    let made = upstream.connections.load(Relaxed);
    assert!(made <= 4, "{made} connections for four requests at once");
}
