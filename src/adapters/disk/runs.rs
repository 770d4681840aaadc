//! Saved analysis runs: a file for each service, replaced whole by a thread of its own, and never synced: it outlives
//! the process, and
//! mostly the machine.
//!
//! Magic and version, CRC-32C of the rest, and the analysis run's bytes. A file that can't be read is removed,
//! unless another version of the program wrote it: a later one's stops the node, which must not write over it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use tracing::{info, warn};

use super::format::{RUN, UnknownFormat};
use super::{OpenError, remove_if_there, trouble};
use crate::domain::ids::{IdError, ServiceId};
use crate::ports::RunStore;
use crate::protocol::codec::{self, DecodeError};
use crate::protocol::record::SavedRun;

/// First bytes of a file; the version of the format follows them.
const MAGIC: [u8; 7] = *b"aviaryT";
/// Version of the file format. A file of a later version stops the node; one of an older version that isn't read any more stays
/// as it is, and its analysis run begins anew.
pub(super) const VERSION: u8 = RUN.newest as u8;
/// Bytes of magic and checksum, before the content.
const HEADER_BYTES: usize = 8 + 4;
/// Most bytes of an encoded analysis run; what is longer is none of ours.
const RUN_BYTES_MAX: usize = 1024 * 1024;
/// Most bytes of a file.
const FILE_BYTES_MAX: u64 = (HEADER_BYTES + RUN_BYTES_MAX) as u64;
/// Analysis runs that may wait to be written; more aren't saved at that time.
const WAITING_MAX: usize = 64;
/// Extensions of complete and of unfinished files.
const EXTENSION: &str = "run";
const DRAFT: &str = "new";

/// Analysis runs found in a data directory.
pub struct FoundRuns {
    /// Where analysis runs are saved from now on.
    pub store: DiskRuns,
    /// Analysis runs that could be read, by service.
    pub saved: BTreeMap<ServiceId, SavedRun>,
    /// Findings that an operator should see, one sentence each, for the log.
    pub notes: Vec<String>,
}

/// A file and its new content; none: it goes.
type Work = (PathBuf, Option<Box<SavedRun>>);

/// Analysis runs in a directory of their own.
pub struct DiskRuns {
    dir: PathBuf,
    /// Queue of the writing thread; none once the store ends.
    work: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl DiskRuns {
    /// Opens the analysis runs of a node's data directory, which only one process may use.
    pub fn open(data_dir: &Path) -> Result<FoundRuns, OpenError> {
        let dir = data_dir.join("runs");
        let (mut saved, mut notes) = (BTreeMap::new(), Vec::new());
        let files = fs::create_dir_all(&dir).and_then(|()| fs::read_dir(&dir)?.collect::<io::Result<Vec<_>>>());
        let files = files.unwrap_or_else(|error| {
            notes.push(format!("{}: the saved analysis runs can't be read: {error}", dir.display()));
            Vec::new()
        });
        for path in files.into_iter().map(|file| file.path()) {
            let found = match path.extension().and_then(|extension| extension.to_str()) {
                Some(EXTENSION) => read(&path),
                Some(DRAFT) => Ok(None),
                _ => continue,
            };
            match found {
                Ok(Some((service, run))) => drop(saved.insert(service, run)),
                Ok(None) => drop(remove_if_there(&path)),
                Err(RunDamage::OtherVersion(found)) if found > VERSION => {
                    return Err(UnknownFormat { path, what: "saved analysis run", found, expected: RUN }.into());
                }
                Err(why @ RunDamage::OtherVersion(_)) => {
                    notes.push(format!(
                        "{}: {why}; it is left as it is until this analysis run is saved again",
                        path.display()
                    ));
                }
                Err(why) => {
                    let removed = remove_if_there(&path).map_or_else(|error| error.to_string(), |()| "removed".into());
                    notes.push(format!("{}: no analysis run can be read: {why}; {removed}", path.display()));
                }
            }
        }
        let (work, waiting) = sync_channel(WAITING_MAX);
        let thread = std::thread::Builder::new().name("runs".into()).spawn(move || write_all(&waiting));
        let thread = thread.map_err(|e| trouble(&dir, "start the thread that saves analysis runs", e))?;
        Ok(FoundRuns { store: Self { dir, work: Some(work), thread: Some(thread) }, saved, notes })
    }
}

impl RunStore for DiskRuns {
    fn save(&mut self, service: &ServiceId, run: Option<Box<SavedRun>>) {
        let path = self.dir.join(format!("{service}.{EXTENSION}"));
        let Some(work) = &self.work else { return };
        // A disk that is too slow for all of them has the others in a later turn; that one is over is said once.
        let _ = match run {
            None => work.send((path, None)).is_ok(),
            run => work.try_send((path, run)).is_ok(),
        };
    }
}

impl Drop for DiskRuns {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // A panic in there has printed itself, and nothing is left to be saved from it.
            let _ = thread.join();
        }
    }
}

/// Returns a file's bytes.
pub(super) fn encode(run: &SavedRun) -> Vec<u8> {
    let body = codec::encode(run);
    [&MAGIC[..], &[VERSION], &crc32c::crc32c(&body).to_le_bytes(), &body].concat()
}

/// Why a file holds no analysis run.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunDamage {
    /// The file's name is no service's.
    #[error(transparent)]
    Name(#[from] IdError),
    /// The system refused to read the file.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// More bytes than any analysis run has.
    #[error("it has {0} bytes, expected at most {FILE_BYTES_MAX}")]
    Long(u64),
    /// Fewer bytes than the header has.
    #[error("it is shorter than its header")]
    Short,
    /// Another kind of file: its first bytes.
    #[error("it begins with {}, expected {}", .0.escape_ascii(), MAGIC.escape_ascii())]
    Magic(Vec<u8>),
    /// Another version of the program wrote it.
    #[error("the saved analysis run has format {0}, expected {RUN}: another version of aviary wrote it")]
    OtherVersion(u8),
    /// Another version's number before a content of this version.
    #[error("its format is {0}, and its content that of format {VERSION}")]
    Version(u8),
    /// The content is not what the checksum was made of.
    #[error("its content does not match its checksum")]
    Checksum,
    /// The content is no analysis run.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Numbers of the analysis run exclude each other.
    #[error("it contradicts itself")]
    Unsound,
}

fn read(path: &Path) -> Result<Option<(ServiceId, SavedRun)>, RunDamage> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let service = name.strip_suffix(EXTENSION).and_then(|name| name.strip_suffix('.'));
    let service = ServiceId::new(service.unwrap_or_default())?;
    let length = fs::metadata(path)?.len();
    if length > FILE_BYTES_MAX {
        return Err(RunDamage::Long(length));
    }
    Ok(Some((service, decode(&fs::read(path)?)?)))
}

/// Returns the analysis run of a file's bytes.
pub(super) fn decode(bytes: &[u8]) -> Result<SavedRun, RunDamage> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(RunDamage::Short)?;
    if header[..7] != MAGIC {
        return Err(RunDamage::Magic(header[..7].into()));
    }
    if crc32c::crc32c(body).to_le_bytes() != header[8..] {
        return Err(RunDamage::Checksum);
    }
    if header[7] != VERSION {
        // The checksum doesn't cover the version: a content of this version under another number is damage.
        let is_ours = codec::decode_within::<SavedRun, RUN_BYTES_MAX>(body).is_ok();
        return Err(if is_ours { RunDamage::Version(header[7]) } else { RunDamage::OtherVersion(header[7]) });
    }
    let saved = codec::decode_within::<SavedRun, RUN_BYTES_MAX>(body)?;
    match saved.run.is_sound() {
        true => Ok(saved),
        false => Err(RunDamage::Unsound),
    }
}

/// Writes what comes until nothing can come any more.
fn write_all(waiting: &Receiver<Work>) {
    let mut failing = false;
    for (path, run) in waiting {
        let draft = path.with_extension(DRAFT);
        let written = match run {
            None => remove_if_there(&draft).and_then(|()| remove_if_there(&path)),
            Some(run) => fs::write(&draft, encode(&run)).and_then(|()| fs::rename(&draft, &path)),
        };
        match &written {
            Err(error) if !failing => {
                warn!(
                    "{}: an analysis run can't be saved: {error}; after a restart of all nodes it begins anew",
                    path.display()
                );
            }
            Ok(()) if failing => info!("analysis runs are saved again"),
            _ => {}
        }
        failing = written.is_err();
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::domain::analysis::Analysis;
    use crate::domain::run::{AnalysisRun, WindowVerdict};
    use crate::domain::time::Wall;
    use crate::protocol::record::RunTransfer;

    fn saved(at: u64) -> SavedRun {
        let run = AnalysisRun::new(Analysis::default(), Some(Default::default()), 250, 4_000);
        let run = RunTransfer { at_ms: 4_500, run, closed: vec![WindowVerdict::unseen(0, 30_000)] };
        SavedRun { rollout_generation: 3, at: Wall(at), run }
    }

    fn id(name: &str) -> ServiceId {
        ServiceId::new(name).unwrap()
    }

    #[test]
    fn a_run_is_found_as_it_was_saved_last() {
        let dir = TempDir::new().unwrap();
        let mut store = DiskRuns::open(dir.path()).unwrap().store;
        // Names of services that have a meaning for file systems.
        for name in ["s", "..", "s.new", "over"] {
            store.save(&id(name), Some(Box::new(saved(1))));
        }
        store.save(&id("s"), Some(Box::new(saved(2))));
        store.save(&id("over"), None);
        drop(store);
        let FoundRuns { saved: found, notes, store } = DiskRuns::open(dir.path()).unwrap();
        let expected = [("s", 2), ("..", 1), ("s.new", 1)].map(|(name, at)| (id(name), saved(at)));
        assert_eq!((found, notes), (expected.into(), vec![]));
        drop(store);
    }

    #[test]
    fn a_run_of_a_later_version_stops_the_node_and_one_of_an_older_version_is_told() {
        let dir = TempDir::new().unwrap();
        let mut store = DiskRuns::open(dir.path()).unwrap().store;
        store.save(&id("s"), Some(Box::new(saved(1))));
        drop(store);
        let path = dir.path().join("runs/s.run");
        let whole = fs::read(&path).unwrap();
        let of = |version: u8, body: &[u8]| {
            let bytes = [&MAGIC[..], &[version], &crc32c::crc32c(body).to_le_bytes(), body].concat();
            fs::write(&path, &bytes).unwrap();
            bytes
        };
        let later = of(VERSION + 1, b"another content");
        let Err(error) = DiskRuns::open(dir.path()) else { panic!("opened") };
        let text = error.to_string();
        assert!(text.contains("runs/s.run: the saved analysis run has format 3, expected 2: aviary "), "{text}");
        assert!(text.contains("start the version of aviary that wrote it"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), later);

        let older = of(VERSION - 1, b"another content");
        for _ in 0..2 {
            let FoundRuns { saved: found, notes, .. } = DiskRuns::open(dir.path()).unwrap();
            assert_eq!((found.len(), notes.len()), (0, 1));
            assert!(notes[0].contains("runs/s.run: the saved analysis run has format 1, expected 2"), "{notes:?}");
            assert_eq!(fs::read(&path).unwrap(), older, "{notes:?}");
        }

        of(VERSION + 1, &whole[HEADER_BYTES..]);
        let notes = DiskRuns::open(dir.path()).unwrap().notes;
        assert!(notes[0].contains("its format is 3, and its content that of format 2; removed"), "{notes:?}");
    }

    #[test]
    fn what_cant_be_read_is_told_and_removed() {
        let dir = TempDir::new().unwrap();
        let mut store = DiskRuns::open(dir.path()).unwrap().store;
        for name in ["short", "altered", "strange", "good"] {
            store.save(&id(name), Some(Box::new(saved(1))));
        }
        drop(store);
        let at = |name: &str| dir.path().join("runs").join(name);
        fs::write(at("short.run"), b"avia").unwrap();
        fs::write(at("s.new"), b"half").unwrap();
        fs::create_dir(at("stranger")).unwrap();
        for (name, place) in [("altered.run", 40), ("strange.run", 6)] {
            let mut bytes = fs::read(at(name)).unwrap();
            bytes[place] ^= 1;
            fs::write(at(name), bytes).unwrap();
        }
        let FoundRuns { saved: found, mut notes, .. } = DiskRuns::open(dir.path()).unwrap();
        assert_eq!(found, [(id("good"), saved(1))].into());
        notes.sort();
        let expected = ["does not match its checksum", "shorter than its header", "expected aviaryT"];
        assert_eq!(notes.len(), 3);
        notes.iter().zip(expected).for_each(|(note, part)| assert!(note.contains(part), "{note}"));
        assert!(DiskRuns::open(dir.path()).unwrap().notes.is_empty());
        assert!(!at("s.new").exists() && at("stranger").exists(), "only what is ours");
    }
}
