use super::*;
use proptest::prelude::*;

/// Returns the head that an upstream gets, and what follows of the body.
fn sent_on(request: &str) -> Result<(String, BodyFraming), BadMessage> {
    let mut room = Room::default();
    match super::request(request.as_bytes(), &mut room)? {
        Opening::Plain(asked) => {
            let mut out = Vec::new();
            asked.write("10.0.0.9", &[], &mut out);
            Ok((String::from_utf8(out).unwrap(), asked.body))
        }
        other => panic!("{other:?}"),
    }
}

fn refused(head: &str) -> u16 {
    sent_on(&format!("POST / HTTP/1.1\r\n{head}\r\n\r\n")).expect_err(head).status
}

#[test]
fn a_head_is_sent_on_with_what_a_gateway_adds() {
    let (head, body) = sent_on(
        "POST /predict?a=1 HTTP/1.1\r\nHost: m.example\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\nX-Yours: 2\r\n\
         X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2\r\nForwarded: for=1.1.1.1\r\ntraceparent: 00-1-1-01\r\n\
         Content-Length: 5\r\nProxy-Connection: x\r\n\r\nhello",
    )
    .unwrap();
    let expected = "POST /predict?a=1 HTTP/1.1\r\nHost: m.example\r\nX-Yours: 2\r\nForwarded: for=1.1.1.1\r\n\
         traceparent: 00-1-1-01\r\nContent-Length: 5\r\nx-forwarded-host: m.example\r\nx-forwarded-proto: http\r\n\
         x-forwarded-for: 1.1.1.1, 2.2.2.2, 10.0.0.9\r\nforwarded: for=10.0.0.9;proto=http\r\nvia: 1.1 aviary\r\n\r\n";
    assert_eq!((head.as_str(), body), (expected, BodyFraming::Length(5)));
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
        let answer =
            |options: &str| to_client(&format!("HTTP/1.1 200 OK\r\n{field}\r\nConnection: {options}\r\n\r\n"), false);
        let upper = name.to_uppercase();
        for options in [name.to_string(), format!("X-Mine, {upper}"), format!("x-mine\r\nConnection:,{upper}\t,")] {
            assert_eq!(request(&options), request("close"), "a request with Connection: {options}");
            assert_eq!(answer(&options), answer("keep-alive"), "an answer with Connection: {options}");
        }
    }
}

#[test]
fn fields_that_a_rollout_reads_are_not_removed_either() {
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: X-User, X-Mine\r\nX-User: u1\r\nX-Mine: 1\r\n\r\n";
    let mut room = Room::default();
    let Ok(Opening::Plain(asked)) = super::request(request.as_bytes(), &mut room) else { panic!("{request}") };
    let head = |configured: &[String]| {
        let mut out = Vec::new();
        asked.write("10.0.0.9", configured, &mut out);
        String::from_utf8(out).unwrap()
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
fn what_is_no_plain_request_takes_the_slow_path() {
    for head in [
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        assert!(matches!(request(head.as_bytes(), &mut Room::default()), Ok(Opening::Other)), "{head}");
        for length in 0..head.len() {
            let mut room = Room::default();
            let found = request(&head.as_bytes()[..length], &mut room);
            assert!(matches!(found, Ok(Opening::Partial | Opening::Other)), "{found:?} for {length} bytes of {head}");
        }
    }
}

fn to_client(answer: &str, to_head: bool) -> Result<(String, BodyFraming, bool), BadMessage> {
    let mut room = Room::default();
    let answered = super::answer(answer.as_bytes(), to_head, &mut room)?.expect("a whole head");
    let mut out = Vec::new();
    answered.write(ResponseFields { lines: b"x-served-by: v2\r\n", date: b"now", close: false }, &mut out);
    Ok((String::from_utf8(out).unwrap(), answered.body, answered.stays_open))
}

#[test]
fn an_answer_is_marked_and_its_end_is_known() {
    let head = "HTTP/1.1 200 Fine\r\nconnection: x-inner\r\nx-inner: 1\r\nx-served-by: liar\r\n";
    let (out, body, open) = to_client(&format!("{head}content-length: 4\r\n\r\nbody"), false).unwrap();
    assert_eq!(out, "HTTP/1.1 200 Fine\r\ncontent-length: 4\r\nx-served-by: v2\r\ndate: now\r\n\r\n");
    assert_eq!((body, open), (BodyFraming::Length(4), true));
    let (out, body, _) = to_client(&format!("{head}date: then\r\ntransfer-encoding: chunked\r\n\r\n"), false).unwrap();
    assert_eq!(out, "HTTP/1.1 200 Fine\r\ndate: then\r\ntransfer-encoding: chunked\r\nx-served-by: v2\r\n\r\n");
    assert_eq!(body, BodyFraming::CHUNKED);
    let ended = |answer: &str, to_head| to_client(answer, to_head).map(|(_, body, open)| (body, open));
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

/// Returns how much of `bytes` belongs to a chunked body, given in pieces of `size`; none when it is malformed.
fn chunked(bytes: &[u8], size: usize) -> Option<(usize, bool)> {
    let mut body = BodyFraming::CHUNKED;
    let mut at = 0;
    for piece in bytes.chunks(size) {
        let taken = body.take(piece).ok()?;
        at += taken;
        if taken < piece.len() {
            break;
        }
    }
    Some((at, body.has_ended()))
}

#[test]
fn a_chunked_body_ends_where_it_ends() {
    let whole = b"5\r\nhello\r\nA;name=\"v\"\r\n0123456789\r\n0\r\nx-sum: 1\r\n\r\nGET / next";
    let end = whole.len() - "GET / next".len();
    for size in 1..=whole.len() {
        assert_eq!(chunked(whole, size), Some((end, true)), "in pieces of {size}");
    }
    for bad in [
        "\r\n",
        "5 \n",
        "g\r\n",
        "-1\r\n",
        "5\nhello",
        "5\r\nhelloX",
        "5\r\nhello\nX",
        "0\r\n\n",
        "0\r\nx\n",
        "1000000000000000\r\n",
        "0x5\r\n",
        "5;a\nb\r\n",
        "0\r\n\rX",
    ] {
        assert_eq!(chunked(bad.as_bytes(), 1), None, "{bad:?}");
    }
    let endless = format!("5;{}", "a".repeat(10_000));
    assert_eq!(chunked(endless.as_bytes(), 100), None);
    let trailers = format!("0\r\n{}", "a: b\r\n".repeat(3_000));
    assert_eq!(chunked(trailers.as_bytes(), 100), None);
}

proptest! {
    #[test]
    fn whatever_comes_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), size in 1usize..50) {
        let _ = request(&bytes, &mut Room::default());
        let _ = super::answer(&bytes, false, &mut Room::default());
        let _ = chunked(&bytes, size);
    }

    #[test]
    fn chunks_are_found_however_they_arrive(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..5),
        size in 1usize..700,
    ) {
        let mut bytes = Vec::new();
        for part in &parts {
            bytes.extend(format!("{:X}\r\n", part.len()).bytes());
            bytes.extend(part);
            bytes.extend(b"\r\n");
        }
        bytes.extend(b"0\r\n\r\n");
        let end = bytes.len();
        bytes.extend(b"more");
        prop_assert_eq!(chunked(&bytes, size), Some((end, true)));
    }

    #[test]
    fn a_head_in_pieces_is_the_same_head(
        fields in prop::collection::vec(("x-[a-z]{1,9}", "[ -~]{0,20}"), 0..9),
        length in 0u64..1_000_000,
    ) {
        let mut text = String::from("POST /predict HTTP/1.1\r\nHost: x\r\n");
        fields.iter().for_each(|(name, value)| text += &format!("{name}: {}\r\n", value.trim()));
        text += &format!("Content-Length: {length}\r\n\r\n");
        for cut in 0..text.len() {
            let partial = matches!(request(&text.as_bytes()[..cut], &mut Room::default()), Ok(Opening::Partial));
            prop_assert!(partial, "{} bytes", cut);
        }
        let mut room = Room::default();
        let Ok(Opening::Plain(asked)) = request(text.as_bytes(), &mut room) else { panic!("{text}") };
        prop_assert_eq!((asked.length, asked.body), (text.len(), BodyFraming::Length(length)));
    }
}
