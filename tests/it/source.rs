//! The client behind trusted proxies, by X-Forwarded-For and by the PROXY protocol, as `hashOn: clientAddress` sees it.

use std::collections::BTreeSet;

use aviary::domain::plan::HashOn;
use aviary::proxy::settings::ProxySettings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::proxy::{OK, SOON, World, answering, hold_lease, settings, view_of, world_with};

/// Returns a proxy that splits clients in halves by their address.
async fn halves(settings: ProxySettings) -> World {
    let server = answering(OK).await;
    let view = view_of(Some(server), None, 5_000, |spec| spec.hash_on = Some(HashOn::ClientAddress));
    world_with(view, settings).await
}

fn trusting(network: &str) -> ProxySettings {
    ProxySettings { trusted: vec![network.parse().unwrap()], ..settings() }
}

/// Sends what comes before a request, and the request; returns the version that served, none when nothing came back.
async fn served(world: &World, before: &[u8], fields: &str) -> Option<String> {
    hold_lease(&world.node);
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let request = format!("GET /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{fields}\r\n");
    stream.write_all(&[before, request.as_bytes()].concat()).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an end in time");
    let answer = String::from_utf8(answer).unwrap();
    answer.lines().find_map(|line| line.strip_prefix("x-served-by: ")).map(str::to_string)
}

/// Returns who served forty clients, each asked twice; every client has one version.
async fn versions(world: &World, of: impl Fn(u8) -> (Vec<u8>, String)) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for client in 1..=40 {
        let (before, fields) = of(client);
        let first = served(world, &before, &fields).await.expect("an answer");
        assert_eq!(served(world, &before, &fields).await.as_ref(), Some(&first), "client {client}");
        all.insert(first);
    }
    all
}

#[tokio::test]
async fn trusted_proxies_name_the_client() {
    let forwarded = |client| (Vec::new(), format!("x-forwarded-for: 198.51.100.7, 203.0.113.{client}\r\n"));
    for (settings, expected) in [(trusting("127.0.0.0/8"), 2), (trusting("10.0.0.0/8"), 1), (settings(), 1)] {
        let world = halves(settings).await;
        assert_eq!(versions(&world, forwarded).await.len(), expected);
    }
    // What the client itself wrote changes nothing: the last address that nobody trusts is its own.
    let world = halves(trusting("127.0.0.0/8")).await;
    let made_up = |client| (Vec::new(), format!("x-forwarded-for: 203.0.113.{client}, 198.51.100.7\r\n"));
    assert_eq!(versions(&world, made_up).await.len(), 1);
}

#[tokio::test]
async fn a_proxy_header_names_the_client() {
    let line = |client| (format!("PROXY TCP4 203.0.113.{client} 192.0.2.1 4711 80\r\n").into_bytes(), String::new());
    let binary = |client: u8| {
        let addresses = [203, 0, 113, client, 192, 0, 2, 1, 18, 103, 0, 80];
        ([b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".as_slice(), &addresses].concat(), String::new())
    };
    let world = halves(ProxySettings { proxy_protocol: true, ..settings() }).await;
    assert_eq!(versions(&world, line).await.len(), 2);
    assert_eq!(versions(&world, binary).await.len(), 2);
    for none in [&b""[..], b"PROXY TCP4 x\r\n", b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 8000000\r\n"] {
        assert_eq!(served(&world, none, "").await, None, "{none:?}");
    }
    // A peer that is not trusted sends none.
    let world = halves(ProxySettings { proxy_protocol: true, ..trusting("10.0.0.0/8") }).await;
    assert!(served(&world, b"", "").await.is_some());
    assert_eq!(served(&world, &line(1).0, "").await, None);
}
