//! Verbs that change something: `apply`, `promote`, `pause`, `resume`, `abort`, `retry`, `undo`.
//!
//! Each is sent under an idempotency key, and only ever repeated under that key: the cluster carries it out once.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::input::InputFile;
use super::output::{self, Format, Tone, colours, paint};
use super::{Exit, plan, show, status};
use crate::client::{AnswerError, Api, ApiResponse, Write, segment};
use crate::code::Code;
use crate::config::read_yaml;
use crate::domain::ids::NodeId;
use crate::model::{ChangeDetails, Changed, Problem, Reach};
use crate::protocol::record::Slot;

/// Options of every verb that changes something: its key and its time-out.
#[derive(Debug, Clone, Args)]
pub struct WriteArgs {
    /// Idempotency key: repeated requests with the same key are carried out once. Default: a random key, which is printed.
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// How long to retry, with the same key, while the outcome is unknown.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// Return once all live nodes route with the change, not only the one that was asked. Exit code 2: one of them was not seen to in time.
    #[arg(long)]
    pub everywhere: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary apply -f config/rollout.yaml --wait")]
pub struct ApplyArgs {
    /// File of the rollout (YAML or JSON), or of several; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Wait until the rollout ends or waits for a person, like `aviary status`.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    pause: status::PauseArgs,
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
    /// Promote one step without the wait for samples, as after an inconclusive pause. Unhealthy nodes still refuse.
    #[arg(long, conflicts_with = "full")]
    skip_wait: bool,
    #[command(flatten)]
    write: WriteArgs,
}

#[derive(Debug, Args)]
pub struct UndoArgs {
    /// Service that goes back to its former version.
    name: String,
    /// Go back at once, without the steps. Every node must say Yes, as to any version that gets more traffic.
    #[arg(long)]
    now: bool,
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

/// Starts the rollouts of a file; with `--wait`, follows each to its end. Returns the first end that isn't a success.
pub async fn apply(api: &Api, args: ApplyArgs, format: Format) -> anyhow::Result<Exit> {
    let documents = InputFile::read(&args.file)?.documents();
    if documents.len() > 1 && args.write.idempotency_key.is_some() {
        anyhow::bail!("--idempotency-key is one for {} rollouts, expected a file with one", documents.len());
    }
    let (mut exits, mut begun) = (Vec::new(), Vec::new());
    for (name, text) in documents {
        let named: Named = read_yaml(&text).map_err(|why| anyhow::anyhow!("{name}: {why}"))?;
        if let Ok(spec) = crate::config::rollout::parse(&text, &name) {
            plan::never_ready(api, &spec).await.iter().for_each(|why| eprintln!("warning: {why}"));
        }
        let write = args.write.clone();
        let (exit, answer) = send(api, "/v1/rollouts".into(), "application/yaml", text, write, format).await?;
        exits.push(exit);
        // Without a canary there is nothing to wait for: the cluster serves what the file asks for.
        let is_under_way =
            |changed: &Changed| changed.state.as_ref().is_none_or(|state| state.canary_model_id.is_some());
        begun.extend(
            answer.filter(|_| exit == Exit::Done).filter(is_under_way).map(|answer| (named.metadata.name, answer)),
        );
    }
    for (name, answer) in begun.into_iter().filter(|_| args.wait) {
        exits.push(status::run(api, &status::StatusArgs::after(name, args.pause, Some(&answer)), format).await?);
    }
    Ok(exits.into_iter().find(|exit| *exit != Exit::Done).unwrap_or(Exit::Done))
}

/// Promotes the canary to the next step, or to the end with `--full`.
pub async fn promote(api: &Api, args: PromoteArgs, format: Format) -> anyhow::Result<Exit> {
    let details = ChangeDetails { full: args.full, skip_wait: args.skip_wait, ..ChangeDetails::default() };
    operation(api, "promote", &args.name, &details, args.write, format).await
}

/// Starts a rollout back to the former version, all at once with `--now`.
pub async fn undo(api: &Api, args: UndoArgs, format: Format) -> anyhow::Result<Exit> {
    let details = ChangeDetails { now: args.now, ..ChangeDetails::default() };
    operation(api, "undo", &args.name, &details, args.write, format).await
}

/// Sends a verb with a reason.
pub async fn with_reason(api: &Api, verb: &str, args: ReasonArgs, format: Format) -> anyhow::Result<Exit> {
    let reason = Some(args.reason).filter(|reason| !reason.is_empty());
    let details = ChangeDetails { reason, ..ChangeDetails::default() };
    operation(api, verb, &args.name, &details, args.write, format).await
}

/// Sends a verb without anything else.
pub async fn with_name(api: &Api, verb: &str, args: NameArgs, format: Format) -> anyhow::Result<Exit> {
    operation(api, verb, &args.name, &ChangeDetails::default(), args.write, format).await
}

async fn operation(
    api: &Api,
    verb: &str,
    name: &str,
    details: &ChangeDetails,
    args: WriteArgs,
    format: Format,
) -> anyhow::Result<Exit> {
    let path = format!("/v1/rollouts/{}/{verb}", segment(name));
    Ok(send(api, path, "application/json", serde_json::to_string(details)?, args, format).await?.0)
}

/// Sends a write, prints its outcome, and returns how the program ends by it and what the node answered.
pub async fn send(
    api: &Api,
    path: String,
    content_type: &'static str,
    body: String,
    args: WriteArgs,
    format: Format,
) -> anyhow::Result<(Exit, Option<Changed>)> {
    let key = args.idempotency_key.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
    eprintln!("idempotency-key: {key}");
    let path = if args.everywhere { format!("{path}?consistency=everywhere") } else { path };
    let answer = api.write(&Write { path, key, content_type, body, patience: args.timeout }).await?;
    let mut exit = exit_of(&answer);
    let changed = match answer.read::<Changed>() {
        Ok(changed) => Ok(changed),
        Err(AnswerError::Problem(problem)) => Err(problem),
        Err(AnswerError::Shape(why)) => return Err(AnswerError::Shape(why).into()),
    };
    let missing = |changed: &Changed| changed.reach.as_ref().is_some_and(|reach| !reach.missing.is_empty());
    if changed.as_ref().is_ok_and(missing) {
        exit = Exit::Unavailable;
    }
    output::print(format, &answer.body, |_| outcome(&changed, exit))?;
    Ok((exit, changed.ok()))
}

/// Returns how the program ends after an answer.
pub fn exit_of(answer: &ApiResponse) -> Exit {
    match answer.problem() {
        None if answer.read::<Changed>().is_ok_and(|changed| changed.rolled_back) => Exit::Refused,
        None => Exit::Done,
        Some(problem) if problem.code == Code::Busy || problem.status >= 500 => Exit::Unavailable,
        Some(_) => Exit::Refused,
    }
}

/// Returns an outcome for people: one line, then the reasons.
fn outcome(changed: &Result<Changed, Problem>, exit: Exit) -> String {
    let tone = match exit {
        Exit::Done => Tone::Good,
        Exit::Unavailable | Exit::Waits => Tone::Odd,
        Exit::Refused | Exit::Replaced | Exit::Usage => Tone::Bad,
    };
    let slot = |slot: Option<Slot>| slot.map(|slot| format!("slot {slot}")).unwrap_or_default();
    let before = |repeated: bool| if repeated { "(answered before)".to_string() } else { String::new() };
    match changed {
        Ok(Changed { status, slot: at, repeated, reason, state, reach, .. }) => {
            let head = show::line([
                paint(colours(), tone, &output::name(status)),
                slot(*at),
                state.as_ref().map(|state| show::weights(&state.weights)).unwrap_or_default(),
                state.as_ref().map(|state| format!("version {}", state.version)).unwrap_or_default(),
                before(*repeated),
            ]);
            let because = if reason.is_empty() { String::new() } else { format!("\n  {reason}") };
            let reached = reach.as_ref().map(|reach| format!("\n{}", places(reach))).unwrap_or_default();
            format!("{head}{because}{reached}")
        }
        Err(Problem { code: code @ (Code::Aborted | Code::Refused), detail, facts, .. }) => {
            let repeated = before(facts.repeated.unwrap_or_default());
            let head = show::line([paint(colours(), tone, &output::name(code)), slot(facts.slot), repeated]);
            let reasons = if facts.reasons.is_empty() { std::slice::from_ref(detail) } else { &facts.reasons };
            reasons.iter().fold(head, |text, reason| format!("{text}\n  {reason}"))
        }
        Err(problem) => paint(colours(), tone, &problem.detail),
    }
}

/// Returns which nodes route with a write, a line for each node that does not.
fn places(reach: &Reach) -> String {
    let names = |nodes: &[NodeId]| nodes.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
    let mut lines = vec![format!("  served by {}", names(&reach.served_by))];
    lines.extend(reach.away.iter().map(|node| format!("  {node} is not live: it follows once it is back")));
    lines.extend(reach.missing.iter().map(|(node, why)| format!("  not yet served by {node}: {why}")));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::domain::ids::TxId;
    use http::StatusCode;
    use serde_json::json;

    fn problem(code: Code, detail: &str) -> Problem {
        Problem::new(code, detail)
    }

    #[test]
    fn outcomes_end_the_program_as_documented() {
        let exit = |problem: Problem| {
            let body = serde_json::to_string(&problem).unwrap();
            exit_of(&ApiResponse { status: StatusCode::from_u16(problem.status).unwrap(), body })
        };
        assert_eq!(exit_of(&ApiResponse { status: StatusCode::OK, body: String::new() }), Exit::Done);
        for code in [Code::Aborted, Code::Refused, Code::InvalidArgument, Code::KeyReused, Code::PermissionDenied] {
            assert_eq!(exit(problem(code, "")), Exit::Refused, "{code:?}");
        }
        for code in [Code::NoQuorum, Code::OutcomeUnknown, Code::Busy, Code::Unavailable, Code::Internal] {
            assert_eq!(exit(problem(code, "")), Exit::Unavailable, "{code:?}");
        }
    }

    #[test]
    fn an_aborted_outcome_names_who_refused() {
        let mut aborted = problem(Code::Aborted, "node b: errors: 9 % of 200 answers, limit 5 %");
        aborted.facts.slot = Some(Slot(4));
        aborted.facts.reasons = vec![aborted.detail.clone()];
        let expected = "ABORTED  slot 4\n  node b: errors: 9 % of 200 answers, limit 5 %";
        assert_eq!(outcome(&Err(aborted), Exit::Refused), expected);
        let refused = outcome(&Err(problem(Code::Refused, "no rollout is paused")), Exit::Refused);
        assert_eq!(refused, "REFUSED\n  no rollout is paused");
        assert_eq!(outcome(&Err(problem(Code::Busy, "try again")), Exit::Unavailable), "try again");
    }

    #[test]
    fn a_committed_outcome_shows_the_weights() {
        let state = json!({
            "service": "m", "version": 2, "stable_model_id": "v1", "canary_model_id": "v2",
            "weights": {"v1": 0.95, "v2": 0.05}, "status": "COMMITTED", "txid": "k", "timestamp": "2026-11-20T22:58:56.120Z",
        });
        let state = serde_json::from_value(state).unwrap();
        let changed = Changed::committed(TxId::new("k").unwrap(), Slot(4), Some(state), true);
        let text = outcome(&Ok(changed), Exit::Done);
        assert_eq!(text, "COMMITTED  slot 4  v1=95% v2=5%  version 2  (answered before)");
    }

    #[test]
    fn a_write_for_everywhere_names_the_nodes_that_lack() {
        let node = |name| NodeId::new(name).unwrap();
        let missing = [(node("b"), "it is at slot 3, expected slot 4".to_string())].into();
        let reach = Reach { served_by: vec![node("a")], away: vec![node("c")], missing };
        let changed =
            Changed { reach: Some(reach), ..Changed::committed(TxId::new("k").unwrap(), Slot(4), None, false) };
        let expected = "COMMITTED  slot 4\n  served by a\n  c is not live: it follows once it is back\n  \
            not yet served by b: it is at slot 3, expected slot 4";
        assert_eq!(outcome(&Ok(changed), Exit::Unavailable), expected);
    }

    #[test]
    fn a_rollout_that_was_rolled_back_before_is_no_success_and_says_why() {
        let state = serde_json::json!({
            "service": "m", "version": 2, "stable_model_id": "v1", "canary_model_id": null,
            "weights": {"v1": 1.0}, "status": "COMMITTED", "txid": "k", "timestamp": "2026-11-20T22:58:56.120Z",
        });
        let state: crate::domain::routing::RoutingState = serde_json::from_value(state).unwrap();
        let unchanged = |reason: &str, rolled_back| {
            Changed::unchanged(TxId::new("k").unwrap(), state.clone(), reason.into(), rolled_back)
        };
        let exit = |changed: &Changed| {
            let body = serde_json::to_string(changed).unwrap();
            exit_of(&ApiResponse { status: StatusCode::OK, body })
        };
        let (there, bad) = (unchanged("v1 serves already", false), unchanged("v2 was rolled back: errors", true));
        assert_eq!((exit(&there), exit(&bad)), (Exit::Done, Exit::Refused));
        assert_eq!(outcome(&Ok(there), Exit::Done), "UNCHANGED  v1=100%  version 2\n  v1 serves already");
        assert_eq!(outcome(&Ok(bad), Exit::Refused), "UNCHANGED  v1=100%  version 2\n  v2 was rolled back: errors");
    }
}
