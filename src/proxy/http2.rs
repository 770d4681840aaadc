//! An HTTP/2 client's connection: each stream is a request of its own, checked and decided like all others, on the slow path.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::listener::{ConnectionLimiter, HeldPlace, Tracked};

use super::access::{Access, SeenRequest};
use super::answer::{OwnAnswer, PageRequest, for_grpc, refusal};
use super::dispose::Disposition;
use super::pool::HINTS_MAX;
use super::request::{CanonicalRequest, HEAD_BYTES_MAX, Protocol, Received};
use super::slow::upload::{BodySource, Upload};
use super::slow::{self, Answered, Head, SlowAnswer, SlowRequest, fields_of};
use super::stay::during;
use super::table::ClientAddress;
use super::timeouts::is_grpc;
use super::wire::{Asked, ResponseHead, is_hint};
use super::worker::Worker;

/// Bytes of a request that a client may send before a server takes any, by stream and by connection.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Streams of a connection at once.
const STREAMS_MAX: u32 = 200;
/// Bytes of a stream that may wait to be sent.
const SEND_BUFFER_BYTES: usize = 256 * 1024;

/// Serves a connection of which this much was read, until it ends; `shutdown` lets its open requests end.
pub async fn serve<S>(
    worker: &Rc<Worker>,
    ahead: Vec<u8>,
    stream: S,
    peer: SocketAddr,
    held: HeldPlace<'_>,
    limiter: &ConnectionLimiter,
    shutdown: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let HeldPlace { place, tracked } = held;
    let idle = Duration::from_millis(worker.settings().keep_alive_timeout_ms);
    let connection = async {
        let mut connection = builder().handshake(Rewound { ahead: ahead.into(), stream }).await?;
        let (mut is_ending, mut quiet) = (false, pin!(sleep(idle)));
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Some(accepted) => {
                        let (request, respond) = accepted?;
                        place.asked();
                        quiet.as_mut().reset(Instant::now() + idle);
                        let open = OpenStream::begins(worker, tracked);
                        // A task copies its future several times, and this one is large.
                        tokio::task::spawn_local(Box::pin(answer(worker.clone(), request, respond, peer, open)));
                        if worker.ends_connections() && !is_ending {
                            is_ending = true;
                            connection.graceful_shutdown();
                        }
                    }
                    None => return Ok(()),
                },
                // It is idle, and others wait.
                () = tracked.is_not_needed(None) => return Ok(()),
                () = shutdown.cancelled(), if !is_ending => {
                    is_ending = true;
                    connection.graceful_shutdown();
                }
                () = quiet.as_mut() => {
                    quiet.as_mut().reset(Instant::now() + idle);
                    if !connection.has_streams() {
                        connection.graceful_shutdown();
                    }
                }
            }
        }
    };
    limiter.watch(connection, place, peer).await;
}

/// A stream of a connection, while its request is answered.
struct OpenStream {
    worker: Rc<Worker>,
    connection: Arc<Tracked>,
}

impl OpenStream {
    fn begins(worker: &Rc<Worker>, connection: &Arc<Tracked>) -> Self {
        connection.begins(worker.now_ms());
        Self { worker: worker.clone(), connection: connection.clone() }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.connection.ends(self.worker.now_ms());
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(2 * HEAD_BYTES_MAX as u32);
    builder
}

/// A connection of which something was read already.
struct Rewound<S> {
    ahead: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let length = self.ahead.len().min(into.remaining());
        into.put_slice(&self.ahead.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
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
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// What becomes of a stream's request.
enum StreamRequest {
    Own(Box<OwnAnswer>),
    Page(PageRequest),
    Slow { request: Box<SlowRequest>, length: Option<u64>, awaits_continue: bool },
}

/// Answers a stream.
async fn answer(
    worker: Rc<Worker>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: SocketAddr,
    _open: OpenStream,
) {
    let (head, body) = request.into_parts();
    let is_head = head.method == http::Method::HEAD;
    let kind = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_grpc = kind.is_some_and(is_grpc);
    let (request, access) = disposed(&worker, &head, body.is_end_stream(), peer);
    let own = match request {
        StreamRequest::Own(own) => *own,
        StreamRequest::Page(page) => page.answer(&worker.router).await,
        StreamRequest::Slow { request, length, awaits_continue } => {
            let source = if body.is_end_stream() { BodySource::Ended } else { BodySource::Stream(body) };
            let upload = Upload::new(source, length);
            let asked = request.head.asked;
            match carried(&worker, *request, &upload, &mut respond, awaits_continue).await {
                // The client has left, and nobody is to blame.
                None => return,
                Some(SlowAnswer::Own(own)) => *own,
                Some(SlowAnswer::Upstream(mut answered)) => {
                    let stay = answered.stay.take();
                    // A stream that is dropped before its end is reset, so that it doesn't look whole.
                    during(&worker, stay.as_ref(), pin!(pass_on(&worker, *answered, respond, asked))).await;
                    return;
                }
            }
        }
    };
    let own = if is_grpc && !own.status().is_success() { for_grpc(&own) } else { own };
    if let Some(entry) = access {
        entry.answered_itself(&own);
    }
    let (mut head, body) = own.into_parts();
    put_date(&worker, &mut head.headers);
    head.headers.insert(CONTENT_LENGTH, body.len().into());
    let is_empty = is_head || body.is_empty();
    if let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), is_empty)
        && !is_empty
    {
        // It is less than any window, and a client that has left doesn't want it.
        let _ = send.send_data(body, true);
    }
}

/// Decides what becomes of a stream's request.
fn disposed(
    worker: &Worker,
    head: &http::request::Parts,
    has_ended: bool,
    peer: SocketAddr,
) -> (StreamRequest, Access) {
    let fields = fields_of(&head.headers);
    let received = Received {
        protocol: Protocol::Http2,
        method: head.method.as_str(),
        target: head.uri.path_and_query().map_or("", |target| target.as_str()),
        authority: head.uri.authority().map(|authority| authority.as_str()),
        fields: &fields,
        has_ended,
    };
    let Received { protocol, method, target, fields: seen, .. } = received;
    let access = worker.router.begin_entry(peer.ip(), Some(SeenRequest { protocol, method, target, fields: seen }));
    let address = peer.ip().to_string();
    let made = CanonicalRequest::of(received, None).and_then(|asked| {
        let client = ClientAddress { ip: peer.ip(), text: &address };
        Ok(match Disposition::of(worker, &asked, client) {
            Disposition::Page(page) => StreamRequest::Page(page),
            Disposition::Refuse(answer) => StreamRequest::Own(answer),
            Disposition::Route(routed) => {
                let head = Head::of(&asked, &routed.route, client, worker.settings())?;
                let request = Box::new(SlowRequest { head, routed, is_copy: false, access: access.clone() });
                StreamRequest::Slow { request, length: asked.length(), awaits_continue: asked.awaits_continue }
            }
        })
    });
    (made.unwrap_or_else(|refused| StreamRequest::Own(Box::new(refusal(refused)))), access)
}

/// Carries a request to a server, and tells the client what comes before its answer; none when the client leaves.
async fn carried(
    worker: &Rc<Worker>,
    request: SlowRequest,
    upload: &Upload,
    respond: &mut SendResponse<Bytes>,
    mut awaits_continue: bool,
) -> Option<SlowAnswer> {
    let (hints, mut told) = mpsc::channel(HINTS_MAX);
    let mut carried = pin!(slow::carry(worker, request, upload, Some(&hints)));
    std::future::poll_fn(|cx| {
        // What a reset does to the request's body is no failure of anybody's.
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        let polled = carried.as_mut().poll(cx);
        if awaits_continue && upload.poll_wanted(cx).is_ready() {
            awaits_continue = false;
            inform(respond, Response::new(()), StatusCode::CONTINUE);
        }
        while let Poll::Ready(Some(hint)) = told.poll_recv(cx) {
            if is_hint(hint.status()) {
                let status = hint.status();
                inform(respond, hint, status);
            }
        }
        polled.map(Some)
    })
    .await
}

/// Sends an interim answer. A client that has left gets none.
fn inform(respond: &mut SendResponse<Bytes>, mut hint: Response<()>, status: StatusCode) {
    *hint.status_mut() = status;
    let headers = std::mem::take(hint.headers_mut());
    let fields = fields_of(&headers);
    if let Ok(head) = ResponseHead::of(status.as_u16(), &fields, Asked::default()) {
        *hint.headers_mut() = headers_of(&head);
        let _ = respond.send_informational(hint);
    }
}

/// Returns the fields that a client gets of a server's answer.
fn headers_of(head: &ResponseHead) -> HeaderMap {
    let mut headers = HeaderMap::new();
    head.fields(|name, value| {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    });
    if let Some(length) = head.content_length() {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    headers
}

fn put_date(worker: &Worker, headers: &mut HeaderMap) {
    if !headers.contains_key(DATE)
        && let Ok(date) = HeaderValue::from_str(&worker.date())
    {
        headers.insert(DATE, date);
    }
}

/// Passes a server's answer on.
async fn pass_on(worker: &Worker, mut answered: Answered, mut respond: SendResponse<Bytes>, asked: Asked) {
    let mut response = Response::new(());
    *response.status_mut() = answered.head.status;
    let is_empty = {
        let fields = fields_of(&answered.head.headers);
        let Ok(head) = ResponseHead::of(answered.head.status.as_u16(), &fields, asked) else { return };
        *response.headers_mut() = headers_of(&head);
        head.body.has_ended() || answered.has_ended()
    };
    answered.mark(response.headers_mut());
    put_date(worker, response.headers_mut());
    let Ok(mut send) = respond.send_response(response, is_empty) else { return };
    if is_empty {
        // Counts the end.
        while let Some(Ok(_)) = answered.next().await {}
        return;
    }
    loop {
        let next = tokio::select! {
            biased;
            next = answered.next() => next,
            // The client has left, and nobody is to blame.
            _ = std::future::poll_fn(|cx| send.poll_reset(cx)) => return,
        };
        match next.map(|frame| frame.map(hyper::body::Frame::into_data)) {
            Some(Ok(Ok(data))) => {
                let is_last = answered.has_ended();
                if send_data(worker, &mut send, data, is_last, answered.end()).await.is_none() {
                    return send.send_reset(Reason::CANCEL);
                }
                if is_last {
                    while let Some(Ok(_)) = answered.next().await {}
                    return;
                }
            }
            Some(Ok(Err(frame))) => {
                let _ = send.send_trailers(frame.into_trailers().unwrap_or_default());
                return;
            }
            // What was cut must not look whole.
            Some(Err(cut)) => match answered.late_trailers(&cut) {
                Some(trailers) => return drop(send.send_trailers(trailers)),
                None => return send.send_reset(Reason::INTERNAL_ERROR),
            },
            None => {
                let _ = send.send_data(Bytes::new(), true);
                return;
            }
        }
    }
}

/// Sends a piece of a body as the client takes it; none when it left, or took nothing in time.
async fn send_data(
    worker: &Worker,
    send: &mut SendStream<Bytes>,
    mut data: Bytes,
    is_last: bool,
    end: Option<Instant>,
) -> Option<()> {
    if data.is_empty() {
        return if is_last { send.send_data(data, true).ok() } else { Some(()) };
    }
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let mut room = send.capacity();
        if room == 0 {
            let until = Instant::now() + Duration::from_millis(worker.settings().unread_timeout_ms);
            let until = end.map_or(until, |end| end.min(until));
            let capacity = std::future::poll_fn(|cx| match send.poll_reset(cx) {
                Poll::Ready(_) => Poll::Ready(None),
                Poll::Pending => send.poll_capacity(cx),
            });
            room = timeout_at(until, capacity).await.ok()??.ok()?;
        }
        let piece = data.split_to(room.min(data.len()));
        send.send_data(piece, is_last && data.is_empty()).ok()?;
    }
    Some(())
}
