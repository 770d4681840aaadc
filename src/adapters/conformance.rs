//! What every store must do, as one test for all of them.

use crate::domain::ids::{ClusterId, Incarnation, NodeId, TxId};
use crate::domain::time::Wall;
use crate::ports::Store;
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{
    AcceptorState, Ballot, Chosen, Hash, Initiator, Intent, Members, Operation, Record, SeenDisk, Slot,
};

/// A kind of store whose content outlives the process that wrote it.
pub(crate) trait StoreUnderTest: Sized {
    type Store: Store;
    /// Makes the durable content of a node that never ran.
    fn create(acceptor: &AcceptorState, genesis: &Chosen) -> Self;
    /// Starts a process on it.
    fn open(&mut self) -> Found<Self::Store>;
    /// Ends the process that holds the store.
    fn close(&mut self, store: Self::Store);
}

/// Content of the store at the start of a process.
pub(crate) struct Found<S> {
    pub store: S,
    pub acceptor: Option<AcceptorState>,
    pub ledger: Ledger,
    pub log: Vec<Chosen>,
}

/// Checks the contract of [`Store`].
pub(crate) fn check<S: StoreUnderTest>() {
    let log = chain(60);
    let genesis = Ledger::new(&log[0]).unwrap();
    let mut subject = S::create(&acceptor(1, 0), &log[0]);
    let mut found = subject.open();
    assert_eq!((found.acceptor, &found.ledger, found.log), (Some(acceptor(1, 0)), &genesis, vec![]), "a fresh node");

    let reader = found.store.reader();
    assert_eq!(reader.read(Slot(0), 9).unwrap(), log[..1]);
    assert_eq!(reader.checkpoint().unwrap(), None);
    for (chosen, boot) in log[1..40].iter().zip(2..) {
        found.store.append(chosen).unwrap();
        let seen = reader.read(chosen.record.slot, 9).unwrap();
        assert_eq!(seen, std::slice::from_ref(chosen), "readers see appended records at once");
        if boot % 3 == 0 {
            found.store.persist(&acceptor(boot, chosen.record.slot.0)).unwrap();
        }
    }
    found.store.persist(&acceptor(99, 39)).unwrap();
    assert_eq!(reader.read(Slot(7), 5).unwrap(), log[7..12]);
    assert_eq!(reader.read(Slot(40), 5).unwrap(), []);
    assert_eq!(reader.read(Slot(0), 0).unwrap(), []);
    drop(reader);
    subject.close(found.store);

    let found = subject.open();
    let expected = (Some(acceptor(99, 39)), &genesis, log[1..40].to_vec());
    assert_eq!((found.acceptor, &found.ledger, found.log), expected, "what was persisted survives");
    assert_eq!(found.store.reader().read(Slot(0), 100).unwrap(), log[..40]);
    subject.close(found.store);

    check_checkpoints(&mut subject, &log);
}

fn check_checkpoints<S: StoreUnderTest>(subject: &mut S, log: &[Chosen]) {
    let mut found = subject.open();
    let summed = sum(&log[..40]);
    found.store.checkpoint(&Checkpoint::of(&summed).unwrap(), Slot(30)).unwrap();
    let reader = found.store.reader();
    assert_eq!(reader.checkpoint().unwrap(), Some(Checkpoint::of(&summed).unwrap()));
    assert_eq!(reader.read(Slot(0), 3).unwrap(), log[30..33], "what is gone is gone");
    found.store.append(&log[40]).unwrap();
    found.store.persist(&acceptor(100, 40)).unwrap();
    drop(reader);
    subject.close(found.store);

    let mut found = subject.open();
    let expected = (Some(acceptor(100, 40)), &summed, log[40..41].to_vec());
    assert_eq!((found.acceptor, &found.ledger, found.log), expected, "a node starts from its checkpoint");
    assert_eq!(found.store.reader().read(Slot(29), 100).unwrap(), log[30..41]);

    let summed = sum(&log[..51]);
    found.store.install(&Checkpoint::of(&summed).unwrap()).unwrap();
    assert_eq!(found.store.reader().read(Slot(0), 100).unwrap(), []);
    found.store.append(&log[51]).unwrap();
    found.store.append(&log[52]).unwrap();
    found.store.persist(&acceptor(101, 52)).unwrap();
    subject.close(found.store);

    let found = subject.open();
    let expected = (Some(acceptor(101, 52)), &summed, log[51..53].to_vec());
    assert_eq!((found.acceptor, &found.ledger, found.log), expected, "a peer's checkpoint takes the log's place");
    assert_eq!(found.store.reader().read(Slot(0), 100).unwrap(), log[51..53]);
    subject.close(found.store);
}

/// Returns the sum of a log.
pub(crate) fn sum(log: &[Chosen]) -> Ledger {
    let mut ledger = Ledger::new(&log[0]).unwrap();
    log[1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    ledger
}

/// Returns a log of `length` records.
pub(crate) fn chain(length: u64) -> Vec<Chosen> {
    chain_of(length, 100)
}

/// Returns a log whose records have about `bytes` each.
pub(crate) fn chain_of(length: u64, bytes: usize) -> Vec<Chosen> {
    let mut prev_hash = Hash::default();
    let chosen = |slot| {
        let operation = match slot {
            0 => Operation::Genesis { cluster: ClusterId([7; 16]), members: Members::default() },
            _ => Operation::Refused { service: None, refused: "Start".into(), reasons: vec!["x".repeat(bytes)] },
        };
        let intent = Intent {
            initiator: Initiator::Client,
            tx: TxId::new(format!("tx-{slot}")).unwrap(),
            actor: "test".into(),
            digest: slot,
            at: Wall(slot),
            operation,
        };
        let record = Record { slot: Slot(slot), prev_hash, intent, state: None, phase: None, certificate: None };
        prev_hash = record.hash();
        Chosen { ballot: (slot > 0).then(|| ballot(slot)), decided_at: Wall(slot), record }
    };
    (0..length).map(chosen).collect()
}

/// Returns promises that `boot` tells from all others.
pub(crate) fn acceptor(boot: u64, head: u64) -> AcceptorState {
    AcceptorState {
        cluster: ClusterId([7; 16]),
        node: NodeId::new("a").unwrap(),
        incarnation: Incarnation(1),
        boot,
        promised: Some(ballot(boot)),
        accepted: None,
        head: Slot(head),
        head_hash: Hash([head as u8; 32]),
        writes: boot,
        seen: [(NodeId::new("b").unwrap(), SeenDisk { incarnation: Incarnation(2), writes: head })].into(),
    }
}

fn ballot(round: u64) -> Ballot {
    Ballot { round, node: NodeId::new("a").unwrap(), incarnation: Incarnation(1), boot: 1 }
}
