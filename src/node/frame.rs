//! What crosses a control connection: one message, its sender, and enough around it to refuse everything else.
//!
//! ```text
//! magic "AVRY" | version u16 | kind u8 | body length u32 | CRC-32C u32 | body
//! ```
//! Numbers are big-endian. The checksum covers version, kind, length and body. The body is an [`Envelope`] in
//! [`crate::protocol::codec`]'s one encoding. HELLO comes first on every connection, always in version
//! [`HELLO_VERSION`], and settles the version of all that follows.
//!
//! What leaves [`FrameCodec`] keeps the rules that the core builds on (see `checked`): a peer's bytes can be refused
//! here, but they can't make anything behind it overflow or panic. Who may say what is [`super::link`]'s to know.

use std::collections::BTreeMap;
use std::fmt;

use bytes::{BufMut, BytesMut};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use super::layout;
use crate::domain::ids::{ClusterId, Incarnation, NodeId};
use crate::domain::rollout::Change;
use crate::domain::run::WindowVerdict;
use crate::domain::weights::Weight;
use crate::domain::window::Evidence;
use crate::protocol::checkpoint::PART_BYTES;
use crate::protocol::codec;
use crate::protocol::feature::Feature;
use crate::protocol::message::{Answer, Decision, HealthSnapshot, Message, Refusal, Vote};
use crate::protocol::record::{Accepted, Ballot, Chosen, Intent, Operation, Record, RunTransfer};

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"AVRY";
/// Size of a frame's header, in bytes.
pub const HEADER_BYTES: usize = 15;
/// The version that HELLO is written in: its layout never changes, so that any two nodes can tell what they differ in. What
/// a later version tells beyond it is one more of its facts.
pub const HELLO_VERSION: u16 = 2;
/// The protocol versions that this program speaks: the newest, and the one before it.
pub const VERSIONS: Versions = layout::VERSIONS;
/// Most bytes of a body before the peer is known.
pub const HELLO_BYTES_MAX: usize = 4 * 1024;
/// Most facts in a HELLO.
pub const FACTS_MAX: usize = 32;
/// Most bytes of a fact's name, and of its value.
pub const FACT_BYTES_MAX: usize = 256;
/// Most bytes of a body after HELLO.
pub const BODY_BYTES_MAX: usize = codec::VALUE_BYTES_MAX;

/// Counters and positions in messages stay below this, so that adding to them can't overflow.
const NUMBER_MAX: u64 = 1 << 62;
/// The last millisecond of the year 9999: later timestamps can't be printed.
const WALL_MS_MAX: u64 = 253_402_300_799_999;
/// Sums of latencies stay below this: 285 years, exact as a float.
const LATENCY_SUM_US_MAX: u64 = 1 << 53;

/// Identity that a node claims in its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Cluster that the node belongs to.
    pub cluster: ClusterId,
    /// Name of that node in the cluster.
    pub node: NodeId,
    /// Incarnation of its data directory.
    pub incarnation: Incarnation,
}

/// Body of a frame: a payload and its sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// Cluster that the sender belongs to.
    pub cluster: ClusterId,
    /// Name of the sending node.
    pub from: NodeId,
    /// Incarnation of the sender's data directory.
    pub incarnation: Incarnation,
    /// The message, as its kind defines it.
    pub payload: T,
}

impl<T> Envelope<T> {
    /// Returns the identity that the sender claims.
    pub fn sender(&self) -> Identity {
        Identity { cluster: self.cluster, node: self.from.clone(), incarnation: self.incarnation }
    }

    pub(super) fn map<U>(self, payload: impl FnOnce(T) -> U) -> Envelope<U> {
        let Self { cluster, from, incarnation, payload: inner } = self;
        Envelope { cluster, from, incarnation, payload: payload(inner) }
    }
}

/// First message on a connection, sent by both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol versions that the sender speaks.
    pub versions: Versions,
    /// Name of the node that the sender wants to reach, so that two swapped addresses are noticed at once.
    pub to: NodeId,
    /// What the sender says about itself, by name, such as its build. Nothing is decided by it, and names that the receiver
    /// doesn't know are no error.
    pub facts: BTreeMap<String, String>,
}

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Versions {
    /// Oldest version of the range, itself included.
    pub min: u16,
    /// Newest version of the range, itself included.
    pub max: u16,
}

impl Versions {
    /// Returns the range of one version.
    pub const fn only(version: u16) -> Self {
        Self { min: version, max: version }
    }

    /// Returns the newest version that both speak, or an error that names both ranges.
    pub fn common(self, theirs: Self) -> Result<u16, FrameError> {
        let newest = self.max.min(theirs.max);
        match newest >= self.min.max(theirs.min) {
            true => Ok(newest),
            false => Err(FrameError::Version { expected: self, found: theirs }),
        }
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.min),
            false => write!(f, "{} to {}", self.min, self.max),
        }
    }
}

/// Everything that a frame may carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// First message of a connection: the sender's identity and versions.
    Hello(Hello),
    /// One of the five messages.
    Message(Box<Message>),
}

/// Which payload a frame carries; the number stands in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Hello = 0,
    Prepare = 1,
    Vote = 2,
    Decision = 3,
    Heartbeat = 4,
    HealthSnapshot = 5,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Hello, Self::Prepare, Self::Vote, Self::Decision, Self::Heartbeat, Self::HealthSnapshot];

    fn of(message: &Message) -> Self {
        match message {
            Message::Prepare(_) => Self::Prepare,
            Message::Vote(_) => Self::Vote,
            Message::Decision(_) => Self::Decision,
            Message::Heartbeat(_) => Self::Heartbeat,
            Message::HealthSnapshot(_) => Self::HealthSnapshot,
        }
    }
}

/// Why bytes are no frame of ours, or a frame is refused; one variant for each class that is counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not this protocol at all.
    #[error("frame starts with {}, expected \"AVRY\"", .found.escape_ascii())]
    Magic {
        /// The first bytes, four at most.
        found: Vec<u8>,
    },
    /// The frame has another protocol version than the connection.
    #[error("protocol version {found}, expected {expected}")]
    Version {
        /// Versions that this node speaks.
        expected: Versions,
        /// Versions that the peer speaks.
        found: Versions,
    },
    /// A kind that doesn't exist, or not at this point.
    #[error("frame kind {found}, expected {expected}")]
    Kind {
        /// Kinds that are allowed at this point.
        expected: &'static str,
        /// Kind in the frame's header.
        found: u8,
    },
    /// More bytes than allowed; refused before they are read.
    #[error("frame body of {found} bytes, expected at most {max}")]
    TooLong {
        /// The most allowed at this point.
        max: usize,
        /// Length in the frame's header, in bytes.
        found: usize,
    },
    /// The checksum does not match: the frame was damaged.
    #[error("frame checksum {found:08x}, expected {expected:08x}")]
    Checksum {
        /// The sum of what arrived.
        expected: u32,
        /// Checksum in the frame's header.
        found: u32,
    },
    /// Intact, and still not a message that a node of ours sends.
    #[error("malformed body: {0}")]
    Malformed(String),
    /// A message that a protocol version can't say.
    #[error("protocol version {version} has no {feature}, expected {} or newer", .feature.protocol())]
    Lacks {
        /// The connection's version.
        version: u16,
        /// What the message needs.
        feature: Feature,
    },
    /// The sender belongs to another cluster.
    #[error("cluster {found}, expected {expected}")]
    Cluster {
        /// Cluster that this node belongs to.
        expected: ClusterId,
        /// Cluster that the peer claims.
        found: ClusterId,
    },
    /// From or for another node than it should be.
    #[error("{what} {found}, expected {expected}")]
    Sender {
        /// Field that is wrong: `sender`, `incarnation` or `hello to`.
        what: &'static str,
        /// Node or incarnation that was expected.
        expected: String,
        /// Node that sent the frame.
        found: String,
    },
}

fn malformed(what: impl fmt::Display) -> FrameError {
    FrameError::Malformed(what.to_string())
}

/// Appends the HELLO frame to `bytes`.
pub fn encode_hello(sender: &Identity, hello: &Hello, bytes: &mut BytesMut) {
    let Identity { cluster, node, incarnation } = sender.clone();
    let body = codec::encode(&Envelope { cluster, from: node, incarnation, payload: hello });
    encode(HELLO_VERSION, Kind::Hello, &body, HELLO_BYTES_MAX, bytes).expect("a HELLO is far below its limit");
}

/// Appends the message's frame to `bytes`, as the connection's version lays it out. A message that no peer would take, or that the
/// version can't say, is an error and appends nothing.
pub fn encode_message(
    sender: &Identity,
    version: u16,
    message: &Message,
    bytes: &mut BytesMut,
) -> Result<(), FrameError> {
    let body = layout::write(sender, version, message)?;
    encode(version, Kind::of(message), &body, BODY_BYTES_MAX, bytes)
}

/// The header is written by hand: the length codec can place a length only at the front.
fn encode(version: u16, kind: Kind, body: &[u8], max: usize, bytes: &mut BytesMut) -> Result<(), FrameError> {
    if body.len() > max {
        return Err(FrameError::TooLong { max, found: body.len() });
    }
    bytes.reserve(HEADER_BYTES + body.len());
    let start = bytes.len();
    bytes.put_slice(&MAGIC);
    bytes.put_u16(version);
    bytes.put_u8(kind as u8);
    bytes.put_u32(u32::try_from(body.len()).expect("bodies are limited to 64 KiB"));
    let sum = checksum(&bytes[start + 4..], body);
    bytes.put_u32(sum);
    bytes.put_slice(body);
    Ok(())
}

fn checksum(version_kind_length: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(version_kind_length), body)
}

/// Cuts a connection's bytes into frames and refuses what is none, as early as the bytes show it.
///
/// It expects one HELLO, and after [`FrameCodec::greeted`] messages of the settled version.
#[derive(Debug)]
pub struct FrameCodec {
    cutter: LengthDelimitedCodec,
    version: u16,
    greeted: bool,
    /// True when the header at the front of the buffer has been checked and its body is awaited.
    in_body: bool,
}

impl Default for FrameCodec {
    fn default() -> Self {
        let cutter = LengthDelimitedCodec::builder()
            .length_field_offset(7)
            .length_field_length(4)
            .length_adjustment(HEADER_BYTES as isize)
            .num_skip(0)
            .max_frame_length(HELLO_BYTES_MAX)
            .new_codec();
        Self { cutter, version: HELLO_VERSION, greeted: false, in_body: false }
    }
}

impl FrameCodec {
    /// From here on the peer is known: messages of `version` are expected, at their size.
    pub fn greeted(&mut self, version: u16) {
        self.version = version;
        self.greeted = true;
        self.cutter.set_max_frame_length(BODY_BYTES_MAX);
    }

    /// Takes the next frame off the front of `bytes`; none when more bytes are needed.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Envelope<Payload>>, FrameError> {
        if !self.in_body {
            self.in_body = self.check_header(bytes)?;
            if !self.in_body {
                return Ok(None);
            }
        }
        let Some(frame) = self.cutter.decode(bytes).map_err(malformed)? else { return Ok(None) };
        self.in_body = false;
        open(&frame, self.version).map(Some)
    }

    /// Returns true when the whole header is there; an error as soon as a part of it is wrong.
    fn check_header(&self, bytes: &[u8]) -> Result<bool, FrameError> {
        let start = &bytes[..bytes.len().min(MAGIC.len())];
        if !MAGIC.starts_with(start) {
            return Err(FrameError::Magic { found: start.to_vec() });
        }
        if bytes.len() < HEADER_BYTES {
            return Ok(false);
        }
        let version = u16::from_be_bytes([bytes[4], bytes[5]]);
        if version != self.version {
            return Err(FrameError::Version { expected: Versions::only(self.version), found: Versions::only(version) });
        }
        let (expected, allowed) = match self.greeted {
            false => ("0 (HELLO)", 0..=0),
            true => ("1 to 5 (PREPARE, VOTE, DECISION, HEARTBEAT, HEALTH_SNAPSHOT)", 1..=5),
        };
        if !allowed.contains(&bytes[6]) {
            return Err(FrameError::Kind { expected, found: bytes[6] });
        }
        let (max, found) = (self.cutter.max_frame_length(), length(bytes));
        match found <= max {
            true => Ok(true),
            false => Err(FrameError::TooLong { max, found }),
        }
    }
}

fn length(header: &[u8]) -> usize {
    u32::from_be_bytes([header[7], header[8], header[9], header[10]]) as usize
}

/// Returns what a whole frame with a checked header says.
fn open(frame: &[u8], version: u16) -> Result<Envelope<Payload>, FrameError> {
    let (header, body) = frame.split_at(HEADER_BYTES);
    let found = u32::from_be_bytes([header[11], header[12], header[13], header[14]]);
    let expected = checksum(&header[4..11], body);
    if found != expected {
        return Err(FrameError::Checksum { expected, found });
    }
    let kind = Kind::ALL[usize::from(header[6])];
    if kind == Kind::Hello {
        let envelope: Envelope<Hello> = codec::decode(body).map_err(malformed)?;
        let Versions { min, max } = envelope.payload.versions;
        if min > max {
            return Err(malformed(format_args!("versions {min} to {max}, expected the oldest first")));
        }
        check_facts(&envelope.payload.facts)?;
        return Ok(envelope.map(Payload::Hello));
    }
    let envelope = layout::read(version, body)?;
    if Kind::of(&envelope.payload) != kind {
        let name = envelope.payload.name();
        return Err(malformed(format_args!("{name} in a frame of kind {}, expected the kind to match", kind as u8)));
    }
    check(&envelope.payload)?;
    Ok(envelope.map(|message| Payload::Message(Box::new(message))))
}

fn check_facts(facts: &BTreeMap<String, String>) -> Result<(), FrameError> {
    at_most("number of facts", facts.len() as u64, FACTS_MAX as u64)?;
    let lengths = facts.iter().flat_map(|(name, value)| [name.len(), value.len()]);
    at_most("length of a fact", lengths.max().unwrap_or(0) as u64, FACT_BYTES_MAX as u64)
}

/// Checks what the types can't say: a peer's values keep the rules that ours keep by construction.
fn check(message: &Message) -> Result<(), FrameError> {
    match message {
        Message::Prepare(prepare) => {
            check_ballot(&prepare.ballot)?;
            check_intent(&prepare.intent)
        }
        Message::Vote(vote) => check_vote(vote),
        Message::Decision(Decision::Propose(ballot, record)) => {
            check_ballot(ballot)?;
            check_record(record)
        }
        Message::Decision(Decision::Chosen(chosen) | Decision::CatchUp(chosen)) => check_chosen(chosen),
        Message::Decision(Decision::Checkpoint(part)) => {
            at_most("checkpoint's part", part.bytes.len() as u64, PART_BYTES as u64)
        }
        Message::Heartbeat(heartbeat) => heartbeat.open.as_ref().map_or(Ok(()), check_ballot),
        Message::HealthSnapshot(snapshot) => check_snapshot(snapshot),
    }
}

fn at_most(what: &str, found: u64, max: u64) -> Result<(), FrameError> {
    match found <= max {
        true => Ok(()),
        false => Err(malformed(format_args!("{what} is {found}, expected at most {max}"))),
    }
}

fn check_ballot(ballot: &Ballot) -> Result<(), FrameError> {
    at_most("ballot's round", ballot.round, NUMBER_MAX)
}

fn check_vote(vote: &Vote) -> Result<(), FrameError> {
    check_ballot(&vote.ballot)?;
    match &vote.answer {
        Answer::Gate { accepted: Some(accepted), .. } => {
            let Accepted { ballot, record } = accepted.as_ref();
            check_ballot(ballot)?;
            check_record(record)
        }
        Answer::Refuse(Refusal::Stale(ballot)) => check_ballot(ballot),
        Answer::Gate { accepted: None, .. } | Answer::Accept | Answer::Refuse(_) => Ok(()),
    }
}

fn check_chosen(chosen: &Chosen) -> Result<(), FrameError> {
    chosen.ballot.as_ref().map_or(Ok(()), check_ballot)?;
    at_most("time of decision", chosen.decided_at.0, WALL_MS_MAX)?;
    check_record(&chosen.record)
}

fn check_record(record: &Record) -> Result<(), FrameError> {
    if let Some(state) = &record.state {
        at_most("routing version", state.version, NUMBER_MAX)?;
        at_most("timestamp", state.timestamp.0, WALL_MS_MAX)?;
    }
    if let Some(certificate) = &record.certificate {
        check_ballot(&certificate.ballot)?;
    }
    check_intent(&record.intent)
}

fn check_intent(intent: &Intent) -> Result<(), FrameError> {
    at_most("timestamp", intent.at.0, WALL_MS_MAX)?;
    match &intent.operation {
        Operation::Change(service, Change::Start(spec)) if *service != spec.service => {
            Err(malformed(format_args!("rollout of {}, expected {service}", spec.service)))
        }
        Operation::Verdicts(verdicts) => verdicts.iter().try_for_each(|verdict| {
            at_most("routing version", verdict.rollout_generation, NUMBER_MAX)?;
            at_most("routing version", verdict.routing.version, NUMBER_MAX)?;
            at_most("timestamp", verdict.routing.timestamp.0, WALL_MS_MAX)?;
            check_window_verdict(&verdict.window_verdict)
        }),
        Operation::Change(..)
        | Operation::SetDefault(_)
        | Operation::Revert { .. }
        | Operation::Genesis { .. }
        | Operation::Refused { .. }
        | Operation::Config(_) => Ok(()),
    }
}

fn check_window_verdict(window_verdict: &WindowVerdict) -> Result<(), FrameError> {
    at_most("end of a window", window_verdict.to_ms, WALL_MS_MAX)?;
    match window_verdict.is_finite() {
        true => Ok(()),
        false => Err(malformed("a window verdict with a figure that is no number")),
    }
}

/// Tick samples in a snapshot.
const TICK_SAMPLES_MAX: u64 = 64;

fn check_snapshot(snapshot: &HealthSnapshot) -> Result<(), FrameError> {
    at_most("effective weight in basis points", snapshot.effective_bp.into(), Weight::WHOLE.into())?;
    at_most("routing version", snapshot.routing_version, NUMBER_MAX)?;
    at_most("routing version", snapshot.rollout_generation, NUMBER_MAX)?;
    at_most("tick samples", snapshot.tick_samples.len() as u64, TICK_SAMPLES_MAX)?;
    check_evidence(&snapshot.evidence)?;
    for (tick, tick_sample) in &snapshot.tick_samples {
        at_most("tick", *tick, NUMBER_MAX)?;
        at_most("routing version", tick_sample.version, NUMBER_MAX)?;
        check_evidence(&tick_sample.evidence)?;
    }
    snapshot.transfer.as_deref().map_or(Ok(()), check_transfer)
}

fn check_transfer(transfer: &RunTransfer) -> Result<(), FrameError> {
    at_most("milliseconds since the rollout began", transfer.at_ms, WALL_MS_MAX)?;
    if !transfer.is_sound() {
        return Err(malformed("the analysis run contradicts itself, expected its parts to agree"));
    }
    transfer.closed.iter().try_for_each(check_window_verdict)
}

/// Sums of latencies may be added to for long; all else is checked where statistics are decoded.
fn check_evidence(Evidence { stable, canary }: &Evidence) -> Result<(), FrameError> {
    [stable, canary]
        .into_iter()
        .try_for_each(|stats| at_most("sum of latencies in microseconds", stats.latency_sum_us, LATENCY_SUM_US_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::analysis::Analysis;
    use crate::domain::run::AnalysisRun;
    use crate::domain::sequential::Policy;
    use crate::domain::stats::{BINS, Stats};
    use crate::domain::ticks::TickSample;
    use proptest::prelude::*;

    use crate::protocol::message::{GateVote, Heartbeat, Membership};
    use crate::protocol::record::{Hash, Slot};

    fn node(text: &str) -> NodeId {
        NodeId::new(text).unwrap()
    }

    fn me() -> Identity {
        Identity { cluster: ClusterId([7; 16]), node: node("a"), incarnation: Incarnation(9) }
    }

    fn framed(message: &Message) -> BytesMut {
        let mut bytes = BytesMut::new();
        encode_message(&me(), VERSIONS.max, message, &mut bytes).unwrap();
        bytes
    }

    fn greeted() -> FrameCodec {
        let mut codec = FrameCodec::default();
        codec.greeted(VERSIONS.max);
        codec
    }

    fn snapshot(evidence: Evidence) -> Message {
        Message::HealthSnapshot(HealthSnapshot {
            rollout_generation: 3,
            tick_samples: vec![(17, TickSample { version: 4, evidence: evidence.clone() })],
            asks: None,
            transfer: None,
            service: "s".parse().unwrap(),
            routing_version: 1,
            evidence,
            local_hold: None,
            lease_ms_left: 0,
            effective_bp: 500,
        })
    }

    fn heartbeat(head: u64) -> Message {
        Message::Heartbeat(Heartbeat {
            nonce: Some(1),
            acknowledges: None,
            head: Slot(head),
            head_hash: Hash([3; 32]),
            in_doubt: None,
            open: None,
            membership: Membership::Voter,
            writes: 1,
            seen: None,
            speaks: VERSIONS.max,
        })
    }

    fn messages() -> impl Strategy<Value = Message> {
        let evidence = prop::collection::vec((0u64..1 << 40, any::<bool>()), 0..30).prop_map(|answers| {
            let mut evidence = Evidence::default();
            answers.iter().for_each(|(us, error)| evidence.canary.record(*us, *error));
            evidence
        });
        let vote = (any::<u32>(), any::<u64>(), ".{0,40}").prop_map(|(round, boot, why)| {
            let ballot = Ballot { round: round.into(), node: node("b"), incarnation: Incarnation(boot), boot };
            let answer = Answer::Gate { accepted: None, gate: GateVote::No(why) };
            Message::Vote(Vote { ballot, slot: Slot(2), head: Slot(1), writes: 1, answer })
        });
        prop_oneof![evidence.prop_map(snapshot), vote, (0..Slot::MAX.0).prop_map(heartbeat)]
    }

    fn malformed_by(message: &Message) -> String {
        match greeted().decode(&mut framed(message)) {
            Err(FrameError::Malformed(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn hello_comes_first_and_once() {
        let facts = [("build".to_string(), "0.2.0".to_string()), ("of a later version".into(), "kept".into())].into();
        let hello = Hello { versions: VERSIONS, to: node("b"), facts };
        let mut bytes = BytesMut::new();
        encode_hello(&me(), &hello, &mut bytes);
        let found = FrameCodec::default().decode(&mut bytes.clone()).unwrap().unwrap();
        assert_eq!((found.sender(), found.payload), (me(), Payload::Hello(hello)));
        let mut codec = FrameCodec::default();
        codec.greeted(HELLO_VERSION);
        let error = codec.decode(&mut bytes).unwrap_err();
        assert!(matches!(error, FrameError::Kind { found: 0, .. }), "{error}");
        let error = FrameCodec::default().decode(&mut framed(&heartbeat(1))).unwrap_err();
        let expected = format!("protocol version {}, expected {HELLO_VERSION}", VERSIONS.max);
        assert_eq!(error.to_string(), expected, "only HELLO may come first");
    }

    #[test]
    fn facts_are_few_and_short() {
        let hello = |count: usize, length: usize| {
            let facts = (0..count).map(|n| (n.to_string(), "x".repeat(length))).collect();
            let mut bytes = BytesMut::new();
            encode_hello(&me(), &Hello { versions: VERSIONS, to: node("b"), facts }, &mut bytes);
            FrameCodec::default().decode(&mut bytes)
        };
        assert!(hello(FACTS_MAX, 60).is_ok() && hello(1, FACT_BYTES_MAX).is_ok());
        let many = hello(FACTS_MAX + 1, 1).unwrap_err().to_string();
        assert_eq!(many, "malformed body: number of facts is 33, expected at most 32");
        let long = hello(1, FACT_BYTES_MAX + 1).unwrap_err().to_string();
        assert_eq!(long, "malformed body: length of a fact is 257, expected at most 256");
    }

    #[test]
    fn what_a_version_lacks_is_not_sent_and_not_taken() {
        let operation = Operation::SetDefault("s".parse().unwrap());
        let tx = crate::domain::ids::TxId::new("t").unwrap();
        let initiator = crate::protocol::record::Initiator::Client;
        let at = crate::domain::time::Wall(1);
        let intent = Intent { initiator, tx, actor: "alice".into(), digest: 1, at, operation };
        let ballot = Ballot { round: 1, node: node("b"), incarnation: Incarnation(1), boot: 1 };
        let prepare = crate::protocol::message::Prepare {
            ballot,
            slot: Slot(1),
            base_hash: Hash([3; 32]),
            intent,
            recovery: false,
            evidence_age_ms_max: 2_000,
        };
        let prepare = Message::Prepare(prepare);
        let part = crate::protocol::checkpoint::Checkpoint { slot: Slot(1), format: 4, bytes: vec![1].into() };
        let part = Message::Decision(Decision::Checkpoint(part.parts().remove(0)));
        for message in [prepare, part] {
            let mut bytes = BytesMut::new();
            let error = encode_message(&me(), 8, &message, &mut bytes).unwrap_err().to_string();
            assert_eq!(error, "protocol version 8 has no default-service, expected 9 or newer");
            assert!(bytes.is_empty());
            assert!(greeted().decode(&mut framed(&message)).unwrap().is_some());
        }
        // A heartbeat is the same to both but for what its sender speaks.
        let mut bytes = BytesMut::new();
        encode_message(&me(), 8, &heartbeat(7), &mut bytes).unwrap();
        let mut codec = FrameCodec::default();
        codec.greeted(8);
        let found = codec.decode(&mut bytes).unwrap().unwrap().payload;
        let Message::Heartbeat(sent) = heartbeat(7) else { unreachable!("a heartbeat") };
        let expected = Message::Heartbeat(Heartbeat { speaks: 8, ..sent });
        assert_eq!(found, Payload::Message(Box::new(expected)));
    }

    #[test]
    fn a_length_is_refused_before_its_bytes_are_awaited() {
        let mut bytes = framed(&heartbeat(1));
        bytes[7..11].fill(0xff);
        bytes.truncate(HEADER_BYTES);
        let error = greeted().decode(&mut bytes).unwrap_err().to_string();
        assert_eq!(error, "frame body of 4294967295 bytes, expected at most 65536");
    }

    #[test]
    fn the_newest_common_version_is_chosen_or_both_ranges_are_named() {
        let range = |min, max| Versions { min, max };
        assert_eq!(range(1, 3).common(range(2, 5)), Ok(3));
        assert_eq!(range(2, 5).common(range(1, 3)), Ok(3));
        let error = range(1, 2).common(range(3, 4)).unwrap_err().to_string();
        assert_eq!(error, "protocol version 3 to 4, expected 1 to 2");
    }

    #[test]
    fn what_is_not_ours_is_refused_by_its_first_bytes() {
        let error = FrameCodec::default().decode(&mut BytesMut::from("GET / HTTP/1.1\r\n")).unwrap_err().to_string();
        assert_eq!(error, "frame starts with GET , expected \"AVRY\"");
    }

    #[test]
    fn values_that_the_core_could_not_bear_are_malformed() {
        let mut evidence = Evidence::default();
        evidence.canary.record(1_000, false);
        evidence.canary.errors = 2;
        assert!(
            malformed_by(&snapshot(evidence.clone())).contains("1 answers, expected 2 errors and those in bins, 1")
        );
        evidence.canary.errors = 0;
        evidence.canary.latency_sum_us = u64::MAX;
        assert!(malformed_by(&snapshot(evidence.clone())).contains("expected both below 2^60"));
        evidence.canary.latency_sum_us = LATENCY_SUM_US_MAX + 1;
        assert!(malformed_by(&snapshot(evidence)).starts_with("sum of latencies"));
        assert!(malformed_by(&heartbeat(u64::MAX)).contains("slot is 18446744073709551615"));
    }

    #[test]
    fn classes_of_statuses_travel_behind_a_snapshot_and_only_where_there_are_some() {
        let Message::HealthSnapshot(plain) = snapshot(Evidence::default()) else { unreachable!("a snapshot") };
        let mut evidence = Evidence::default();
        (0..5).for_each(|_| evidence.canary.record(1_000, false));
        let without = HealthSnapshot { tick_samples: vec![(7, TickSample { version: 3, evidence })], ..plain };
        let mut told = without.clone();
        told.tick_samples[0].1.evidence.canary.classes.client = 5;
        let (bare, told) = (Message::HealthSnapshot(without), Message::HealthSnapshot(told));
        let sent = |version: u16, message: &Message| {
            let mut bytes = BytesMut::new();
            encode_message(&me(), version, message, &mut bytes).unwrap();
            let (length, mut codec) = (bytes.len(), FrameCodec::default());
            codec.greeted(version);
            (length, codec.decode(&mut bytes).unwrap().unwrap().payload)
        };
        assert_eq!(sent(VERSIONS.max, &told).1, Payload::Message(Box::new(told.clone())));
        assert_eq!(sent(VERSIONS.min, &told), sent(VERSIONS.min, &bare), "the version before has no place for them");
        assert_eq!(sent(VERSIONS.max, &bare).0, sent(VERSIONS.min, &bare).0, "no byte where nothing is said");
        let Message::HealthSnapshot(mut lies) = told else { unreachable!("a snapshot") };
        lies.tick_samples[0].1.evidence.canary.classes.client = 6;
        assert!(malformed_by(&Message::HealthSnapshot(lies)).contains("value ends after"), "more 4xx than answers");
    }

    /// Returns an analysis run of three nodes whose every bin of latency holds answers, in the middle of a window.
    fn run(answers: u32) -> AnalysisRun<NodeId> {
        let analysis = Analysis { window_ms: 4_000, ..Analysis::default() };
        let mut run = AnalysisRun::new(analysis, Some(Policy::default()), 250, 0);
        let names = ["a", "b", "c"].map(node);
        for tick in 0..40 {
            // So many that every sum has its full width; a tick of them takes half a second to compare.
            let answers = if tick < 38 { 1 } else { answers };
            let full = || Stats::from_counts(u64::from(answers), 1 << 40, [answers; BINS]);
            let tick_sample = TickSample { version: 3, evidence: Evidence { stable: full(), canary: full() } };
            names.iter().for_each(|name| _ = run.put(name, tick, &tick_sample));
            run.advance(tick * 250, names.iter());
        }
        run.put(&names[1], 41, &TickSample::default());
        run
    }

    fn transfer(run: AnalysisRun<NodeId>) -> Message {
        let Message::HealthSnapshot(told) = snapshot(Evidence::default()) else { unreachable!("a snapshot") };
        let transfer = RunTransfer { at_ms: 10_300, run, closed: vec![WindowVerdict::unseen(0, 4_000)] };
        Message::HealthSnapshot(HealthSnapshot { transfer: Some(Box::new(transfer)), ..told })
    }

    #[test]
    fn a_run_whose_bins_are_all_full_fits_a_frame_and_comes_out_as_it_was() {
        let mut sent = run(1 << 20);
        let mut bytes = framed(&transfer(sent.clone()));
        assert!(bytes.len() < BODY_BYTES_MAX * 3 / 4, "{}", bytes.len());
        let Some(Envelope { payload: Payload::Message(message), .. }) = greeted().decode(&mut bytes).unwrap() else {
            panic!("a whole frame");
        };
        let Message::HealthSnapshot(HealthSnapshot { transfer: Some(found), .. }) = *message else {
            panic!("a transfer");
        };
        let mut found = found.run;
        assert_eq!(found, sent);
        let more = TickSample { version: 4, evidence: Evidence { stable: Stats::default(), canary: full_of_errors() } };
        for tick in 41..50 {
            let go_on = |run: &mut AnalysisRun<NodeId>| {
                run.put(&node("a"), tick, &more);
                run.advance(tick * 250, [node("a")].iter())
            };
            assert_eq!(go_on(&mut found), go_on(&mut sent));
        }
        assert_eq!(found, sent);
    }

    fn full_of_errors() -> Stats {
        Stats::from_counts(50, 50_000, [0; BINS])
    }

    /// Analysis runs whose bytes were altered on the way are refused, or can be gone on with.
    #[test]
    fn an_altered_run_breaks_nothing() {
        use rand::{RngExt as _, SeedableRng as _};
        let sent = run(3);
        let whole = framed(&transfer(sent.clone()));
        let mut random = rand::rngs::SmallRng::seed_from_u64(1);
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..600 {
            let mut bytes = whole.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(HEADER_BYTES..bytes.len());
                bytes[at] = if random.random() { random.random() } else { 255 };
            }
            let sum = checksum(&bytes[4..11], &bytes[HEADER_BYTES..]);
            bytes[11..15].copy_from_slice(&sum.to_be_bytes());
            match greeted().decode(&mut bytes) {
                Ok(Some(Envelope { payload: Payload::Message(message), .. })) => {
                    taken += 1;
                    let Message::HealthSnapshot(HealthSnapshot { transfer: Some(found), .. }) = *message else {
                        continue;
                    };
                    let mut found = found.run;
                    if !found.is_like(&sent) {
                        continue;
                    }
                    let more = TickSample {
                        version: 9,
                        evidence: Evidence { stable: full_of_errors(), ..Default::default() },
                    };
                    let first = found.next_tick();
                    for tick in first..first + 20 {
                        found.put(&node("a"), tick, &more);
                        found.advance(tick * 250, [node("a")].iter());
                    }
                }
                Ok(_) => panic!("a whole frame"),
                Err(_) => refused += 1,
            }
        }
        println!("{taken} taken, {refused} refused");
        assert!(taken > 50 && refused > 50, "{taken} taken, {refused} refused");
    }

    #[test]
    fn a_kind_that_contradicts_the_body_is_malformed() {
        let mut bytes = framed(&heartbeat(1));
        bytes[6] = Kind::Vote as u8;
        let sum = checksum(&bytes[4..11], &bytes[HEADER_BYTES..]);
        bytes[11..15].copy_from_slice(&sum.to_be_bytes());
        let error = greeted().decode(&mut bytes).unwrap_err().to_string();
        assert_eq!(error, "malformed body: HEARTBEAT in a frame of kind 2, expected the kind to match");
    }

    /// Frames whose bodies were altered and whose checksums fit again, so that the decoder sees them.
    #[test]
    #[ignore = "takes minutes; cargo test --release --lib ten_million -- --ignored --nocapture"]
    fn ten_million_altered_frames_break_nothing() {
        use proptest::strategy::{Strategy as _, ValueTree as _};
        use rand::{RngExt as _, SeedableRng as _};
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let samples: Vec<_> = (0..500).map(|_| framed(&messages().new_tree(&mut runner).unwrap().current())).collect();
        let mut random = rand::rngs::SmallRng::seed_from_u64(1);
        let (mut taken, mut refused) = (0u64, 0u64);
        for _ in 0..10_000_000 {
            let mut bytes = samples[random.random_range(0..samples.len())].clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(HEADER_BYTES..bytes.len());
                bytes[at] = [0, 0xff, 0x7f, 0x80, 251, 252, 253, random.random()][random.random_range(0..8)];
            }
            let sum = checksum(&bytes[4..11], &bytes[HEADER_BYTES..]);
            bytes[11..15].copy_from_slice(&sum.to_be_bytes());
            match greeted().decode(&mut bytes) {
                Ok(_) => taken += 1,
                Err(_) => refused += 1,
            }
        }
        println!("{taken} taken, {refused} refused");
        assert!(refused > 1_000_000);
    }

    proptest! {
        #[test]
        fn any_frame_reads_back_in_any_pieces(message in messages(), cut in any::<prop::sample::Index>()) {
            let bytes = framed(&message);
            let (head, tail) = bytes.split_at(cut.index(bytes.len()));
            let (mut codec, mut arrived) = (greeted(), BytesMut::from(head));
            prop_assert_eq!(codec.decode(&mut arrived), Ok(None));
            arrived.extend_from_slice(tail);
            let found = codec.decode(&mut arrived).unwrap().unwrap();
            prop_assert_eq!(found.sender(), me());
            prop_assert_eq!(found.payload, Payload::Message(Box::new(message)));
            prop_assert!(arrived.is_empty());
        }

        #[test]
        fn random_bytes_are_never_a_frame(bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
            let mut all = BytesMut::new();
            if magic {
                all.extend_from_slice(&MAGIC);
            }
            all.extend_from_slice(&bytes);
            for mut codec in [FrameCodec::default(), greeted()] {
                prop_assert!(!matches!(codec.decode(&mut all.clone()), Ok(Some(_))));
            }
        }

        #[test]
        fn a_changed_byte_is_never_accepted(message in messages(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = framed(&message);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(!matches!(greeted().decode(&mut bytes), Ok(Some(_))));
        }
    }
}
