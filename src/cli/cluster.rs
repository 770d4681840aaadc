//! `aviary cluster`: makes a cluster, shows it, and changes whose votes count.

use crate::adapters::clock::BootClock;
use crate::adapters::disk::DiskStore;
use crate::adapters::tls::authority::Authority;
use crate::config::genesis;
use crate::domain::ids::{Incarnation, NodeId};
use crate::ports::{Clock as _, Recovered, Store as _};
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{Accepted, AcceptorState, Chosen, Operation, Slot};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::backup::{self, BackupArgs, RestoreArgs, VerifyBackupArgs};
use super::node::identity_files;
use super::output::{self, Format, facts, table};
use super::upgrade::{self, Direction, DowngradeArgs, UpgradeArgs, builds_differ, waits};
use super::write::{self, WriteArgs};
use super::{Exit, read};
use crate::client::Api;
use crate::model::{ClusterMember, ClusterView, MemberData, MemberName};

#[derive(Debug, Subcommand)]
pub enum ClusterVerb {
    /// Create a cluster: certificates, data directories and the first record of the log. Run it once, before the nodes.
    Init(InitArgs),
    /// Renew a node's certificate. A running node loads the new one by itself.
    Issue(IssueArgs),
    /// Create a new cluster from one node's data, after a majority lost their disks. The node must be stopped.
    ForceNew(ForceNewArgs),
    /// Write a backup of the running cluster into a file, from any node: its log, its checkpoint and the node's configuration.
    Backup(BackupArgs),
    /// Verify a backup, and show what is in it.
    VerifyBackup(VerifyBackupArgs),
    /// Create a new cluster from a backup. It has another id and another certificate authority than the old one.
    Restore(RestoreArgs),
    /// Create the data directory of a new node for an existing cluster.
    Join(JoinArgs),
    /// Make a running node a voter; `join` printed its incarnation.
    Add(ReadmitArgs),
    /// Remove a node from the cluster permanently.
    Remove(MemberArgs),
    /// Show the members, the coordinator, and each member's last log slot and build.
    Status,
    /// Say whether the nodes may be replaced one by one by those of the next version.
    Upgrade(UpgradeArgs),
    /// Say whether the nodes may be replaced one by one by those of the version before.
    Downgrade(DowngradeArgs),
    /// Exclude a node from promotion votes, for example during a repair. It serves stable only.
    #[command(alias = "bench")]
    Cordon(MemberArgs),
    /// Include a node in promotion votes again.
    #[command(alias = "unbench")]
    Uncordon(MemberArgs),
    /// Restore a node's vote after its disk was replaced. `cluster status` shows its new incarnation.
    Readmit(ReadmitArgs),
}

/// Arguments of `aviary cluster init`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  aviary cluster init --config config/node-a.toml --config config/node-b.toml \
    --config config/node-c.toml\n\nA data directory that is not empty is refused and not changed.")]
pub struct InitArgs {
    /// File of a node (TOML); repeat the option for each node.
    #[arg(long, value_name = "FILE", required = true)]
    pub config: Vec<PathBuf>,
    /// Creates each node's data in ROOT/NODE instead of the `data_dir` of its file, to try it out.
    #[arg(long, value_name = "ROOT")]
    pub data_root: Option<PathBuf>,
    /// Directory for the cluster's certificate authority; default: `ca` beside the first node's data. Keep it off the nodes:
    /// its key can issue a certificate for any node.
    #[arg(long, value_name = "DIR")]
    pub ca: Option<PathBuf>,
    /// Validity of the nodes' certificates.
    #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = humantime::parse_duration)]
    pub valid: Duration,
}

/// Arguments of `aviary cluster issue`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  aviary cluster issue --ca data/ca --config config/node-b.toml\n\n\
    The old certificate stays valid until it expires.")]
pub struct IssueArgs {
    /// Directory of the certificate authority that `cluster init` created.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// File of the node (TOML), as `aviary node` takes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The --data-root that `cluster init` was given, if any.
    #[arg(long, value_name = "ROOT")]
    data_root: Option<PathBuf>,
    /// How long the certificate is valid, from now on.
    #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = humantime::parse_duration)]
    valid: Duration,
}

/// Arguments of `aviary cluster force-new`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Decisions that only the lost nodes knew are lost, so the command asks for confirmation. All traffic goes to stable,\n\
    the cluster gets a new id, and it refuses nodes of the old cluster. Stop the surviving node first.\n\n\
    Example, after two of three disks were lost:\n  aviary cluster force-new --from data/node-a --config config/node-a.toml \\\n    \
    --config config/node-b.toml --config config/node-c.toml --data-root data-new"
)]
pub struct ForceNewArgs {
    /// Data directory of the surviving node; it is only read.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    #[command(flatten)]
    init: InitArgs,
}

/// Creates a cluster that continues from one node's data of another cluster; asks for confirmation on standard input.
pub fn force_new(args: ForceNewArgs) -> anyhow::Result<()> {
    let Recovered { ledger, log, acceptor, notes, .. } = DiskStore::open(&args.from)?;
    notes.iter().for_each(|note| eprintln!("note: {note}"));
    let mut ledger = ledger;
    for chosen in &log {
        ledger.apply(chosen)?;
    }
    // What it accepted last may have been decided, and somebody may have been told so.
    let accepted = acceptor.as_ref().and_then(|acceptor| acceptor.accepted.clone());
    if let Some(Accepted { ballot, record }) = accepted.filter(|accepted| accepted.record.slot == ledger.head.next()) {
        ledger.apply(&Chosen { ballot: Some(ballot), decided_at: record.intent.at, record })?;
    }
    let old = ledger.cluster;
    println!("{}: cluster {old}, {} slots, {} services", args.from.display(), ledger.head, ledger.services.len());
    if let Some(lost) = acceptor.as_ref().filter(|acceptor| acceptor.head > ledger.head) {
        println!(
            "slots {} to {} are lost: the acceptor state names them, but the log does not contain them",
            ledger.head.next(),
            lost.head
        );
    }
    println!(
        "Decisions that this node does not know are lost. To create a new cluster from its data, type the cluster id:"
    );
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    anyhow::ensure!(typed.trim() == old.to_string(), "found {:?}, expected {old}: nothing was changed", typed.trim());
    found(&args.init, |founding| {
        let Operation::Genesis { cluster, members } = &founding.genesis.record.intent.operation else {
            unreachable!("a founding begins with a genesis");
        };
        Ok(Some(ledger.refounded(*cluster, members.clone(), BootClock.now().wall)?))
    })
}

/// Arguments of `aviary cluster join`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example, for a fourth node d:\n  1. name d under [peers.d] in the other nodes' files, and restart them one by one\n  \
    2. aviary cluster join --genesis data/node-a --ca data/ca --config config/node-d.toml\n  \
    3. aviary node --config config/node-d.toml\n  4. aviary cluster add d --incarnation HEX\n\n\
    Example, for node c, whose disk is lost:\n  1. aviary cluster join --replace c --genesis data/node-a --ca data/ca --config config/node-c.toml\n  \
    2. aviary node --config config/node-c.toml\n  3. aviary cluster readmit c --incarnation HEX"
)]
pub struct JoinArgs {
    /// Data directory of an existing node, or a directory with a copy of its file `genesis`.
    #[arg(long, value_name = "DIR")]
    genesis: PathBuf,
    /// Directory of the certificate authority that `cluster init` created; not needed with control.plaintext = true.
    #[arg(long, value_name = "DIR")]
    ca: Option<PathBuf>,
    /// File of the new node (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Id of a member whose data is lost, which the file must have: the new data takes its place once it is readmitted.
    #[arg(long, value_name = "NODE")]
    replace: Option<NodeId>,
    /// How long the node's certificate is valid, from now on.
    #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = humantime::parse_duration)]
    valid: Duration,
}

/// Makes a new node's data directory: the cluster's genesis, an identity, and an acceptor state that promised nothing.
pub fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let config = super::node::load(&args.config, None)?;
    let genesis = DiskStore::read_genesis(&args.genesis)?;
    let Operation::Genesis { cluster, members } = &genesis.record.intent.operation else {
        anyhow::bail!(
            "{}: the first record is not a genesis record, expected the genesis of a cluster",
            args.genesis.display()
        );
    };
    let node = config.id.clone();
    match &args.replace {
        Some(replaced) => anyhow::ensure!(
            *replaced == node,
            "--replace is {replaced}, expected {node}, the id in {}",
            config.file.display()
        ),
        None => anyhow::ensure!(
            !members.0.contains_key(&node),
            "node {node} is one of the cluster's first nodes, expected a new node id; if its data is lost, run the same command \
             with --replace {node}"
        ),
    }
    let folder = NewFolder::empty(&config.data_dir)?;
    let issued = match (identity_files(&config), &args.ca) {
        (None, _) => None,
        (Some(_), None) => anyhow::bail!(
            "--ca is missing, expected the certificate authority: {} uses mutual TLS",
            config.file.display()
        ),
        (Some(files), Some(ca)) => {
            let authority = Authority::load(ca)?;
            let found = authority.cluster();
            anyhow::ensure!(
                found == *cluster,
                "{} belongs to cluster {found}, expected cluster {cluster}",
                ca.display()
            );
            Some((files, authority.issue(&node, args.valid)?))
        }
    };
    let acceptor = AcceptorState {
        cluster: *cluster,
        node: node.clone(),
        incarnation: Incarnation(rand::random()),
        boot: 0,
        promised: None,
        accepted: None,
        head: Slot(0),
        head_hash: genesis.record.hash(),
        writes: 0,
        seen: BTreeMap::new(),
    };
    DiskStore::create(&config.data_dir, &acceptor, &genesis)?;
    if let Some((files, issued)) = issued {
        issued.install(&files)?;
    }
    folder.keep();
    let verb = if args.replace.is_some() { "readmit" } else { "add" };
    output::line(&format!(
        "node {node} of cluster {cluster}: {}\nnext: aviary node --config {}\nthen: aviary cluster {verb} {node} --incarnation {}",
        config.data_dir.display(),
        config.file.display(),
        acceptor.incarnation
    ))
}

/// Renews a node's certificate and key.
pub fn issue(args: &IssueArgs) -> anyhow::Result<()> {
    let config = super::node::load(&args.config, args.data_root.as_deref())?;
    let authority = Authority::load(&args.ca)?;
    let Some(files) = identity_files(&config) else {
        anyhow::bail!("{} has control.plaintext = true, expected a node that uses mutual TLS", config.file.display());
    };
    authority.issue(&config.id, args.valid)?.install(&files)?;
    let valid = humantime::format_duration(args.valid);
    println!(
        "node {} of cluster {}: {}, valid for {valid}",
        config.id,
        authority.cluster(),
        files.certificate.display()
    );
    Ok(())
}

/// A node id, and the options of a write.
#[derive(Debug, Args)]
pub struct MemberArgs {
    /// The node's id, such as c.
    node: NodeId,
    #[command(flatten)]
    write: WriteArgs,
}

/// A node id, the incarnation of its data, and the options of a write.
#[derive(Debug, Args)]
pub struct ReadmitArgs {
    /// The node's id, such as c.
    node: NodeId,
    /// Incarnation whose votes are to count, 16 hexadecimal digits; the node logs it at start.
    #[arg(long, value_name = "HEX", value_parser = incarnation)]
    incarnation: String,
    #[command(flatten)]
    write: WriteArgs,
}

fn incarnation(text: &str) -> anyhow::Result<String> {
    match u64::from_str_radix(text, 16) {
        Ok(n) if text.len() <= 16 && !text.starts_with('+') => Ok(format!("{n:016x}")),
        _ => bail!("found {text:?}, expected up to 16 hexadecimal digits"),
    }
}

/// Makes a cluster: an id, each node's identity and the genesis that all logs begin with.
pub fn init(args: InitArgs) -> anyhow::Result<()> {
    found(&args, |_| Ok(None))
}

/// Makes a cluster that begins with its genesis, or with a ledger that continues another one's.
pub(super) fn found(
    args: &InitArgs,
    continued: impl FnOnce(&genesis::Founding) -> anyhow::Result<Option<Ledger>>,
) -> anyhow::Result<()> {
    let load = |file: &PathBuf| super::node::load(file, args.data_root.as_deref());
    let configs: Vec<_> = args.config.iter().map(load).collect::<Result<_, _>>()?;
    let founding = genesis::found(&configs, &mut rand::rng(), BootClock.now().wall)?;
    // All or none: nothing is made where some directory is in use, and nothing is left where something fails.
    let mut folders = configs.iter().map(|config| NewFolder::empty(&config.data_dir)).collect::<Result<Vec<_>, _>>()?;
    let beside = || configs[0].data_dir.parent().unwrap_or(Path::new("")).join("ca");
    let ca = args.ca.clone().unwrap_or_else(beside);
    let secured = configs.iter().any(|config| config.identity.is_some());
    let ledger = continued(&founding)?;
    let checkpoint = ledger.as_ref().filter(|ledger| ledger.head > Slot(0)).map(Checkpoint::of).transpose()?;
    if secured && !ca.exists() {
        folders.push(NewFolder::empty(&ca)?);
    }
    let authority = secured.then(|| Authority::create(&ca, founding.cluster)).transpose()?;
    // Told once all of it is there: who reads it may have gone.
    let mut told = format!("cluster {}\n", founding.cluster);
    for config in &configs {
        let mut acceptor = founding.acceptors[&config.id].clone();
        if let Some(ledger) = &ledger {
            (acceptor.head, acceptor.head_hash) = (ledger.head, ledger.head_hash);
        }
        DiskStore::create(&config.data_dir, &acceptor, &founding.genesis)?;
        if let Some(checkpoint) = &checkpoint {
            DiskStore::open(&config.data_dir)?.store.install(checkpoint)?;
        }
        if let (Some(authority), Some(files)) = (&authority, identity_files(config)) {
            authority.issue(&config.id, args.valid)?.install(&files)?;
        }
        told += &format!("node {}: {}\n", config.id, config.data_dir.display());
    }
    folders.into_iter().for_each(NewFolder::keep);
    if authority.is_some() {
        told += &format!(
            "certificate authority: {} (keep it off the nodes: its key can issue a certificate for any node)\n",
            ca.display()
        );
    }
    output::put(&told)
}

/// A folder that a command fills. What is in it goes when the command fails, so that it doesn't stand in the way of the next.
struct NewFolder {
    path: PathBuf,
    /// It was there before, and empty.
    existed: bool,
    kept: bool,
}

impl NewFolder {
    /// Returns a folder that is to be filled, unless something is in it.
    fn empty(path: &Path) -> anyhow::Result<Self> {
        let entries = std::fs::read_dir(path).map(|mut entries| entries.next().is_some());
        anyhow::ensure!(
            !entries.unwrap_or(false),
            "{} is not empty, expected a new or empty directory",
            path.display()
        );
        Ok(Self { path: path.into(), existed: path.exists(), kept: false })
    }

    /// Leaves it as it is: the command succeeded.
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.kept && self.path.is_dir() {
            // What can't be removed is named by the next command, which finds it there.
            let _ = std::fs::remove_dir_all(&self.path);
            if self.existed {
                let _ = std::fs::create_dir_all(&self.path);
            }
        }
    }
}

/// Runs a verb that talks to a cluster.
pub async fn run(api: &Api, verb: ClusterVerb, format: Format) -> anyhow::Result<Exit> {
    match verb {
        ClusterVerb::Init(_) | ClusterVerb::Issue(_) | ClusterVerb::Join(_) | ClusterVerb::ForceNew(_) => {
            unreachable!("handled before the runtime starts")
        }
        ClusterVerb::VerifyBackup(_) | ClusterVerb::Restore(_) => unreachable!("handled before the runtime starts"),
        ClusterVerb::Backup(args) => backup::run(api, &args, format).await,
        ClusterVerb::Upgrade(_) => upgrade::run(api, Direction::Upgrade, format).await,
        ClusterVerb::Downgrade(_) => upgrade::run(api, Direction::Downgrade, format).await,
        ClusterVerb::Status => read::print(&api.get("/v1/cluster").await?, format, status),
        ClusterVerb::Cordon(args) => change(api, "cordon", &MemberName { node: args.node }, args.write, format).await,
        ClusterVerb::Uncordon(args) => {
            change(api, "uncordon", &MemberName { node: args.node }, args.write, format).await
        }
        ClusterVerb::Remove(args) => change(api, "remove", &MemberName { node: args.node }, args.write, format).await,
        ClusterVerb::Add(args) => {
            let body = MemberData { node: args.node, incarnation: args.incarnation };
            change(api, "add", &body, args.write, format).await
        }
        ClusterVerb::Readmit(args) => {
            let body = MemberData { node: args.node, incarnation: args.incarnation };
            change(api, "readmit", &body, args.write, format).await
        }
    }
}

async fn change(api: &Api, verb: &str, body: &impl Serialize, args: WriteArgs, format: Format) -> anyhow::Result<Exit> {
    let path = format!("/v1/cluster/{verb}");
    Ok(write::send(api, path, "application/json", serde_json::to_string(body)?, args, format).await?.0)
}

/// Formats the cluster's state for a terminal.
pub fn status(view: &ClusterView) -> String {
    let head = facts(&[
        ("cluster", view.cluster.clone()),
        ("asked node", view.node.to_string()),
        ("coordinator", view.coordinator.to_string()),
        ("mode", output::name(&view.mode)),
        ("default service", view.default_service.as_ref().map_or("none".into(), ToString::to_string)),
    ]);
    let mut members = table(["NODE", "ALIVE", "HEAD", "CORDONED", "INCARNATION", "VOTES", "BUILD"]);
    for (node, member) in &view.members {
        members.add_row([
            node.to_string(),
            member.alive.to_string(),
            member.head.map(|slot| slot.to_string()).unwrap_or_default(),
            member.cordoned.to_string(),
            member.incarnation.clone(),
            member.counts_not.as_ref().map_or("count".into(), |why| format!("don't count: {why}")),
            member.build.clone().unwrap_or_default(),
        ]);
    }
    let build =
        |(node, member): (&NodeId, &ClusterMember)| (node.to_string(), member.build.clone().unwrap_or_default());
    let builds: Vec<_> = view.members.iter().map(build).collect();
    let differ = builds_differ(&builds).map(|line| format!("\n\n{line}")).unwrap_or_default();
    let waiting = view.features.iter().filter(|feature| !feature.waits_for.is_empty());
    let waiting: String = waiting.map(|feature| format!("\n\n{}", waits(feature))).collect();
    format!("{head}\n\n{}{differ}{waiting}", members.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_is_hexadecimal() {
        assert_eq!(incarnation("ab").unwrap(), "00000000000000ab");
        assert!(
            incarnation("+ab").is_err() && incarnation("xyz").is_err() && incarnation("0".repeat(17).as_str()).is_err()
        );
    }
}
