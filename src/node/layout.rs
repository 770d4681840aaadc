//! The layouts of messages: the one list of protocol versions, each with what writes and what reads it. A version that is no longer
//! spoken loses its entry and its types here; nothing else knows that there was another one.

use serde::{Deserialize, Serialize};

use super::frame::{Envelope, FrameError, Identity, Versions};
use crate::protocol::checkpoint::{FORMATS, Part};
use crate::protocol::codec::{self, DecodeError};
use crate::protocol::feature::PROTOCOL;
use crate::protocol::message::{
    Acknowledgement, Decision, HealthSnapshot, Heartbeat, Membership, Message, Prepare, Vote,
};
use crate::protocol::record::{Ballot, Chosen, Hash, Record, SeenDisk, Slot};

/// How a protocol version lays out its messages.
struct Layout {
    version: u16,
    write: fn(&Identity, &Message) -> Vec<u8>,
    read: fn(&[u8]) -> Result<Envelope<Message>, DecodeError>,
}

/// The version before, and the one of this build.
const LAYOUTS: [Layout; 2] = [
    Layout {
        version: 8,
        write: |sender, message| body(sender, MessageV8::of(message)),
        read: |body| Ok(codec::decode::<Envelope<MessageV8>>(body)?.map(MessageV8::told)),
    },
    Layout { version: PROTOCOL, write: with_classes, read: read_with_classes },
];

/// A message, and behind a snapshot what it tells of classes of statuses, if that is anything.
fn with_classes(sender: &Identity, message: &Message) -> Vec<u8> {
    let mut bytes = body(sender, message);
    if let Message::HealthSnapshot(snapshot) = message
        && let Some(classes) = snapshot.classes()
    {
        bytes.extend(codec::encode(&classes));
    }
    bytes
}

fn read_with_classes(bytes: &[u8]) -> Result<Envelope<Message>, DecodeError> {
    let (envelope, rest) = codec::decode_first::<Envelope<Message>>(bytes)?;
    if rest.is_empty() {
        return Ok(envelope);
    }
    let trailing = || DecodeError::Trailing { used: bytes.len() - rest.len(), total: bytes.len() };
    let Envelope { cluster, from, incarnation, payload } = envelope;
    let Message::HealthSnapshot(snapshot) = payload else { return Err(trailing()) };
    let snapshot = snapshot.with_classes(codec::decode(rest)?).ok_or_else(trailing)?;
    Ok(Envelope { cluster, from, incarnation, payload: Message::HealthSnapshot(snapshot) })
}

/// The protocol versions that this program speaks.
pub(super) const VERSIONS: Versions = Versions { min: LAYOUTS[0].version, max: LAYOUTS[1].version };

/// Returns the layout of a version: the newest that isn't later, so that a simulated later version has one.
fn layout(version: u16) -> &'static Layout {
    LAYOUTS.iter().rev().find(|layout| layout.version <= version).unwrap_or(&LAYOUTS[0])
}

/// Returns a message's body in a version; an error if the version can't say it. Such a message is not sent.
pub(super) fn write(sender: &Identity, version: u16, message: &Message) -> Result<Vec<u8>, FrameError> {
    check(version, message)?;
    Ok((layout(version).write)(sender, message))
}

/// Returns what a body of a version says.
pub(super) fn read(version: u16, body: &[u8]) -> Result<Envelope<Message>, FrameError> {
    let envelope = (layout(version).read)(body).map_err(|why| FrameError::Malformed(why.to_string()))?;
    check(version, &envelope.payload)?;
    Ok(envelope)
}

fn check(version: u16, message: &Message) -> Result<(), FrameError> {
    match message.needs().filter(|feature| feature.protocol() > version) {
        Some(feature) => Err(FrameError::Lacks { version, feature }),
        None => Ok(()),
    }
}

fn body<T: Serialize>(sender: &Identity, payload: T) -> Vec<u8> {
    let Identity { cluster, node, incarnation } = sender.clone();
    codec::encode(&Envelope::<T> { cluster, from: node, incarnation, payload })
}

/// A message of version 8: its heartbeats don't tell what their sender speaks, and its checkpoints have format 3.
#[derive(Serialize, Deserialize)]
enum MessageV8 {
    Prepare(Prepare),
    Vote(Vote),
    Decision(DecisionV8),
    Heartbeat(HeartbeatV8),
    HealthSnapshot(HealthSnapshot),
}

#[derive(Serialize, Deserialize)]
enum DecisionV8 {
    Propose(Ballot, Box<Record>),
    Chosen(Box<Chosen>),
    CatchUp(Box<Chosen>),
    Checkpoint(PartV8),
}

#[derive(Serialize, Deserialize)]
struct PartV8 {
    slot: Slot,
    hash: Hash,
    index: u32,
    parts: u32,
    bytes: bytes::Bytes,
}

#[derive(Serialize, Deserialize)]
struct HeartbeatV8 {
    nonce: Option<u64>,
    acknowledges: Option<Acknowledgement>,
    head: Slot,
    head_hash: Hash,
    in_doubt: Option<Slot>,
    open: Option<Ballot>,
    membership: Membership,
    writes: u64,
    seen: Option<SeenDisk>,
}

impl MessageV8 {
    fn of(message: &Message) -> Self {
        match message.clone() {
            Message::Prepare(prepare) => Self::Prepare(prepare),
            Message::Vote(vote) => Self::Vote(vote),
            Message::HealthSnapshot(snapshot) => Self::HealthSnapshot(snapshot),
            Message::Decision(decision) => Self::Decision(match decision {
                Decision::Propose(ballot, record) => DecisionV8::Propose(ballot, record),
                Decision::Chosen(chosen) => DecisionV8::Chosen(chosen),
                Decision::CatchUp(chosen) => DecisionV8::CatchUp(chosen),
                Decision::Checkpoint(Part { slot, hash, index, parts, bytes, format: _ }) => {
                    DecisionV8::Checkpoint(PartV8 { slot, hash, index, parts, bytes })
                }
            }),
            Message::Heartbeat(heartbeat) => {
                let Heartbeat {
                    nonce,
                    acknowledges,
                    head,
                    head_hash,
                    in_doubt,
                    open,
                    membership,
                    writes,
                    seen,
                    speaks: _,
                } = heartbeat;
                Self::Heartbeat(HeartbeatV8 {
                    nonce,
                    acknowledges,
                    head,
                    head_hash,
                    in_doubt,
                    open,
                    membership,
                    writes,
                    seen,
                })
            }
        }
    }

    fn told(self) -> Message {
        match self {
            Self::Prepare(prepare) => Message::Prepare(prepare),
            Self::Vote(vote) => Message::Vote(vote),
            Self::HealthSnapshot(snapshot) => Message::HealthSnapshot(snapshot),
            Self::Decision(decision) => Message::Decision(match decision {
                DecisionV8::Propose(ballot, record) => Decision::Propose(ballot, record),
                DecisionV8::Chosen(chosen) => Decision::Chosen(chosen),
                DecisionV8::CatchUp(chosen) => Decision::CatchUp(chosen),
                DecisionV8::Checkpoint(PartV8 { slot, hash, index, parts, bytes }) => {
                    Decision::Checkpoint(Part { slot, hash, index, parts, bytes, format: FORMATS.0 })
                }
            }),
            Self::Heartbeat(heartbeat) => {
                let HeartbeatV8 { nonce, acknowledges, head, head_hash, in_doubt, open, membership, writes, seen } =
                    heartbeat;
                Message::Heartbeat(Heartbeat {
                    nonce,
                    acknowledges,
                    head,
                    head_hash,
                    in_doubt,
                    open,
                    membership,
                    writes,
                    seen,
                    speaks: 8,
                })
            }
        }
    }
}
