//! A worker's connections to `h2c://` servers: which of them a request takes, and how its stream ends.
//!
//! [`connections`] has the places, [`connection`] drives one connection, [`upload`] and [`answer`] carry the bodies. The `h2`
//! crate is used as it is, because hyper's client takes a stream that its server cancelled for one that ended well, and hides
//! when a connection last received something.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Request, Response, Uri, Version, request};
use hyper::body::Body;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::failure::StreamFailure;
use super::request::HEAD_BYTES_MAX;
use super::upstream::Server;

mod answer;
mod connection;
mod connections;
mod limits;
mod upload;

pub use answer::AnswerBody;
use answer::failure_of;
use connections::{Connections, StreamPlace};
pub use limits::PoolLimits;
use upload::{BodyUpload, UploadFailure};

/// What tells a client what comes before its answer. Of more than it takes, the rest is left out.
pub type Hints = mpsc::Sender<Response<()>>;

/// Hints that may wait for a client.
pub const HINTS_MAX: usize = 16;

/// A worker's connections to all its `h2c://` servers.
pub struct Http2Pool {
    limits: PoolLimits,
    servers: Mutex<BTreeMap<usize, Arc<Connections>>>,
}

impl Http2Pool {
    /// Returns a pool without connections.
    pub fn new(limits: PoolLimits) -> Self {
        Self { limits, servers: Mutex::default() }
    }

    /// Sends a request to a server, and returns the answer once its head is complete.
    ///
    /// What comes before it goes to the [`Hints`] among the request's extensions.
    ///
    /// The server gets the request's Host as `:authority`, and no `host` beside it. A body of which nothing was read is
    /// dropped before this returns an error, so that its owner may send it again. `may_go` is asked once there is a connection:
    /// when it says no, nothing is sent.
    pub async fn send<B>(
        &self,
        server: &Arc<Server>,
        request: Request<B>,
        may_go: impl Fn() -> bool,
    ) -> Result<Response<AnswerBody>, StreamFailure>
    where
        B: Body<Data = Bytes, Error: std::fmt::Display> + Send + Unpin + 'static,
    {
        let place = self.connections(server).place().await?;
        if !may_go() {
            return Err(StreamFailure::Withdrawn);
        }
        exchange(place, &server.authority, request).await
    }

    fn connections(&self, server: &Arc<Server>) -> Arc<Connections> {
        let mut servers = self.servers.lock().expect("nothing panics while it holds the servers");
        let made = || Arc::new(Connections::new(server.clone(), self.limits.clone()));
        servers.entry(server.id).or_insert_with(made).clone()
    }
}

async fn exchange<B>(
    mut place: StreamPlace,
    server: &Authority,
    request: Request<B>,
) -> Result<Response<AnswerBody>, StreamFailure>
where
    B: Body<Data = Bytes, Error: std::fmt::Display> + Send + Unpin + 'static,
{
    let (mut head, body) = request.into_parts();
    let hints: Option<Hints> = head.extensions.remove();
    let complete = body.is_end_stream();
    let (mut answer, stream) = place.open(head_of(head, server), complete)?;
    let mut upload = (!complete).then(|| BodyUpload::new(body, stream));
    let mut wait = place.wait();
    let answered = poll_fn(|cx| {
        match upload.as_mut().map(|upload| upload.poll(cx)) {
            Some(Poll::Ready(Err(UploadFailure::Body(why)))) => return Poll::Ready(Err(StreamFailure::Body(why))),
            // Why a stream ended, the answer says.
            Some(Poll::Ready(Ok(()) | Err(UploadFailure::Stream))) => upload = None,
            Some(Poll::Pending) | None => {}
        }
        if let Some(hints) = &hints {
            while let Poll::Ready(Some(Ok(hint))) = answer.poll_informational(cx) {
                // A client that has left, or reads none, needs no more of them.
                let _ = hints.try_send(hint);
            }
        }
        Pin::new(&mut answer).poll(cx).map_err(|error| failure_of(&error, wait.place()))
    });
    let answered = answered.await;
    wait.ended();
    drop(wait);
    let (head, body) = answered?.into_parts();
    place.served();
    if head_bytes(&head.headers) > HEAD_BYTES_MAX {
        return Err(StreamFailure::HeadTooLarge(HEAD_BYTES_MAX >> 10));
    }
    let upload = upload.map(|mut upload| {
        let rest = async move { drop(poll_fn(|cx| upload.poll(cx)).await) };
        AbortOnDropHandle::new(tokio::spawn(rest))
    });
    let body = AnswerBody::new(&head.headers, body, place, upload);
    Ok(Response::from_parts(head, body))
}

/// Returns a request's head as HTTP/2 has it: the host is `:authority` (RFC 9113, 8.3.1), and no field concerns a connection.
fn head_of(mut head: request::Parts, server: &Authority) -> Request<()> {
    let host = head.headers.remove(HOST);
    let host = host.and_then(|host| Authority::try_from(host.as_bytes()).ok());
    for name in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
        head.headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "http2-settings"] {
        head.headers.remove(name);
    }
    if head.headers.get(TE).is_some_and(|te| te != "trailers") {
        head.headers.remove(TE);
    }
    let mut uri = head.uri.into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(host.unwrap_or_else(|| server.clone()));
    uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    let mut request = Request::new(());
    *request.method_mut() = head.method;
    *request.uri_mut() = Uri::from_parts(uri).expect("a scheme, an authority and a path make a URI");
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = head.headers;
    request
}

/// Returns the bytes that fields take in an HTTP/1.1 head.
pub fn head_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum()
}

#[cfg(test)]
mod tests;
