//! A node's disk: promises in an acceptor file, chosen records in a journal, their sum in a checkpoint, genesis
//! in a
//! file of its own.
//!
//! [`DiskStore::persist`] costs one write and one `fdatasync`, whatever was appended before: records that the journal
//! has not synced yet travel in the acceptor state's slot. The journal follows on a thread of its own.
//!
//! What is damaged is moved aside and reported, never repaired by guess: a log may come back shorter, never altered
//! and never with a hole. That it is shorter shows in the acceptor state's `head`; the protocol fetches the rest from
//! peers.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

mod acceptor;
mod checkpoint;
pub mod format;
mod journal;
mod runs;

use super::clock::BootClock;
use crate::ports::{Clock, LogReader, Recovered, Store, StoreError};
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::codec;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{AcceptorState, Chosen, Operation, Slot};
use acceptor::{AcceptorFile, SLOT_BYTES, Saved, bytes_needed};
use format::{CHECKPOINT, JOURNAL, UnknownFormat};
use journal::{
    Chain, ChainError, EntryDamage, Journal, OpenFailure, SyncFailure, Syncer, decode_entry, encode_entry,
    speaks_of_content, version_of,
};
pub use runs::DiskRuns;

/// How long sled may take to open before its directory counts as broken.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of records that a slot of the acceptor state carries.
const TAIL_BYTES_MAX: usize = 90 * 1024;

/// Why a data directory gives no store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing was ever set up there.
    #[error(
        "{}: the data directory holds no genesis, so this node may not vote; run `aviary cluster init`, or correct the path",
        dir.display()
    )]
    NoGenesis {
        /// Data directory that the error is about.
        dir: PathBuf,
    },
    /// Another process uses the data directory at this moment.
    #[error("{}: another process uses this data directory; stop it, or give this node its own directory", dir.display())]
    Locked {
        /// Data directory that the error is about.
        dir: PathBuf,
    },
    /// Something is there already that a new node would overwrite.
    #[error(
        "{}: found {found:?}, expected no node in this data directory; a node's promises are never overwritten", dir.display()
    )]
    Occupied {
        /// Data directory that the error is about.
        dir: PathBuf,
        /// Name of a file that the directory contains.
        found: &'static str,
    },
    /// Another version of the program wrote a file, so that this one must leave all of them as they are.
    #[error(transparent)]
    Format(#[from] UnknownFormat),
    /// The system refused to read or write.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A node's durable memory in a directory of its own.
pub struct DiskStore {
    acceptor: AcceptorFile,
    /// Records that the journal may not have synced, with their slots.
    tail: VecDeque<(Slot, Vec<u8>)>,
    next: Slot,
    /// Joined before the journal is let go.
    syncer: Syncer,
    journal: Arc<Journal>,
    /// The first failure; nothing is tried after it.
    failure: Option<String>,
    paths: Paths,
    /// Version that the journal is marked with: none of its records has a later one.
    marked: u8,
}

/// The name of the acceptor file up to format 5. A node that overlooked it would start without its promises.
const OLDER_ACCEPTOR: &str = "register";

impl DiskStore {
    /// Sets up a data directory for a node that never ran: its first acceptor state, and the log's first record.
    pub fn create(dir: &Path, acceptor: &AcceptorState, genesis: &Chosen) -> Result<(), OpenError> {
        let paths = Paths::of(dir);
        fs::create_dir_all(dir).map_err(|e| trouble(dir, "create the data directory", e))?;
        let _lock = lock(&paths)?;
        for (path, found) in
            [(&dir.join(OLDER_ACCEPTOR), OLDER_ACCEPTOR), (&paths.acceptor, "acceptor"), (&paths.journal, "journal")]
        {
            if path.exists() {
                return Err(OpenError::Occupied { dir: dir.into(), found });
            }
        }
        let (version, acceptor) = (format::of_acceptor(acceptor), encoded("acceptor", &paths.acceptor, acceptor)?);
        encoded("genesis", &paths.genesis, genesis)?;
        let entry = encode_entry(genesis);
        mark_journal(&paths.marker, version_of(&entry))?;
        write_whole(&paths.genesis, &entry).map_err(|e| trouble(&paths.genesis, "write genesis", e))?;
        // The acceptor file is what makes a node: it comes last, complete, under its own name.
        let draft = dir.join("acceptor.new");
        remove_if_there(&draft).map_err(|e| trouble(&draft, "remove an unfinished acceptor file", e))?;
        let mut found = AcceptorFile::open(&draft)?;
        found.file.write(version, &acceptor, std::iter::empty())?;
        let renamed = fs::rename(&draft, &paths.acceptor).and_then(|()| sync_directory(dir));
        renamed.map_err(|e| trouble(&paths.acceptor, "put the acceptor file in place", e))?;
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        Ok(parent.map_or(Ok(()), sync_directory).map_err(|e| trouble(dir, "sync the parent directory", e))?)
    }

    /// Returns the genesis that a data directory keeps, for a new node of the same cluster.
    pub fn read_genesis(dir: &Path) -> Result<Chosen, OpenError> {
        let path = Paths::of(dir).genesis;
        let bytes = fs::read(&path).map_err(|e| trouble(&path, "read genesis", e))?;
        let decoded = decode_entry(&bytes).map_err(|why| io::Error::new(ErrorKind::InvalidData, why));
        Ok(decoded.map_err(|e| trouble(&path, "read genesis", e))?)
    }

    /// Opens a node's data directory and verifies everything in it.
    pub fn open(dir: &Path) -> Result<Recovered<Self>, OpenError> {
        Self::open_within(dir, OPEN_PATIENCE)
    }

    fn open_within(dir: &Path, patience: Duration) -> Result<Recovered<Self>, OpenError> {
        let paths = Paths::of(dir);
        if ![&paths.acceptor, &paths.journal, &paths.genesis].iter().any(|path| path.exists()) {
            return Err(OpenError::NoGenesis { dir: dir.into() });
        }
        let lock = Arc::new(lock(&paths)?);
        let older = dir.join(OLDER_ACCEPTOR);
        if older.exists() {
            let why = "it is of format 5 or older, expected a file named acceptor: start the version that wrote it";
            return Err(trouble(&older, "read the acceptor file", io::Error::new(ErrorKind::InvalidData, why)).into());
        }
        let marked = marked_journal(&paths)?;
        let acceptor::FoundAcceptor { file, saved, mut notes } = AcceptorFile::open(&paths.acceptor)?;
        sync_directory(dir).map_err(|e| trouble(dir, "sync the data directory", e))?;
        let (acceptor, tail) = saved.map_or((None, Vec::new()), |Saved { acceptor, tail, .. }| (Some(acceptor), tail));
        let opening = DiskOpening { paths: &paths, lock: &lock, patience };
        let (journal, ledger, chain) = opening.recover(&tail, &mut notes)?;
        let marked = match marked {
            Some(marked) => marked,
            None => {
                let newest = chain.since(Slot(0)).iter().map(|chosen| format::of_record(&chosen.record)).max();
                let used = if ledger.uses().is_empty() { JOURNAL.oldest } else { JOURNAL.newest };
                let version = newest.unwrap_or(0).max(used as u8);
                mark_journal(&paths.marker, version)?;
                sync_directory(dir).map_err(|e| trouble(dir, "sync the data directory", e))?;
                version
            }
        };
        let (journal, next) = (Arc::new(journal), chain.next());
        let syncer = Syncer::start(journal.clone(), next);
        let syncer = syncer.map_err(|e| trouble(&paths.journal, "start the journal's thread", e))?;
        let store = Self { acceptor: file, tail: VecDeque::new(), next, syncer, journal, failure: None, paths, marked };
        let mut log = chain.into_log();
        log.drain(..log.partition_point(|chosen| chosen.record.slot <= ledger.head));
        Ok(Recovered { store, acceptor, ledger, log, notes })
    }

    fn try_persist(&mut self, acceptor: &AcceptorState) -> Result<(), StoreError> {
        let version = format::of_acceptor(acceptor);
        let acceptor = encoded("acceptor", &self.paths.acceptor, acceptor)?;
        self.forget_synced()?;
        if !self.fits(acceptor.len()) {
            self.syncer.wait().map_err(|failure| self.behind(failure))?;
            self.forget_synced()?;
        }
        self.acceptor.write(version, &acceptor, self.tail.iter().map(|(_, entry)| entry.as_slice()))
    }

    fn try_append(&mut self, chosen: &Chosen) -> Result<(), StoreError> {
        encoded("record", &self.paths.journal, chosen)?;
        let entry = encode_entry(chosen);
        self.mark(version_of(&entry))?;
        self.forget_synced()?;
        self.journal.insert(self.next, &entry)?;
        self.tail.push_back((self.next, entry));
        self.next = self.next.next();
        self.syncer.want(self.next);
        Ok(())
    }

    fn try_checkpoint(&mut self, checkpoint: &Checkpoint, keep_from: Slot) -> Result<(), StoreError> {
        // What the checkpoint covers must not come back shorter than the checkpoint.
        self.syncer.wait().map_err(|failure| self.behind(failure))?;
        self.write_checkpoint(checkpoint)?;
        self.journal.forget_before(keep_from)
    }

    fn try_install(&mut self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        self.write_checkpoint(checkpoint)?;
        self.journal.forget_before(Slot(u64::MAX))?;
        self.tail.clear();
        self.next = checkpoint.slot.next();
        self.syncer.want(self.next);
        self.syncer.wait().map_err(|failure| self.behind(failure))
    }

    /// Marks the journal before the first record of a later version is in it, so that a version of the program that can't read that
    /// stops before it opens the journal.
    fn mark(&mut self, version: u8) -> Result<(), StoreError> {
        if version <= self.marked {
            return Ok(());
        }
        mark_journal(&self.paths.marker, version)?;
        sync_directory(&self.paths.dir).map_err(|e| trouble(&self.paths.dir, "sync the data directory", e))?;
        self.marked = version;
        Ok(())
    }

    fn write_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let path = &self.paths.checkpoint;
        let written = checkpoint::write(path, checkpoint).and_then(|()| sync_directory(&self.paths.dir));
        written.map_err(|e| trouble(path, "write a checkpoint", e))
    }

    fn fits(&self, acceptor: usize) -> bool {
        let lengths = || self.tail.iter().map(|(_, entry)| entry.len());
        lengths().sum::<usize>() <= TAIL_BYTES_MAX && bytes_needed(acceptor, lengths()) <= SLOT_BYTES
    }

    fn forget_synced(&mut self) -> Result<(), StoreError> {
        let synced = self.syncer.synced().map_err(|failure| self.behind(failure))?;
        while self.tail.front().is_some_and(|(slot, _)| *slot < synced) {
            self.tail.pop_front();
        }
        Ok(())
    }

    fn behind(&self, (kind, failure): SyncFailure) -> StoreError {
        trouble(&self.paths.journal, "sync the journal in the background", io::Error::new(kind, failure))
    }

    /// Runs an operation unless one has failed before: after a failed sync nobody knows what the disk holds.
    fn unless_failed(&mut self, operation: impl FnOnce(&mut Self) -> Result<(), StoreError>) -> Result<(), StoreError> {
        if let Some(failure) = &self.failure {
            let source = io::Error::other(format!("an earlier write failed: {failure}"));
            return Err(trouble(&self.paths.acceptor, "write after a failure", source));
        }
        let result = operation(self);
        self.failure = result.as_ref().err().map(ToString::to_string);
        result
    }
}

impl Store for DiskStore {
    fn persist(&mut self, acceptor: &AcceptorState) -> Result<(), StoreError> {
        self.unless_failed(|store| store.try_persist(acceptor))
    }

    fn append(&mut self, chosen: &Chosen) -> Result<(), StoreError> {
        assert_eq!(chosen.record.slot, self.next, "the log grows by the record of the next slot");
        self.unless_failed(|store| store.try_append(chosen))
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint, keep_from: Slot) -> Result<(), StoreError> {
        assert_eq!(checkpoint.slot.next(), self.next, "a checkpoint covers the whole log");
        self.unless_failed(|store| store.try_checkpoint(checkpoint, keep_from))
    }

    fn install(&mut self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        assert!(checkpoint.slot >= self.next, "an installed checkpoint goes beyond the log");
        self.unless_failed(|store| store.try_install(checkpoint))
    }

    fn reader(&self) -> Arc<dyn LogReader> {
        Arc::new(Reader { journal: self.journal.clone(), checkpoint: self.paths.checkpoint.clone() })
    }
}

/// Reads what the store wrote.
struct Reader {
    journal: Arc<Journal>,
    checkpoint: PathBuf,
}

impl LogReader for Reader {
    fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError> {
        self.journal.read(from, most)
    }

    fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError> {
        let found = checkpoint::read(&self.checkpoint).map_err(|e| trouble(&self.checkpoint, "read the checkpoint", e));
        match found? {
            checkpoint::FoundCheckpoint::Nothing => Ok(None),
            checkpoint::FoundCheckpoint::Good(checkpoint, _) => Ok(Some(checkpoint)),
            checkpoint::FoundCheckpoint::OtherVersion(found) => {
                let why = format!("it has format {found}, expected {CHECKPOINT}");
                Err(trouble(&self.checkpoint, "read the checkpoint", io::Error::new(ErrorKind::InvalidData, why)))
            }
            checkpoint::FoundCheckpoint::Damaged(why) => {
                Err(trouble(&self.checkpoint, "read the checkpoint", io::Error::new(ErrorKind::InvalidData, why)))
            }
        }
    }
}

/// Where things are in a data directory.
struct Paths {
    dir: PathBuf,
    lock: PathBuf,
    acceptor: PathBuf,
    genesis: PathBuf,
    checkpoint: PathBuf,
    journal: PathBuf,
    marker: PathBuf,
}

impl Paths {
    fn of(dir: &Path) -> Self {
        let at = |name| dir.join(name);
        Self {
            dir: dir.into(),
            lock: at("lock"),
            acceptor: at("acceptor"),
            genesis: at("genesis"),
            checkpoint: at("checkpoint"),
            journal: at("journal"),
            marker: at(format::MARKER),
        }
    }
}

/// The recovery of a log from checkpoint, journal, genesis file and the acceptor state's tail.
struct DiskOpening<'a> {
    paths: &'a Paths,
    lock: &'a Arc<File>,
    patience: Duration,
}

impl DiskOpening<'_> {
    /// Returns a journal that holds exactly the returned chain, durably, and the ledger that the chain continues; where
    /// there is no checkpoint, that is genesis alone, and the chain begins with it.
    fn recover(&self, tail: &[Vec<u8>], notes: &mut Vec<String>) -> Result<(Journal, Ledger, Chain), OpenError> {
        let genesis = self.genesis(notes)?;
        let of_another = |entry: &Vec<u8>| match decode_entry(entry) {
            Err(EntryDamage::OtherVersion(found)) => Some(found),
            _ => None,
        };
        if let Some(found) = tail.iter().find_map(of_another) {
            return Err(record_of_another(&self.paths.acceptor, found));
        }
        let checkpoint = self.checkpoint(genesis.as_ref(), notes)?;
        let mut chain = checkpoint.as_ref().map_or_else(Chain::default, Chain::after);
        let mut journal = match self.existing(genesis.as_ref(), checkpoint.as_ref(), &mut chain) {
            Ok(journal) => Some(journal),
            Err(OpenFailure::Refused(error)) => return Err(self.unusable(error).into()),
            Err(OpenFailure::OtherVersion(found)) => return Err(record_of_another(&self.paths.journal, found)),
            Err(OpenFailure::Broken(why)) => {
                self.quarantine(&self.paths.journal, &why, notes)?;
                None
            }
        };
        let held = if journal.is_some() { chain.next() } else { Slot(0) };
        let lost = genesis.is_none();
        self.complete(&mut chain, genesis, tail, notes)?;
        if let (true, Some(first)) = (lost, chain.since(Slot(0)).first().filter(|first| first.record.slot == Slot(0))) {
            let path = &self.paths.genesis;
            let written = write_whole(path, &encode_entry(first)).and_then(|()| sync_directory(&self.paths.dir));
            written.map_err(|e| trouble(path, "write genesis again", e))?;
        }
        if let Some(kept) = &journal
            && let Err(error) = fill(kept, &chain, held)
        {
            if !speaks_of_content(error.cause.kind()) {
                return Err(error.into());
            }
            journal = None;
            self.quarantine(&self.paths.journal, &error.to_string(), notes)?;
        }
        let journal = match journal {
            Some(journal) => journal,
            None => self.rebuild(&chain)?,
        };
        let ledger = checkpoint.or_else(|| Ledger::new(chain.since(Slot(0)).first()?));
        let ledger = ledger.ok_or_else(|| self.unusable(io::Error::other("slot 0 holds no genesis")))?;
        Ok((journal, ledger, chain))
    }

    /// Reads the checkpoint; one that is damaged, or another cluster's, is moved aside.
    fn checkpoint(&self, genesis: Option<&Chosen>, notes: &mut Vec<String>) -> Result<Option<Ledger>, OpenError> {
        let path = &self.paths.checkpoint;
        let cluster = genesis.and_then(|chosen| match &chosen.record.intent.operation {
            Operation::Genesis { cluster, .. } => Some(*cluster),
            _ => None,
        });
        let why = match checkpoint::read(path).map_err(|e| trouble(path, "read the checkpoint", e))? {
            checkpoint::FoundCheckpoint::Nothing => return Ok(None),
            checkpoint::FoundCheckpoint::Good(_, ledger) => {
                match cluster.filter(|expected| *expected != ledger.cluster) {
                    None => return Ok(Some(*ledger)),
                    Some(expected) => format!("it is of cluster {}, expected {expected}", ledger.cluster),
                }
            }
            checkpoint::FoundCheckpoint::OtherVersion(found) => {
                let (path, expected) = (path.clone(), CHECKPOINT);
                return Err(UnknownFormat { path, what: "checkpoint", found, expected }.into());
            }
            checkpoint::FoundCheckpoint::Damaged(why) => why.to_string(),
        };
        self.quarantine(path, &why, notes)?;
        Ok(None)
    }

    /// Opens the journal in place and puts its good prefix into `chain`; an error when that is not all of it.
    fn existing(
        &self,
        genesis: Option<&Chosen>,
        checkpoint: Option<&Ledger>,
        chain: &mut Chain,
    ) -> Result<Journal, OpenFailure> {
        remove_unfinished_snapshots(&self.paths.journal)?;
        let (journal, entries) = Journal::open(&self.paths.journal, self.lock, self.patience)?;
        let covered = checkpoint.map_or(0, |ledger| entries.partition_point(|(key, _)| is_covered(key, ledger.head)));
        let (history, after) = entries.split_at(covered);
        chain.extend(after)?;
        if let Some(ledger) = checkpoint {
            match Chain::history(history)? {
                // Nothing to go by, or what a crash left between a peer's checkpoint and the end of the old log.
                None => {}
                Some((last, _)) if last < ledger.head && after.is_empty() => {
                    journal.forget_before(Slot(u64::MAX)).map_err(|error| OpenFailure::Refused(error.cause))?;
                }
                Some(found) if found == (ledger.head, ledger.head_hash) => {}
                Some((slot, _)) => {
                    let why = format!("slot {slot} is not what the checkpoint of slot {} sums up", ledger.head);
                    return Err(OpenFailure::Broken(why));
                }
            }
        } else if let (Some(file), Some(first)) = (genesis, chain.since(Slot(0)).first())
            && file != first
        {
            *chain = Chain::default();
            return Err(OpenFailure::Broken("slot 0 differs from the genesis file".into()));
        }
        Ok(journal)
    }

    /// Adds what the journal lacks and other files hold.
    fn complete(
        &self,
        chain: &mut Chain,
        genesis: Option<Chosen>,
        tail: &[Vec<u8>],
        notes: &mut Vec<String>,
    ) -> Result<(), OpenError> {
        if chain.next() == Slot(0) {
            let Some(genesis) = genesis else {
                return Err(self.without_genesis().into());
            };
            chain.push(genesis).map_err(|why| self.unusable(io::Error::other(why)))?;
        }
        for entry in tail {
            let added = decode_entry(entry).map_err(ChainError::from).and_then(|chosen| {
                match chosen.record.slot < chain.next() {
                    true => Ok(()),
                    false => chain.push(chosen),
                }
            });
            if let Err(why) = added {
                let path = self.paths.acceptor.display();
                notes.push(format!("{path}: the acceptor file's records don't continue the journal: {why}"));
                break;
            }
        }
        Ok(())
    }

    fn rebuild(&self, chain: &Chain) -> Result<Journal, StoreError> {
        let opened = Journal::open(&self.paths.journal, self.lock, self.patience);
        let (journal, _) = opened.map_err(|failure| match failure {
            OpenFailure::Refused(error) => self.unusable(error),
            OpenFailure::Broken(why) => self.unusable(io::Error::other(why)),
            OpenFailure::OtherVersion(_) => unreachable!("opening a journal reads no record"),
        })?;
        fill(&journal, chain, Slot(0))?;
        sync_directory(&self.paths.dir).map_err(|e| trouble(&self.paths.dir, "sync the data directory", e))?;
        Ok(journal)
    }

    /// Moves what is damaged aside, so that somebody may look at it later.
    fn quarantine(&self, path: &Path, why: &str, notes: &mut Vec<String>) -> Result<(), StoreError> {
        let mut time = BootClock.now().wall.0;
        let aside = loop {
            let aside = self.paths.dir.join(format!("quarantine-{time}"));
            if !aside.exists() {
                break aside;
            }
            time += 1;
        };
        let moved = fs::rename(path, &aside).and_then(|()| sync_directory(&self.paths.dir));
        moved.map_err(|e| trouble(path, "move what is damaged aside", e))?;
        let (path, aside) = (path.display(), aside.display());
        notes.push(format!("{path}: {why}; moved to {aside}, rebuilt from what is verified"));
        Ok(())
    }

    /// Reads the genesis file; unreadable is a note, for the journal may hold slot 0.
    fn genesis(&self, notes: &mut Vec<String>) -> Result<Option<Chosen>, OpenError> {
        let bytes = match fs::read(&self.paths.genesis) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(trouble(&self.paths.genesis, "read genesis", error).into()),
        };
        let genesis = decode_entry(&bytes);
        if let Err(EntryDamage::OtherVersion(found)) = genesis {
            return Err(record_of_another(&self.paths.genesis, found));
        }
        if let Err(why) = &genesis {
            notes.push(format!("{}: the genesis file is damaged: {why}", self.paths.genesis.display()));
        }
        Ok(genesis.ok())
    }

    fn without_genesis(&self) -> StoreError {
        let source = io::Error::other("neither the journal nor the genesis file holds a readable genesis record");
        let doing = "recover genesis; copy the file `genesis` from another node of this cluster";
        StoreError { path: self.paths.genesis.display().to_string(), doing: doing.into(), cause: source }
    }

    fn unusable(&self, error: io::Error) -> StoreError {
        trouble(&self.paths.journal, "open the journal", error)
    }
}

/// Returns the format that the journal is marked with; none if the mark is missing or damaged, an error if it is not ours.
fn marked_journal(paths: &Paths) -> Result<Option<u8>, OpenError> {
    let marked = match fs::read(&paths.marker) {
        Ok(content) => format::marked(&content),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(trouble(&paths.marker, "read the journal's format", error).into()),
    };
    match marked.filter(|found| !JOURNAL.contains(*found)) {
        Some(found) => Err(record_of_another(&paths.journal, found)),
        None => Ok(marked),
    }
}

fn mark_journal(path: &Path, version: u8) -> Result<(), StoreError> {
    let written = write_whole(path, format::marker(version).as_bytes());
    written.map_err(|e| trouble(path, "write the journal's format", e))
}

fn record_of_another(path: &Path, found: u8) -> OpenError {
    UnknownFormat { path: path.into(), what: "log's record", found, expected: JOURNAL }.into()
}

fn is_covered(key: &[u8], head: Slot) -> bool {
    key.try_into().is_ok_and(|key| u64::from_be_bytes(key) <= head.0)
}

/// Puts the chain's records from `held` on into the journal, and syncs all of it.
fn fill(journal: &Journal, chain: &Chain, held: Slot) -> Result<(), StoreError> {
    for chosen in chain.since(held) {
        journal.insert(chosen.record.slot, &encode_entry(chosen))?;
    }
    // Even a journal that lacks nothing may hold records that never left memory before a crash.
    journal.sync()
}

/// Removes snapshots that sled did not finish: it refuses to open beside one.
fn remove_unfinished_snapshots(journal: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(journal) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

fn lock(paths: &Paths) -> Result<File, OpenError> {
    let failed = |error| trouble(&paths.lock, "lock the data directory", error);
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&paths.lock);
    let file = opened.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked { dir: paths.dir.clone() }),
        Err(TryLockError::Error(error)) => Err(failed(error).into()),
    }
}

/// Returns the value's bytes; an error when they could not be read back.
fn encoded<T: serde::Serialize>(what: &str, path: &Path, value: &T) -> Result<Vec<u8>, StoreError> {
    let bytes = codec::encode(value);
    if bytes.len() <= codec::VALUE_BYTES_MAX {
        return Ok(bytes);
    }
    let (found, max) = (bytes.len(), codec::VALUE_BYTES_MAX);
    let source = io::Error::new(ErrorKind::InvalidInput, format!("it has {found} bytes, expected at most {max}"));
    Err(StoreError { path: path.display().to_string(), doing: format!("write a {what}"), cause: source })
}

/// Replaces a file durably, but for its directory's entry.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("new");
    let mut file = File::create(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Returns the error of an operation, with what an operator can do about it.
fn trouble(path: &Path, doing: &str, cause: io::Error) -> StoreError {
    let cure = match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "the disk is full: free space, then start the node again",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "let the node's user write here, then start it again"
        }
        _ => "check the disk and the kernel's log, then start the node again",
    };
    StoreError { path: path.display().to_string(), doing: format!("could not {doing} ({cure})"), cause }
}

#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
