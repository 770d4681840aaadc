//! The register file: a node's promises, in two slots written alternately, and the journal's unsynced tail beside them.
//!
//! One write and one `fdatasync` make a promise durable, *with* every record appended before it: records that the
//! journal has not synced yet travel in the slot. A torn write ruins the slot being written, never the other one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::trouble;
use crate::ports::StoreError;
use crate::protocol::codec;
use crate::protocol::record::Register;

/// Bytes of one slot.
pub(super) const SLOT_BYTES: usize = 128 * 1024;
/// Bytes of the file.
pub(super) const FILE_BYTES: usize = 2 * SLOT_BYTES;
/// Format and version; another version gets another magic.
const MAGIC: [u8; 8] = *b"aviaryR\x01";
/// Magic, generation, payload length, CRC-32C.
const HEADER_BYTES: usize = 8 + 8 + 4 + 4;
const PAGE_BYTES: usize = 4096;

/// What one readable slot says.
pub(super) struct Saved {
    /// The promises.
    pub register: Register,
    /// Encoded records that the journal may lack, in order.
    pub tail: Vec<Vec<u8>>,
    generation: u64,
    slot: usize,
}

/// The open file.
pub(super) struct RegisterFile {
    file: File,
    path: PathBuf,
    generation: u64,
    target: usize,
}

/// What was found in the file at start.
pub(super) struct Found {
    /// The file, ready to be written.
    pub file: RegisterFile,
    /// The newest readable slot.
    pub saved: Option<Saved>,
    /// What was unusual.
    pub notes: Vec<String>,
}

impl RegisterFile {
    /// Opens the file, or makes an empty one, and reads both slots.
    pub fn open(path: &Path) -> Result<Found, StoreError> {
        let existed = path.exists();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| trouble(path, "open the register", e))?;
        let (bytes, length) = read_all(&file).map_err(|e| trouble(path, "read the register", e))?;
        let mut notes = Vec::new();
        if !existed {
            notes.push(format!("{}: the register is missing; this node's promises are gone", path.display()));
        } else if length != FILE_BYTES as u64 {
            notes.push(format!("{}: the register has {length} bytes, expected {FILE_BYTES}", path.display()));
        }
        fill(&file, length).map_err(|e| trouble(path, "write the register", e))?;
        // What is read here may exist in memory alone, left by a process that died between write and sync.
        file.sync_all().map_err(|e| trouble(path, "sync the register", e))?;
        let mut saved: Option<Saved> = None;
        for slot in 0..2 {
            match read_slot(&bytes[slot * SLOT_BYTES..][..SLOT_BYTES], slot) {
                Ok(found) if saved.as_ref().is_none_or(|best| found.generation > best.generation) => {
                    saved = Some(found);
                }
                Ok(_) => {}
                Err(_) if !existed => {}
                Err(why) => notes.push(format!("{}: slot {slot} of the register is damaged: {why}", path.display())),
            }
        }
        let (generation, target) = saved.as_ref().map_or((1, 0), |best| (best.generation + 1, 1 - best.slot));
        Ok(Found { file: Self { file, path: path.into(), generation, target }, saved, notes })
    }

    /// Writes register and tail; on return they survive power loss.
    pub fn write<'a>(&mut self, register: &[u8], tail: impl Iterator<Item = &'a [u8]>) -> Result<(), StoreError> {
        let bytes = slot_bytes(self.generation, register, tail);
        assert!(bytes.len() <= SLOT_BYTES, "a slot has room for what the store puts there");
        let offset = (self.target * SLOT_BYTES) as u64;
        self.file.write_all_at(&bytes, offset).map_err(|e| trouble(&self.path, "write the register", e))?;
        self.file.sync_data().map_err(|e| trouble(&self.path, "sync the register", e))?;
        self.generation += 1;
        self.target = 1 - self.target;
        Ok(())
    }
}

/// Returns the bytes that a slot needs for a register and records of these lengths.
pub(super) fn bytes_needed(register: usize, tail: impl Iterator<Item = usize>) -> usize {
    let payload = 4 + register + tail.map(|length| 4 + length).sum::<usize>();
    (HEADER_BYTES + payload).next_multiple_of(PAGE_BYTES)
}

fn read_all(file: &File) -> io::Result<(Vec<u8>, u64)> {
    let length = file.metadata()?.len();
    let mut bytes = vec![0; FILE_BYTES];
    let readable = usize::try_from(length).unwrap_or(FILE_BYTES).min(FILE_BYTES);
    file.read_exact_at(&mut bytes[..readable], 0)?;
    Ok((bytes, length))
}

/// Writes zeros from the file's end on, so that no later write needs space that may not be there.
fn fill(file: &File, length: u64) -> io::Result<()> {
    let present = usize::try_from(length).unwrap_or(FILE_BYTES).min(FILE_BYTES);
    file.write_all_at(&vec![0; FILE_BYTES - present], present as u64)
}

fn slot_bytes<'a>(generation: u64, register: &[u8], tail: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut payload = Vec::with_capacity(PAGE_BYTES);
    put(&mut payload, register);
    tail.for_each(|entry| put(&mut payload, entry));
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len() + PAGE_BYTES);
    bytes.extend(MAGIC);
    bytes.extend(generation.to_le_bytes());
    bytes.extend(u32::try_from(payload.len()).expect("a payload fits into its slot").to_le_bytes());
    let crc = checksum(&bytes, &payload);
    bytes.extend(crc.to_le_bytes());
    bytes.append(&mut payload);
    bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
    bytes
}

fn put(payload: &mut Vec<u8>, part: &[u8]) {
    payload.extend(u32::try_from(part.len()).expect("a part fits into its slot").to_le_bytes());
    payload.extend(part);
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head), payload)
}

fn read_slot(bytes: &[u8], slot: usize) -> Result<Saved, String> {
    let (header, rest) = bytes.split_at(HEADER_BYTES);
    if header[..8] != MAGIC {
        return Err("it does not begin with the register's magic and version".into());
    }
    let generation = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
    let length = u32_at(header, 16) as usize;
    let payload = rest.get(..length).ok_or_else(|| format!("its length is {length}, above the slot's"))?;
    let (expected, found) = (u32_at(header, 20), checksum(&header[..20], payload));
    if expected != found {
        return Err(format!("its checksum is {found:08x}, expected {expected:08x}"));
    }
    let mut parts = parts(payload)?.into_iter();
    let register = parts.next().ok_or("it has no register")?;
    let register = codec::decode(register).map_err(|error| error.to_string())?;
    Ok(Saved { register, tail: parts.map(<[u8]>::to_vec).collect(), generation, slot })
}

fn parts(mut payload: &[u8]) -> Result<Vec<&[u8]>, String> {
    let mut parts = Vec::new();
    while !payload.is_empty() {
        let (length, rest) = payload.split_at_checked(4).ok_or("its last part has no length")?;
        let (part, rest) = rest.split_at_checked(u32_at(length, 0) as usize).ok_or("its last part is cut off")?;
        parts.push(part);
        payload = rest;
    }
    Ok(parts)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
