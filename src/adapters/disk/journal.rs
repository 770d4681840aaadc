//! The journal: chosen records in sled, each with its own checksum, and the thread that syncs them.
//!
//! sled is never trusted: opening it may fail, panic or hang, and what it returns is checked entry by entry.
//! Its `flush` is no `fsync`; durability comes from [`Journal::sync`], which syncs sled's file itself.

use std::any::Any;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use super::format::{self, JOURNAL};
use super::trouble;
use crate::ports::StoreError;
use crate::protocol::codec::{self, DecodeError};
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{Chosen, Hash, Slot};

const TREE: &str = "log";
const CACHE_BYTES: u64 = 16 * 1024 * 1024;
/// How long records may wait for company before they are synced; promises don't wait for it.
const LINGER: Duration = Duration::from_millis(20);
/// Between two tries to open a journal whose previous owner in this process is still letting go.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// An entry as sled holds it: key and value.
pub(super) type RawEntry = (Vec<u8>, Vec<u8>);

/// The open journal; closed when the last reader is gone.
pub(super) struct Journal {
    tree: sled::Tree,
    db: sled::Db,
    data: File,
    directory: File,
    path: PathBuf,
    /// The data directory's lock, held as long as anything here may still write.
    _lock: Arc<File>,
}

/// Why sled gave no journal.
pub(super) enum OpenFailure {
    /// The machine's fault, such as a full disk: nothing speaks against the journal, so it stays where it is.
    Refused(io::Error),
    /// The file can't be used; the reason, in words.
    Broken(String),
    /// Another version of the program wrote records of it: nothing is damaged, so it stays where it is.
    OtherVersion(u8),
}

/// Why bytes are no stored record.
#[derive(Debug, thiserror::Error)]
pub(super) enum EntryDamage {
    /// Fewer bytes than version and checksum need.
    #[error("its entry has {0} bytes")]
    Short(usize),
    /// Another version of the program wrote it, and it is whole.
    #[error("its entry has format {0}, expected {JOURNAL}")]
    OtherVersion(u8),
    /// Whole, and in another version than its record is written in.
    #[error("its entry has format {found}, expected {expected} for what it says")]
    Misfit { found: u8, expected: u8 },
    /// The content is not what the checksum was made of.
    #[error("its checksum is {found:08x}, expected {expected:08x}")]
    Checksum { found: u32, expected: u32 },
    /// The content is no record.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Why records don't continue a log.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    /// A key of sled's that is no slot.
    #[error("found key {0:02x?}, expected 8 bytes")]
    Key(Vec<u8>),
    /// The entry behind a slot's key is damaged.
    #[error("slot {slot}: {damage}")]
    Entry { slot: u64, damage: EntryDamage },
    /// An entry that is damaged, and whose slot no key tells.
    #[error(transparent)]
    Unplaced(#[from] EntryDamage),
    /// Another key follows than the next slot's.
    #[error("slot {slot} is missing: the next key is {found:02x?}")]
    NoKey { slot: u64, found: Vec<u8> },
    /// A record under another slot's key.
    #[error("slot {slot} holds the record of slot {found}")]
    Misplaced { slot: u64, found: Slot },
    /// Another record follows than the next slot's.
    #[error("slot {next} is missing: found slot {found}")]
    NoRecord { next: Slot, found: Slot },
    /// A record of another history.
    #[error("slot {slot} follows {found}, expected {expected}")]
    Follows { slot: Slot, found: Hash, expected: Hash },
}

impl From<ChainError> for OpenFailure {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::Entry { damage: EntryDamage::OtherVersion(found), .. }
            | ChainError::Unplaced(EntryDamage::OtherVersion(found)) => Self::OtherVersion(found),
            error => Self::Broken(error.to_string()),
        }
    }
}

impl From<io::Error> for OpenFailure {
    fn from(error: io::Error) -> Self {
        if speaks_of_content(error.kind()) { Self::Broken(error.to_string()) } else { Self::Refused(error) }
    }
}

/// Returns true for errors that come from what a journal's files hold, not from the machine that reads them.
pub(super) fn speaks_of_content(kind: ErrorKind) -> bool {
    use ErrorKind::{InvalidData, InvalidInput, NotFound, Other, UnexpectedEof, Unsupported};
    matches!(kind, InvalidData | InvalidInput | NotFound | Other | UnexpectedEof | Unsupported)
}

impl Journal {
    /// Opens the journal and reads all of it; gives up after `patience`.
    pub fn open(path: &Path, lock: &Arc<File>, patience: Duration) -> Result<(Self, Vec<RawEntry>), OpenFailure> {
        let (give, take) = mpsc::sync_channel(1);
        let (path, lock) = (path.to_path_buf(), lock.clone());
        let thread = std::thread::Builder::new().name("journal-open".into()).spawn(move || {
            let opened = catch_unwind(AssertUnwindSafe(|| open_patiently(&path, lock, patience)));
            // Nobody listens any more when the watchdog gave up.
            let _ = give.send(opened.unwrap_or_else(|panic| Err(OpenFailure::Broken(panic_text(&*panic)))));
        });
        thread.map_err(OpenFailure::Refused)?;
        let late = || OpenFailure::Broken(format!("it did not open within {} s", patience.as_secs_f32()));
        take.recv_timeout(patience).map_err(|_| late())?
    }

    /// Puts a record's entry in; durable after the next sync.
    pub fn insert(&self, slot: Slot, entry: &[u8]) -> Result<(), StoreError> {
        let inserted = guarded(|| self.tree.insert(slot.0.to_be_bytes(), entry));
        inserted.map(|_| ()).map_err(|e| trouble(&self.path, "append to the journal", e))
    }

    /// Makes everything inserted before survive power loss.
    pub fn sync(&self) -> Result<(), StoreError> {
        guarded(|| self.db.flush()).map_err(|e| trouble(&self.path, "flush the journal", e))?;
        let synced = self.data.sync_data().and_then(|()| self.directory.sync_all());
        synced.map_err(|e| trouble(&self.path, "sync the journal", e))
    }

    /// Removes the records below `slot`. That they are gone need not survive a crash.
    pub fn forget_before(&self, slot: Slot) -> Result<(), StoreError> {
        let forgotten = guarded(|| {
            for key in self.tree.range(..slot.0.to_be_bytes()).keys() {
                self.tree.remove(key?)?;
            }
            Ok(())
        });
        forgotten.map_err(|e| trouble(&self.path, "remove old records from the journal", e))
    }

    /// Returns up to `most` records from the first one kept at or after `from`.
    pub fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError> {
        let broken = |error: io::Error| trouble(&self.path, "read the journal", error);
        let mut records: Vec<Chosen> = Vec::new();
        for entry in self.tree.range(from.0.to_be_bytes()..).take(most) {
            let (key, value) = entry.map_err(|error| broken(io::Error::other(error)))?;
            let slot = records.last().map_or_else(|| slot_of(&key), |before| Ok(before.record.slot.next().0));
            let record = slot.and_then(|slot| decode_at(slot, &key, &value));
            records.push(record.map_err(|error| broken(io::Error::other(error)))?);
        }
        Ok(records)
    }
}

fn open_patiently(path: &Path, lock: Arc<File>, patience: Duration) -> Result<(Journal, Vec<RawEntry>), OpenFailure> {
    let mut tries = patience.as_millis() / LOCK_RETRY.as_millis() / 2;
    let db = loop {
        match config(path).open() {
            Ok(db) => break db,
            // Our own lock says that no other process is at work; sled's threads may outlive its handle a little.
            Err(error) if error.to_string().contains("could not acquire lock") => {
                tries = tries.checked_sub(1).ok_or_else(|| OpenFailure::Refused(io::Error::other(error)))?;
                std::thread::park_timeout(LOCK_RETRY);
            }
            Err(error) => return Err(io::Error::from(error).into()),
        }
    };
    read_in(db, path, lock).map_err(OpenFailure::from)
}

fn config(path: &Path) -> sled::Config {
    let config = sled::Config::new().path(path).mode(sled::Mode::HighThroughput);
    config.flush_every_ms(None).cache_capacity(CACHE_BYTES)
}

fn read_in(db: sled::Db, path: &Path, lock: Arc<File>) -> io::Result<(Journal, Vec<RawEntry>)> {
    let tree = db.open_tree(TREE)?;
    let entries = tree.iter().map(|entry| entry.map(|(key, value)| (key.to_vec(), value.to_vec())));
    let entries = entries.collect::<sled::Result<Vec<_>>>()?;
    let (data, directory) = (File::open(path.join("db"))?, File::open(path)?);
    // sled writes it once and never syncs it; without it nothing here can be read.
    File::open(path.join("conf"))?.sync_all()?;
    directory.sync_all()?;
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())?;
    Ok((Journal { tree, db, data, directory, path: path.into(), _lock: lock }, entries))
}

/// Runs a call into sled; a panic inside it is an error.
fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> io::Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(io::Error::from),
        Err(panic) => Err(io::Error::other(panic_text(&*panic))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    format!("it panicked: {text}")
}

/// Returns a record as it is stored: version, CRC-32C, value. The checksum covers the version and all that comes after in all
/// versions, so that each version tells a record of another one from a damaged one.
pub(super) fn encode_entry(chosen: &Chosen) -> Vec<u8> {
    let (version, body) = (format::of_record(&chosen.record), codec::encode(chosen));
    [&[version][..], &checksum(version, &body).to_le_bytes(), &body].concat()
}

/// Returns the version of a stored record's bytes; 0 for no bytes.
pub(super) fn version_of(entry: &[u8]) -> u8 {
    entry.first().copied().unwrap_or(0)
}

fn checksum(version: u8, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&[version]), body)
}

/// Returns the record that the bytes store, or what is wrong with them.
pub(super) fn decode_entry(entry: &[u8]) -> Result<Chosen, EntryDamage> {
    let (head, body) = entry.split_at_checked(5).ok_or(EntryDamage::Short(entry.len()))?;
    let expected = u32::from_le_bytes(head[1..].try_into().expect("4 bytes"));
    let found = checksum(head[0], body);
    if found != expected {
        return Err(EntryDamage::Checksum { found, expected });
    }
    match head[0] {
        3 | 4 => {
            let chosen: Chosen = codec::decode(body)?;
            match format::of_record(&chosen.record) {
                expected if expected == head[0] => Ok(chosen),
                expected => Err(EntryDamage::Misfit { found: head[0], expected }),
            }
        }
        other => Err(EntryDamage::OtherVersion(other)),
    }
}

fn slot_of(key: &[u8]) -> Result<u64, ChainError> {
    let key = key.try_into().map_err(|_| ChainError::Key(key.into()))?;
    Ok(u64::from_be_bytes(key))
}

fn decode_at(slot: u64, key: &[u8], value: &[u8]) -> Result<Chosen, ChainError> {
    if key != slot.to_be_bytes() {
        return Err(ChainError::NoKey { slot, found: key.into() });
    }
    let chosen = decode_entry(value).map_err(|damage| ChainError::Entry { slot, damage })?;
    if chosen.record.slot != Slot(slot) {
        return Err(ChainError::Misplaced { slot, found: chosen.record.slot });
    }
    Ok(chosen)
}

/// A log that grows by verified records only.
#[derive(Default)]
pub(super) struct Chain {
    /// Slot of the first record.
    first: Slot,
    log: Vec<Chosen>,
    head_hash: Hash,
}

impl Chain {
    /// Returns a chain that continues what a checkpoint sums up.
    pub fn after(ledger: &Ledger) -> Self {
        Self { first: ledger.head.next(), log: Vec::new(), head_hash: ledger.head_hash }
    }

    /// Checks records that a checkpoint covers and returns the last one's slot and hash; none when there are none.
    pub fn history(entries: &[RawEntry]) -> Result<Option<(Slot, Hash)>, ChainError> {
        let Some((key, value)) = entries.first() else { return Ok(None) };
        let first = decode_at(slot_of(key)?, key, value)?;
        let mut chain = Self { first: first.record.slot, log: Vec::new(), head_hash: first.record.prev_hash };
        chain.extend(entries)?;
        Ok(chain.log.last().map(|last| (last.record.slot, chain.head_hash)))
    }

    /// Returns the slot that comes next.
    pub fn next(&self) -> Slot {
        Slot(self.first.0 + self.log.len() as u64)
    }

    /// Returns the records that were verified, in the order of their slots.
    pub fn into_log(self) -> Vec<Chosen> {
        self.log
    }

    /// Returns the verified records from `from` on.
    pub fn since(&self, from: Slot) -> &[Chosen] {
        let from = usize::try_from(from.0.saturating_sub(self.first.0)).unwrap_or(usize::MAX).min(self.log.len());
        &self.log[from..]
    }

    /// Adds the record that comes next, or says why it isn't that.
    pub fn push(&mut self, chosen: Chosen) -> Result<(), ChainError> {
        let (slot, next) = (chosen.record.slot, self.next());
        if slot != next {
            return Err(ChainError::NoRecord { next, found: slot });
        }
        if chosen.record.prev_hash != self.head_hash {
            let (found, expected) = (chosen.record.prev_hash, self.head_hash);
            return Err(ChainError::Follows { slot, found, expected });
        }
        self.head_hash = chosen.record.hash();
        self.log.push(chosen);
        Ok(())
    }

    /// Adds the good prefix of what sled returned, and says what is wrong behind it.
    pub fn extend(&mut self, entries: &[RawEntry]) -> Result<(), ChainError> {
        for (key, value) in entries {
            self.push(decode_at(self.next().0, key, value)?)?;
        }
        Ok(())
    }
}

/// Error of the background task.
pub(super) type SyncFailure = (ErrorKind, String);

/// The thread that syncs the journal behind the writer's back.
pub(super) struct Syncer {
    shared: Arc<SyncShared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct SyncShared {
    state: Mutex<SyncState>,
    changed: Condvar,
}

/// Both counts are slots: all records below them.
#[derive(Default)]
struct SyncState {
    wanted: u64,
    synced: u64,
    urgent: bool,
    stop: bool,
    failure: Option<SyncFailure>,
}

impl SyncShared {
    fn lock(&self) -> MutexGuard<'_, SyncState> {
        self.state.lock().expect("nothing panics while it holds the syncer's state")
    }
}

impl Syncer {
    /// Starts the thread; every record below `synced` is on disk.
    pub fn start(journal: Arc<Journal>, synced: Slot) -> io::Result<Self> {
        let shared = Arc::new(SyncShared::default());
        *shared.lock() = SyncState { wanted: synced.0, synced: synced.0, ..SyncState::default() };
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("journal-sync".into());
        let thread = thread.spawn(move || sync_until_stopped(&journal, &theirs))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Asks for the records below `next` to be synced.
    pub fn want(&self, next: Slot) {
        self.shared.lock().wanted = next.0;
        self.shared.changed.notify_all();
    }

    /// Returns the slot below which everything is on disk, or what went wrong.
    pub fn synced(&self) -> Result<Slot, SyncFailure> {
        let state = self.shared.lock();
        state.failure.clone().map_or(Ok(Slot(state.synced)), Err)
    }

    /// Stands in for a disk that fails.
    #[cfg(test)]
    pub fn fail(&self, why: &str) {
        self.shared.lock().failure = Some((ErrorKind::Other, why.into()));
    }

    /// Waits until everything asked for is on disk.
    pub fn wait(&self) -> Result<(), SyncFailure> {
        let mut state = self.shared.lock();
        let goal = state.wanted;
        while state.synced < goal {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.urgent = true;
            self.shared.changed.notify_all();
            state = self.shared.changed.wait(state).expect("nothing panics while it holds the syncer's state");
        }
        Ok(())
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in there has printed itself, and nothing is left to be saved from it.
            let _ = thread.join();
        }
    }
}

/// Syncs what is wanted until told to stop; the first failure is the last try.
fn sync_until_stopped(journal: &Journal, shared: &SyncShared) {
    while let Some(goal) = next_goal(shared) {
        let result = journal.sync();
        let mut state = shared.lock();
        match result {
            Ok(()) => state.synced = goal,
            Err(error) => state.failure = Some((error.cause.kind(), error.cause.to_string())),
        }
        let failed = state.failure.is_some();
        drop(state);
        shared.changed.notify_all();
        if failed {
            return;
        }
    }
}

/// Waits for work and returns up to where to sync; none when there is none left and the store is closing.
fn next_goal(shared: &SyncShared) -> Option<u64> {
    let poisoned = "nothing panics while it holds the syncer's state";
    let idle = |state: &mut SyncState| state.wanted == state.synced && !state.stop;
    let lonely = |state: &mut SyncState| !state.urgent && !state.stop;
    let state = shared.changed.wait_while(shared.lock(), idle).expect(poisoned);
    let (mut state, _) = shared.changed.wait_timeout_while(state, LINGER, lonely).expect(poisoned);
    state.urgent = false;
    (state.wanted != state.synced).then_some(state.wanted)
}
