//! Sends a request of the slow path to a server, and returns the answer or a failure of a known kind.
//!
//! It decides nothing: what a failure means for the request, and for the version, is not its business.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Response;
use hyper::body::{Body, Frame, SizeHint};

use crate::proxy::failure::SendFailure;
use crate::proxy::policy::FailureKind;
use crate::proxy::pool::{self, Hints};
use crate::proxy::upstream::Server;
use crate::proxy::worker::Worker;

use super::head::Head;
use super::http1;
use super::upload::{BodyError, Lent};

/// An answer's body, by whichever protocol it comes.
pub enum UpstreamBody {
    /// By HTTP/1.1.
    Http1(http1::Http1Body),
    /// By HTTP/2.
    Http2(pool::AnswerBody),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx),
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

/// Sends a request, whose target is a path and whose Host is the one that is meant, and returns the answer once its head is
/// complete. `is_repeat`: only a connection that served nothing before will do. `may_go` is asked once there is a connection.
pub async fn send(
    worker: &Rc<Worker>,
    server: &Arc<Server>,
    head: &Head,
    body: Lent,
    is_repeat: bool,
    hints: Option<&Hints>,
    may_go: impl Fn() -> bool,
) -> Result<Response<UpstreamBody>, SendFailure> {
    if !server.http2 {
        let sent = http1::send(worker, server, head, body, http1::SendTerms { is_repeat, hints }, may_go).await;
        return sent.map(|answer| answer.map(UpstreamBody::Http1));
    }
    let request = head.request(body, hints);
    let request = request.map_err(|error| SendFailure { kind: FailureKind::Client, why: error.to_string() })?;
    let sent = worker.http2.send(server, request, may_go).await;
    sent.map(|answer| answer.map(UpstreamBody::Http2)).map_err(|why| SendFailure::stream(&server.authority, &why))
}
