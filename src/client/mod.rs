//! A client of the nodes' API: goes on to the next node when one can't be reached, and repeats a write only under the key it
//! was first sent with. The command line and the record router use it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::domain::text::visible;
use crate::http_client::{HttpClient, HttpError, HttpSettings, OpenAnswer};
use crate::model::Problem;

mod download;
mod failure;
mod sse;

pub use download::{Download, DownloadBody};
pub use failure::{AddressError, NodeError, NodeFailure, NodeRefusal, Unreachable};
pub use sse::SseEvent;
use sse::SseParser;

/// Where a node's API listens: `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

impl FromStr for Address {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim().trim_end_matches('/');
        let host = match text.split_once("://") {
            None => text,
            Some(("http", host)) => host,
            Some((scheme, _)) => return Err(AddressError::Scheme { found: scheme.into() }),
        };
        let authority: http::uri::Authority =
            host.parse().map_err(|_| AddressError::Malformed { found: host.into() })?;
        match authority.port_u16() {
            Some(_) => Ok(Self(format!("http://{authority}"))),
            None => Err(AddressError::NoPort { found: host.into() }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Answer of a node, whatever its status.
#[derive(Debug, Clone)]
pub struct ApiResponse {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// Body of the answer, as text.
    pub body: String,
}

/// Why an answer doesn't say what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The node gives a reason for not doing it.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// The answer is a success, and has another shape than this build knows.
    #[error("the answer has another shape than expected: {0}")]
    Shape(#[from] serde_json::Error),
}

impl ApiResponse {
    /// Returns what the answer says, for people, or the problem that it is: no text of it has hidden characters.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, AnswerError> {
        match self.problem() {
            Some(problem) => Err(AnswerError::Problem(problem)),
            None => Ok(T::deserialize(visible_json(serde_json::from_str(&self.body)?))?),
        }
    }

    /// Returns the problem that the answer is; none for a success. No text of it has hidden characters.
    pub fn problem(&self) -> Option<Problem> {
        if self.status.is_success() {
            return None;
        }
        let shown = match serde_json::from_str(&self.body) {
            Ok(json) => visible_json(json).to_string(),
            Err(_) => visible(self.body.clone()),
        };
        Some(Problem::read(self.status, shown.as_bytes()))
    }

    /// Returns why the node didn't do it, in words; those of the status where there is no problem.
    pub fn error(&self) -> String {
        self.problem().map_or_else(|| self.status.to_string(), |problem| problem.detail)
    }

    /// Returns true when the same write should be sent again under the same key.
    fn is_open(&self) -> bool {
        self.problem().is_some_and(|problem| problem.code.may_be_repeated())
    }
}

/// Returns the value with the hidden characters of all its texts and names escaped.
pub fn visible_json(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(visible(text)),
        Value::Array(items) => items.into_iter().map(visible_json).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (visible(name), visible_json(value))).collect::<Map<_, _>>().into()
        }
        other => other,
    }
}

/// A write: what is asked, and the key that makes asking twice the same as asking once.
#[derive(Debug, Clone)]
pub struct Write {
    /// Path of the endpoint, with its query.
    pub path: String,
    /// Its `Idempotency-Key`, which becomes the transaction's id.
    pub key: String,
    /// Media type of the body.
    pub content_type: &'static str,
    /// Body of the request; empty for none.
    pub body: String,
    /// How long it may be repeated while its outcome is open.
    pub patience: Duration,
}

/// Item of an event stream.
#[derive(Debug)]
pub enum StreamEvent {
    /// The stream is open; what is read from the API after this misses nothing.
    Connected,
    /// An event of the stream arrived.
    Event(SseEvent),
    /// The stream broke and is tried again, on the next node; with why.
    Lost(NodeFailure),
    /// A node refused it; nothing follows.
    Refused(NodeRefusal),
}

const CONNECT_MAX: Duration = Duration::from_secs(2);
const READ_MAX: Duration = Duration::from_secs(5);
/// Nodes answer a write within 10 s, if only by saying that its outcome is open.
const WRITE_MAX: Duration = Duration::from_secs(12);
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// A stream that is silent for longer, without even a comment, is opened anew elsewhere.
const SILENCE_MAX: Duration = Duration::from_secs(45);
const BODY_BYTES_MAX: usize = 64 << 20;

/// The API of a cluster: its nodes' addresses, tried one after the other.
#[derive(Clone)]
pub struct Api {
    addresses: Vec<Address>,
    /// Which address answered last: the first one to be asked.
    last: Arc<AtomicUsize>,
    token: Option<HeaderValue>,
    http: HttpClient,
}

/// How an event stream ended.
enum StreamEnd {
    /// Another node may have one.
    Lost(NodeFailure),
    /// No node will give one.
    Refused(NodeRefusal),
    /// The receiver was dropped: nobody reads the events any more.
    Unheard,
}

impl Api {
    /// Returns the API at these addresses; the token comes from the file, or from AVIARY_TOKEN.
    pub fn new(addresses: Vec<Address>, token_file: Option<&Path>) -> anyhow::Result<Self> {
        let token = match token_file {
            Some(path) => {
                crate::adapters::tls::check_private(path)?;
                Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
            }
            None => std::env::var("AVIARY_TOKEN").ok(),
        };
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let token = match token {
            None => None,
            Some(token) => {
                let mut value = HeaderValue::try_from(format!("Bearer {token}")).context(
                    "the token contains a character that is not allowed in a header, expected printable ASCII",
                )?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let http = HttpClient::new(HttpSettings::new(CONNECT_MAX));
        Ok(Self { addresses, last: Arc::default(), token, http })
    }

    /// Returns the addresses, in the order they were given.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Reads from the first node that answers.
    pub async fn get(&self, path: &str) -> Result<ApiResponse, Unreachable> {
        let mut failed = Vec::new();
        for index in self.order() {
            match self.get_from(&self.addresses[index], path).await {
                Ok(answer) => {
                    self.last.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => failed.push(NodeFailure::new(&self.addresses[index], error)),
            }
        }
        Err(Unreachable { failed })
    }

    /// Reads a path from one node, without trying another.
    pub async fn get_from(&self, address: &Address, path: &str) -> Result<ApiResponse, HttpError> {
        let request = self.request(Method::GET, address, path).body(Full::default())?;
        self.send(request, READ_MAX).await
    }

    /// Reports a batch of events, as lines of JSON, to one node.
    pub async fn report(&self, address: &Address, lines: String) -> Result<ApiResponse, HttpError> {
        let request = self.request(Method::POST, address, "/v1/telemetry");
        let request = request.header(header::CONTENT_TYPE, "application/x-ndjson").body(Full::from(lines));
        self.send(request?, READ_MAX).await
    }

    /// Writes, and repeats it under the same key while its outcome is open and there is time.
    pub async fn write(&self, write: &Write) -> Result<ApiResponse, Unreachable> {
        let end = Instant::now() + write.patience;
        let mut told = String::new();
        loop {
            let open = self.write_once(write).await;
            let settled = matches!(&open, Ok(answer) if !answer.is_open());
            if settled || Instant::now() + RETRY_PAUSE >= end {
                return open;
            }
            let why = match &open {
                Ok(answer) => answer.error(),
                Err(error) => error.to_string(),
            };
            if why != told {
                eprintln!("outcome unknown, retrying with the same key: {why}");
                told = why;
            }
            self.last.fetch_add(1, Ordering::Relaxed);
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn write_once(&self, write: &Write) -> Result<ApiResponse, Unreachable> {
        let mut failed = Vec::new();
        for index in self.order() {
            let address = &self.addresses[index];
            let request = self
                .request(Method::POST, address, &write.path)
                .header("idempotency-key", &write.key)
                .header(header::CONTENT_TYPE, write.content_type)
                .body(Full::from(write.body.clone()));
            let answer = match request {
                Ok(request) => self.send(request, WRITE_MAX).await,
                Err(error) => Err(error.into()),
            };
            match answer {
                Ok(answer) => {
                    self.last.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) if error.is_unsent() => failed.push(NodeFailure::new(address, error)),
                Err(error) => return Err(Unreachable { failed: vec![NodeFailure::new(address, error)] }),
            }
        }
        Err(Unreachable { failed })
    }

    /// Follows events in the background, from after the event with the id `after` or from here on, until the receiver is dropped.
    pub fn follow(&self, after: Option<u64>) -> mpsc::Receiver<StreamEvent> {
        let (sender, receiver) = mpsc::channel(256);
        let api = self.clone();
        tokio::spawn(async move {
            let mut last_id = after.map(|id| id.to_string());
            loop {
                let failure = match api.follow_once(&mut last_id, &sender).await {
                    StreamEnd::Lost(failure) => failure,
                    StreamEnd::Refused(refusal) => return drop(sender.send(StreamEvent::Refused(refusal)).await),
                    StreamEnd::Unheard => return,
                };
                if sender.send(StreamEvent::Lost(failure)).await.is_err() {
                    return;
                }
                api.last.fetch_add(1, Ordering::Relaxed);
                sleep(RETRY_PAUSE).await;
            }
        });
        receiver
    }

    /// Follows one node's stream to its end, which it returns.
    async fn follow_once(&self, last_id: &mut Option<String>, to: &mpsc::Sender<StreamEvent>) -> StreamEnd {
        let address = &self.addresses[self.last.load(Ordering::Relaxed) % self.addresses.len()];
        let lost = |error: NodeError| StreamEnd::Lost(NodeFailure { address: address.clone(), error });
        let answer = match self.open_stream(address, last_id.as_deref()).await {
            Ok(answer) => answer,
            Err(error) => return lost(error.into()),
        };
        if answer.status.is_client_error() {
            return StreamEnd::Refused(refusal(address, answer).await);
        }
        let mut answer = match answer.expect_success() {
            Ok(answer) => answer,
            Err(error) => return lost(error.into()),
        };
        let _ = to.send(StreamEvent::Connected).await;
        let mut parser = SseParser::default();
        loop {
            let bytes = match timeout(SILENCE_MAX, answer.next()).await {
                Ok(Ok(Some(bytes))) => bytes,
                Ok(Ok(None)) => return lost(NodeError::Ended),
                Ok(Err(error)) => return lost(error.into()),
                Err(_) => return lost(NodeError::Silent { within: SILENCE_MAX }),
            };
            for event in parser.feed(&bytes) {
                if to.send(StreamEvent::Event(event)).await.is_err() {
                    return StreamEnd::Unheard;
                }
            }
            // What came without an id, such as a heartbeat or a vote, says nothing about the place in the log.
            if let Some(id) = parser.last_id() {
                *last_id = Some(id.into());
            }
        }
    }

    async fn open_stream(&self, address: &Address, last_id: Option<&str>) -> Result<OpenAnswer, HttpError> {
        let mut request = self.request(Method::GET, address, "/v1/events").header(header::ACCEPT, "text/event-stream");
        if let Some(id) = last_id {
            request = request.header("last-event-id", id);
        }
        self.http.open(request.body(Full::default())?, READ_MAX).await
    }

    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, count) = (self.last.load(Ordering::Relaxed), self.addresses.len());
        (0..count).map(move |i| (first + i) % count)
    }

    fn request(&self, method: Method, address: &Address, path: &str) -> http::request::Builder {
        let request = Request::builder().method(method).uri(format!("{address}{path}"));
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, token),
            None => request,
        }
    }

    async fn send(&self, request: Request<Full<Bytes>>, within: Duration) -> Result<ApiResponse, HttpError> {
        let answer = self.http.send(request, within, BODY_BYTES_MAX).await?;
        Ok(ApiResponse { status: answer.status, body: String::from_utf8_lossy(&answer.body).into_owned() })
    }
}

/// Returns a node's refusal with the reason in its body; with the status alone where the body doesn't arrive.
async fn refusal(address: &Address, mut answer: OpenAnswer) -> NodeRefusal {
    let body = match timeout(READ_MAX, answer.whole(BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => String::from_utf8_lossy(&body).into_owned(),
        Ok(Err(_)) | Err(_) => String::new(),
    };
    NodeRefusal { address: address.clone(), answer: ApiResponse { status: answer.status, body } }
}

/// What a segment of a path holds as it is.
const PLAIN: AsciiSet = NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-').remove(b'~');

/// Returns `text` as one segment of a path.
pub fn segment(text: &str) -> String {
    utf8_percent_encode(text, &PLAIN).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::Code;
    use axum::Router;
    use axum::body::Body;
    use axum::http::HeaderMap;
    use axum::response::{IntoResponse, Response};
    use axum::routing::{get, post};
    use std::sync::Mutex;

    async fn serve(router: Router) -> Address {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        address.parse().unwrap()
    }

    async fn closed_port() -> Address {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
    }

    fn write_to(path: &str, patience_ms: u64) -> Write {
        let patience = Duration::from_millis(patience_ms);
        Write { path: path.into(), key: "k1".into(), content_type: "text/plain", body: "x".into(), patience }
    }

    #[test]
    fn an_address_says_what_it_lacks() {
        let parse = |text: &str| text.parse::<Address>().map(|a| a.to_string()).map_err(|why| why.to_string());
        assert_eq!(parse("127.0.0.1:50051/"), Ok("http://127.0.0.1:50051".into()));
        assert_eq!(parse("http://a"), Err("\"a\" has no port, expected http://host:port".into()));
        assert_eq!(parse("https://a:1"), Err("scheme is https, expected http".into()));
    }

    #[test]
    fn a_segment_cannot_leave_its_place() {
        assert_eq!(segment("fraud-model"), "fraud-model");
        assert_eq!(segment("../a b"), "..%2Fa%20b");
    }

    #[test]
    fn no_text_of_an_answer_has_hidden_characters() {
        let answer = |status, body: &str| ApiResponse { status, body: body.into() };
        let body = r#"{"a\u001b": ["\u202e", {"b": "x\u009by", "n": 1}]}"#;
        let read: Value = answer(StatusCode::OK, body).read().unwrap();
        assert_eq!(read, serde_json::json!({"a\\u{1b}": ["\\u{202e}", {"b": "x\\u{9b}y", "n": 1}]}));
        for body in [r#"{"code": "REFUSED", "detail": "\u001b[2J"}"#, "\u{1b}[2J"] {
            let told = answer(StatusCode::CONFLICT, body).error();
            assert!(told.contains("\\u{1b}[2J") && !told.contains('\u{1b}'), "{told:?}");
        }
    }

    #[tokio::test]
    async fn the_next_node_is_asked_when_one_cannot_be_reached() {
        let live = serve(Router::new().route("/x", get(async || "yes"))).await;
        let api = Api::new(vec![closed_port().await, live], None).unwrap();
        assert_eq!(api.get("/x").await.unwrap().body, "yes");
        assert_eq!(api.order().next(), Some(1), "the node that answered is asked first");
        let nobody = Api::new(vec![closed_port().await], None).unwrap();
        assert!(nobody.get("/x").await.unwrap_err().to_string().contains("refused"));
    }

    #[tokio::test]
    async fn an_open_outcome_is_asked_again_with_the_same_key() {
        let keys = Arc::new(Mutex::new(Vec::new()));
        let seen = keys.clone();
        let answer = async move |headers: HeaderMap| -> Response {
            let mut seen = seen.lock().unwrap();
            seen.push(headers["idempotency-key"].to_str().unwrap().to_owned());
            match seen.len() {
                1 => (StatusCode::SERVICE_UNAVAILABLE, "upstream connect error").into_response(),
                2 => Problem::new(Code::OutcomeUnknown, "in doubt").response().map(Body::new),
                _ => r#"{"status":"COMMITTED"}"#.into_response(),
            }
        };
        let api = Api::new(vec![serve(Router::new().route("/w", post(answer))).await], None).unwrap();
        let found = api.write(&write_to("/w", 5_000)).await.unwrap();
        assert_eq!(found.body, r#"{"status":"COMMITTED"}"#);
        assert_eq!(*keys.lock().unwrap(), ["k1", "k1", "k1"]);
    }

    #[tokio::test]
    async fn no_quorum_is_an_answer() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let answer = async move || {
            count.fetch_add(1, Ordering::Relaxed);
            Problem::new(Code::NoQuorum, "1 of 2").response().map(Body::new)
        };
        let api = Api::new(vec![serve(Router::new().route("/w", post(answer))).await], None).unwrap();
        assert_eq!(api.write(&write_to("/w", 5_000)).await.unwrap().error(), "1 of 2");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn words_about_a_quorum_settle_nothing() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let answer = async move || -> Response {
            match count.fetch_add(1, Ordering::Relaxed) {
                0 => {
                    let problem = Problem::new(Code::OutcomeUnknown, "service no_quorum: no quorum yet");
                    problem.response().map(Body::new)
                }
                _ => r#"{"status":"COMMITTED"}"#.into_response(),
            }
        };
        let api = Api::new(vec![serve(Router::new().route("/w", post(answer))).await], None).unwrap();
        assert_eq!(api.write(&write_to("/w", 5_000)).await.unwrap().status, StatusCode::OK);
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_stream_resumes_after_its_last_event() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let answer = async move |headers: HeaderMap| {
            let id = headers.get("last-event-id").map(|v| v.to_str().unwrap().to_owned());
            let next = id.as_ref().map_or(1, |id| id.parse::<u64>().unwrap() + 1);
            seen.lock().unwrap().push(id);
            format!("id: {next}\ndata: {{}}\n\n")
        };
        let api = Api::new(vec![serve(Router::new().route("/v1/events", get(answer))).await], None).unwrap();
        let mut feed = api.follow(Some(4));
        let mut ids = Vec::new();
        while ids.len() < 2 {
            if let Some(StreamEvent::Event(event)) = feed.recv().await {
                ids.extend(event.id);
            }
        }
        assert_eq!(ids, ["5", "6"]);
        assert_eq!(asked.lock().unwrap()[..2], [Some("4".into()), Some("5".into())]);
    }

    /// Returns the ids that a client asks with, `count` of them, where the streams are `parts`, one after the other.
    async fn asked_with(parts: Vec<&'static str>, after: Option<u64>, count: usize) -> Vec<Option<String>> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let answer = async move |headers: HeaderMap| -> &'static str {
            let mut seen = seen.lock().unwrap();
            seen.push(headers.get("last-event-id").map(|v| v.to_str().unwrap().to_owned()));
            parts.get(seen.len() - 1).copied().unwrap_or_default()
        };
        let api = Api::new(vec![serve(Router::new().route("/v1/events", get(answer))).await], None).unwrap();
        let mut feed = api.follow(after);
        while asked.lock().unwrap().len() < count {
            feed.recv().await;
        }
        asked.lock().unwrap()[..count].to_vec()
    }

    #[tokio::test]
    async fn no_number_of_cuts_loses_the_place_in_the_log() {
        let ids = |ids: &[Option<&str>]| ids.iter().map(|id| id.map(str::to_owned)).collect::<Vec<_>>();
        let without = "event: peer\ndata: {}\n\n";
        let found = asked_with(vec!["id: 10\ndata: {}\n\n", without, without, ": alive\n\n"], None, 5).await;
        assert_eq!(found, ids(&[None, Some("10"), Some("10"), Some("10"), Some("10")]));
        let found = asked_with(vec![without, "", without], Some(7), 4).await;
        assert_eq!(found, ids(&[Some("7"), Some("7"), Some("7"), Some("7")]));
        let found = asked_with(vec!["id: 3\n\n", without], None, 3).await;
        assert_eq!(found, ids(&[None, Some("3"), Some("3")]), "a stream says where it begins");
    }
}
