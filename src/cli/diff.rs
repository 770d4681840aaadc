//! `aviary diff`: what applying a rollout file would do, by the table that the nodes decide by.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::Exit;
use super::input::InputFile;
use super::output::{self, Format};
use crate::client::{Api, segment};
use crate::code::Code;
use crate::config::rollout;
use crate::domain::apply::{ApplyEffect, Standing, effect_of_apply};
use crate::domain::plan::{Backend, RolloutSpec};
use crate::model::RolloutView;

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: those of `aviary apply`: 1 if it would be refused, or was rolled back before.\n\nExample:\n  aviary diff -f config/rollout.yaml"
)]
pub struct DiffArgs {
    /// File of the rollout (YAML); `-` reads it from standard input.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

/// Prints what applying the file would do as things stand. Returns the first exit of its rollouts that isn't a success.
pub async fn run(api: &Api, args: &DiffArgs, format: Format) -> anyhow::Result<Exit> {
    let mut exits = Vec::new();
    for (name, text) in InputFile::read(&args.file)?.documents() {
        exits.push(one(api, &name, &text, format).await?);
    }
    Ok(exits.into_iter().find(|exit| *exit != Exit::Done).unwrap_or(Exit::Done))
}

async fn one(api: &Api, name: &str, text: &str, format: Format) -> anyhow::Result<Exit> {
    let file = rollout::parse(text, name)?;
    let answer = api.get(&format!("/v1/rollouts/{}", segment(file.service.as_str()))).await?;
    let effect = match answer.problem() {
        Some(problem) if problem.code == Code::NotFound => effect_of_apply(None, &file),
        Some(problem) => anyhow::bail!("{}", problem.detail),
        None => effect_on(&answer.read()?, &file)?,
    };
    let (word, why) = told(&effect);
    let json = json!({ "name": file.service, "effect": word, "reason": why, "rolled_back": is_rolled_back(&effect) });
    output::print(format, &json.to_string(), |_| effect.to_string())?;
    Ok(exit_of(&effect))
}

/// Returns what applying `file` does to a service that a node shows so.
fn effect_on(view: &RolloutView, file: &RolloutSpec) -> anyhow::Result<ApplyEffect> {
    let last = rollout::recorded(&view.manifest).context("the rollout that the node shows")?;
    // A node that doesn't say what serves moves stable's servers by rollouts alone: they are the file's.
    let serves = |backend: &&Backend| backend.version == view.routing.routing.stable_model_id;
    let named = || [&last.canary, &last.stable].into_iter().find(serves).cloned();
    let stable = view.stable.clone().or_else(named).context("the node doesn't say what serves as stable")?;
    let standing = Standing {
        stable: &stable,
        last: &last,
        phase: view.routing.phase,
        weight: view.routing.routing.canary_weight(),
        reason: &view.routing.reason,
        was_served: view.was_served,
    };
    Ok(effect_of_apply(Some(standing), file))
}

fn told(effect: &ApplyEffect) -> (&'static str, String) {
    match effect {
        ApplyEffect::Start => ("START", String::new()),
        ApplyEffect::Unchanged(why) | ApplyEffect::RolledBackBefore(why) => ("UNCHANGED", why.clone()),
        ApplyEffect::Abort(why) => ("ABORT", why.clone()),
        ApplyEffect::Refused(why) => ("REFUSED", why.to_string()),
    }
}

fn is_rolled_back(effect: &ApplyEffect) -> bool {
    matches!(effect, ApplyEffect::RolledBackBefore(_))
}

fn exit_of(effect: &ApplyEffect) -> Exit {
    match effect {
        ApplyEffect::Start | ApplyEffect::Unchanged(_) | ApplyEffect::Abort(_) => Exit::Done,
        ApplyEffect::RolledBackBefore(_) | ApplyEffect::Refused(_) => Exit::Refused,
    }
}
