//! An HTTP/1.x client's connection: what was read ahead, and its polite end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

use super::deadline::Deadline;
use super::table::ClientAddress;
use super::worker::Worker;

/// How long is read from a client that was answered before its request's end, so that it can read the answer; and how long it
/// may be silent meanwhile. As nginx does by default, and like it with no bound on the bytes.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_READ: Duration = Duration::from_secs(5);

/// Connection of a client, with what was read ahead of the request.
pub struct Client<S> {
    /// The connection.
    pub stream: S,
    /// Bytes that were read and are not used yet.
    pub ahead: Vec<u8>,
    /// True once the client has ended its side.
    pub ended: bool,
    ip: IpAddr,
    address: String,
}

impl<S> Client<S> {
    /// Returns a client of which nothing was read.
    pub fn new(stream: S, peer: SocketAddr) -> Self {
        Self { stream, ahead: Vec::new(), ended: false, ip: peer.ip(), address: peer.ip().to_string() }
    }

    /// Returns the address that routing and servers are told.
    pub fn address(&self) -> ClientAddress<'_> {
        ClientAddress { ip: self.ip, text: &self.address }
    }
}

impl Client<tokio::io::Empty> {
    /// Returns a client that sends nothing and takes everything: nobody.
    pub fn nobody(peer: SocketAddr) -> Self {
        Self { ended: true, ..Self::new(tokio::io::empty(), peer) }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Reads what a client still sends that was answered already: it would lose the answer if its connection were closed first.
    pub async fn linger(&mut self, worker: &Rc<Worker>, watch: &Deadline) {
        let _ = self.stream.shutdown().await;
        watch.rest();
        let reading = async {
            loop {
                let read = std::future::poll_fn(|cx| poll_read(&mut self.stream, cx, &mut worker.scratch()));
                match timeout(LINGER_READ, read).await {
                    Ok(Ok(length)) if length > 0 => {}
                    _ => return,
                }
            }
        };
        let _ = timeout(LINGER, pin!(reading)).await;
    }
}

/// Reads what there is, without waiting.
pub fn poll_read<S: AsyncRead + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    into: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(into);
    ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(buffer.filled().len()))
}
