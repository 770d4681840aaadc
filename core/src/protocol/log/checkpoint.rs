//! The sum of a log up to a slot, as bytes: what a node starts from, and what a peer gets whose next record is gone.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::domain::ids::ServiceId;
use crate::domain::limits::{LEDGER_BYTES_MAX, VALUE_BYTES_MAX};
use crate::protocol::feature::Feature;

use super::codec::{self, DecodeError};
use super::ledger::Ledger;
use super::record::{Hash, Slot};

/// Bytes of a part, as it crosses the wire: what fits into a frame with room to spare.
pub const PART_BYTES: usize = 48 * 1024;
const _: () = assert!(PART_BYTES + 8 * 1024 <= VALUE_BYTES_MAX);
/// Most bytes of a checkpoint, which is an encoded ledger.
pub const CHECKPOINT_BYTES_MAX: usize = LEDGER_BYTES_MAX;

/// The oldest and the newest format of a ledger's bytes that this build reads: 3 has no default service, 4 has one.
pub const FORMATS: (u8, u8) = (3, 4);

/// A ledger as its canonical encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The last slot it covers.
    pub slot: Slot,
    /// Format of the bytes: the oldest one that can say all that the ledger holds, so that what an older build can read is
    /// written for it.
    pub format: u8,
    /// Canonical encoding of the ledger, the same at all nodes.
    pub bytes: Bytes,
}

/// Why bytes are no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The bytes are not the encoding of a ledger.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Another version of the program wrote them.
    #[error("the ledger has format {found}, expected {oldest} or {newest}", oldest = FORMATS.0, newest = FORMATS.1)]
    Format {
        /// The format of the bytes.
        found: u8,
    },
    /// The ledger in the bytes has another head than it should.
    #[error("checkpoint covers slot {found}, expected slot {expected}")]
    Slot {
        /// The slot it was said to cover.
        expected: Slot,
        /// Head of the ledger in the bytes.
        found: Slot,
    },
}

impl Checkpoint {
    /// Returns the checkpoint of a ledger as it stands, or why it can't be read back: such bytes are never written.
    pub fn of(ledger: &Ledger) -> Result<Self, DecodeError> {
        let (format, bytes) = encode(ledger);
        match bytes.len() {
            found if found > CHECKPOINT_BYTES_MAX => Err(DecodeError::Length { found, most: CHECKPOINT_BYTES_MAX }),
            _ => Ok(Self { slot: ledger.head, format, bytes: bytes.into() }),
        }
    }

    /// Returns the checkpoint that bytes of a format are, whatever slot they cover, and the ledger in it.
    pub fn read(format: u8, bytes: Bytes) -> Result<(Self, Ledger), CheckpointError> {
        let ledger = decode(format, &bytes)?;
        Ok((Self { slot: ledger.head, format, bytes }, ledger))
    }

    /// Returns the ledger that it holds.
    pub fn ledger(&self) -> Result<Ledger, CheckpointError> {
        let ledger = decode(self.format, &self.bytes)?;
        match ledger.head == self.slot {
            true => Ok(ledger),
            false => Err(CheckpointError::Slot { expected: self.slot, found: ledger.head }),
        }
    }

    /// Returns the BLAKE3 of the bytes.
    pub fn hash(&self) -> Hash {
        Hash(*blake3::hash(&self.bytes).as_bytes())
    }

    /// Returns it in parts that fit into frames, in order.
    pub fn parts(&self) -> Vec<Part> {
        let (slot, format, hash) = (self.slot, self.format, self.hash());
        let parts = self.bytes.len().div_ceil(PART_BYTES) as u32;
        let cut = |index: u32| {
            let begin = index as usize * PART_BYTES;
            let bytes = self.bytes.slice(begin..(begin + PART_BYTES).min(self.bytes.len()));
            Part { slot, format, hash, index, parts, bytes }
        };
        (0..parts).map(cut).collect()
    }
}

/// Returns a ledger's bytes, and the format they have.
fn encode(ledger: &Ledger) -> (u8, Vec<u8>) {
    match &ledger.set_default {
        None => (3, codec::encode(ledger)),
        Some(service) => (4, codec::encode(&(ledger, service))),
    }
}

/// Returns the ledger of bytes of a format: the one list of formats and what reads them.
fn decode(format: u8, bytes: &[u8]) -> Result<Ledger, CheckpointError> {
    let ledger = match format {
        3 => codec::decode_within::<Ledger, CHECKPOINT_BYTES_MAX>(bytes)?,
        4 => {
            let (mut ledger, service) = codec::decode_within::<(Ledger, ServiceId), CHECKPOINT_BYTES_MAX>(bytes)?;
            ledger.set_default = Some(service);
            ledger
        }
        found => return Err(CheckpointError::Format { found }),
    };
    Ok(ledger.measured())
}

/// A piece of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The last slot the checkpoint covers.
    pub slot: Slot,
    /// BLAKE3 of the whole checkpoint.
    pub hash: Hash,
    /// Number of the part, from 0.
    pub index: u32,
    /// Number of parts of the whole checkpoint.
    pub parts: u32,
    /// Bytes of this part, at most [`PART_BYTES`].
    pub bytes: Bytes,
    /// Format of the checkpoint's bytes.
    pub format: u8,
}

impl Part {
    /// Returns what a node must know to read the checkpoint; none for what every build knows.
    pub fn needs(&self) -> Option<Feature> {
        (self.format > FORMATS.0).then_some(Feature::DefaultService)
    }
}

/// Parts sent to a peer at once: a few megabytes, which its queue has room for.
const PARTS_AT_ONCE: usize = 64;

/// Where the parts of checkpoints to one peer go on. A large one goes out over several askings.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outgoing {
    next: usize,
}

impl Outgoing {
    /// Returns the parts whose turn it is; after the last one, the first again.
    pub fn turn(&mut self, checkpoint: &Checkpoint) -> Vec<Part> {
        let mut parts = checkpoint.parts();
        let count = parts.len();
        parts.rotate_left(self.next % count.max(1));
        parts.truncate(PARTS_AT_ONCE);
        self.next = (self.next + parts.len()) % count.max(1);
        parts
    }
}

/// A checkpoint that is coming in.
#[derive(Debug, Clone, Default)]
pub struct Incoming {
    of: Option<(Slot, u8, Hash, u32)>,
    parts: Vec<Option<Bytes>>,
    missing: usize,
}

impl Incoming {
    /// Takes a part in; returns the checkpoint when it was the last one missing. Parts of another checkpoint than the
    /// one before begin anew; what doesn't hash to what it should is dropped.
    pub fn take(&mut self, part: Part) -> Option<Checkpoint> {
        let Part { slot, format, hash, index, parts, bytes } = part;
        let most = CHECKPOINT_BYTES_MAX / PART_BYTES;
        if parts as usize > most || index >= parts || bytes.len() > PART_BYTES {
            return None;
        }
        if self.of != Some((slot, format, hash, parts)) {
            let of = Some((slot, format, hash, parts));
            *self = Self { of, parts: vec![None; parts as usize], missing: parts as usize };
        }
        if self.parts[index as usize].replace(bytes).is_none() {
            self.missing -= 1;
        }
        if self.missing > 0 {
            return None;
        }
        let bytes: Vec<u8> = std::mem::take(self).parts.into_iter().flatten().flatten().collect();
        let checkpoint = Checkpoint { slot, format, bytes: bytes.into() };
        (checkpoint.hash() == hash).then_some(checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let bytes: Vec<u8> = (0..3 * PART_BYTES + 17).map(|i| (i % 251) as u8).collect();
        Checkpoint { slot: Slot(7), format: 3, bytes: bytes.into() }
    }

    #[test]
    fn parts_in_any_order_and_more_than_once_make_the_whole() {
        let whole = checkpoint();
        let parts = whole.parts();
        assert_eq!(parts.len(), 4);
        let mut incoming = Incoming::default();
        for index in [2, 0, 2, 3] {
            assert_eq!(incoming.take(parts[index].clone()), None);
        }
        assert_eq!(incoming.take(parts[1].clone()), Some(whole));
    }

    #[test]
    fn a_large_checkpoint_arrives_over_several_turns_though_parts_are_lost() {
        let whole = Checkpoint { slot: Slot(9), format: 3, bytes: vec![7; 150 * PART_BYTES + 1].into() };
        let (mut outgoing, mut incoming) = (Outgoing::default(), Incoming::default());
        let mut sent = 0;
        let arrived = (0..20).find_map(|_| {
            outgoing.turn(&whole).into_iter().find_map(|part| {
                sent += 1;
                // One in seven is lost.
                (sent % 7 != 0).then(|| incoming.take(part))?
            })
        });
        assert_eq!(arrived, Some(whole));
        assert!((151..=3 * 151).contains(&sent), "{sent} parts sent");
    }

    #[test]
    fn another_checkpoint_begins_anew_and_an_altered_one_is_dropped() {
        let whole = checkpoint();
        let mut parts = whole.parts();
        let mut incoming = Incoming::default();
        assert_eq!(incoming.take(parts[0].clone()), None);
        let other = Checkpoint { slot: Slot(8), format: 3, bytes: Bytes::from_static(b"x") };
        assert_eq!(incoming.take(other.parts().remove(0)), Some(other));
        parts[3].bytes = Bytes::from_static(b"something else");
        assert!(parts.into_iter().all(|part| incoming.take(part).is_none()));
    }

    #[test]
    fn a_part_that_promises_too_much_costs_nothing() {
        let mut part = checkpoint().parts().remove(0);
        part.parts = u32::MAX;
        let mut incoming = Incoming::default();
        assert_eq!(incoming.take(part), None);
        assert!(incoming.parts.is_empty());
    }
}
