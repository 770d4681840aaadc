//! Requests that a page in somebody's browser may have sent. Where no token says who asks, a page of any site could change
//! rollouts through the browser of an operator, or read from the API after its name's address was changed to this machine's.

use axum::extract::Request;
use http::header::{self, AsHeaderName};
use http::uri::Authority;
use http::{Method, StatusCode};

/// Types of bodies that a page may send to another site without asking it first.
const SIMPLE: [&str; 3] = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"];

/// Returns why a request without a token is refused; none when no page of another site can have sent it.
pub fn refusal(request: &Request) -> Option<(StatusCode, String)> {
    let text = |name: header::HeaderName| text(request, name);
    let authority = request.uri().authority().map(|authority| authority.as_str()).or_else(|| text(header::HOST));
    let Some(host) = authority.and_then(|authority| authority.parse::<Authority>().ok()) else {
        return Some((StatusCode::BAD_REQUEST, "the request names no host".into()));
    };
    if !is_own_name(host.host()) {
        let why = format!("host {:?} may be anybody's name, expected localhost or an address", host.host());
        return Some((StatusCode::FORBIDDEN, why));
    }
    let own = |origin: &str| origin.split_once("://").is_some_and(|(_, of)| of.eq_ignore_ascii_case(host.as_str()));
    if let Some(origin) = text(header::ORIGIN).filter(|origin| !own(origin)) {
        return Some((
            StatusCode::FORBIDDEN,
            format!("a page of {origin} sent the request, expected none of another site"),
        ));
    }
    let site = request.headers().get("sec-fetch-site").and_then(|value| value.to_str().ok());
    if matches!(site, Some("cross-site" | "same-site")) {
        return Some((StatusCode::FORBIDDEN, "a page of another site sent the request".into()));
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return None;
    }
    let kind = text(header::CONTENT_TYPE).unwrap_or_default();
    let media = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media.is_empty() || SIMPLE.contains(&media.as_str()) {
        let why = format!(
            "content type {kind:?}, expected one that says what the body is: application/json or application/yaml"
        );
        return Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
    }
    None
}

fn text(request: &Request, name: impl AsHeaderName) -> Option<&str> {
    request.headers().get(name).and_then(|value| value.to_str().ok())
}

/// Returns true for addresses, and for names that no stranger's name server answers for: without a dot, a name is known to this
/// machine or its own network only.
fn is_own_name(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    bare.parse::<std::net::IpAddr>().is_ok() || !name.contains('.') || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: &str, headers: &[(&str, &str)]) -> Option<u16> {
        let mut request = http::Request::builder().method(method).uri("/v1/rollouts");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        refusal(&request.body(axum::body::Body::empty()).unwrap()).map(|(status, _)| status.as_u16())
    }

    #[test]
    fn a_name_that_anybody_may_own_is_refused() {
        for host in
            ["127.0.0.1:8091", "localhost", "LocalHost:1", "[::1]:8091", "a.localhost", "10.0.0.7:80", "node-a:8091"]
        {
            assert_eq!(status("GET", &[("host", host)]), None, "{host}");
        }
        for host in ["evil.example", "evil.example:8091", "127.0.0.1.evil.example", "localhost.evil.example"] {
            assert_eq!(status("GET", &[("host", host)]), Some(403), "{host}");
        }
        assert_eq!(status("GET", &[]), Some(400));
    }

    #[test]
    fn a_page_of_another_site_gets_nothing() {
        let (host, json) = (("host", "127.0.0.1:8091"), ("content-type", "application/json"));
        for origin in ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1"] {
            for method in ["GET", "POST"] {
                assert_eq!(status(method, &[host, json, ("origin", origin)]), Some(403), "{method} {origin}");
            }
        }
        assert_eq!(status("POST", &[host, json, ("origin", "http://127.0.0.1:8091")]), None);
        for (site, expected) in
            [("cross-site", Some(403)), ("same-site", Some(403)), ("same-origin", None), ("none", None)]
        {
            assert_eq!(status("POST", &[host, json, ("sec-fetch-site", site)]), expected, "{site}");
        }
    }

    #[test]
    fn a_write_has_a_type_that_no_form_sends() {
        let host = ("host", "localhost:8091");
        for kind in [
            "text/plain",
            "Text/Plain; charset=utf-8",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "",
        ] {
            assert_eq!(status("POST", &[host, ("content-type", kind)]), Some(415), "{kind}");
        }
        assert_eq!(status("POST", &[host]), Some(415));
        for kind in ["application/json", "application/yaml", "application/x-ndjson", "application/grpc", "text/yaml"] {
            assert_eq!(status("POST", &[host, ("content-type", kind)]), None, "{kind}");
        }
    }
}
