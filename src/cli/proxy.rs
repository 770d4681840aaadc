//! `aviary proxy`: the data plane alone, with a fixed canary weight, to try it out and for benchmarks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Exit;
use super::access_log;
use super::log_file::LogFile;
use super::stop::StopSignals;
use crate::adapters::clock::BootClock;
use crate::adapters::descriptors;
use crate::adapters::listen::listen_many;
use crate::adapters::memory::MemoryStore;
use crate::domain::ids::{NodeId, ServiceId, TxId, VersionId};
use crate::domain::plan::file::checked_url;
use crate::domain::plan::{Backend, OnPartition, RolloutSpec, Stage};
use crate::domain::rollout::{Change, Service, Stamp};
use crate::domain::time::Mono;
use crate::domain::weights::Weight;
use crate::node::handle::{NodeHandle, NodeRequest, Published};
use crate::ports::{Clock, Store};
use crate::protocol::View;
use crate::proxy;
use crate::proxy::access::AccessLogFormat;
use crate::proxy::network::PeerNetwork;
use crate::proxy::settings::{AccessLogSettings, ProxySettings};

/// Longest wait at the end for lines of the access log that are still to be written.
const FLUSH_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary proxy --listen 127.0.0.1:8080 --stable http://127.0.0.1:9101 \
    --canary http://127.0.0.1:9102 --weight 5\n\nRuns a node's data plane without a cluster: the weight is fixed, and nothing is promoted.\n\
    After five consecutive failures the canary gets no traffic until the next start.")]
pub struct ProxyArgs {
    /// Address to listen on, `host:port`.
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    /// Servers of the stable version; requests are balanced between them.
    #[arg(long, value_name = "URL[,URL…]", value_delimiter = ',', required = true, value_parser = checked_url)]
    stable: Vec<String>,
    /// URLs of the canary's servers, separated by commas.
    #[arg(long, value_name = "URL[,URL…]", value_delimiter = ',', required = true, value_parser = checked_url)]
    canary: Vec<String>,
    /// The canary's share, in percent, such as 5 or 0.01.
    #[arg(long, value_name = "PERCENT", value_parser = weight)]
    weight: Weight,
    /// Name of the service, as `/v1/models/NAME` and `X-Aviary-Service` have it; models of other names are its own too.
    #[arg(long, value_name = "NAME", default_value = "proxy", value_parser = service)]
    name: ServiceId,
    /// Worker threads; default: one per core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// Microseconds that a worker polls after a read before it sleeps: lower latency at low load, for CPU time.
    #[arg(long, value_name = "US", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000))]
    busy_poll_us: u64,
    /// Milliseconds without traffic after which an upgraded connection, such as a WebSocket, is closed; 0: never.
    #[arg(long, value_name = "MS", default_value_t = ProxySettings::default().tunnel_idle_ms)]
    tunnel_idle_ms: u64,
    /// Longest wait for the first byte of an answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = ProxySettings::default().first_byte_timeout_ms,
        value_parser = clap::value_parser!(u64).range(1..))]
    first_byte_timeout_ms: u64,
    /// Longest silence within an answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = ProxySettings::default().idle_timeout_ms,
        value_parser = clap::value_parser!(u64).range(1..))]
    idle_timeout_ms: u64,
    /// Longest time from a request to its answer's end, in milliseconds; 0: without end.
    #[arg(long, value_name = "MS", default_value_t = ProxySettings::default().total_timeout_ms)]
    total_timeout_ms: u64,
    /// Networks of proxies in front, such as 10.0.0.0/8; what others say in X-Forwarded-* and Forwarded is replaced.
    #[arg(long, value_name = "NETWORK[,NETWORK…]", value_delimiter = ',')]
    trusted: Vec<PeerNetwork>,
    /// Networks whose clients may choose the version by x-canary; default: all.
    #[arg(long, value_name = "NETWORK[,NETWORK…]", value_delimiter = ',')]
    canary_header_peers: Vec<PeerNetwork>,
    /// Connections begin with a header of the PROXY protocol; with --trusted, those from there.
    #[arg(long)]
    proxy_protocol: bool,
    /// Milliseconds after SIGTERM for which it serves on while /readyz says no.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    drain_ms: u64,
    /// Milliseconds for open requests and upgraded connections to end after that.
    #[arg(long, value_name = "MS", default_value_t = ProxySettings::default().grace_ms)]
    grace_ms: u64,
    /// Shares the port with another process that has this flag: the next one listens before this one stops.
    #[arg(long)]
    share_port: bool,
    /// File that a line for each request is appended to, opened again at SIGHUP; `-`: standard output.
    #[arg(long, value_name = "FILE")]
    access_log: Option<PathBuf>,
    /// Format of those lines: json or combined.
    #[arg(long, value_name = "FORMAT", default_value = "json", requires = "access_log")]
    access_log_format: AccessLogFormat,
    /// Share of the requests that are logged, in percent.
    #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = weight, requires = "access_log")]
    access_log_sample: Weight,
}

fn service(text: &str) -> anyhow::Result<ServiceId> {
    Ok(ServiceId::new(text)?)
}

/// Reads a share in percent.
pub fn weight(text: &str) -> anyhow::Result<Weight> {
    let percent = text.trim_end_matches('%').parse().map_err(|_| anyhow!("found {text:?}, expected 0 to 100"))?;
    Ok(Weight::from_percent(percent)?)
}

/// Serves until SIGINT or SIGTERM.
pub fn run(args: &ProxyArgs) -> anyhow::Result<Exit> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).compact().init();
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(args))
}

async fn serve(args: &ProxyArgs) -> anyhow::Result<Exit> {
    let view = Arc::new(view_of(args)?);
    // Before anything else, as a signal that nobody waits for ends the process.
    let (mut hangup, mut signals) = (signal(SignalKind::hangup())?, StopSignals::listen()?);
    let access_log = args.access_log.clone().map(|file| AccessLogSettings {
        file,
        format: args.access_log_format,
        sample_percent: args.access_log_sample,
    });
    let (access, access_file) = access_log::open(access_log.as_ref())?;
    let settings = ProxySettings {
        access_log,
        access: access.clone(),
        workers: args.workers,
        busy_poll_us: args.busy_poll_us,
        tunnel_idle_ms: args.tunnel_idle_ms,
        first_byte_timeout_ms: args.first_byte_timeout_ms,
        idle_timeout_ms: args.idle_timeout_ms,
        total_timeout_ms: args.total_timeout_ms,
        trusted: args.trusted.clone(),
        canary_header_peers: args.canary_header_peers.clone(),
        proxy_protocol: args.proxy_protocol,
        grace_ms: args.grace_ms,
        ..ProxySettings::default()
    };
    descriptors::raise(settings.connections_max as u64);
    let listeners = listen_many("data", &args.listen, settings.workers(), args.share_port).await?;
    let published = Published::new(view, Arc::new(BootClock));
    // Nobody takes this weight back: its lease has no end.
    published.set_lease(Some(Mono(u64::MAX / 2)));
    let log = MemoryStore::default().reader();
    let (handle, mut requests, _events) = NodeHandle::new(published, log);
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            if let NodeRequest::CircuitBreakerTripped { reason, .. } = request {
                warn!("everything goes to stable until the next start: {reason}");
            }
        }
    });
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            if let Some(Err(failure)) = access_file.as_ref().map(LogFile::reopen) {
                warn!("the access log can't be opened again: {failure:#}");
            }
        }
    });
    let shutdown = CancellationToken::new();
    let ended = tokio::spawn(proxy::serve(listeners, handle.clone(), settings, shutdown.clone()));
    eprintln!("{}: {} to the canary, the rest to stable", args.listen, args.weight);
    signals.next().await;
    signals.drain(&handle.published, args.drain_ms).await;
    shutdown.cancel();
    ended.await??;
    access.flush(FLUSH_MAX).await;
    Ok(Exit::Done)
}

/// Returns what a node would publish whose cluster had committed this weight.
fn view_of(args: &ProxyArgs) -> anyhow::Result<View> {
    let id = args.name.clone();
    let backend = |version: &str, urls: &[String]| anyhow::Ok(Backend::new(VersionId::new(version)?, urls.into()));
    let stage = |weight| Stage { weight, hold_ms: 0, manual: true };
    let weights = [args.weight, Weight::FULL];
    let from = usize::from(args.weight == Weight::FULL);
    let stages = weights[from..].iter().map(|weight| stage(*weight)).collect();
    let spec = RolloutSpec {
        on_partition: OnPartition::Hold,
        ..RolloutSpec::new(id.clone(), backend("stable", &args.stable)?, backend("canary", &args.canary)?, stages)
    };
    let spec = Arc::new(spec.checked()?);
    let stamp = Stamp { tx: TxId::new("proxy")?, at: BootClock.now().wall };
    let service = Service::after(None, &id, &Change::Start(spec.clone()), &stamp).context("a first rollout")?;
    Ok(View::fixed(NodeId::new("proxy")?, service))
}
