//! The acceptor file: a node's promises, in two slots written alternately, and the journal's unsynced tail beside them.
//!
//! One write and one `fdatasync` make a promise durable, *with* every record appended before it: records that the
//! journal has not synced yet travel in the slot. A torn write ruins the slot being written, never the other one.
//!
//! A slot that can't be read is one of two things. Torn: the process died while it wrote, the promise in it was never
//! made, and the other slot is the newest. Rotten: it may have been the newest, and the node can't know what it has
//! promised. To tell them apart, each sector carries its own generation and checksum: a torn slot is made of whole
//! sectors, old and new; a rotten one has a sector that nobody wrote. Disks write sectors of 512 bytes whole or not.
//! A new file is full of sectors of generation 0, so that zeros are damage, and its length never changes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{ACCEPTOR, UnknownFormat};
use super::{OpenError, trouble};
use crate::ports::StoreError;
use crate::protocol::codec::{self, DecodeError};
use crate::protocol::record::AcceptorState;

/// Size of each of the two slots, in bytes.
pub(super) const SLOT_BYTES: usize = 128 * 1024;
/// Size of the file, in bytes.
pub(super) const FILE_BYTES: usize = 2 * SLOT_BYTES;
/// First bytes of every sector; the version of the format follows them.
const MAGIC: [u8; 7] = *b"aviaryR";
/// Version of a slot that holds nothing. A sector's header stays as it is in all versions, so that each version tells a sector of
/// another one from a damaged one.
const EMPTY_VERSION: u8 = ACCEPTOR.oldest as u8;
const SECTOR_BYTES: usize = 512;
/// Bytes of magic and version, generation, and CRC-32C, before the content.
const HEADER_BYTES: usize = 8 + 8 + 4;
/// Bytes of payload in a sector.
const ROOM_BYTES: usize = SECTOR_BYTES - HEADER_BYTES;
/// Sectors written at least, so that no single bad one hides that a slot was written.
const SECTORS_MIN: usize = 8;

/// Content of one readable slot.
pub(super) struct Saved {
    /// Newest acceptor state that the file holds.
    pub acceptor: AcceptorState,
    /// Encoded records that the journal may lack, in order.
    pub tail: Vec<Vec<u8>>,
    generation: u64,
    slot: usize,
}

/// The open acceptor file, whose two slots are written in turn.
pub(super) struct AcceptorFile {
    file: File,
    path: PathBuf,
    generation: u64,
    target: usize,
    /// Neither slot holds promises: the first write goes to both, so that an empty slot is always damage.
    fresh: bool,
}

/// Content of the file at start.
pub(super) struct FoundAcceptor {
    /// The file, ready to be written.
    pub file: AcceptorFile,
    /// The newest promises; none when there are none, or when newer ones may have been lost.
    pub saved: Option<Saved>,
    /// Findings that an operator should see, for the log.
    pub notes: Vec<String>,
}

/// One slot, as it was found.
enum FileSlot {
    Good(Box<Saved>),
    /// Whole sectors of several writes, the newest of this generation; 0 for a slot that was never written.
    Torn {
        newest: u64,
    },
    /// Damaged. `newest` is the last generation that wrote it, where that still shows.
    Rotten {
        why: SlotDamage,
        newest: Option<u64>,
    },
}

/// Why a slot holds what nobody wrote.
#[derive(Debug, thiserror::Error)]
enum SlotDamage {
    /// This sector is not one of this file.
    #[error("sector {0} does not begin with the acceptor file's magic")]
    Magic(usize),
    /// A sector's content is not what its checksum was made of.
    #[error("the checksum of sector {sector} is {found:08x}, expected {expected:08x}")]
    Checksum { sector: usize, found: u32, expected: u32 },
    /// The payload has no parts.
    #[error("it has no acceptor state")]
    Empty,
    /// The payload ends within a part's length.
    #[error("its last part has no length")]
    NoLength,
    /// The payload ends within a part.
    #[error("its last part is cut off")]
    CutOff,
    /// The first part is no acceptor state.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl AcceptorFile {
    /// Opens the file, or makes an empty one, and reads both slots.
    pub fn open(path: &Path) -> Result<FoundAcceptor, OpenError> {
        let existed = path.exists();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| trouble(path, "open the acceptor file", e))?;
        let (bytes, length) = read_all(&file).map_err(|e| trouble(path, "read the acceptor file", e))?;
        if let Some(found) = other_version(&bytes) {
            return Err(UnknownFormat { path: path.into(), what: "acceptor file", found, expected: ACCEPTOR }.into());
        }
        let mut notes = Vec::new();
        let shown = path.display();
        if !existed {
            notes.push(format!("{shown}: the acceptor file is missing; this node's promises are gone"));
        } else if length != FILE_BYTES as u64 {
            notes.push(format!(
                "{shown}: the acceptor file has {length} bytes, expected {FILE_BYTES}: what was promised may be lost"
            ));
        }
        if length != FILE_BYTES as u64 {
            format(&file).map_err(|e| trouble(path, "write the acceptor file", e))?;
        }
        // What is read here may exist in memory alone, left by a process that died between write and sync.
        file.sync_all().map_err(|e| trouble(path, "sync the acceptor file", e))?;
        let slots = read_slots(&bytes);
        let highest = slots.iter().map(FileSlot::newest).max().unwrap_or(0);
        let saved = match length == FILE_BYTES as u64 {
            true => newest_promises(slots, |slot, why| {
                notes.push(format!("{shown}: slot {slot} of the acceptor file is damaged: {why}"));
            }),
            false => None,
        };
        let target = saved.as_ref().map_or(0, |best| 1 - best.slot);
        let fresh = saved.is_none();
        Ok(FoundAcceptor {
            file: Self { file, path: path.into(), generation: highest + 1, target, fresh },
            saved,
            notes,
        })
    }

    /// Writes the acceptor state, in a version of the format, and the tail; on return they survive power loss.
    pub fn write<'a>(
        &mut self,
        version: u8,
        acceptor: &[u8],
        tail: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), StoreError> {
        if std::mem::take(&mut self.fresh) {
            self.write_slot(version, acceptor, tail.clone())?;
        }
        self.write_slot(version, acceptor, tail)
    }

    fn write_slot<'a>(
        &mut self,
        version: u8,
        acceptor: &[u8],
        tail: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), StoreError> {
        let bytes = slot_bytes(version, self.generation, self.target, acceptor, tail);
        assert!(bytes.len() <= SLOT_BYTES, "a slot has room for what the store puts there");
        let offset = (self.target * SLOT_BYTES) as u64;
        self.file.write_all_at(&bytes, offset).map_err(|e| trouble(&self.path, "write the acceptor file", e))?;
        self.file.sync_data().map_err(|e| trouble(&self.path, "sync the acceptor file", e))?;
        self.generation += 1;
        self.target = 1 - self.target;
        Ok(())
    }
}

impl FileSlot {
    fn newest(&self) -> u64 {
        match self {
            Self::Good(saved) => saved.generation,
            Self::Torn { newest } => *newest,
            Self::Rotten { newest, .. } => newest.unwrap_or(0),
        }
    }
}

/// Returns the newest promises, unless newer ones may have been made and lost; says what is damaged.
fn newest_promises(slots: [FileSlot; 2], mut damaged: impl FnMut(usize, String)) -> Option<Saved> {
    let mut best: Option<Saved> = None;
    let mut others = Vec::new();
    for (at, slot) in slots.into_iter().enumerate() {
        match slot {
            FileSlot::Good(found) if best.as_ref().is_none_or(|best| found.generation > best.generation) => {
                best = Some(*found);
            }
            FileSlot::Good(_) => {}
            other => others.push((at, other)),
        }
    }
    let generation = best.as_ref().map(|best| best.generation);
    let mut lost = false;
    for (at, slot) in others {
        match (slot, generation) {
            (FileSlot::Torn { newest }, Some(best)) if newest == best + 1 => {
                damaged(at, format!("write {newest} was cut off, and what it promised was never said"));
            }
            (FileSlot::Rotten { why, newest: Some(newest) }, Some(best)) if newest < best => {
                damaged(at, format!("{why}; slot {} is newer", 1 - at));
            }
            (FileSlot::Torn { newest: 0 }, _) => {
                lost = true;
                damaged(at, "it is empty".into());
            }
            (FileSlot::Torn { newest }, _) => {
                lost = true;
                damaged(at, format!("write {newest} is incomplete, and no write before it is whole"));
            }
            (FileSlot::Rotten { why, .. }, _) => {
                lost = true;
                damaged(at, format!("{why}, so that the newest promise may be lost"));
            }
            (FileSlot::Good(_), _) => unreachable!("only damaged slots are left"),
        }
    }
    best.filter(|_| !lost)
}

/// Returns the bytes that a slot needs for an acceptor state and records of these lengths.
pub(super) fn bytes_needed(acceptor: usize, tail: impl Iterator<Item = usize>) -> usize {
    let payload = 4 + 4 + acceptor + tail.map(|length| 4 + length).sum::<usize>();
    payload.div_ceil(ROOM_BYTES).next_multiple_of(SECTORS_MIN) * SECTOR_BYTES
}

fn read_all(file: &File) -> io::Result<(Vec<u8>, u64)> {
    let length = file.metadata()?.len();
    let mut bytes = vec![0; FILE_BYTES];
    let readable = usize::try_from(length).unwrap_or(FILE_BYTES).min(FILE_BYTES);
    file.read_exact_at(&mut bytes[..readable], 0)?;
    Ok((bytes, length))
}

/// Returns the version of an acceptor file that another version of the program wrote, if only in one slot: its promises
/// are there, and can't be read here. A damaged version byte is not one, because checksums cover it from format 7 on.
fn other_version(bytes: &[u8]) -> Option<u8> {
    let begins = |(_, sector): &(usize, &[u8])| sector.starts_with(&MAGIC);
    let first = bytes.chunks(SLOT_BYTES).map(|slot| &slot[..SECTOR_BYTES]).enumerate().filter(begins);
    let first: Vec<_> = first.map(|(slot, sector)| (sector[7], read_sector(sector, slot, 0).is_ok())).collect();
    let whole =
        first.iter().find(|(version, whole)| !ACCEPTOR.contains(*version) && *whole).map(|(version, _)| *version);
    let older = || {
        let (found, _) = first.first().filter(|(version, _)| *version < 7)?;
        first.iter().all(|(other, _)| other == found).then_some(*found)
    };
    whole.or_else(older)
}

/// Fills the file with sectors that hold nothing, so that no later write needs space that may not be there.
fn format(file: &File) -> io::Result<()> {
    let empty = vec![0; SLOT_BYTES / SECTOR_BYTES * ROOM_BYTES];
    file.write_all_at(&[0, 1].map(|slot| sectors_of(EMPTY_VERSION, 0, slot, &empty)).concat(), 0)?;
    file.set_len(FILE_BYTES as u64)
}

/// Returns what is written into a slot: the payload's length and the payload, spread over sectors.
pub(super) fn slot_bytes<'a>(
    version: u8,
    generation: u64,
    slot: usize,
    acceptor: &[u8],
    tail: impl Iterator<Item = &'a [u8]>,
) -> Vec<u8> {
    let mut payload = vec![0; 4];
    put(&mut payload, acceptor);
    tail.for_each(|entry| put(&mut payload, entry));
    let length = u32::try_from(payload.len() - 4).expect("a payload fits into its slot");
    payload[..4].copy_from_slice(&length.to_le_bytes());
    payload.resize(payload.len().div_ceil(ROOM_BYTES).next_multiple_of(SECTORS_MIN) * ROOM_BYTES, 0);
    sectors_of(version, generation, slot, &payload)
}

fn sectors_of(version: u8, generation: u64, slot: usize, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() / ROOM_BYTES * SECTOR_BYTES);
    for (index, part) in payload.chunks(ROOM_BYTES).enumerate() {
        bytes.extend(MAGIC);
        bytes.push(version);
        bytes.extend(generation.to_le_bytes());
        bytes.extend(checksum(version, generation, slot, index, part).to_le_bytes());
        bytes.extend(part);
    }
    bytes
}

fn put(payload: &mut Vec<u8>, part: &[u8]) {
    payload.extend(u32::try_from(part.len()).expect("a part fits into its slot").to_le_bytes());
    payload.extend(part);
}

/// Covers a sector's version and place too: one written to the wrong place is no sector.
fn checksum(version: u8, generation: u64, slot: usize, index: usize, part: &[u8]) -> u32 {
    let place = ((slot as u64) << 32) | index as u64;
    let head = [&[version][..], &generation.to_le_bytes(), &place.to_le_bytes()].concat();
    crc32c::crc32c_append(crc32c::crc32c(&head), part)
}

/// Returns the generation that wrote a sector, whatever its version; 0 when it was never written.
fn read_sector(sector: &[u8], slot: usize, index: usize) -> Result<u64, SlotDamage> {
    if sector[..7] != MAGIC {
        return Err(SlotDamage::Magic(index));
    }
    let generation = u64::from_le_bytes(sector[8..16].try_into().expect("8 bytes"));
    let (expected, found) = (u32_at(sector, 16), checksum(sector[7], generation, slot, index, &sector[HEADER_BYTES..]));
    match expected == found {
        true => Ok(generation),
        false => Err(SlotDamage::Checksum { sector: index, found, expected }),
    }
}

fn read_slot(bytes: &[u8], slot: usize) -> FileSlot {
    let read = |(index, sector)| read_sector(sector, slot, index);
    let sectors: Vec<_> = bytes.chunks(SECTOR_BYTES).enumerate().map(read).collect();
    let newest = sectors.iter().flatten().copied().max().unwrap_or(0);
    let whole = sectors.iter().take_while(|sector| matches!(sector, Ok(found) if *found == newest)).count();
    let payload: Vec<u8> = bytes.chunks(SECTOR_BYTES).take(whole).flat_map(|s| &s[HEADER_BYTES..]).copied().collect();
    if newest > 0
        && whole > 0
        && let Some(payload) = payload[4..].get(..u32_at(&payload, 0) as usize)
        // A write ends with a whole page: less than that was cut off.
        && whole.is_multiple_of(SECTORS_MIN)
    {
        return match read_payload(payload) {
            Ok((acceptor, tail)) => FileSlot::Good(Box::new(Saved { acceptor, tail, generation: newest, slot })),
            Err(why) => FileSlot::Rotten { why, newest: Some(newest) },
        };
    }
    // Every write goes over the first sectors: what is whole among them tells the last one.
    let last = sectors[..SECTORS_MIN].iter().flatten().copied().max().filter(|last| *last > 0);
    match sectors.into_iter().find_map(Result::err) {
        None => FileSlot::Torn { newest },
        Some(why) => FileSlot::Rotten { why, newest: last.map(|last| last.max(newest)) },
    }
}

/// Returns the acceptor state and the records of a slot's bytes; none where they are damaged.
pub(super) fn read_whole_slot(bytes: &[u8], slot: usize) -> Option<(AcceptorState, Vec<Vec<u8>>)> {
    match read_slot(bytes, slot) {
        FileSlot::Good(saved) => Some((saved.acceptor, saved.tail)),
        FileSlot::Torn { .. } | FileSlot::Rotten { .. } => None,
    }
}

fn read_slots(bytes: &[u8]) -> [FileSlot; 2] {
    [0, 1].map(|slot| read_slot(&bytes[slot * SLOT_BYTES..][..SLOT_BYTES], slot))
}

fn read_payload(payload: &[u8]) -> Result<(AcceptorState, Vec<Vec<u8>>), SlotDamage> {
    let mut parts = parts(payload)?.into_iter();
    let acceptor = parts.next().ok_or(SlotDamage::Empty)?;
    let acceptor = codec::decode(acceptor)?;
    Ok((acceptor, parts.map(<[u8]>::to_vec).collect()))
}

fn parts(mut payload: &[u8]) -> Result<Vec<&[u8]>, SlotDamage> {
    let mut parts = Vec::new();
    while !payload.is_empty() {
        let (length, rest) = payload.split_at_checked(4).ok_or(SlotDamage::NoLength)?;
        let (part, rest) = rest.split_at_checked(u32_at(length, 0) as usize).ok_or(SlotDamage::CutOff)?;
        parts.push(part);
        payload = rest;
    }
    Ok(parts)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::conformance;

    #[test]
    fn the_sectors_of_format_7_stay() {
        let bytes = slot_bytes(7, 3, 1, b"abc", [&b"de"[..]].into_iter());
        assert_eq!(bytes.len(), SECTORS_MIN * SECTOR_BYTES);
        let crc = checksum(7, 3, 1, 0, &bytes[HEADER_BYTES..SECTOR_BYTES]);
        assert_eq!(crc, 1_434_074_637, "the checksum covers version, generation, place and payload");
        let head = [&b"aviaryR\x07\x03\0\0\0\0\0\0\0"[..], &crc.to_le_bytes()].concat();
        assert_eq!(bytes[..HEADER_BYTES], head);
        assert_eq!(bytes[HEADER_BYTES..][..17], *b"\x0d\0\0\0\x03\0\0\0abc\x02\0\0\0de");
    }

    /// Returns the bytes of the file after these two were written, the newer one last.
    fn image(older: &AcceptorState, newer: &AcceptorState) -> Vec<u8> {
        let mut bytes = vec![0; SLOT_BYTES / SECTOR_BYTES * ROOM_BYTES];
        bytes = [0, 1].map(|slot| sectors_of(7, 0, slot, &bytes)).concat();
        for (slot, acceptor) in [older, newer].into_iter().enumerate() {
            let written = slot_bytes(7, slot as u64 + 1, slot, &codec::encode(acceptor), std::iter::empty());
            bytes[slot * SLOT_BYTES..][..written.len()].copy_from_slice(&written);
        }
        bytes
    }

    fn promises(bytes: &[u8]) -> Option<AcceptorState> {
        newest_promises(read_slots(bytes), |_, _| {}).map(|saved| saved.acceptor)
    }

    #[test]
    fn a_turned_bit_never_gives_other_promises_than_the_newest() {
        let [older, newer] = [1, 2].map(|boot| conformance::acceptor(boot, 0));
        let mut bytes = image(&older, &newer);
        assert_eq!(promises(&bytes).as_ref(), Some(&newer));
        let (mut lost, mut kept) = (0, 0);
        for at in [0, SLOT_BYTES].into_iter().flat_map(|slot| slot..slot + 700) {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                match promises(&bytes) {
                    Some(found) => {
                        assert_eq!(found, newer, "bit {bit} of byte {at}");
                        kept += 1;
                    }
                    None => lost += 1,
                }
                bytes[at] ^= 1 << bit;
            }
        }
        assert!(lost > 0 && kept > 0, "{lost} lost, {kept} kept");
    }
}
