//! What is on disks and wires stays readable: each format's bytes, as each version of it wrote them.
//!
//! `golden/FORMAT-VERSION.txt` holds bytes of one version, a line for each value. The rule: a file that is there is never
//! rewritten. Changed bytes need a new version (`LAYOUTS` in `src/node/layout.rs`, the constants of
//! `src/adapters/disk/format.rs`, `VERSIONS` in `src/backup/mod.rs`) and so a new file, which `AVIARY_GOLDEN=write` makes; the
//! files of earlier versions stay, and must still be read as the values that they were written from, which stand here. A
//! version that this program still writes is compared byte for byte. A version that is no longer read loses its file in the
//! commit that drops its reader.
//!
//! `tests/releases.txt` names the releases, and the digest of each file that one of them wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Display, Write as _};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aviary::adapters::disk::format;
use aviary::backup::{self, Header};
use aviary::domain::analysis::Analysis;
use aviary::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use aviary::domain::rollout::Change;
use aviary::domain::run::{AnalysisRun, WindowVerdict};
use aviary::domain::sequential::Policy;
use aviary::domain::time::Wall;
use aviary::node::frame::{self, FrameCodec, HELLO_VERSION, Hello, Identity, Payload, VERSIONS, Versions};
use aviary::protocol::checkpoint::{Checkpoint, Part};
use aviary::protocol::codec;
use aviary::protocol::ledger::Ledger;
use aviary::protocol::message::{
    Acknowledgement, Answer, Decision, GateVote, HealthSnapshot, Heartbeat, Membership, Message, Prepare, Refusal,
    RunRequest, Vote,
};
use aviary::protocol::record::{
    Accepted, AcceptorState, Ballot, Certificate, Chosen, ConfigChange, Initiator, Intent, Member, Members, Operation,
    Record, RunTransfer, SavedRun, SeenDisk, Slot,
};
use bytes::BytesMut;
use serde::Serialize;
use tempfile::TempDir;

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn ballot(round: u64) -> Ballot {
    Ballot { round, node: node("a"), incarnation: Incarnation(0xaaaa), boot: 3 }
}

fn intent(tx: &str, operation: Operation) -> Intent {
    Intent {
        initiator: Initiator::Client,
        tx: TxId::new(tx).unwrap(),
        actor: "test".into(),
        digest: 77,
        at: Wall(1_790_000_000_000),
        operation,
    }
}

/// A log with a record of each kind.
fn log() -> Vec<Chosen> {
    let member = |name, incarnation| (node(name), Member { incarnation: Incarnation(incarnation), cordoned: false });
    let members = Members([member("a", 0xaaaa), member("b", 0xbbbb), member("c", 0xcccc)].into());
    let genesis = intent("genesis", Operation::Genesis { cluster: ClusterId([7; 16]), members });
    let first = Record {
        slot: Slot(0),
        prev_hash: Default::default(),
        intent: genesis,
        state: None,
        phase: None,
        certificate: None,
    };
    let mut log = vec![Chosen { ballot: None, decided_at: first.intent.at, record: first }];
    let mut ledger = Ledger::new(&log[0]).unwrap();
    let text = "{apiVersion: aviary/v1, kind: Rollout, metadata: {name: s}, spec: {stable: {version: v1, url: 'http://x:1'}, \
                canary: {version: v2, urls: ['http://y:2', 'http://y:3']}, steps: [{setWeight: 5}, {pause: {duration: 30s}}, \
                {setWeight: 100}], routing: {hashOn: {header: X-User-ID}, match: [{headers: {x-canary: {exact: always}}}]}}}";
    let spec = Arc::new(aviary::config::rollout::parse(text, "test").unwrap());
    let service = ServiceId::new("s").unwrap();
    let yes: BTreeMap<_, _> = ["a", "b", "c"].map(|name| (node(name), "no canary traffic yet".to_string())).into();
    let operations = [
        (Operation::Change(service.clone(), Change::Start(spec)), true),
        (Operation::Change(service.clone(), Change::Pause { reason: "lunch".into() }), false),
        (Operation::Change(service.clone(), Change::Resume), false),
        (
            Operation::Refused {
                service: Some(service.clone()),
                refused: "Promote".into(),
                reasons: vec!["b: no".into()],
            },
            false,
        ),
        (Operation::Config(ConfigChange::Cordon(node("c"))), false),
        (Operation::Config(ConfigChange::Readmit(node("c"), Incarnation(0xdddd))), false),
        (Operation::Change(service, Change::Rollback { reason: "errors".into() }), false),
    ];
    for (number, (operation, votes)) in operations.into_iter().enumerate() {
        let certificate = votes.then(|| Certificate { ballot: ballot(2), yes: yes.clone() });
        let record = ledger.next_record(intent(&format!("t{number}"), operation), certificate).unwrap();
        let chosen = Chosen { ballot: Some(ballot(2)), decided_at: Wall(1_790_000_000_038), record };
        ledger.apply(&chosen).unwrap();
        log.push(chosen);
    }
    log
}

/// A format in a version that this program writes, with values that pin it.
struct Format {
    name: &'static str,
    version: u16,
    samples: Vec<Sample>,
}

/// Reads the bytes of a version; an error if they don't mean the sample's value.
type Reads = Box<dyn Fn(u16, &[u8]) -> Result<(), String>>;

/// A value and its bytes.
struct Sample {
    name: String,
    bytes: Vec<u8>,
    /// The value alone, in the one encoding, without what the format puts around it.
    body: Vec<u8>,
    reads: Reads,
}

impl Sample {
    fn new<T: Serialize + PartialEq + Debug + 'static, E: Display>(
        name: impl Into<String>,
        value: T,
        bytes: Vec<u8>,
        decode: impl Fn(u16, &[u8]) -> Result<T, E> + 'static,
    ) -> Self {
        let body = codec::encode(&value);
        let reads = Box::new(move |version, bytes: &[u8]| match decode(version, bytes) {
            Ok(found) if found == value => Ok(()),
            Ok(found) => Err(format!("reads as another value: found {found:?}, expected {value:?}")),
            Err(error) => Err(format!("can't be read any more: {error}")),
        });
        Self { name: name.into(), bytes, body, reads }
    }

    /// Pins bytes that are too many for a file by their hash.
    fn hash(name: &str, bytes: &[u8]) -> Self {
        let hash = blake3::hash(bytes).as_bytes().to_vec();
        Self { name: name.into(), body: hash.clone(), bytes: hash, reads: Box::new(|_, _| Ok(())) }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Compares the formats with the files of `dir`, and returns what breaks the rule; `write` makes files that are missing.
fn problems(dir: &Path, formats: &[Format], write: bool) -> Vec<String> {
    let mut problems = Vec::new();
    for Format { name, version, samples } in formats {
        let path = dir.join(format!("{name}-{version}.txt"));
        let lines: Vec<_> = samples.iter().map(|sample| format!("{} {}", sample.name, hex(&sample.bytes))).collect();
        if write && !path.exists() {
            fs::write(&path, lines.join("\n") + "\n").unwrap();
        }
        let Ok(text) = fs::read_to_string(&path) else {
            problems
                .push(format!("{name}-{version}.txt is missing, expected it beside the others: AVIARY_GOLDEN=write"));
            continue;
        };
        let (found, expected): (BTreeSet<_>, BTreeSet<_>) =
            (lines.iter().map(String::as_str).collect(), text.lines().collect());
        for line in found.symmetric_difference(&expected) {
            let sample = line.split(' ').next().unwrap_or_default();
            problems.push(format!(
                "{sample} is not in {name}-{version}.txt as it is written: changed bytes need a new version"
            ));
        }
    }
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for path in files {
        let file = path.file_stem().unwrap().to_string_lossy().into_owned();
        let version_of = |format: &Format| file.strip_prefix(format.name)?.strip_prefix('-')?.parse::<u16>().ok();
        let Some(version) = formats.iter().find_map(version_of) else {
            problems.push(format!("{file}: no format has this name"));
            continue;
        };
        // What an older version wrote means what the next one that is still written means.
        let of_name = || formats.iter().filter(|format| version_of(format).is_some());
        let Some(format) = of_name().filter(|format| format.version >= version).min_by_key(|format| format.version)
        else {
            let newest = of_name().map(|format| format.version).max().unwrap_or(0);
            problems.push(format!("{file}: the newest version is {newest}"));
            continue;
        };
        let samples: BTreeMap<_, _> = format.samples.iter().map(|sample| (sample.name.as_str(), sample)).collect();
        for line in fs::read_to_string(&path).unwrap().lines() {
            let (name, bytes) = line.split_once(' ').unwrap();
            let read = samples.get(name).ok_or_else(|| "has no value that it means".to_string());
            if let Err(why) = read.and_then(|sample| (sample.reads)(version, &unhex(bytes))) {
                problems.push(format!("{file}: {name} {why}"));
            }
        }
    }
    problems
}

#[test]
fn bytes_of_disk_and_wire_stay_as_they_were() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden");
    let write = std::env::var_os("AVIARY_GOLDEN").is_some_and(|value| value == "write");
    assert_eq!(problems(&dir, &formats(), write), Vec::<String>::new());
}

#[test]
fn changed_bytes_need_a_new_file_and_earlier_ones_must_still_be_read() {
    let dir = TempDir::new().unwrap();
    // Version 1 writes the text, version 2 its length before it; a reader knows the versions from `oldest` on.
    let text = |version: u16, oldest: u16, text: &'static str| {
        let bytes = if version == 1 { text.into() } else { [&[text.len() as u8], text.as_bytes()].concat() };
        let decode = move |version: u16, bytes: &[u8]| match version {
            _ if version < oldest => Err("no reader"),
            1 => Ok(String::from_utf8(bytes.to_vec()).unwrap()),
            _ => Ok(String::from_utf8(bytes[1..].to_vec()).unwrap()),
        };
        [Format { name: "text", version, samples: vec![Sample::new("hello", text.to_string(), bytes, decode)] }]
    };
    let found = |formats: [Format; 1], write| problems(dir.path(), &formats, write).join("; ");
    assert!(found(text(1, 1, "hello"), false).contains("text-1.txt is missing"));
    assert_eq!(found(text(1, 1, "hello"), true), "");
    let before = fs::read(dir.path().join("text-1.txt")).unwrap();
    assert!(found(text(1, 1, "other"), true).contains("changed bytes need a new version"));
    assert_eq!(fs::read(dir.path().join("text-1.txt")).unwrap(), before, "a file that is there is never rewritten");
    assert_eq!(found(text(2, 1, "hello"), true), "", "a new version, which reads the one before");
    assert!(found(text(2, 2, "hello"), false).contains("text-1: hello can't be read any more: no reader"));
    assert!(found(text(1, 1, "hello"), false).contains("text-2: the newest version is 1"));
    fs::write(dir.path().join("text-1.txt"), "hello 68656c70\n").unwrap();
    assert!(found(text(2, 1, "hello"), false).contains("text-1: hello reads as another value: found \"help\""));
}

/// Returns the encoded values of all formats, by name, without what the formats put around them.
pub fn bodies() -> Vec<(String, Vec<u8>)> {
    formats().into_iter().flat_map(|format| format.samples).map(|sample| (sample.name, sample.body)).collect()
}

fn formats() -> Vec<Format> {
    let (log, newer) = (log(), log_with_default());
    let of = |name, version, samples| Format { name, version, samples };
    vec![
        of("acceptor", format::ACCEPTOR.oldest, vec![acceptor(&log)]),
        of("acceptor", format::ACCEPTOR.newest, vec![acceptor(&newer[1..])]),
        of("journal", format::JOURNAL.oldest, log.iter().map(record).collect()),
        of("journal", format::JOURNAL.newest, newer[8..].iter().map(record).collect()),
        of("checkpoint", format::CHECKPOINT.oldest, vec![checkpoint(&log)]),
        of("checkpoint", format::CHECKPOINT.newest, vec![checkpoint(&newer)]),
        of("run", format::RUN.newest, runs()),
        of("backup", backup::VERSIONS.0, backups(&log)),
        of("backup", backup::VERSIONS.1, backups(&newer)),
        of("hello", HELLO_VERSION, vec![hello()]),
        of("frame", VERSIONS.min, messages(VERSIONS.min, &log).into_iter().map(message(VERSIONS.min)).collect()),
        of("frame", VERSIONS.max, messages(VERSIONS.max, &newer[1..]).into_iter().map(message(VERSIONS.max)).collect()),
    ]
}

/// The same log, and a record that makes a service the default.
fn log_with_default() -> Vec<Chosen> {
    let mut log = log();
    let mut ledger = Ledger::new(&log[0]).unwrap();
    log[1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    let operation = Operation::SetDefault(ServiceId::new("s").unwrap());
    let record = ledger.next_record(intent("default", operation), None).unwrap();
    log.push(Chosen { ballot: Some(ballot(3)), decided_at: Wall(1_790_000_000_040), record });
    log
}

fn record(chosen: &Chosen) -> Sample {
    let name = format!("record-{}", chosen.record.intent.operation.name());
    Sample::new(name, chosen.clone(), format::encode_record(chosen), |_, bytes| format::decode_record(bytes))
}

fn acceptor(log: &[Chosen]) -> Sample {
    let state = AcceptorState {
        cluster: ClusterId([7; 16]),
        node: node("a"),
        incarnation: Incarnation(0xaaaa),
        boot: 3,
        promised: Some(ballot(5)),
        accepted: Some(Accepted { ballot: ballot(4), record: log[7].record.clone() }),
        head: Slot(6),
        head_hash: log[6].record.hash(),
        writes: 70_000,
        seen: [(node("b"), SeenDisk { incarnation: Incarnation(0xbbbb), writes: 300 })].into(),
    };
    let tail = log[5..6].to_vec();
    let bytes = format::encode_acceptor(&state, &tail);
    let expected = tail;
    Sample::new("acceptor", state, bytes, move |_, bytes| {
        let (state, tail) = format::decode_acceptor(bytes).map_err(|error| error.to_string())?;
        if tail == expected { Ok(state) } else { Err(format!("its records are {tail:?}")) }
    })
}

fn checkpoint(log: &[Chosen]) -> Sample {
    let mut ledger = Ledger::new(&log[0]).unwrap();
    log[1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    let bytes = format::encode_checkpoint(&Checkpoint::of(&ledger).unwrap());
    Sample::new("ledger", ledger, bytes, |_, bytes| {
        let checkpoint = format::decode_checkpoint(bytes).map_err(|error| error.to_string())?;
        checkpoint.ledger().map_err(|error| error.to_string())
    })
}

fn transfer(policy: Option<Policy>) -> RunTransfer {
    let mut run = AnalysisRun::new(Analysis::default(), policy, 250, 4_000);
    run.put(&node("a"), 17, &Default::default());
    RunTransfer { at_ms: 4_500, run, closed: vec![WindowVerdict::unseen(0, 30_000)] }
}

fn runs() -> Vec<Sample> {
    let saved = |policy| SavedRun { rollout_generation: 1, at: Wall(1_790_000_000_000), run: transfer(policy) };
    let run = saved(None);
    let bytes = format::encode_run(&run);
    // Of a comparison with stable these are thousands of bytes, most of them 0.
    let compared = format::encode_run(&saved(Some(Policy::default())));
    vec![
        Sample::new("saved-run", run, bytes, |_, bytes| format::decode_run(bytes)),
        Sample::hash("saved-run-compared-hash", &compared),
    ]
}

/// A backup that begins with genesis, and one that begins with a checkpoint.
fn backups(log: &[Chosen]) -> Vec<Sample> {
    let checkpoint = |records: usize| {
        let mut ledger = Ledger::new(&log[0]).unwrap();
        log[1..records].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
        ledger
    };
    let head = checkpoint(log.len());
    let header = Header {
        cluster: ClusterId([7; 16]),
        node: node("a"),
        build: "0.2.0".into(),
        at_ms: Wall(1_790_000_000_100),
        slot: head.head,
        hash: Header::hash_of(&head.head_hash),
    };
    let config = "[node]\nid = \"a\"\n";
    let sample = |name: &str, authority: Option<&str>, sum: Option<Ledger>| {
        let mut writer = backup::Writer::new(backup::version_for(&head.uses()));
        let mut bytes = writer.begin(&header);
        bytes.extend(writer.config(config));
        authority.iter().for_each(|pem| bytes.extend(writer.authority(pem)));
        let from = sum.as_ref().map_or(0, |ledger| ledger.head.0 as usize + 1);
        sum.iter().for_each(|ledger| bytes.extend(writer.checkpoint(&Checkpoint::of(ledger).unwrap())));
        bytes.extend(writer.log(&log[from..]));
        bytes.extend(writer.end());
        let records = (log.len() - from) as u64;
        let value = (header.clone(), config.to_string(), authority.map(str::to_string), head.clone(), records);
        Sample::new(name, value, bytes, |_, bytes| {
            backup::read(bytes).map(|found| (found.header, found.config, found.authority, found.ledger, found.records))
        })
    };
    let before = if log.len() > 8 { log.len() } else { 6 };
    vec![sample("whole-log", Some("a certificate"), None), sample("after-checkpoint", None, Some(checkpoint(before)))]
}

fn sender() -> Identity {
    Identity { cluster: ClusterId([7; 16]), node: node("a"), incarnation: Incarnation(0xaaaa) }
}

fn hello() -> Sample {
    let facts = [("build".to_string(), "0.2.0 (unknown)".to_string())].into();
    let hello = Hello { versions: Versions { min: 8, max: 9 }, to: node("b"), facts };
    let mut bytes = BytesMut::new();
    frame::encode_hello(&sender(), &hello, &mut bytes);
    Sample::new("hello", hello, bytes.to_vec(), |_, bytes| {
        let envelope = FrameCodec::default().decode(&mut BytesMut::from(bytes)).map_err(|error| error.to_string())?;
        match envelope.filter(|envelope| envelope.sender() == sender()).map(|envelope| envelope.payload) {
            Some(Payload::Hello(hello)) => Ok(hello),
            other => Err(format!("found {other:?}")),
        }
    })
}

fn message(version: u16) -> impl Fn((&'static str, Message)) -> Sample {
    move |(name, message)| {
        let mut bytes = BytesMut::new();
        frame::encode_message(&sender(), version, &message, &mut bytes).unwrap();
        Sample::new(name, message, bytes.to_vec(), move |version, bytes| {
            let mut codec = FrameCodec::default();
            codec.greeted(version);
            let envelope = codec.decode(&mut BytesMut::from(bytes)).map_err(|error| error.to_string())?;
            match envelope.filter(|envelope| envelope.sender() == sender()).map(|envelope| envelope.payload) {
                Some(Payload::Message(message)) => Ok(*message),
                other => Err(format!("found {other:?}")),
            }
        })
    }
}

/// A message of each kind, as a version can say it.
fn messages(version: u16, log: &[Chosen]) -> Vec<(&'static str, Message)> {
    let accepted = Accepted { ballot: ballot(4), record: log[7].record.clone() };
    let vote = |answer| Message::Vote(Vote { ballot: ballot(4), slot: Slot(7), head: Slot(6), writes: 70_000, answer });
    let heartbeat = Heartbeat {
        nonce: Some(1),
        acknowledges: Some(Acknowledgement { nonce: 2, granted: true }),
        head: Slot(6),
        head_hash: log[6].record.hash(),
        in_doubt: Some(Slot(1)),
        open: Some(ballot(4)),
        membership: Membership::Voter,
        writes: 70_000,
        seen: Some(SeenDisk { incarnation: Incarnation(0xbbbb), writes: 300 }),
        speaks: version,
    };
    let snapshot = HealthSnapshot {
        service: ServiceId::new("s").unwrap(),
        routing_version: 2,
        evidence: Default::default(),
        local_hold: Some("errors".into()),
        lease_ms_left: 1_500,
        effective_bp: 500,
        rollout_generation: 1,
        tick_samples: vec![(17, Default::default())],
        asks: Some(RunRequest { whom: Some(node("b")), saved: 16 }),
        transfer: Some(Box::new(transfer(None))),
    };
    let format = if version < 9 { 3 } else { 4 };
    let part: Part = Checkpoint { slot: Slot(7), format, bytes: b"ledger".as_slice().into() }.parts().remove(0);
    let prepare = Prepare {
        ballot: ballot(4),
        slot: Slot(7),
        base_hash: log[6].record.hash(),
        intent: log[7].record.intent.clone(),
        recovery: false,
        evidence_age_ms_max: 2_000,
    };
    vec![
        ("prepare", Message::Prepare(prepare)),
        ("vote-gate", vote(Answer::Gate { accepted: Some(Box::new(accepted)), gate: GateVote::No("errors".into()) })),
        ("vote-accept", vote(Answer::Accept)),
        ("vote-refuse", vote(Answer::Refuse(Refusal::Stale(ballot(9))))),
        ("decision-propose", Message::Decision(Decision::Propose(ballot(4), Box::new(log[7].record.clone())))),
        ("decision-chosen", Message::Decision(Decision::Chosen(Box::new(log[7].clone())))),
        ("decision-catch-up", Message::Decision(Decision::CatchUp(Box::new(log[7].clone())))),
        ("decision-checkpoint", Message::Decision(Decision::Checkpoint(part))),
        ("heartbeat", Message::Heartbeat(heartbeat)),
        ("health-snapshot", Message::HealthSnapshot(snapshot)),
    ]
}

/// Releases, and what each of them wrote: `tests/releases.txt`.
struct Releases {
    /// Version and commit, the oldest first.
    releases: Vec<(String, String)>,
    /// Name and BLAKE3 of each file.
    files: BTreeMap<String, String>,
}

fn releases() -> Releases {
    let text = fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/releases.txt")).unwrap();
    let (mut releases, mut files) = (Vec::new(), BTreeMap::new());
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (first, second) = line.trim().split_once(' ').unwrap_or_else(|| panic!("expected two words in {line:?}"));
        match line.starts_with(' ') {
            true => drop(files.insert(first.to_string(), second.to_string())),
            false => releases.push((first.to_string(), second.to_string())),
        }
    }
    Releases { releases, files }
}

/// Returns which files of `dir` aren't any more what a release wrote.
fn altered(dir: &Path, files: &BTreeMap<String, String>) -> Vec<String> {
    let found = |name: &String| match fs::read(dir.join(name)) {
        Ok(bytes) => blake3::hash(&bytes).to_hex().to_string(),
        Err(_) => "no such file".into(),
    };
    let different =
        files.iter().map(|(name, digest)| (name, digest, found(name))).filter(|(_, digest, found)| *digest != found);
    different
        .map(|(name, digest, found)| format!("{name}: found {found}, expected {digest}, as it was released"))
        .collect()
}

#[test]
fn what_a_release_wrote_stays_as_it_was() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let Releases { releases, files } = releases();
    assert_eq!(altered(&root.join("tests/it/golden"), &files), Vec::<String>::new());
    assert!(!releases.is_empty() && files.len() > releases.len(), "each release wrote something");
    // Where git knows the commit, its own word counts: the list can't be changed together with a file.
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(&root).args(arguments).output().ok()?;
        output.status.success().then_some(output.stdout)
    };
    for (version, commit) in &releases {
        let Some(listed) = git(&["ls-tree", "--name-only", &format!("{commit}:tests/it/golden")]) else { continue };
        for name in String::from_utf8(listed).unwrap().lines() {
            let digest = files.get(name).unwrap_or_else(|| panic!("{name} of {version} is not listed"));
            let bytes = git(&["show", &format!("{commit}:tests/it/golden/{name}")]).unwrap();
            assert_eq!(*digest, blake3::hash(&bytes).to_hex().to_string(), "{name} of {version}");
        }
    }
}

#[test]
fn a_released_file_that_is_gone_or_edited_is_named() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("x-1.txt"), "hello 68\n").unwrap();
    let digest = blake3::hash(b"hello 68\n").to_hex().to_string();
    let files = BTreeMap::from([("x-1.txt".to_string(), digest)]);
    assert_eq!(altered(dir.path(), &files), Vec::<String>::new());
    fs::write(dir.path().join("x-1.txt"), "hello 69\n").unwrap();
    assert!(altered(dir.path(), &files)[0].starts_with("x-1.txt: found "));
    fs::remove_file(dir.path().join("x-1.txt")).unwrap();
    assert!(altered(dir.path(), &files)[0].starts_with("x-1.txt: found no such file, expected "));
}
