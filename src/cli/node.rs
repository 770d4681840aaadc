//! `aviary node`: builds one node from its file and runs it until SIGINT or SIGTERM. SIGHUP makes it read again what may change.

use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::access_log;
use super::log_file::LogFile;
use super::stop::StopSignals;
use crate::about;
use crate::adapters::clock::BootClock;
use crate::adapters::descriptors;
use crate::adapters::disk::{DiskRuns, DiskStore};
#[cfg(feature = "kafka")]
use crate::adapters::kafka::{KafkaDecisions, KafkaTelemetry};
use crate::adapters::listen::{listen, listen_many};
use crate::adapters::net::PlainNetwork;
use crate::adapters::redis::{self, RedisDecisions, RedisProbe};
use crate::adapters::tls::{Files, TlsNetwork};
use crate::api::token_file::TokenFile;
use crate::api::{self, ApiState, BackupSource};
#[cfg(feature = "kafka")]
use crate::config::node::Kafka;
use crate::config::node::{IdentityFiles, NodeConfig, is_loopback};
use crate::config::redact::without_secrets;
use crate::decisions;
use crate::domain::ids::Incarnation;
use crate::node::failpoint::Failpoint;
use crate::node::frame::VERSIONS;
use crate::node::handle::{Guard, NodeHandle};
use crate::node::run::{self, Parts, Running};
use crate::node::{room, scrub};
use crate::ports::{Network, Recovered};
use crate::protocol::Settings;
use crate::proxy;
use crate::proxy::settings::ProxySettings;
use crate::telemetry;
#[cfg(feature = "kafka")]
use crate::telemetry::Intake;

/// Arguments of `aviary node`: where its file and its data are.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  aviary node --config config/node-a.toml\n\n\
    `aviary cluster init` or `aviary cluster join` must have created the data directory.")]
pub struct NodeArgs {
    /// File of the node (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Keeps the node's data in ROOT/NODE instead of the `data_dir` of its file, to try it out.
    #[arg(long, value_name = "ROOT")]
    pub data_root: Option<PathBuf>,
}

/// Longest wait for the peers' newest state before clients are served by what is on disk.
const CATCH_UP_MAX: Duration = Duration::from_secs(2);

/// Longest wait at the end for calls that block, to a broker or a store that is unavailable.
const STOP_MAX: Duration = Duration::from_secs(2);

/// Reads a node's file; `data_root` moves its data directory.
pub fn load(file: &Path, data_root: Option<&Path>) -> anyhow::Result<NodeConfig> {
    let mut config = NodeConfig::load(file)?;
    if let Some(root) = data_root {
        config.data_dir = root.join(config.id.as_str());
    }
    Ok(config)
}

/// Runs the node until SIGTERM or SIGINT, or until it must not go on.
pub fn run(args: NodeArgs) -> anyhow::Result<()> {
    let config = load(&args.config, args.data_root.as_deref())?;
    let log = start_log(&config)?;
    let tokens = tokens(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(serve(config, tokens, log));
    // A call to a broker that doesn't answer must not hold up the end.
    runtime.shutdown_timeout(STOP_MAX);
    ended
}

async fn serve(config: NodeConfig, tokens: Option<TokenFile>, log: Option<LogFile>) -> anyhow::Result<()> {
    // Before anything else, as a signal that nobody waits for ends the process.
    let (hangup, mut signals) = (signal(SignalKind::hangup())?, StopSignals::listen()?);
    // Ports first: a taken one must not cost a start of the node itself.
    descriptors::raise(config.data.connections_max as u64);
    let data = listen_many("data", &config.listen.data, config.data.workers(), false).await?;
    let listener = listen("api", &config.listen.api).await?;
    let metrics = api::metrics::install();
    let shutdown = CancellationToken::new();
    let (access, access_file) = access_log::open(config.data.access_log.as_ref())?;
    let settings = ProxySettings { access: access.clone(), ..config.data.clone() };
    let (running, tls) = start_node(&config, shutdown.clone())?;
    let Running { handle, thread, .. } = running;
    tokio::spawn(
        Reload { tokens: tokens.clone(), tls, logs: log.into_iter().chain(access_file).collect() }.at_each(hangup),
    );

    let servers = TaskTracker::new();
    // Clients wait in the port's queue meanwhile.
    handle.caught_up(CATCH_UP_MAX).await;
    let plane = proxy::serve(data, handle.clone(), settings, shutdown.clone());
    servers.spawn(async { plane.await.unwrap_or_else(|failure| error!("{failure:#}")) });
    let peers = config.peers.iter().map(|(node, peer)| (node.clone(), peer.api.clone())).collect();
    let state = ApiState::new(handle.clone(), peers, tokens, metrics, shutdown.clone());
    let state = state.with_backup(backup_source(&config)?);
    if let Some(url) = &config.redis {
        start_redis(url, &handle, &servers, &shutdown)?;
    }
    #[cfg(feature = "kafka")]
    if let Some(kafka) = &config.kafka {
        start_kafka(kafka, &handle, &servers, &shutdown)?;
    }
    servers.spawn(api::serve(listener, state));
    tokio::spawn(telemetry::prometheus::run(handle.clone(), shutdown.clone()));
    tokio::spawn(scrub::run(handle.log.clone(), shutdown.clone()));
    tokio::spawn(room::watch(config.data_dir.clone(), handle.clone(), shutdown.clone()));
    tokio::spawn(api::metrics::count(handle.clone()));
    servers.close();
    info!(node = %config.id, data = config.listen.data, api = config.listen.api, "serving");

    let mut node = tokio::task::spawn_blocking(move || thread.join());
    let ended = tokio::select! {
        () = signals.next() => None,
        ended = &mut node => Some(ended),
    };
    signals.drain(&handle.published, if ended.is_none() { config.data.drain_ms } else { 0 }).await;
    info!("stopping");
    shutdown.cancel();
    servers.wait().await;
    access.flush(STOP_MAX).await;
    let ended = match ended {
        Some(ended) => ended,
        None => node.await,
    };
    match ended? {
        Ok(outcome) => outcome.with_context(|| format!("node {} stopped", config.id)),
        Err(_) => bail!("node {} stopped: an invariant was violated; the log names it", config.id),
    }
}

/// Publishes decisions to Redis, and holds promotions while it is unavailable.
fn start_redis(
    url: &str,
    node: &NodeHandle,
    servers: &TaskTracker,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let client = redis::client(url)?;
    node.guarded(Guard::Store, Some("redis: not asked yet".into()));
    let cluster = node.published.view().cluster;
    let sink = RedisDecisions::new(client.clone(), cluster);
    servers.spawn(decisions::publish::run(node.clone(), Box::new(sink), "redis", shutdown.clone()));
    let (node, shutdown) = (node.clone(), shutdown.clone());
    servers.spawn_blocking(move || decisions::guard::run(&node, Box::new(RedisProbe::new(client, cluster)), &shutdown));
    Ok(())
}

/// Reads telemetry from Kafka and publishes decisions there. A broker that isn't there now is waited for.
#[cfg(feature = "kafka")]
fn start_kafka(
    config: &Kafka,
    node: &NodeHandle,
    servers: &TaskTracker,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    if !config.telemetry.is_empty() {
        let source = KafkaTelemetry::new(config, &config.telemetry, node.published.clock().clone())?;
        let intake = Intake::new(node.clone(), "kafka");
        servers.spawn(intake.clone().run(shutdown.clone()));
        let shutdown = shutdown.clone();
        servers.spawn_blocking(move || telemetry::source::run(Box::new(source), &intake, &shutdown));
    }
    if !config.decisions.is_empty() {
        let cluster = node.published.view().cluster;
        let sink = KafkaDecisions::new(config, &config.decisions, cluster);
        servers.spawn(decisions::publish::run(node.clone(), Box::new(sink), "kafka", shutdown.clone()));
    }
    Ok(())
}

/// What a node reads again at SIGHUP.
struct Reload {
    tokens: Option<TokenFile>,
    tls: Option<TlsNetwork>,
    logs: Vec<LogFile>,
}

impl Reload {
    /// Reads everything again at each signal; what can't be used leaves in force what was before.
    async fn at_each(self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            for failure in self.logs.iter().filter_map(|log| log.reopen().err()) {
                warn!("a log file can't be opened again: {failure:#}");
            }
            self.tokens.iter().for_each(TokenFile::reload);
            self.tls.iter().for_each(TlsNetwork::reload);
            info!("read again at SIGHUP: log files, tokens, certificates");
        }
    }
}

/// Starts the node, and returns its network where it has an identity.
fn start_node(config: &NodeConfig, shutdown: CancellationToken) -> anyhow::Result<(Running, Option<TlsNetwork>)> {
    let Recovered { store, acceptor, ledger, log, notes } = DiskStore::open(&config.data_dir)?;
    let runs = DiskRuns::open(&config.data_dir)?;
    notes.iter().chain(&runs.notes).for_each(|note| warn!("{note}"));
    let cluster = ledger.cluster;
    if let Some(found) = acceptor.as_ref().map(|acceptor| &acceptor.node).filter(|found| **found != config.id) {
        let (dir, file) = (config.data_dir.display(), config.file.display());
        bail!("{dir} belongs to node {found}, expected node {} of {file}", config.id);
    }
    if acceptor.is_none() {
        error!("this node's acceptor state is gone: it follows without a vote until an operator readmits it");
    }
    info!(checkpoint = %ledger.head, records = log.len(), %cluster, "journal read");
    let identity = identity_files(config);
    let tls = identity.map(|files| TlsNetwork::new(files, config.id.clone(), cluster)).transpose()?;
    let network: Arc<dyn Network> = match &tls {
        Some(tls) => Arc::new(tls.clone()),
        None => Arc::new(PlainNetwork),
    };
    let settings = Settings {
        node: config.id.clone(),
        cluster,
        timings: config.timings,
        seed: rand::random(),
        fresh_incarnation: Incarnation(rand::random()),
        retention: config.retention,
        peers: config.peers.keys().cloned().collect(),
        speaks: VERSIONS.max,
    };
    let running = run::start(
        Parts {
            settings,
            store: Box::new(store),
            acceptor,
            ledger,
            log,
            saved: runs.saved,
            runs: Box::new(runs.store),
            network,
            listen: config.listen.control.clone(),
            peers: config.peers.iter().map(|(node, peer)| (node.clone(), peer.control.clone())).collect(),
            versions: VERSIONS,
            facts: about::facts(),
            clock: Arc::new(BootClock),
            failpoint: Failpoint::from_environment()?,
        },
        shutdown,
    )?;
    Ok((running, tls))
}

/// Returns what a backup of this node holds beside its log: its file as it is now, without secrets.
fn backup_source(config: &NodeConfig) -> anyhow::Result<BackupSource> {
    let file = || config.file.display().to_string();
    let text = fs::read_to_string(&config.file).with_context(file)?;
    let text = without_secrets(&text).with_context(file)?;
    Ok(BackupSource::new(text, identity_files(config).map(|files| files.authority)))
}

/// Returns where a node's identity is; none when the control plane is plaintext.
pub fn identity_files(config: &NodeConfig) -> Option<Files> {
    let made = Files::in_data_dir(&config.data_dir);
    let IdentityFiles { ca, cert, key } = config.identity.clone()?;
    Some(Files {
        authority: ca.unwrap_or(made.authority),
        certificate: cert.unwrap_or(made.certificate),
        key: key.unwrap_or(made.key),
    })
}

fn tokens(config: &NodeConfig) -> anyhow::Result<Option<TokenFile>> {
    let Some(file) = &config.tokens_file else {
        if is_loopback(&config.listen.api) {
            return Ok(None);
        }
        let (file, address) = (config.file.display(), &config.listen.api);
        bail!("{file}: listen.api is {address}, off loopback, expected api.tokens_file to be set");
    };
    Ok(Some(TokenFile::open(file)?))
}

/// Starts the log: lines for people on the console, and as JSON in the node's file, which is returned.
fn start_log(config: &NodeConfig) -> anyhow::Result<Option<LogFile>> {
    let filter = || EnvFilter::new(format!("warn,aviary={}", config.log_level));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let console = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colours);
    let log = config.log_file.as_deref().map(LogFile::open).transpose()?;
    let file = log.clone().map(|log| {
        let json = tracing_subscriber::fmt::layer().json().flatten_event(true).with_target(false);
        json.with_writer(log).with_filter(filter())
    });
    tracing_subscriber::registry().with(console.compact().with_filter(filter())).with(file).init();
    Ok(log)
}
