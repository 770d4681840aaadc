//! A backup of a cluster, as one file: what it decided, and what one needs to know to start it again. No private key, no token
//! and no password is in it.
//!
//! ```text
//! magic "AVIARYBK" | version u16 | section … | end section
//! section: kind u8 | length u32 | BLAKE3 of the body, 32 bytes | body
//! ```
//! Numbers are big-endian. The sections come in the order of [`Kind`]; there may be several of the log. The end section holds the
//! BLAKE3 of every byte before it. A [`Writer`] makes the pieces of a file one after the other; [`read()`] verifies a file and sums it
//! up. Neither holds more than one section at a time.

mod read;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::domain::ids::{ClusterId, NodeId};
use crate::domain::time::Wall;
use crate::protocol::checkpoint::CHECKPOINT_BYTES_MAX;
use crate::protocol::codec::VALUE_BYTES_MAX;
use crate::protocol::feature::Feature;
use crate::protocol::record::Slot;

pub use read::{Backup, BackupError, read};
pub use write::Writer;

/// First bytes of every backup.
pub const MAGIC: [u8; 8] = *b"AVIARYBK";
/// The oldest and the newest version of the format that this program reads. In 1 the checkpoint is a ledger of format 3; 2 has the
/// format's number (u8) before the ledger's bytes, and may hold records that set the default service.
pub const VERSIONS: (u16, u16) = (1, 2);
/// Most records of one log section.
pub const RECORDS_MAX: usize = 256;

/// Bytes of a section before its body: kind, length, BLAKE3.
const SECTION_HEADER_BYTES: usize = 1 + 4 + 32;

/// Returns the oldest version of the format that can hold a log that used these features.
pub fn version_for(used: &[Feature]) -> u16 {
    if used.is_empty() { VERSIONS.0 } else { VERSIONS.1 }
}

/// What a section holds, in the order of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A [`Header`], as JSON.
    Header = 1,
    /// The node's configuration file, with secrets left out.
    Config = 2,
    /// The certificate of the cluster's authority, PEM; missing where the control plane is plaintext.
    Authority = 3,
    /// The newest checkpoint; missing while the log is kept from its beginning.
    Checkpoint = 4,
    /// Up to [`RECORDS_MAX`] records, each after its length (u32).
    Log = 5,
    /// The number of records (u64), and the BLAKE3 of every byte before this section.
    End = 6,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Header, Self::Config, Self::Authority, Self::Checkpoint, Self::Log, Self::End];

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Returns the most bytes of a body.
    const fn bytes_max(self) -> usize {
        match self {
            Self::Header => 64 * 1024,
            Self::Config | Self::Authority => 1024 * 1024,
            Self::Checkpoint => 1 + CHECKPOINT_BYTES_MAX,
            Self::Log => RECORDS_MAX * (4 + VALUE_BYTES_MAX),
            Self::End => 8 + 32,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Config => "config",
            Self::Authority => "authority",
            Self::Checkpoint => "checkpoint",
            Self::Log => "log",
            Self::End => "end",
        })
    }
}

/// What a backup says of itself. Keys that a reader doesn't know are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Id of the cluster.
    #[serde(with = "as_text")]
    pub cluster: ClusterId,
    /// Node that wrote the backup.
    pub node: NodeId,
    /// Version of the program that wrote it.
    pub build: String,
    /// Time of the backup, in milliseconds since 1970 (UTC), by the node's clock.
    pub at_ms: Wall,
    /// Last slot in it.
    pub slot: Slot,
    /// That slot's hash, as 64 hexadecimal digits.
    pub hash: String,
}

/// Reads and writes a cluster's id as people do.
mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::domain::ids::ClusterId;

    pub fn serialize<S: Serializer>(cluster: &ClusterId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(cluster)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ClusterId, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Returns bytes as hexadecimal digits.
fn hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}
