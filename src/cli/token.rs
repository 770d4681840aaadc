//! `aviary token`: makes a bearer token for the API.

use anyhow::ensure;
use clap::Args;

use super::Exit;
use crate::api::auth::Role;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary token --role operator --name alice\n\n\
    Give the token to its owner, for AVIARY_TOKEN or --token-file. Add the line to the tokens_file of each node.")]
pub struct TokenArgs {
    /// Role: `viewer` reads, `operator` also changes rollouts, `admin` also changes the cluster.
    #[arg(long)]
    role: Role,
    /// Name of the owner in logs and records: 1 to 64 letters, digits, '.', '_', '-' or '@'.
    #[arg(long, value_parser = name)]
    name: String,
}

fn name(text: &str) -> anyhow::Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_@".contains(c);
    let is_name = !text.is_empty() && text.len() <= 64 && text.chars().all(fits);
    ensure!(is_name, "found {text:?}, expected 1 to 64 letters, digits, '.', '_', '-' or '@'");
    Ok(text.into())
}

/// Prints a new random token and its line for the tokens file; the token is not stored.
pub fn run(args: &TokenArgs) -> Exit {
    let token = format!("avy_{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
    println!("token: {token}");
    println!("line:  {} {} {}", args.role, args.name, blake3::hash(token.as_bytes()));
    Exit::Done
}
