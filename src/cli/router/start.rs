//! `aviary router start`: the router itself.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::routing::get;
use clap::Args;
use http::header;
use metrics::{counter, gauge};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::audit::compare;
use super::{FileArgs, broker, load};
use crate::adapters::clock::BootClock;
use crate::adapters::hooks::ServiceHooks;
use crate::adapters::kafka::KafkaPush;
use crate::adapters::post::HttpPost;
use crate::api;
use crate::cli::Exit;
use crate::cli::client::{Address, Api, segment};
use crate::config::router::{Push, RouterConfig};
use crate::domain::course::{RouterEnd, RouterPhase};
use crate::domain::split::Side;
use crate::domain::time::Mono;
use crate::domain::weights::Weight;
use crate::ports::{Clock, OutsideError};
use crate::router::engine::{CommittedWeight, Engine, Plan, Report, Steering, Turn};
use crate::router::push::{PushPlan, Pushed, Pusher};
use crate::router::run;

/// Arguments of `aviary router start`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  aviary router plan -f orders.yaml\n  aviary router start -f orders.yaml --listen 127.0.0.1:9500\n  \
    aviary router set-weight 10 -f orders.yaml\n  aviary router audit -f orders.yaml\n  aviary router promote -f orders.yaml\n\n\
    All state is in the broker: started again, anywhere, it goes on where it was; started twice, the first one ends.\n\
    Exit codes: 0 the rollout is over, or it was told to stop; 1 another router has taken over, or the file is wrong."
)]
pub struct StartArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Serve /metrics, /status and /livez here.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// How often the topics are compared meanwhile; 0s: never.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    audit_every: Duration,
    /// File that holds the bearer token for the cluster's API; without it AVIARY_TOKEN is read.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Between two questions to the cluster.
const ASK: Duration = Duration::from_millis(200);
/// Between two lines on how it goes.
const PROGRESS: Duration = Duration::from_secs(10);
/// Longest wait for the end of a turn when told to stop.
const STOP_MAX: Duration = Duration::from_secs(15);

/// Runs a router until the rollout is over, or SIGINT or SIGTERM.
pub fn run(args: &StartArgs) -> anyhow::Result<Exit> {
    let config = load(&args.file)?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(colours).compact().init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let exit = runtime.block_on(serve(args, config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    exit
}

async fn serve(args: &StartArgs, config: RouterConfig) -> anyhow::Result<Exit> {
    let metrics = api::metrics::install();
    let (told, status) = watch::channel::<Option<Report>>(None);
    if let Some(address) = &args.listen {
        let listener = crate::adapters::listen::listen("status", address).await?;
        let app = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/status", get(move || async move { axum::Json(show(status.borrow().as_ref())) }))
            .route(
                "/metrics",
                get(move || async move {
                    metrics.run_upkeep();
                    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
                }),
            );
        tokio::spawn(async move { axum::serve(listener, app).await });
    }
    let shutdown = CancellationToken::new();
    let (steer, steering) = watch::channel(None::<(CommittedWeight, Mono)>);
    if let Some(follow) = &config.follow {
        let addresses: Vec<Address> =
            follow.api.iter().map(|url| url.parse()).collect::<Result<_, _>>().map_err(anyhow::Error::msg)?;
        let api = Api::new(addresses, args.token_file.as_deref())?;
        tokio::spawn(ask_cluster(api, config.clone(), steer));
    }
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping");
        stop.cancel();
    });
    if !args.audit_every.is_zero() && config.push.is_none() {
        tokio::spawn(audit(config.clone(), args.audit_every, shutdown.clone()));
    }
    let (name, stop) = (config.name.clone(), shutdown.clone());
    let thread = tokio::task::spawn_blocking(move || work(&config, &steering, &told, &stop));
    let ended = tokio::select! {
        ended = thread => ended,
        () = async { shutdown.cancelled().await; tokio::time::sleep(STOP_MAX).await } => {
            warn!("the broker has not answered: what is not committed is read again by the next router");
            return Ok(Exit::Done);
        }
    };
    match ended?? {
        true => info!(router = %name, "the rollout is over"),
        false => info!(router = %name, "stopped; start it again to go on"),
    }
    Ok(Exit::Done)
}

/// The thread of a router that posts records.
#[expect(clippy::disallowed_methods, reason = "a router has a thread of its own")]
fn push(
    config: &RouterConfig,
    push: &Push,
    steer: &dyn Fn() -> Steering,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let group = &config.service(Side::Stable).group;
    let plan = PushPlan {
        salt: salt(config),
        keyed: config.keyed,
        attempts: push.attempts,
        in_flight: push.in_flight,
        // A batch is committed when its slowest record is done.
        batch_max: config.batch_max.min(push.in_flight * 16),
        interval: Duration::from_millis(config.interval_ms),
    };
    let post = Arc::new(HttpPost::new(push, &config.source));
    let open = || {
        let source = KafkaPush::new(&config.kafka, &config.source, group, &push.dead_letter)?;
        Pusher::new(Box::new(source), post.clone(), plan.clone())
    };
    let mut pusher = Some(open()?);
    info!("posting records of {} to {} in the place of group {group}", config.source, push.url);
    let (mut said, mut total, mut waits) = (BootClock.now().mono, 0, false);
    while !shutdown.is_cancelled() {
        let weight = match steer() {
            Steering::Alone => config.weight,
            Steering::Cluster(Some(committed)) => committed.weight,
            Steering::Cluster(None) => {
                if !std::mem::replace(&mut waits, true) {
                    info!("waiting for the cluster: what it has committed isn't known");
                }
                std::thread::sleep(ASK);
                continue;
            }
        };
        waits = false;
        // After an error it begins anew, at the place that was committed: what was read since is read again.
        let turn = match pusher.take() {
            Some(mut open) => open.turn(weight).map(|pushed| (open, pushed)),
            None => open().map(|open| (open, Pushed::default())),
        };
        match turn {
            Ok((open, pushed)) => {
                pusher = Some(open);
                for (version, count) in pushed.done {
                    counter!("aviary_router_records_total", "version" => version).increment(count);
                    total += count;
                }
                counter!("aviary_router_dead_letters_total").increment(pushed.given_up);
            }
            Err(why) => {
                counter!("aviary_router_errors_total").increment(1);
                warn!("begins anew: {why}");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        let now = BootClock.now().mono;
        if now.millis_since(said) >= PROGRESS.as_millis() as u64 {
            info!("{total} records done");
            said = now;
        }
    }
    Ok(())
}

/// Makes tickets of keys as the data plane does for a rollout of this name.
fn salt(config: &RouterConfig) -> u64 {
    xxhash_rust::xxh3::xxh3_64(config.name.as_str().as_bytes())
}

/// The router's thread.
fn work(
    config: &RouterConfig,
    steering: &watch::Receiver<Option<(CommittedWeight, Mono)>>,
    told: &watch::Sender<Option<Report>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<bool> {
    let follows = config.follow.is_some();
    let steer = || match follows {
        false => Steering::Alone,
        true => {
            let known = steering.borrow();
            let known = known.as_ref().filter(|(_, until)| BootClock.now().mono < *until);
            Steering::Cluster(known.map(|(committed, _)| committed.clone()))
        }
    };
    if let Some(settings) = &config.push {
        return push(config, settings, &steer, shutdown).map(|()| false);
    }
    let broker = broker(config)?;
    let made = broker.prepare().context("the router's topics")?;
    if !made.is_empty() {
        info!("made topics {}", made.join(", "));
    }
    let plan = Plan {
        salt: salt(config),
        keyed: config.keyed,
        weight: config.weight,
        lag_max: config.lag_max,
        change_ms_max: config.change_ms_max,
        interval: Duration::from_millis(config.interval_ms),
        batch_max: config.batch_max,
    };
    let mut engine = Engine::new(Box::new(broker), Box::new(ServiceHooks::new(config)), plan);
    let clock = BootClock;
    let (mut looked, mut said, mut taken) = (clock.now().mono, clock.now().mono, None);
    let mut tell = |engine: &Engine, turn: &Result<Turn, OutsideError>| {
        match turn {
            Ok(Turn::Busy(copied)) => counter!("aviary_router_copied_total").increment(*copied as u64),
            Err(_) => counter!("aviary_router_errors_total").increment(1),
            Ok(_) => {}
        }
        let now = clock.now().mono;
        if now.millis_since(looked) < 500 {
            return;
        }
        looked = now;
        let Some(report) = engine.report() else { return };
        measure(&report);
        let total: u64 = report.splits.iter().map(|split| split.taken()).sum();
        let passed_ms = now.millis_since(said);
        if passed_ms >= PROGRESS.as_millis() as u64 {
            let rate = total.saturating_sub(taken.unwrap_or(total)) * 1000 / passed_ms;
            if taken.is_some_and(|before| before != total) {
                info!(
                    records = total,
                    stable = report.given(Side::Stable),
                    canary = report.given(Side::Canary),
                    canary_lag = report.lag,
                    "{rate} records/s"
                );
            }
            (said, taken) = (now, Some(total));
        }
        told.send_replace(Some(report));
    };
    Ok(run::run(&mut engine, &clock, &steer, shutdown, &mut tell)?)
}

fn measure(report: &Report) {
    for side in Side::BOTH {
        gauge!("aviary_router_records", "version" => side.word()).set(report.given(side) as f64);
    }
    let weight = report.splits.iter().map(|split| split.weight().0).max().unwrap_or_default();
    gauge!("aviary_router_weight").set(weight.fraction());
    gauge!("aviary_router_canary_lag").set(report.lag as f64);
    let changing = report.splits.iter().filter(|split| split.former().is_some()).count();
    gauge!("aviary_router_partitions_changing").set(changing as f64);
}

fn show(report: Option<&Report>) -> Value {
    let Some(report) = report else { return serde_json::json!({ "phase": "opening" }) };
    serde_json::json!({
        "phase": report.phase.as_ref().map_or("not started", RouterPhase::words),
        "stable": report.given(Side::Stable), "canary": report.given(Side::Canary), "canary_lag": report.lag, "next": report.next,
        "weights": report.splits.iter().map(|split| split.weight().0.fraction()).collect::<Vec<_>>(),
    })
}

/// Asks the cluster what it has committed. An answer counts as long as the node that gave it may act by it: for its lease, from the
/// moment it was asked.
async fn ask_cluster(api: Api, config: RouterConfig, steer: watch::Sender<Option<(CommittedWeight, Mono)>>) {
    let path = format!("/routing/state?service={}", segment(config.name.as_str()));
    let mut ticks = tokio::time::interval(ASK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut said, mut newest) = (String::new(), 0);
    loop {
        ticks.tick().await;
        let asked = BootClock.now().mono;
        let mut failed = Vec::new();
        for address in api.addresses() {
            let answer = tokio::time::timeout(Duration::from_secs(1), api.get_from(address, &path)).await;
            let known = match answer {
                Err(_) => Err("no answer within 1 s".to_string()),
                Ok(Err(why)) => Err(why),
                Ok(Ok(answer)) if answer.status.is_success() => read_state(&answer.json(), &config),
                Ok(Ok(answer)) => Err(answer.error()),
            };
            match known {
                // A node that lags may know only what was agreed before: that isn't gone back to.
                Ok((committed, _)) if committed.weight_version < newest => {
                    failed
                        .push(format!("{address}: knows version {} only, expected {newest}", committed.weight_version));
                }
                Ok((committed, lease)) => {
                    newest = committed.weight_version;
                    steer.send_replace(Some((committed, asked.after_ms(lease.as_millis() as u64))));
                    failed.clear();
                    break;
                }
                Err(why) => failed.push(format!("{address}: {why}")),
            }
        }
        let failed = failed.join(" · ");
        if failed != said && !failed.is_empty() {
            warn!("no node says what the cluster has committed: {failed}");
        }
        said = failed;
    }
}

/// Returns what a node's routing state says of a router's rollout, and for how long it may be acted by.
fn read_state(state: &Value, config: &RouterConfig) -> Result<(CommittedWeight, Duration), String> {
    let canary = config.service(Side::Canary).version.as_str();
    let stable = config.service(Side::Stable).version.as_str();
    let text = |key: &str| state[key].as_str().unwrap_or_default();
    if text("mode") != "normal" {
        return Err(format!("its mode is {:?}, expected \"normal\"", text("mode")));
    }
    let share = |version: &str| state["weights"][version].as_f64();
    let weight = Weight::from_percent(share(canary).unwrap_or(0.0) * 100.0).map_err(|why| why.to_string())?;
    let end = match text("phase") {
        "Completed" if share(canary) == Some(1.0) => Some(RouterEnd::Promote),
        "RolledBack" if share(stable) == Some(1.0) => Some(RouterEnd::Abort(text("reason").into())),
        _ if share(canary).is_none() || share(stable).is_none() => {
            return Err(format!("its weights are {}, expected those of {stable} and {canary}", state["weights"]));
        }
        _ => None,
    };
    // What is over needs no lease.
    let lease_ms = if end.is_some() { 10_000 } else { state["lease_ms_left"].as_u64().unwrap_or(0) };
    let weight_version = state["version"].as_u64().unwrap_or(0);
    match lease_ms {
        0 => Err("it holds no lease".into()),
        ms => Ok((CommittedWeight { weight, weight_version, end }, Duration::from_millis(ms))),
    }
}

/// Compares the topics from time to time.
async fn audit(config: RouterConfig, every: Duration, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        let config = config.clone();
        let compared = tokio::task::spawn_blocking(move || compare(&broker(&config)?)).await;
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
            Ok(Err(why)) => warn!("audit: {why:#}"),
            Err(why) => warn!("audit: {why}"),
        }
    }
}
