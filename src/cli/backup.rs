//! `aviary cluster backup`, `verify-backup` and `restore`.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::cluster::{self, InitArgs};
use super::output::{self, Format, facts};
use super::{Exit, read, show};
use crate::adapters::clock::BootClock;
use crate::backup::{self, Backup};
use crate::client::{Api, Download};
use crate::domain::ids::ServiceId;
use crate::ports::Clock as _;
use crate::protocol::record::Operation;

/// Arguments of `aviary cluster backup`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary cluster backup --out backup.aviary --token-file admin.token\n\n\
    The first node of --api that can be reached writes it, without a pause of its service; off loopback that needs a token of the\n\
    role admin. The backup holds no private key, no token and no password. It is verified before it gets its name.")]
pub struct BackupArgs {
    /// File to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replaces the file if there is one.
    #[arg(long)]
    force: bool,
}

/// Arguments of `aviary cluster verify-backup`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary cluster verify-backup backup.aviary\n  \
    aviary cluster verify-backup backup.aviary --show config > node-a.toml")]
pub struct VerifyBackupArgs {
    /// The backup.
    file: PathBuf,
    /// Prints this part of the backup instead.
    #[arg(long, value_name = "PART")]
    show: Option<Part>,
}

/// A part of a backup that people read.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    /// The node's configuration file, without comments and secrets.
    Config,
    /// The certificate of the old cluster's authority.
    Authority,
}

/// Arguments of `aviary cluster restore`.
#[derive(Debug, Args)]
#[command(
    after_help = "The new cluster has the services of the backup, with all of their traffic on stable: a rollout that was under way\n\
    was rolled back, because the evidence for its canary is gone. It knows no transaction of the old cluster, so that a repeated\n\
    idempotency key is a new request. It refuses nodes of the old cluster, and the other way round: a backup can't be put into a\n\
    running cluster. Stop the old nodes first; they would serve the same ports.\n\n\
    Example:\n  aviary cluster restore --from backup.aviary --config config/node-a.toml \\\n    \
    --config config/node-b.toml --config config/node-c.toml --data-root data-new"
)]
pub struct RestoreArgs {
    /// The backup; it is only read.
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    #[command(flatten)]
    init: InitArgs,
}

/// Asks a node for a backup and writes it into a file.
pub async fn run(api: &Api, args: &BackupArgs, format: Format) -> anyhow::Result<Exit> {
    anyhow::ensure!(
        args.force || fs::symlink_metadata(&args.out).is_err(),
        "{} exists, expected a new file (--force replaces it)",
        args.out.display()
    );
    let mut body = match api.download("/v1/cluster/backup").await? {
        Download::Open(body) => body,
        Download::Refused(answer) => return read::print(&answer, format, show::word),
    };
    let mut draft = Draft::create(&args.out)?;
    while let Some(piece) = body.next().await? {
        draft.write(&piece)?;
    }
    let backup = draft.verify()?;
    draft.publish(args.force)?;
    tell(&args.out, &backup, format)
}

/// Verifies a backup and shows what is in it.
pub fn verify(args: &VerifyBackupArgs, format: Format) -> anyhow::Result<Exit> {
    let backup = load(&args.file)?;
    match args.show {
        None => tell(&args.file, &backup, format),
        Some(Part::Config) => output::put(&backup.config).map(|()| Exit::Done),
        Some(Part::Authority) => {
            let pem =
                backup.authority.context("the backup has no authority: its cluster's control plane was plaintext")?;
            output::put(&pem).map(|()| Exit::Done)
        }
    }
}

/// Creates a cluster that begins with the services of a backup.
pub fn restore(args: &RestoreArgs) -> anyhow::Result<Exit> {
    let backup = load(&args.from)?;
    let Backup { header, ledger, .. } = &backup;
    let source = format!("backup of cluster {} at slot {}, {}", header.cluster, header.slot, header.at_ms);
    let ended: Vec<_> = (ledger.services.iter())
        .filter(|(_, known)| known.service.routing.canary_model_id.is_some())
        .map(|(id, _)| ServiceId::as_str(id))
        .collect();
    cluster::found(&args.init, |founding| {
        let Operation::Genesis { cluster, members } = &founding.genesis.record.intent.operation else {
            unreachable!("a founding begins with a genesis");
        };
        let at = BootClock.now().wall;
        Ok(Some(ledger.clone().restored(*cluster, members.clone(), at, &source)?))
    })?;
    println!("restored from {source}: {} services, all of their traffic on stable", ledger.services.len());
    if !ended.is_empty() {
        println!("rolled back, because they were under way: {} (start one again: aviary retry NAME)", ended.join(", "));
    }
    println!("outcomes of the old cluster's transactions are not carried over: its idempotency keys count as new");
    println!("next: stop the old cluster's nodes, then start each new one: aviary node --config FILE{}", root_of(args));
    Ok(Exit::Done)
}

fn root_of(args: &RestoreArgs) -> String {
    args.init.data_root.as_ref().map(|root| format!(" --data-root {}", root.display())).unwrap_or_default()
}

fn load(file: &Path) -> anyhow::Result<Backup> {
    let name = || file.display().to_string();
    let open = File::open(file).with_context(name)?;
    backup::read(BufReader::new(open)).with_context(name)
}

fn tell(file: &Path, backup: &Backup, format: Format) -> anyhow::Result<Exit> {
    let Backup { header, ledger, .. } = backup;
    let body = json!({
        "file": file.display().to_string(),
        "cluster": header.cluster.to_string(),
        "node": header.node,
        "build": header.build,
        "time": header.at_ms.to_string(),
        "slot": header.slot,
        "hash": header.hash,
        "checkpoint": backup.checkpoint,
        "records": backup.records,
        "services": ledger.services.len(),
        "bytes": backup.bytes,
        "blake3": backup.digest,
    });
    output::print(format, &body.to_string(), summary)?;
    Ok(Exit::Done)
}

fn summary(json: &Value) -> String {
    let names = [
        "file",
        "cluster",
        "node",
        "build",
        "time",
        "slot",
        "hash",
        "checkpoint",
        "records",
        "services",
        "bytes",
        "blake3",
    ];
    facts(&names.map(|name| (name, show::word(&json[name]))))
}

/// A file under a name of its own until it is whole; removed if it never is.
struct Draft {
    file: File,
    path: PathBuf,
    out: PathBuf,
}

impl Draft {
    fn create(out: &Path) -> anyhow::Result<Self> {
        let name = out.file_name().with_context(|| format!("{} names no file", out.display()))?;
        let path = out.with_file_name(format!(".{}.{}.new", name.to_string_lossy(), std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Self { file, path, out: out.into() })
    }

    fn write(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(piece).with_context(|| self.path.display().to_string())
    }

    fn verify(&self) -> anyhow::Result<Backup> {
        load(&self.path).context("the node's answer is no backup that can be used")
    }

    /// Gives the file its name, durably.
    fn publish(&self, force: bool) -> anyhow::Result<()> {
        let named = self.file.sync_all().and_then(|()| match force {
            true => fs::rename(&self.path, &self.out),
            // Fails where a file appeared meanwhile.
            false => fs::hard_link(&self.path, &self.out),
        });
        named.with_context(|| self.out.display().to_string())?;
        let folder = self.out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).with_context(|| folder.display().to_string())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It is gone where it was renamed.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_leaves_nothing_and_never_replaces_a_file_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("b.aviary");
        let names = || fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let mut draft = Draft::create(&out).unwrap();
        draft.write(b"AVIARYBK").unwrap();
        assert!(format!("{:#}", draft.verify().unwrap_err()).contains("it ends after 8 bytes"));
        drop(draft);
        assert!(names().is_empty());
        fs::write(&out, "mine").unwrap();
        let draft = Draft::create(&out).unwrap();
        assert!(draft.publish(false).is_err());
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
        draft.publish(true).unwrap();
        drop(draft);
        assert_eq!((names().len(), fs::read_to_string(&out).unwrap()), (1, String::new()));
    }
}
