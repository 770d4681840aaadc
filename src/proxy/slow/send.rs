//! Sends a request of the slow path to a server, and returns the answer or a failure of a known kind.
//!
//! It decides nothing: what a failure means for the request, and for the version, is not its business.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::proxy::failure::{ConnectFailure, StreamFailure, WITHDRAWN};
use crate::proxy::policy::FailureKind;
use crate::proxy::pool::{AnswerBody, Http2Pool, PoolLimits, head_bytes};
use crate::proxy::request::HEAD_BYTES_MAX;
use crate::proxy::settings::ProxySettings;
use crate::proxy::upstream::Server;

use super::upload::BodyError;

/// Why a request brought no answer.
pub struct SendFailure {
    /// Kind of the failure, by which it is decided what follows.
    pub kind: FailureKind,
    /// Reason in words.
    pub why: String,
}

impl SendFailure {
    fn connect(server: &Server, failure: &ConnectFailure) -> Self {
        match failure.is_local() {
            true => Self { kind: FailureKind::Local, why: failure.to_string() },
            false => Self { kind: FailureKind::Unreachable, why: format!("{}: {failure}", server.authority) },
        }
    }

    fn stream(server: &Server, failure: &StreamFailure) -> Self {
        let kind = match failure {
            StreamFailure::Connect(failure) => return Self::connect(server, failure),
            StreamFailure::NotProcessed(_) => FailureKind::Unprocessed,
            StreamFailure::Stale(_) => FailureKind::Stale,
            StreamFailure::Broken(_) | StreamFailure::HeadTooLarge(_) => FailureKind::Broken,
            StreamFailure::Withdrawn => FailureKind::Withdrawn,
            StreamFailure::Body(_) => FailureKind::Client,
        };
        Self { kind, why: failure.to_string() }
    }
}

/// The connections of a worker's slow path to its servers.
pub struct UpstreamSender<B> {
    http1: Rc<KeptSenders<B>>,
    http2: Http2Pool,
    connect_timeout: Duration,
}

/// An answer's body, by whichever protocol it comes.
pub enum UpstreamBody {
    /// By HTTP/1.1.
    Http1(Incoming),
    /// By HTTP/2.
    Http2(AnswerBody),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}

/// Idle HTTP/1.1 connections, by the server's id.
struct KeptSenders<B> {
    all: RefCell<Vec<Vec<KeptSender<B>>>>,
    keep_alive: Duration,
    life: Duration,
}

/// An idle connection, until when it is kept, and when it is too old for another request.
struct KeptSender<B> {
    sender: http1::SendRequest<B>,
    until: Instant,
    life_ends: Instant,
}

impl<B> KeptSenders<B> {
    fn take(&self, server: usize) -> Option<(http1::SendRequest<B>, Instant)> {
        let mut all = self.all.borrow_mut();
        let (kept, now) = (all.get_mut(server)?, Instant::now());
        kept.retain(|kept| kept.until > now && !kept.sender.is_closed());
        kept.pop().map(|kept| (kept.sender, kept.life_ends))
    }

    fn keep(&self, server: usize, sender: http1::SendRequest<B>, life_ends: Instant) {
        let mut all = self.all.borrow_mut();
        if all.len() <= server {
            all.resize_with(server + 1, Vec::new);
        }
        let until = life_ends.min(Instant::now() + self.keep_alive);
        all[server].push(KeptSender { sender, until, life_ends });
    }
}

impl<B> UpstreamSender<B>
where
    B: Body<Data = Bytes, Error: Into<BodyError> + std::fmt::Display> + Send + Unpin + 'static,
{
    /// Returns a sender without connections.
    pub fn new(settings: &ProxySettings) -> Self {
        let keep_alive = Duration::from_millis(settings.upstream_keep_alive_ms);
        let life = Duration::from_millis(settings.upstream_life_ms);
        Self {
            http1: Rc::new(KeptSenders { all: RefCell::default(), keep_alive, life }),
            http2: Http2Pool::new(PoolLimits::of(settings)),
            connect_timeout: settings.connect_timeout(),
        }
    }

    /// Sends a request, whose target is a path and whose Host is the one that is meant, and returns the answer once its head is
    /// complete. `is_repeat`: only a connection that served nothing before will do. `may_go` is asked once there is a connection.
    pub async fn send(
        &self,
        server: &Arc<Server>,
        request: Request<B>,
        is_repeat: bool,
        may_go: impl Fn() -> bool,
    ) -> Result<Response<UpstreamBody>, SendFailure> {
        if server.http2 {
            let sent = self.http2.send(server, request, may_go).await;
            return sent.map(|answer| answer.map(UpstreamBody::Http2)).map_err(|why| SendFailure::stream(server, &why));
        }
        let answer = self.send_http1(server, request, is_repeat, may_go).await?;
        if head_bytes(answer.headers()) > HEAD_BYTES_MAX {
            let why = "its answer's head is larger than 32 KiB".to_string();
            return Err(SendFailure { kind: FailureKind::Broken, why });
        }
        Ok(answer.map(UpstreamBody::Http1))
    }

    async fn send_http1(
        &self,
        server: &Server,
        request: Request<B>,
        is_repeat: bool,
        may_go: impl Fn() -> bool,
    ) -> Result<Response<Incoming>, SendFailure> {
        let kept = if is_repeat { None } else { self.http1.take(server.id) };
        let is_kept = kept.is_some();
        let (mut sender, life_ends) = match kept {
            Some(kept) => kept,
            None => (self.connect(server).await?, Instant::now() + self.http1.life),
        };
        if !may_go() {
            self.http1.keep(server.id, sender, life_ends);
            return Err(SendFailure { kind: FailureKind::Withdrawn, why: WITHDRAWN.into() });
        }
        match sender.try_send_request(request).await {
            Ok(answer) => {
                let (kept, server) = (self.http1.clone(), server.id);
                tokio::task::spawn_local(async move {
                    // Once the answer was read, the connection takes another request.
                    if sender.ready().await.is_ok() {
                        kept.keep(server, sender, life_ends);
                    }
                });
                Ok(answer)
            }
            Err(error) => {
                let unsent = error.message().is_some();
                let error = error.into_error();
                let kind = match is_kept && !error.is_parse() && !error.is_user() {
                    true if unsent => FailureKind::Unprocessed,
                    true => FailureKind::Stale,
                    false => FailureKind::Broken,
                };
                Err(SendFailure { kind, why: root(&error) })
            }
        }
    }

    async fn connect(&self, server: &Server) -> Result<http1::SendRequest<B>, SendFailure> {
        let connected = server.connect(self.connect_timeout).await;
        let stream = connected.map_err(|failure| SendFailure::connect(server, &failure))?;
        let mut builder = http1::Builder::new();
        // What may come is a head of the largest size, and the beginning of its body.
        builder.max_buf_size(2 * HEAD_BYTES_MAX);
        let made = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) =
            made.map_err(|error| SendFailure { kind: FailureKind::Broken, why: root(&error) })?;
        tokio::task::spawn_local(connection);
        Ok(sender)
    }
}

fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
