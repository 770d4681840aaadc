//! Verbs that only read: `list`, `get`, `history`.

use anyhow::anyhow;
use clap::Args;
use serde_json::{Value, json};

use super::output::{self, Format, Tone, colours, facts, paint, table};
use super::write::exit_of_status;
use super::{Exit, show};
use crate::client::{Api, ApiResponse, segment};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary get fraud-model\n  aviary get fraud-model --field state.weights.v2\n  \
    aviary get fraud-model --all-nodes      exit code 0: all nodes agree; 1: they differ")]
pub struct GetArgs {
    /// Service whose rollout is shown.
    name: String,
    /// Print only this field of the answer: a name at any depth, or a path such as state.weights.v2.
    #[arg(long, value_name = "PATH")]
    field: Option<String>,
    /// Read /routing/state of every node and compare.
    #[arg(long, conflicts_with = "field")]
    all_nodes: bool,
}

#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Service whose history is shown.
    name: String,
}

/// Lists the rollouts, one row per service.
pub async fn list(api: &Api, format: Format) -> anyhow::Result<Exit> {
    let answer = api.get("/v1/rollouts").await?;
    print(&answer, format, |json| {
        let mut table = table(["SERVICE", "PHASE", "WEIGHTS", "VERSION", "SLOT", "WAITS FOR"]);
        for row in show::rows(json) {
            let name = ["service", "name"].map(|key| show::text(row, key)).into_iter().find(|n| !n.is_empty());
            table.add_row([
                name.unwrap_or_default(),
                show::text(row, "phase"),
                show::weights_of(row, "weights"),
                show::text(row, "version"),
                show::text(row, "slot"),
                show::text(row, "waiting_for"),
            ]);
        }
        match table.is_empty() {
            true => "no rollouts yet: start one with `aviary apply -f FILE`".into(),
            false => table.trim_fmt(),
        }
    })
}

/// Shows one rollout, one field of it, or what each node makes of it.
pub async fn get(api: &Api, args: &GetArgs, format: Format) -> anyhow::Result<Exit> {
    if args.all_nodes {
        return all_nodes(api, &args.name, format).await;
    }
    let answer = api.get(&format!("/v1/rollouts/{}", segment(&args.name))).await?;
    match &args.field {
        Some(path) if answer.status.is_success() => match show::field(&answer.json(), path) {
            Some(value) => output::line(&show::word(value)).map(|()| Exit::Done),
            None => anyhow::bail!("{}: found no field {path:?}", args.name),
        },
        _ => print(&answer, format, rollout),
    }
}

/// Returns a rollout for people.
pub fn rollout(json: &Value) -> String {
    let text = |name: &str| show::text(json, name);
    let stage = show::number(json, "stage").map(|stage| (stage + 1).to_string()).unwrap_or_default();
    facts(&[
        ("service", [text("service"), text("name")].into_iter().find(|n| !n.is_empty()).unwrap_or_default()),
        ("phase", text("phase")),
        ("step", stage),
        ("weights", show::weights_of(json, "weights")),
        ("effective", show::weights_of(json, "effective_weights")),
        ("verdict", show::verdict(json)),
        ("compared", show::evidence(json)),
        ("waits for", text("waiting_for")),
        ("held back", text("held_back")),
        ("reason", text("reason")),
        ("status", text("status")),
        ("version", text("version")),
        ("slot", text("slot")),
        ("hash", text("hash")),
        ("txid", text("txid")),
        ("time", show::clock(show::seek(json, "timestamp"))),
    ])
}

/// The fields in which nodes that know the same agree.
const AGREED: [&str; 5] = ["version", "weights", "status", "slot", "hash"];

async fn all_nodes(api: &Api, name: &str, format: Format) -> anyhow::Result<Exit> {
    let path = format!("/routing/state?service={}", segment(name));
    let mut answers = Vec::new();
    for address in api.addresses() {
        answers.push(match api.get_from(address, &path).await {
            Ok(answer) if answer.status.is_success() => Ok(answer.json()),
            Ok(answer) => Err(anyhow!(answer.error())),
            Err(why) => Err(anyhow!(why)),
        });
    }
    let agree = agree(&answers);
    let rows = api.addresses().iter().zip(&answers);
    if format != Format::Table {
        let node = |(address, answer): (_, &anyhow::Result<Value>)| match answer {
            Ok(state) => json!({ "api": format!("{address}"), "state": state }),
            Err(why) => json!({ "api": format!("{address}"), "error": why.to_string() }),
        };
        let body = json!({ "agree": agree, "nodes": rows.map(node).collect::<Vec<_>>() });
        output::print(format, &body.to_string(), |_| String::new())?;
    } else {
        let mut table = table(["NODE", "VERSION", "WEIGHTS", "STATUS", "SLOT", "HASH", "MODE"]);
        for (address, answer) in rows {
            let cells = match answer {
                Ok(state) => {
                    let text = |name: &str| show::text(state, name);
                    let weights = show::weights_of(state, "weights");
                    [text("version"), weights, text("status"), text("slot"), text("hash"), text("mode")]
                }
                Err(why) => [why.to_string(), "".into(), "".into(), "".into(), "".into(), "".into()],
            };
            table.add_row(std::iter::once(address.to_string()).chain(cells));
        }
        let (tone, word) = if agree { (Tone::Good, "all nodes agree") } else { (Tone::Bad, "the nodes do not agree") };
        output::line(&format!("{}\n{}", table.trim_fmt(), paint(colours(), tone, word)))?;
    }
    Ok(if agree { Exit::Done } else { Exit::Refused })
}

/// Returns true when every node answered, and all of them the same.
fn agree(answers: &[anyhow::Result<Value>]) -> bool {
    let key = |answer: &anyhow::Result<Value>| {
        let state = answer.as_ref().ok()?;
        AGREED.iter().map(|name| show::seek(state, name).cloned()).collect::<Option<Vec<_>>>()
    };
    let first = answers.first().and_then(key);
    first.is_some() && answers.iter().all(|answer| key(answer) == first)
}

/// Shows what was decided about a service.
pub async fn history(api: &Api, args: &HistoryArgs, format: Format) -> anyhow::Result<Exit> {
    let answer = api.get(&format!("/v1/rollouts/{}/history", segment(&args.name))).await?;
    print(&answer, format, |json| {
        let mut table = table(["SLOT", "TIME", "WHAT", "STATUS", "WEIGHTS", "VERSION", "WHY"]);
        for row in show::rows(json) {
            let kind = ["kind", "act", "change"].map(|key| show::text(row, key)).into_iter().find(|k| !k.is_empty());
            let time = ["decided_at", "timestamp"].into_iter().find_map(|key| show::seek(row, key));
            table.add_row([
                show::text(row, "slot"),
                show::clock(time),
                kind.unwrap_or_default(),
                show::text(row, "status"),
                show::weights_of(row, "weights"),
                show::text(row, "version"),
                show::reasons(row),
            ]);
        }
        table.trim_fmt()
    })
}

/// Prints a read's answer; an answer that isn't a success is told as an error.
pub fn print(answer: &ApiResponse, format: Format, table: impl FnOnce(&Value) -> String) -> anyhow::Result<Exit> {
    let exit = exit_of_status(answer.status);
    if exit == Exit::Done || format != Format::Table {
        output::print(format, &answer.body, table)?;
    } else {
        eprintln!("error: {}", answer.error());
    }
    Ok(exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(hash: &str) -> anyhow::Result<Value> {
        Ok(
            json!({"version": 2, "weights": {"v1": 1.0}, "status": "COMMITTED", "slot": 7, "hash": hash, "lease_ms_left": 3}),
        )
    }

    #[test]
    fn nodes_agree_only_when_all_answer_the_same() {
        assert!(agree(&[state("a"), state("a"), state("a")]));
        assert!(!agree(&[state("a"), state("b"), state("a")]));
        assert!(!agree(&[state("a"), state("a"), Err(anyhow!("connection refused"))]));
        assert!(!agree(&[Ok(json!({})), Ok(json!({}))]), "answers without the fields prove nothing");
        assert!(!agree(&[]));
    }
}
