//! A node's file (TOML). Relative paths are relative to the working directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use schemars::{JsonSchema, Schema, schema_for};
use serde::Deserialize;

use super::{FileError, in_words, with_nearest_key};
use crate::domain::ids::NodeId;
use crate::domain::limits::{self, Limits, OutOfRange};
use crate::protocol::{Retention, Timings};
use crate::proxy::settings::ProxySettings;

/// Settings of a node, read from its file and checked.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// File that the settings were read from.
    pub file: PathBuf,
    /// `[node] id`: name in the cluster; the live node with the lowest name coordinates.
    pub id: NodeId,
    /// `[node] data_dir`: acceptor state and journal, created by `aviary cluster init`.
    pub data_dir: PathBuf,
    /// `[listen]`: the addresses of the three ports.
    pub listen: Listen,
    /// `[peers.NAME]`: addresses of the other nodes, by name.
    pub peers: BTreeMap<NodeId, PeerConfig>,
    /// `[log] file`: file for JSON lines; none: the node logs to the console only.
    pub log_file: Option<PathBuf>,
    /// `[log] level`: error, warn, info, debug or trace; default info.
    pub log_level: String,
    /// `[timings]`: intervals and timeouts between nodes, in milliseconds.
    pub timings: Timings,
    /// `[history]`: number of records kept, and of records between checkpoints.
    pub retention: Retention,
    /// `[data]`: settings of the data plane.
    pub data: ProxySettings,
    /// `[api] tokens_file`: bearer tokens; required if the API listens off loopback.
    pub tokens_file: Option<PathBuf>,
    /// `[control] ca, cert, key`: mutual TLS between the nodes, by default with what `aviary cluster init` makes in the
    /// data directory; none: `plaintext = true`, on loopback only.
    pub identity: Option<IdentityFiles>,
    /// `[kafka]`: telemetry in, decisions out; none: not by Kafka.
    pub kafka: Option<Kafka>,
    /// `[redis] url`: decisions for other readers; promotions hold while it is unavailable. None: not by Redis.
    pub redis: Option<String>,
}

/// `[kafka]`: brokers, topics and group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Brokers to begin with, `host:port,host:port`.
    pub bootstrap: String,
    /// The topic of events; default `telemetry.raw`, empty: none is read.
    #[serde(default = "telemetry_topic")]
    pub telemetry: String,
    /// The topic of decisions; default `rollout.decisions`, empty: none is written.
    #[serde(default = "decisions_topic")]
    pub decisions: String,
    /// The consumer group of all nodes, and the first word of transactional ids; default `aviary`.
    #[serde(default = "group")]
    pub group: String,
    /// More properties of librdkafka, such as `"security.protocol"`.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
}

impl Kafka {
    /// Returns what a file says that names these brokers only.
    pub fn at(bootstrap: &str) -> Self {
        let (telemetry, decisions, group) = (telemetry_topic(), decisions_topic(), group());
        Self { bootstrap: bootstrap.into(), telemetry, decisions, group, properties: BTreeMap::new() }
    }
}

fn telemetry_topic() -> String {
    "telemetry.raw".into()
}

fn decisions_topic() -> String {
    "rollout.decisions".into()
}

fn group() -> String {
    "aviary".into()
}

/// Files of a node's identity, as far as its own file names them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The authority's certificate; default `tls/ca.pem` in the data directory.
    pub ca: Option<PathBuf>,
    /// The node's certificate; default `tls/node.pem` there.
    pub cert: Option<PathBuf>,
    /// Its private key; default `tls/node.key` there.
    pub key: Option<PathBuf>,
}

/// Addresses to listen on, `host:port`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Data port, for clients' requests.
    pub data: String,
    /// Address of the API port, which operators use.
    pub api: String,
    /// The other nodes. Loopback only, where it is plaintext.
    pub control: String,
}

/// Where another node is, `host:port`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Address of its control port.
    pub control: String,
    /// Address of its API port; writes are forwarded there while it coordinates.
    pub api: String,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    node: NodePart,
    listen: Listen,
    #[serde(default)]
    control: ControlPart,
    #[serde(default)]
    peers: BTreeMap<NodeId, PeerConfig>,
    #[serde(default)]
    log: LogPart,
    #[serde(default)]
    timings: TimingsPart,
    #[serde(default)]
    history: HistoryPart,
    #[serde(default)]
    data: ProxySettings,
    #[serde(default)]
    api: ApiPart,
    kafka: Option<Kafka>,
    redis: Option<RedisPart>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RedisPart {
    url: String,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NodePart {
    id: NodeId,
    data_dir: PathBuf,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ControlPart {
    #[serde(default)]
    plaintext: bool,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LogPart {
    file: Option<PathBuf>,
    level: Option<String>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TimingsPart {
    heartbeat_ms: Option<u64>,
    suspect_ms: Option<u64>,
    vote_ms: Option<u64>,
    resend_ms: Option<u64>,
    snapshot_ms: Option<u64>,
    evidence_age_ms_max: Option<u64>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HistoryPart {
    records: Option<u64>,
    checkpoint_every: Option<u64>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ApiPart {
    tokens_file: Option<PathBuf>,
}

/// Returns the JSON Schema of a node's file.
pub fn schema() -> Schema {
    schema_for!(NodeFile)
}

/// A node's file that can't be used.
pub type NodeFileError = FileError<NodeProblem>;

/// Why a file is no node's.
#[derive(Debug, thiserror::Error)]
pub enum NodeProblem {
    /// The system refused to read the file.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The text is no TOML, or has unknown or missing keys.
    #[error("line {line}: {}", in_words(&with_nearest_key(.error.message())))]
    Shape {
        /// Line of the file, from 1.
        line: usize,
        /// Error of the parser.
        error: toml::de::Error,
    },
    /// An address without a port.
    #[error("{key}: {found:?} has no port, expected host:port")]
    NoPort {
        /// Key of the address.
        key: String,
        /// Address found.
        found: String,
    },
    /// An address without a host, or whose port is no number.
    #[error("{key}: {found:?} is not an address, expected host:port")]
    NoAddress {
        /// Key of the address.
        key: String,
        /// Address found.
        found: String,
    },
    /// A text of another form than the key needs.
    #[error("{key} is {found:?}, expected {expected}")]
    Text {
        /// Key of the text.
        key: &'static str,
        /// Text found.
        found: String,
        /// The form that the key needs.
        expected: &'static str,
    },
    /// A number beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
    /// A limit or timeout of the data plane, named by its key, that would let nothing through.
    #[error("data.{0} is 0, expected at least 1")]
    Zero(&'static str),
    /// A node that is its own peer.
    #[error("peers.{0} is this node itself, expected the others")]
    OwnPeer(NodeId),
    /// A plaintext control address that other machines can reach.
    #[error(
        "control address {0:?} is off loopback, expected loopback with control.plaintext; without that line the nodes speak mutual TLS"
    )]
    OffLoopback(String),
    /// Certificates that plaintext connections would not use.
    #[error("control names certificates beside plaintext = true, expected one or the other")]
    UnusedCertificates,
    /// Kafka's settings, for a program that can't speak to it.
    #[error("kafka: this program was built without Kafka (cargo build --features kafka)")]
    NoKafka,
}

impl NodeConfig {
    /// Reads and checks a node's file.
    pub fn load(path: &Path) -> Result<Self, NodeFileError> {
        let read = fs::read_to_string(path).map_err(NodeProblem::from);
        read.and_then(|text| Self::parse(&text, path)).map_err(|problem| FileError::new(path.display(), problem))
    }

    /// Reads and checks a node's file that `text` holds, which is or could be at `path`; errors begin with that.
    ///
    /// # Errors
    /// When it is no node's file, or a value is not allowed.
    pub fn of(text: &str, path: &Path) -> Result<Self, NodeFileError> {
        Self::parse(text, path).map_err(|problem| FileError::new(path.display(), problem))
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, NodeProblem> {
        let file: NodeFile = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            NodeProblem::Shape { line, error }
        })?;
        let NodeFile { node, listen, control, peers, log, timings, history, data, api, kafka, redis } = file;
        let redis = redis.map(|redis| redis.url);
        if let Some(found) = redis.clone().filter(|url| !url.starts_with("redis://")) {
            let (key, expected) = ("redis.url", "redis://[user:password@]host:port[/db]");
            return Err(NodeProblem::Text { key, found, expected });
        }
        if let Some(kafka) = &kafka {
            if cfg!(not(feature = "kafka")) {
                return Err(NodeProblem::NoKafka);
            }
            for address in kafka.bootstrap.split(',') {
                checked_address("kafka.bootstrap", address.trim())?;
            }
        }
        for (key, address) in [("data", &listen.data), ("api", &listen.api), ("control", &listen.control)] {
            checked_address(&format!("listen.{key}"), address)?;
        }
        if peers.contains_key(&node.id) {
            return Err(NodeProblem::OwnPeer(node.id));
        }
        for (name, peer) in &peers {
            checked_address(&format!("peers.{name}.control"), &peer.control)?;
            checked_address(&format!("peers.{name}.api"), &peer.api)?;
        }
        let addresses = peers.values().map(|peer| &peer.control).chain([&listen.control]);
        if let Some(open) = addresses.into_iter().find(|address| control.plaintext && !is_loopback(address)) {
            return Err(NodeProblem::OffLoopback(open.clone()));
        }
        let ControlPart { plaintext, ca, cert, key } = control;
        if plaintext && (ca.is_some() || cert.is_some() || key.is_some()) {
            return Err(NodeProblem::UnusedCertificates);
        }
        let identity = (!plaintext).then_some(IdentityFiles { ca, cert, key });
        let limits = [
            ("connect_timeout_ms", data.connect_timeout_ms),
            ("first_byte_timeout_ms", data.first_byte_timeout_ms),
            ("idle_timeout_ms", data.idle_timeout_ms),
            ("header_timeout_ms", data.header_timeout_ms),
            ("unread_timeout_ms", data.unread_timeout_ms),
            ("upstream_life_ms", data.upstream_life_ms),
            ("resolve_ms", data.resolve_ms),
            ("upstream_ping_timeout_ms", data.upstream_ping_timeout_ms),
            ("connections_max", data.connections_max as u64),
            ("requests_max", data.requests_max as u64),
        ];
        if let Some((key, _)) = limits.iter().find(|(_, found)| *found == 0) {
            return Err(NodeProblem::Zero(key));
        }
        let found = log.level.unwrap_or_else(|| "info".into());
        if !["error", "warn", "info", "debug", "trace"].contains(&found.as_str()) {
            let (key, expected) = ("log.level", "error, warn, info, debug or trace");
            return Err(NodeProblem::Text { key, found, expected });
        }
        Ok(Self {
            file: path.into(),
            id: node.id,
            data_dir: node.data_dir,
            listen,
            peers,
            log_file: log.file,
            log_level: found,
            timings: checked_timings(&timings)?,
            retention: checked_retention(&history)?,
            data,
            tokens_file: api.tokens_file,
            identity,
            kafka,
            redis,
        })
    }
}

fn checked_timings(part: &TimingsPart) -> Result<Timings, OutOfRange> {
    let default = Timings::default();
    let timings = Timings {
        heartbeat_ms: part.heartbeat_ms.unwrap_or(default.heartbeat_ms),
        suspect_ms: part.suspect_ms.unwrap_or(default.suspect_ms),
        vote_ms: part.vote_ms.unwrap_or(default.vote_ms),
        resend_ms: part.resend_ms.unwrap_or(default.resend_ms),
        snapshot_ms: part.snapshot_ms.unwrap_or(default.snapshot_ms),
        evidence_age_ms_max: part.evidence_age_ms_max.unwrap_or(default.evidence_age_ms_max),
    };
    let rules = [
        ("timings.heartbeat_ms", timings.heartbeat_ms, 20, limits::LEASE.min as u64 / 4),
        ("timings.suspect_ms", timings.suspect_ms, timings.heartbeat_ms.saturating_mul(2), 10_000),
        ("timings.vote_ms", timings.vote_ms, 100, 1_500),
        ("timings.resend_ms", timings.resend_ms, 20, timings.vote_ms),
        ("timings.snapshot_ms", timings.snapshot_ms, 50, 1_000),
        ("timings.evidence_age_ms_max", timings.evidence_age_ms_max, timings.snapshot_ms.saturating_mul(3), 30_000),
    ];
    check_all(rules).map(|()| timings)
}

fn checked_retention(part: &HistoryPart) -> Result<Retention, OutOfRange> {
    let default = Retention::default();
    let checkpoint_every = part.checkpoint_every.unwrap_or(default.checkpoint_every);
    let records = part.records.unwrap_or(default.history);
    let rules =
        [("history.checkpoint_every", checkpoint_every, 1, 1_000_000), ("history.records", records, 0, 10_000_000)];
    check_all(rules).map(|()| Retention { checkpoint_every, history: records })
}

/// Checks numbers, each with its key, its minimum and its maximum.
fn check_all<const N: usize>(rules: [(&'static str, u64, u64, u64); N]) -> Result<(), OutOfRange> {
    let limits = |what, min, max| Limits { what, min: min as f64, max: max as f64, unit: "" };
    rules.into_iter().try_for_each(|(what, found, min, max)| limits(what, min, max).check_whole(found).map(drop))
}

fn checked_address(key: &str, address: &str) -> Result<(), NodeProblem> {
    let (key, found) = (key.into(), address.into());
    match address.rsplit_once(':') {
        None => Err(NodeProblem::NoPort { key, found }),
        Some((host, port)) if host.is_empty() || port.parse::<u16>().is_err() => {
            Err(NodeProblem::NoAddress { key, found })
        }
        Some(_) => Ok(()),
    }
}

/// Returns true when `host:port` is this machine's loopback.
pub fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[node]
id = "b"
data_dir = "data/node-b"
[listen]
data = "127.0.0.1:8082"
api = "127.0.0.1:50052"
control = "127.0.0.1:7002"
[control]
plaintext = true
[peers.a]
control = "127.0.0.1:7001"
api = "127.0.0.1:50051"
[timings]
heartbeat_ms = 200
"#;

    fn parse(text: &str) -> Result<NodeConfig, NodeProblem> {
        NodeConfig::parse(text, Path::new("b.toml"))
    }

    #[test]
    fn a_file_is_read_with_its_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!((config.timings.heartbeat_ms, config.timings.vote_ms), (200, 1_000));
        assert_eq!((config.data.connections_max, config.retention), (10_000, Retention::default()));
    }

    #[test]
    fn a_mistake_names_what_was_found_and_expected() {
        let complaint = |from: &str, to: &str| parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
        assert_eq!(
            complaint("api = \"127.0.0.1:50051\"", "api = \"10.0.0.3\""),
            "peers.a.api: \"10.0.0.3\" has no port, expected host:port"
        );
        assert!(complaint("heartbeat_ms", "hartbeat_ms").ends_with("did you mean `heartbeat_ms`?"));
        assert_eq!(
            complaint("[timings]", "[history]\ncheckpoint_every = 0\n[timings]"),
            "history.checkpoint_every is 0, expected 1 to 1000000"
        );
        assert_eq!(complaint("= 200", "= 900"), "timings.heartbeat_ms is 900, expected 20 to 250");
        assert!(complaint("[peers.a]", "[peers.b]").contains("is this node itself"));
        assert!(complaint("control = \"127.0.0.1:7002\"", "control = \"0.0.0.0:7002\"").contains("off loopback"));
        assert!(complaint("plaintext = true", "plaintext = true\nkey = \"k\"").contains("one or the other"));
    }

    #[test]
    fn without_plaintext_the_nodes_have_identities() {
        assert_eq!(parse(GOOD).unwrap().identity, None);
        let open = GOOD.replace("plaintext = true", "").replace("\"127.0.0.1:7002\"", "\"0.0.0.0:7002\"");
        let identity = parse(&open).unwrap().identity.unwrap();
        assert_eq!(identity, IdentityFiles::default());
        let named = parse(&open.replace("[control]", "[control]\nkey = \"/run/b.key\"")).unwrap().identity.unwrap();
        assert_eq!(named.key.as_deref(), Some(Path::new("/run/b.key")));
    }
}
