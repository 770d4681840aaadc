//! Operators, users, and the judge who asks again in the end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use turmoil::net::TcpStream;

use crate::cluster::{Cluster, LEASE_MS, NAMES};
use crate::host::{API, DATA};
use crate::trace::SharedTrace;
use sim::dice::Dice;

/// A change that was asked for, and what came of it.
#[derive(Debug, Clone)]
pub struct ProbeAnswer {
    pub key: String,
    pub verb: &'static str,
    /// COMMITTED, ABORTED, or why neither: the HTTP status, 0 for no answer.
    pub word: String,
    pub slot: u64,
    /// What was said beside it.
    pub why: String,
    /// When it was asked and answered, in virtual milliseconds.
    pub asked: u64,
    pub told: u64,
}

impl ProbeAnswer {
    pub fn decided(&self) -> bool {
        ["COMMITTED", "ABORTED"].contains(&self.word.as_str())
    }
}

/// An answer of `/predict`: when a client got it, and which version gave it.
#[derive(Debug, Clone)]
pub struct ServedAnswer {
    pub at: u64,
    pub version: String,
}

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(4);

const ROLLOUT: &str = "apiVersion: aviary/v1\nkind: Rollout\nmetadata: { name: svc }\nspec:\n  \
    stable: { version: v1, answer: node }\n  canary: { version: v2, answer: node }\n  steps:\n    - setWeight: 20\n    - pause: {}\n    \
    - setWeight: 50\n    - pause: {}\n    - setWeight: 100\n    - pause: {}\n  analysis:\n    window: 30s\n    \
    minSamples: 5\n    metrics:\n      - { name: errors, strategy: THRESHOLD, thresholdRange: { max: 5 }, onFailure: rollback }\n";

fn now() -> u64 {
    turmoil::sim_elapsed().unwrap_or_default().as_millis() as u64
}

/// Sends one request; none without an answer in time.
async fn call(
    trace: &SharedTrace,
    node: &str,
    port: u16,
    path: &str,
    key: Option<&str>,
    body: &str,
) -> Option<(u16, hyper::HeaderMap, Bytes)> {
    let exchange = async {
        let stream = TcpStream::connect((node, port)).await.ok()?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
        let connection = tokio::spawn(connection);
        let kind = if body.starts_with("apiVersion") { "application/yaml" } else { "application/json" };
        let mut request = Request::post(path).header("host", node).header("content-type", kind);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).ok()?;
        let (head, body) = sender.send_request(request).await.ok()?.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        connection.abort();
        Some((head.status.as_u16(), head.headers, body))
    };
    trace.add(node, "asked", body.as_bytes(), || format!("{port} {path} {key:?}"));
    let answer = tokio::time::timeout(PATIENCE, exchange).await.ok().flatten();
    let (status, said) = answer.as_ref().map_or((0, &[][..]), |(status, _, body)| (*status, &body[..]));
    trace.add(node, "answers", said, || format!("{status} {}", String::from_utf8_lossy(said)));
    answer
}

async fn change(trace: &SharedTrace, node: &str, verb: &'static str, key: &str) -> ProbeAnswer {
    let (path, body) = match verb {
        "apply" => ("/v1/rollouts".to_string(), ROLLOUT),
        verb => (format!("/v1/rollouts/svc/{verb}"), "{}"),
    };
    let asked = now();
    let answer = call(trace, node, API, &path, Some(key), body).await;
    let json: Value = answer.as_ref().and_then(|(_, _, body)| serde_json::from_slice(body).ok()).unwrap_or_default();
    let status = answer.map_or(0, |(status, ..)| status);
    let word = json["code"].as_str().or(json["status"].as_str()).map_or_else(|| status.to_string(), Into::into);
    let why = json["detail"].as_str().unwrap_or_default().to_string();
    ProbeAnswer { key: key.into(), verb, word, slot: json["slot"].as_u64().unwrap_or(0), why, asked, told: now() }
}

/// Changes things at random until it is quiet.
pub async fn operate(cluster: Cluster) -> turmoil::Result {
    let mut dice = Dice::new(cluster.seed ^ 0x6f70);
    // The nodes elect a coordinator meanwhile: a change before that is refused, and tests nothing.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let (mut number, mut begun) = (0, false);
    while !cluster.quiet.load(Ordering::Relaxed) {
        number += 1;
        let verbs = ["apply", "apply", "retry", "promote", "abort", "pause", "resume", "abort", "retry"];
        let verb = if begun { *dice.pick::<&'static str>(&verbs) } else { "apply" };
        let answered = change(&cluster.trace, NAMES[dice.below(3)], verb, &format!("k{number}")).await;
        begun |= answered.word == "COMMITTED";
        cluster.answered.lock().expect("nobody panics with it").push(answered);
        // How often people change something.
        tokio::time::sleep(Duration::from_millis(dice.between(10, 700))).await;
    }
    Ok(())
}

/// Asks all nodes for predictions until the judge is done, and reports each: what a node answers by itself is no evidence.
pub async fn use_it(cluster: Cluster) -> turmoil::Result {
    let mut dice = Dice::new(cluster.seed ^ 0x7573);
    let mut number = 0_u64;
    while !cluster.judged.load(Ordering::Relaxed) {
        let node = NAMES[dice.below(3)];
        if let Some((200, headers, _)) = call(&cluster.trace, node, DATA, "/predict", None, "{}").await {
            let version = headers.get("x-served-by").and_then(|value| value.to_str().ok()).unwrap_or("").to_string();
            number += 1;
            let at_ms = turmoil::since_epoch().unwrap_or_default().as_millis() as u64;
            let event = json!({
                "service": "svc", "version": version, "status": 200, "latency_ms": 2, "event_time": at_ms,
                "event_id": format!("e{number}"),
            });
            call(&cluster.trace, node, API, "/v1/telemetry", None, &event.to_string()).await;
            cluster.served.lock().expect("nobody panics with it").push(ServedAnswer { at: now(), version });
        }
        // How often a client sends a request.
        tokio::time::sleep(Duration::from_millis(dice.between(5, 40))).await;
    }
    Ok(())
}

/// Asks for everything again: what was told stays so, on every node; and a rollback and a start are decided in time.
pub async fn judge(cluster: Cluster) -> turmoil::Result {
    let answered = cluster.answered.lock().expect("nobody panics with it").clone();
    for (n, before) in answered.iter().filter(|answer| answer.decided()).enumerate() {
        let again = change(&cluster.trace, NAMES[n % 3], before.verb, &before.key).await;
        if (&again.word, again.slot) != (&before.word, before.slot) {
            return Err(format!("I5: told {before:?}, later {again:?}").into());
        }
    }
    // Whatever is going on ends here; the answers say that nobody's permission was needed, or that nothing goes on.
    let apply = change(&cluster.trace, "a", "apply", "judge-apply").await;
    // Each asks another node, which may hear of the one before a little later.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let retry = change(&cluster.trace, "a", "retry", "judge-retry").await;
    // As above: `b` hears of it.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let abort = change(&cluster.trace, "b", "abort", "judge-abort").await;
    cluster.answered.lock().expect("nobody panics with it").extend([apply.clone(), retry.clone(), abort.clone()]);
    let over = abort.why.contains("expected one in progress");
    if !(["COMMITTED", "UNCHANGED"].contains(&abort.word.as_str()) || over) || abort.told - abort.asked > 3_500 {
        return Err(format!(
            "liveness: a rollback after healing came to {abort:?}; before it, {apply:?} and {retry:?}"
        )
        .into());
    }
    let mut states = Vec::new();
    for node in NAMES {
        let stream = call(&cluster.trace, node, API, "/v1/rollouts/svc/abort", Some("judge-abort"), "{}").await;
        states.push(stream.map(|(status, _, body)| (status, String::from_utf8_lossy(&body).into_owned())));
    }
    if states.iter().any(Option::is_none) {
        return Err(format!("liveness: a healed node doesn't answer: {states:?}").into());
    }
    cluster.judged.store(true, Ordering::Relaxed);
    Ok(())
}

/// I9, as users see it: once a rollback was told, nobody serves the canary for longer than a lease, until a later start.
/// A rollout that completed makes the canary stable, and ends the audit.
pub fn audit(answered: &[ProbeAnswer], served: &[ServedAnswer]) -> anyhow::Result<()> {
    let committed: Vec<_> = answered.iter().filter(|answer| answer.word == "COMMITTED").collect();
    let promotions = |before: u64| answered.iter().filter(|a| a.verb == "promote" && a.asked < before).count();
    for rollback in committed.iter().filter(|answer| answer.verb == "abort") {
        if promotions(rollback.told) >= 3 {
            // It may have been completed by promotions whose answers were lost.
            break;
        }
        let from = rollback.told + LEASE_MS * 101 / 100 + 50;
        let starts = answered.iter().filter(|a| ["apply", "retry"].contains(&a.verb) && a.told > rollback.asked);
        let until = starts.map(|start| start.asked).min().unwrap_or(u64::MAX).max(rollback.told);
        let late = served.iter().find(|served| served.version == "v2" && served.at > from && served.at < until);
        ensure!(late.is_none(), "I9: {late:?} after {rollback:?}");
    }
    Ok(())
}
