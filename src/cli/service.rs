//! `aviary service`: what is said about a service beside its rollouts.

use clap::{Args, Subcommand};
use serde_json::json;

use super::Exit;
use super::output::Format;
use super::write::{self, WriteArgs};
use crate::client::Api;

#[derive(Debug, Subcommand)]
pub enum ServiceVerb {
    /// Send the requests that name no service to this one, at every node whose file has no `[data] default_service`.
    SetDefault(SetDefaultArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary service set-default shop\n\n\
    Every member must run aviary 0.3.0 or later. Members can't go back to an earlier version after it.")]
pub struct SetDefaultArgs {
    /// Service that is to get them.
    name: String,
    #[command(flatten)]
    write: WriteArgs,
}

/// Runs a verb.
pub async fn run(api: &Api, verb: ServiceVerb, format: Format) -> anyhow::Result<Exit> {
    let ServiceVerb::SetDefault(SetDefaultArgs { name, write }) = verb;
    let body = json!({ "service": name }).to_string();
    Ok(write::send(api, "/v1/cluster/set-default".into(), "application/json", body, write, format).await?.0)
}
