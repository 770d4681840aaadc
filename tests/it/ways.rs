//! The same request means the same on every way in and out: one table of requests, sent by HTTP/1.1 (as the first of a connection,
//! and after one that took the slow path), HTTP/1.0 and HTTP/2, to servers of HTTP/1.1 and HTTP/2.

use std::net::SocketAddr;

use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::proxy::{SOON, World, head, hold_lease, settings, upstream, view_of, world_with};

/// A way by which a request reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WayIn {
    /// The first request of a connection.
    Http11First,
    /// A request of a connection whose first one had an absolute target, and whose second a node's page.
    Http11Later,
    Http10,
    Http2,
}

const WAYS_IN: [WayIn; 4] = [WayIn::Http11First, WayIn::Http11Later, WayIn::Http10, WayIn::Http2];

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// A server got it, and saw this.
    Passed(String),
    /// The proxy answered with this status, or reset the stream (0).
    Refused(u16),
}

struct Case {
    method: &'static str,
    target: &'static str,
    host: Option<&'static str>,
    fields: &'static [(&'static str, &'static str)],
    body: &'static str,
    /// Status of the proxy's answer; 200: a server gets it.
    status: u16,
    /// Ways on which it ends otherwise, and why that is right.
    but: &'static [(WayIn, u16, &'static str)],
}

const PLAIN: Case =
    Case { method: "GET", target: "/a?b=c", host: Some("m.example"), fields: &[], body: "", status: 200, but: &[] };

const NO_STREAM: &str = "RFC 9113, 8.2.2: the stream is malformed, and is reset";
const NO_FRAGMENT: &str = "h2 cuts a fragment off before the proxy sees it";

fn cases() -> Vec<Case> {
    use WayIn::{Http2, Http10};
    let refused = |target| Case { target, status: 400, ..PLAIN };
    let host = |host| Case { host: Some(host), status: 400, ..PLAIN };
    vec![
        PLAIN,
        Case { method: "POST", body: "hello", ..PLAIN },
        Case { method: "POST", body: "", ..PLAIN },
        Case { method: "PUT", body: "hello", fields: &[("content-type", "text/plain")], ..PLAIN },
        Case { method: "PATCH", fields: &[("x-a", "1"), ("x-a", "2"), ("x-empty", "")], ..PLAIN },
        Case { method: "OPTIONS", target: "*", ..PLAIN },
        Case { method: "BREW", ..PLAIN },
        Case { fields: &[("cookie", "a=1"), ("x-b", "1"), ("cookie", "b=2"), ("cookie", "c=3")], ..PLAIN },
        Case { fields: &[("x-forwarded-for", "192.0.2.1"), ("x-forwarded-for", "192.0.2.2")], ..PLAIN },
        Case { fields: &[("x-forwarded-host", "front.example"), ("x-forwarded-proto", "https")], ..PLAIN },
        Case { fields: &[("forwarded", "for=192.0.2.1"), ("via", "1.0 front")], ..PLAIN },
        Case { fields: &[("proxy-authorization", "Basic eA=="), ("keep-me", "1")], ..PLAIN },
        Case { fields: &[("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA")], ..PLAIN },
        Case { target: "//a//b/../c", ..PLAIN },
        Case { target: "/%2e%2e/%00?%zz", ..PLAIN },
        Case { target: "/a?b?c/d", ..PLAIN },
        Case { target: "/v2/models/m%6Fdel/infer", ..PLAIN },
        Case { host: Some("m.example:8080"), ..PLAIN },
        Case { host: Some("[::1]:8080"), ..PLAIN },
        Case { host: None, status: 400, but: &[(Http10, 200, "HTTP/1.0 has no Host: the service's name")], ..PLAIN },
        refused("hello"),
        refused("foo:bar"),
        refused("*"),
        refused("/a b"),
        refused("/a<b"),
        Case { target: "/a#frag", status: 400, but: &[(Http2, 200, NO_FRAGMENT)], ..PLAIN },
        host("u@m.example"),
        host("m.example/x"),
        host("m.example x"),
        host("a,b"),
        host("m.example:x"),
        host("m.example:70000"),
        Case { fields: &[("host", "other.example")], status: 400, ..PLAIN },
        Case { method: "CONNECT", target: "a:1", status: 405, ..PLAIN },
        Case { method: "POST", fields: &[("content-length", "3"), ("content-length", "3")], status: 400, ..PLAIN },
        Case { method: "POST", fields: &[("content-length", "+3")], status: 400, ..PLAIN },
        Case {
            method: "POST",
            fields: &[("transfer-encoding", "chunked"), ("content-length", "3")],
            status: 400,
            but: &[(Http2, 0, NO_STREAM)],
            ..PLAIN
        },
        Case {
            method: "POST",
            fields: &[("transfer-encoding", "gzip")],
            status: 501,
            but: &[(Http2, 0, NO_STREAM)],
            ..PLAIN
        },
        Case { fields: &[("connection", "host, x-mine"), ("x-mine", "1")], but: &[(Http2, 0, NO_STREAM)], ..PLAIN },
        Case { fields: &[("upgrade", "h2c")], but: &[(Http2, 0, NO_STREAM)], ..PLAIN },
        Case { fields: &[("connection", "upgrade"), ("upgrade", "h2c")], but: &[(Http2, 0, NO_STREAM)], ..PLAIN },
        Case { fields: &[("x-aviary-service", "none")], status: 404, ..PLAIN },
    ]
}

/// Returns what a server tells of a request, without what its protocol frames it by.
fn told(method: &str, target: &str, host: &str, fields: Vec<(String, String)>, body: &str) -> String {
    const OF_THE_PROTOCOL: [&str; 7] =
        ["host", "content-length", "transfer-encoding", "te", "expect", "connection", "date"];
    let mut fields: Vec<_> = fields.into_iter().filter(|(name, _)| !OF_THE_PROTOCOL.contains(&&**name)).collect();
    fields.sort();
    let fields: String = fields.iter().map(|(name, value)| format!("{name}={value}|")).collect();
    format!("SEEN {method} {target} {host} {fields} {body:?}")
}

/// Starts a server of HTTP/1.1 that tells what it sees.
async fn http1_server() -> SocketAddr {
    upstream(|mut stream| async move {
        loop {
            let head = head(&mut stream).await;
            if head.is_empty() {
                return;
            }
            let mut lines = head.trim_end().split("\r\n");
            let mut line = lines.next().unwrap().split(' ');
            let (method, target) = (line.next().unwrap(), line.next().unwrap());
            let fields: Vec<_> = lines
                .map(|line| line.split_once(':').unwrap())
                .map(|(name, value)| (name.to_lowercase(), value.trim().to_string()))
                .collect();
            let hosts: Vec<_> = fields.iter().filter(|(name, _)| name == "host").map(|(_, host)| &**host).collect();
            let length =
                fields.iter().find(|(name, _)| name == "content-length").map(|(_, value)| value.parse().unwrap());
            let mut body = vec![0; length.unwrap_or(0)];
            stream.read_exact(&mut body).await.unwrap();
            if fields.iter().any(|(name, _)| name == "transfer-encoding") {
                body = chunked(&mut stream).await;
            }
            let seen = told(method, target, &hosts.join(" AND "), fields.clone(), &String::from_utf8_lossy(&body));
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{seen}", seen.len());
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// Reads a chunked body without extensions or trailers.
async fn chunked(stream: &mut TcpStream) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        while !line.ends_with("\r\n") {
            line.push(char::from(stream.read_u8().await.unwrap()));
        }
        let mut chunk = vec![0; usize::from_str_radix(line.trim(), 16).unwrap() + 2];
        stream.read_exact(&mut chunk).await.unwrap();
        if chunk.len() == 2 {
            return body;
        }
        body.extend_from_slice(&chunk[..chunk.len() - 2]);
    }
}

/// Starts a server of HTTP/2 that tells what it sees.
async fn http2_server() -> SocketAddr {
    upstream(|stream| async move {
        let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let field = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
                (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            };
            let fields = head.headers.iter().map(field).collect();
            let target = head.uri.path_and_query().map_or("", |target| target.as_str());
            // The authority, and no Host field beside it (RFC 9113, 8.3.1).
            let host = match head.headers.get("host") {
                None => head.uri.authority().map(ToString::to_string).unwrap_or_default(),
                Some(host) => format!("{host:?} BESIDE {:?}", head.uri.authority()),
            };
            let seen = told(head.method.as_str(), target, &host, fields, &String::from_utf8_lossy(&body));
            Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(Bytes::from(seen))))
        });
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

/// Reads an answer of HTTP/1.x whose body has a length.
async fn answer(stream: &mut TcpStream) -> Fate {
    let head = timeout(SOON, head(stream)).await.expect("an answer in time");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await.unwrap();
    fate(status, String::from_utf8(body).unwrap(), head.to_lowercase().contains("\r\nallow: get"))
}

fn fate(status: u16, body: String, allows: bool) -> Fate {
    assert_eq!(status == 405, allows, "405 says what is allowed");
    if body.starts_with("SEEN ") { Fate::Passed(body) } else { Fate::Refused(status) }
}

async fn send_http1(world: &World, way: WayIn, case: &Case) -> Fate {
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    if way == WayIn::Http11Later {
        for target in ["http://m.example/first", "/livez"] {
            let before = format!("GET {target} HTTP/1.1\r\nhost: m.example\r\n\r\n");
            stream.write_all(before.as_bytes()).await.unwrap();
            answer(&mut stream).await;
        }
    }
    let version = if way == WayIn::Http10 { "1.0" } else { "1.1" };
    let mut request = format!("{} {} HTTP/{version}\r\n", case.method, case.target);
    case.host.iter().for_each(|host| request += &format!("Host: {host}\r\n"));
    case.fields.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
    if !case.body.is_empty() {
        request += &format!("Content-Length: {}\r\n", case.body.len());
    }
    request += &format!("\r\n{}", case.body);
    stream.write_all(request.as_bytes()).await.unwrap();
    answer(&mut stream).await
}

/// Writes a frame of HTTP/2.
fn put_frame(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Writes a field as HPACK has it without an index (RFC 7541, 6.2.2): any bytes, also those that no library would send.
fn put_literal(name: &str, value: &str, out: &mut Vec<u8>) {
    out.push(0);
    for text in [name, value] {
        assert!(text.len() < 127, "{text}");
        out.push(text.len() as u8);
        out.extend_from_slice(text.as_bytes());
    }
}

/// Returns the status that a block of fields begins with, as the h2 crate encodes it.
fn status_of(block: &[u8]) -> u16 {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    let indexed = |byte: u8| STATIC.get(usize::from(byte & 0x7f).wrapping_sub(8)).copied();
    match block {
        [byte, ..] if byte & 0x80 != 0 => indexed(*byte).expect("a status first"),
        // A dynamic table's new size may come first.
        [byte, rest @ ..] if byte & 0xe0 == 0x20 => status_of(rest),
        [_, length, value @ ..] if length & 0x80 != 0 => {
            let bits: String = value[..usize::from(length & 0x7f)].iter().map(|byte| format!("{byte:08b}")).collect();
            let (mut rest, mut digits) = (&bits[..], String::new());
            // The Huffman codes of digits (RFC 7541, B): three of five bits, seven of six.
            while digits.len() < 3 {
                let five = u8::from_str_radix(&rest[..5], 2).unwrap();
                let (digit, length) = match five {
                    0..=2 => (five, 5),
                    _ => (u8::from_str_radix(&rest[..6], 2).unwrap() - 0b011001 + 3, 6),
                };
                digits.push(char::from(b'0' + digit));
                rest = &rest[length..];
            }
            digits.parse().unwrap()
        }
        [_, length, value @ ..] => std::str::from_utf8(&value[..usize::from(*length)]).unwrap().parse().unwrap(),
        _ => panic!("no status in {block:?}"),
    }
}

async fn send_http2(world: &World, case: &Case) -> Fate {
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    put_frame(4, 0, 0, &[], &mut out);
    let mut block = Vec::new();
    put_literal(":method", case.method, &mut block);
    if case.method != "CONNECT" {
        put_literal(":scheme", "http", &mut block);
        put_literal(":path", case.target, &mut block);
    }
    case.host.iter().for_each(|host| put_literal(":authority", host, &mut block));
    case.fields.iter().for_each(|(name, value)| put_literal(name, value, &mut block));
    if !case.body.is_empty() {
        put_literal("content-length", &case.body.len().to_string(), &mut block);
    }
    let has_ended = case.body.is_empty() && case.method != "CONNECT";
    put_frame(1, if has_ended { 5 } else { 4 }, 1, &block, &mut out);
    if !case.body.is_empty() {
        put_frame(0, 1, 1, case.body.as_bytes(), &mut out);
    }
    stream.write_all(&out).await.unwrap();
    let (mut status, mut allows, mut body) = (0, false, Vec::new());
    loop {
        let mut frame = [0; 9];
        if timeout(SOON, stream.read_exact(&mut frame)).await.expect("an answer in time").is_err() {
            return Fate::Refused(0);
        }
        let [a, b, c, kind, flags, ..] = frame;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        match kind {
            0 => body.extend_from_slice(&payload),
            1 => {
                status = status_of(&payload);
                // The only long answer of the proxy's own that begins with this status.
                allows = status == 405;
            }
            3 | 7 => return Fate::Refused(0),
            _ => {}
        }
        if kind <= 1 && flags & 1 != 0 {
            return fate(status, String::from_utf8(body).unwrap(), allows);
        }
    }
}

pub(crate) async fn both_worlds() -> [(&'static str, World); 2] {
    both_worlds_with(settings()).await
}

/// Returns a proxy in front of a server of HTTP/1.1 and one in front of a server of HTTP/2, which tell what they see.
pub(crate) async fn both_worlds_with(settings: ProxySettings) -> [(&'static str, World); 2] {
    let (http1, http2) = (http1_server().await, http2_server().await);
    let at = |url: String| {
        let settings = settings.clone();
        async move { world_with(view_of(None, None, 0, |spec| spec.stable.urls = vec![url]), settings).await }
    };
    [("http", at(format!("http://{http1}")).await), ("h2c", at(format!("h2c://{http2}")).await)]
}

#[tokio::test]
async fn a_request_means_the_same_on_every_way_in_and_out() {
    let worlds = both_worlds().await;
    let mut wrong = Vec::new();
    for case in cases() {
        let (name, mut seen) = (format!("{} {} {:?} {:?}", case.method, case.target, case.host, case.fields), None);
        for way in WAYS_IN {
            let but = case.but.iter().find(|(other, ..)| *other == way);
            let expected = but.map_or(case.status, |(_, status, _)| *status);
            for (out, world) in &worlds {
                hold_lease(&world.node);
                let found = match way {
                    WayIn::Http2 => send_http2(world, &case).await,
                    _ => send_http1(world, way, &case).await,
                };
                match (&found, expected) {
                    (Fate::Passed(now), 200) if but.is_none() => {
                        let first = seen.get_or_insert_with(|| now.clone());
                        if first != now {
                            wrong.push(format!("{name} by {way:?} to {out}:\n  {now}\n  instead of\n  {first}"));
                        }
                    }
                    (Fate::Passed(_), 200) => {}
                    (Fate::Refused(status), expected) if *status == expected => {}
                    // A malformed stream is reset (RFC 9113, 8.1.1).
                    (Fate::Refused(0), 400) if way == WayIn::Http2 => {}
                    _ => wrong.push(format!("{name} by {way:?} to {out}: {found:?}, expected {expected}")),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn what_a_server_sees_is_what_the_client_sent() {
    for (out, world) in both_worlds().await {
        let case = Case {
            method: "POST",
            fields: &[("cookie", "a=1"), ("cookie", "b=2"), ("x-forwarded-for", "192.0.2.1"), ("x-mine", "1")],
            body: "hello",
            ..PLAIN
        };
        let expected = "SEEN POST /a?b=c m.example cookie=a=1; b=2|via=1.1 aviary|x-forwarded-for=192.0.2.1, 127.0.0.1|\
            x-forwarded-host=m.example|x-forwarded-proto=http|x-mine=1| \"hello\"";
        assert_eq!(send_http2(&world, &case).await, Fate::Passed(expected.into()), "to {out}");
        assert_eq!(send_http1(&world, WayIn::Http10, &case).await, Fate::Passed(expected.into()), "to {out}");
    }
}

#[tokio::test]
async fn what_nobody_trusted_says_of_those_before_it_is_replaced() {
    let case = Case {
        fields: &[
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-host", "front.example"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-port", "443"),
            ("forwarded", "for=192.0.2.1;proto=https"),
            ("x-forward", "kept"),
        ],
        ..PLAIN
    };
    let own = "forwarded=for=127.0.0.1;proto=http|via=1.1 aviary|x-forward=kept|x-forwarded-for=127.0.0.1|\
               x-forwarded-host=m.example|x-forwarded-proto=http|";
    let passed = "forwarded=for=127.0.0.1;proto=http|forwarded=for=192.0.2.1;proto=https|via=1.1 aviary|x-forward=kept|\
                  x-forwarded-for=192.0.2.1, 127.0.0.1|x-forwarded-host=front.example|x-forwarded-port=443|\
                  x-forwarded-proto=https|";
    for (trusted, expected) in [(vec!["10.0.0.0/8"], own), (vec!["10.0.0.0/8", "127.0.0.1"], passed), (vec![], passed)]
    {
        let trusted = trusted.iter().map(|network| network.parse().unwrap()).collect();
        for (out, world) in both_worlds_with(ProxySettings { trusted, ..settings() }).await {
            let expected = Fate::Passed(format!("SEEN GET /a?b=c m.example {expected} \"\""));
            for way in WAYS_IN {
                hold_lease(&world.node);
                let found = match way {
                    WayIn::Http2 => send_http2(&world, &case).await,
                    _ => send_http1(&world, way, &case).await,
                };
                assert_eq!(found, expected, "by {way:?} to {out}");
            }
        }
    }
}
