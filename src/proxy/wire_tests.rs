use proptest::prelude::*;

use super::super::hop;
use super::*;

#[test]
fn http2_begins_only_a_connection() {
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_bytes();
    assert!(matches!(request(preface, true, &mut Room::default()), Ok(Opening::Http2)));
    assert_eq!(request(preface, false, &mut Room::default()).unwrap_err().status, 505);
    for length in 0..preface.len() {
        let mut room = Room::default();
        let found = request(&preface[..length], true, &mut room);
        assert!(matches!(found, Ok(Opening::Partial | Opening::Http2)), "{found:?} for {length} bytes");
    }
}

const MARKS: ResponseFields =
    ResponseFields { lines: b"x-served-by: v2\r\n", date: b"now", close: false, protocol: Protocol::Http11 };

fn to_client(answer: &str, is_head: bool) -> Result<(String, BodyFraming, bool), BadMessage> {
    let mut room = Room::default();
    let asked = Asked { is_head, wants_websocket: false };
    let answered = super::answer(answer.as_bytes(), asked, &mut room)?.expect("a whole head");
    let mut out = Vec::new();
    answered.write(MARKS, &mut out);
    Ok((String::from_utf8(out).unwrap(), answered.body, answered.stays_open))
}

#[test]
fn an_answer_is_marked_and_its_end_is_known() {
    let head = "HTTP/1.1 200 Fine\r\nconnection: x-inner\r\nx-inner: 1\r\nx-served-by: other\r\n";
    let (out, body, open) = to_client(&format!("{head}content-length: 4\r\n\r\nbody"), false).unwrap();
    let told = "HTTP/1.1 200 Fine\r\nx-upstream-served-by: other\r\n";
    assert_eq!(out, format!("{told}content-length: 4\r\nx-served-by: v2\r\ndate: now\r\n\r\n"));
    assert_eq!((body, open), (BodyFraming::Length(4), true));
    let (out, body, _) = to_client(&format!("{head}date: then\r\ntransfer-encoding: chunked\r\n\r\n"), false).unwrap();
    assert_eq!(out, format!("{told}date: then\r\ntransfer-encoding: chunked\r\nx-served-by: v2\r\n\r\n"));
    assert_eq!(body, BodyFraming::CHUNKED);
    let ended = |answer: &str, is_head| to_client(answer, is_head).map(|(_, body, open)| (body, open));
    assert_eq!(ended("HTTP/1.1 200 \r\n\r\n", false), Ok((BodyFraming::Open, false)));
    assert_eq!(ended("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n", false), Ok((BodyFraming::Length(1), false)));
    assert_eq!(ended("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", true), Ok((BodyFraming::NONE, true)));
    assert_eq!(ended("HTTP/1.1 304 Same\r\ncontent-length: 9\r\n\r\n", false), Ok((BodyFraming::NONE, true)));
    assert_eq!(ended("HTTP/1.1 204 None\r\nconnection: close\r\n\r\n", false), Ok((BodyFraming::NONE, false)));
    assert_eq!(ended("HTTP/1.1 100 Continue\r\n\r\n", false), Ok((BodyFraming::NONE, true)));
    assert_eq!(ended("HTTP/1.1 101 Switching\r\n\r\n", false).unwrap_err().status, 502);
    let both = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_eq!(ended(both, false).unwrap_err().status, 502);
}

#[test]
fn equal_lengths_are_one_length_and_different_ones_are_none() {
    for lines in ["content-length: 4\r\ncontent-length: 4\r\n", "content-length: 4, 4\r\n"] {
        let (out, body, _) = to_client(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"), false).unwrap();
        assert!(out.contains("\r\ncontent-length: 4\r\n") && out.matches("content-length").count() == 1, "{out}");
        assert_eq!(body, BodyFraming::Length(4));
    }
    for lines in ["content-length: 4\r\ncontent-length: 5\r\n", "content-length: 4, 5\r\n", "content-length: 4,\r\n"] {
        assert_eq!(to_client(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"), false).unwrap_err().status, 502, "{lines}");
    }
}

#[test]
fn what_is_wrong_with_an_answer_is_said() {
    let why = |answer: &str| to_client(answer, false).unwrap_err().why;
    let many: String = (0..101).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(why(&format!("HTTP/1.1 200 OK\r\n{many}\r\n")), "its answer has more than 100 header fields");
    let long = format!("HTTP/1.1 200 OK\r\nx-a: {}\r\n\r\n", "a".repeat(40 * 1024));
    assert_eq!(why(&long), "its answer's head is larger than 32 KiB");
    let mut room = Room::default();
    let partial = super::answer(&long.as_bytes()[..HEAD_BYTES_MAX + 1], Asked::default(), &mut room).unwrap_err();
    assert_eq!(partial.why, "its answer's head is larger than 32 KiB");
}

#[test]
fn no_connection_option_of_an_answer_removes_a_field_that_is_relied_on() {
    for name in hop::RELIED_ON {
        let field = match name {
            "content-length" => "Content-Length: 5".to_string(),
            "transfer-encoding" => "Transfer-Encoding: chunked".into(),
            _ => format!("{name}: 7"),
        };
        let answer =
            |options: &str| to_client(&format!("HTTP/1.1 200 OK\r\n{field}\r\nConnection: {options}\r\n\r\n"), false);
        let upper = name.to_uppercase();
        for options in [name.to_string(), format!("X-Mine, {upper}"), format!("x-mine\r\nConnection:,{upper}\t,")] {
            assert_eq!(answer(&options), answer("keep-alive"), "an answer with Connection: {options}");
        }
    }
}

#[test]
fn an_answer_reaches_each_client_so_that_its_end_is_seen() {
    for (body, protocol, expected) in [
        (BodyFraming::Length(4), Protocol::Http11, Delivery::AsItCame),
        (BodyFraming::Length(4), Protocol::Http10, Delivery::AsItCame),
        (BodyFraming::CHUNKED, Protocol::Http11, Delivery::AsItCame),
        (BodyFraming::CHUNKED, Protocol::Http10, Delivery::UntilClose),
        (BodyFraming::Open, Protocol::Http11, Delivery::Chunked),
        (BodyFraming::Open, Protocol::Http10, Delivery::UntilClose),
    ] {
        assert_eq!(Delivery::of(body, protocol), expected, "{body:?} to {protocol:?}");
    }
    let mut room = Room::default();
    let answered = super::answer(b"HTTP/1.1 200 OK\r\n\r\n", Asked::default(), &mut room).unwrap().unwrap();
    let head = |protocol| {
        let mut out = Vec::new();
        answered.write(ResponseFields { protocol, ..MARKS }, &mut out);
        String::from_utf8(out).unwrap()
    };
    assert!(head(Protocol::Http11).contains("transfer-encoding: chunked\r\n"), "{}", head(Protocol::Http11));
    assert!(!head(Protocol::Http10).contains("chunked") && head(Protocol::Http10).starts_with("HTTP/1.0 200"));
}

proptest! {
    #[test]
    fn whatever_comes_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = request(&bytes, true, &mut Room::default());
        let _ = super::answer(&bytes, Asked::default(), &mut Room::default());
    }
}
