//! What must hold for whatever bytes a client sends: they are refused, or mean one thing, to the proxy and to every server.
//!
//! The fuzz target and the bounded test in `tests/it/fuzz.rs` both use this file.

use aviary::proxy::body::{BodyFraming, Keep};
use aviary::proxy::request::{CanonicalRequest, FIELDS_MAX, Gateway, HEAD_BYTES_MAX, Protocol, Received};
use aviary::proxy::wire::{self, Opening, Room};

/// What servers are told of the clients.
const GATEWAY: Gateway = Gateway { peer: "192.0.2.9", service: "svc", configured: &[], is_trusted: true };

/// Checks a client's bytes, as HTTP/1.x and as the head of an HTTP/2 stream; returns how many of the two were taken.
///
/// # Panics
/// When what was taken could be read in another way.
pub fn check(bytes: &[u8]) -> usize {
    usize::from(check_http1(bytes)) + usize::from(check_http2(bytes))
}

fn check_http1(bytes: &[u8]) -> bool {
    let mut room = Room::default();
    let Ok(Opening::Request(asked, length)) = wire::request(bytes, false, &mut room) else { return false };
    assert!(length <= HEAD_BYTES_MAX && asked.fields.len() <= FIELDS_MAX);
    check_head(&asked);
    check_body(asked.body, &bytes[length..]);
    true
}

/// Takes the same head for one that came in the frames of a stream: its host is the authority.
fn check_http2(bytes: &[u8]) -> bool {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    if !matches!(parsed.parse(bytes), Ok(httparse::Status::Complete(_))) {
        return false;
    }
    let (hosts, others): (Vec<_>, Vec<_>) =
        parsed.headers.iter().copied().partition(|field| field.name.eq_ignore_ascii_case("host"));
    let received = Received {
        protocol: Protocol::Http2,
        method: parsed.method.unwrap_or(""),
        target: parsed.path.unwrap_or(""),
        authority: hosts.first().and_then(|host| std::str::from_utf8(host.value).ok()),
        fields: &others,
        has_ended: false,
    };
    let Ok(asked) = CanonicalRequest::of(received, None) else { return false };
    check_head(&asked);
    true
}

/// A server that reads strictly understands the same as the proxy, and what the proxy wrote is complete.
fn check_head(asked: &CanonicalRequest) {
    assert_ne!(asked.method, "CONNECT");
    let (mut out, mut room) = (Vec::new(), Room::default());
    asked.write(&GATEWAY, &mut out);
    let text = String::from_utf8_lossy(&out).to_lowercase();
    let again = match wire::request(&out, false, &mut room) {
        Ok(Opening::Request(again, length)) if length == out.len() => again,
        other => panic!("no server can read {text:?}: {other:?}"),
    };
    let meaning = |asked: &CanonicalRequest| {
        (asked.method.to_string(), asked.path_and_query.to_string(), asked.host(&GATEWAY).to_string(), asked.body)
    };
    assert_eq!(meaning(&again), meaning(asked), "{text:?}");
    assert_eq!(again.wants_websocket, asked.wants_websocket, "{text:?}");
    let count = |name: &str| text.matches(&format!("\r\n{name}: ")).count();
    assert_eq!(count("host"), 1, "{text:?}");
    assert!(count("content-length") + count("transfer-encoding") <= 1, "{text:?}");
    assert_eq!(count("http2-settings") + count("proxy-connection") + count("keep-alive"), 0, "{text:?}");
    assert_eq!(count("upgrade"), count("connection"), "{text:?}");
    assert!(text.matches("\r\n\r\n").count() == 1 && text.ends_with("\r\n\r\n"), "{text:?}");
}

/// What is passed on of a body has the same content, and ends where the body ended, with nothing behind it.
fn check_body(body: BodyFraming, rest: &[u8]) {
    let taken = |mut body: BodyFraming, bytes: &[u8], keep| {
        let mut bytes = bytes.to_vec();
        let part = body.take(&mut bytes, keep).ok()?;
        bytes.truncate(part.kept);
        Some((bytes, part.used, body.has_ended()))
    };
    let Some((content, used, has_ended)) = taken(body, rest, Keep::Data) else { return };
    let (framed, framed_used, _) = taken(body, rest, Keep::Framed).expect("what is read as content is passed on");
    assert_eq!(framed_used, used);
    assert!(used <= rest.len() && (has_ended || used == rest.len()), "{used} of {}", rest.len());
    let (again, again_used, ended_again) = taken(body, &framed, Keep::Data).expect("no server can read the body");
    assert_eq!((again, again_used), (content, framed.len()), "{framed:?}");
    assert!(!has_ended || ended_again, "{framed:?} has no end");
}
