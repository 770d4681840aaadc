//! Reads a backup and verifies all of it: every section, the hash chain of the log, and what the log adds up to.

use std::io::{self, ErrorKind, Read};

use bytes::Bytes;

use super::{Header, Kind, MAGIC, RECORDS_MAX, SECTION_HEADER_BYTES, VERSIONS, hex};
use crate::protocol::checkpoint::{Checkpoint, FORMATS};
use crate::protocol::codec;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{Chosen, Hash, Slot};

/// What a verified backup holds, without the records.
#[derive(Debug, Clone)]
pub struct Backup {
    /// What it says of itself.
    pub header: Header,
    /// The node's configuration file, with secrets left out.
    pub config: String,
    /// Certificate of the cluster's authority; none where the control plane was plaintext.
    pub authority: Option<String>,
    /// Slot of the checkpoint in it; none when its log begins with genesis.
    pub checkpoint: Option<Slot>,
    /// The sum of the log.
    pub ledger: Ledger,
    /// Number of records in it.
    pub records: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// BLAKE3 of the file, as 64 hexadecimal digits.
    pub digest: String,
}

/// Why bytes are no backup that can be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// They can't be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something else altogether.
    #[error("it begins with \"{}\", expected \"{}\": it is no backup of Aviary", .0.escape_ascii(), MAGIC.escape_ascii())]
    Foreign(Vec<u8>),
    /// Another version of the format.
    #[error("its format is {found}, expected {oldest} or {newest}: use the version of aviary that wrote it",
        oldest = VERSIONS.0, newest = VERSIONS.1)]
    Version {
        /// The version of the file.
        found: u16,
    },
    /// The file ends too early.
    #[error("it ends after {at} bytes, expected {expected} there: the file is cut")]
    Cut {
        /// Bytes of the file.
        at: u64,
        /// What is missing.
        expected: &'static str,
    },
    /// Not the section that may come next.
    #[error("found section {found} at byte {at}, expected {expected}")]
    Section {
        /// Where it begins.
        at: u64,
        /// The section found.
        found: String,
        /// What may come there.
        expected: &'static str,
    },
    /// Longer than any section of its kind.
    #[error("section {kind} at byte {at} has {found} bytes, expected at most {}", .kind.bytes_max())]
    Length {
        /// The section's kind.
        kind: Kind,
        /// Where it begins.
        at: u64,
        /// Its length.
        found: usize,
    },
    /// Its bytes aren't those that were written.
    #[error("section {kind} at byte {at} has BLAKE3 {found}, expected {expected}: the file is damaged")]
    Damaged {
        /// The section's kind.
        kind: Kind,
        /// Where it begins.
        at: u64,
        /// BLAKE3 of its bytes.
        found: String,
        /// What the file says that it is.
        expected: String,
    },
    /// Whole, but not what a backup holds.
    #[error("section {kind}: {why}")]
    Content {
        /// The section's kind.
        kind: Kind,
        /// What is wrong, with what was found and expected.
        why: String,
    },
}

/// Reads a backup to its end and verifies it.
pub fn read(from: impl Read) -> Result<Backup, BackupError> {
    let mut source = Source { from, at: 0, read: blake3::Hasher::new() };
    let version = source.begin()?;
    let mut parts = Parts { version, ..Parts::default() };
    loop {
        let (begin, before) = (source.at, source.read.clone());
        let (kind, body) = source.section()?;
        parts.check_order(kind, begin)?;
        match kind {
            Kind::Header => parts.header = Some(json(kind, &body)?),
            Kind::Config => parts.config = Some(text(kind, body)?),
            Kind::Authority => parts.authority = Some(text(kind, body)?),
            Kind::Checkpoint => parts.take_checkpoint(body)?,
            Kind::Log => parts.take_log(&body)?,
            Kind::End => {
                parts.check_end(&body, before.finalize())?;
                source.check_at_end()?;
                return parts.finish(source.at, source.read.finalize());
            }
        }
        parts.last = Some(kind);
    }
}

/// The bytes of a file, counted and hashed as they are read.
struct Source<R> {
    from: R,
    at: u64,
    read: blake3::Hasher,
}

impl<R: Read> Source<R> {
    /// Returns the version of the format.
    fn begin(&mut self) -> Result<u16, BackupError> {
        let mut magic = Vec::new();
        (&mut self.from).take(MAGIC.len() as u64).read_to_end(&mut magic)?;
        self.note(&magic);
        match magic == MAGIC {
            true => {}
            false if MAGIC.starts_with(&magic) => return Err(self.cut("the magic of a backup")),
            false => return Err(BackupError::Foreign(magic)),
        }
        let mut version = [0; 2];
        self.fill(&mut version, "the version of the format")?;
        match u16::from_be_bytes(version) {
            version @ (1 | 2) => Ok(version),
            found => Err(BackupError::Version { found }),
        }
    }

    fn section(&mut self) -> Result<(Kind, Vec<u8>), BackupError> {
        let at = self.at;
        let mut head = [0; SECTION_HEADER_BYTES];
        self.fill(&mut head, "the next section")?;
        let unknown = || BackupError::Section { at, found: format!("kind {}", head[0]), expected: "kind 1 to 6" };
        let kind = Kind::of(head[0]).ok_or_else(unknown)?;
        let length = u32::from_be_bytes(head[1..5].try_into().expect("4 bytes")) as usize;
        if length > kind.bytes_max() {
            return Err(BackupError::Length { kind, at, found: length });
        }
        let mut body = Vec::new();
        let found = (&mut self.from).take(length as u64).read_to_end(&mut body)?;
        self.note(&body);
        if found < length {
            return Err(self.cut("the rest of a section"));
        }
        let (found, expected) = (blake3::hash(&body), head[5..].try_into().expect("32 bytes"));
        match *found.as_bytes() == expected {
            true => Ok((kind, body)),
            false => {
                Err(BackupError::Damaged { kind, at, found: found.to_hex().to_string(), expected: hex(&expected) })
            }
        }
    }

    fn check_at_end(&mut self) -> Result<(), BackupError> {
        match self.from.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(BackupError::Section { at: self.at, found: "more bytes".into(), expected: "the end of the file" }),
        }
    }

    fn fill(&mut self, bytes: &mut [u8], expected: &'static str) -> Result<(), BackupError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.from.read(&mut bytes[filled..]) {
                Ok(0) => {
                    self.at += filled as u64;
                    return Err(self.cut(expected));
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.note(bytes);
        Ok(())
    }

    fn note(&mut self, bytes: &[u8]) {
        self.at += bytes.len() as u64;
        self.read.update(bytes);
    }

    fn cut(&self, expected: &'static str) -> BackupError {
        BackupError::Cut { at: self.at, expected }
    }
}

/// What was read so far.
#[derive(Default)]
struct Parts {
    version: u16,
    last: Option<Kind>,
    header: Option<Header>,
    config: Option<String>,
    authority: Option<String>,
    checkpoint: Option<Slot>,
    /// The sum up to here: of the checkpoint, or of the log from genesis on.
    ledger: Option<Ledger>,
    /// Slot and hash of the last record read.
    previous: Option<(Slot, Hash)>,
    records: u64,
}

impl Parts {
    fn check_order(&self, kind: Kind, at: u64) -> Result<(), BackupError> {
        let expected = match self.last {
            None => "header",
            Some(Kind::Header) => "config",
            Some(Kind::Config) => "authority, checkpoint, log or end",
            Some(Kind::Authority) => "checkpoint, log or end",
            Some(Kind::Checkpoint | Kind::Log) => "log or end",
            Some(Kind::End) => "the end of the file",
        };
        let follows = match self.last {
            None => kind == Kind::Header,
            Some(Kind::Header) => kind == Kind::Config,
            Some(Kind::Log) => kind >= Kind::Log,
            Some(last) => kind > last,
        };
        match follows {
            true => Ok(()),
            false => Err(BackupError::Section { at, found: kind.to_string(), expected }),
        }
    }

    fn take_checkpoint(&mut self, body: Vec<u8>) -> Result<(), BackupError> {
        let wrong = |why: String| BackupError::Content { kind: Kind::Checkpoint, why };
        let (format, bytes) = match (self.version, body.split_first()) {
            (1, _) => (FORMATS.0, body.into()),
            (_, Some((format, _))) => (*format, Bytes::from(body).slice(1..)),
            (_, None) => return Err(wrong("it is empty, expected its format".into())),
        };
        let (_, ledger) = Checkpoint::read(format, bytes).map_err(|error| wrong(error.to_string()))?;
        self.checkpoint = Some(ledger.head);
        self.ledger = Some(ledger);
        Ok(())
    }

    fn take_log(&mut self, body: &[u8]) -> Result<(), BackupError> {
        let mut rest = body;
        let mut taken = 0;
        while !rest.is_empty() {
            taken += 1;
            let record = next_record(&mut rest).filter(|_| taken <= RECORDS_MAX);
            let record = record.ok_or_else(|| wrong_log("its records do not fill it".into()))?;
            let chosen: Chosen = codec::decode(record)
                .map_err(|error| wrong_log(format!("record {} of the file: {error}", self.records + 1)))?;
            if super::version_for(chosen.record.intent.operation.needs().as_slice()) > self.version {
                let (name, slot) = (chosen.record.intent.operation.name(), chosen.record.slot);
                return Err(wrong_log(format!("slot {slot} is {name}, expected none in format {}", self.version)));
            }
            self.take_record(&chosen)?;
        }
        Ok(())
    }

    fn take_record(&mut self, chosen: &Chosen) -> Result<(), BackupError> {
        let record = &chosen.record;
        if let Some((slot, hash)) = self.previous
            && (record.slot != slot.next() || record.prev_hash != hash)
        {
            let (next, found, follows) = (slot.next(), record.slot, record.prev_hash);
            return Err(wrong_log(format!("found slot {found} after {follows}, expected slot {next} after {hash}")));
        }
        let hash = record.hash();
        match &mut self.ledger {
            None => {
                let first = Ledger::new(chosen);
                let why = || format!("it begins with slot {}, expected genesis or a checkpoint before it", record.slot);
                self.ledger = Some(first.ok_or_else(|| wrong_log(why()))?);
            }
            Some(ledger) if record.slot == ledger.head && hash != ledger.head_hash => {
                let (slot, expected) = (record.slot, ledger.head_hash);
                return Err(wrong_log(format!("slot {slot} is {hash}, expected {expected} as in the checkpoint")));
            }
            Some(ledger) if record.slot <= ledger.head => {}
            Some(ledger) => ledger.apply(chosen).map_err(|error| wrong_log(error.to_string()))?,
        }
        self.previous = Some((record.slot, hash));
        self.records += 1;
        Ok(())
    }

    fn check_end(&self, body: &[u8], digest: blake3::Hash) -> Result<(), BackupError> {
        let expected = [self.records.to_be_bytes().as_slice(), digest.as_bytes()].concat();
        let why = || format!("it is not of the {} records and the bytes before it", self.records);
        match body == expected {
            true => Ok(()),
            false => Err(BackupError::Content { kind: Kind::End, why: why() }),
        }
    }

    fn finish(self, bytes: u64, digest: blake3::Hash) -> Result<Backup, BackupError> {
        let wrong = |kind, why: &str| BackupError::Content { kind, why: why.into() };
        let header = self.header.ok_or_else(|| wrong(Kind::Header, "it is missing"))?;
        let config = self.config.ok_or_else(|| wrong(Kind::Config, "it is missing"))?;
        let ledger = self.ledger.ok_or_else(|| wrong(Kind::Log, "found no record and no checkpoint"))?;
        let found = (ledger.cluster, ledger.head, Header::hash_of(&ledger.head_hash));
        let expected = (header.cluster, header.slot, header.hash.clone());
        if found != expected {
            let said = |(cluster, slot, hash): &(_, Slot, String)| format!("cluster {cluster} at slot {slot} ({hash})");
            let why = format!("found {}, expected {} as the header says", said(&found), said(&expected));
            return Err(BackupError::Content { kind: Kind::Log, why });
        }
        Ok(Backup {
            header,
            config,
            authority: self.authority,
            checkpoint: self.checkpoint,
            ledger,
            records: self.records,
            bytes,
            digest: digest.to_hex().to_string(),
        })
    }
}

fn wrong_log(why: String) -> BackupError {
    BackupError::Content { kind: Kind::Log, why }
}

/// Returns the next record of a log section's body; none where it is cut.
fn next_record<'b>(rest: &mut &'b [u8]) -> Option<&'b [u8]> {
    let (length, behind) = rest.split_first_chunk::<4>()?;
    let (record, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    *rest = behind;
    Some(record)
}

fn json(kind: Kind, body: &[u8]) -> Result<Header, BackupError> {
    serde_json::from_slice(body).map_err(|error| BackupError::Content { kind, why: error.to_string() })
}

fn text(kind: Kind, body: Vec<u8>) -> Result<String, BackupError> {
    String::from_utf8(body).map_err(|error| BackupError::Content { kind, why: error.to_string() })
}
