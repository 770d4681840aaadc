//! Power cuts: what a store wrote is recorded call by call, and replayed as a disk that keeps only what was synced.
//!
//! A child process writes a node's life under a preloaded recorder (`recorder.c`). At each point of the recording the
//! disk is made again in three ways: with nothing but what was synced, with everything, and with a random part of what
//! wasn't, torn between sectors. Whatever is found there, a promise that was acknowledged before must be in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use super::{DiskStore, OpenError};
use crate::adapters::conformance::{acceptor, chain_of, sum};
use crate::ports::{Recovered, Store};
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::record::{Chosen, Slot};

/// Bytes that a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;
/// Where the child says how far it is.
const MARKS: &str = "marks";
const CHILD: &str = "adapters::disk::power::a_nodes_life_to_be_recorded";

/// Records of the life, and where its parts begin.
const RECORDS: u64 = 60;
const RESTART: u64 = 20;
const INSTALLED: u64 = 50;

fn log() -> Vec<Chosen> {
    chain_of(RECORDS, 300)
}

/// The child's part; alone it has nowhere to write.
#[test]
#[ignore = "the other test here runs it, under a recorder"]
fn a_nodes_life_to_be_recorded() {
    let Ok(root) = std::env::var("RECORD_ROOT") else { return };
    let root = PathBuf::from(root);
    let (dir, log) = (root.join("data"), log());
    let mut marks = fs::File::create(root.join(MARKS)).unwrap();
    let mut mark = |what: &str, boot: u64| marks.write_all(format!("{what} {boot}").as_bytes()).unwrap();
    mark("begin", 1);
    DiskStore::create(&dir, &acceptor(1, 0), &log[0]).unwrap();
    mark("done", 1);
    let open = || DiskStore::open(&dir).unwrap().store;
    let mut store = open();
    let mut boot = 1;
    let mut promise = |store: &mut DiskStore, head: u64| {
        boot += 1;
        mark("begin", boot);
        store.persist(&acceptor(boot, head)).unwrap();
        mark("done", boot);
    };
    for slot in (1..40).chain(INSTALLED + 1..RECORDS) {
        if slot == INSTALLED + 1 {
            store.install(&Checkpoint::of(&sum(&log[..=INSTALLED as usize])).unwrap()).unwrap();
        }
        store.append(&log[slot as usize]).unwrap();
        promise(&mut store, slot);
        if slot.is_multiple_of(4) {
            // As if time passed: the journal has it, and the acceptor state need not carry it any longer.
            store.syncer.wait().unwrap();
        }
        if slot.is_multiple_of(5) {
            promise(&mut store, slot);
        }
        if slot.is_multiple_of(12) {
            store.checkpoint(&Checkpoint::of(&sum(&log[..=slot as usize])).unwrap(), Slot(slot - 5)).unwrap();
        }
        if slot == RESTART {
            drop(store);
            store = open();
        }
    }
}

/// Writes and syncs that the recorder saw.
#[derive(Debug)]
enum RecordedCall {
    Create(String),
    Write { path: String, offset: usize, data: Vec<u8> },
    Truncate { path: String, length: usize },
    SyncBegin { path: String, id: u64 },
    SyncEnd { path: String, id: u64 },
    Rename { from: String, to: String },
    Unlink(String),
    MakeDir(String),
}

fn events(mut bytes: &[u8]) -> Vec<RecordedCall> {
    let mut events = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(21) {
        let length = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
        let (path, rest) = rest.split_at(length(1));
        let (other, rest) = rest.split_at(length(3));
        let (data, rest) = rest.split_at(number(13) as usize);
        let [path, to] = [path, other].map(|text| String::from_utf8(text.to_vec()).unwrap());
        let offset = number(5);
        events.push(match head[0] {
            1 => RecordedCall::Create(path),
            2 => RecordedCall::Write { path, offset: offset as usize, data: data.to_vec() },
            3 => RecordedCall::Truncate { path, length: offset as usize },
            4 => RecordedCall::SyncBegin { path, id: offset },
            5 => RecordedCall::SyncEnd { path, id: offset },
            6 => RecordedCall::Rename { from: path, to },
            7 => RecordedCall::Unlink(path),
            8 => RecordedCall::MakeDir(path),
            asked => panic!("op {asked} is unknown"),
        });
        bytes = rest;
    }
    events
}

/// A change of a file's content.
enum FileChange {
    Write { offset: usize, data: Vec<u8> },
    Truncate { length: usize },
}

impl FileChange {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, data } => {
                content.resize(content.len().max(offset + data.len()), 0);
                content[*offset..][..data.len()].copy_from_slice(data);
            }
            Self::Truncate { length } => content.resize(*length, 0),
        }
    }

    /// Applies what of it a power cut lets through: some of a write's sectors.
    fn apply_torn(&self, content: &mut Vec<u8>, random: &mut SmallRng) {
        let Self::Write { offset, data } = self else { return self.apply(content) };
        let (mut at, end) = (*offset, offset + data.len());
        while at < end {
            let next = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end);
            if random.random() {
                Self::Write { offset: at, data: data[at - offset..next - offset].to_vec() }.apply(content);
            }
            at = next;
        }
    }
}

/// A change of a directory's entries.
enum DirectoryChange {
    Put(String, usize),
    Move(String, String),
    Take(String),
    MakeDir(String),
}

impl DirectoryChange {
    fn directory(&self) -> &str {
        let (Self::Put(path, _) | Self::Move(_, path) | Self::Take(path) | Self::MakeDir(path)) = self;
        path.rsplit_once('/').map_or("", |(directory, _)| directory)
    }
}

/// A name's target: a file's number, or a directory.
type Names = BTreeMap<String, Option<usize>>;

fn apply(entry: &DirectoryChange, names: &mut Names) {
    match entry {
        DirectoryChange::Put(path, file) => drop(names.insert(path.clone(), Some(*file))),
        DirectoryChange::MakeDir(path) => drop(names.insert(path.clone(), None)),
        DirectoryChange::Take(path) => drop(names.remove(path)),
        DirectoryChange::Move(from, to) => {
            let below = format!("{from}/");
            let moved: Vec<_> =
                names.keys().filter(|name| *name == from || name.starts_with(&below)).cloned().collect();
            for name in moved {
                let target = names.remove(&name).unwrap();
                names.insert(format!("{to}{}", &name[from.len()..]), target);
            }
        }
    }
}

/// How a power cut treats what was not synced.
enum Fate<'a> {
    Lost,
    Kept,
    Random(&'a mut SmallRng),
}

/// A disk as it is being written: of each file and directory, all changes, and how many of them are surely on it.
#[derive(Default)]
struct Disk {
    files: Vec<(Vec<FileChange>, usize)>,
    entries: Vec<DirectoryChange>,
    /// Entries of a directory below this place are on the disk.
    synced: BTreeMap<String, usize>,
    names: Names,
    /// Writes that a sync in progress covers.
    syncs: BTreeMap<u64, (Option<usize>, usize)>,
    marks: Vec<String>,
}

impl Disk {
    fn take(&mut self, event: RecordedCall) {
        match event {
            RecordedCall::Write { path, data, .. } if path == MARKS => {
                self.marks.push(String::from_utf8(data).unwrap())
            }
            RecordedCall::Create(path) if path == MARKS => {}
            RecordedCall::Create(path) => {
                self.files.push((Vec::new(), 0));
                self.enter(DirectoryChange::Put(path, self.files.len() - 1));
            }
            RecordedCall::Write { path, offset, data } => self.change(&path, FileChange::Write { offset, data }),
            RecordedCall::Truncate { path, length } => self.change(&path, FileChange::Truncate { length }),
            RecordedCall::SyncBegin { path, id } => {
                let file = self.names.get(&path).copied().flatten();
                let covered = file.map_or(self.entries.len(), |file| self.files[file].0.len());
                self.syncs.insert(id, (file, covered));
            }
            RecordedCall::SyncEnd { path, id } => {
                let (file, covered) = self.syncs.remove(&id).unwrap();
                let synced = match file {
                    Some(file) => &mut self.files[file].1,
                    None => self.synced.entry(path).or_default(),
                };
                *synced = covered.max(*synced);
            }
            RecordedCall::Rename { from, to } => self.enter(DirectoryChange::Move(from, to)),
            RecordedCall::Unlink(path) => self.enter(DirectoryChange::Take(path)),
            RecordedCall::MakeDir(path) => self.enter(DirectoryChange::MakeDir(path)),
        }
    }

    fn enter(&mut self, entry: DirectoryChange) {
        apply(&entry, &mut self.names);
        self.entries.push(entry);
    }

    fn change(&mut self, path: &str, change: FileChange) {
        let file = self.names.get(path).copied().flatten().unwrap_or_else(|| panic!("{path} was never created"));
        self.files[file].0.push(change);
    }

    /// Writes the disk as a power cut leaves it.
    fn cut(&self, root: &Path, mut fate: Fate<'_>) {
        let mut names = Names::new();
        // Directories keep their entries in order: of those not synced, a first part survives.
        let mut last: BTreeMap<&str, usize> = BTreeMap::new();
        for (place, entry) in self.entries.iter().enumerate() {
            let directory = entry.directory();
            let synced = self.synced.get(directory).copied().unwrap_or(0);
            let until = *last.entry(directory).or_insert_with(|| match &mut fate {
                Fate::Lost => synced,
                Fate::Kept => usize::MAX,
                Fate::Random(random) => random.random_range(synced..=self.entries.len()),
            });
            if place < until.max(synced) {
                apply(entry, &mut names);
            }
        }
        for (path, target) in &names {
            let above = path.rsplit_once('/').map(|(above, _)| above);
            if above.is_some_and(|above| names.get(above) != Some(&None)) {
                continue;
            }
            let Some(file) = target else {
                fs::create_dir(root.join(path)).unwrap();
                continue;
            };
            let (changes, synced) = &self.files[*file];
            let mut content = Vec::new();
            changes[..*synced].iter().for_each(|change| change.apply(&mut content));
            for change in &changes[*synced..] {
                match &mut fate {
                    Fate::Lost => {}
                    Fate::Kept => change.apply(&mut content),
                    Fate::Random(random) => match random.random_range(0..3) {
                        0 => {}
                        1 => change.apply(&mut content),
                        _ => change.apply_torn(&mut content, random),
                    },
                }
            }
            fs::write(root.join(path), content).unwrap();
        }
    }

    /// Returns the number of the last mark of a kind.
    fn mark(&self, what: &str) -> u64 {
        let number = |mark: &String| mark.strip_prefix(what)?.trim().parse().ok();
        self.marks.iter().rev().find_map(number).unwrap_or(0)
    }

    /// Opens what a power cut leaves: every promise that was acknowledged is there, and its records with it.
    fn check(&self, fate: Fate<'_>, log: &[Chosen], what: &str) {
        let (done, begun) = (self.mark("done"), self.mark("begin"));
        let root = in_memory();
        self.cut(root.path(), fate);
        let Recovered { acceptor: found, ledger, log: records, notes, .. } =
            match DiskStore::open(&root.path().join("data")) {
                Ok(recovered) => recovered,
                Err(OpenError::NoGenesis { .. }) if done == 0 => return,
                // A node that was never made completely.
                Err(error) if done == 0 => {
                    assert!(error.to_string().contains("no genesis is left"), "{what}: {error}");
                    return;
                }
                Err(error) => panic!("{what}: {error}"),
            };
        if done == 0 && found.is_none() {
            return;
        }
        let found = found.unwrap_or_else(|| panic!("{what}: promise {done} is forgotten: {notes:?}"));
        assert!(
            (done..=begun).contains(&found.boot),
            "{what}: found promise {}, made {done} to {begun}: {notes:?}",
            found.boot
        );
        let head = ledger.head.0 + records.len() as u64;
        assert!(
            head >= found.head.0,
            "{what}: the log ends at {head}, the acceptor file remembers {}: {notes:?}",
            found.head
        );
        assert_eq!(ledger, sum(&log[..=ledger.head.0 as usize]), "{what}");
        assert_eq!(records, log[ledger.head.0 as usize + 1..][..records.len()], "{what}");
        // Until the journal's own first files are synced they may be damaged; nothing is in them then.
        let damaged = notes.iter().find(|note| note.contains("quarantine")).filter(|_| done > 1);
        assert_eq!(damaged, None, "{what}: a power cut damages nothing");
    }
}

/// Returns what the child's life left on disk, and the recording of it.
fn recorded(dir: &Path) -> (PathBuf, Vec<RecordedCall>) {
    let (library, recording, root) = (dir.join("recorder.so"), dir.join("recording"), dir.join("root"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/adapters/disk/power/recorder.c");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output();
    let compiled = compiled.expect("cc, which links this program too");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    fs::create_dir(&root).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([CHILD, "--exact", "--ignored", "--test-threads=1"]);
    child.env("LD_PRELOAD", library).env("RECORD_TO", &recording).env("RECORD_ROOT", &root);
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    (root, events(&fs::read(recording).unwrap()))
}

fn contents(root: &Path, below: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => contents(root, &path, found),
            false => drop(found.insert(path.strip_prefix(root).unwrap().into(), fs::read(&path).unwrap())),
        }
    }
}

/// Returns a folder in memory, where the system has such a place: opening a store syncs it, a thousand times here, and what a
/// test makes up needs to survive nothing.
pub fn in_memory() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

#[test]
fn nothing_promised_is_forgotten_by_a_power_cut() {
    let dir = in_memory();
    let (root, events) = recorded(dir.path());
    let (count, log) = (events.len(), log());
    let mut random = SmallRng::seed_from_u64(1);
    let mut disk = Disk::default();
    for (place, event) in events.into_iter().enumerate() {
        disk.take(event);
        disk.check(Fate::Lost, &log, &format!("event {place}, only what was synced"));
        disk.check(Fate::Random(&mut random), &log, &format!("event {place}, some of the rest"));
    }
    disk.check(Fate::Kept, &log, "everything");
    println!("{count} calls recorded, {} promises, the power cut after each call", disk.mark("done"));
    assert_eq!((disk.mark("done"), disk.mark("begin")), (57, 57));

    // The recording misses nothing: replayed whole, it is what the child left.
    let copy = dir.path().join("copy");
    fs::create_dir(&copy).unwrap();
    disk.cut(&copy, Fate::Kept);
    let (mut expected, mut found) = (BTreeMap::new(), BTreeMap::new());
    contents(&root.join("data"), &root.join("data"), &mut expected);
    contents(&copy.join("data"), &copy.join("data"), &mut found);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(found == expected, "the recording differs from the directory");
}
