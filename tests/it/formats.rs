//! What is on disks and wires stays readable: each format's bytes, as they were.
//!
//! A change that breaks these needs a new format version (`FRAME` versions, the magic of acceptor file and checkpoint, the
//! journal's entry version) and a way to read the old one. `AVIARY_GOLDEN=write` writes the file anew.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display, Write as _};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use aviary::domain::analysis::Analysis;
use aviary::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use aviary::domain::rollout::Change;
use aviary::domain::run::{AnalysisRun, WindowVerdict};
use aviary::domain::sequential::Policy;
use aviary::domain::time::Wall;
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
use serde::Serialize;
use serde::de::DeserializeOwned;

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

/// The named encodings so far.
#[derive(Default)]
struct Golden(BTreeMap<String, String>, String);

impl Golden {
    /// Encodes a value; the bytes of the file must read as the same value.
    fn add<T: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, value: &T) {
        self.add_read(name, value, codec::decode);
    }

    /// Encodes a value that is more than its bytes; `read` makes it of them.
    fn add_read<T: Serialize + PartialEq + Debug, E: Display>(
        &mut self,
        name: &str,
        value: &T,
        read: impl Fn(&[u8]) -> Result<T, E>,
    ) {
        let hex = codec::encode(value).iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        writeln!(self.1, "{name} {hex}").unwrap();
        if let Some(old) = self.0.get(name) {
            let bytes: Vec<u8> =
                (0..old.len() / 2).map(|i| u8::from_str_radix(&old[2 * i..2 * i + 2], 16).unwrap()).collect();
            let read = read(&bytes).unwrap_or_else(|error| panic!("{name} can't be read any more: {error}"));
            assert_eq!(read, *value, "{name} reads as another value");
        }
    }
}

#[test]
fn bytes_of_disk_and_wire_stay_as_they_were() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden.txt");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let known = text.lines().filter_map(|line| line.split_once(' ')).map(|(n, hex)| (n.to_string(), hex.to_string()));
    let mut golden = Golden(known.collect(), String::new());
    let log = log();
    for chosen in &log {
        golden.add(&format!("record-{}", chosen.record.intent.operation.name()), chosen);
    }
    let mut ledger = Ledger::new(&log[0]).unwrap();
    log[1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    golden.add_read("ledger", &ledger, |bytes| {
        let checkpoint = Checkpoint { slot: Slot(7), bytes: bytes.to_vec().into() };
        checkpoint.ledger()
    });
    let accepted = Accepted { ballot: ballot(4), record: log[7].record.clone() };
    let acceptor = AcceptorState {
        cluster: ClusterId([7; 16]),
        node: node("a"),
        incarnation: Incarnation(0xaaaa),
        boot: 3,
        promised: Some(ballot(5)),
        accepted: Some(accepted.clone()),
        head: Slot(6),
        head_hash: log[6].record.hash(),
        writes: 70_000,
        seen: [(node("b"), SeenDisk { incarnation: Incarnation(0xbbbb), writes: 300 })].into(),
    };
    golden.add("acceptor", &acceptor);

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
    };
    let transfer = |policy| {
        let mut run = AnalysisRun::new(Analysis::default(), policy, 250, 4_000);
        run.put(&node("a"), 17, &Default::default());
        RunTransfer { at_ms: 4_500, run, closed: vec![WindowVerdict::unseen(0, 30_000)] }
    };
    // Of a comparison with stable these are thousands of bytes, most of them 0.
    let compared = codec::encode(&transfer(Some(Policy::default())));
    golden.add("transfer-hash", &blake3::hash(&compared).to_hex().to_string());
    golden.add("saved-run", &SavedRun { rollout_generation: 1, at: Wall(1_790_000_000_000), run: transfer(None) });
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
    let part: Part = Checkpoint { slot: Slot(7), bytes: b"ledger".as_slice().into() }.parts().remove(0);
    let prepare = Prepare {
        ballot: ballot(4),
        slot: Slot(7),
        base_hash: log[6].record.hash(),
        intent: log[7].record.intent.clone(),
        recovery: false,
        evidence_age_ms_max: 2_000,
    };
    let messages = [
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
    ];
    for (name, message) in &messages {
        golden.add(name, message);
    }
    if std::env::var_os("AVIARY_GOLDEN").is_some_and(|value| value == "write") {
        fs::write(&path, &golden.1).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let differs = golden.1.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    assert_eq!(differs, None, "a format changed without a new version");
    assert_eq!(golden.1.lines().count(), expected.lines().count());
}
