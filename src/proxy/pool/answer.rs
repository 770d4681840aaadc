//! An answer on its way back, and what the end of a stream means.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::proxy::failure::StreamFailure;

use super::connections::StreamPlace;

/// The body of an answer. To drop it before its end cancels the stream, and the rest of the request with it.
pub struct AnswerBody {
    stream: RecvStream,
    /// Bytes that are still to come, where the answer says so.
    left: Option<u64>,
    /// The data has ended; trailers may follow.
    data_ended: bool,
    /// When something of the answer was last taken.
    taken: Instant,
    /// The stream's place on its connection, until the answer's end.
    place: Option<StreamPlace>,
    _upload: Option<AbortOnDropHandle<()>>,
}

impl AnswerBody {
    /// Returns the body that follows these fields.
    pub(super) fn new(
        headers: &HeaderMap,
        stream: RecvStream,
        place: StreamPlace,
        upload: Option<AbortOnDropHandle<()>>,
    ) -> Self {
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        // The answer to HEAD has a length, and no body.
        let left = if stream.is_end_stream() { Some(0) } else { length };
        Self { stream, left, data_ended: false, taken: Instant::now(), place: Some(place), _upload: upload }
    }

    fn end(&mut self) {
        self.data_ended = true;
        self.left = Some(0);
        self.place = None;
    }

    /// Ends with an error of the stream's, unless nothing is missing.
    fn fail(&mut self, error: &h2::Error) -> Poll<Option<Result<Frame<Bytes>, StreamFailure>>> {
        // A server that answered in full may refuse the rest of the request so (RFC 9113, 8.1).
        let complete = error.is_reset() && error.reason() == Some(Reason::NO_ERROR) && self.left.is_none_or(|n| n == 0);
        let failure = self.place.as_ref().map(|place| failure_of(error, place));
        self.end();
        match failure {
            Some(failure) if !complete => Poll::Ready(Some(Err(StreamFailure::Broken(failure.to_string())))),
            _ => Poll::Ready(None),
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = StreamFailure;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamFailure>>> {
        if self.place.is_none() {
            return Poll::Ready(None);
        }
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.taken = Instant::now();
                    // The server may send as much again. It fails once the stream has ended, where nobody needs it.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return self.fail(&error),
                None => self.data_ended = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => {
                self.end();
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
            Err(error) => self.fail(&error),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.place.is_none() || self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            place.given_up(self.taken);
        }
    }
}

/// Returns what an error of `h2` says of the request whose place this is.
pub(super) fn failure_of(error: &h2::Error, place: &StreamPlace) -> StreamFailure {
    let why = |text: &str| place.ended_why().unwrap_or_else(|| text.to_string());
    if error.is_remote() && error.is_reset() {
        return match error.reason() {
            Some(Reason::REFUSED_STREAM) => StreamFailure::NotProcessed("it refused the stream".into()),
            reason => StreamFailure::Broken(format!("it reset the stream: {}", in_words(reason))),
        };
    }
    if error.is_remote() && error.is_go_away() {
        // Only streams behind the last one that the server names end so; the others go on.
        let reason = in_words(error.reason());
        return StreamFailure::NotProcessed(format!("it ended the connection before this request: {reason}"));
    }
    if error.is_reset() {
        return StreamFailure::Broken("its answer is malformed, or its head larger than 1 MiB".into());
    }
    if error.is_go_away() {
        let reason = in_words(error.reason());
        return StreamFailure::Broken(why(&format!("what it sent is no HTTP/2: {reason}")));
    }
    let text = why("it closed the connection before its answer's end");
    if place.is_reused() { StreamFailure::Stale(text) } else { StreamFailure::Broken(text) }
}

fn in_words(reason: Option<Reason>) -> String {
    reason.map_or_else(|| "for no reason given".into(), |reason| reason.description().to_string())
}
