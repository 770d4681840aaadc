//! The frames that an HTTP/2 client sends: those that ask for nothing cost time, so a client may send only as many as its requests
//! need. And one connection's bytes never keep the others of its thread waiting for long.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// What every HTTP/2 connection begins with (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's header.
const FRAME_HEADER_BYTES: usize = 9;
/// Bytes that are read before other connections have their turn.
const TURN_BYTES: usize = 32 * 1024;
/// Frames without a request that a client may always send, and those that a second adds.
const BURST: u64 = 2_000;
const EACH_SECOND: u64 = 200;
/// Frames without a request that come with each HEADERS or DATA frame.
const WITH_REQUEST: u64 = 10;
/// Bytes sent to the client that let it send another frame, such as a WINDOW_UPDATE or a PING that measures.
const SENT_BYTES: u64 = 32;

/// Kinds of frames that count (RFC 9113, 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
/// A change of settings goes through all streams.
const SETTINGS_COST: u64 = 10;

/// What the next bytes are.
#[derive(Debug, Clone, Copy)]
enum ExpectedBytes {
    /// The rest of the preface, from this byte on.
    Preface(usize),
    /// The header of a frame, of which so many bytes came.
    Header([u8; FRAME_HEADER_BYTES], usize),
    /// So many bytes of a frame's payload.
    Payload(usize),
    /// No HTTP/2: anything.
    Other,
}

/// A client's stream, whose HTTP/2 frames are counted as they are read.
pub struct FrameGuard<S> {
    stream: S,
    next: ExpectedBytes,
    /// Frames without a request that the client may send, in parts of [`SENT_BYTES`].
    left: u64,
    filled: Instant,
    /// Bytes read in this turn.
    turn: usize,
}

impl<S> FrameGuard<S> {
    /// Returns a guard of a stream of which nothing was read.
    pub fn new(stream: S) -> Self {
        Self { stream, next: ExpectedBytes::Preface(0), left: BURST * SENT_BYTES, filled: Instant::now(), turn: 0 }
    }

    fn look(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.next {
                ExpectedBytes::Other => return Ok(()),
                ExpectedBytes::Preface(at) => {
                    let length = bytes.len().min(PREFACE.len() - *at);
                    if bytes[..length] != PREFACE[*at..*at + length] {
                        self.next = ExpectedBytes::Other;
                        return Ok(());
                    }
                    *at += length;
                    bytes = &bytes[length..];
                    if *at == PREFACE.len() {
                        self.next = ExpectedBytes::Header([0; FRAME_HEADER_BYTES], 0);
                    }
                }
                ExpectedBytes::Header(header, have) => {
                    let length = bytes.len().min(FRAME_HEADER_BYTES - *have);
                    header[*have..*have + length].copy_from_slice(&bytes[..length]);
                    *have += length;
                    bytes = &bytes[length..];
                    if *have == FRAME_HEADER_BYTES {
                        let [a, b, c, kind, ..] = *header;
                        let payload = u32::from_be_bytes([0, a, b, c]) as usize;
                        self.next = match payload {
                            0 => ExpectedBytes::Header([0; FRAME_HEADER_BYTES], 0),
                            _ => ExpectedBytes::Payload(payload),
                        };
                        self.count(kind, payload)?;
                    }
                }
                ExpectedBytes::Payload(left) => {
                    let length = bytes.len().min(*left);
                    *left -= length;
                    bytes = &bytes[length..];
                    if *left == 0 {
                        self.next = ExpectedBytes::Header([0; FRAME_HEADER_BYTES], 0);
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts a frame: an error when it is one too many.
    fn count(&mut self, kind: u8, payload: usize) -> io::Result<()> {
        let cost = match kind {
            HEADERS | DATA if kind == HEADERS || payload > 0 => {
                self.earn(WITH_REQUEST * SENT_BYTES);
                return Ok(());
            }
            // Bounded with their header list.
            CONTINUATION => return Ok(()),
            SETTINGS => SETTINGS_COST * SENT_BYTES,
            _ => SENT_BYTES,
        };
        if self.left < cost {
            let ms = self.filled.elapsed().min(Duration::from_secs(60)).as_millis() as u64;
            self.filled = Instant::now();
            self.earn(ms * EACH_SECOND * SENT_BYTES / 1_000);
        }
        match self.left.checked_sub(cost) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other("it sends more frames than its requests need")),
        }
        Ok(())
    }

    fn earn(&mut self, parts: u64) {
        self.left = (self.left + parts).min(BURST * SENT_BYTES);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameGuard<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.turn >= TURN_BYTES {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, into);
        if polled.is_pending() {
            self.turn = 0;
        }
        ready!(polled)?;
        let bytes = &into.filled()[before..];
        self.turn += bytes.len();
        Poll::Ready(self.look(bytes))
    }
}

impl<S: AsyncWrite + Unpin> FrameGuard<S> {
    fn sent(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(length)) = &written {
            self.earn(*length as u64);
        }
        written
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameGuard<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    /// Returns how many of these pieces a guard lets through, and why it ended.
    async fn passed(pieces: impl Iterator<Item = Vec<u8>>) -> (usize, Option<io::Error>) {
        let (mut client, server) = duplex(1 << 20);
        let mut guard = FrameGuard::new(server);
        for (count, piece) in pieces.enumerate() {
            client.write_all(&piece).await.unwrap();
            if let Err(error) = guard.read_exact(&mut vec![0; piece.len()]).await {
                return (count, Some(error));
            }
        }
        (usize::MAX, None)
    }

    #[tokio::test]
    async fn frames_that_ask_for_nothing_are_few() {
        const PING: u8 = 6;
        let pings = || std::iter::repeat_n(frame(PING, b"12345678"), 4_000);
        let start = || std::iter::once(PREFACE.to_vec());
        let (count, error) = passed(start().chain(pings())).await;
        assert!(error.is_some() && (2_000..2_300).contains(&count), "{count}");
        let (count, error) = passed(start().chain(std::iter::repeat_n(frame(SETTINGS, &[]), 4_000))).await;
        assert!(error.is_some() && (200..230).contains(&count), "{count}");
        // As many as one likes beside requests, and what is no HTTP/2.
        let beside = (0..4_000).flat_map(|_| [frame(HEADERS, b"x"), frame(PING, b"12345678"), frame(DATA, b"x")]);
        assert!(passed(start().chain(beside)).await.1.is_none());
        assert!(passed(std::iter::once(b"PRI * HTTP/1.1\r\n".to_vec()).chain(pings())).await.1.is_none());
        let empty = std::iter::repeat_n(frame(DATA, &[]), 4_000);
        assert!(passed(start().chain(empty)).await.1.is_some());
    }

    #[tokio::test]
    async fn what_is_sent_to_a_client_lets_it_send_more() {
        const WINDOW_UPDATE: u8 = 8;
        let (mut client, server) = duplex(1 << 20);
        let mut guard = FrameGuard::new(server);
        client.write_all(PREFACE).await.unwrap();
        guard.read_exact(&mut [0; 24]).await.unwrap();
        let mut bytes = [0; 64];
        for _ in 0..10_000 {
            guard.write_all(&bytes).await.unwrap();
            client.read_exact(&mut bytes).await.unwrap();
            client.write_all(&frame(WINDOW_UPDATE, b"1234")).await.unwrap();
            guard.read_exact(&mut [0; 13]).await.unwrap();
        }
    }
}
