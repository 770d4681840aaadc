//! The audit: which records of the source are in which version's topic, as sets of their places.
//!
//! It knows nothing of how records were given out. Counts alone would call a record that is missing and one that is there
//! twice right; they are told too, for those who are used to them.

use std::fmt;

use serde::Serialize;

use crate::domain::side::Side;

/// Places of records named in findings, of each kind.
const EXAMPLES_MAX: usize = 10;

/// A set of offsets from some offset on.
#[derive(Debug, Clone, Default)]
struct Offsets(Vec<u64>);

impl Offsets {
    /// Adds an offset; returns false when it was there.
    fn add(&mut self, offset: u64) -> bool {
        let (word, bit) = ((offset / 64) as usize, 1 << (offset % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

/// A record's place in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct At {
    /// Partition of the source topic.
    pub partition: usize,
    /// Offset of the record in that partition.
    pub offset: i64,
}

/// Result of an audit: counts, and the first records of each kind that is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Number of source records that were compared.
    pub source: u64,
    /// Records that stable was given.
    pub stable: u64,
    /// Records that the canary was given, and that were not taken back.
    pub canary: u64,
    /// Records of the source that nobody was given.
    pub missing: u64,
    /// Copies of what isn't in the source, or twice in one topic.
    pub extra: u64,
    /// Records that both were given.
    pub both: u64,
    /// Some of those that are missing, extra or in both.
    pub examples: Vec<(&'static str, At)>,
}

impl Findings {
    /// Returns how much is wrong.
    pub fn violations(&self) -> u64 {
        self.missing + self.extra + self.both
    }

    fn example(&mut self, kind: &'static str, at: At) {
        if self.examples.iter().filter(|(other, _)| *other == kind).count() < EXAMPLES_MAX {
            self.examples.push((kind, at));
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, stable, canary, missing, extra, both, .. } = self;
        write!(f, "{missing} missing, {extra} extra, {both} in both; {source} = {stable} stable + {canary} canary")?;
        if *source != stable + canary {
            write!(f, " does not hold")?;
        }
        Ok(())
    }
}

/// An audit of the records that a router has read since some place.
#[derive(Debug)]
pub struct Audit {
    from: Vec<i64>,
    source: Vec<Offsets>,
    given: [Vec<Offsets>; 2],
    findings: Findings,
}

impl Audit {
    /// Returns an audit of the records from these offsets of the source on, one for each partition.
    pub fn new(from: Vec<i64>) -> Self {
        let none = vec![Offsets::default(); from.len()];
        Self { source: none.clone(), given: [none.clone(), none], from, findings: Findings::default() }
    }

    /// Adds a record of the source.
    pub fn source(&mut self, at: At) {
        if let Some(offset) = self.index(at) {
            self.findings.source += 1;
            self.source[at.partition].add(offset);
        }
    }

    /// Adds a copy that a version was given; `at` is what it says of itself, none when it says nothing that can be read.
    pub fn copy(&mut self, side: Side, at: Option<At>) {
        let count = match side {
            Side::Stable => &mut self.findings.stable,
            Side::Canary => &mut self.findings.canary,
        };
        *count += 1;
        let place = at.and_then(|at| Some((at, self.index(at)?)));
        let new = place.is_some_and(|(at, offset)| self.given[side as usize][at.partition].add(offset));
        if !new {
            self.findings.extra += 1;
            self.findings.example("extra", at.unwrap_or(At { partition: 0, offset: -1 }));
        }
    }

    fn index(&self, at: At) -> Option<u64> {
        u64::try_from(at.offset - self.from.get(at.partition)?).ok()
    }

    /// Returns what was found; everything that was added is complete.
    pub fn findings(&self) -> Findings {
        let mut findings = self.findings.clone();
        let [stable, canary] = &self.given;
        for (partition, source) in self.source.iter().enumerate() {
            let (stable, canary) = (&stable[partition], &canary[partition]);
            for word in 0..source.0.len().max(stable.0.len()).max(canary.0.len()) {
                let (source, stable, canary) = (source.word(word), stable.word(word), canary.word(word));
                let wrong = [
                    ("missing", source & !(stable | canary)),
                    ("extra", (stable | canary) & !source),
                    ("both", stable & canary),
                ];
                for (kind, bits) in wrong.into_iter().filter(|(_, bits)| *bits != 0) {
                    let count = u64::from(bits.count_ones());
                    match kind {
                        "missing" => findings.missing += count,
                        "extra" => findings.extra += count,
                        _ => findings.both += count,
                    }
                    let offset = self.from[partition] + word as i64 * 64 + i64::from(bits.trailing_zeros());
                    findings.example(kind, At { partition, offset });
                }
            }
        }
        findings
    }
}

/// Parses a header `TOPIC/PARTITION/OFFSET`; none if it is malformed.
pub fn read_source(header: &str) -> Option<At> {
    let mut parts = header.rsplitn(3, '/');
    let (offset, partition) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().map(|_| At { partition, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(partition: usize, offset: i64) -> At {
        At { partition, offset }
    }

    #[test]
    fn every_record_in_one_topic_is_all_there_is_to_find() {
        let mut audit = Audit::new(vec![1000, 5]);
        for offset in 0..200 {
            audit.source(at(0, 1000 + offset * 2));
            audit.copy(if offset % 3 == 0 { Side::Canary } else { Side::Stable }, Some(at(0, 1000 + offset * 2)));
        }
        let findings = audit.findings();
        assert_eq!(findings.violations(), 0);
        assert_eq!(findings.to_string(), "0 missing, 0 extra, 0 in both; 200 = 133 stable + 67 canary");
    }

    #[test]
    fn what_counts_would_not_see_is_found() {
        let mut audit = Audit::new(vec![0]);
        for offset in 0..4 {
            audit.source(at(0, offset));
        }
        for (side, offset) in [(Side::Stable, 0), (Side::Canary, 0), (Side::Stable, 1), (Side::Stable, 1)] {
            audit.copy(side, Some(at(0, offset)));
        }
        let findings = audit.findings();
        assert_eq!((findings.missing, findings.extra, findings.both), (2, 1, 1));
        assert_eq!(findings.source, findings.stable + findings.canary, "the counts alone are right");
        assert!(findings.examples.contains(&("missing", at(0, 2))));
    }

    #[test]
    fn copies_of_nothing_are_extra() {
        let mut audit = Audit::new(vec![10]);
        audit.source(at(0, 10));
        for place in [Some(at(0, 10)), Some(at(0, 11)), Some(at(0, 9)), Some(at(7, 10)), None] {
            audit.copy(Side::Stable, place);
        }
        assert_eq!((audit.findings().missing, audit.findings().extra), (0, 4));
    }

    #[test]
    fn a_place_is_read_from_its_header() {
        assert_eq!(read_source("orders.eu/3/17"), Some(at(3, 17)));
        for header in ["", "orders", "3/17", "orders/x/17", "orders/3/"] {
            assert_eq!(read_source(header), None, "{header}");
        }
    }
}
