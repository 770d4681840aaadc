//! Asks servers whether they are well, where a version has several and says how to ask.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tracing::{info, warn};

use crate::domain::plan::HealthCheck;

use super::table::RoutingTable;
use super::upstream::Server;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks servers.
pub struct Prober {
    http1: Client<HttpConnector, Empty<Bytes>>,
    http2: Client<HttpConnector, Empty<Bytes>>,
}

impl Prober {
    /// Returns a prober that waits so long for a connection.
    pub fn new(connect_timeout: Duration) -> Self {
        let client = |http2| {
            let mut connector = HttpConnector::new();
            connector.set_connect_timeout(Some(connect_timeout));
            // A new connection each time: what is asked is whether one can be made.
            let mut builder = Client::builder(TokioExecutor::new());
            builder.pool_timer(TokioTimer::new()).pool_max_idle_per_host(0).http2_only(http2).build(connector)
        };
        Self { http1: client(false), http2: client(true) }
    }

    /// Asks every server whose turn it is.
    pub fn ask(&self, router: &RoutingTable) {
        let now = router.now();
        for (server, check) in router.table().due(now) {
            let client = if server.http2 { self.http2.clone() } else { self.http1.clone() };
            tokio::spawn(probe(client, server, check));
        }
    }
}

async fn probe(client: Client<HttpConnector, Empty<Bytes>>, server: Arc<Server>, check: HealthCheck) {
    let uri = Uri::builder().scheme("http").authority(server.authority.clone()).path_and_query(check.path.as_str());
    let Ok(uri) = uri.build() else { return };
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = uri;
    let patience = PATIENCE.min(Duration::from_millis(check.interval_ms));
    let found = match tokio::time::timeout(patience, client.request(request)).await {
        Ok(Ok(answer)) if answer.status().is_success() => Ok(()),
        Ok(Ok(answer)) => Err(format!("answered {}", answer.status())),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} ms", patience.as_millis())),
    };
    match (server.probed(found.is_ok()), found) {
        (true, Ok(())) => info!(server = %server.authority, path = check.path, "well again"),
        (true, Err(why)) => warn!(server = %server.authority, path = check.path, why, "unwell: it gets no requests"),
        (false, _) => {}
    }
}
