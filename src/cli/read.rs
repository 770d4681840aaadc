//! Verbs that only read: `list`, `get`, `history`.

use std::collections::BTreeMap;

use clap::Args;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::output::{self, Format, Tone, colours, facts, paint, table};
use super::write::exit_of;
use super::{Exit, show};
use crate::client::{Address, Api, ApiResponse, segment};
use crate::model::{ClusterView, History, RolloutList, RolloutView, RoutingView, Selector};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary get fraud-model\n  aviary get fraud-model --field weights.v2\n  \
    aviary get fraud-model --field /weights/1.5.0     a JSON pointer, for names with dots; weights[\"1.5.0\"] does as well\n  \
    aviary get fraud-model -o yaml > rollout.yaml   the rollout file that is in force\n  \
    aviary get fraud-model --all-nodes      exit code 0: all nodes agree; 1: they differ")]
pub struct GetArgs {
    /// Service whose rollout is shown.
    name: String,
    /// Print only this field of the answer, by its path in the JSON, such as phase, weights.v2 or /weights/1.5.0.
    #[arg(long, value_name = "PATH")]
    field: Option<String>,
    /// Read /routing/state of every member of the cluster and compare.
    #[arg(long, conflicts_with = "field")]
    all_nodes: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary list --selector team=fraud,tier!=test")]
pub struct ListArgs {
    /// Only rollouts with these labels: key=value, key!=value or key, with commas between them.
    #[arg(short = 'l', long, value_name = "LABELS", default_value_t, hide_default_value = true)]
    selector: Selector,
}

#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Service whose history is shown.
    name: String,
}

/// Rollouts that are asked for at a time.
const PAGE: usize = 500;

/// Lists the rollouts, one row per service.
pub async fn list(api: &Api, args: &ListArgs, format: Format) -> anyhow::Result<Exit> {
    let query = |after: Option<&str>| {
        let mut query = form_urlencoded::Serializer::new("/v1/rollouts?".to_string());
        query.append_pair("limit", &PAGE.to_string());
        query.append_pair("selector", &args.selector.to_string());
        after.map(|after| query.append_pair("after", after));
        query.finish()
    };
    let mut all = Vec::new();
    let mut path = query(None);
    loop {
        let answer = api.get(&path).await?;
        if answer.problem().is_some() {
            return print(&answer, format, |_: &RolloutList| String::new());
        }
        let page: Page = answer.read()?;
        all.extend(page.rollouts);
        match page.next {
            Some(next) => path = query(Some(&next)),
            None => break,
        }
    }
    match format {
        Format::Table => output::line(rows(&serde_json::from_value(Value::Array(all))?).trim_end())?,
        Format::Json | Format::Yaml => {
            output::print(format, &json!({ "rollouts": all }).to_string(), |_| String::new())?
        }
    }
    Ok(Exit::Done)
}

/// A page of rollouts, each as its node sent it.
#[derive(serde::Deserialize)]
struct Page {
    rollouts: Vec<Value>,
    #[serde(default)]
    next: Option<String>,
}

fn rows(rollouts: &Vec<RolloutView>) -> String {
    let mut table = table(["SERVICE", "PHASE", "WEIGHTS", "VERSION", "SLOT", "WAITS FOR"]);
    for RolloutView { name, routing: view, .. } in rollouts {
        table.add_row([
            name.to_string(),
            view.phase.to_string(),
            show::weights(&view.routing.weights),
            view.routing.version.to_string(),
            view.slot.to_string(),
            view.waiting_for.clone(),
        ]);
    }
    match table.is_empty() {
        true => "no rollouts yet: start one with `aviary apply -f FILE`".into(),
        false => table.trim_fmt(),
    }
}

/// Shows one rollout, its file, one field of it, or what each node makes of it.
pub async fn get(api: &Api, args: &GetArgs, format: Format) -> anyhow::Result<Exit> {
    if args.all_nodes {
        return all_nodes(api, &args.name, format).await;
    }
    let answer = api.get(&format!("/v1/rollouts/{}", segment(&args.name))).await?;
    match &args.field {
        _ if answer.problem().is_some() => print(&answer, format, rollout),
        Some(path) => match show::at(&answer.read()?, path) {
            Some(value) => output::line(&show::word(value)).map(|()| Exit::Done),
            None => {
                anyhow::bail!("{}: found no field {path:?}; a name with dots is addressed as /weights/1.5.0", args.name)
            }
        },
        None if format == Format::Yaml => {
            let RolloutView { manifest, .. } = answer.read()?;
            output::put(&output::yaml_text(&manifest)?).map(|()| Exit::Done)
        }
        None => print(&answer, format, rollout),
    }
}

/// Returns a rollout for people.
pub fn rollout(rollout: &RolloutView) -> String {
    let RolloutView { name, metadata, routing: view, health, .. } = rollout;
    let labels: Vec<_> = metadata.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    facts(&[
        ("service", name.to_string()),
        ("labels", labels.join(",")),
        ("phase", view.phase.to_string()),
        ("step", (view.stage + 1).to_string()),
        ("weights", show::weights(&view.routing.weights)),
        ("effective", show::shares(&view.effective_weights)),
        ("verdict", health.verdict.clone().unwrap_or_default()),
        ("compared", health.sequential.as_ref().map(show::evidence).unwrap_or_default()),
        ("waits for", view.waiting_for.clone()),
        ("held back", view.held_back.clone().unwrap_or_default()),
        ("reason", view.reason.clone()),
        ("status", view.routing.status.to_string()),
        ("version", view.routing.version.to_string()),
        ("slot", view.slot.to_string()),
        ("hash", view.hash.clone()),
        ("txid", view.routing.txid.to_string()),
        ("time", show::time(view.routing.timestamp)),
    ])
}

/// What one node says of a service's routing.
struct NodeAnswer {
    /// Name of the node, or its address where it didn't say who it is.
    name: String,
    answer: anyhow::Result<RoutingView>,
}

/// Asks the addresses of `--api` for a service's routing, and then the members that none of them belongs to.
async fn ask_all(api: &Api, name: &str) -> Vec<NodeAnswer> {
    let path = format!("/routing/state?service={}", segment(name));
    let ask = async |address: &Address| {
        let answer = api.get_from(address, &path).await;
        answer.map_err(anyhow::Error::from).and_then(|answer| Ok(answer.read::<RoutingView>()?))
    };
    let mut found = BTreeMap::new();
    for address in api.addresses() {
        let answer = ask(address).await;
        let name = answer.as_ref().map_or_else(|_| address.to_string(), |view| view.node.to_string());
        found.insert(name.clone(), NodeAnswer { name, answer });
    }
    let Ok(Ok(cluster)) = api.get("/v1/cluster").await.map(|answer| answer.read::<ClusterView>()) else {
        return found.into_values().collect();
    };
    for (node, member) in cluster.members {
        let name = node.to_string();
        if found.contains_key(&name) {
            continue;
        }
        let address = member.api.as_ref().and_then(|address| address.parse::<Address>().ok());
        let answer = match &address {
            // It was asked already, and didn't answer.
            Some(address) if found.contains_key(&address.to_string()) => match found.remove(&address.to_string()) {
                Some(NodeAnswer { answer, .. }) => answer,
                None => continue,
            },
            Some(address) => ask(address).await,
            None => Err(anyhow::anyhow!("its address is unknown here; name it in --api")),
        };
        found.insert(name.clone(), NodeAnswer { name, answer });
    }
    found.into_values().collect()
}

async fn all_nodes(api: &Api, name: &str, format: Format) -> anyhow::Result<Exit> {
    let answers = ask_all(api, name).await;
    let agree = agree(answers.iter().map(|node| &node.answer));
    if format != Format::Table {
        let node = |NodeAnswer { name, answer }: &NodeAnswer| match answer {
            Ok(state) => json!({ "node": name, "state": state }),
            Err(why) => json!({ "node": name, "error": why.to_string() }),
        };
        let body = json!({ "agree": agree, "nodes": answers.iter().map(node).collect::<Vec<_>>() });
        output::print(format, &body.to_string(), |_| String::new())?;
    } else {
        let mut table = table(["NODE", "VERSION", "WEIGHTS", "STATUS", "SLOT", "HASH", "MODE"]);
        for NodeAnswer { name, answer } in &answers {
            let cells = match answer {
                Ok(view) => [
                    view.routing.version.to_string(),
                    show::weights(&view.routing.weights),
                    view.routing.status.to_string(),
                    view.slot.to_string(),
                    view.hash.clone(),
                    output::name(&view.mode),
                ],
                Err(why) => [why.to_string(), "".into(), "".into(), "".into(), "".into(), "".into()],
            };
            table.add_row(std::iter::once(name.clone()).chain(cells));
        }
        let (tone, word) = if agree { (Tone::Good, "all nodes agree") } else { (Tone::Bad, "the nodes do not agree") };
        output::line(&format!("{}\n{}", table.trim_fmt(), paint(colours(), tone, word)))?;
    }
    Ok(if agree { Exit::Done } else { Exit::Refused })
}

/// Returns true when every node answered, and all of them the same.
fn agree<'a>(answers: impl IntoIterator<Item = &'a anyhow::Result<RoutingView>>) -> bool {
    let agreed = |answer: &anyhow::Result<RoutingView>| {
        let RoutingView { routing, slot, hash, .. } = answer.as_ref().ok()?;
        Some((routing.version, routing.weights.clone(), routing.status, *slot, hash.clone()))
    };
    let mut answers = answers.into_iter().map(agreed);
    let first = answers.next().flatten();
    first.is_some() && answers.all(|answer| answer == first)
}

/// Shows what was decided about a service.
pub async fn history(api: &Api, args: &HistoryArgs, format: Format) -> anyhow::Result<Exit> {
    let answer = api.get(&format!("/v1/rollouts/{}/history", segment(&args.name))).await?;
    print(&answer, format, |History { history, whole_from }| {
        let mut table = table(["SLOT", "TIME", "WHAT", "STATUS", "WEIGHTS", "VERSION", "WHY"]);
        for entry in history {
            table.add_row([
                entry.slot.to_string(),
                show::time(entry.decided_at),
                entry.kind.clone(),
                entry.status.map(|status| status.to_string()).unwrap_or_default(),
                entry.weights.as_ref().map(show::weights).unwrap_or_default(),
                entry.version.map(|version| version.to_string()).unwrap_or_default(),
                entry.reasons.join("; "),
            ]);
        }
        match whole_from {
            Some(slot) => format!("{}\nwhat was decided before slot {slot} is no longer in the log", table.trim_fmt()),
            None => table.trim_fmt(),
        }
    })
}

/// Prints a read's answer; one that isn't a success is told as an error.
pub fn print<T: DeserializeOwned>(
    answer: &ApiResponse,
    format: Format,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<Exit> {
    output::answer(format, answer, table)?;
    Ok(exit_of(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the answer of `node`, whose last record has this hash.
    fn state(node: &str, hash: &str) -> anyhow::Result<RoutingView> {
        let view = json!({
            "service": "m", "version": 2, "stable_model_id": "v1", "canary_model_id": "v2", "weights": {"v1": 1.0},
            "status": "COMMITTED", "txid": "t", "timestamp": "2026-11-20T22:58:56.120Z", "node": node, "slot": 7,
            "hash": hash, "mode": "normal", "phase": "Progressing", "stage": 0, "stages": 2, "reason": "",
            "waiting_for": "", "held_back": null, "effective_weights": {"v1": 1.0}, "lease_ms_left": 3, "enforced": true,
            "a_member_of_a_later_build": [],
        });
        Ok(serde_json::from_value(view)?)
    }

    #[test]
    fn nodes_agree_only_when_all_answer_the_same() {
        assert!(agree(&[state("a", "x"), state("b", "x"), state("c", "x")]));
        assert!(!agree(&[state("a", "x"), state("b", "y"), state("c", "x")]));
        assert!(!agree(&[state("a", "x"), state("b", "x"), Err(anyhow::anyhow!("connection refused"))]));
        assert!(!agree(&[]));
    }
}
