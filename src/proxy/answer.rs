//! Answers of this node's own: problems, status pages, and what a version without servers would have served.

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, DATE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use serde_json::json;

use crate::domain::ids::VersionId;
use crate::domain::side::Side;
use crate::status::{self, Port};

use super::body::BadMessage;
use super::cookie::NewCookie;
use super::request::{self, CanonicalRequest, put_field, put_length};
use super::table::{Route, RoutingTable};
use super::upstream::Pool;
use super::wire::{ResponseFields, put_marks, put_status_line};

/// An answer whose body is complete.
pub type OwnAnswer = Response<Bytes>;

/// Returns an answer of one JSON object that says why.
pub fn problem(status: u16, why: &str) -> OwnAnswer {
    let mut response = Response::new(json!({"error": why}).to_string().into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if status == 405 {
        headers.insert(ALLOW, HeaderValue::from_static(request::ALLOW));
    }
    response
}

/// Returns the answer to a message that is no request.
pub fn refusal(refused: BadMessage) -> OwnAnswer {
    problem(refused.status, refused.why)
}

/// Returns the answer to a request for which there is no place.
pub fn overloaded(why: &str) -> OwnAnswer {
    let mut response = problem(503, why);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Returns what is said where a version's servers have as many requests as they may.
pub fn full(version: &VersionId) -> String {
    format!("too many requests at once at the servers of {version}")
}

/// Statuses of gRPC.
const UNAVAILABLE: &str = "14";
const DEADLINE_EXCEEDED: &str = "4";

/// Returns the trailers that end a gRPC answer which came too late.
pub fn late_trailers(why: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(DEADLINE_EXCEEDED));
    if let Ok(why) = HeaderValue::from_str(why) {
        trailers.insert("grpc-message", why);
    }
    trailers
}

/// Returns a problem as a gRPC client understands it, in a 200: status 4, deadline exceeded, for a time-out, else 14, unavailable.
pub fn for_grpc(problem: &OwnAnswer) -> OwnAnswer {
    let mut response = Response::new(Bytes::new());
    *response.headers_mut() = problem.headers().clone();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let is_late = problem.status() == StatusCode::GATEWAY_TIMEOUT;
    headers.insert("grpc-status", HeaderValue::from_static(if is_late { DEADLINE_EXCEEDED } else { UNAVAILABLE }));
    let told: serde_json::Value = serde_json::from_slice(problem.body()).unwrap_or_default();
    if let Some(why) = told["error"].as_str().and_then(|why| HeaderValue::from_str(why).ok()) {
        headers.insert("grpc-message", why);
    }
    response
}

/// Returns what the node answers for a version without servers: who would have served.
pub fn assignment(router: &RoutingTable, route: &Route, side: Side, cookie: Option<&NewCookie>) -> OwnAnswer {
    let pool = route.pool(side);
    let node = router.node.published.view().node.clone();
    let body = json!({
        "service": route.service, "served_by": pool.version, "routing_version": route.serving.routing_version, "node": node,
    });
    let mut response = Response::new(body.to_string().into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    mark(response.headers_mut(), route, pool);
    cookie.into_iter().for_each(|cookie| cookie.put(response.headers_mut()));
    response
}

/// Adds the headers that say which version served.
pub fn mark(headers: &mut HeaderMap, route: &Route, pool: &Pool) {
    if let Ok(version) = HeaderValue::from_str(pool.version.as_str()) {
        headers.insert("x-served-by", version);
    }
    headers.insert("x-routing-version", HeaderValue::from(route.serving.routing_version));
}

/// A request for a status page.
pub struct PageRequest {
    method: Method,
    uri: Uri,
}

impl PageRequest {
    /// Returns the request for a page, if its path is one.
    pub fn of(request: &CanonicalRequest) -> Option<Self> {
        if !status::is_here(request.path()) {
            return None;
        }
        let method = Method::from_bytes(request.method.as_bytes()).ok()?;
        Some(Self { method, uri: request.path_and_query.parse().ok()? })
    }

    /// Returns the page.
    pub async fn answer(&self, router: &RoutingTable) -> OwnAnswer {
        match status::answer(&router.node, Port::Data, &self.method, &self.uri).await {
            Some(page) => {
                let (head, body) = page.into_parts();
                let body = body.collect().await.map(|whole| whole.to_bytes()).unwrap_or_default();
                Response::from_parts(head, body)
            }
            None => problem(404, "there is no such page"),
        }
    }
}

/// Writes an answer for an HTTP/1.x client.
pub fn write(answer: &OwnAnswer, is_head: bool, mark: ResponseFields, out: &mut Vec<u8>) {
    let status = answer.status();
    put_status_line(status.as_u16(), status.canonical_reason().unwrap_or(""), mark.protocol, out);
    for (name, value) in answer.headers() {
        if name != CONNECTION && name != DATE {
            put_field(out, name.as_str(), &[value.as_bytes()]);
        }
    }
    put_length(out, answer.body().len() as u64);
    put_marks(&mark, false, out);
    out.extend_from_slice(b"\r\n");
    if !is_head {
        out.extend_from_slice(answer.body());
    }
}
