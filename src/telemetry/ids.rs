//! The ids of events that were counted lately.

use xxhash_rust::xxh3::xxh3_64;

/// Ids that are remembered, to know an event that comes again: lines of as many as share a cache line.
const ID_LINES: usize = 1 << 16;
const IDS_IN_LINE: usize = 16;
/// Value of an event without an id, and of an empty place.
pub(super) const NO_ID: u64 = 0;

/// The last million ids, by their hashes: each may be in one line only, where it takes the oldest one's place. The low bits of a
/// hash tell the line, and what is kept there are the high ones: of 10^9 events, four are taken for others.
pub(super) struct Ids(Box<[[u32; IDS_IN_LINE]]>);

impl Default for Ids {
    fn default() -> Self {
        Self(vec![[0; IDS_IN_LINE]; ID_LINES].into())
    }
}

impl Ids {
    /// Returns what an id is remembered by.
    pub fn hash(id: &[u8]) -> u64 {
        if id.is_empty() { NO_ID } else { xxh3_64(id).max(NO_ID + 1) }
    }

    /// Brings the lines of these ids near: each is somewhere else in memory, and all are waited for at once.
    pub fn fetch(&self, ids: impl Iterator<Item = u64>) {
        let near = ids.filter(|id| *id != NO_ID).fold(0, |sum, id| sum ^ self.0[id as usize % ID_LINES][0]);
        std::hint::black_box(near);
    }

    /// Returns true the first time that this id comes.
    pub fn is_new(&mut self, id: u64) -> bool {
        let (line, kept) = (&mut self.0[id as usize % ID_LINES], ((id >> 32) as u32).max(1));
        // All are looked at, at once.
        if line.iter().fold(false, |found, other| found | (*other == kept)) {
            return false;
        }
        line.copy_within(..IDS_IN_LINE - 1, 1);
        line[0] = kept;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_once_and_again_when_it_is_long_forgotten() {
        let mut ids = Ids::default();
        assert!(ids.is_new(7) && !ids.is_new(7));
        assert_eq!((Ids::hash(b""), Ids::hash(b"a") == Ids::hash(b"b")), (NO_ID, false));
        let found = (2..=1 + IDS_IN_LINE as u64).filter(|i| ids.is_new(7 + (i << 32))).count();
        assert_eq!((found, ids.is_new(7)), (IDS_IN_LINE, true));
        let many = (0..500_000u64).filter(|i| ids.is_new(xxh3_64(&i.to_le_bytes()))).count();
        let again = (400_000..500_000u64).filter(|i| !ids.is_new(xxh3_64(&i.to_le_bytes()))).count();
        assert!(many == 500_000 && again == 100_000, "{many} {again}");
    }
}
