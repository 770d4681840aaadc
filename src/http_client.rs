//! The one HTTP client: the command line and the record router call the nodes' API with it, nodes forward writes to the coordinator,
//! query Prometheus and check the health of servers.
//!
//! It speaks HTTP without TLS, because none of these is configured with TLS. Every request has a deadline, and every body that is
//! kept has a limit. It never relays traffic: the data plane keeps connections of its own (`proxy::upstream`, `proxy::slow`).

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::timeout;

/// Settings of a client, which hold for all its requests.
#[derive(Debug, Clone, Copy)]
pub struct HttpSettings {
    /// Maximum wait for a connection.
    pub connect_max: Duration,
    /// True to keep connections for later requests; false to make one for each request.
    pub keeps_connections: bool,
    /// True for HTTP/2 with prior knowledge, false for HTTP/1.1.
    pub http2: bool,
}

impl HttpSettings {
    /// Returns the settings of a client of HTTP/1.1 that keeps its connections.
    pub const fn new(connect_max: Duration) -> Self {
        Self { connect_max, keeps_connections: true, http2: false }
    }
}

/// Why a request got no answer, or not the one that was expected.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The request has an invalid part, such as its URL; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] http::Error),
    /// No connection was made; nothing was sent.
    #[error("{}", innermost(.error))]
    Unreachable {
        /// Error of the connector, with its causes.
        error: ClientError,
    },
    /// The deadline passed first; the request may have been carried out.
    #[error("no answer within {}", seconds(.within))]
    TimedOut {
        /// The deadline, counted from the call.
        within: Duration,
    },
    /// The connection broke before the head of the answer; the request may have been carried out.
    #[error("{}", innermost(.error))]
    Broken {
        /// Error of the connection, with its causes.
        error: ClientError,
    },
    /// The connection broke within the body of the answer.
    #[error("{}", innermost(.error))]
    Interrupted {
        /// Error of the connection, with its causes.
        error: hyper::Error,
    },
    /// The body of the answer is larger than the caller's limit.
    #[error("the answer is larger than {bytes_max} bytes")]
    TooLarge {
        /// The caller's limit, in bytes.
        bytes_max: usize,
    },
    /// The status is not a success.
    #[error("{status}, expected 2xx")]
    Status {
        /// Status of the answer, outside 200 to 299.
        status: StatusCode,
    },
}

impl HttpError {
    /// Returns true when nothing was sent, so that the request can be sent elsewhere without being carried out twice.
    pub fn is_unsent(&self) -> bool {
        matches!(self, Self::Invalid(_) | Self::Unreachable { .. })
    }
}

/// Returns the innermost cause: "Connection refused" says more than "client error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Returns `5 s`, or `250 ms` where it isn't a whole number of seconds.
fn seconds(time: &Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{} s", time.as_secs()),
        _ => format!("{} ms", time.as_millis()),
    }
}

/// An answer whose body has been read to its end.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// Body of the answer, within the caller's limit.
    pub body: Bytes,
}

/// An answer whose head has arrived and whose body has not been read yet. Dropping it closes the connection.
#[derive(Debug)]
pub struct OpenAnswer {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// Header fields of the answer.
    pub headers: HeaderMap,
    body: Incoming,
}

impl OpenAnswer {
    /// Returns the answer itself.
    ///
    /// # Errors
    /// [`HttpError::Status`] when its status is not 2xx.
    pub fn expect_success(self) -> Result<Self, HttpError> {
        if self.status.is_success() { Ok(self) } else { Err(HttpError::Status { status: self.status }) }
    }

    /// Returns the next part of the body, which may be empty; none at its end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        match self.body.frame().await {
            Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
            Some(Err(error)) => Err(HttpError::Interrupted { error }),
            None => Ok(None),
        }
    }

    /// Reads the body to its end and drops it, so that the connection can be used again.
    pub async fn discard(&mut self) -> Result<(), HttpError> {
        while self.next().await?.is_some() {}
        Ok(())
    }

    /// Returns the whole body, of up to `bytes_max` bytes.
    pub async fn whole(&mut self, bytes_max: usize) -> Result<Bytes, HttpError> {
        let mut whole = BytesMut::new();
        while let Some(part) = self.next().await? {
            if whole.len() + part.len() > bytes_max {
                return Err(HttpError::TooLarge { bytes_max });
            }
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }
}

/// Sends requests. Clones share their connections.
#[derive(Debug, Clone)]
pub struct HttpClient(Client<HttpConnector, Full<Bytes>>);

impl HttpClient {
    /// Returns a client, which sends small requests at once.
    pub fn new(settings: HttpSettings) -> Self {
        let HttpSettings { connect_max, keeps_connections, http2 } = settings;
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(connect_max));
        connector.set_nodelay(true);
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).http2_only(http2);
        if !keeps_connections {
            builder.pool_max_idle_per_host(0);
        }
        Self(builder.build(connector))
    }

    /// Sends a request and returns its whole answer, whatever the status, if that arrives `within` this time and its body has at
    /// most `bytes_max` bytes.
    pub async fn send(
        &self,
        request: Request<Full<Bytes>>,
        within: Duration,
        bytes_max: usize,
    ) -> Result<HttpAnswer, HttpError> {
        let whole = async {
            let mut answer = self.begin(request).await?;
            let body = answer.whole(bytes_max).await?;
            Ok(HttpAnswer { status: answer.status, body })
        };
        timeout(within, whole).await.unwrap_or(Err(HttpError::TimedOut { within }))
    }

    /// Sends a request and returns its answer once the head is there, if that is `within` this time. The caller limits the body in
    /// size and time.
    pub async fn open(&self, request: Request<Full<Bytes>>, within: Duration) -> Result<OpenAnswer, HttpError> {
        timeout(within, self.begin(request)).await.unwrap_or(Err(HttpError::TimedOut { within }))
    }

    async fn begin(&self, request: Request<Full<Bytes>>) -> Result<OpenAnswer, HttpError> {
        let answer = self.0.request(request).await.map_err(|error| match error.is_connect() {
            true => HttpError::Unreachable { error },
            false => HttpError::Broken { error },
        })?;
        let (head, body) = answer.into_parts();
        Ok(OpenAnswer { status: head.status, headers: head.headers, body })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const SOON: Duration = Duration::from_millis(200);
    const LATE: Duration = Duration::from_secs(5);

    fn client(keeps_connections: bool) -> HttpClient {
        HttpClient::new(HttpSettings { keeps_connections, ..HttpSettings::new(LATE) })
    }

    fn get(url: &str) -> Request<Full<Bytes>> {
        Request::get(url).body(Full::default()).unwrap()
    }

    /// Answers each request of each connection with `answer`, and returns where; each answer ends with the connection's number, from 1.
    async fn server(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for number in 1.. {
                tokio::spawn(converse(listener.accept().await.unwrap().0, answer, number));
            }
        });
        url
    }

    async fn converse(mut stream: TcpStream, answer: &'static str, number: usize) {
        let mut request = [0; 4096];
        while stream.read(&mut request).await.is_ok_and(|length| length > 0) {
            stream.write_all(format!("{answer}{number}").as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_gets_nothing_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        drop(listener);
        let error = client(true).send(get(&url), LATE, 10).await.unwrap_err();
        assert!(matches!(error, HttpError::Unreachable { .. }) && error.is_unsent(), "{error:?}");
        assert_eq!(error.to_string(), "Connection refused (os error 111)");
    }

    #[tokio::test]
    async fn the_deadline_is_for_the_whole_answer() {
        for halfway in ["HTTP/1.1 200 OK\r\nx-number: ", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"] {
            let error = client(true).send(get(&server(halfway).await), SOON, 10).await.unwrap_err();
            assert!(matches!(error, HttpError::TimedOut { within: SOON }) && !error.is_unsent(), "{error:?}");
            assert_eq!(error.to_string(), "no answer within 200 ms");
        }
        assert_eq!(HttpError::TimedOut { within: LATE }.to_string(), "no answer within 5 s");
    }

    #[tokio::test]
    async fn a_body_above_the_limit_is_refused_and_one_at_it_is_not() {
        let at = server("HTTP/1.1 503 Busy\r\ncontent-length: 10\r\n\r\n123456789").await;
        let answer = client(true).send(get(&at), LATE, 10).await.unwrap();
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (503, &b"1234567891"[..]));
        let above = server("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n1234567890").await;
        let error = client(true).send(get(&above), LATE, 10).await.unwrap_err();
        assert_eq!(error.to_string(), "the answer is larger than 10 bytes");
    }

    #[tokio::test]
    async fn connections_are_kept_only_where_that_is_set() {
        let mut connections = Vec::new();
        for keeps in [true, false] {
            let (url, client) = (server("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").await, client(keeps));
            for _ in 0..2 {
                connections.push(client.send(get(&url), LATE, 10).await.unwrap().body);
                // The pool takes a connection back in a task of its own.
                for _ in 0..20 {
                    tokio::task::yield_now().await;
                }
            }
        }
        assert_eq!(connections, ["1", "1", "1", "2"]);
    }

    #[tokio::test]
    async fn an_answer_that_ends_early_is_an_error_and_so_is_a_wrong_status() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for answer in ["HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nhal", ""] {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let client = client(true);
        let mut cut = client.open(get(&url), LATE).await.unwrap();
        assert!(matches!(cut.discard().await, Err(HttpError::Interrupted { .. })));
        assert_eq!(cut.expect_success().unwrap_err().to_string(), "404 Not Found, expected 2xx");
        let error = client.open(get(&url), LATE).await.unwrap_err();
        assert!(matches!(error, HttpError::Broken { .. }) && !error.is_unsent(), "{error:?}");
    }
}
