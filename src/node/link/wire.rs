//! Frames off one socket, each within its deadline.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::{Class, LinkLimits};
use crate::node::frame::{Envelope, FrameCodec, FrameError, Payload};
use crate::ports::Connection;

/// Bytes asked of the socket at a time once the peer is known; less before.
const READ_BYTES: usize = 8 * 1024;
const READ_BYTES_BEFORE_HELLO: usize = 512;

/// Why a connection between two nodes ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionEnd {
    /// The peer broke the rules.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The socket ended within a frame.
    #[error("connection ended after {0} bytes of a frame, expected a whole one")]
    Truncated(usize),
    /// A step of the connection took longer than it may.
    #[error("{what} took more than {limit:?}")]
    Deadline { class: Class, what: &'static str, limit: Duration },
    /// The transport's own handshake failed.
    #[error("transport handshake failed: {0}")]
    Transport(io::Error),
    /// A later connection, or too many, took its place.
    #[error("replaced")]
    Replaced,
    /// The peer closed it, between two frames.
    #[error("closed by the peer")]
    Closed,
    /// The system gave it up.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ConnectionEnd {
    /// Returns the class it counts as; none for ends that break no rule.
    pub(super) fn class(&self) -> Option<Class> {
        match self {
            Self::Frame(error) => Some(error.into()),
            Self::Truncated(_) => Some(Class::Truncated),
            Self::Deadline { class, .. } => Some(*class),
            Self::Transport(_) => Some(Class::Transport),
            Self::Replaced | Self::Closed | Self::Io(_) => None,
        }
    }
}

/// A connection, and the part of a frame that has arrived.
pub(super) struct FrameStream {
    pub(super) connection: Connection,
    codec: FrameCodec,
    bytes: BytesMut,
    chunk: usize,
}

impl FrameStream {
    pub(super) fn new(connection: Connection) -> Self {
        let (codec, bytes) = (FrameCodec::default(), BytesMut::new());
        Self { connection, codec, bytes, chunk: READ_BYTES_BEFORE_HELLO }
    }

    /// The peer is known: messages may come.
    pub(super) fn greeted(&mut self, version: u16) {
        self.codec.greeted(version);
        self.chunk = READ_BYTES;
    }

    /// Returns the next frame: it must begin within the idle limit, and end within the body limit from there.
    pub(super) async fn next(&mut self, limits: &LinkLimits) -> Result<Envelope<Payload>, ConnectionEnd> {
        let idle = ConnectionEnd::Deadline { class: Class::Idle, what: "silence", limit: limits.idle };
        let body = ConnectionEnd::Deadline { class: Class::BodyDeadline, what: "a frame", limit: limits.body };
        let (mut deadline, mut late) = (Instant::now() + limits.idle, idle);
        let mut body = Some(body);
        loop {
            if let Some(frame) = self.codec.decode(&mut self.bytes)? {
                return Ok(frame);
            }
            if !self.bytes.is_empty()
                && let Some(body) = body.take()
            {
                (deadline, late) = (Instant::now() + limits.body, body);
            }
            self.bytes.reserve(self.chunk);
            match timeout_at(deadline, self.connection.stream.read_buf(&mut self.bytes)).await {
                Ok(Ok(0)) if self.bytes.is_empty() => return Err(ConnectionEnd::Closed),
                Ok(Ok(0)) => return Err(ConnectionEnd::Truncated(self.bytes.len())),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(ConnectionEnd::Io(error)),
                Err(_) => return Err(late),
            }
        }
    }

    /// Returns when the peer ends the connection, or says something where it may say nothing. Dropping the wait is safe.
    pub(super) async fn ended(&mut self) -> ConnectionEnd {
        match self.connection.stream.read_u8().await {
            Ok(found) => FrameError::Kind { expected: "nothing on a connection that this node sends on", found }.into(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => ConnectionEnd::Closed,
            Err(error) => ConnectionEnd::Io(error),
        }
    }

    /// Writes all of `bytes`: at once when the socket has room.
    pub(super) async fn write(&mut self, bytes: &[u8], limit: Duration) -> Result<(), ConnectionEnd> {
        let written = async {
            self.connection.stream.write_all(bytes).await?;
            self.connection.stream.flush().await
        };
        match tokio::time::timeout(limit, written).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(ConnectionEnd::Io(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("could not write for {limit:?}"),
            ))),
        }
    }
}
