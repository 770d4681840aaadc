//! A store without a disk, for tests and simulations, that knows what a power cut would leave of it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::ports::{LogReader, Store, StoreError};
use crate::protocol::record::{Chosen, Register, Slot};

/// A store in memory; clones are handles of the same one.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    register: Option<Register>,
    log: Vec<Chosen>,
    /// How many records the last persist covered.
    durable: usize,
}

impl MemoryStore {
    /// Returns a store that holds what an earlier one left, all of it durable.
    pub fn new(register: Option<Register>, log: Vec<Chosen>) -> Self {
        let durable = log.len();
        Self(Arc::new(Mutex::new(Contents { register, log, durable })))
    }

    /// Returns what survives a power cut at this moment: the register as last persisted, the records appended before
    /// that, and the first `keep_unsynced` of those appended after.
    pub fn survivors(&self, keep_unsynced: usize) -> (Option<Register>, Vec<Chosen>) {
        let contents = self.contents();
        let kept = contents.durable.saturating_add(keep_unsynced).min(contents.log.len());
        (contents.register.clone(), contents.log[..kept].to_vec())
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().expect("nothing panics while it holds the contents")
    }
}

impl Store for MemoryStore {
    fn persist(&mut self, register: &Register) -> Result<(), StoreError> {
        let mut contents = self.contents();
        contents.register = Some(register.clone());
        contents.durable = contents.log.len();
        Ok(())
    }

    fn append(&mut self, chosen: &Chosen) -> Result<(), StoreError> {
        let next = Slot(self.contents().log.len() as u64);
        assert_eq!(chosen.record.slot, next, "the log grows by the record of the next slot");
        self.contents().log.push(chosen.clone());
        Ok(())
    }

    fn reader(&self) -> Arc<dyn LogReader> {
        Arc::new(self.clone())
    }
}

impl LogReader for MemoryStore {
    fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError> {
        let from = usize::try_from(from.0).unwrap_or(usize::MAX);
        Ok(self.contents().log.iter().skip(from).take(most).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::conformance::{self, Subject, chain, register};

    #[derive(Default)]
    struct Memory {
        left: (Option<Register>, Vec<Chosen>),
    }

    impl Subject for Memory {
        type Store = MemoryStore;

        fn create(register: &Register, genesis: &Chosen) -> Self {
            Self { left: (Some(register.clone()), vec![genesis.clone()]) }
        }

        fn open(&mut self) -> (MemoryStore, Option<Register>, Vec<Chosen>) {
            let (register, log) = self.left.clone();
            (MemoryStore::new(register.clone(), log.clone()), register, log)
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
        let mut store = MemoryStore::new(Some(register(1, 0)), log[..1].to_vec());
        store.append(&log[1]).unwrap();
        store.persist(&register(2, 1)).unwrap();
        store.append(&log[2]).unwrap();
        store.append(&log[3]).unwrap();
        assert_eq!(store.survivors(0), (Some(register(2, 1)), log[..2].to_vec()));
        assert_eq!(store.survivors(1).1, log[..3]);
        assert_eq!(store.survivors(usize::MAX).1, log[..4]);
    }
}
