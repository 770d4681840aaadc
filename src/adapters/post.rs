//! Posting records to a data plane.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header};
use http_body_util::Full;

use crate::config::router::Push;
use crate::domain::side::Side;
use crate::http_client::{HttpClient, HttpSettings};
use crate::ports::{Later, NotDone, Post, PostAnswer, Posted};

/// Posts to the URL of a router's file.
pub struct HttpPost {
    url: String,
    topic: String,
    timeout: Duration,
    client: HttpClient,
}

impl HttpPost {
    /// Returns what posts records of `topic`.
    pub fn new(push: &Push, topic: &str) -> Self {
        let timeout = Duration::from_millis(push.timeout_ms);
        let client = HttpClient::new(HttpSettings::new(timeout));
        Self { url: push.url.clone(), topic: topic.into(), timeout, client }
    }

    fn request(&self, record: &Posted, side: Side) -> Result<Request<Full<Bytes>>, http::Error> {
        let source = format!("{}/{}/{}", self.topic, record.partition, record.offset);
        // A side that is asked for by name still gets only what the committed weight allows.
        let pinned = if side == Side::Canary { "always" } else { "never" };
        let mut request = Request::post(&self.url);
        if let Some(headers) = request.headers_mut() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            pass_on(record, headers);
        }
        let mut request =
            request.header("idempotency-key", &source).header("x-aviary-source", &source).header("x-canary", pinned);
        if let Some(key) = record.key.as_ref().and_then(|key| HeaderValue::from_bytes(key).ok()) {
            request = request.header("x-aviary-key", key);
        }
        if let Some(time_ms) = record.time_ms {
            request = request.header("x-aviary-time", time_ms);
        }
        if record.value.is_none() {
            request = request.header("x-aviary-tombstone", "true");
        }
        request.body(Full::from(Bytes::from(record.value.clone().unwrap_or_default())))
    }
}

/// Most bytes of a record's own headers that are passed on.
const PASSED_BYTES_MAX: usize = 16 << 10;

/// Headers that belong to the request itself; those of a connection, and this program's own, are not passed on either.
const OWN_HEADERS: [HeaderName; 8] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::EXPECT,
];

/// Gives a request the record's own headers, such as `traceparent`, as far as HTTP has words for them. A null header is an empty one.
fn pass_on(record: &Posted, headers: &mut HeaderMap) {
    let (mut left, mut passed) = (PASSED_BYTES_MAX, HeaderMap::new());
    for (name, value) in &record.headers {
        let value = value.as_deref().unwrap_or_default();
        let bytes = name.len() + value.len();
        let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) else { continue };
        let own = OWN_HEADERS.contains(&name)
            || ["x-aviary-", "x-canary", "proxy-", "keep-alive", "idempotency-key"]
                .iter()
                .any(|prefix| name.as_str().starts_with(prefix));
        if !own && bytes <= left {
            left -= bytes;
            passed.append(name, value);
        }
    }
    headers.extend(passed);
}

/// Returns how long an answer asks to wait: seconds, or a time, which counts from the answer's own.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok();
    let wanted = text(header::RETRY_AFTER)?.trim();
    if let Ok(seconds) = wanted.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let time = |text: &str| httpdate::parse_http_date(text).ok();
    time(wanted)?.duration_since(time(text(header::DATE)?)?).ok()
}

impl Post for HttpPost {
    fn post<'a>(&'a self, record: &'a Posted, side: Side) -> Later<'a, Result<String, NotDone>> {
        Box::pin(async move {
            let not_done = |why: String, answer| NotDone { why, answer };
            let request = self.request(record, side);
            let request = request.map_err(|why| not_done(why.to_string(), PostAnswer::Refused))?;
            let answer = self.client.open(request, self.timeout).await;
            let mut answer = answer.map_err(|why| not_done(why.to_string(), PostAnswer::Missing))?;
            // The head alone tells. The rest is read so that the connection is kept.
            let _ = tokio::time::timeout(self.timeout, answer.discard()).await;
            let status = answer.status;
            let who = answer.headers.get("x-served-by").and_then(|who| who.to_str().ok()).unwrap_or("unknown");
            let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
            match status {
                status if status.is_success() => Ok(who.into()),
                status if status.is_client_error() && !passing.contains(&status) => {
                    Err(not_done(format!("{status} from {who}"), PostAnswer::Refused))
                }
                status => {
                    let failed = PostAnswer::Failed { retry_after: retry_after(&answer.headers) };
                    Err(not_done(format!("{status} from {who}"), failed))
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_record_s_own_headers_are_passed_on_but_for_those_of_the_request() {
        let own =
            [("traceparent", Some("00-1-2-01")), ("content-type", Some("application/json")), ("host", Some("evil"))];
        let more = [("x-canary", Some("always")), ("nothing", None), ("x-aviary-source", Some("a/0/1"))];
        let header = |(name, value): &(&str, Option<&str>)| {
            (name.as_bytes().to_vec(), value.map(|value| value.as_bytes().to_vec()))
        };
        let mut of: Vec<_> = own.iter().chain(&more).map(header).collect();
        of.push((b"not utf-8 \xff".to_vec(), Some(b"x".to_vec())));
        of.push((b"large".to_vec(), Some(vec![b'x'; PASSED_BYTES_MAX])));
        let record = Posted { partition: 0, offset: 1, key: None, value: None, headers: of, time_ms: Some(7) };
        let mut found = headers(&[("content-type", "application/octet-stream")]);
        pass_on(&record, &mut found);
        let expected = [("content-type", "application/json"), ("traceparent", "00-1-2-01"), ("nothing", "")];
        assert_eq!(found, headers(&expected));
    }

    #[test]
    fn an_answer_s_wait_is_seconds_or_a_time() {
        let of = |lines: &[(&'static str, &'static str)]| retry_after(&headers(lines));
        assert_eq!(of(&[("retry-after", "30")]), Some(Duration::from_secs(30)));
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(of(&[date, ("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")]), Some(Duration::from_secs(30)));
        assert_eq!(of(&[date, ("retry-after", "soon")]), None);
        assert_eq!(of(&[]), None);
    }
}
