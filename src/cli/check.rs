//! `aviary config check`: finds what is wrong with files before a node does.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Deserialize;

use super::input::{InputFile, is_stdin};
use super::{Exit, output};
use crate::config;
use crate::domain::plan::RolloutSpec;

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
            Ok(told) => {
                println!("{}: ok", file.display());
                told.iter().for_each(|line| println!("  {line}"));
            }
            Err(error) => {
                output::error(&format!("{error:#}"));
                exit = Exit::Refused;
            }
        }
    }
    Ok(exit)
}

/// Checks a file; returns what is to be known of it.
fn check(file: &Path) -> anyhow::Result<Vec<String>> {
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

fn node(input: &InputFile, path: &Path) -> anyhow::Result<Vec<String>> {
    config::node::NodeConfig::of(&input.text, path)?;
    Ok(Vec::new())
}

/// The part of a document that says what it is.
#[derive(Deserialize)]
struct DocumentHead {
    kind: Option<String>,
}

fn documents(input: &InputFile) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for (name, text) in input.documents() {
        let kind = config::read_yaml::<DocumentHead>(&text).ok().and_then(|document| document.kind);
        match kind.as_deref() {
            Some("Router") => drop(config::router::RouterConfig::of(&text, &name)?),
            _ => {
                let manifest = config::rollout::parse(&text, &name)?;
                lines.extend(told(&manifest));
            }
        }
    }
    Ok(lines)
}

/// Returns what a rollout is judged by, and the traffic that its first step needs.
fn told(spec: &RolloutSpec) -> Vec<String> {
    let mut lines = spec.analysis.in_words(spec.compared_classes);
    let first = spec.stages.iter().map(|stage| stage.weight.fraction()).find(|share| *share > 0.0);
    if let Some((needed, share)) = spec.analysis.rate_needed().zip(first) {
        let percent = share * 100.0;
        lines.push(format!(
            "so {:.1} requests/s of the whole service at {percent} %; with fewer it never goes on",
            needed / share
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_analysis_and_the_traffic_that_it_needs_are_told() {
        let text = "apiVersion: aviary/v1\nkind: Rollout\nmetadata: { name: s }\nspec:\n  stable: { version: v1, answer: node }\n  \
                    canary: { version: v2, answer: node }\n  steps: [ { setWeight: 5 } ]\n";
        let spec = crate::config::rollout::parse(text, "r").unwrap();
        let expected = [
            "errors: more than 5 % errors in 30 s rolls back",
            "latency: mean latency above 500 ms in 30 s pauses",
            "limits need 100 canary answers in 30 s: 3.3 canary requests/s",
            "so 66.7 requests/s of the whole service at 5 %; with fewer it never goes on",
        ];
        assert_eq!(told(&spec), expected);
    }
}
