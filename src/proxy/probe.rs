//! Asks servers whether they are well, where a version has several and says how to ask.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Uri};
use http_body_util::Full;
use tracing::{info, warn};

use crate::domain::plan::HealthCheck;
use crate::http_client::{HttpClient, HttpError, HttpSettings};
use crate::ports::Clock;

use super::table::RoutingTable;
use super::upstream::Server;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends health checks to servers, by HTTP/1.1 or HTTP/2.
pub struct Prober {
    http1: HttpClient,
    http2: HttpClient,
}

impl Prober {
    /// Returns a prober that waits so long for a connection.
    pub fn new(connect_timeout: Duration) -> Self {
        // A new connection each time: what is asked is whether one can be made.
        let settings = HttpSettings { keeps_connections: false, ..HttpSettings::new(connect_timeout) };
        Self { http1: HttpClient::new(settings), http2: HttpClient::new(HttpSettings { http2: true, ..settings }) }
    }

    /// Asks every server whose turn it is.
    pub fn ask(&self, router: &RoutingTable) {
        let (now, clock) = (router.now(), router.node.published.clock());
        for (server, check) in router.table().due(now) {
            let client = if server.http2 { self.http2.clone() } else { self.http1.clone() };
            tokio::spawn(probe(client, server, check, clock.clone()));
        }
    }
}

async fn probe(client: HttpClient, server: Arc<Server>, check: HealthCheck, clock: Arc<dyn Clock>) {
    let found = ask(&client, &server, &check).await;
    match (server.probed(found.is_ok(), clock.now().mono), found) {
        (true, Ok(())) => info!(server = %server.authority, path = check.path, "well again"),
        (true, Err(why)) => warn!(server = %server.authority, path = check.path, %why, "unwell: it gets no requests"),
        (false, _) => {}
    }
}

/// Asks a server; its answer is well when its status is 2xx and comes in time.
async fn ask(client: &HttpClient, server: &Server, check: &HealthCheck) -> Result<(), HttpError> {
    let uri = Uri::builder().scheme("http").authority(server.authority.clone()).path_and_query(check.path.as_str());
    let request = Request::get(uri.build()?).body(Full::default())?;
    let patience = PATIENCE.min(Duration::from_millis(check.interval_ms));
    client.open(request, patience).await?.expect_success().map(drop)
}
