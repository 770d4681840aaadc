use super::*;
use crate::domain::ids::{Incarnation, TxId};
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{
    Ballot, Chosen, ConfigChange, Hash, Initiator, Intent, Member, Members, Operation, Record,
};

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn intent(tx: String, operation: Operation) -> Intent {
    Intent {
        initiator: Initiator::Client,
        tx: TxId::new(tx).unwrap(),
        actor: "alice".into(),
        digest: 7,
        at: Wall(1_790_000_000_000),
        operation,
    }
}

/// Returns a log of `slots` records after genesis, and the ledger after each of them.
fn log(slots: u64) -> (Vec<Chosen>, Vec<Ledger>) {
    let member = |name| (node(name), Member { incarnation: Incarnation(1), cordoned: false });
    let members = Members(["a", "b", "c"].map(member).into());
    let genesis = intent("genesis".into(), Operation::Genesis { cluster: ClusterId([7; 16]), members });
    let record = Record {
        slot: Slot(0),
        prev_hash: Hash::default(),
        intent: genesis,
        state: None,
        phase: None,
        certificate: None,
    };
    let mut log = vec![Chosen { ballot: None, decided_at: Wall(0), record }];
    let mut ledgers = vec![Ledger::new(&log[0]).unwrap()];
    for slot in 1..=slots {
        let change = if slot % 2 == 1 { ConfigChange::Cordon(node("c")) } else { ConfigChange::Uncordon(node("c")) };
        let mut ledger = ledgers.last().unwrap().clone();
        let record = ledger.next_record(intent(format!("t{slot}"), Operation::Config(change)), None).unwrap();
        let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
        log.push(Chosen { ballot: Some(ballot), decided_at: Wall(slot), record });
        ledger.apply(&log[slot as usize]).unwrap();
        ledgers.push(ledger);
    }
    (log, ledgers)
}

fn header(ledger: &Ledger) -> Header {
    Header {
        cluster: ledger.cluster,
        node: node("b"),
        build: "0.1.0".into(),
        at_ms: Wall(1_790_000_000_000),
        slot: ledger.head,
        hash: Header::hash_of(&ledger.head_hash),
    }
}

/// Returns the pieces of a backup with a checkpoint at slot 4, the log from slot 2 to 7, and an authority.
fn pieces() -> Vec<Vec<u8>> {
    let (log, ledgers) = log(7);
    let mut writer = Writer::new(1);
    let mut pieces = vec![
        writer.begin(&header(&ledgers[7])),
        writer.config("[node]\nid = \"b\"\n"),
        writer.authority("-----BEGIN CERTIFICATE-----\n"),
        writer.checkpoint(&Checkpoint::of(&ledgers[4]).unwrap()),
        writer.log(&log[2..6]),
        writer.log(&log[6..]),
    ];
    pieces.push(writer.end());
    pieces
}

fn complaint(bytes: &[u8]) -> String {
    read(bytes).unwrap_err().to_string()
}

#[test]
fn what_was_written_is_read_back() {
    let bytes = pieces().concat();
    let backup = read(bytes.as_slice()).unwrap();
    let (_, ledgers) = log(7);
    assert_eq!((&backup.ledger, &backup.header), (&ledgers[7], &header(&ledgers[7])));
    assert_eq!((backup.checkpoint, backup.records, backup.bytes), (Some(Slot(4)), 6, bytes.len() as u64));
    assert_eq!(backup.digest, blake3::hash(&bytes).to_hex().to_string());
    assert_eq!((backup.config.as_str(), backup.authority.is_some()), ("[node]\nid = \"b\"\n", true));
}

#[test]
fn a_log_from_genesis_needs_no_checkpoint_and_a_checkpoint_no_log() {
    let (log, ledgers) = log(3);
    let mut writer = Writer::new(1);
    let mut bytes = [writer.begin(&header(&ledgers[3])), writer.config(""), writer.log(&log)].concat();
    bytes.extend(writer.end());
    assert_eq!(read(bytes.as_slice()).unwrap().ledger, ledgers[3]);
    let mut writer = Writer::new(1);
    let checkpoint = Checkpoint::of(&ledgers[3]).unwrap();
    let mut bytes = [writer.begin(&header(&ledgers[3])), writer.config(""), writer.checkpoint(&checkpoint)].concat();
    bytes.extend(writer.end());
    assert_eq!(read(bytes.as_slice()).unwrap().ledger, ledgers[3]);
}

#[test]
fn a_cut_file_is_refused_wherever_it_ends() {
    let bytes = pieces().concat();
    for end in 0..bytes.len() {
        let why = complaint(&bytes[..end]);
        assert_eq!(why, format!("it ends after {end} bytes, expected {} there: the file is cut", missing(end)));
    }
}

/// Returns what a file that ends after so many bytes lacks.
fn missing(end: usize) -> &'static str {
    let mut at = 10;
    if end < at {
        return if end < 8 { "the magic of a backup" } else { "the version of the format" };
    }
    for (number, piece) in pieces().iter().enumerate() {
        let section = if number == 0 { piece.len() - 10 } else { piece.len() };
        if end < at + SECTION_HEADER_BYTES {
            return "the next section";
        }
        at += section;
        if end < at {
            return "the rest of a section";
        }
    }
    unreachable!("the file is whole");
}

#[test]
fn each_changed_bit_is_noticed() {
    let bytes = pieces().concat();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(read(changed.as_slice()).is_err(), "byte {at} of {}", bytes.len());
    }
}

#[test]
fn a_foreign_or_later_file_names_what_was_found_and_expected() {
    let mut bytes = pieces().concat();
    assert_eq!(
        complaint(b"PK\x03\x04 something else"),
        "it begins with \"PK\\x03\\x04 som\", expected \"AVIARYBK\": it is no backup of Aviary"
    );
    assert!(complaint(b"").starts_with("it ends after 0 bytes"));
    bytes.push(0);
    assert!(complaint(&bytes).contains("expected the end of the file"), "{}", complaint(&bytes));
    bytes[9] = 3;
    assert_eq!(complaint(&bytes), "its format is 3, expected 1 or 2: use the version of aviary that wrote it");
}

#[test]
fn sections_that_are_whole_but_do_not_belong_together_are_refused() {
    let (log, ledgers) = log(7);
    let made = |write: &dyn Fn(&mut Writer) -> Vec<u8>| {
        let mut writer = Writer::new(1);
        let mut bytes = writer.begin(&header(&ledgers[7]));
        bytes.extend(write(&mut writer));
        bytes.extend(writer.end());
        complaint(&bytes)
    };
    let with = |records: &[Chosen], checkpoint: Option<usize>| {
        made(&|writer| {
            let mut bytes = writer.config("");
            let checkpoint = checkpoint.map(|slot| Checkpoint::of(&ledgers[slot]).unwrap());
            bytes.extend(checkpoint.iter().flat_map(|checkpoint| writer.checkpoint(checkpoint)));
            bytes.extend(writer.log(records));
            bytes
        })
    };
    assert!(made(&|writer| writer.log(&log)).contains("found section log"), "the configuration is missing");
    assert!(with(&log[3..], None).contains("begins with slot 3, expected genesis"));
    assert!(with(&log[6..], Some(4)).contains("record is for slot 6, expected slot 5"));
    assert!(with(&log[..7], None).contains("as the header says"), "the last record is missing");
    let swapped: Vec<_> = [&log[..3], &log[4..5], &log[3..4]].concat();
    assert!(with(&swapped, None).contains("found slot 4 after"));
    let (mut altered, other) = (log[..5].to_vec(), ClusterId([8; 16]));
    altered[4].record.intent.digest = 8;
    assert!(with(&altered, Some(4)).contains("as in the checkpoint"));
    let mut writer = Writer::new(1);
    let mut bytes = writer.begin(&Header { cluster: other, ..header(&ledgers[7]) });
    bytes.extend([writer.config(""), writer.log(&log)].concat());
    bytes.extend(writer.end());
    assert!(complaint(&bytes).contains(&format!("expected cluster {other}")));
}

#[test]
fn a_length_that_promises_too_much_is_refused_before_it_is_read() {
    let mut bytes = pieces()[0][..10].to_vec();
    bytes.push(Kind::Header as u8);
    bytes.extend(u32::MAX.to_be_bytes());
    bytes.extend([0; 32]);
    assert_eq!(complaint(&bytes), "section header at byte 10 has 4294967295 bytes, expected at most 65536");
}
