//! A request's body on its way to a server: as much as the server's window takes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use hyper::body::Body;

/// Why a body did not get to its end.
pub enum UploadFailure {
    /// The body could not be read; the reason in words. The server was told that its request is cancelled.
    Body(String),
    /// The stream ended first.
    Stream,
}

/// A body, and the stream that takes it. To drop it before its end cancels the stream.
pub struct BodyUpload<B> {
    body: B,
    stream: SendStream<Bytes>,
}

impl<B: Body<Data = Bytes, Error: std::fmt::Display> + Unpin> BodyUpload<B> {
    /// Returns an upload of which nothing was sent.
    pub fn new(body: B, stream: SendStream<Bytes>) -> Self {
        Self { body, stream }
    }

    /// Moves what can be moved; ready at the body's end, or when there is nothing more to send it on.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), UploadFailure>> {
        let ended = |_| UploadFailure::Stream;
        loop {
            // Nothing is read that the server does not take.
            self.stream.reserve_capacity(1);
            while self.stream.capacity() == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Poll::Ready(Err(UploadFailure::Stream)),
                }
            }
            if self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(UploadFailure::Stream));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(self.stream.send_data(Bytes::new(), true).map_err(ended)),
                Some(Err(error)) => {
                    self.stream.send_reset(Reason::CANCEL);
                    return Poll::Ready(Err(UploadFailure::Body(error.to_string())));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let last = self.body.is_end_stream();
                        if last || !data.is_empty() {
                            self.stream.send_data(data, last).map_err(ended)?;
                        }
                        if last {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return Poll::Ready(self.stream.send_trailers(trailers).map_err(ended));
                    }
                },
            }
        }
    }
}
