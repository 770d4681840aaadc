//! Links over real sockets on loopback.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::*;
use crate::adapters::net::PlainNetwork;
use crate::domain::ids::{ClusterId, Incarnation};
use crate::node::frame;
use crate::protocol::message::{Heartbeat, Membership};
use crate::protocol::record::{Hash, Slot};

fn id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn identity(node: &str) -> Identity {
    Identity { cluster: ClusterId([7; 16]), node: id(node), incarnation: Incarnation(node.as_bytes()[0].into()) }
}

fn heartbeat(head: u64) -> Message {
    Message::Heartbeat(Heartbeat {
        nonce: None,
        acknowledges: None,
        head: Slot(head),
        head_hash: Hash::default(),
        in_doubt: None,
        open: None,
        membership: Membership::Voter,
        writes: 1,
        seen: None,
        speaks: VERSIONS.max,
    })
}

fn quick() -> LinkLimits {
    LinkLimits { hello: Duration::from_millis(300), body: Duration::from_millis(600), ..LinkLimits::default() }
}

fn greeting(node: &str) -> Greeting {
    Greeting { versions: VERSIONS, facts: [("build".to_string(), format!("0.2.0 ({node})"))].into() }
}

struct Node {
    links: Links,
    inputs: mpsc::Receiver<Input>,
    greetings: Greetings,
}

async fn node(me: &str, listen: &str, peer: &str, address: &str) -> Node {
    node_within(quick(), me, listen, peer, address).await
}

async fn node_within(limits: LinkLimits, me: &str, listen: &str, peer: &str, address: &str) -> Node {
    let (sender, inputs) = mpsc::channel(64);
    let peers = [(id(peer), address.to_string())].into();
    let shutdown = CancellationToken::new();
    let network = Arc::new(PlainNetwork);
    let greetings = Greetings::default();
    greetings.put(id(me), greeting(me));
    let inbox = Inbox { inputs: sender, greetings: greetings.clone() };
    let links = Links::start(limits, network, identity(me), listen, peers, inbox, shutdown).await.unwrap();
    Node { links, inputs, greetings }
}

/// An address that nothing listens at.
async fn free_address() -> String {
    PlainNetwork.listen("127.0.0.1:0").await.unwrap().address().unwrap()
}

async fn pair() -> (Node, Node) {
    let address = free_address().await;
    let a = node("a", "127.0.0.1:0", "b", &address).await;
    let b = node("b", &address, "a", a.links.address()).await;
    (a, b)
}

impl Node {
    async fn next(&mut self) -> Input {
        tokio::time::timeout(Duration::from_secs(3), self.inputs.recv()).await.expect("an input in time").unwrap()
    }

    /// Sends until the other has it, as the core does.
    async fn reaches(&self, other: &mut Node, to: &str, head: u64) {
        loop {
            self.links.send(&id(to), heartbeat(head));
            match tokio::time::timeout(Duration::from_millis(50), other.inputs.recv()).await {
                Ok(Some(Input::Received { message, .. })) if *message == heartbeat(head) => return,
                _ => {}
            }
        }
    }

    async fn counts(&self, class: Class, expected: u64) {
        let deadline = Instant::now() + Duration::from_secs(3);
        while self.links.rejections().count(class) < expected {
            assert!(Instant::now() < deadline, "{class:?}: {:?}", self.links.rejections().snapshot());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn hello(from: &Identity, to: &str, versions: Versions) -> BytesMut {
    let mut bytes = BytesMut::new();
    let facts = [("build".to_string(), "0.0.1 (older)".to_string()), ("later".into(), "unknown".into())].into();
    frame::encode_hello(from, &Hello { versions, to: id(to), facts }, &mut bytes);
    bytes
}

/// Sends bytes to a node and waits until it closes the connection.
async fn refused(node: &Node, bytes: &[u8]) {
    let mut stream = TcpStream::connect(node.links.address()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let closed = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(3), closed).await.expect("the connection is closed");
}

#[tokio::test]
async fn messages_go_both_ways_with_their_senders_name() {
    let (mut a, mut b) = pair().await;
    a.links.send(&id("b"), heartbeat(1));
    b.links.send(&id("a"), heartbeat(2));
    for (node, from, head) in [(&mut b, "a", 1), (&mut a, "b", 2)] {
        let Identity { incarnation, .. } = identity(from);
        let message = Box::new(heartbeat(head));
        assert_eq!(node.next().await, Input::Received { from: id(from), incarnation, message });
    }
}

#[tokio::test]
async fn what_a_peer_says_about_itself_is_known_even_where_no_version_is_common() {
    let (mut a, mut b) = pair().await;
    a.reaches(&mut b, "b", 1).await;
    b.reaches(&mut a, "a", 1).await;
    assert_eq!(a.greetings.of(&id("b")), Some(greeting("b")));
    assert_eq!(b.greetings.of(&id("a")), Some(greeting("a")));
    assert_eq!(a.greetings.of(&id("c")), None);
    let address = free_address().await;
    let c = node("c", "127.0.0.1:0", "d", &address).await;
    let other = Versions::only(VERSIONS.max + 1);
    refused(&c, &hello(&identity("d"), "c", other)).await;
    refused(&c, &hello(&identity("x"), "c", other)).await;
    let found = c.greetings.of(&id("d")).unwrap();
    assert_eq!((found.versions, found.facts["build"].as_str()), (other, "0.0.1 (older)"));
    assert_eq!(c.greetings.of(&id("x")), None, "only of configured peers, so that they stay few");
}

#[tokio::test]
async fn one_yield_is_enough_to_write() {
    let (a, mut b) = pair().await;
    a.reaches(&mut b, "b", 1).await;
    a.links.send(&id("b"), heartbeat(2));
    tokio::task::yield_now().await;
    assert!(a.links.shared.peers[&id("b")].outbox.take().is_empty());
    assert_eq!(a.links.dropped()[&id("b")], 0);
}

#[tokio::test]
async fn a_killed_peer_is_unreachable_and_a_restarted_one_is_back_within_a_second() {
    let (mut a, mut b) = pair().await;
    a.reaches(&mut b, "b", 1).await;
    b.reaches(&mut a, "a", 1).await;
    let (address_a, address_b) = (a.links.address().to_string(), b.links.address().to_string());
    let killed = Instant::now();
    drop(b);
    assert_eq!(a.next().await, Input::Unreachable(id("b")));
    assert!(killed.elapsed() < Duration::from_millis(300), "{:?}", killed.elapsed());
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(a.inputs.try_recv().is_err(), "once per outage");
    let restarted = Instant::now();
    let mut b = node("b", &address_b, "a", &address_a).await;
    a.reaches(&mut b, "b", 2).await;
    b.reaches(&mut a, "a", 2).await;
    assert!(restarted.elapsed() < Duration::from_secs(1), "{:?}", restarted.elapsed());
}

#[tokio::test]
async fn every_kind_of_bad_greeting_is_refused_by_its_class_and_peers_go_on() {
    let (mut a, b) = pair().await;
    let stranger = Identity { node: id("x"), ..identity("b") };
    let foreign = Identity { cluster: ClusterId([8; 16]), ..identity("b") };
    refused(&a, &hello(&foreign, "a", VERSIONS)).await;
    refused(&a, &hello(&stranger, "a", VERSIONS)).await;
    refused(&a, &hello(&identity("b"), "c", VERSIONS)).await;
    refused(&a, &hello(&identity("b"), "a", Versions::only(VERSIONS.max + 1))).await;
    refused(&a, b"GET / HTTP/1.1\r\n\r\n").await;
    let mut long = hello(&identity("b"), "a", VERSIONS);
    long[7..11].fill(0xff);
    refused(&a, &long).await;
    let mut damaged = hello(&identity("b"), "a", VERSIONS);
    *damaged.last_mut().unwrap() ^= 1;
    refused(&a, &damaged).await;
    refused(&a, &hello(&identity("b"), "a", VERSIONS)[..9]).await;
    for (class, expected) in [
        (Class::Cluster, 1),
        (Class::Sender, 2),
        (Class::Version, 1),
        (Class::Magic, 1),
        (Class::TooLong, 1),
        (Class::Checksum, 1),
        (Class::HelloDeadline, 1),
    ] {
        a.counts(class, expected).await;
        assert_eq!(a.links.rejections().count(class), expected, "{class:?}");
    }
    b.reaches(&mut a, "a", 5).await;
}

#[tokio::test]
async fn a_newer_node_speaks_the_older_ones_version_and_refuses_what_it_no_longer_knows() {
    let newer = |min, max| LinkLimits { versions: Versions { min, max }, ..quick() };
    let address = free_address().await;
    let mut a = node_within(newer(VERSIONS.min, VERSIONS.max + 1), "a", "127.0.0.1:0", "b", &address).await;
    let mut b = node("b", &address, "a", a.links.address()).await;
    a.reaches(&mut b, "b", 3).await;
    b.reaches(&mut a, "a", 4).await;

    let address = free_address().await;
    let c = node_within(newer(VERSIONS.max + 1, VERSIONS.max + 2), "c", "127.0.0.1:0", "d", &address).await;
    let d = node("d", &address, "c", c.links.address()).await;
    c.counts(Class::Version, 1).await;
    d.counts(Class::Version, 1).await;
}

#[tokio::test]
async fn a_message_in_another_name_or_incarnation_ends_the_connection() {
    let a = node("a", "127.0.0.1:0", "b", &free_address().await).await;
    for other in
        [Identity { node: id("c"), ..identity("b") }, Identity { incarnation: Incarnation(1), ..identity("b") }]
    {
        let mut bytes = hello(&identity("b"), "a", VERSIONS);
        frame::encode_message(&other, VERSIONS.max, &heartbeat(1), &mut bytes).unwrap();
        refused(&a, &bytes).await;
    }
    a.counts(Class::Sender, 2).await;
}

#[tokio::test]
async fn a_frame_that_trickles_ends_the_connection() {
    let a = node("a", "127.0.0.1:0", "b", &free_address().await).await;
    let mut bytes = hello(&identity("b"), "a", VERSIONS);
    frame::encode_message(&identity("b"), VERSIONS.max, &heartbeat(1), &mut bytes).unwrap();
    refused(&a, &bytes[..bytes.len() - 1]).await;
    a.counts(Class::BodyDeadline, 1).await;
}

#[tokio::test]
async fn half_open_connections_have_a_cap_and_keep_nobody_out() {
    let address = free_address().await;
    let mut a = node("a", "127.0.0.1:0", "b", &address).await;
    let mut flood = Vec::new();
    for _ in 0..500 {
        flood.push(TcpStream::connect(a.links.address()).await.unwrap());
    }
    let b = node("b", &address, "a", a.links.address()).await;
    b.reaches(&mut a, "a", 1).await;
    let cap = quick().half_open as u64;
    a.counts(Class::HalfOpen, 500 - cap).await;
    a.counts(Class::HelloDeadline, 1).await;
}

#[tokio::test]
async fn a_full_queue_drops_and_never_waits() {
    let a = node("a", "127.0.0.1:0", "b", &free_address().await).await;
    (0..300).for_each(|head| a.links.send(&id("b"), heartbeat(head)));
    assert_eq!(a.links.dropped()[&id("b")], 300 - quick().queue as u64);
}
