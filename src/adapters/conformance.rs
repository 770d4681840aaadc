//! What every store must do, as one test for all of them.

use crate::domain::ids::{ClusterId, Incarnation, NodeId, TxId};
use crate::domain::time::Wall;
use crate::ports::Store;
use crate::protocol::record::{Act, Ballot, Chosen, Hash, Intent, Membership, Record, Register, Slot};

/// A kind of store whose content outlives the process that wrote it.
pub(crate) trait Subject: Sized {
    type Store: Store;
    /// Makes the durable content of a node that never ran.
    fn create(register: &Register, genesis: &Chosen) -> Self;
    /// Starts a process on it.
    fn open(&mut self) -> (Self::Store, Option<Register>, Vec<Chosen>);
    /// Ends that process.
    fn close(&mut self, store: Self::Store);
}

/// Checks the contract of [`Store`].
pub(crate) fn check<S: Subject>() {
    let log = chain(40);
    let mut subject = S::create(&register(1, 0), &log[0]);
    let (mut store, promises, found) = subject.open();
    assert_eq!((promises, found), (Some(register(1, 0)), log[..1].to_vec()), "a fresh node holds genesis");

    let reader = store.reader();
    for (chosen, boot) in log[1..].iter().zip(2..) {
        store.append(chosen).unwrap();
        let seen = reader.read(chosen.record.slot, 9).unwrap();
        assert_eq!(seen, std::slice::from_ref(chosen), "readers see appended records at once");
        if boot % 3 == 0 {
            store.persist(&register(boot, chosen.record.slot.0)).unwrap();
        }
    }
    store.persist(&register(99, 39)).unwrap();
    assert_eq!(reader.read(Slot(7), 5).unwrap(), log[7..12]);
    assert_eq!(reader.read(Slot(40), 5).unwrap(), []);
    assert_eq!(reader.read(Slot(0), 0).unwrap(), []);
    drop(reader);
    subject.close(store);

    let (store, promises, found) = subject.open();
    assert_eq!((promises, found), (Some(register(99, 39)), log.clone()), "what was persisted survives");
    assert_eq!(store.reader().read(Slot(0), 100).unwrap(), log);
    subject.close(store);
}

/// Returns a log of `length` records.
pub(crate) fn chain(length: u64) -> Vec<Chosen> {
    chain_of(length, 100)
}

/// Returns a log whose records have about `bytes` each.
pub(crate) fn chain_of(length: u64, bytes: usize) -> Vec<Chosen> {
    let mut prev_hash = Hash::default();
    let chosen = |slot| {
        let act = match slot {
            0 => Act::Genesis { cluster: ClusterId([7; 16]), members: Membership::default() },
            _ => Act::Abort { service: None, refused: "Start".into(), reasons: vec!["x".repeat(bytes)] },
        };
        let intent = Intent { tx: TxId::new(format!("tx-{slot}")).unwrap(), digest: slot, at: Wall(slot), act };
        let record = Record { slot: Slot(slot), prev_hash, intent, state: None, certificate: None };
        prev_hash = record.hash();
        Chosen { ballot: (slot > 0).then(|| ballot(slot)), record }
    };
    (0..length).map(chosen).collect()
}

/// Returns promises that `boot` tells from all others.
pub(crate) fn register(boot: u64, head: u64) -> Register {
    Register {
        cluster: ClusterId([7; 16]),
        node: NodeId::new("a").unwrap(),
        incarnation: Incarnation(1),
        boot,
        promised: Some(ballot(boot)),
        accepted: None,
        head: Slot(head),
        head_hash: Hash([head as u8; 32]),
    }
}

fn ballot(round: u64) -> Ballot {
    Ballot { round, node: NodeId::new("a").unwrap(), incarnation: Incarnation(1), boot: 1 }
}
