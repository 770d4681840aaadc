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
    /// Have the stable version served by these servers: it moved, and stays the same version. No canary is needed.
    SetServers(SetServersArgs),
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

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary service set-servers shop http://10.0.0.7:9101 http://10.0.0.8:9101\n\n\
    Each server must take a connection. Refused while a rollout is under way. The way back is the same verb with the servers \
    of before; each change is in `aviary history`.")]
pub struct SetServersArgs {
    /// Service whose stable version moved.
    name: String,
    /// Base URLs of all of its servers.
    #[arg(required = true, value_name = "URL")]
    servers: Vec<String>,
    #[command(flatten)]
    write: WriteArgs,
}

/// Runs a verb.
pub async fn run(api: &Api, verb: ServiceVerb, format: Format) -> anyhow::Result<Exit> {
    let (path, body, write) = match verb {
        ServiceVerb::SetDefault(SetDefaultArgs { name, write }) => ("set-default", json!({ "service": name }), write),
        ServiceVerb::SetServers(SetServersArgs { name, servers, write }) => {
            ("set-servers", json!({ "service": name, "servers": servers }), write)
        }
    };
    let path = format!("/v1/cluster/{path}");
    Ok(write::send(api, path, "application/json", body.to_string(), write, format).await?.0)
}
