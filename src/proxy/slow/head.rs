//! The head that servers get on the slow path, by either protocol.

use std::io::Write;

use http::header::{CONTENT_LENGTH, HOST, TE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use hyper::body::Body;

use crate::proxy::body::{BadMessage, refuse};
use crate::proxy::pool::Hints;
use crate::proxy::request::{CanonicalRequest, Gateway, put_field};
use crate::proxy::settings::ProxySettings;
use crate::proxy::table::{ClientAddress, Route};
use crate::proxy::timeouts::is_grpc;
use crate::proxy::wire::Asked;

use super::upload::Lent;

/// The head that servers get, made from a canonical request.
#[derive(Clone)]
pub struct Head {
    method: Method,
    path_and_query: PathAndQuery,
    /// Fields, without those that each protocol has in its own way.
    pub headers: HeaderMap,
    takes_trailers: bool,
    /// Doing it twice is doing it once.
    pub is_idempotent: bool,
    /// How the answer is read.
    pub asked: Asked,
    /// Calls of gRPC say in their trailers whether they failed.
    pub is_grpc: bool,
}

impl Head {
    /// Returns the head that a service's servers get on behalf of the client at `peer`.
    pub fn of(
        asked: &CanonicalRequest,
        route: &Route,
        peer: ClientAddress,
        settings: &ProxySettings,
    ) -> Result<Self, BadMessage> {
        const BAD: BadMessage = BadMessage { status: 400, why: "this is no HTTP request" };
        let (service, configured) = (route.service.as_str(), &*route.reads);
        let gateway = Gateway { peer: peer.text, service, configured, is_trusted: settings.is_trusted(peer.ip) };
        let mut headers = HeaderMap::with_capacity(asked.fields.len() + 8);
        headers.insert(HOST, HeaderValue::from_str(asked.host(&gateway)).map_err(|_| BAD)?);
        let mut is_sound = true;
        asked.fields_for(&gateway, |name, parts| {
            let value = match parts {
                [value] => HeaderValue::from_bytes(value),
                parts => HeaderValue::from_bytes(&parts.concat()),
            };
            match (HeaderName::from_bytes(name.as_bytes()), value) {
                (Ok(name), Ok(value)) => drop(headers.append(name, value)),
                _ => is_sound = false,
            }
        });
        if let Some(length) = asked.length() {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        if !is_sound {
            return refuse(BAD.status, BAD.why);
        }
        let kind = headers.get(http::header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        Ok(Self {
            method: Method::from_bytes(asked.method.as_bytes()).map_err(|_| BAD)?,
            path_and_query: PathAndQuery::try_from(&*asked.path_and_query).map_err(|_| BAD)?,
            takes_trailers: asked.takes_trailers,
            is_idempotent: asked.is_idempotent(),
            asked: Asked { is_head: asked.method == "HEAD", wants_websocket: asked.wants_websocket },
            is_grpc: kind.is_some_and(is_grpc),
            headers,
        })
    }

    /// Returns the request for a server of HTTP/2.
    pub fn request<B>(&self, body: B, hints: Option<&Hints>) -> Result<Request<B>, http::Error> {
        let mut request = Request::new(body);
        *request.uri_mut() = Uri::builder().path_and_query(self.path_and_query.clone()).build()?;
        *request.method_mut() = self.method.clone();
        *request.headers_mut() = self.headers.clone();
        if self.takes_trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        }
        if let Some(hints) = hints.cloned() {
            request.extensions_mut().insert(hints);
        }
        Ok(request)
    }

    /// Writes the head that an HTTP/1.1 server gets; returns true when the body follows in chunks.
    pub fn write(&self, out: &mut Vec<u8>, body: &Lent) -> bool {
        // A Vec takes whatever is written to it.
        let _ = write!(out, "{} {} HTTP/1.1\r\n", self.method, self.path_and_query);
        for (name, value) in &self.headers {
            put_field(out, name.as_str(), &[value.as_bytes()]);
        }
        let is_chunked = !self.headers.contains_key(http::header::CONTENT_LENGTH) && !body.is_end_stream();
        if is_chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
        is_chunked
    }
}
