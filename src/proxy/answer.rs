//! Answers of this node's own, as the slow path gives them.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use serde_json::json;

/// A failure of a body that passes through.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// An answer's body: an upstream's, as it comes, or this node's own.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Returns a body of this node's own.
pub fn own(body: Full<Bytes>) -> Body {
    body.map_err(|never| match never {}).boxed_unsync()
}

/// Returns an error of this node's own; to a gRPC client as gRPC has it: status 14, unavailable, in a 200.
pub fn problem(status: StatusCode, why: &str, grpc: bool) -> Response<Body> {
    if grpc {
        let mut response = Response::new(own(Full::default()));
        let headers = response.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static("14"));
        if let Ok(why) = HeaderValue::from_str(why) {
            headers.insert("grpc-message", why);
        }
        return response;
    }
    let mut response = Response::new(own(Full::from(json!({"error": why}).to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
