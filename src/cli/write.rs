//! Verbs that change something: `apply`, `promote`, `pause`, `resume`, `abort`, `retry`, `undo`.
//!
//! Each is sent under an idempotency key, and only ever repeated under that key: the cluster carries it out once.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::output::{self, Format, Tone, colours, paint};
use super::{Exit, show, status};
use crate::client::{Api, ApiResponse, Write, segment};

/// Options of every verb that changes something: its key and its time-out.
#[derive(Debug, Clone, Args)]
pub struct WriteArgs {
    /// Idempotency key: repeated requests with the same key are carried out once. Default: a random key, which is printed.
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// How long to retry, with the same key, while the outcome is unknown.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary apply -f config/rollout.yaml --wait")]
pub struct ApplyArgs {
    /// File of the rollout (YAML).
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Wait until the rollout ends, like `aviary status`.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    write: WriteArgs,
}

/// Arguments of verbs that need a name only.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Service whose rollout is changed.
    name: String,
    #[command(flatten)]
    write: WriteArgs,
}

#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// Service whose rollout is promoted.
    name: String,
    /// Promote to 100 %: skips the remaining steps and the wait for samples. Unhealthy nodes still refuse.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    write: WriteArgs,
}

/// Arguments of verbs that keep a reason for those who look later.
#[derive(Debug, Args)]
pub struct ReasonArgs {
    /// Service whose rollout is changed.
    name: String,
    /// Reason, recorded in the history.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    #[command(flatten)]
    write: WriteArgs,
}

/// The part of the file that `apply` reads; the node checks the rest.
#[derive(Deserialize)]
struct Named {
    metadata: FileMetadata,
}

#[derive(Deserialize)]
struct FileMetadata {
    name: String,
}

/// Starts a rollout; with `--wait`, follows it to its end.
pub async fn apply(api: &Api, args: ApplyArgs, format: Format) -> anyhow::Result<Exit> {
    let file = args.file.display();
    let body = std::fs::read_to_string(&args.file).with_context(|| file.to_string())?;
    let named: Named = serde_saphyr::from_str(&body).map_err(|e| anyhow::anyhow!("{file}: {e}"))?;
    let (exit, answer) = send(api, "/v1/rollouts".into(), "application/yaml", body, args.write, format).await?;
    if !args.wait || exit != Exit::Done {
        return Ok(exit);
    }
    let told = answer["slot"].as_u64();
    status::run(api, &status::StatusArgs::after(named.metadata.name, told), format).await
}

/// Promotes the canary to the next step, or to the end with `--full`.
pub async fn promote(api: &Api, args: PromoteArgs, format: Format) -> anyhow::Result<Exit> {
    operation(api, "promote", &args.name, &json!({ "full": args.full }), args.write, format).await
}

/// Sends a verb with a reason.
pub async fn with_reason(api: &Api, verb: &str, args: ReasonArgs, format: Format) -> anyhow::Result<Exit> {
    let body = if args.reason.is_empty() { json!({}) } else { json!({ "reason": args.reason }) };
    operation(api, verb, &args.name, &body, args.write, format).await
}

/// Sends a verb without anything else.
pub async fn with_name(api: &Api, verb: &str, args: NameArgs, format: Format) -> anyhow::Result<Exit> {
    operation(api, verb, &args.name, &json!({}), args.write, format).await
}

async fn operation(
    api: &Api,
    verb: &str,
    name: &str,
    body: &Value,
    args: WriteArgs,
    format: Format,
) -> anyhow::Result<Exit> {
    let path = format!("/v1/rollouts/{}/{verb}", segment(name));
    Ok(send(api, path, "application/json", body.to_string(), args, format).await?.0)
}

/// Sends a write, prints its outcome, and returns how the program ends by it and what the node answered.
pub async fn send(
    api: &Api,
    path: String,
    content_type: &'static str,
    body: String,
    args: WriteArgs,
    format: Format,
) -> anyhow::Result<(Exit, Value)> {
    let key = args.idempotency_key.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
    eprintln!("idempotency-key: {key}");
    let answer = api.write(&Write { path, key, content_type, body, patience: args.timeout }).await?;
    let exit = exit_of(&answer);
    output::print(format, &answer.body, |json| outcome(&answer, json, exit))?;
    Ok((exit, answer.json()))
}

/// Returns how the program ends after this answer to a write.
fn exit_of(answer: &ApiResponse) -> Exit {
    match answer.json()["status"].as_str().map(str::to_uppercase).as_deref() {
        Some("COMMITTED" | "UNCHANGED") => Exit::Done,
        Some("ABORTED" | "REFUSED") => Exit::Refused,
        _ => exit_of_status(answer.status),
    }
}

/// Returns how the program ends after an answer that says no more than its HTTP status.
pub fn exit_of_status(status: StatusCode) -> Exit {
    match status {
        _ if status.is_success() => Exit::Done,
        StatusCode::TOO_MANY_REQUESTS => Exit::Unavailable,
        _ if status.is_server_error() => Exit::Unavailable,
        _ => Exit::Refused,
    }
}

/// Returns an outcome for people: one line, then the reasons.
fn outcome(answer: &ApiResponse, json: &Value, exit: Exit) -> String {
    let tone = match exit {
        Exit::Done => Tone::Good,
        Exit::Unavailable => Tone::Odd,
        Exit::Refused | Exit::Usage => Tone::Bad,
    };
    let Some(status) = json["status"].as_str() else {
        let text = if exit == Exit::Done { "done".into() } else { answer.error() };
        return paint(colours(), tone, &text);
    };
    let parts = [
        paint(colours(), tone, status),
        show::number(json, "slot").map(|slot| format!("slot {slot}")).unwrap_or_default(),
        show::weights_of(json, "weights"),
        show::number(json, "version").map(|version| format!("version {version}")).unwrap_or_default(),
        if json["repeated"] == true { "(answered before)".into() } else { String::new() },
    ];
    let head = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ");
    let reasons = json["reasons"].as_array().into_iter().flatten().map(show::word);
    let reasons: Vec<_> = reasons.chain(json["error"].as_str().map(Into::into)).collect();
    reasons.iter().fold(head, |text, reason| format!("{text}\n  {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> ApiResponse {
        ApiResponse { status: StatusCode::from_u16(status).unwrap(), body: body.into() }
    }

    #[test]
    fn outcomes_end_the_program_as_documented() {
        let exit = |status, body: &str| exit_of(&answer(status, body));
        assert_eq!(exit(200, r#"{"status":"COMMITTED"}"#), Exit::Done);
        assert_eq!(exit(200, r#"{"status":"UNCHANGED"}"#), Exit::Done);
        assert_eq!(exit(409, r#"{"status":"ABORTED"}"#), Exit::Refused);
        assert_eq!(exit(200, r#"{"status":"REFUSED"}"#), Exit::Refused);
        assert_eq!(exit(422, r#"{"error":"weights sum to 9000 bp"}"#), Exit::Refused);
        assert_eq!(exit(503, r#"{"error":"no quorum"}"#), Exit::Unavailable);
    }

    #[test]
    fn an_aborted_outcome_names_who_refused() {
        let body = r#"{"status":"ABORTED","slot":4,"reasons":["node b: errors: 9 % of 200 answers, limit 5 %"]}"#;
        let found = answer(409, body);
        let text = outcome(&found, &found.json(), Exit::Refused);
        assert_eq!(text, "ABORTED  slot 4\n  node b: errors: 9 % of 200 answers, limit 5 %");
    }

    #[test]
    fn a_committed_outcome_shows_the_weights() {
        let body =
            r#"{"status":"COMMITTED","slot":4,"repeated":true,"state":{"version":2,"weights":{"v1":0.95,"v2":0.05}}}"#;
        let found = answer(200, body);
        let text = outcome(&found, &found.json(), Exit::Done);
        assert_eq!(text, "COMMITTED  slot 4  v1=95% v2=5%  version 2  (answered before)");
    }
}
