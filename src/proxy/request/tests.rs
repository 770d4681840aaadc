use proptest::prelude::*;

use super::*;
use crate::proxy::wire::{self, Opening, Room};

const GATEWAY: Gateway = Gateway { peer: "10.0.0.9", service: "fraud", configured: &[], is_trusted: true };

/// Returns what `look` finds in a request of HTTP/1.x.
fn read<T>(request: &str, look: impl FnOnce(&CanonicalRequest) -> T) -> Result<T, BadMessage> {
    match wire::request(request.as_bytes(), true, &mut Room::default())? {
        Opening::Request(asked, length) => {
            assert_eq!(length, request.find("\r\n\r\n").unwrap() + 4);
            Ok(look(&asked))
        }
        other => panic!("{other:?}"),
    }
}

/// Returns the head that a server gets, and how its body ends.
fn sent_on(request: &str) -> Result<(String, BodyFraming), BadMessage> {
    read(request, |asked| {
        let mut out = Vec::new();
        asked.write(&GATEWAY, &mut out);
        (String::from_utf8(out).unwrap(), asked.body)
    })
}

fn refused(head: &str) -> u16 {
    sent_on(&format!("POST / HTTP/1.1\r\n{head}\r\n\r\n")).expect_err(head).status
}

/// Reads a request of HTTP/2.
fn streamed<T>(
    (method, target, authority): (&str, &str, Option<&str>),
    fields: &[(&str, &str)],
    has_ended: bool,
    look: impl FnOnce(&CanonicalRequest) -> T,
) -> Result<T, BadMessage> {
    let fields: Vec<_> = fields.iter().map(|(name, value)| Header { name, value: value.as_bytes() }).collect();
    let received = Received { protocol: Protocol::Http2, method, target, authority, fields: &fields, has_ended };
    CanonicalRequest::of(received, None).map(|asked| look(&asked))
}

#[test]
fn a_head_is_sent_on_with_what_a_gateway_adds() {
    let (head, body) = sent_on(
        "POST /predict?a=1 HTTP/1.1\r\nHost: m.example\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\nX-Yours: 2\r\n\
         X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2\r\nForwarded: for=1.1.1.1\r\ntraceparent: 00-1-1-01\r\n\
         Content-Length: 005\r\nProxy-Connection: x\r\nHTTP2-Settings: AAMA\r\n\r\n",
    )
    .unwrap();
    let expected = "POST /predict?a=1 HTTP/1.1\r\nhost: m.example\r\nX-Yours: 2\r\nForwarded: for=1.1.1.1\r\n\
         traceparent: 00-1-1-01\r\nx-forwarded-host: m.example\r\nx-forwarded-proto: http\r\n\
         x-forwarded-for: 1.1.1.1, 2.2.2.2, 10.0.0.9\r\nforwarded: for=10.0.0.9;proto=http\r\nvia: 1.1 aviary\r\n\
         content-length: 5\r\n\r\n";
    assert_eq!((head.as_str(), body), (expected, BodyFraming::Length(5)));
}

#[test]
fn the_target_says_which_host_is_meant() {
    let head = |request: &str| sent_on(request).unwrap().0;
    let absolute = head("GET http://real.example/x HTTP/1.1\r\nHost: other.example\r\n\r\n");
    assert!(absolute.starts_with("GET /x HTTP/1.1\r\nhost: real.example\r\n"), "{absolute}");
    assert!(absolute.contains("x-forwarded-host: real.example\r\n") && !absolute.contains("other"), "{absolute}");
    let old = head("GET / HTTP/1.0\r\n\r\n");
    assert!(old.contains("host: fraud\r\n") && !old.contains("x-forwarded-host"), "{old}");
    assert_eq!(refused("Host: a@b"), 400);
    assert_eq!(refused("Host: a/b"), 400);
    assert_eq!(refused("Host: a b"), 400);
    assert_eq!(refused("Host: a, b"), 400);
    assert_eq!(refused("Host: a:b"), 400);
    for target in ["hello", "foo:bar", "*", "/a#b", "/a<b"] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(sent_on(&request).unwrap_err().status, 400, "{target}");
        let streamed = streamed(("GET", target, Some("x")), &[], true, |_| ());
        assert_eq!(streamed.unwrap_err().status, 400, "{target}");
    }
    assert_eq!(sent_on("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n").unwrap_err().status, 405);
    assert_eq!(streamed(("CONNECT", "", Some("a:1")), &[], false, |_| ()).unwrap_err().status, 405);
}

#[test]
fn a_stream_is_the_same_request() {
    let fields = [("cookie", "a=1"), ("x-a", "1"), ("cookie", "b=2"), ("te", "trailers"), ("content-length", "5")];
    let head = |asked: &CanonicalRequest| {
        let mut out = Vec::new();
        asked.write(&GATEWAY, &mut out);
        String::from_utf8(out).unwrap()
    };
    let by_stream = streamed(("POST", "/x", Some("m.example")), &fields, false, head).unwrap();
    let request = "POST /x HTTP/1.1\r\nhost: m.example\r\ncookie: a=1\r\nx-a: 1\r\ncookie: b=2\r\nte: trailers\r\ncontent-length: 5\r\n\r\n";
    assert_eq!(by_stream, sent_on(request).unwrap().0);
    assert!(by_stream.contains("\r\ncookie: a=1; b=2\r\n") && by_stream.matches("cookie").count() == 1, "{by_stream}");
    let body =
        |fields: &[(&str, &str)], has_ended| streamed(("POST", "/", Some("x")), fields, has_ended, |asked| asked.body);
    assert_eq!(body(&[], true), Ok(BodyFraming::NONE));
    assert_eq!(body(&[], false), Ok(BodyFraming::CHUNKED));
    assert_eq!(body(&[("content-length", "0")], true), Ok(BodyFraming::NONE));
    assert!(body(&[("content-length", "5")], true).is_err());
    assert!(body(&[("transfer-encoding", "chunked")], false).is_err());
    let host = |authority, host: &[(&str, &str)]| {
        streamed(("GET", "/", authority), host, true, |asked| asked.authority.to_string()).map_err(|bad| bad.status)
    };
    assert_eq!(host(Some("x"), &[("host", "X")]), Ok("x".into()));
    assert_eq!(host(None, &[("host", "y")]), Ok("y".into()));
    assert_eq!(host(Some("x"), &[("host", "y")]), Err(400));
    assert_eq!(host(Some("u@x"), &[]), Err(400));
    assert_eq!(host(None, &[]), Err(400));
    let long = "h".repeat(HEAD_BYTES_MAX);
    assert_eq!(streamed(("GET", "/", Some("x")), &[("x-a", &long)], true, |_| ()).unwrap_err(), HEAD_TOO_LARGE);
    let many = [("x-a", "1"); FIELDS_MAX + 1];
    assert_eq!(streamed(("GET", "/", Some("x")), &many, true, |_| ()).unwrap_err(), TOO_MANY_FIELDS);
}

#[test]
fn only_a_websocket_is_asked_for() {
    let asks = |request: &str| read(request, |asked| asked.wants_websocket).unwrap();
    let get = |fields: &str| format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
    assert!(asks(&get("Connection: Upgrade\r\nUpgrade: websocket\r\n")));
    assert!(asks(&get("Connection: keep-alive, upgrade\r\nUpgrade: h2c, WebSocket\r\n")));
    let dropped = [
        get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"),
        get("Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"),
        get("Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n"),
        get("Connection: Upgrade\r\nUpgrade: websocket2\r\n"),
        get("Upgrade: websocket\r\n"),
        get("Connection: Upgrade\r\n"),
        get("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n"),
        "GET / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".into(),
        "POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".into(),
    ];
    for request in dropped {
        assert!(!asks(&request), "{request}");
        let head = sent_on(&request).unwrap().0.to_lowercase();
        assert!(!head.contains("upgrade") && !head.contains("http2-settings"), "{head}");
    }
}

#[test]
fn no_connection_option_removes_a_field_that_is_relied_on() {
    for name in hop::RELIED_ON {
        let field = match name {
            "host" => "Host: x".to_string(),
            "content-length" => "Host: x\r\nContent-Length: 5".into(),
            "transfer-encoding" => "Host: x\r\nTransfer-Encoding: chunked".into(),
            _ => format!("Host: x\r\n{name}: 7"),
        };
        let request = |options: &str| sent_on(&format!("POST / HTTP/1.1\r\n{field}\r\nConnection: {options}\r\n\r\n"));
        let upper = name.to_uppercase();
        for options in [name.to_string(), format!("X-Mine, {upper}"), format!("x-mine\r\nConnection:,{upper}\t,")] {
            assert_eq!(request(&options), request("close"), "a request with Connection: {options}");
        }
    }
}

#[test]
fn fields_that_a_rollout_reads_are_not_removed_either() {
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: X-User, X-Mine\r\nX-User: u1\r\nX-Mine: 1\r\n\r\n";
    let head = |configured: &[String]| {
        read(request, |asked| {
            let mut out = Vec::new();
            asked.write(&Gateway { configured, ..GATEWAY }, &mut out);
            String::from_utf8(out).unwrap()
        })
        .unwrap()
    };
    assert!(!head(&[]).contains("X-User") && !head(&[]).contains("X-Mine"), "{}", head(&[]));
    let with = head(&["x-user".into()]);
    assert!(with.contains("\r\nX-User: u1\r\n") && !with.contains("X-Mine"), "{with}");
}

#[test]
fn what_can_be_read_in_two_ways_is_refused() {
    assert_eq!(refused("Host: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked"), 400);
    assert_eq!(refused("Host: x\r\nContent-Length: 3\r\nContent-Length: 3"), 400);
    assert_eq!(refused("Host: x\r\nContent-Length: 3, 3"), 400);
    assert_eq!(refused("Host: x\r\nContent-Length: +3"), 400);
    assert_eq!(refused("Host: x\r\nContent-Length: 99999999999999999999"), 400);
    assert_eq!(refused("Host: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), 400);
    assert_eq!(refused("Host: x\r\nTransfer-Encoding: gzip, chunked"), 501);
    assert_eq!(refused("Host: x\r\nTransfer-Encoding : chunked"), 400);
    assert_eq!(refused("Host: x\r\nX-Folded: a\r\n b"), 400);
    assert_eq!(refused("Host: x\r\nHost: y"), 400);
    assert_eq!(refused("X-No: host"), 400);
    assert_eq!(sent_on("POST / HTTP/3.0\r\nHost: x\r\n\r\n").unwrap_err().status, 505);
    let many: String = (0..101).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(refused(&format!("{many}Host: x")), 431);
}

#[test]
fn a_head_has_one_limit_however_it_arrives() {
    let request = |bytes: usize| {
        let head = "GET / HTTP/1.1\r\nHost: x\r\nX-A: \r\n\r\n";
        head.replace("X-A: ", &format!("X-A: {}", "a".repeat(bytes - head.len())))
    };
    assert!(sent_on(&request(HEAD_BYTES_MAX)).is_ok());
    assert_eq!(sent_on(&request(HEAD_BYTES_MAX + 1)).unwrap_err(), HEAD_TOO_LARGE);
    let long = request(40 * 1024);
    let partial = &long.as_bytes()[..HEAD_BYTES_MAX + 1];
    assert_eq!(wire::request(partial, true, &mut Room::default()).unwrap_err(), HEAD_TOO_LARGE);
}

#[test]
fn what_a_client_waits_for_is_known() {
    let waits = |request: &str| read(request, |asked| (asked.awaits_continue, asked.close)).unwrap();
    assert_eq!(waits("POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 1\r\n\r\n"), (true, false));
    assert_eq!(waits("POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: Close\r\n\r\n"), (false, true));
    assert_eq!(waits("POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"), (false, true));
    assert_eq!(waits("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), (false, false));
}

proptest! {
    #[test]
    fn a_head_in_pieces_is_the_same_head(
        fields in prop::collection::vec(("x-[a-z]{1,9}", "[ -~]{0,20}"), 0..9),
        length in 0u64..1_000_000,
    ) {
        let mut text = String::from("POST /predict HTTP/1.1\r\nHost: x\r\n");
        fields.iter().for_each(|(name, value)| text += &format!("{name}: {}\r\n", value.trim()));
        text += &format!("Content-Length: {length}\r\n\r\n");
        for cut in 0..text.len() {
            let partial = matches!(wire::request(&text.as_bytes()[..cut], true, &mut Room::default()), Ok(Opening::Partial));
            prop_assert!(partial, "{} bytes", cut);
        }
        prop_assert_eq!(sent_on(&text).unwrap().1, BodyFraming::Length(length));
    }
}
