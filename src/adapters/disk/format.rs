//! The formats of what a node keeps on disk: the one list of the versions that are read and written, what a node says when it
//! meets another one, and the bytes of one value of each, by which tests pin them.
//!
//! A node writes the oldest version that can say what it has to say. A later one is written only with what every member of the
//! cluster knows (see [`crate::protocol::feature`]), so that a node can go back to the version before until then.

use std::fmt;
use std::path::PathBuf;

use super::{acceptor, checkpoint, journal, runs};
use crate::protocol::checkpoint::{Checkpoint, FORMATS};
use crate::protocol::feature::Feature;
use crate::protocol::record::{AcceptorState, Chosen, Record, SavedRun};

/// The versions of a format that this program reads, both ends included. It writes no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The oldest of them.
    pub oldest: u16,
    /// The newest of them.
    pub newest: u16,
}

impl Known {
    /// Returns true for a version that this program reads.
    pub fn contains(self, version: impl Into<u16>) -> bool {
        (self.oldest..=self.newest).contains(&version.into())
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => self.newest.fmt(f),
            false => write!(f, "{} or {}", self.oldest, self.newest),
        }
    }
}

/// The acceptor file: 8 has accepted a record of journal format 4.
pub const ACCEPTOR: Known = Known { oldest: 7, newest: 8 };
/// The journal's records, the genesis file, and the records that the acceptor file carries: 4 sets the default service.
pub const JOURNAL: Known = Known { oldest: 3, newest: 4 };
/// The checkpoint file, whose version is that of the ledger's bytes in it.
pub const CHECKPOINT: Known = Known { oldest: FORMATS.0 as u16, newest: FORMATS.1 as u16 };
/// The files of saved analysis runs.
pub const RUN: Known = Known { oldest: 2, newest: 2 };

/// Returns the version of an acceptor file's slot.
pub(super) fn of_acceptor(state: &AcceptorState) -> u8 {
    match state.accepted.as_ref().and_then(|accepted| accepted.record.intent.operation.needs()) {
        None | Some(Feature::RolloutSalt) => 7,
        Some(Feature::DefaultService) => 8,
    }
}

/// Returns the version of a stored record.
pub(super) fn of_record(record: &Record) -> u8 {
    match record.intent.operation.needs() {
        None | Some(Feature::RolloutSalt) => 3,
        Some(Feature::DefaultService) => 4,
    }
}

/// A whole file that another version of the program wrote, and that this one can't read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{}: the {what} has format {found}, expected {expected}: aviary {} can't read it and changed nothing; \
     start the version of aviary that wrote it",
    path.display(),
    env!("CARGO_PKG_VERSION")
)]
pub struct UnknownFormat {
    /// File or directory that the error is about.
    pub path: PathBuf,
    /// The kind of what was read, such as `checkpoint`.
    pub what: &'static str,
    /// Version that was found.
    pub found: u8,
    /// Versions that this program reads.
    pub expected: Known,
}

/// Name of the file that tells the journal's format. sled writes to a journal as soon as it opens it, so that a node must
/// know beforehand whether it may: it writes this file before its first record of another version.
pub(super) const MARKER: &str = "journal.format";

/// Returns the content of the file [`MARKER`]: version and CRC-32C.
pub(super) fn marker(version: u8) -> String {
    let text = format!("journal {version}");
    format!("{text} {:08x}\n", crc32c::crc32c(text.as_bytes()))
}

/// Returns the version that the content of the file [`MARKER`] names; none if it is damaged.
pub(super) fn marked(content: &[u8]) -> Option<u8> {
    let text = str::from_utf8(content).ok()?;
    let version = text.strip_prefix("journal ")?.split(' ').next()?.parse().ok()?;
    (marker(version) == text).then_some(version)
}

/// Why bytes are no stored value, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(String);

/// Returns a slot of the acceptor file, without the room behind it.
pub fn encode_acceptor(state: &AcceptorState, tail: &[Chosen]) -> Vec<u8> {
    let tail: Vec<_> = tail.iter().map(journal::encode_entry).collect();
    acceptor::slot_bytes(
        of_acceptor(state),
        1,
        0,
        &crate::protocol::codec::encode(state),
        tail.iter().map(Vec::as_slice),
    )
}

/// Returns the acceptor state and the records that a slot of the acceptor file carries.
pub fn decode_acceptor(bytes: &[u8]) -> Result<(AcceptorState, Vec<Chosen>), Unreadable> {
    let (state, tail) = acceptor::read_whole_slot(bytes, 0).ok_or_else(|| Unreadable("the slot is damaged".into()))?;
    Ok((state, tail.iter().map(|entry| decode_record(entry)).collect::<Result<_, _>>()?))
}

/// Returns a record as the journal, the genesis file and the acceptor file hold it.
pub fn encode_record(chosen: &Chosen) -> Vec<u8> {
    journal::encode_entry(chosen)
}

/// Returns the record of bytes that [`encode_record`] made.
pub fn decode_record(bytes: &[u8]) -> Result<Chosen, Unreadable> {
    journal::decode_entry(bytes).map_err(|why| Unreadable(why.to_string()))
}

/// Returns the bytes of a checkpoint file.
pub fn encode_checkpoint(checkpoint: &Checkpoint) -> Vec<u8> {
    [&checkpoint::header(checkpoint)[..], &checkpoint.bytes].concat()
}

/// Returns the checkpoint of a checkpoint file's bytes.
pub fn decode_checkpoint(bytes: &[u8]) -> Result<Checkpoint, Unreadable> {
    match checkpoint::parse(bytes) {
        Ok(checkpoint::FoundCheckpoint::Good(checkpoint, _)) => Ok(checkpoint),
        Ok(checkpoint::FoundCheckpoint::OtherVersion(found)) => Err(Unreadable(format!("it has format {found}"))),
        Ok(_) => Err(Unreadable("there is no checkpoint".into())),
        Err(why) => Err(Unreadable(why.to_string())),
    }
}

/// Returns the bytes of a saved analysis run's file.
pub fn encode_run(run: &SavedRun) -> Vec<u8> {
    runs::encode(run)
}

/// Returns the analysis run of a file's bytes.
pub fn decode_run(bytes: &[u8]) -> Result<SavedRun, Unreadable> {
    runs::decode(bytes).map_err(|why| Unreadable(why.to_string()))
}
