//! Watching over a store that promotions depend on: while it is unavailable, none is voted for.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::node::handle::{Guard, NodeHandle};
use crate::ports::GuardProbe;

/// Time from one probe of the store to the next.
const PROBE: Duration = Duration::from_millis(500);

/// Tells the node whether the store answers, until `shutdown`; blocks, so that it needs a thread of its own.
#[expect(clippy::disallowed_methods, reason = "it has a thread of its own")]
pub fn run(node: &NodeHandle, mut probe: Box<dyn GuardProbe>, shutdown: &CancellationToken) {
    let mut told: Option<bool> = None;
    while !shutdown.is_cancelled() {
        let found = probe.probe();
        let unavailable = found.as_ref().err().map(ToString::to_string);
        if told != Some(unavailable.is_none()) {
            told = Some(unavailable.is_none());
            match &unavailable {
                Some(why) => warn!("promotions hold: {why}"),
                None => info!("the store that promotions depend on answers"),
            }
        }
        metrics::gauge!("aviary_guard_up").set(f64::from(u8::from(unavailable.is_none())));
        node.guarded(Guard::Store, unavailable);
        std::thread::sleep(PROBE);
    }
}
