//! How many bytes a transaction takes up: as many as the broker writes in time.
//!
//! Brokers with a quota answer late. A transaction that is too large for one times out, and the same work would be thrown away again
//! and again.

use std::time::Duration;

/// Most bytes of a transaction, keys and values together, before they are compressed.
const BYTES_MAX: usize = 32 << 20;
/// Fewest bytes that a transaction is bounded to: one record goes through at any bound.
const BYTES_MIN: usize = 16 << 10;
/// A transaction that takes this long to write is near the client's time-out of 10 s.
const SLOW: Duration = Duration::from_secs(3);
/// A transaction that takes no longer to write could have been larger.
const FAST: Duration = Duration::from_secs(1);

/// Bound of a transaction's bytes; it falls by half and rises by double.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPace {
    bytes: usize,
}

impl Default for BatchPace {
    fn default() -> Self {
        Self { bytes: BYTES_MAX }
    }
}

impl BatchPace {
    /// Returns how many bytes the next transaction may take up; its last record may exceed that.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// Hears that so many bytes were written and committed within `took`.
    pub fn done(&mut self, bytes: usize, took: Duration) {
        if took >= SLOW {
            self.halve(bytes);
        } else if took <= FAST && bytes >= self.bytes {
            self.bytes = (self.bytes * 2).min(BYTES_MAX);
        }
    }

    /// Hears that so many bytes were not written in time.
    pub fn late(&mut self, bytes: usize) {
        self.halve(bytes);
    }

    fn halve(&mut self, bytes: usize) {
        self.bytes = (self.bytes.min(bytes) / 2).max(BYTES_MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_timed_out_is_halved_until_it_goes_through_and_grows_again() {
        let mut pace = BatchPace::default();
        pace.late(10 << 20);
        assert_eq!(pace.bytes(), 5 << 20, "half of what was too much, not of what was allowed");
        pace.done(5 << 20, Duration::from_secs(4));
        assert_eq!(pace.bytes(), 5 << 19);
        pace.done(5 << 19, Duration::from_secs(2));
        assert_eq!(pace.bytes(), 5 << 19, "neither slow nor fast");
        pace.done(1000, Duration::from_millis(5));
        assert_eq!(pace.bytes(), 5 << 19, "a small one says nothing of large ones");
        for _ in 0..10 {
            pace.done(BYTES_MAX, Duration::from_millis(500));
        }
        assert_eq!(pace.bytes(), BYTES_MAX);
        for _ in 0..30 {
            pace.late(0);
        }
        assert_eq!(pace.bytes(), BYTES_MIN);
    }
}
