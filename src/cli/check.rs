//! `aviary config check`: finds what is wrong with files before a node does.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};

use super::Exit;

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Check the files of nodes (TOML), rollouts and routers (YAML).
    Check(CheckArgs),
}

/// Arguments of `aviary config check`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary config check config/*.toml config/rollout.yaml")]
pub struct CheckArgs {
    /// Files to check: `.toml` is a node's file, `.yaml` or `.yml` a rollout or a router.
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
                eprintln!("error: {error:#}");
                exit = Exit::Refused;
            }
        }
    }
    Ok(exit)
}

fn check(file: &Path) -> anyhow::Result<()> {
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("toml") => node(file),
        Some("yaml" | "yml") => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            match text.lines().any(|line| line.trim() == "kind: Router") {
                true => Ok(crate::config::router::RouterConfig::load(file).map(drop)?),
                false => rollout(file, &text),
            }
        }
        found => {
            let found = found.map_or("no extension".into(), |ending| format!(".{ending}"));
            anyhow::bail!(
                "{}: the file ends in {found}, expected .toml (a node) or .yaml (a rollout or a router)",
                file.display()
            )
        }
    }
}

fn node(file: &Path) -> anyhow::Result<()> {
    crate::config::node::NodeConfig::load(file)?;
    Ok(())
}

fn rollout(file: &Path, text: &str) -> anyhow::Result<()> {
    crate::config::rollout::parse(text, &file.display().to_string())?;
    Ok(())
}
