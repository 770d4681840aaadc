//! A request's body on the slow path: what came of it can be sent once more, and it is asked for only when a server wants it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use hyper::body::{Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Bytes of a body that are kept, so that the request can be repeated or mirrored.
const KEPT_BYTES_MAX: usize = 64 * 1024;

/// A failure of a body that passes through.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Where a request's body comes from.
pub enum BodySource {
    /// There is none, or no more of it.
    Ended,
    /// A stream of an HTTP/2 client.
    Stream(RecvStream),
    /// What another task reads, in pieces; the channel ends with the body, and an error says that the client broke it off.
    Channel(mpsc::Receiver<Result<Bytes, ()>>),
}

impl BodySource {
    /// Returns true once nothing more can come: what carries a body of known length doesn't ask for its end.
    fn has_ended(&self) -> bool {
        match self {
            Self::Ended => true,
            Self::Stream(stream) => stream.is_end_stream(),
            Self::Channel(pieces) => pieces.is_closed() && pieces.is_empty(),
        }
    }
}

/// What a body does at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadState {
    /// The upstream takes what comes, or everything came.
    Moving,
    /// The client has more to send, and the upstream waits for it.
    Awaited,
    /// The client ended it before its end.
    Cut,
}

/// A request's body, which each attempt in turn borrows.
#[derive(Clone)]
pub struct Upload(Arc<Mutex<UploadParts>>);

struct UploadParts {
    source: BodySource,
    /// Content-Length, where the client sent one.
    length: Option<u64>,
    /// What was read from the source, while that is little.
    kept: Option<Vec<Bytes>>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    state: UploadState,
    /// When something last came from the client.
    moved: Instant,
    is_wanted: bool,
    waker: Option<Waker>,
}

impl Upload {
    /// Returns a body of which nothing was read.
    pub fn new(source: BodySource, length: Option<u64>) -> Self {
        Self(Arc::new(Mutex::new(UploadParts {
            source,
            length,
            kept: Some(Vec::new()),
            kept_bytes: 0,
            trailers: None,
            state: UploadState::Moving,
            moved: Instant::now(),
            is_wanted: false,
            waker: None,
        })))
    }

    fn shared(&self) -> MutexGuard<'_, UploadParts> {
        self.0.lock().expect("nothing panics while it holds a body")
    }

    /// Lends the body to an attempt, from its beginning.
    pub fn lend(&self) -> Lent {
        Lent { upload: self.clone(), at: 0, told_trailers: false }
    }

    /// Returns a body that is this one; none unless all of it came, and is kept.
    pub fn copy(&self) -> Option<Self> {
        let shared = self.shared();
        let kept = shared.kept.clone().filter(|_| shared.source.has_ended())?;
        let copy = Self::new(BodySource::Ended, shared.length);
        {
            let mut copied = copy.shared();
            copied.kept = Some(kept);
            copied.trailers.clone_from(&shared.trailers);
        }
        Some(copy)
    }

    /// Returns true while an attempt can begin with the body's first byte.
    pub fn is_repeatable(&self) -> bool {
        self.shared().kept.is_some()
    }

    /// Returns what the body does, and when something last came of it.
    pub fn state(&self) -> (UploadState, Instant) {
        let shared = self.shared();
        (shared.state, shared.moved)
    }

    /// Returns since when the client is waited for; none while it is not.
    pub fn awaited_since(&self) -> Option<Instant> {
        let shared = self.shared();
        (shared.state == UploadState::Awaited).then_some(shared.moved)
    }

    /// Returns true while more of it may come from the client.
    pub fn is_open(&self) -> bool {
        !self.shared().source.has_ended()
    }

    /// Waits until a server wants the body, which is when a client that waits for 100 (Continue) gets it.
    pub fn poll_wanted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = self.shared();
        if shared.is_wanted {
            return Poll::Ready(());
        }
        shared.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl UploadParts {
    /// Reads the next piece from the source; none at its end.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        if !self.is_wanted {
            self.is_wanted = true;
            self.waker.take().into_iter().for_each(Waker::wake);
        }
        let polled = match &mut self.source {
            BodySource::Ended => return Poll::Ready(None),
            BodySource::Stream(stream) => poll_stream(stream, &mut self.trailers, cx),
            BodySource::Channel(pieces) => pieces.poll_recv(cx),
        };
        self.state = match &polled {
            Poll::Pending => UploadState::Awaited,
            Poll::Ready(Some(Err(()))) => UploadState::Cut,
            Poll::Ready(_) => UploadState::Moving,
        };
        let piece = ready!(polled);
        self.moved = Instant::now();
        match piece {
            Some(Ok(piece)) => {
                self.keep(&piece);
                Poll::Ready(Some(Ok(piece)))
            }
            Some(Err(())) => Poll::Ready(Some(Err("the client broke its request off".into()))),
            None => {
                self.source = BodySource::Ended;
                Poll::Ready(None)
            }
        }
    }

    fn keep(&mut self, piece: &Bytes) {
        self.kept_bytes += piece.len();
        match &mut self.kept {
            Some(kept) if self.kept_bytes <= KEPT_BYTES_MAX => kept.push(piece.clone()),
            _ => self.kept = None,
        }
    }
}

/// Reads a stream's data, and lets the client send as much again; at its end, its trailers.
fn poll_stream(
    stream: &mut RecvStream,
    trailers: &mut Option<HeaderMap>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Bytes, ()>>> {
    if let Some(data) = ready!(stream.poll_data(cx)) {
        let taken = data.and_then(|data| stream.flow_control().release_capacity(data.len()).map(|()| data));
        return Poll::Ready(Some(taken.map_err(drop)));
    }
    match ready!(stream.poll_trailers(cx)) {
        Ok(found) => {
            *trailers = found;
            Poll::Ready(None)
        }
        Err(_) => Poll::Ready(Some(Err(()))),
    }
}

/// A request's body in the hands of one attempt.
pub struct Lent {
    upload: Upload,
    /// Pieces of what is kept that the attempt got.
    at: usize,
    told_trailers: bool,
}

impl hyper::body::Body for Lent {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let upload = this.upload.clone();
        let mut shared = upload.shared();
        if let Some(piece) = shared.kept.as_ref().and_then(|kept| kept.get(this.at)) {
            this.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(piece.clone()))));
        }
        match ready!(shared.poll_piece(cx)) {
            Some(piece) => {
                this.at += 1;
                Poll::Ready(Some(piece.map(Frame::data)))
            }
            None => {
                let trailers = shared.trailers.clone().filter(|_| !std::mem::replace(&mut this.told_trailers, true));
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.upload.shared();
        let has_more = shared.kept.as_ref().is_some_and(|kept| kept.len() > self.at);
        shared.source.has_ended() && !has_more && shared.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.upload.shared();
        let kept = || shared.kept.iter().flatten().map(|piece| piece.len() as u64).sum();
        match (shared.length, &shared.source) {
            (Some(length), _) if self.at == 0 => SizeHint::with_exact(length),
            (None, BodySource::Ended) if self.at == 0 => SizeHint::with_exact(kept()),
            _ => SizeHint::default(),
        }
    }
}
