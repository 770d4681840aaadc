//! Sends a request of the slow path to a server, and returns the answer or a failure of a known kind.
//!
//! It decides nothing: what a failure means for the request, and for the version, is not its business.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Incoming};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Builder, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::settings::ProxySettings;
use super::upstream::Server;
use super::wire::HEAD_BYTES_MAX;

/// Bytes of an answer that an `h2c://` server may send before the client takes any. The connection lets in as many for each
/// request that the proxy takes at once, so that clients that read nothing leave the others' share untouched.
const STREAM_WINDOW_BYTES: u32 = 128 * 1024;
/// The largest window that HTTP/2 has (RFC 9113, 6.9.1).
const WINDOW_BYTES_MAX: usize = (1 << 31) - 1;

/// Why a request brought no answer.
pub enum SendFailure {
    /// No connection could be made, so that nothing was sent; the reason in words.
    Unreachable(String),
    /// The server ended the connection before its answer's end, or sent what is no answer; the reason in words.
    Broken(String),
}

/// The connections of a worker's slow path to its servers.
pub struct UpstreamSender<B> {
    http1: Client<HttpConnector, B>,
    http2: Client<HttpConnector, B>,
}

impl<B> UpstreamSender<B>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
{
    /// Returns a sender without connections.
    pub fn new(settings: &ProxySettings) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(settings.connect_timeout()));
        let idle = Duration::from_millis(settings.upstream_keep_alive_ms);
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(idle);
        let http1 = builder.build(connector.clone());
        let http2 = with_http2(&mut builder, settings).build(connector);
        Self { http1, http2 }
    }

    /// Sends a request, and returns the answer once its head is complete.
    pub async fn send(&self, server: &Server, request: Request<B>) -> Result<Response<Incoming>, SendFailure> {
        let client = if server.http2 { &self.http2 } else { &self.http1 };
        match client.request(request).await {
            Ok(answer) if head_bytes(answer.headers()) > HEAD_BYTES_MAX => {
                Err(SendFailure::Broken("its answer's head is larger than 32 KiB".into()))
            }
            Ok(answer) => Ok(answer),
            Err(error) if error.is_connect() => Err(SendFailure::Unreachable(root(&error))),
            Err(error) => Err(SendFailure::Broken(root(&error))),
        }
    }
}

/// Makes a builder one for `h2c://` servers, whose requests share a connection: none of them may hold up the others, and
/// a connection that fell silent ends.
fn with_http2<'b>(builder: &'b mut Builder, settings: &ProxySettings) -> &'b mut Builder {
    let connection_bytes = (STREAM_WINDOW_BYTES as usize).saturating_mul(settings.requests_max);
    let ping_ms = settings.upstream_ping_interval_ms;
    builder
        .http2_only(true)
        .timer(TokioTimer::new())
        .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(connection_bytes.clamp(65_535, WINDOW_BYTES_MAX) as u32)
        .http2_max_header_list_size(2 * HEAD_BYTES_MAX as u32)
        .http2_keep_alive_interval((ping_ms > 0).then(|| Duration::from_millis(ping_ms)))
        .http2_keep_alive_timeout(Duration::from_millis(settings.upstream_ping_timeout_ms))
        .http2_keep_alive_while_idle(true)
}

/// Returns the bytes that fields take in an HTTP/1.1 head.
fn head_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum()
}

fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
