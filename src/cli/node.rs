//! `aviary node`: runs one node. Only the arguments live here; the node itself is put together by its own module.

use std::path::PathBuf;

use clap::Args;

/// Arguments of `aviary node`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  aviary node --config config/node-a.toml\n\n\
    The data directory must have been made by `aviary cluster init`: a node without its genesis refuses to vote.")]
pub struct NodeArgs {
    /// The node's file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Keeps the node's data in ROOT/<node id>, whatever the file says: for trials beside data that matters.
    #[arg(long, value_name = "ROOT")]
    pub data_root: Option<PathBuf>,
}

/// Runs the node until it is told to stop.
pub fn run(args: NodeArgs) -> anyhow::Result<()> {
    anyhow::bail!("{}: this build holds no node", args.config.display())
}
