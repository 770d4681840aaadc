//! An HTTP/1.x client's connection: its requests one after another, each of them checked, decided and carried.
//!
//! A connection is one task. Every request of it becomes a canonical request, the first like the thousandth, and goes by the fast
//! path unless its server speaks HTTP/2.

use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::domain::side::Side;
use crate::listener::{HeldPlace, Tracked};

use super::access::{Access, SeenRequest};
use super::answer::{OwnAnswer, PageRequest, assignment, refusal};
use super::body::{BadMessage, Keep};
use super::client::{Client, poll_read};
use super::deadline::Deadline;
use super::dispose::{Disposition, Routed};
use super::fast::{self, FastRequest};
use super::request::{CanonicalRequest, Gateway, HEAD_BYTES_MAX, HEAD_TOO_LARGE, Protocol};
use super::slow::bridge::{self, Bridged, Terms};
use super::slow::{Head, SlowRequest};
use super::table::ClientAddress;
use super::wire::{self, Asked, Opening, Room};
use super::worker::{Saying, Worker};

/// What a client's next bytes are.
enum NextMessage {
    /// A request for the fast path.
    Fast(Box<FastRequest>),
    /// A request for the slow path: its server speaks HTTP/2.
    Slow(Box<Bridged>),
    /// A request that the node answers itself.
    Own(Box<OwnRequest>),
    /// The client speaks HTTP/2.
    Http2,
    /// No request: it is answered, and the connection ends.
    Refuse(BadMessage, Access),
    /// It ended, or waited too long.
    Close,
}

/// A request that the node answers itself.
struct OwnRequest {
    answer: OwnSource,
    is_head: bool,
    protocol: Protocol,
    /// Nothing more is taken from the client: it wants no further request, or its body has not arrived yet.
    close: bool,
    body_has_ended: bool,
    access: Access,
}

/// Where an answer of the node's own comes from.
enum OwnSource {
    Page(PageRequest),
    Ready(OwnAnswer),
    Assignment(Routed),
}

/// How long a client that connected, but asked for nothing yet, may take for its request once the proxy is stopping: it was
/// accepted, so that it won't go to another node by itself.
const FIRST_AT_STOP_MS: u64 = 500;

/// Serves a connection until it ends, or until it turns out to be HTTP/2: then returns what was read.
pub async fn serve<S>(worker: &Rc<Worker>, stream: &mut S, peer: SocketAddr, held: HeldPlace<'_>) -> Option<Vec<u8>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let watch = worker.watch().await;
    let HeldPlace { place, tracked } = held;
    std::future::poll_fn(|cx| Poll::Ready(tracked.wakes(cx.waker().clone()))).await;
    let mut client = Client::new(stream, peer);
    let mut first = true;
    loop {
        let idle = if first { worker.settings().header_timeout_ms } else { worker.settings().keep_alive_timeout_ms };
        let next = std::future::poll_fn(|cx| client.poll_next(worker, &watch, first, idle, cx, tracked));
        let next = match first {
            true => place.end.run_until_cancelled(next).await.unwrap_or(NextMessage::Close),
            false => next.await,
        };
        if !matches!(next, NextMessage::Close | NextMessage::Http2) && std::mem::take(&mut first) {
            place.asked();
        }
        if matches!(next, NextMessage::Http2) {
            return Some(client.ahead);
        }
        tracked.begins(worker.now_ms());
        let stays = match next {
            NextMessage::Fast(request) => {
                let Routed { route, to, began, .. } = &request.routed;
                if to.side == Side::Stable && worker.router.is_mirrored(route, *began) {
                    mirror(worker, &request, peer);
                }
                fast::carry(worker, &watch, &mut client, *request).await
            }
            NextMessage::Slow(bridged) => bridge::carry(worker, &watch, &mut client, *bridged).await,
            NextMessage::Own(own) => answer(worker, &watch, &mut client, *own).await,
            NextMessage::Refuse(refused, access) => {
                let how = Saying { lines: &[], is_head: false, close: true, protocol: Protocol::Http11 };
                let answer = refusal(refused);
                if let Some(entry) = access {
                    entry.answered_itself(&answer);
                }
                worker.say(&mut client.stream, &answer, how).await;
                client.linger(worker, &watch).await;
                false
            }
            NextMessage::Close | NextMessage::Http2 => false,
        };
        tracked.ends(worker.now_ms());
        // What was its time is not the next one's.
        watch.set_end(None);
        watch.rest();
        if !stays || worker.is_stopping() {
            let _ = client.stream.shutdown().await;
            return None;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Waits for a head, and takes no more than its message from what was read.
    fn poll_next(
        &mut self,
        worker: &Rc<Worker>,
        watch: &Deadline,
        is_first: bool,
        idle_ms: u64,
        cx: &mut Context<'_>,
        tracked: &Tracked,
    ) -> Poll<NextMessage> {
        let mut tried = 0;
        loop {
            if self.ahead.len() > tried {
                tried = self.ahead.len();
                if let Some((next, used)) = begin(self, worker, &self.ahead, is_first) {
                    self.ahead.drain(..used);
                    watch.rest();
                    return Poll::Ready(next);
                }
            }
            if watch.is_over() {
                let late = BadMessage { status: 408, why: "the request's head stopped coming" };
                let is_idle = self.ahead.is_empty();
                return Poll::Ready(if is_idle { NextMessage::Close } else { refuse(self, worker, late) });
            }
            let mut scratch = worker.scratch();
            match poll_read(&mut self.stream, cx, &mut scratch) {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(NextMessage::Close),
                Poll::Ready(Ok(length)) if self.ahead.is_empty() => {
                    if let Some((next, used)) = begin(self, worker, &scratch[..length], is_first) {
                        watch.rest();
                        self.ahead.extend_from_slice(&scratch[used..length]);
                        return Poll::Ready(next);
                    }
                    self.ahead.extend_from_slice(&scratch[..length]);
                    tried = length;
                    // From the first byte on, a head has its own time.
                    watch.set(worker.settings().header_timeout_ms);
                }
                Poll::Ready(Ok(length)) => self.ahead.extend_from_slice(&scratch[..length]),
                Poll::Pending => {
                    let begun = !self.ahead.is_empty();
                    watch.set_if_resting(if begun { worker.settings().header_timeout_ms } else { idle_ms });
                    if !begun && tracked.is_evicted() {
                        return Poll::Ready(NextMessage::Close);
                    }
                    if worker.is_stopping() && self.ahead.is_empty() {
                        if !is_first {
                            return Poll::Ready(NextMessage::Close);
                        }
                        watch.set(FIRST_AT_STOP_MS);
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Makes a message of what came, and says how many bytes of it that took; none when it is not all there.
fn begin<S>(client: &Client<S>, worker: &Rc<Worker>, bytes: &[u8], is_first: bool) -> Option<(NextMessage, usize)> {
    let mut room = Room::default();
    let (asked, length) = match wire::request(bytes, is_first, &mut room) {
        Ok(Opening::Request(asked, length)) => (asked, length),
        Ok(Opening::Partial) if bytes.len() > HEAD_BYTES_MAX => {
            return Some((refuse(client, worker, HEAD_TOO_LARGE), 0));
        }
        Ok(Opening::Partial) => return None,
        Ok(Opening::Http2) => return Some((NextMessage::Http2, 0)),
        Err(refused) => return Some((refuse(client, worker, refused), 0)),
    };
    let CanonicalRequest { protocol, method, fields, ref path_and_query, .. } = asked;
    let seen = SeenRequest { protocol, method, target: path_and_query, fields };
    let access = worker.router.begin_entry(client.address().ip, Some(seen));
    let rest = &bytes[length..];
    let made = match Disposition::of(worker, &asked, client.address()) {
        Disposition::Page(page) => own(&asked, rest, OwnSource::Page(page), &access),
        Disposition::Refuse(answer) => own(&asked, rest, OwnSource::Ready(*answer), &access),
        Disposition::Route(routed) => {
            let pool = routed.route.pool(routed.to.side);
            let is_fast = routed.route.plain || (asked.wants_websocket && pool.is_plain());
            match is_fast {
                _ if pool.servers.is_empty() => own(&asked, rest, OwnSource::Assignment(routed), &access),
                true => fast_request(client, worker, &asked, rest, routed, &access),
                false => slow_request(client, worker, &asked, routed, &access),
            }
        }
    };
    Some(match made {
        Ok((next, used)) => (next, length + used),
        Err(refused) => (NextMessage::Refuse(refused, access), 0),
    })
}

/// Refuses what is no request.
fn refuse<S>(client: &Client<S>, worker: &Worker, refused: BadMessage) -> NextMessage {
    NextMessage::Refuse(refused, worker.router.begin_entry(client.address().ip, None))
}

type BegunMessage = Result<(NextMessage, usize), BadMessage>;

fn fast_request<S>(
    client: &Client<S>,
    worker: &Worker,
    asked: &CanonicalRequest,
    rest: &[u8],
    routed: Routed,
    access: &Access,
) -> BegunMessage {
    let mut out = worker.buffer();
    let route = &routed.route;
    let ClientAddress { ip, text: peer } = client.address();
    let (service, configured) = (route.service.as_str(), &*route.reads);
    let gateway = Gateway { peer, service, configured, is_trusted: worker.settings().is_trusted(ip) };
    asked.write(&gateway, &mut out);
    let (mut body, head) = (asked.body, out.len());
    out.extend_from_slice(rest);
    let part = body.take(&mut out[head..], Keep::Framed)?;
    out.truncate(head + part.kept);
    let request = FastRequest {
        out,
        body,
        whole: body.has_ended(),
        asked: Asked { is_head: asked.method == "HEAD", wants_websocket: asked.wants_websocket },
        protocol: asked.protocol,
        is_idempotent: asked.is_idempotent(),
        awaits_continue: asked.awaits_continue,
        close: asked.close,
        routed,
        is_copy: false,
        access: access.clone(),
    };
    Ok((NextMessage::Fast(Box::new(request)), part.used))
}

fn slow_request<S>(
    client: &Client<S>,
    worker: &Worker,
    asked: &CanonicalRequest,
    routed: Routed,
    access: &Access,
) -> BegunMessage {
    let head = Head::of(asked, &routed.route, client.address(), worker.settings())?;
    let terms = Terms {
        protocol: asked.protocol,
        close: asked.close,
        awaits_continue: asked.awaits_continue,
        takes_trailers: asked.takes_trailers,
        asked: head.asked,
    };
    let request = SlowRequest { head, routed, is_copy: false, access: access.clone() };
    let bridged = Bridged { request, body: asked.body, length: asked.length(), terms };
    Ok((NextMessage::Slow(Box::new(bridged)), 0))
}

/// Returns a request that the node answers itself. Its body is of no use; it is taken if all of it is there.
fn own(asked: &CanonicalRequest, rest: &[u8], answer: OwnSource, access: &Access) -> BegunMessage {
    let mut body = asked.body;
    let part = body.take(&mut rest.to_vec(), Keep::Data)?;
    let body_has_ended = body.has_ended();
    let request = OwnRequest {
        answer,
        is_head: asked.method == "HEAD",
        protocol: asked.protocol,
        close: asked.close || !body_has_ended,
        body_has_ended,
        access: access.clone(),
    };
    Ok((NextMessage::Own(Box::new(request)), part.used))
}

/// Answers a request that no server gets; returns true when the connection stays open.
async fn answer<S>(worker: &Rc<Worker>, watch: &Deadline, client: &mut Client<S>, own: OwnRequest) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let OwnRequest { answer, is_head, protocol, close, body_has_ended, access } = own;
    let answer = match answer {
        OwnSource::Page(page) => page.answer(&worker.router).await,
        OwnSource::Ready(answer) => answer,
        OwnSource::Assignment(Routed { route, to, cookie, began, permit: _permit, .. }) => {
            worker.router.count(worker.shard, &route, to, 200, began, false);
            if let Some(entry) = &access {
                entry.tried(&route.service, &route.pool(to.side).version, None);
            }
            assignment(&worker.router, &route, to.side, cookie.as_deref())
        }
    };
    let close = close || worker.ends_connections();
    if let Some(entry) = access {
        entry.answered_itself(&answer);
    }
    worker.say(&mut client.stream, &answer, Saying { lines: &[], is_head, close, protocol }).await;
    if !body_has_ended {
        client.linger(worker, watch).await;
    }
    !close
}

/// Sends a copy of a request to the canary, beside it.
fn mirror(worker: &Rc<Worker>, request: &FastRequest, peer: SocketAddr) {
    let Some(copy) = request.copy(worker) else { return };
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        let watch = worker.watch().await;
        let mut nobody = Client::nobody(peer);
        fast::carry(&worker, &watch, &mut nobody, copy).await;
    });
}
