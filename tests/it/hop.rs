//! What Connection options can't remove, on every way through the proxy and in both directions, over real sockets.
//!
//! Each message is sent twice, with and without the option: what arrives at the other side must be the same.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use aviary::proxy::hop::{RELIED_ON, is_hop_by_hop};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proxy::{OK, SOON, World, head, hold_lease, upstream, view_of, world};

/// A target of each form: a path, and an absolute one.
const WAYS: [(&str, &str); 2] = [("a path", "/predict"), ("an absolute target", "http://models.example/predict")];
/// The fields that the rollout of [`world_at`] reads.
const CONFIGURED: [&str; 2] = ["x-user", "x-tier"];

/// Returns a proxy whose rollout is sticky by one field and matches by another.
async fn world_at(server: SocketAddr) -> World {
    world(view_of(Some(server), None, 5_000, |spec| {
        let headers = vec![("x-tier".to_string(), "gold".to_string())];
        spec.matches = vec![aviary::domain::plan::Match { headers }];
    }))
    .await
}

/// Returns a value that a field of this name may have in a message.
fn sample(name: &str) -> &'static str {
    match name {
        "content-length" => "5",
        "content-type" => "application/json",
        "cookie" => "sid=u1",
        "date" => "Sun, 29 Nov 2026 11:00:00 GMT",
        "expect" => "100-continue",
        "forwarded" => "for=192.0.2.1",
        "host" => "models.example",
        "te" => "trailers",
        "trailer" => "x-sum",
        "transfer-encoding" => "chunked",
        "x-canary" => "never",
        "x-aviary-service" => "fraud",
        "x-forwarded-for" => "192.0.2.1",
        "x-tier" => "gold",
        "grpc-status" | "retry-after" | "x-routing-version" => "7",
        _ => "sample",
    }
}

/// Returns a message's fields, each once, with the framing and the field `name`, and its body.
fn message(name: &str, always: &[&'static str], options: &str) -> String {
    let chunked = matches!(name, "transfer-encoding" | "trailer");
    let framing = if chunked { "transfer-encoding" } else { "content-length" };
    let names: BTreeSet<&str> = always.iter().copied().chain([framing, name]).collect();
    let fields: String = names.iter().map(|name| format!("{name}: {}\r\n", sample(name))).collect();
    let body = if chunked { "5\r\nhello\r\n0\r\n\r\n" } else { "hello" };
    format!("{fields}x-mine: 1\r\nconnection: close{options}, x-mine\r\n\r\n{body}")
}

/// Starts a server that answers one request of each connection, and tells every byte that came, in small letters.
async fn recording() -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let (sender, seen) = mpsc::unbounded_channel();
    let address = upstream(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut all = head(&mut stream).await.to_lowercase();
            let end = if all.contains("transfer-encoding: chunked") { "0\r\n\r\n" } else { "hello" };
            while !all.ends_with(end) {
                match timeout(SOON / 20, stream.read_u8()).await {
                    Ok(Ok(byte)) => all.push(char::from(byte)),
                    _ => break,
                }
            }
            let _ = sender.send(all);
            let _ = stream.write_all(OK.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n").as_bytes()).await;
        }
    });
    (address.await, seen)
}

#[tokio::test]
async fn a_request_keeps_every_field_that_is_relied_on() {
    let (server, mut seen) = recording().await;
    let world = world_at(server).await;
    for (way, target) in WAYS {
        for name in RELIED_ON.into_iter().chain(CONFIGURED) {
            let mut arrived = Vec::new();
            for options in ["".into(), format!(", {name}"), format!(", {}", name.to_uppercase())] {
                hold_lease(&world.node);
                let request = format!("POST {target} HTTP/1.1\r\n{}", message(name, &["host"], &options));
                let answer = world.raw(&request).await;
                assert!(answer.contains("HTTP/1.1 200 OK"), "{way}, {name}: {answer}");
                arrived.push(timeout(SOON, seen.recv()).await.unwrap().unwrap());
            }
            let field = format!("\r\n{name}: {}", sample(name).to_lowercase());
            assert!(arrived[0].contains(&field) || is_hop_by_hop(name), "{way}, {name}: {}", arrived[0]);
            assert!(!arrived[0].contains("x-mine"), "{way}: a field of one connection passed: {}", arrived[0]);
            assert_eq!(arrived[1], arrived[0], "{way}, Connection: {name}");
            assert_eq!(arrived[2], arrived[0], "{way}, Connection: {}", name.to_uppercase());
        }
    }
}

#[tokio::test]
async fn an_answer_keeps_every_field_that_is_relied_on() {
    for (way, target) in WAYS {
        for name in RELIED_ON {
            let mut arrived = Vec::new();
            for options in ["".into(), format!(", {name}"), format!(", {}", name.to_uppercase())] {
                let answer = format!("HTTP/1.1 200 OK\r\n{}", message(name, &["date"], &options));
                let server = upstream(move |mut stream| {
                    let answer = answer.clone();
                    async move {
                        head(&mut stream).await;
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
                let world = world_at(server.await).await;
                let request =
                    format!("GET {target} HTTP/1.1\r\nhost: x\r\nx-canary: never\r\nconnection: close\r\n\r\n");
                arrived.push(world.raw(&request).await);
            }
            let field = format!("\r\n{name}: ");
            assert!(arrived[0].contains(&field) || is_hop_by_hop(name), "{way}, {name}: {}", arrived[0]);
            assert!(!arrived[0].contains("x-mine"), "{way}: a field of one connection passed: {}", arrived[0]);
            assert_eq!(arrived[1], arrived[0], "{way}, Connection: {name}");
            assert_eq!(arrived[2], arrived[0], "{way}, Connection: {}", name.to_uppercase());
        }
    }
}

#[tokio::test]
async fn a_body_that_looks_like_a_request_is_never_one() {
    const BODY: &str = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let (sender, mut seen) = mpsc::unbounded_channel();
    let server = upstream(move |mut stream| {
        let sender = sender.clone();
        async move {
            loop {
                let head = head(&mut stream).await;
                if head.is_empty() {
                    return;
                }
                let _ = sender.send(head.clone());
                if head.to_lowercase().contains("content-length: 35\r\n") {
                    let _ = stream.read_exact(&mut [0; BODY.len()]).await;
                }
                let answer = format!("{}{}", OK.replace(": 2", ": 9"), &head[..7]);
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        }
    });
    let world = world_at(server.await).await;
    for (way, target) in WAYS {
        let attack = format!(
            "POST {target} HTTP/1.1\r\nHost: x\r\nX-Canary: never\r\nConnection: content-length\r\nContent-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        );
        let mut attacker = TcpStream::connect(world.address).await.unwrap();
        attacker.write_all(attack.as_bytes()).await.unwrap();
        let answer = timeout(SOON, head(&mut attacker)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{way}: {answer}");
        // Another client's request takes the same upstream connection, and must get its own answer.
        let victim = world.get("/victim", "x-canary: never\r\n").await;
        assert!(victim.ends_with("okGET /vi"), "{way}: {victim}");
        let heads: Vec<_> = std::iter::from_fn(|| seen.try_recv().ok()).collect();
        let lines: Vec<_> = heads.iter().map(|head| head.lines().next().unwrap_or("")).collect();
        assert_eq!(lines, ["POST /predict HTTP/1.1", "GET /victim HTTP/1.1"], "{way}");
    }
}

/// Returns the names of the fields that the proxy's production code writes out: `"x-name"`, `b"x-name: …"`, `header::NAME`.
fn named_in(code: &str) -> BTreeSet<String> {
    let is_name = |text: &str| {
        text.contains('-')
            && text.split('-').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase()))
    };
    let literals = code.split('"').map(|text| text.trim_start_matches("\\r\\n").split(':').next().unwrap_or(""));
    let mut found: BTreeSet<String> = literals.filter(|text| is_name(text)).map(str::to_string).collect();
    for before in ["is(name, \"", "is(field.name, \"", "put(\"", "field(fields, \""] {
        let named = code.split(before).skip(1).filter_map(|after| after.split('"').next());
        found.extend(named.filter(|name| !name.contains(' ')).map(str::to_string));
    }
    for after in code.split("header::").skip(1) {
        let listed = after.strip_prefix('{').and_then(|list| list.split('}').next());
        let end = after.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(after.len());
        let names = listed.unwrap_or(&after[..end]).split(',').map(str::trim);
        let constants =
            names.filter(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
        found.extend(constants.map(|name| name.to_lowercase().replace('_', "-")));
    }
    found
}

#[test]
fn every_field_that_the_proxy_names_is_listed() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proxy");
    let (mut named, mut folders) = (BTreeSet::new(), vec![folder]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !["wire_tests.rs", "hop.rs", "tests.rs"].iter().any(|name| path.ends_with(name)) {
                let text = std::fs::read_to_string(&path).unwrap();
                named.extend(named_in(text.split("#[cfg(test)]").next().unwrap_or("")));
            }
        }
    }
    for name in ["x-canary", "x-aviary-mirrored", "via", "forwarded", "cookie", "x-aviary-source", "te", "allow"] {
        assert!(named.contains(name), "{name} is not found in {named:?}");
    }
    // What an option may say and a thread is called, and no field.
    let others = ["keep-alive", "100-continue", "access-log"];
    let relied_on = |name: &str| RELIED_ON.contains(&name) || others.contains(&name);
    let missing: Vec<_> = named.iter().filter(|name| !is_hop_by_hop(name) && !relied_on(name)).collect();
    assert!(missing.is_empty(), "fields that the proxy reads or writes, and a Connection option removes: {missing:?}");
}
