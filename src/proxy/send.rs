//! Sends a request of the slow path to a server, and returns the answer or a failure of a known kind.
//!
//! It decides nothing: what a failure means for the request, and for the version, is not its business.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::failure::{StreamFailure, is_local};
use super::pool::{AnswerBody, Http2Pool, PoolLimits, head_bytes};
use super::settings::ProxySettings;
use super::upstream::Server;
use super::wire::HEAD_BYTES_MAX;

/// Why a request brought no answer.
pub enum SendFailure {
    /// This machine lacks what a connection needs, so that nothing was sent: no fault of the server's.
    Local(String),
    /// No connection could be made, so that nothing was sent; the reason in words.
    Unreachable(String),
    /// The server surely did not process the request (RFC 9113, 8.7): any method may be sent again.
    NotProcessed(String),
    /// A connection that had served before ended before anything of the answer came.
    Stale(String),
    /// The server ended the connection before its answer's end, or sent what is no answer; the reason in words.
    Broken(String),
}

/// The connections of a worker's slow path to its servers.
pub struct UpstreamSender<B> {
    http1: Client<HttpConnector, B>,
    http2: Http2Pool,
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
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
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

impl From<StreamFailure> for SendFailure {
    fn from(failure: StreamFailure) -> Self {
        let why = failure.to_string();
        match failure {
            StreamFailure::Connect(failure) if failure.is_local() => Self::Local(why),
            StreamFailure::Connect(_) => Self::Unreachable(why),
            StreamFailure::NotProcessed(_) => Self::NotProcessed(why),
            StreamFailure::Stale(_) => Self::Stale(why),
            StreamFailure::Broken(_) | StreamFailure::HeadTooLarge(_) | StreamFailure::Body(_) => Self::Broken(why),
        }
    }
}

impl<B> UpstreamSender<B>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync> + Send + Unpin + 'static,
{
    /// Returns a sender without connections.
    pub fn new(settings: &ProxySettings) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(settings.connect_timeout()));
        let idle = Duration::from_millis(settings.upstream_keep_alive_ms);
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(idle);
        let http1 = builder.build(connector);
        Self { http1, http2: Http2Pool::new(PoolLimits::of(settings)) }
    }

    /// Sends a request, and returns the answer once its head is complete.
    pub async fn send(&self, server: &Arc<Server>, request: Request<B>) -> Result<Response<UpstreamBody>, SendFailure> {
        if server.http2 {
            return Ok(self.http2.send(server, request).await?.map(UpstreamBody::Http2));
        }
        match self.http1.request(request).await {
            Ok(answer) if head_bytes(answer.headers()) > HEAD_BYTES_MAX => {
                Err(SendFailure::Broken("its answer's head is larger than 32 KiB".into()))
            }
            Ok(answer) => Ok(answer.map(UpstreamBody::Http1)),
            Err(error) if error.is_connect() && is_local_cause(&error) => Err(SendFailure::Local(root(&error))),
            Err(error) if error.is_connect() => Err(SendFailure::Unreachable(root(&error))),
            Err(error) => Err(SendFailure::Broken(root(&error))),
        }
    }
}

/// Returns true if an error of the system that says what this machine lacks is among the causes.
fn is_local_cause(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_local))
}

fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
