//! A connection that is HTTP no more, such as a WebSocket's: bytes go both ways until one side ends, or both are silent.

use std::cell::Cell;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::time::{Instant, sleep_until};

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Both sides ended it.
    Closed,
    /// One side broke off.
    Broken,
    /// Nothing came from either side for as long as is allowed.
    Idle,
    /// It was the canary's, which lost its share.
    Withdrawn,
}

/// Joins a client and a server until both have ended their sides, or nothing came from either for `idle`; none: without limit.
pub async fn join<C, S>(client: &mut C, server: &mut S, idle: Option<Duration>) -> TunnelEnd
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Cell::new(Instant::now());
    let (mut client, mut server) =
        (Stirring { stream: client, moved: &moved }, Stirring { stream: server, moved: &moved });
    let mut copying = pin!(copy_bidirectional(&mut client, &mut server));
    loop {
        let silence = async {
            match idle {
                Some(idle) => sleep_until(moved.get() + idle).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = copying.as_mut() => return if ended.is_ok() { TunnelEnd::Closed } else { TunnelEnd::Broken },
            () = silence => {}
        }
        if idle.is_some_and(|idle| moved.get().elapsed() >= idle) {
            return TunnelEnd::Idle;
        }
    }
}

/// A stream that notes when something came.
struct Stirring<'s, S> {
    stream: &'s mut S,
    moved: &'s Cell<Instant>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Stirring<'_, S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut *self.stream).poll_read(cx, into);
        if polled.is_ready() {
            self.moved.set(Instant::now());
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stirring<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::sleep;

    const IDLE: Duration = Duration::from_millis(400);

    #[tokio::test]
    async fn a_tunnel_lives_while_either_side_speaks() {
        for from_client in [true, false] {
            let ((mut near, mut client), (mut server, mut far)) = (duplex(64), duplex(64));
            let began = Instant::now();
            let speaking = async {
                let (speaker, hearer) = if from_client { (&mut near, &mut far) } else { (&mut far, &mut near) };
                for _ in 0..5 {
                    // Half of what is allowed.
                    sleep(IDLE / 2).await;
                    speaker.write_all(b"x").await.unwrap();
                    assert_eq!(hearer.read_u8().await.unwrap(), b'x');
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                end = join(&mut client, &mut server, Some(IDLE)) => assert_eq!(end, TunnelEnd::Idle),
                () = speaking => unreachable!(),
            }
            let lived = began.elapsed();
            assert!((IDLE * 7 / 2..IDLE * 6).contains(&lived), "{lived:?}");
        }
    }

    #[tokio::test]
    async fn a_tunnel_without_a_limit_ends_with_both_sides() {
        let ((near, mut client), (mut server, mut far)) = (duplex(64), duplex(64));
        let ending = async {
            sleep(IDLE).await;
            drop(near);
            assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "one side's end is passed on");
            drop(far);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            end = join(&mut client, &mut server, None) => assert_eq!(end, TunnelEnd::Closed),
            () = ending => unreachable!(),
        }
    }
}
