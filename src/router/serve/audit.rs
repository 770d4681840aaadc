//! The audit of a router that runs, from time to time.

use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::ports::RouterWorld;
use crate::router::compare::compare;

/// Compares the topics from time to time.
pub async fn audit(world: Arc<dyn RouterWorld>, every: Duration, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        let world = world.clone();
        let compared = tokio::task::spawn_blocking(move || compare(world.topics()?.as_ref())).await;
        match compared {
            Ok(Ok(Some(compared))) => {
                let findings = compared.findings;
                for (kind, count) in [("missing", findings.missing), ("extra", findings.extra), ("both", findings.both)]
                {
                    counter!("aviary_router_audit_violations_total", "kind" => kind).absolute(count);
                }
                match findings.violations() {
                    0 => info!("audit: {findings}"),
                    _ => error!("audit: {findings}: {:?}", findings.examples),
                }
            }
            Ok(Ok(None)) => {}
            Ok(Err(why)) => warn!("audit: {why}"),
            Err(why) => warn!("audit: {why}"),
        }
    }
}
