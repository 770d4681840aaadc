//! `aviary schema`: what other programs and this one say to each other, for generators of clients, and what files hold, for editors.

use clap::Subcommand;

use super::{Exit, output};
use crate::api::openapi;
use crate::config;

#[derive(Debug, Subcommand)]
#[command(after_help = "Example:\n  aviary schema rollout > rollout.schema.json\n\n\
    An editor takes it up by a first line in the file: # yaml-language-server: $schema=rollout.schema.json")]
pub enum SchemaVerb {
    /// Print the OpenAPI document of the HTTP API, as a node serves it at /v1/openapi.json.
    Openapi,
    /// Print the JSON Schema of a rollout's file (YAML or JSON).
    Rollout,
    /// Print the JSON Schema of a node's file (TOML).
    Node,
    /// Print the JSON Schema of a record router's file (YAML or JSON).
    Router,
}

/// Prints a schema.
pub fn run(verb: &SchemaVerb) -> anyhow::Result<Exit> {
    let schema = match verb {
        SchemaVerb::Openapi => format!("{:#}", openapi::document()),
        SchemaVerb::Rollout => serde_json::to_string_pretty(&config::rollout::schema())?,
        SchemaVerb::Node => serde_json::to_string_pretty(&config::node::schema())?,
        SchemaVerb::Router => serde_json::to_string_pretty(&config::router::schema())?,
    };
    output::line(&schema)?;
    Ok(Exit::Done)
}
