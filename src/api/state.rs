//! What the API's handlers share: the node, the peers, and how an error looks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::domain::ids::NodeId;
use crate::http_client::{HttpClient, HttpSettings};
use crate::model::Problem;
use crate::node::handle::NodeHandle;
use crate::protocol::feature::Feature;
use crate::telemetry::Intake;

use super::token_file::TokenFile;

/// State that the API's handlers share.
#[derive(Clone)]
pub struct ApiState {
    pub(super) node: NodeHandle,
    /// The other nodes' API ports, `host:port`.
    pub(super) peers: Arc<BTreeMap<NodeId, String>>,
    pub(super) tokens: Option<TokenFile>,
    pub(super) metrics: PrometheusHandle,
    pub(super) intake: Intake,
    pub(super) client: HttpClient,
    /// What a backup holds beside the log; none: this node makes none.
    pub(super) backup: Option<BackupSource>,
    /// Places of streams of events and decisions, which last as long as their clients want.
    pub(super) streams: Arc<Semaphore>,
    /// Cancelled when the API ends, so that streams do.
    pub(super) shutdown: CancellationToken,
}

/// What a backup holds beside the node's log.
#[derive(Debug, Clone)]
pub struct BackupSource {
    pub(super) config: Arc<str>,
    pub(super) authority: Option<PathBuf>,
    /// A backup reads the whole log, and a checkpoint into memory: one at a time.
    pub(super) turn: Arc<Semaphore>,
}

impl BackupSource {
    /// Returns the source of a node whose file, without its secrets, is `config`, and whose authority's certificate is in the file
    /// `authority`, if its control plane has one.
    pub fn new(config: String, authority: Option<PathBuf>) -> Self {
        Self { config: config.into(), authority, turn: Arc::new(Semaphore::new(1)) }
    }
}

/// Streams of events and decisions at once: a quarter of the port's connections.
const STREAMS_MAX: usize = 256;
/// Longest body of a request: a rollout file is a few kilobytes.
pub(super) const BODY_BYTES_MAX: usize = 256 * 1024;
/// Longest wait for a connection to another node.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);

impl ApiState {
    /// Returns the API of a node whose peers' APIs are at `peers` (`host:port`).
    pub fn new(
        node: NodeHandle,
        peers: BTreeMap<NodeId, String>,
        tokens: Option<TokenFile>,
        metrics: PrometheusHandle,
        shutdown: CancellationToken,
    ) -> Self {
        let client = HttpClient::new(HttpSettings::new(CONNECT_TIMEOUT));
        let intake = Intake::new(node.clone(), "http");
        Self {
            node,
            peers: Arc::new(peers),
            tokens,
            metrics,
            intake,
            client,
            backup: None,
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            shutdown,
        }
    }

    /// Returns the members that don't know a feature, by their last HELLO, or that sent none yet.
    pub(super) fn waits_for(&self, feature: Feature) -> Vec<NodeId> {
        let knows = |node: &NodeId| {
            self.node.greetings.of(node).is_some_and(|greeting| greeting.versions.max >= feature.protocol())
        };
        self.node.published.view().members.keys().filter(|node| !knows(node)).cloned().collect()
    }

    /// Returns the API of a node that makes backups.
    pub fn with_backup(self, source: BackupSource) -> Self {
        Self { backup: Some(source), ..self }
    }
}

/// Returns an error as all of the API's look.
pub(super) fn error(status: StatusCode, why: impl Into<String>) -> Response {
    Problem::of_status(status, why).into_response()
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.response().map(Body::new)
    }
}
