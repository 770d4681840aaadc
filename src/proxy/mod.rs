//! The data plane: `/predict` and everything else that clients send, split between stable and canary.
//!
//! The request path takes no lock and never asks the consensus: it reads the published view, picks, forwards, counts.
//! Its rooms, in the order in which a request visits them: `serve` accepts connections for a `worker`, one thread's share;
//! `http1` and `http2` read them; `request` makes one canonical request of whatever came (`wire` and `body` know HTTP/1.x as bytes,
//! `hop` the fields of one connection); `dispose` decides by the `table` where it goes; `fast` carries it from HTTP/1.x to HTTP/1.1,
//! `slow` to and from HTTP/2; `policy` says what a failure means; `upstream` chooses servers, `names` and `dial` find them, `pool` has
//! the connections to those of HTTP/2, `probe` asks them; `outcome` counts and trips the circuit breaker; `answer` is what the node
//! says itself; `access` logs; `deadline` ends what takes too long, `stay` what stays at a canary that lost its share.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::LocalRuntime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::listener::{self, Accept, ConnectionLimiter, PortConnections};
use crate::node::handle::NodeHandle;

pub mod access;
mod answer;
pub mod body;
mod client;
mod cookie;
mod deadline;
mod dial;
mod dispose;
pub mod failure;
mod fast;
pub mod hop;
mod http1;
mod http2;
mod names;
pub mod network;
pub mod outcome;
pub mod policy;
mod pool;
mod probe;
pub mod request;
mod serve;
pub mod settings;
mod slow;
mod source;
mod stay;
mod table;
mod timeouts;
mod tunnel;
mod upstream;
pub mod wire;
mod worker;

use probe::Prober;
use settings::ProxySettings;
use table::RoutingTable;
use worker::Worker;

/// How often the counters go to the node.
const DRAIN: Duration = Duration::from_millis(100);
/// Connections at once that have not asked for anything yet.
const HALF_OPEN_MAX: usize = 4096;

/// Serves clients on threads of its own, one for each listener, until `shutdown`; then lets open requests end.
pub async fn serve(
    listeners: Vec<std::net::TcpListener>,
    node: NodeHandle,
    settings: ProxySettings,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let (router, limiter, connections) = prepare(node, settings, listeners.len());
    let mut threads = Vec::new();
    for (shard, listener) in listeners.into_iter().enumerate() {
        let (router, limiter, shutdown) = (router.clone(), limiter.clone(), shutdown.clone());
        let connections = connections.clone();
        let work = move || -> anyhow::Result<()> {
            let runtime = LocalRuntime::new()?;
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                serve::serve(Worker::new(router, shard), listener, limiter, connections, shutdown).await;
                Ok(())
            })
        };
        threads.push(std::thread::Builder::new().name(format!("data-{shard}")).spawn(work)?);
    }
    drain(&router, &shutdown).await;
    let ended = tokio::task::spawn_blocking(move || {
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    });
    ended.await?.context("a thread of the data plane ended")
}

/// Serves one listener's clients on the runtime that runs this, which must be a local one.
pub async fn serve_here(listener: impl Accept, node: NodeHandle, settings: ProxySettings, shutdown: CancellationToken) {
    let (router, limiter, connections) = prepare(node, settings, 1);
    let worker = serve::serve(Worker::new(router.clone(), 0), listener, limiter, connections, shutdown.clone());
    tokio::join!(worker, drain(&router, &shutdown));
}

fn prepare(
    node: NodeHandle,
    settings: ProxySettings,
    shards: usize,
) -> (Arc<RoutingTable>, ConnectionLimiter, PortConnections) {
    let limits = listener::PortLimits {
        name: "data",
        connections_max: settings.connections_max,
        half_open_max: HALF_OPEN_MAX.min(settings.connections_max),
        header_timeout: Duration::from_millis(settings.header_timeout_ms),
        // A connection of each protocol knows by itself when it is idle, and what its requests may take.
        idle_timeout: None,
        patience: None,
        grace: Duration::from_millis(settings.grace_ms),
    };
    let (limiter, connections) = (ConnectionLimiter::new(limits), PortConnections::new(limits));
    (Arc::new(RoutingTable::new(node, settings, shards)), limiter, connections)
}

/// Looks up the names of servers that were last looked up too long ago.
fn look_up(router: &RoutingTable) {
    let every = Duration::from_millis(router.settings.resolve_ms);
    for server in router.table().servers().filter(|server| server.addresses.is_due(every)) {
        let server = server.clone();
        tokio::spawn(async move {
            if let Err(error) = server.addresses.refresh().await {
                warn!(server = %server.authority, %error, "its name can't be looked up: its last addresses stay");
            }
        });
    }
}

/// Hands over what was counted, looks up names, and asks servers whether they are well, until `shutdown`.
async fn drain(router: &RoutingTable, shutdown: &CancellationToken) {
    let prober = Prober::new(router.settings.connect_timeout());
    let mut tick = tokio::time::interval(DRAIN);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        prober.ask(router);
        look_up(router);
        router.node.published.set_has_servers(router.has_servers());
        let observations = router.drain();
        if !observations.is_empty() {
            router.node.observed(observations);
        }
    }
}
