//! `aviary schema`: what other programs and this one say to each other, for generators of clients.

use clap::Subcommand;

use super::{Exit, output};
use crate::api::openapi;

#[derive(Debug, Subcommand)]
pub enum SchemaVerb {
    /// Print the OpenAPI document of the HTTP API, as a node serves it at /v1/openapi.json.
    Openapi,
}

/// Prints a schema.
pub fn run(verb: &SchemaVerb) -> anyhow::Result<Exit> {
    match verb {
        SchemaVerb::Openapi => output::line(&format!("{:#}", openapi::document()))?,
    }
    Ok(Exit::Done)
}
