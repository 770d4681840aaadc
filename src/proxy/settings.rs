//! The data plane's settings, as `[data]` of a node's file has them.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::domain::ids::ServiceId;
use crate::domain::weights::Weight;

use super::access::{AccessLog, AccessLogFormat};
use super::network::PeerNetwork;

/// Limits of the data plane.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
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
    /// How long a client may leave what it is sent unread, before its connection or stream ends; default 75000.
    pub unread_timeout_ms: u64,
    /// How long an upstream's connection is kept for another request; default 4000, less than the 5 s after which common
    /// model servers close it.
    pub upstream_keep_alive_ms: u64,
    /// Age at which an upstream's connection takes no more requests; default 60000. Its server may have moved, or have been
    /// joined by others behind one address.
    pub upstream_life_ms: u64,
    /// How often the addresses of an upstream's name are looked up; default 30000.
    pub resolve_ms: u64,
    /// Longest silence of an upgraded connection, such as a WebSocket, in both directions; default 3600000, 0: without end.
    pub tunnel_idle_ms: u64,
    /// How long a request, or an upgraded connection, may stay at a canary that lost all of its share, by a rollback or with the
    /// lease; default 5000, 0: until the next look, within 250 ms. New requests go to stable at once.
    pub canary_grace_ms: u64,
    /// Networks of proxies in front of the node; default none. `hashOn: clientAddress` takes the client that they name in
    /// X-Forwarded-For, and what others say in X-Forwarded-* and Forwarded is replaced. Without any network it is passed on.
    pub trusted: Vec<PeerNetwork>,
    /// Connections begin with a header of the PROXY protocol, version 1 or 2, that names the client; default false. With
    /// `trusted`, only those from there do.
    pub proxy_protocol: bool,
    /// How long the node says that it is not ready before it stops listening; default 0. Requests are still served, and each
    /// connection's next answer is its last. Load balancers and clients go elsewhere meanwhile.
    pub drain_ms: u64,
    /// How long open requests and upgraded connections may take to end once the node stopped listening; default 10000.
    pub grace_ms: u64,
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
    /// Header by which a client chooses the version (`always`, `never`); default `x-canary`, empty: there is none.
    #[serde(deserialize_with = "header_name")]
    pub canary_header: String,
    /// Networks whose clients may use `canary_header`; default none: all may. Answers to such requests are counted apart and are
    /// no evidence, except those that a record router in one of these networks sends.
    pub canary_header_peers: Vec<PeerNetwork>,
    /// Answer `/livez`, `/readyz`, `/lease/SERVICE`, `/routing/state` and `/health/snapshot` on this port; default true. The API's
    /// port always does. False: these paths are the services'.
    pub status_paths: bool,
    /// Where requests are logged; default nowhere.
    pub access_log: Option<AccessLogSettings>,
    /// The log that is open.
    #[serde(skip)]
    pub access: AccessLog,
}

/// A log of the requests, a line for each.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessLogSettings {
    /// File that lines are appended to, opened again at SIGHUP; `-` is standard output.
    pub file: PathBuf,
    /// How lines are written; default `json`.
    #[serde(default)]
    pub format: AccessLogFormat,
    /// Share of the requests that are logged, 0 to 100 percent, in hundredths; default 100.
    #[serde(default = "all", deserialize_with = "percent")]
    #[schemars(with = "f64", range(min = 0, max = 100))]
    pub sample_percent: Weight,
}

fn all() -> Weight {
    Weight::FULL
}

fn percent<'de, D: Deserializer<'de>>(value: D) -> Result<Weight, D::Error> {
    Weight::from_percent(f64::deserialize(value)?).map_err(D::Error::custom)
}

/// Reads a header's name into small letters.
fn header_name<'de, D: Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    let name = String::deserialize(value)?.to_ascii_lowercase();
    if name.is_empty() || http::HeaderName::try_from(&name).is_ok() {
        return Ok(name);
    }
    Err(D::Error::custom(format!("found {name:?}, expected the name of a header, or \"\"")))
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
            unread_timeout_ms: 75_000,
            upstream_keep_alive_ms: 4_000,
            upstream_life_ms: 60_000,
            resolve_ms: 30_000,
            tunnel_idle_ms: 3_600_000,
            canary_grace_ms: 5_000,
            trusted: Vec::new(),
            proxy_protocol: false,
            drain_ms: 0,
            grace_ms: 10_000,
            upstream_ping_interval_ms: 20_000,
            upstream_ping_timeout_ms: 5_000,
            busy_poll_us: 0,
            connections_max: 10_000,
            requests_max: 5_000,
            default_service: None,
            canary_header: "x-canary".into(),
            canary_header_peers: Vec::new(),
            status_paths: true,
            access_log: None,
            access: AccessLog::default(),
        }
    }
}

impl ProxySettings {
    /// Returns the number of threads.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or_else(cores, usize::from)
    }

    /// Returns true when servers are told what a peer says of those before it.
    pub fn is_trusted(&self, peer: IpAddr) -> bool {
        self.trusted.is_empty() || self.trusted.iter().any(|network| network.contains(peer))
    }

    /// Returns the longest wait for a connection.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}
