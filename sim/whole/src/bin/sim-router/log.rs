//! A partition of a topic, with transactions as Kafka has them.
//!
//! Records of an open transaction have offsets, and nobody sees them, nor anything behind them; a marker, which has an offset
//! too, ends each transaction in each partition that it wrote to.

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The transaction goes on: nobody sees its records.
    Open,
    /// The transaction was committed: readers see its records.
    Committed,
    /// Its records are invisible for ever.
    Aborted,
}

/// One partition of a topic: records and markers in the order of their offsets.
pub struct Log<T> {
    base: i64,
    slots: Vec<LogSlot<T>>,
    /// Open transactions and their first offsets.
    open: Vec<(usize, i64)>,
}

enum LogSlot<T> {
    Marker,
    Record { record: T, transaction: Option<usize> },
}

impl<T> Log<T> {
    /// Returns a partition without records, whose first will have this offset.
    pub fn new(base: i64) -> Self {
        Self { base, slots: Vec::new(), open: Vec::new() }
    }

    /// Returns the lowest offset that the partition still holds.
    pub fn low(&self) -> i64 {
        self.base
    }

    /// Returns the offset after the last.
    pub fn high(&self) -> i64 {
        self.base + self.slots.len() as i64
    }

    /// Returns the last stable offset: readers stop before it.
    pub fn stable(&self) -> i64 {
        self.open.iter().map(|(_, first)| *first).min().unwrap_or(self.high())
    }

    /// Appends a record; returns its offset.
    pub fn append(&mut self, record: T, transaction: Option<usize>) -> i64 {
        let offset = self.high();
        if let Some(number) = transaction
            && self.open.iter().all(|(open, _)| *open != number)
        {
            self.open.push((number, offset));
        }
        self.slots.push(LogSlot::Record { record, transaction });
        offset
    }

    /// Appends a transaction's marker, if it wrote to this partition.
    pub fn end(&mut self, transaction: usize) {
        if let Some(place) = self.open.iter().position(|(open, _)| *open == transaction) {
            self.open.swap_remove(place);
            self.slots.push(LogSlot::Marker);
        }
    }

    /// Returns the first record, `from` this offset on, that a `read_committed` reader sees.
    pub fn next(&self, fates: &[Fate], from: i64) -> Option<(i64, &T)> {
        (from.max(self.base)..self.stable()).find_map(|offset| self.get(fates, offset).map(|record| (offset, record)))
    }

    /// Returns the first record, `from` this offset on, whether or not it is committed.
    pub fn next_uncommitted(&self, from: i64) -> Option<(i64, &T)> {
        (from.max(self.base)..self.high()).find_map(|offset| match self.slots.get((offset - self.base) as usize)? {
            LogSlot::Marker => None,
            LogSlot::Record { record, .. } => Some((offset, record)),
        })
    }

    /// Returns the record at an offset, if its transaction was committed.
    pub fn get(&self, fates: &[Fate], offset: i64) -> Option<&T> {
        match self.slots.get(usize::try_from(offset - self.base).ok()?)? {
            LogSlot::Marker => None,
            LogSlot::Record { record, transaction } => {
                transaction.is_none_or(|number| fates[number] == Fate::Committed).then_some(record)
            }
        }
    }

    /// Returns how many committed records there are in a range.
    pub fn count(&self, fates: &[Fate], from: i64, until: i64) -> u64 {
        (from..until).filter(|offset| self.get(fates, *offset).is_some()).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_stop_at_the_oldest_open_transaction_and_markers_have_offsets() {
        let mut log = Log::new(5);
        let mut fates = vec![Fate::Open, Fate::Open];
        assert_eq!(log.append('a', None), 5);
        assert_eq!(log.append('b', Some(0)), 6);
        assert_eq!(log.append('c', Some(1)), 7);
        assert_eq!(log.append('d', None), 8);
        assert_eq!((log.next(&fates, 0), log.next(&fates, 6), log.stable()), (Some((5, &'a')), None, 6));
        fates[0] = Fate::Aborted;
        log.end(0);
        assert_eq!((log.next(&fates, 6), log.stable(), log.high()), (None, 7, 10));
        fates[1] = Fate::Committed;
        log.end(1);
        assert_eq!((log.next(&fates, 6), log.next(&fates, 8)), (Some((7, &'c')), Some((8, &'d'))));
        assert_eq!((log.next(&fates, 9), log.stable(), log.count(&fates, 5, 11)), (None, 11, 3));
    }
}
