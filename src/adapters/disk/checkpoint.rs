//! The checkpoint file: magic and version, slot, BLAKE3, and the ledger's bytes. Replaced whole, never changed.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use crate::protocol::checkpoint::{CHECKPOINT_BYTES_MAX, Checkpoint, CheckpointError};
use crate::protocol::ledger::Ledger;
use crate::protocol::record::Slot;

/// Format and version; another version gets another magic.
const MAGIC: [u8; 8] = *b"aviaryC\x03";
/// Bytes of magic, slot and hash, before the content.
const HEADER_BYTES: usize = 8 + 8 + 32;
/// Most bytes of the file.
const BYTES_MAX: usize = HEADER_BYTES + CHECKPOINT_BYTES_MAX;

/// Result of reading the file.
pub(super) enum FoundCheckpoint {
    Nothing,
    Good(Checkpoint, Box<Ledger>),
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
    /// Another version of the program wrote it.
    #[error("it has version {0}, expected {expected}", expected = MAGIC[7])]
    Version(u8),
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
    file.write_all(&MAGIC)?;
    file.write_all(&checkpoint.slot.0.to_le_bytes())?;
    file.write_all(&checkpoint.hash().0)?;
    file.write_all(&checkpoint.bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

/// Reads and verifies the file.
pub(super) fn read(path: &Path) -> io::Result<FoundCheckpoint> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(FoundCheckpoint::Nothing),
        Err(error) => return Err(error),
    };
    Ok(match parse(&bytes) {
        Ok((checkpoint, ledger)) => FoundCheckpoint::Good(checkpoint, Box::new(ledger)),
        Err(why) => FoundCheckpoint::Damaged(why),
    })
}

fn parse(bytes: &[u8]) -> Result<(Checkpoint, Ledger), CheckpointDamage> {
    if bytes.len() > BYTES_MAX {
        return Err(CheckpointDamage::Long(bytes.len()));
    }
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(CheckpointDamage::Short)?;
    if header[..7] != MAGIC[..7] {
        return Err(CheckpointDamage::Magic);
    }
    if header[7] != MAGIC[7] {
        return Err(CheckpointDamage::Version(header[7]));
    }
    let slot = Slot(u64::from_le_bytes(header[8..16].try_into().expect("8 bytes")));
    let checkpoint = Checkpoint { slot, bytes: body.to_vec().into() };
    if checkpoint.hash().0 != header[16..] {
        return Err(CheckpointDamage::Hash);
    }
    let ledger = checkpoint.ledger()?;
    Ok((checkpoint, ledger))
}
