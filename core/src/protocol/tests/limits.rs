//! What the ledger holds stays small enough to be read back.

use super::*;
use crate::domain::limits::{RECORD_BYTES_MAX, SERVICES_MAX, SPECS_BYTES_MAX};
use crate::domain::rollout::Change;
use crate::domain::routing::RoutingState;
use crate::protocol::checkpoint::CHECKPOINT_BYTES_MAX;
use crate::protocol::ledger::RecordError;
use crate::protocol::record::Certificate;

/// Returns a rollout of service `s{number}` with a note of so many bytes.
fn asking(number: usize, bytes: usize) -> Arc<Manifest> {
    let mut spec = fixtures::rollout(&[fixtures::held(10_000, 0)], fixtures::by_query());
    spec.service = ServiceId::new(format!("s{number}")).unwrap();
    spec.annotations.insert("note".into(), "x".repeat(bytes));
    Arc::new(spec.checked().unwrap())
}

pub(super) fn start(ledger: &Ledger, number: usize, bytes: usize) -> (Intent, Result<Record, RecordError>) {
    let spec = asking(number, bytes);
    let tx = TxId::new(format!("t{}", ledger.head)).unwrap();
    let operation = Operation::Change(spec.service.clone(), Change::Start(spec));
    let intent = Intent { initiator: Initiator::Client, tx, actor: "alice".into(), digest: 0, at: Wall(0), operation };
    (intent.clone(), ledger.next_record(intent, None))
}

/// Adds a chosen record as it comes from a peer or from disk.
pub(super) fn add(ledger: &mut Ledger, mut record: Record) {
    let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
    let yes = ["a", "b", "c"].map(|name| (node(name), "healthy".to_string())).into();
    record.certificate = Some(Certificate { ballot: ballot.clone(), yes });
    ledger.check_proposal(&record).unwrap();
    ledger.apply(&Chosen { ballot: Some(ballot), decided_at: Wall(0), record }).unwrap();
}

#[test]
fn a_rollout_that_would_make_the_ledger_unreadable_is_refused_by_proposer_and_voter() {
    let mut ledger = Ledger::new(&genesis()).unwrap();
    let mut number = 0;
    let refused = loop {
        match start(&ledger, number, 23 << 10).1 {
            Ok(record) => add(&mut ledger, record),
            Err(error) => break error,
        }
        number += 1;
        assert!(number < 2_000, "nothing was refused: the ledger has {} bytes", codec::encode(&ledger).len());
    };
    let found = match &refused {
        RecordError::Bytes { found } => *found,
        other => panic!("refused for {other}"),
    };
    assert!(found > SPECS_BYTES_MAX && found < SPECS_BYTES_MAX + (1 << 16), "{found} bytes");
    assert!(refused.to_string().contains(&format!("{found} bytes, expected at most {SPECS_BYTES_MAX}")), "{refused}");

    let checkpoint = Checkpoint::of(&ledger).unwrap();
    let mut again = checkpoint.ledger().unwrap();
    assert_eq!(again, ledger, "what is counted is known of a checkpoint too");
    // A voter holds a proposal to it, too, but not what is chosen already.
    let (_, record) = start(&Ledger::new(&genesis()).unwrap(), number, 23 << 10);
    let yes = ["a", "b", "c"].map(|name| (node(name), "healthy".to_string())).into();
    let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
    let certificate = Some(Certificate { ballot: ballot.clone(), yes });
    let record = Record { slot: again.head.next(), prev_hash: again.head_hash, certificate, ..record.unwrap() };
    let intent = Intent { tx: TxId::new("late").unwrap(), ..record.intent.clone() };
    let state = record.state.clone().map(|state| RoutingState { txid: intent.tx.clone(), ..state });
    let record = Record { intent, state, ..record };
    assert_eq!(again.check_proposal(&record), Err(RecordError::Bytes { found }));
    again.apply(&Chosen { ballot: Some(ballot), decided_at: Wall(0), record }).unwrap();
    // Too much is there already, but a rollout that needs less than the one before it may start.
    let rollback = Operation::Change(asking(0, 1).service.clone(), Change::Rollback { reason: "test".into() });
    let intent = Intent {
        initiator: Initiator::Client,
        tx: TxId::new("back").unwrap(),
        actor: "alice".into(),
        digest: 0,
        at: Wall(0),
        operation: rollback,
    };
    let record = again.next_record(intent, None).unwrap();
    again.apply(&Chosen { ballot: None, decided_at: Wall(0), record }).unwrap();
    let smaller = start(&again, 0, 10).1;
    assert!(smaller.is_ok(), "{smaller:?}");
}

#[test]
fn a_service_beyond_the_most_is_refused() {
    let mut ledger = Ledger::new(&genesis()).unwrap();
    for number in 0..SERVICES_MAX {
        let record = start(&ledger, number, 1).1.unwrap();
        add(&mut ledger, record);
    }
    let refused = start(&ledger, SERVICES_MAX, 1).1.unwrap_err();
    let expected = "service s10000 would be one of 10001 services, expected at most 10000";
    assert_eq!(refused.to_string(), expected);
    assert!(codec::encode(&ledger).len() < CHECKPOINT_BYTES_MAX / 2);
}

#[test]
fn a_ledger_that_could_not_be_read_back_is_no_checkpoint() {
    let mut ledger = Ledger::new(&genesis()).unwrap();
    let record = start(&ledger, 0, 1).1.unwrap();
    add(&mut ledger, record);
    let service_state = ledger.services.values_mut().next().unwrap();
    service_state.service.rollout.reason = "x".repeat(CHECKPOINT_BYTES_MAX);
    let refused = Checkpoint::of(&ledger).unwrap_err().to_string();
    assert!(refused.ends_with(&format!("bytes, expected at most {CHECKPOINT_BYTES_MAX}")), "{refused}");
}

#[test]
fn a_record_that_could_not_be_sent_is_refused_by_proposer_and_voter() {
    let ledger = Ledger::new(&genesis()).unwrap();
    let (mut intent, record) = start(&ledger, 0, 1);
    let bytes = codec::encode(&record.unwrap()).len();
    // What nothing else bounds, to the byte; its length takes two bytes more than the short one's did.
    intent.actor = "x".repeat(RECORD_BYTES_MAX - bytes + intent.actor.len() - 2);
    let record = ledger.next_record(intent.clone(), None).unwrap();
    assert_eq!(codec::encode(&record).len(), RECORD_BYTES_MAX);
    intent.actor.push('x');
    let refused = ledger.next_record(intent.clone(), None).unwrap_err();
    assert_eq!(refused, RecordError::Record { found: RECORD_BYTES_MAX + 1 });
    // The one that fits has no room for its certificate.
    let yes: BTreeMap<_, _> = ["a", "b", "c"].map(|name| (node(name), "healthy".to_string())).into();
    let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
    let record = Record { certificate: Some(Certificate { ballot, yes }), ..record };
    assert!(matches!(ledger.check_proposal(&record), Err(RecordError::Record { found }) if found > RECORD_BYTES_MAX));
}
