//! A request of the slow path at a server of HTTP/1.1: its bytes on their way there, and the answer's on their way back.
//!
//! Heads and bodies are read by the code of the fast path, and both paths share the kept connections.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use crate::proxy::body::{BodyFraming, put_chunk};
use crate::proxy::client::poll_read;
use crate::proxy::failure::{SendFailure, WITHDRAWN};
use crate::proxy::hop::is_hop_by_hop;
use crate::proxy::policy::FailureKind;
use crate::proxy::pool::Hints;
use crate::proxy::request::{FIELDS_MAX, put_field};
use crate::proxy::upstream::Server;
use crate::proxy::wire::{self, Asked, ResponseHead, Room};
use crate::proxy::worker::Worker;

use super::head::Head;
use super::upload::{BodyError, Lent};

/// Bytes of a request that are gathered before they are written.
const GATHERED_BYTES_MAX: usize = 64 * 1024;

/// What a request is bound by.
pub struct SendTerms<'t> {
    /// Only a connection that served nothing before will do.
    pub is_repeat: bool,
    /// What gets the interim answers.
    pub hints: Option<&'t Hints>,
}

/// Sends a request, and returns the answer once its head is complete. `may_go` is asked once there is a connection.
pub async fn send(
    worker: &Rc<Worker>,
    server: &Server,
    head: &Head,
    body: Lent,
    terms: SendTerms<'_>,
    may_go: impl Fn() -> bool,
) -> Result<Response<Http1Body>, SendFailure> {
    let SendTerms { is_repeat, hints } = terms;
    let kept = if is_repeat { None } else { worker.kept(server.id) };
    let (stream, life_ends_ms, is_reused) = match kept {
        Some((stream, life_ends_ms)) => (stream, life_ends_ms, true),
        None => {
            let connected = server.connect(worker.settings().connect_timeout()).await;
            (
                connected.map_err(|failure| SendFailure::connect(&server.authority, &failure))?,
                worker.life_ends_ms(),
                false,
            )
        }
    };
    if !may_go() {
        worker.keep(server.id, stream, life_ends_ms);
        return Err(SendFailure { kind: FailureKind::Withdrawn, why: WITHDRAWN.into() });
    }
    let mut out = worker.buffer();
    let is_chunked = head.write(&mut out, &body);
    let mut answer = Http1Body {
        worker: worker.clone(),
        server: server.id,
        stream: Some(stream),
        life_ends_ms,
        request: RequestBytes { body, is_chunked, out, sent: 0, has_ended: false, is_deaf: false },
        framing: BodyFraming::NONE,
        stays_open: false,
        came: worker.buffer(),
        trailers: Vec::new(),
    };
    let head = std::future::poll_fn(|cx| answer.poll_head(cx, head.asked, is_reused, hints)).await?;
    Ok(head.map(|()| answer))
}

fn broken(why: impl Into<String>) -> SendFailure {
    SendFailure { kind: FailureKind::Broken, why: why.into() }
}

/// A request's bytes that its server has not taken yet.
struct RequestBytes {
    body: Lent,
    is_chunked: bool,
    out: Vec<u8>,
    /// Bytes of `out` that the server took.
    sent: usize,
    /// Everything of the body is in `out`.
    has_ended: bool,
    /// The server takes nothing more.
    is_deaf: bool,
}

impl RequestBytes {
    /// Returns true when the server has all of it.
    fn is_complete(&self) -> bool {
        self.has_ended && self.sent == self.out.len() && !self.is_deaf
    }

    /// Writes what comes, until everything is written or the server takes nothing more; an error when the client broke off.
    fn poll(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while !self.is_deaf {
            let gathered = self.gather(cx)?;
            if self.sent == self.out.len() {
                return gathered.map(Ok);
            }
            match ready!(Pin::new(&mut *stream).poll_write(cx, &self.out[self.sent..])) {
                Ok(length) => self.sent += length,
                // It may have answered before.
                Err(_) => self.is_deaf = true,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes pieces of the body while they come and there is room; ready at its end.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, BodyError> {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        while !self.has_ended && self.out.len() < GATHERED_BYTES_MAX {
            if self.body.is_end_stream() {
                self.end(None);
                break;
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Some(frame)) => match frame?.into_data() {
                    Ok(data) if self.is_chunked => put_chunk(&data, &mut self.out),
                    Ok(data) => self.out.extend_from_slice(&data),
                    Err(frame) => self.end(frame.into_trailers().ok()),
                },
                Poll::Ready(None) => self.end(None),
            }
        }
        Ok(Poll::Ready(()))
    }

    fn end(&mut self, trailers: Option<HeaderMap>) {
        self.has_ended = true;
        if !self.is_chunked {
            return;
        }
        self.out.extend_from_slice(b"0\r\n");
        for (name, value) in trailers.iter().flatten() {
            if is_trailer(name.as_str()) {
                put_field(&mut self.out, name.as_str(), &[value.as_bytes()]);
            }
        }
        self.out.extend_from_slice(b"\r\n");
    }
}

/// Returns true for a field that may stand behind a body: none that concerns the connection, the framing or the routing
/// (RFC 9110, 6.5.1).
fn is_trailer(name: &str) -> bool {
    !is_hop_by_hop(name) && !["content-length", "host", "trailer"].iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// The body of an answer, and what is left of its request. To drop it before its end closes the connection.
pub struct Http1Body {
    worker: Rc<Worker>,
    server: usize,
    /// The connection, until the answer's end.
    stream: Option<TcpStream>,
    /// When the connection is too old for another request.
    life_ends_ms: u64,
    request: RequestBytes,
    /// Part of the answer that has not arrived yet.
    framing: BodyFraming,
    /// The server takes another request afterwards.
    stays_open: bool,
    /// Bytes that came, and were not taken yet.
    came: Vec<u8>,
    /// Trailers of a chunked answer, as they came.
    trailers: Vec<u8>,
}

impl Http1Body {
    /// Moves the request on, and reads the answer's head.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        asked: Asked,
        is_reused: bool,
        hints: Option<&Hints>,
    ) -> Poll<Result<Response<()>, SendFailure>> {
        if let Err(why) = self.poll_request(cx) {
            return Poll::Ready(Err(broken(why.to_string())));
        }
        loop {
            match ready!(self.poll_more(cx)) {
                Ok(true) => {}
                Ok(false) | Err(_) if is_reused && self.came.is_empty() => {
                    let why = "it closed a connection that was to be used again".to_string();
                    return Poll::Ready(Err(SendFailure { kind: FailureKind::Stale, why }));
                }
                Ok(false) | Err(_) => {
                    return Poll::Ready(Err(broken("the connection ended before an answer was complete")));
                }
            }
            while let Some((head, length)) = self.head(asked)? {
                self.came.drain(..length);
                if !head.status().is_informational() {
                    self.complete();
                    return Poll::Ready(Ok(head));
                }
                if let Some(hints) = hints {
                    // A client that has left, or reads none, needs no more of them.
                    let _ = hints.try_send(head);
                }
            }
        }
    }

    /// Moves the request on while there is a connection; an error when the client broke it off.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Result<(), BodyError> {
        match self.stream.as_mut().map(|stream| self.request.poll(stream, cx)) {
            Some(Poll::Ready(sent)) => sent,
            Some(Poll::Pending) | None => Ok(()),
        }
    }

    /// Reads what there is behind what came; false at the connection's end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<bool>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(Ok(false)) };
        let mut scratch = self.worker.scratch();
        let length = ready!(poll_read(stream, cx, &mut scratch))?;
        self.came.extend_from_slice(&scratch[..length]);
        Poll::Ready(Ok(length > 0))
    }

    /// Reads a head at the beginning of what came, and returns it with its length; none while it is not all there.
    fn head(&mut self, asked: Asked) -> Result<Option<(Response<()>, usize)>, SendFailure> {
        let mut room = Room::default();
        let found = wire::answer(&self.came, asked, &mut room).map_err(|refusal| broken(refusal.why))?;
        let Some(found) = found else { return Ok(None) };
        (self.framing, self.stays_open) = (found.body, found.stays_open);
        let length = found.length;
        Ok(Some((response(&found).ok_or_else(|| broken("what came is no HTTP answer"))?, length)))
    }

    /// Takes what came of the body; none of it when it is malformed.
    fn take(&mut self) -> Option<Bytes> {
        let mut came = std::mem::take(&mut self.came);
        let part = self.framing.take_data(&mut came, &mut self.trailers).ok()?;
        // More than the answer is no beginning of another one.
        self.stays_open &= part.used == came.len();
        let data = Bytes::copy_from_slice(&came[..part.kept]);
        came.clear();
        self.came = came;
        self.complete();
        Some(data)
    }

    /// Keeps the connection once the answer and the request have ended, if it takes another one.
    fn complete(&mut self) {
        if !self.framing.has_ended() || !self.request.is_complete() || !self.came.is_empty() || !self.stays_open {
            return;
        }
        if let Some(stream) = self.stream.take() {
            self.worker.keep(self.server, stream, self.life_ends_ms);
        }
    }
}

/// Returns a head with all its fields; none if one of them has no place in HTTP/2.
fn response(head: &ResponseHead<'_, '_>) -> Option<Response<()>> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).ok()?;
    let headers = response.headers_mut();
    headers.reserve(head.all_fields().len());
    for field in head.all_fields() {
        headers.append(HeaderName::from_bytes(field.name.as_bytes()).ok()?, HeaderValue::from_bytes(field.value).ok()?);
    }
    Some(response)
}

/// Returns the trailers that came; none of them where there are none, or where they can't be read.
fn trailers(came: &[u8]) -> Option<HeaderMap> {
    let mut room = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(came, &mut room) else { return None };
    let mut trailers = HeaderMap::new();
    for field in fields.iter().filter(|field| is_trailer(field.name)) {
        trailers
            .append(HeaderName::from_bytes(field.name.as_bytes()).ok()?, HeaderValue::from_bytes(field.value).ok()?);
    }
    (!trailers.is_empty()).then_some(trailers)
}

impl Body for Http1Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Err(why) = this.poll_request(cx) {
            return Poll::Ready(Some(Err(why)));
        }
        while !this.framing.has_ended() {
            if !this.came.is_empty() {
                match this.take() {
                    Some(data) if data.is_empty() => continue,
                    Some(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                    None => return Poll::Ready(Some(Err("a chunk of its answer is malformed".into()))),
                }
            }
            match ready!(this.poll_more(cx)) {
                Ok(true) => {}
                Ok(false) if this.framing == BodyFraming::Open => this.framing = BodyFraming::NONE,
                Ok(false) => return Poll::Ready(Some(Err("it closed the connection before its answer's end".into()))),
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
        let trailers = trailers(&std::mem::take(&mut this.trailers));
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.framing.has_ended() && self.trailers.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for Http1Body {
    fn drop(&mut self) {
        self.worker.give_back(std::mem::take(&mut self.request.out));
        self.worker.give_back(std::mem::take(&mut self.came));
    }
}
