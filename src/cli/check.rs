//! `aviary config check`: finds what is wrong with files before a node does.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Deserialize;

use super::input::{InputFile, is_stdin};
use super::{Exit, output};
use crate::config;

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Check the files of nodes (TOML), rollouts and routers (YAML or JSON, also several in one file).
    Check(CheckArgs),
}

/// Arguments of `aviary config check`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary config check config/*.toml config/rollout.yaml\n  \
    helm template chart | aviary config check -")]
pub struct CheckArgs {
    /// Files to check: `.toml` is a node's file, `.yaml`, `.yml` or `.json` holds rollouts and routers; `-` is standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Checks each file and prints its first error, or `ok`; exits with 1 if any file has an error.
pub fn run(verb: &ConfigVerb) -> anyhow::Result<Exit> {
    let ConfigVerb::Check(args) = verb;
    let mut exit = Exit::Done;
    for file in &args.files {
        match check(file) {
            Ok(()) => println!("{}: ok", file.display()),
            Err(error) => {
                output::error(&format!("{error:#}"));
                exit = Exit::Refused;
            }
        }
    }
    Ok(exit)
}

fn check(file: &Path) -> anyhow::Result<()> {
    let input = InputFile::read(file)?;
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("toml") => node(&input, file),
        Some("yaml" | "yml" | "json") => documents(&input),
        None if is_stdin(file) => match input.text.lines().any(|line| line.contains("apiVersion")) {
            true => documents(&input),
            false => node(&input, Path::new(&input.name)),
        },
        found => {
            let found = found.map_or("no extension".into(), |ending| format!(".{ending}"));
            anyhow::bail!(
                "{}: the file ends in {found}, expected .toml (a node), .yaml or .json (rollouts and routers)",
                file.display()
            )
        }
    }
}

fn node(input: &InputFile, path: &Path) -> anyhow::Result<()> {
    config::node::NodeConfig::of(&input.text, path)?;
    Ok(())
}

/// The part of a document that says what it is.
#[derive(Deserialize)]
struct DocumentHead {
    kind: Option<String>,
}

fn documents(input: &InputFile) -> anyhow::Result<()> {
    for (name, text) in input.documents() {
        let kind = config::read_yaml::<DocumentHead>(&text).ok().and_then(|document| document.kind);
        match kind.as_deref() {
            Some("Router") => drop(config::router::RouterConfig::of(&text, &name)?),
            _ => drop(config::rollout::parse(&text, &name)?),
        }
    }
    Ok(())
}
