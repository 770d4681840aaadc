//! A store without a disk, for tests and simulations, that knows what a power cut would leave of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::domain::ids::ServiceId;
use crate::ports::{LogReader, RunStore, Store, StoreError};
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{AcceptorState, Chosen, SavedRun, Slot};

/// A store in memory; clones are handles of the same one.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Contents>>);

/// Content of a store in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Acceptor state; none before the first write.
    pub acceptor: Option<AcceptorState>,
    /// Newest checkpoint; none before the first one.
    pub checkpoint: Option<Checkpoint>,
    /// The records that are kept: from genesis on, or around the checkpoint.
    pub log: Vec<Chosen>,
    /// Saved analysis runs, by service.
    pub runs: BTreeMap<ServiceId, SavedRun>,
    /// How many records the last persist covered.
    durable: usize,
}

impl Contents {
    /// Returns what a node starts from: the ledger and the records after it. Panics on an empty store.
    pub fn recovered(&self) -> (Ledger, &[Chosen]) {
        let ledger = match &self.checkpoint {
            Some(checkpoint) => checkpoint.ledger().expect("a checkpoint that was kept"),
            None => Ledger::new(&self.log[0]).expect("a log begins with its genesis"),
        };
        let after = self.log.partition_point(|chosen| chosen.record.slot <= ledger.head);
        (ledger, &self.log[after..])
    }

    fn next(&self) -> Slot {
        let newest = self.log.last().map(|chosen| chosen.record.slot);
        newest.max(self.checkpoint.as_ref().map(|checkpoint| checkpoint.slot)).map_or(Slot(0), Slot::next)
    }
}

impl MemoryStore {
    /// Returns a store that holds what an earlier one left, all of it durable.
    pub fn new(acceptor: Option<AcceptorState>, log: Vec<Chosen>) -> Self {
        Self::of(Contents { acceptor, log, ..Contents::default() })
    }

    /// Returns a store with these contents, all of them durable.
    pub fn of(contents: Contents) -> Self {
        let durable = contents.log.len();
        Self(Arc::new(Mutex::new(Contents { durable, ..contents })))
    }

    /// Returns what survives a power cut at this moment: the acceptor state as last persisted, the records appended
    /// before
    /// that, and the first `keep_unsynced` of those appended after.
    pub fn survivors(&self, keep_unsynced: usize) -> Contents {
        let mut contents = self.contents().clone();
        contents.log.truncate(contents.durable.saturating_add(keep_unsynced));
        contents.durable = contents.log.len();
        contents
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().expect("nothing panics while it holds the contents")
    }
}

impl Store for MemoryStore {
    fn persist(&mut self, acceptor: &AcceptorState) -> Result<(), StoreError> {
        let mut contents = self.contents();
        contents.acceptor = Some(acceptor.clone());
        contents.durable = contents.log.len();
        Ok(())
    }

    fn append(&mut self, chosen: &Chosen) -> Result<(), StoreError> {
        let mut contents = self.contents();
        assert_eq!(chosen.record.slot, contents.next(), "the log grows by the record of the next slot");
        contents.log.push(chosen.clone());
        Ok(())
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint, keep_from: Slot) -> Result<(), StoreError> {
        let mut contents = self.contents();
        assert_eq!(checkpoint.slot.next(), contents.next(), "a checkpoint covers the whole log");
        contents.log.retain(|chosen| chosen.record.slot >= keep_from);
        contents.durable = contents.log.len();
        contents.checkpoint = Some(checkpoint.clone());
        Ok(())
    }

    fn install(&mut self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let mut contents = self.contents();
        assert!(checkpoint.slot >= contents.next(), "an installed checkpoint goes beyond the log");
        contents.log.clear();
        contents.durable = 0;
        contents.checkpoint = Some(checkpoint.clone());
        Ok(())
    }

    fn reader(&self) -> Arc<dyn LogReader> {
        Arc::new(self.clone())
    }
}

impl RunStore for MemoryStore {
    fn save(&mut self, service: &ServiceId, run: Option<Box<SavedRun>>) {
        let runs = &mut self.contents().runs;
        match run {
            Some(run) => drop(runs.insert(service.clone(), *run)),
            None => drop(runs.remove(service)),
        }
    }
}

impl LogReader for MemoryStore {
    fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError> {
        let contents = self.contents();
        let first = contents.log.partition_point(|chosen| chosen.record.slot < from);
        Ok(contents.log[first..].iter().take(most).cloned().collect())
    }

    fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError> {
        Ok(self.contents().checkpoint.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::conformance::{self, Found, StoreUnderTest, acceptor, chain};

    #[derive(Default)]
    struct Memory {
        left: Contents,
    }

    impl StoreUnderTest for Memory {
        type Store = MemoryStore;

        fn create(acceptor: &AcceptorState, genesis: &Chosen) -> Self {
            let (acceptor, log) = (Some(acceptor.clone()), vec![genesis.clone()]);
            Self { left: Contents { acceptor, log, ..Contents::default() } }
        }

        fn open(&mut self) -> Found<MemoryStore> {
            let (ledger, log) = self.left.recovered();
            let (acceptor, log) = (self.left.acceptor.clone(), log.to_vec());
            Found { store: MemoryStore::of(self.left.clone()), acceptor, ledger, log }
        }

        fn close(&mut self, store: MemoryStore) {
            self.left = store.survivors(0);
        }
    }

    #[test]
    fn the_memory_store_keeps_the_contract() {
        conformance::check::<Memory>();
    }

    #[test]
    fn a_power_cut_takes_what_no_persist_covered() {
        let log = chain(5);
        let mut store = MemoryStore::new(Some(acceptor(1, 0)), log[..1].to_vec());
        store.append(&log[1]).unwrap();
        store.persist(&acceptor(2, 1)).unwrap();
        store.append(&log[2]).unwrap();
        store.append(&log[3]).unwrap();
        let left = store.survivors(0);
        assert_eq!((left.acceptor, left.log), (Some(acceptor(2, 1)), log[..2].to_vec()));
        assert_eq!(store.survivors(1).log, log[..3]);
        assert_eq!(store.survivors(usize::MAX).log, log[..4]);
    }
}
