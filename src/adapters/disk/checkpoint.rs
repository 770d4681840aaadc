//! The checkpoint file: magic and version, slot, BLAKE3 of both and of the content, and the content: the ledger's
//! bytes. Replaced whole, never changed. The header stays as it is in all versions, so that each version tells a file of
//! another one from a damaged one.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use super::format::CHECKPOINT;
use crate::protocol::checkpoint::{CHECKPOINT_BYTES_MAX, Checkpoint, CheckpointError};
use crate::protocol::ledger::Ledger;
use crate::protocol::record::Slot;

/// First bytes of the file; the version of the format follows them.
const MAGIC: [u8; 7] = *b"aviaryC";
/// Bytes of magic, slot and hash, before the content.
const HEADER_BYTES: usize = 8 + 8 + 32;
/// Most bytes of the file.
const BYTES_MAX: usize = HEADER_BYTES + CHECKPOINT_BYTES_MAX;

/// Result of reading the file.
pub(super) enum FoundCheckpoint {
    Nothing,
    Good(Checkpoint, Box<Ledger>),
    /// Another version of the program wrote the file, which is whole.
    OtherVersion(u8),
    Damaged(CheckpointDamage),
}

/// Why bytes are no checkpoint.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckpointDamage {
    /// More bytes than any checkpoint has.
    #[error("it has {0} bytes, expected at most {BYTES_MAX}")]
    Long(usize),
    /// Fewer bytes than the header has.
    #[error("it is shorter than its header")]
    Short,
    /// Another kind of file.
    #[error("it does not begin with a checkpoint's magic")]
    Magic,
    /// The content is not what the hash was made of.
    #[error("its content does not match its hash")]
    Hash,
    /// The content is no ledger of its slot.
    #[error(transparent)]
    Ledger(#[from] CheckpointError),
}

/// Writes a checkpoint durably, but for its directory's entry.
pub(super) fn write(path: &Path, checkpoint: &Checkpoint) -> io::Result<()> {
    let draft = path.with_extension("new");
    let mut file = File::create(&draft)?;
    file.write_all(&header(checkpoint))?;
    file.write_all(&checkpoint.bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

/// Returns what stands before the ledger's bytes.
pub(super) fn header(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut header = [&MAGIC[..], &[checkpoint.format], &checkpoint.slot.0.to_le_bytes()].concat();
    let hash = hash(&header, &checkpoint.bytes);
    header.extend(hash);
    header
}

fn hash(start: &[u8], body: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(start).update(body).finalize().as_bytes()
}

/// Reads and verifies the file.
pub(super) fn read(path: &Path) -> io::Result<FoundCheckpoint> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse(&bytes).unwrap_or_else(FoundCheckpoint::Damaged)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(FoundCheckpoint::Nothing),
        Err(error) => Err(error),
    }
}

/// Verifies a file's bytes.
pub(super) fn parse(bytes: &[u8]) -> Result<FoundCheckpoint, CheckpointDamage> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(CheckpointDamage::Short)?;
    if header[..7] != MAGIC {
        return Err(CheckpointDamage::Magic);
    }
    if hash(&header[..16], body) != header[16..] {
        return Err(CheckpointDamage::Hash);
    }
    let format = header[7];
    if !CHECKPOINT.contains(format) {
        return Ok(FoundCheckpoint::OtherVersion(format));
    }
    if bytes.len() > BYTES_MAX {
        return Err(CheckpointDamage::Long(bytes.len()));
    }
    let slot = Slot(u64::from_le_bytes(header[8..16].try_into().expect("8 bytes")));
    let checkpoint = Checkpoint { slot, format, bytes: body.to_vec().into() };
    let ledger = checkpoint.ledger()?;
    Ok(FoundCheckpoint::Good(checkpoint, Box::new(ledger)))
}
