//! How a process that serves clients ends: at a signal it says that it is not ready, then it stops.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use crate::node::handle::Published;

/// SIGTERM and SIGINT, from the moment that this is made.
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Listens to the signals, which from now on end nothing by themselves.
    ///
    /// # Errors
    /// When the system lets nobody listen to them.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Says that the node is not ready, and waits `drain_ms` milliseconds, in which it still serves; a second signal ends that.
    pub async fn drain(&mut self, published: &Published, drain_ms: u64) {
        published.leave();
        if drain_ms == 0 {
            return;
        }
        info!(drain_ms, "not ready any more, still serving");
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(drain_ms)) => {}
            () = self.next() => {}
        }
    }
}
