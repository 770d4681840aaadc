//! Posting records to a data plane.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::Full;

use crate::config::router::Push;
use crate::domain::side::Side;
use crate::http_client::{HttpClient, HttpSettings};
use crate::ports::{Later, NotDone, Post, Posted};

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
        let mut request = Request::post(&self.url)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header("idempotency-key", &source)
            .header("x-aviary-source", &source)
            .header("x-canary", pinned);
        if let Some(key) = record.key.as_ref().and_then(|key| HeaderValue::from_bytes(key).ok()) {
            request = request.header("x-aviary-key", key);
        }
        if record.value.is_none() {
            request = request.header("x-aviary-tombstone", "true");
        }
        request.body(Full::from(Bytes::from(record.value.clone().unwrap_or_default())))
    }
}

impl Post for HttpPost {
    fn post<'a>(&'a self, record: &'a Posted, side: Side) -> Later<'a, Result<String, NotDone>> {
        Box::pin(async move {
            let again = |why: String| NotDone { why, refused: false };
            let request = self.request(record, side).map_err(|why| NotDone { why: why.to_string(), refused: true })?;
            let mut answer = self.client.open(request, self.timeout).await.map_err(|why| again(why.to_string()))?;
            // The head alone tells. The rest is read so that the connection is kept.
            let _ = tokio::time::timeout(self.timeout, answer.discard()).await;
            let status = answer.status;
            let who = answer.headers.get("x-served-by").and_then(|who| who.to_str().ok()).unwrap_or("unknown");
            let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
            match status {
                status if status.is_success() => Ok(who.into()),
                status if status.is_client_error() && !passing.contains(&status) => {
                    Err(NotDone { why: format!("{status} from {who}"), refused: true })
                }
                status => Err(again(format!("{status} from {who}"))),
            }
        })
    }
}
