//! The sending side: one task for each peer, which keeps a connection to it and writes what waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, timeout};

use super::wire::{ConnectionEnd, FrameStream};
use super::{Class, LinkShared, PeerLink, expect};
use crate::backoff::Backoff;
use crate::entropy;
use crate::node::frame::{self, Envelope, FrameError, Identity, Payload};
use crate::protocol::Input;

/// Bytes gathered for one write.
const BATCH_BYTES: usize = 128 * 1024;

/// A connection that held this long was a good one: the first try after it doesn't wait.
const STEADY: Duration = Duration::from_secs(1);

/// Keeps a connection to one peer open, and dials again after each failure, with growing pauses.
pub(super) async fn run(shared: Arc<LinkShared>, peer: Arc<PeerLink>) {
    let mut retry = Backoff::new(shared.limits.backoff_min, shared.limits.backoff_max);
    let mut wait = Duration::ZERO;
    let mut outage = false;
    loop {
        if !wait.is_zero() {
            let jittered = wait.mul_f64(entropy::within(0.5..=1.0));
            if timeout(jittered, peer.called.notified()).await.is_ok() {
                retry.reset();
            }
        }
        wait = retry.wait();
        let end = match dial(&shared, &peer).await {
            Ok((mut wire, version, me)) => {
                let since = Instant::now();
                peer.connected.store(true, Ordering::Relaxed);
                tracing::info!(peer = %peer.node, address = peer.address, "peer connected");
                let end = converse(&shared, &peer, &mut wire, version, &me).await;
                peer.connected.store(false, Ordering::Relaxed);
                outage = true;
                if since.elapsed() >= STEADY {
                    wait = Duration::ZERO;
                    retry.reset();
                }
                tracing::warn!(peer = %peer.node, address = peer.address, "connection to peer lost: {end}");
                end
            }
            Err(end) => {
                let refused =
                    matches!(&end, ConnectionEnd::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused);
                if outage && refused {
                    outage = false;
                    let _ = shared.inbox.inputs.send(Input::Unreachable(peer.node.clone())).await;
                }
                tracing::debug!(peer = %peer.node, address = peer.address, "peer not reached: {end}");
                end
            }
        };
        if let Some(class) = end.class() {
            shared.rejections.refuse(class, &peer.address, &end);
        }
    }
}

async fn dial(shared: &LinkShared, peer: &PeerLink) -> Result<(FrameStream, u16, Arc<Identity>), ConnectionEnd> {
    let me = shared.me.load_full();
    let connecting = shared.network.connect(&peer.node, &peer.address);
    let connection = timeout(shared.limits.connect, connecting).await.map_err(|_| late("connecting", shared))??;
    let limit = shared.limits.hello;
    let mut wire = FrameStream::new(connection);
    match timeout(limit, greet(shared, peer, &mut wire, &me)).await {
        Ok(version) => Ok((wire, version?, me)),
        Err(_) => Err(ConnectionEnd::Deadline { class: Class::HelloDeadline, what: "HELLO", limit }),
    }
}

fn late(what: &str, shared: &LinkShared) -> ConnectionEnd {
    let text = format!("{what} took more than {:?}", shared.limits.connect);
    ConnectionEnd::Io(io::Error::new(io::ErrorKind::TimedOut, text))
}

async fn greet(
    shared: &LinkShared,
    peer: &PeerLink,
    wire: &mut FrameStream,
    me: &Identity,
) -> Result<u16, ConnectionEnd> {
    let mut bytes = BytesMut::new();
    frame::encode_hello(me, &shared.hello_to(&peer.node), &mut bytes);
    wire.write(&bytes, shared.limits.write).await?;
    let Envelope { cluster, from, incarnation, payload } = wire.next(&shared.limits).await?;
    let Payload::Hello(payload) = payload else { unreachable!("the codec takes only HELLO first") };
    let hello = Envelope { cluster, from, incarnation, payload };
    let version = shared.check_hello(&wire.connection, &hello)?;
    expect("sender", &peer.node, &hello.from)?;
    wire.greeted(version);
    Ok(version)
}

/// Writes what is queued, in the same poll that the queue wakes, until the connection ends.
async fn converse(
    shared: &LinkShared,
    peer: &PeerLink,
    wire: &mut FrameStream,
    version: u16,
    me: &Identity,
) -> ConnectionEnd {
    let mut bytes = BytesMut::new();
    loop {
        if shared.me.load().incarnation != me.incarnation {
            return ConnectionEnd::Replaced;
        }
        for (_, message) in peer.outbox.take() {
            match frame::encode_message(me, version, &message, &mut bytes) {
                Ok(()) => {}
                Err(error @ (FrameError::TooLong { .. } | FrameError::Lacks { .. })) => {
                    let name = message.name();
                    shared.rejections.refuse(Class::Outgoing, &peer.address, &format_args!("{name} not sent: {error}"));
                }
                Err(error) => return error.into(),
            }
            if bytes.len() >= BATCH_BYTES
                && let Err(end) = wire.write(&bytes.split(), shared.limits.write).await
            {
                return end;
            }
        }
        if !bytes.is_empty()
            && let Err(end) = wire.write(&bytes.split(), shared.limits.write).await
        {
            return end;
        }
        tokio::select! {
            biased;
            end = wire.ended() => return end,
            () = peer.outbox.filled() => {}
        }
    }
}
