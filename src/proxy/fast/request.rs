//! A request on the fast path, and why it brought no answer.

use crate::proxy::access::Access;
use crate::proxy::answer::full;
use crate::proxy::body::{BadMessage, BodyFraming};
use crate::proxy::dispose::Routed;
use crate::proxy::failure::{ConnectFailure, WITHDRAWN};
use crate::proxy::policy::FailureKind;
use crate::proxy::request::Protocol;
use crate::proxy::table::SideChoice;
use crate::proxy::upstream::Pool;
use crate::proxy::wire::Asked;
use crate::proxy::worker::Worker;

/// A client's request, ready to be forwarded.
pub struct FastRequest {
    /// Head and first part of the body, for an upstream.
    pub out: Vec<u8>,
    /// Part of the body that has not arrived yet.
    pub body: BodyFraming,
    /// The whole of it is in `out`: it can be sent again.
    pub whole: bool,
    /// How its answer is read.
    pub asked: Asked,
    /// Protocol of the client.
    pub protocol: Protocol,
    /// Doing it twice is doing it once.
    pub is_idempotent: bool,
    /// The client waits for 100 (Continue) before it sends the body.
    pub awaits_continue: bool,
    /// The client wants no further request on this connection.
    pub close: bool,
    /// Where it goes.
    pub routed: Routed,
    /// Nobody waits for the answer.
    pub is_copy: bool,
    /// Its line in the access log.
    pub access: Access,
}

impl FastRequest {
    /// Returns a copy for the canary; none of a request that is not all there.
    pub fn copy(&self, worker: &Worker) -> Option<Self> {
        let is_copied = self.whole && !self.asked.wants_websocket;
        let permit = is_copied.then(|| worker.router.place(&self.routed.route).ok())??;
        let head = self.out.windows(4).position(|four| four == b"\r\n\r\n")? + 2;
        let mut out = worker.buffer();
        out.extend_from_slice(&self.out[..head]);
        out.extend_from_slice(b"x-aviary-mirrored: true\r\n");
        out.extend_from_slice(&self.out[head..]);
        let (route, to) = (self.routed.route.clone(), SideChoice::of_copy());
        let Routed { limits, began, .. } = self.routed;
        let routed = Routed { route, to, cookie: None, limits, began, permit };
        let Self { body, whole, asked, protocol, is_idempotent, awaits_continue, .. } = *self;
        Some(Self {
            out,
            body,
            whole,
            asked,
            protocol,
            is_idempotent,
            awaits_continue,
            close: true,
            routed,
            is_copy: true,
            access: None,
        })
    }
}

/// Why an attempt brought no answer.
pub enum FastFailure {
    /// No connection: nothing was sent.
    NoConnection(ConnectFailure),
    /// The canary lost its share before anything was sent.
    Withdrawn,
    /// The canary lost its share while its answer was waited for, longer than the grace.
    Overstayed,
    /// Every server has as many requests as it may.
    Full,
    /// A kept connection had ended before anything came back.
    Stale,
    /// No first byte in time.
    Late,
    /// The upstream broke off, or sent what is no answer.
    Broken(&'static str),
    /// The client broke off, stopped sending, or sent what is no body: nobody's error.
    Client(BadMessage),
}

impl FastFailure {
    /// Returns the failure's kind, by which it is decided what follows.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::NoConnection(failure) if failure.is_local() => FailureKind::Local,
            Self::NoConnection(_) => FailureKind::Unreachable,
            Self::Withdrawn => FailureKind::Withdrawn,
            Self::Overstayed => FailureKind::Overstayed,
            Self::Full => FailureKind::Full,
            Self::Stale => FailureKind::Stale,
            Self::Late => FailureKind::Late,
            Self::Broken(_) => FailureKind::Broken,
            Self::Client(_) => FailureKind::Client,
        }
    }

    /// Returns what the client is told.
    pub fn words(&self, pool: &Pool, limit_ms: u64) -> String {
        let version = &pool.version;
        match self {
            Self::NoConnection(failure) if failure.is_local() => {
                format!("this proxy can open no connection: {failure}")
            }
            Self::NoConnection(failure) => format!("no server of {version} can be reached: {failure}"),
            Self::Withdrawn | Self::Overstayed => WITHDRAWN.into(),
            Self::Full => full(version),
            Self::Stale => format!("{version} broke off: it closed a connection that was to be used again"),
            Self::Late => format!("{version} sent no answer within {limit_ms} ms"),
            Self::Broken(why) => format!("{version} broke off: {why}"),
            Self::Client(bad) => bad.why.into(),
        }
    }
}

/// Counts the answer to a request.
pub fn count(worker: &Worker, request: &FastRequest, status: u16, error: bool) {
    let Routed { route, to, began, .. } = &request.routed;
    match request.is_copy {
        true => worker.router.count_copy(worker.shard, route, status, *began, error),
        false => worker.router.count(worker.shard, route, *to, status, *began, error),
    }
}
