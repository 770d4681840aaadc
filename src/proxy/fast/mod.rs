//! The fast path: HTTP/1.x to HTTP/1.1, bodies streaming both ways, in as few steps as can be.
//!
//! It waits without a lock, a timer of its own, or an allocation that lasts: buffers belong to the worker, deadlines are looked at
//! by the worker every few milliseconds. `exchange` is a request at one server; what a failure means, `policy` says.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::debug;

use crate::domain::side::Side;

use super::answer::{overloaded, problem};
use super::client::Client;
use super::deadline::Deadline;
use super::failure::ConnectFailure;
use super::policy::{self, FailureKind, NextTry, TriedRequest};
use super::stay::{CanaryStay, during, may_go};
use super::tunnel::{self, TunnelEnd};
use super::upstream::{Choice, InFlightGuard};
use super::worker::{Saying, Worker};

mod exchange;
mod request;

use exchange::{AfterAnswer, attempt};
pub use request::FastRequest;
use request::{FastFailure, count};

/// Carries a request to a server of the side that was chosen, and the answer back; returns true when the connection stays open.
pub async fn carry<S>(worker: &Rc<Worker>, watch: &Deadline, client: &mut Client<S>, mut request: FastRequest) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let limits = request.routed.limits;
    watch.set_end(limits.total_ms);
    let done = tried(worker, watch, client, &mut request).await;
    worker.give_back(std::mem::take(&mut request.out));
    let (failure, status) = match done {
        Ok((AfterAnswer::Stays, _)) => return true,
        Ok((AfterAnswer::Ends, _)) => return false,
        // The upgraded connection keeps its request's place at the server.
        Ok((AfterAnswer::Switched(upstream), _in_flight)) => {
            watch.set_end(None);
            watch.rest();
            let stay = CanaryStay::of(&request.routed);
            join(worker, client, upstream, stay.as_ref()).await;
            return false;
        }
        Err(failed) => failed,
    };
    let pool = request.routed.route.pool(request.routed.to.side);
    let why = failure.words(pool, limits.until_first_byte_ms());
    let close = request.close || !request.body.has_ended() || worker.ends_connections();
    let is_own = matches!(failure.kind(), FailureKind::Local | FailureKind::Full);
    let lines = if is_own { &[] } else { &*pool.mark };
    let how = Saying { lines, is_head: request.asked.is_head, close, protocol: request.protocol };
    let answer = if failure.kind() == FailureKind::Full { overloaded(&why) } else { problem(status, &why) };
    if let Some(entry) = request.access.take() {
        entry.answered_itself(&answer);
    }
    worker.say(&mut client.stream, &answer, how).await;
    if close && !client.ended {
        client.linger(worker, watch).await;
    }
    !close
}

/// Tries servers until one answers, or until nothing is left to try: then returns the failure and the status of its answer.
async fn tried<S>(
    worker: &Rc<Worker>,
    watch: &Deadline,
    client: &mut Client<S>,
    request: &mut FastRequest,
) -> Result<(AfterAnswer, InFlightGuard), (FastFailure, u16)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let route = request.routed.route.clone();
    let (mut servers, mut is_repeat) = (Vec::new(), false);
    loop {
        if !may_go(&worker.router, &route, request.routed.to) {
            if request.is_copy || !route.stable.is_plain() {
                return Err((FastFailure::Withdrawn, 503));
            }
            request.routed.to.side = Side::Stable;
            servers.clear();
        }
        let side = request.routed.to.side;
        let pool = route.pool(side);
        let chosen = match pool.choose(request.routed.began, &servers) {
            Choice::Full => pool.queue(|| worker.router.now(), &servers).await,
            chosen => chosen,
        };
        let in_flight = match chosen {
            Choice::Server(in_flight) => Some(in_flight),
            Choice::Full => None,
            Choice::NoneLeft => {
                let none = ConnectFailure::Unknown("no server is left to try".into());
                return Err((FastFailure::NoConnection(none), 502));
            }
        };
        if let (Some(entry), Some(in_flight)) = (&request.access, &in_flight) {
            entry.tried(&route.service, &pool.version, Some(in_flight.server.authority.as_str()));
        }
        let (failure, in_flight) = match in_flight {
            Some(in_flight) => match attempt(worker, watch, client, request, pool, &in_flight, is_repeat).await {
                Ok(after) => return Ok((after, in_flight)),
                Err(failure) => (failure, Some(in_flight)),
            },
            None => {
                worker.router.overflows(&route, "servers");
                (FastFailure::Full, None)
            }
        };
        let facts = TriedRequest {
            side,
            is_idempotent: request.is_idempotent,
            is_whole: request.whole,
            is_repeat,
            has_other: pool.has_choice() && servers.len() + 1 < pool.servers.len(),
            is_copy: request.is_copy,
        };
        let consequence = policy::after(failure.kind(), &facts);
        if let Some(in_flight) = in_flight.as_ref().filter(|_| consequence.blames_server) {
            in_flight.ended(true, worker.router.now());
        }
        if consequence.blames_version {
            count(worker, request, 502, true);
        }
        match consequence.next {
            NextTry::OtherServer => servers.extend(in_flight.map(|in_flight| in_flight.server.id)),
            NextTry::NewConnection => is_repeat = true,
            NextTry::Stable if route.stable.is_plain() => {
                request.routed.to.side = Side::Stable;
                servers.clear();
            }
            NextTry::Stable => return Err((failure, 502)),
            NextTry::Answer(status) => {
                let status = if let FastFailure::Client(bad) = &failure { bad.status } else { status };
                return Err((failure, status));
            }
        }
    }
}

/// Joins both sides of a connection that is HTTP no more.
async fn join<S>(worker: &Worker, client: &mut Client<S>, mut upstream: TcpStream, stay: Option<&CanaryStay>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ahead = std::mem::take(&mut client.ahead);
    let idle_ms = worker.settings().tunnel_idle_ms;
    let idle = (idle_ms > 0).then(|| Duration::from_millis(idle_ms));
    if upstream.write_all(&ahead).await.is_ok() {
        let end = during(worker, stay, pin!(tunnel::join(&mut client.stream, &mut upstream, idle))).await;
        let end = end.unwrap_or(TunnelEnd::Withdrawn);
        debug!(?end, "an upgraded connection ended");
    }
}
