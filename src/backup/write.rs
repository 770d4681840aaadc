//! The pieces of a backup, in the order in which they are written.

use super::{Header, Kind, MAGIC, RECORDS_MAX, VERSIONS, hex};
use crate::protocol::checkpoint::{Checkpoint, FORMATS};
use crate::protocol::codec;
use crate::protocol::record::{Chosen, Hash};

/// Makes the pieces of one backup. The caller writes each of them before it asks for the next one.
#[derive(Debug)]
pub struct Writer {
    version: u16,
    written: blake3::Hasher,
    records: u64,
}

impl Header {
    /// Returns a hash as the header names it.
    pub fn hash_of(hash: &Hash) -> String {
        hex(&hash.0)
    }
}

impl Writer {
    /// Returns a writer of a version of the format: see [`super::version_for`].
    pub fn new(version: u16) -> Self {
        assert!((VERSIONS.0..=VERSIONS.1).contains(&version), "a version that can be read back");
        Self { version, written: blake3::Hasher::new(), records: 0 }
    }

    /// Returns the beginning of a backup: magic, version and header.
    pub fn begin(&mut self, header: &Header) -> Vec<u8> {
        let json = serde_json::to_vec(header).expect("a header of text and numbers is JSON");
        let mut piece = MAGIC.to_vec();
        piece.extend(self.version.to_be_bytes());
        self.written.update(&piece);
        piece.extend(self.section(Kind::Header, &json));
        piece
    }

    /// Returns the section of the node's configuration file, from which the caller removed all secrets.
    pub fn config(&mut self, text: &str) -> Vec<u8> {
        self.section(Kind::Config, text.as_bytes())
    }

    /// Returns the section of the authority's certificate.
    pub fn authority(&mut self, pem: &str) -> Vec<u8> {
        self.section(Kind::Authority, pem.as_bytes())
    }

    /// Returns the section of the checkpoint. Panics for one that a backup of this version can't hold.
    pub fn checkpoint(&mut self, checkpoint: &Checkpoint) -> Vec<u8> {
        if self.version >= 2 {
            return self.section(Kind::Checkpoint, &[&[checkpoint.format], &checkpoint.bytes[..]].concat());
        }
        assert_eq!(checkpoint.format, FORMATS.0, "a checkpoint of version 1");
        self.section(Kind::Checkpoint, &checkpoint.bytes)
    }

    /// Returns a section of the log. Panics for more than [`RECORDS_MAX`] records.
    pub fn log(&mut self, records: &[Chosen]) -> Vec<u8> {
        assert!(records.len() <= RECORDS_MAX, "a log section holds a bounded number of records");
        self.records += records.len() as u64;
        let mut body = Vec::new();
        for chosen in records {
            let record = codec::encode(chosen);
            body.extend((record.len() as u32).to_be_bytes());
            body.extend(record);
        }
        self.section(Kind::Log, &body)
    }

    /// Returns the end of the backup.
    pub fn end(mut self) -> Vec<u8> {
        let digest = self.written.finalize();
        let body = [self.records.to_be_bytes().as_slice(), digest.as_bytes()].concat();
        self.section(Kind::End, &body)
    }

    fn section(&mut self, kind: Kind, body: &[u8]) -> Vec<u8> {
        assert!(body.len() <= kind.bytes_max(), "a {kind} section of {} bytes can be read back", body.len());
        let mut piece = vec![kind as u8];
        piece.extend((body.len() as u32).to_be_bytes());
        piece.extend(blake3::hash(body).as_bytes());
        piece.extend(body);
        self.written.update(&piece);
        piece
    }
}
