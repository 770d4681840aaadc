//! `aviary router start`: the router itself.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{FileArgs, load};
use crate::adapters::kafka::KafkaRouter;
use crate::adapters::listen::listen;
use crate::api;
use crate::cli::Exit;
use crate::client::{Address, Api};
use crate::config::router::RouterConfig;
use crate::router::serve::{Beside, Ended, serve};

/// Arguments of `aviary router start`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  aviary router plan -f orders.yaml\n  aviary router start -f orders.yaml --listen 127.0.0.1:9500\n  \
    aviary router set-weight 10 -f orders.yaml\n  aviary router audit -f orders.yaml\n  aviary router promote -f orders.yaml\n\n\
    All state is in the broker: a router that is started again, on any machine, continues. Of two routers the older one ends.\n\
    Exit codes: 0 the rollout ended, or SIGINT or SIGTERM; 1 another router took over, or the file has an error."
)]
pub struct StartArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Address for /metrics, /status and /livez, `host:port`; default: none.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Interval of audits; 0s disables them.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    audit_every: Duration,
    /// File with the bearer token for the cluster's API; default: the variable AVIARY_TOKEN.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Runs a router until the rollout is over, or SIGINT or SIGTERM.
pub fn run(args: &StartArgs) -> anyhow::Result<Exit> {
    let config = load(&args.file)?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(colours).compact().init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let exit = runtime.block_on(start(args, config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    exit
}

async fn start(args: &StartArgs, config: RouterConfig) -> anyhow::Result<Exit> {
    let metrics = api::metrics::install();
    let status = match &args.listen {
        Some(address) => Some((listen("status", address).await?, metrics)),
        None => None,
    };
    let cluster = match &config.follow {
        Some(follow) => {
            let addresses: Result<Vec<Address>, _> = follow.api.iter().map(|url| url.parse()).collect();
            Some(Api::new(addresses.map_err(anyhow::Error::msg)?, args.token_file.as_deref())?)
        }
        None => None,
    };
    let beside = Beside { cluster, status, audit_every: args.audit_every };
    let (name, world) = (config.name.clone(), Arc::new(KafkaRouter::new(config.clone())));
    match serve(config, world, beside, until_signal()?).await? {
        Ended::Over => info!(router = %name, "the rollout is over"),
        Ended::Stopped => info!(router = %name, "stopped; start it again to go on"),
        Ended::Unanswered => {}
    }
    Ok(Exit::Done)
}

/// Returns what is cancelled by SIGINT or SIGTERM.
fn until_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping");
        stop.cancel();
    });
    Ok(shutdown)
}
