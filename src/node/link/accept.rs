//! The receiving side: a peer that connects must send HELLO in time and be configured; then its messages come in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::wire::{ConnectionEnd, FrameStream};
use super::{Class, LinkShared, expect};
use crate::domain::ids::NodeId;
use crate::node::frame::{self, Envelope, FrameError, Identity, Payload};
use crate::ports::{Connection, Later, Listener};
use crate::protocol::Input;
use crate::protocol::message::Message;

/// Wait after the system refused to accept: it is short of something, and asking again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepted connections and how to end them: without HELLO by age, with it by peer. A peer has one at most, the
/// latest, so all of them together are bounded.
#[derive(Default)]
struct AcceptedPeer {
    next: u64,
    half_open: BTreeMap<u64, CancellationToken>,
    peers: BTreeMap<NodeId, (u64, CancellationToken)>,
}

type Handshake = Later<'static, std::io::Result<Connection>>;

/// Accepts connections of peers for as long as the node runs.
pub(super) async fn run(shared: Arc<LinkShared>, mut listener: Box<dyn Listener>) {
    let accepted = Arc::new(Mutex::new(AcceptedPeer::default()));
    loop {
        match listener.accept().await {
            Ok(handshake) => {
                let (id, end) = admit(&shared, &accepted);
                shared.spawn(serve(shared.clone(), accepted.clone(), id, end, handshake));
            }
            Err(error) => {
                shared.rejections.refuse(Class::Transport, "unknown", &format_args!("accept failed: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn lock(accepted: &Mutex<AcceptedPeer>) -> MutexGuard<'_, AcceptedPeer> {
    accepted.lock().expect("nothing panics while it holds the connections")
}

/// Makes room by ending the oldest connection without HELLO: a real peer says it at once, so that the oldest is the one
/// least likely to be a peer, and a flood can't keep peers out.
fn admit(shared: &LinkShared, accepted: &Mutex<AcceptedPeer>) -> (u64, CancellationToken) {
    let mut accepted = lock(accepted);
    accepted.next += 1;
    let (id, end) = (accepted.next, CancellationToken::new());
    if accepted.half_open.len() >= shared.limits.half_open
        && let Some((_, oldest)) = accepted.half_open.pop_first()
    {
        oldest.cancel();
        let (found, max) = (shared.limits.half_open + 1, shared.limits.half_open);
        let why = format!("{found} connections without HELLO, expected at most {max}: the oldest was closed");
        shared.rejections.refuse(Class::HalfOpen, "unknown", &why);
    }
    accepted.half_open.insert(id, end.clone());
    (id, end)
}

async fn serve(
    shared: Arc<LinkShared>,
    accepted: Arc<Mutex<AcceptedPeer>>,
    id: u64,
    end: CancellationToken,
    handshake: Handshake,
) {
    let mut address = String::from("unknown");
    let receiving = receive(&shared, &accepted, id, &end, handshake, &mut address);
    let why = end.run_until_cancelled(receiving).await.unwrap_or(ConnectionEnd::Replaced);
    {
        let mut accepted = lock(&accepted);
        accepted.half_open.remove(&id);
        accepted.peers.retain(|_, (other, _)| *other != id);
    }
    match why.class() {
        Some(class) => shared.rejections.refuse(class, &address, &why),
        None => tracing::debug!(peer = address, "control connection ended: {why}"),
    }
}

async fn receive(
    shared: &LinkShared,
    accepted: &Mutex<AcceptedPeer>,
    id: u64,
    end: &CancellationToken,
    handshake: Handshake,
    address: &mut String,
) -> ConnectionEnd {
    let limit = shared.limits.hello;
    let (mut wire, sender) = match timeout(limit, greet(shared, handshake, address)).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(end)) => return end,
        Err(_) => return ConnectionEnd::Deadline { class: Class::HelloDeadline, what: "HELLO", limit },
    };
    settle(accepted, id, end, &sender.node);
    shared.peers[&sender.node].called.notify_one();
    // Its heartbeat tells what it knows of this node's disk. A node that started from an old copy must hear that before it votes.
    let mut heard = false;
    loop {
        if let Err(end) = pass_on(shared, &mut wire, &sender, &mut heard).await {
            return end;
        }
    }
}

/// Moves a connection from those without HELLO to its peer's place, and ends the one that had it.
fn settle(accepted: &Mutex<AcceptedPeer>, id: u64, end: &CancellationToken, peer: &NodeId) {
    let mut accepted = lock(accepted);
    accepted.half_open.remove(&id);
    if let Some((_, before)) = accepted.peers.insert(peer.clone(), (id, end.clone())) {
        before.cancel();
    }
}

async fn greet(
    shared: &LinkShared,
    handshake: Handshake,
    address: &mut String,
) -> Result<(FrameStream, Identity), ConnectionEnd> {
    let connection = handshake.await.map_err(ConnectionEnd::Transport)?;
    address.clone_from(&connection.address);
    let mut wire = FrameStream::new(connection);
    let Envelope { cluster, from, incarnation, payload } = wire.next(&shared.limits).await?;
    let Payload::Hello(payload) = payload else { unreachable!("the codec takes only HELLO first") };
    let hello = Envelope { cluster, from, incarnation, payload };
    let checked = shared.check_hello(&wire.connection, &hello);
    let known = shared.peers.contains_key(&hello.from);
    if matches!(checked, Ok(_) | Err(FrameError::Version { .. })) && known {
        // The answer goes out even when no version is common: the dialler's log then names both ranges too.
        let mut bytes = BytesMut::new();
        frame::encode_hello(&shared.me.load(), &shared.hello_to(&hello.from), &mut bytes);
        wire.write(&bytes, shared.limits.write).await?;
    }
    let version = checked?;
    if !known {
        let names: Vec<_> = shared.peers.keys().map(ToString::to_string).collect();
        let (expected, found) = (format!("one of {}", names.join(", ")), hello.from.to_string());
        return Err(FrameError::Sender { what: "sender", expected, found }.into());
    }
    wire.greeted(version);
    Ok((wire, hello.sender()))
}

/// Hands the next message to the node; a full inbox makes this connection wait, and no other. What comes before the first
/// heartbeat of a connection is dropped: the sender repeats it.
async fn pass_on(
    shared: &LinkShared,
    wire: &mut FrameStream,
    sender: &Identity,
    heard: &mut bool,
) -> Result<(), ConnectionEnd> {
    let envelope = wire.next(&shared.limits).await?;
    shared.check_cluster(&envelope)?;
    expect("sender", &sender.node, &envelope.from)?;
    expect("incarnation", &sender.incarnation, &envelope.incarnation)?;
    let Payload::Message(message) = envelope.payload else { unreachable!("the codec takes no second HELLO") };
    *heard |= matches!(*message, Message::Heartbeat(_));
    if !*heard {
        return Ok(());
    }
    let input = Input::Received { from: envelope.from, incarnation: envelope.incarnation, message };
    // The inbox closes only when the node stops, and then so do the links.
    let _ = shared.inbox.inputs.send(input).await;
    Ok(())
}
