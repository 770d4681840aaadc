//! `aviary load`: sends requests at a constant rate and counts the answers by version.
//!
//! The loop is open: requests leave by the clock, not when answers come, and latency counts from the moment a request
//! was due, so that a slow server can't hide behind fewer requests.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, Uri};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::output::{self, Format};
use super::{Exit, show, wall_ms};
use crate::domain::stats::Stats;
use crate::http_client::{HttpClient, HttpError, HttpSettings};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary load --url http://127.0.0.1:8081/predict,http://127.0.0.1:8082/predict \
    --rate 200 --duration 30s\n\n-o json prints one object per second, then a last one with \"summary\": true.\n\
    Exit code 2: no request was answered.")]
pub struct LoadArgs {
    /// URLs to send requests to, in turn.
    #[arg(long, value_delimiter = ',', required = true, value_name = "URL[,URL…]")]
    url: Vec<Uri>,
    /// Requests per second, over all URLs.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rate: u64,
    /// Duration of the run; default: until Ctrl-C.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Add a header X-User-ID, drawn at random from this many users.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    users: Option<u64>,
    /// Body to send with POST; without it, requests are GET.
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
    /// Maximum of concurrent requests; a request that would exceed it is counted as not sent.
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    concurrency: u64,
    /// Also write the output of -o json to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Maximum wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Maximum wait for a whole answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What became of one request: when, how long, which status and version.
#[derive(Debug, Clone)]
struct Sample {
    node: Arc<str>,
    /// The version that answered, by `x-served-by`; `none` when the header or the answer is missing.
    version: String,
    /// The HTTP status; none when there was no answer.
    status: Option<u16>,
    latency_us: u64,
    sent_ms: u64,
    done_ms: u64,
}

impl Sample {
    fn failed(&self) -> bool {
        !self.status.is_some_and(|status| (200..300).contains(&status))
    }
}

/// Answers of one version, counted at one node or at all of them.
#[derive(Debug, Clone, Default)]
struct VersionResponses {
    count: u64,
    non_2xx: u64,
    first_ms: Option<u64>,
    last_ms: Option<u64>,
    last_sent_ms: Option<u64>,
    first_failed_ms: Option<u64>,
}

impl VersionResponses {
    fn add(&mut self, sample: &Sample) {
        self.count += 1;
        self.non_2xx += u64::from(sample.failed());
        self.first_ms = Some(self.first_ms.map_or(sample.done_ms, |t| t.min(sample.done_ms)));
        self.last_ms = self.last_ms.max(Some(sample.done_ms));
        self.last_sent_ms = self.last_sent_ms.max(Some(sample.sent_ms));
        if sample.failed() {
            self.first_failed_ms = Some(self.first_failed_ms.map_or(sample.done_ms, |t| t.min(sample.done_ms)));
        }
    }

    /// Returns the milliseconds from its first failed answer to its last answer of any kind.
    fn exposed_ms(&self) -> Option<u64> {
        Some(self.last_ms?.saturating_sub(self.first_failed_ms?))
    }

    fn json(&self) -> Value {
        json!({ "count": self.count, "non_2xx": self.non_2xx, "first_ms": self.first_ms, "last_ms": self.last_ms,
            "last_sent_ms": self.last_sent_ms, "first_failed_ms": self.first_failed_ms,
            "exposed_ms_after_first_failure": self.exposed_ms() })
    }
}

/// Everything counted in a second, or in the whole run.
#[derive(Debug, Default)]
struct LoadTally {
    latency: Stats,
    statuses: BTreeMap<String, u64>,
    versions: BTreeMap<String, VersionResponses>,
    nodes: BTreeMap<Arc<str>, BTreeMap<String, VersionResponses>>,
    not_sent: u64,
}

impl LoadTally {
    fn add(&mut self, sample: &Sample) {
        self.latency.record(sample.latency_us, sample.failed());
        let status = sample.status.map_or("no answer".into(), |status| status.to_string());
        *self.statuses.entry(status).or_default() += 1;
        self.versions.entry(sample.version.clone()).or_default().add(sample);
        let node = self.nodes.entry(sample.node.clone()).or_default();
        node.entry(sample.version.clone()).or_default().add(sample);
    }

    fn quantile(&self, q: f64) -> f64 {
        (self.latency.quantile_ms(q).unwrap_or(0.0) * 10.0).round() / 10.0
    }

    fn shares(&self) -> String {
        let share = |(name, answers): (&String, &VersionResponses)| {
            format!("{name} {:.1} %", answers.count as f64 * 100.0 / self.latency.count.max(1) as f64)
        };
        self.versions.iter().map(share).collect::<Vec<_>>().join("  ")
    }

    fn line(&self, ts_ms: u64) -> String {
        let not_sent = if self.not_sent > 0 { format!("  not sent {}", self.not_sent) } else { String::new() };
        let (time, count, shares) = (show::clock_of(ts_ms), self.latency.count, self.shares());
        let (errors, p50, p99) = (self.latency.errors, self.quantile(0.5), self.quantile(0.99));
        format!("{time}  {count} req/s  {shares}  non-2xx {errors}{not_sent}  p50 {p50} ms p99 {p99} ms")
    }

    fn summary(&self) -> String {
        let (count, errors) = (self.latency.count, self.latency.errors);
        let head = format!("{count} requests  {}  non-2xx {errors}  not sent {}", self.shares(), self.not_sent);
        let tail =
            format!("p50 {} ms p95 {} ms p99 {} ms", self.quantile(0.5), self.quantile(0.95), self.quantile(0.99));
        let exposed = self.versions.iter().filter_map(|(name, answers)| {
            let ms = answers.exposed_ms()?;
            Some(format!("\n{name}: {ms} ms from its first failed answer to its last answer at any node"))
        });
        format!("{head}  {tail}{}", exposed.collect::<String>())
    }

    fn json(&self, ts_ms: u64, summary: bool) -> Value {
        let versions = |all: &BTreeMap<String, VersionResponses>| -> Value {
            all.iter().map(|(name, answers)| (name.clone(), answers.json())).collect::<serde_json::Map<_, _>>().into()
        };
        let nodes: serde_json::Map<_, _> = self.nodes.iter().map(|(n, all)| (n.to_string(), versions(all))).collect();
        json!({ "ts_ms": ts_ms, "summary": summary, "count": self.latency.count, "non_2xx": self.latency.errors,
            "not_sent": self.not_sent, "statuses": self.statuses, "versions": versions(&self.versions),
            "nodes": nodes, "p50_ms": self.quantile(0.5), "p95_ms": self.quantile(0.95), "p99_ms": self.quantile(0.99) })
    }
}

/// Sends traffic until its time is over or Ctrl-C.
pub async fn run(args: LoadArgs, format: Format) -> anyhow::Result<Exit> {
    let mut printer = Printer::new(&args, format)?;
    let (samples, mut done) = mpsc::unbounded_channel();
    let mut sender = Sender::new(&args, samples)?;
    let started = Instant::now();
    let end = started + args.duration.unwrap_or(Duration::from_secs(365 * 24 * 3600));
    let (mut beat, mut second) = (interval(Duration::from_millis(1)), interval(Duration::from_secs(1)));
    beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
    second.tick().await;
    let (mut total, mut recent) = (LoadTally::default(), LoadTally::default());
    let mut interrupted = std::pin::pin!(stop_signal());
    loop {
        tokio::select! {
            biased;
            result = &mut interrupted => { result?; break }
            _ = second.tick() => {
                printer.second(&std::mem::take(&mut recent))?;
            }
            now = beat.tick() => {
                let not_sent = sender.send_due(started, now.min(end - Duration::from_micros(1)));
                (total.not_sent, recent.not_sent) = (total.not_sent + not_sent, recent.not_sent + not_sent);
                if now >= end { break }
            }
            Some(sample) = done.recv() => {
                total.add(&sample);
                recent.add(&sample);
            }
        }
    }
    drop(sender);
    while let Ok(Some(sample)) = timeout(ANSWER_MAX, done.recv()).await {
        total.add(&sample);
    }
    printer.summary(&total)?;
    let answered = total.statuses.keys().any(|status| status != "no answer");
    Ok(if answered { Exit::Done } else { Exit::Unavailable })
}

async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

/// Sends each request when it is due.
struct Sender {
    http: HttpClient,
    targets: Vec<(Uri, Arc<str>)>,
    body: Option<Bytes>,
    users: Option<u64>,
    rate: u64,
    sent: u64,
    room: Arc<Semaphore>,
    samples: mpsc::UnboundedSender<Sample>,
}

impl Sender {
    fn new(args: &LoadArgs, samples: mpsc::UnboundedSender<Sample>) -> anyhow::Result<Self> {
        let target = |uri: &Uri| match (uri.scheme_str(), uri.authority()) {
            (Some("http"), Some(authority)) => Ok((uri.clone(), Arc::from(authority.as_str()))),
            _ => Err(anyhow::anyhow!("url is {uri}, expected http://host:port/path")),
        };
        Ok(Self {
            http: HttpClient::new(HttpSettings::new(CONNECT_MAX)),
            targets: args.url.iter().map(target).collect::<Result<_, _>>()?,
            body: args.body.clone().map(Bytes::from),
            users: args.users,
            rate: args.rate,
            sent: 0,
            room: Arc::new(Semaphore::new(args.concurrency as usize)),
            samples,
        })
    }

    /// Sends what is due by `now`, and returns how many of it could not be sent for want of room.
    fn send_due(&mut self, started: Instant, now: Instant) -> u64 {
        let mut not_sent = 0;
        loop {
            let at = started + due_after(self.sent, self.rate);
            if at > now {
                return not_sent;
            }
            not_sent += u64::from(!self.send_one(at));
            self.sent += 1;
        }
    }

    fn send_one(&self, due: Instant) -> bool {
        let Ok(permit) = self.room.clone().try_acquire_owned() else { return false };
        let (uri, node) = &self.targets[(self.sent % self.targets.len() as u64) as usize];
        let (node, request) = (node.clone(), self.request(uri));
        let (http, samples) = (self.http.clone(), self.samples.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let sent_ms = wall_ms();
            let (status, version) = match timeout(ANSWER_MAX, ask(&http, request)).await {
                Ok(Ok((status, version))) => (Some(status), version),
                Ok(Err(_)) | Err(_) => (None, "none".into()),
            };
            let latency_us = due.elapsed().as_micros() as u64;
            let _ = samples.send(Sample { node, version, status, latency_us, sent_ms, done_ms: wall_ms() });
        });
        true
    }

    fn request(&self, uri: &Uri) -> Request<Full<Bytes>> {
        let method = if self.body.is_some() { Method::POST } else { Method::GET };
        let mut request = Request::builder().method(method).uri(uri.clone());
        if self.body.is_some() {
            request = request.header("content-type", "application/json");
        }
        if let Some(users) = self.users {
            request = request.header("x-user-id", format!("user-{}", rand::random_range(0..users)));
        }
        request.body(Full::from(self.body.clone().unwrap_or_default())).expect("the parts were checked before")
    }
}

/// Returns when request number `index` is due, counted from the start: the first one at once.
fn due_after(index: u64, rate: u64) -> Duration {
    Duration::from_micros((u128::from(index) * 1_000_000 / u128::from(rate)) as u64)
}

/// Returns the status and the version that served, once the whole answer has arrived. Its body is dropped, whatever its size.
async fn ask(http: &HttpClient, request: Request<Full<Bytes>>) -> Result<(u16, String), HttpError> {
    let mut answer = http.open(request, ANSWER_MAX).await?;
    answer.discard().await?;
    let version = answer.headers.get("x-served-by").and_then(|v| v.to_str().ok()).unwrap_or("none");
    Ok((answer.status.as_u16(), version.to_owned()))
}

/// Prints for people or scripts, and keeps the report.
struct Printer {
    format: Format,
    report: Option<(PathBuf, std::fs::File)>,
}

impl Printer {
    fn new(args: &LoadArgs, format: Format) -> anyhow::Result<Self> {
        let report = match &args.report {
            Some(path) => {
                Some((path.clone(), std::fs::File::create(path).with_context(|| path.display().to_string())?))
            }
            None => None,
        };
        Ok(Self { format, report })
    }

    fn second(&mut self, tally: &LoadTally) -> anyhow::Result<()> {
        let now = wall_ms();
        self.print(&tally.json(now, false), || tally.line(now))
    }

    fn summary(&mut self, tally: &LoadTally) -> anyhow::Result<()> {
        self.print(&tally.json(wall_ms(), true), || tally.summary())
    }

    fn print(&mut self, json: &Value, line: impl FnOnce() -> String) -> anyhow::Result<()> {
        use std::io::Write;
        if let Some((path, file)) = &mut self.report {
            writeln!(file, "{json}").with_context(|| path.display().to_string())?;
        }
        match self.format {
            Format::Table => output::line(&line()),
            Format::Json => output::line(&json.to_string()),
            Format::Yaml => output::put(&format!("---\n{}", serde_saphyr::to_string(json)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(version: &str, status: u16, done_ms: u64) -> Sample {
        let (node, version) = ("n".into(), version.into());
        Sample { node, version, status: Some(status), latency_us: 2_000, sent_ms: done_ms - 2, done_ms }
    }

    #[test]
    fn exposure_is_measured_from_the_first_failure_to_the_last_answer() {
        let mut tally = LoadTally::default();
        let samples = [("v2", 200, 100), ("v2", 500, 400), ("v2", 200, 300), ("v2", 500, 650), ("v1", 200, 900)];
        samples.iter().for_each(|(version, status, ms)| tally.add(&sample(version, *status, *ms)));
        assert_eq!((tally.versions["v2"].exposed_ms(), tally.versions["v1"].exposed_ms()), (Some(250), None));
        let json = tally.json(1_000, true);
        assert_eq!(json["nodes"]["n"]["v2"]["last_ms"], 650);
        assert_eq!(json["versions"]["v2"]["exposed_ms_after_first_failure"], 250);
        assert_eq!(json["statuses"], json!({"200": 3, "500": 2}));
    }

    #[test]
    fn requests_are_due_by_the_clock_alone() {
        assert_eq!(due_after(0, 200), Duration::ZERO);
        assert_eq!((due_after(1, 200), due_after(400, 200)), (Duration::from_millis(5), Duration::from_secs(2)));
    }

    #[test]
    fn a_second_is_one_line() {
        let mut tally = LoadTally::default();
        (0..19).for_each(|_| tally.add(&sample("v1", 200, 10)));
        tally.add(&sample("v2", 503, 10));
        assert_eq!(tally.line(3_723_000), "01:02:03  20 req/s  v1 95.0 %  v2 5.0 %  non-2xx 1  p50 2 ms p99 2 ms");
    }
}
