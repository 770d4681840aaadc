//! HTTP/1.x clients of servers that speak HTTP/2: bodies are read and written here, the request goes the slow path.

use std::cell::Cell;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proxy::answer;
use crate::proxy::body::{BadMessage, BodyFraming, Keep, put_chunk};
use crate::proxy::client::{Client, poll_read};
use crate::proxy::deadline::Deadline;
use crate::proxy::hop::is_hop_by_hop;
use crate::proxy::pool::HINTS_MAX;
use crate::proxy::request::{Protocol, put_field};
use crate::proxy::stay::during;
use crate::proxy::wire::{Asked, Delivery, ResponseFields, ResponseHead, is_hint};
use crate::proxy::worker::Worker;

use super::upload::{BodySource, Upload};
use super::{Answered, SlowAnswer, SlowRequest, fields_of};

/// Bytes of further requests that are read while one is under way.
const AHEAD_BYTES_MAX: usize = 16 * 1024;
/// Bytes of an answer that are gathered before they are sent.
const GATHERED_BYTES_MAX: usize = 64 * 1024;

/// A request of an HTTP/1.x client.
pub struct Bridged {
    /// The request.
    pub request: SlowRequest,
    /// Its body, of which nothing was taken yet.
    pub body: BodyFraming,
    /// Content-Length, where the client sent one.
    pub length: Option<u64>,
    /// How the answer is sent.
    pub terms: Terms,
}

/// What a client's answer depends on.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Protocol of the client.
    pub protocol: Protocol,
    /// The client wants no further request on this connection.
    pub close: bool,
    /// The client waits for 100 (Continue).
    pub awaits_continue: bool,
    /// The client takes trailers.
    pub takes_trailers: bool,
    /// How the answer is read.
    pub asked: Asked,
}

/// What is known of a request's body while it is read.
#[derive(Default)]
struct BodyProgress {
    /// A client that has ended its side is gone.
    cancels: bool,
    is_whole: Cell<bool>,
    refused: Cell<Option<BadMessage>>,
}

/// Carries a request and its answer; returns true when the client's connection stays open.
pub async fn carry<S>(worker: &Rc<Worker>, watch: &Deadline, client: &mut Client<S>, bridged: Bridged) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Bridged { request, body, length, terms } = bridged;
    let cancels = request.routed.route.serving.spec.cancel_on_disconnect;
    let progress = BodyProgress { cancels, ..BodyProgress::default() };
    progress.is_whole.set(body.has_ended());
    let (pieces, source) = match body.has_ended() {
        true => (None, BodySource::Ended),
        false => {
            let (pieces, received) = mpsc::channel(1);
            (Some(pieces), BodySource::Channel(received))
        }
    };
    let upload = Upload::new(source, length);
    let stays = {
        let Client { stream, ahead, ended, .. } = client;
        let (mut reader, writer) = tokio::io::split(stream);
        let reading = read(worker, &mut reader, ahead, ended, body, pieces, &progress);
        let answering = respond(worker, writer, request, &upload, terms, &progress);
        tokio::select! {
            biased;
            stays = answering => stays,
            () = reading => return false,
        }
    };
    if !progress.is_whole.get() {
        client.linger(worker, watch).await;
        return false;
    }
    stays && (!client.ended || !client.ahead.is_empty())
}

/// Reads a request's body, and then what lies behind it; ends when the client is gone.
async fn read<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Rc<Worker>,
    reader: &mut ReadHalf<S>,
    ahead: &mut Vec<u8>,
    ended: &mut bool,
    mut body: BodyFraming,
    mut pieces: Option<mpsc::Sender<Result<Bytes, ()>>>,
    progress: &BodyProgress,
) {
    loop {
        if let Some(sender) = &pieces
            && !ahead.is_empty()
        {
            let piece = match body.take(ahead, Keep::Data) {
                Ok(part) => {
                    let piece = Bytes::copy_from_slice(&ahead[..part.kept]);
                    ahead.drain(..part.used);
                    Ok(piece)
                }
                Err(bad) => {
                    progress.refused.set(Some(bad));
                    Err(())
                }
            };
            let is_bad = piece.is_err();
            if piece.as_ref().is_ok_and(Bytes::is_empty) || sender.send(piece).await.is_ok() {
                if body.has_ended() {
                    progress.is_whole.set(true);
                    pieces = None;
                }
                if !is_bad {
                    continue;
                }
            }
            // Nobody takes more of it: what becomes of the client is up to its answer.
            return std::future::pending().await;
        }
        if *ended || ahead.len() >= AHEAD_BYTES_MAX {
            return std::future::pending().await;
        }
        let read = std::future::poll_fn(|cx| {
            let mut scratch = worker.scratch();
            poll_read(reader, cx, &mut scratch[..AHEAD_BYTES_MAX]).map_ok(|length| {
                ahead.extend_from_slice(&scratch[..length]);
                length
            })
        });
        match (read.await, &pieces) {
            (Ok(0) | Err(_), Some(sender)) => {
                *ended = true;
                let _ = sender.send(Err(())).await;
                return std::future::pending().await;
            }
            (Ok(0), None) if progress.cancels => return,
            (Ok(0), None) => *ended = true,
            (Err(_), None) => return,
            (Ok(_), _) => {}
        }
    }
}

/// Waits for the answer, and sends it; returns true when the connection may take another request.
async fn respond<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Rc<Worker>,
    mut writer: WriteHalf<S>,
    request: SlowRequest,
    upload: &Upload,
    terms: Terms,
    progress: &BodyProgress,
) -> bool {
    let access = request.access.clone();
    let (hints, mut told) = mpsc::channel(HINTS_MAX);
    let takes_hints = terms.protocol != Protocol::Http10;
    let mut carried = pin!(super::carry(worker, request, upload, takes_hints.then_some(&hints)));
    let (mut awaits_continue, mut out) = (terms.awaits_continue, Vec::new());
    let answer = loop {
        let answer = tokio::select! {
            biased;
            Some(hint) = told.recv() => {
                put_hint(&hint, &mut out);
                None
            }
            answer = carried.as_mut() => Some(answer),
            () = std::future::poll_fn(|cx| upload.poll_wanted(cx)), if awaits_continue => {
                awaits_continue = false;
                out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                None
            }
        };
        // What came together with the answer comes before it.
        while let Ok(hint) = told.try_recv() {
            put_hint(&hint, &mut out);
        }
        if send(worker, &mut writer, &mut out).await.is_err() {
            return false;
        }
        if let Some(answer) = answer {
            break answer;
        }
    };
    match answer {
        SlowAnswer::Upstream(mut answered) => {
            let stay = answered.stay.take();
            let passing = pass_on(worker, &mut writer, *answered, terms, progress);
            // An answer that was cut must not look whole, and what follows it would be taken for its rest.
            during(worker, stay.as_ref(), pin!(passing)).await.unwrap_or(false)
        }
        SlowAnswer::Own(own) => {
            let own = progress.refused.get().map_or(*own, answer::refusal);
            if let Some(entry) = access {
                entry.answered_itself(&own);
            }
            let close = terms.close || !progress.is_whole.get() || worker.ends_connections();
            let date = worker.date().to_string();
            let marks = ResponseFields { lines: &[], date: date.as_bytes(), close, protocol: terms.protocol };
            let mut out = worker.buffer();
            answer::write(&own, terms.asked.is_head, marks, &mut out);
            send(worker, &mut writer, &mut out).await.is_ok() && !close
        }
    }
}

/// Writes an interim answer, if it is one that clients get.
fn put_hint(hint: &http::Response<()>, out: &mut Vec<u8>) {
    let fields = fields_of(hint.headers());
    if is_hint(hint.status())
        && let Ok(head) = ResponseHead::of(hint.status().as_u16(), &fields, Asked::default())
    {
        let marks = ResponseFields { lines: &[], date: b"", close: false, protocol: Protocol::Http11 };
        head.with_reason(hint.status().canonical_reason().unwrap_or("")).write(marks, out);
    }
}

/// Passes a server's answer on; returns true when the connection may take another request.
async fn pass_on<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Rc<Worker>,
    writer: &mut WriteHalf<S>,
    mut answered: Answered,
    terms: Terms,
    progress: &BodyProgress,
) -> bool {
    let mut out = worker.buffer();
    let Some((delivery, close)) = begin(worker, &answered, terms, progress, &mut out) else { return false };
    let is_chunked = delivery == Delivery::Chunked;
    let mut trailers = None;
    loop {
        let frame = {
            let mut next = pin!(answered.next());
            match std::future::poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx))).await {
                Poll::Ready(frame) if out.len() < GATHERED_BYTES_MAX => frame,
                Poll::Ready(frame) => match send(worker, writer, &mut out).await {
                    Ok(()) => frame,
                    Err(_) => return false,
                },
                Poll::Pending => match send(worker, writer, &mut out).await {
                    Ok(()) => next.await,
                    Err(_) => return false,
                },
            }
        };
        match frame.map(|frame| frame.map(hyper::body::Frame::into_data)) {
            Some(Ok(Ok(data))) if is_chunked => put_chunk(&data, &mut out),
            Some(Ok(Ok(data))) => out.extend_from_slice(&data),
            Some(Ok(Err(frame))) => trailers = frame.into_trailers().ok(),
            // An answer that was cut must not look whole: its length, or its last chunk, is missing.
            Some(Err(_)) => {
                let _ = send(worker, writer, &mut out).await;
                return false;
            }
            None => break,
        }
    }
    if is_chunked {
        put_end(trailers.filter(|_| terms.takes_trailers), &mut out);
    }
    let is_sent = send(worker, writer, &mut out).await.is_ok();
    worker.give_back(out);
    is_sent && !close
}

/// Writes an answer's head, and returns how its body is sent, and whether the connection ends with it.
fn begin(
    worker: &Worker,
    answered: &Answered,
    terms: Terms,
    progress: &BodyProgress,
    out: &mut Vec<u8>,
) -> Option<(Delivery, bool)> {
    let fields = fields_of(&answered.head.headers);
    let head = ResponseHead::of(answered.head.status.as_u16(), &fields, terms.asked).ok()?;
    // What came in frames or chunks has no framing any more.
    let delivery = match Delivery::of(head.body, terms.protocol) {
        Delivery::AsItCame if matches!(head.body, BodyFraming::Chunked(_)) => Delivery::Chunked,
        other => other,
    };
    let is_early = !progress.is_whole.get();
    let close = terms.close || is_early || delivery == Delivery::UntilClose || worker.ends_connections();
    let date = worker.date();
    let marks = ResponseFields { lines: &answered.lines(), date: date.as_bytes(), close, protocol: terms.protocol };
    let reason = answered.head.status.canonical_reason().unwrap_or("");
    head.with_reason(reason).write(marks, out);
    Some((delivery, close))
}

/// Writes the last chunk, and the trailers.
fn put_end(trailers: Option<HeaderMap>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().flatten().filter(|(name, _)| !is_hop_by_hop(name.as_str())) {
        put_field(out, name.as_str(), &[value.as_bytes()]);
    }
    out.extend_from_slice(b"\r\n");
}

/// Sends what was gathered, to a client that takes it in time.
async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Worker,
    writer: &mut WriteHalf<S>,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    let limit = Duration::from_millis(worker.settings().unread_timeout_ms);
    let sent = timeout(limit, writer.write_all(out)).await;
    out.clear();
    sent.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
