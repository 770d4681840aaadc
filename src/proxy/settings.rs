//! The data plane's settings, as `[data]` of a node's file has them.

use std::time::Duration;

use serde::Deserialize;

use crate::domain::ids::ServiceId;

/// Limits of the data plane.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxySettings {
    /// Threads that carry requests, each with its own listener, connections and counters; default one for each core.
    pub workers: Option<u16>,
    /// Longest wait for a connection to an upstream; default 3000, which forgives one lost SYN.
    pub connect_timeout_ms: u64,
    /// Longest wait for the first byte of an answer; default 30000.
    pub first_byte_timeout_ms: u64,
    /// Longest silence within an answer's body; default 60000.
    pub idle_timeout_ms: u64,
    /// Longest time from a request's first byte to its answer's last; default 0, without end.
    pub total_timeout_ms: u64,
    /// Longest wait for a request's headers; default 5000.
    pub header_timeout_ms: u64,
    /// How long a client's connection may wait for its next request; default 75000.
    pub keep_alive_timeout_ms: u64,
    /// How long an upstream's connection is kept for another request; default 4000, less than the 5 s after which common
    /// model servers close it.
    pub upstream_keep_alive_ms: u64,
    /// Age at which an upstream's connection takes no more requests; default 60000. Its server may have moved, or have been
    /// joined by others behind one address.
    pub upstream_life_ms: u64,
    /// How often the addresses of an upstream's name are looked up; default 30000.
    pub resolve_ms: u64,
    /// How long an `h2c://` server's connection may be silent before it gets an HTTP/2 PING; default 20000, 0 sends none. A
    /// gRPC server may end a connection at the fourth PING in a row without data (`too_many_pings`): within four times this,
    /// `idle_timeout_ms` should end a silent answer.
    pub upstream_ping_interval_ms: u64,
    /// Longest wait for the answer to a PING, after which the connection ends with all its requests; default 5000.
    pub upstream_ping_timeout_ms: u64,
    /// How long a worker stays awake after it read something, in microseconds; default 0: it sleeps at once. Saves the time
    /// that waking a core takes, and costs that core's time while there is little to do.
    pub busy_poll_us: u64,
    /// Connections at once; default 10000.
    pub connections_max: usize,
    /// Requests at once; default 5000.
    pub requests_max: usize,
    /// The service that `/predict` means at this node; default the cluster's, which `aviary service set-default` sets.
    pub default_service: Option<ServiceId>,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            workers: None,
            connect_timeout_ms: 3_000,
            first_byte_timeout_ms: 30_000,
            idle_timeout_ms: 60_000,
            total_timeout_ms: 0,
            header_timeout_ms: 5_000,
            keep_alive_timeout_ms: 75_000,
            upstream_keep_alive_ms: 4_000,
            upstream_life_ms: 60_000,
            resolve_ms: 30_000,
            upstream_ping_interval_ms: 20_000,
            upstream_ping_timeout_ms: 5_000,
            busy_poll_us: 0,
            connections_max: 10_000,
            requests_max: 5_000,
            default_service: None,
        }
    }
}

impl ProxySettings {
    /// Returns the number of threads.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or_else(cores, usize::from)
    }

    /// Returns the longest wait for a connection.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}
