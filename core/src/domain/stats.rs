//! Mergeable statistics of one version's answers: counts, errors, latency.

use std::ops::{AddAssign, SubAssign};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::classes::ClassCounts;

/// Factor between two neighbouring bins: 3 %. A tolerance on latency is a whole number of bins, so that moving a histogram
/// by it is exact.
pub const BIN_RATIO: f64 = 1.03;
/// Upper edge of the first bin, in microseconds: 250 × 1.03^-98.
pub const FIRST_US: f64 = 13.800_409_949_271_673;
/// Number of bins of a latency histogram: up to 13.8 µs × 1.03^545 = 137 s; slower answers share the last one.
pub const BINS: usize = 546;
/// Sums stay below this, so that adding a few of them can't overflow.
const SUM_MAX: u64 = 1 << 60;

/// Returns the bin of a latency in microseconds, `0..BINS`.
pub fn bin_of(latency_us: u64) -> usize {
    let us = latency_us.min(Edges::MAX_US) as u32;
    let bin = usize::from(EDGES.bins[Edges::cell(us)]);
    bin + usize::from(us >= EDGES.ends[bin])
}

/// The same, by the bins' definition: a logarithm for each answer.
fn bin_by_logarithm(latency_us: u64) -> usize {
    let latency = latency_us as f64;
    if latency < FIRST_US {
        return 0;
    }
    let bin = 1.0 + (latency / FIRST_US).ln() * (1.0 / 0.029_558_802_241_544_4);
    (bin as usize).min(BINS - 1)
}

/// Where bins begin. Time is cut into cells of a whole number below 128 µs, and of 1/64 of an octave from there, so that none
/// has more than one edge within it: the bin that a cell begins in and the next one's first latency tell the bin.
struct Edges {
    /// The bin of the first latency of each cell.
    bins: [u16; Self::CELLS],
    /// The first latency, in microseconds, that is in a later bin.
    ends: [u32; BINS],
}

static EDGES: LazyLock<Edges> = LazyLock::new(Edges::new);

impl Edges {
    /// Every latency from here on is in the last bin.
    const MAX_US: u64 = (1 << 28) - 1;
    const CELLS: usize = 1 + Self::cell(Self::MAX_US as u32);

    const fn cell(us: u32) -> usize {
        let octave = 25 - (us | 64).leading_zeros();
        ((octave << 6) + (us >> octave)) as usize
    }

    fn new() -> Self {
        let ends = std::array::from_fn(|bin| {
            let about = (FIRST_US * BIN_RATIO.powf(bin as f64)) as u32;
            let end = (about - 1..about + 2).find(|us| bin_by_logarithm(u64::from(*us)) > bin);
            end.unwrap_or(u32::MAX)
        });
        let bins = std::array::from_fn(|cell| {
            let octave = (cell / 64).saturating_sub(1);
            bin_by_logarithm(((cell - octave * 64) as u64) << octave) as u16
        });
        Self { bins, ends }
    }
}

static MIDDLES_US: LazyLock<Vec<u64>> =
    LazyLock::new(|| (0..BINS).map(|bin| (FIRST_US * BIN_RATIO.powf(bin as f64 - 0.5)) as u64).collect());

/// Returns the latency in microseconds in the middle of a bin: within 1.5 % of any in it.
pub fn middle_us(bin: usize) -> u64 {
    MIDDLES_US[bin]
}

/// Counts of one version's answers. Adding two is exact, in any order: three nodes' sums are what one node that saw
/// everything would have counted.
///
/// Decoding checks what counting keeps by itself (see [`StatsError`]): unsound statistics of a peer or a disk are no value.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "StatsParts")]
pub struct Stats {
    /// Number of answers, errors among them.
    pub count: u64,
    /// Answers that were errors (5xx, time-outs, connections refused or broken).
    pub errors: u64,
    /// Sum of all answers' latencies, in microseconds.
    pub latency_sum_us: u64,
    /// Answers that were no errors by latency: (bin, answers), ascending, without zeros; see [`bin_of`]. Errors are often
    /// fast, and must not make a version look so.
    histogram: Vec<(u16, u32)>,
    /// Answers of classes that are no errors by themselves. Encoded beside the rest (see
    /// [`crate::protocol::message::ClassEvidence`]): not every build counts them.
    #[serde(skip)]
    pub classes: ClassCounts,
}

/// The parts of [`Stats`] as they are decoded, which may contradict each other.
#[derive(Deserialize)]
struct StatsParts {
    count: u64,
    errors: u64,
    latency_sum_us: u64,
    histogram: Vec<(u16, u32)>,
}

impl TryFrom<StatsParts> for Stats {
    type Error = StatsError;

    fn try_from(StatsParts { count, errors, latency_sum_us, histogram }: StatsParts) -> Result<Self, StatsError> {
        let stats = Self { count, errors, latency_sum_us, histogram, classes: ClassCounts::default() };
        stats.check().map(|()| stats)
    }
}

/// What is wrong with statistics that no counting leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StatsError {
    /// A bin is out of range or out of order, or counts nothing.
    #[error("{answers} answers in bin {bin}, expected at least one, in bins below {BINS} that ascend")]
    Bin {
        /// Number of the bin, expected below [`BINS`].
        bin: u16,
        /// Answers in that bin, expected above 0.
        answers: u32,
    },
    /// The parts don't add up.
    #[error("{count} answers, expected {errors} errors and those in bins, {binned}")]
    Count {
        /// Number of answers that the statistics claim.
        count: u64,
        /// Number of errors that they claim.
        errors: u64,
        /// Sum of the answers in their bins.
        binned: u64,
    },
    /// Latency without an answer, or sums that adding to could overflow.
    #[error("{count} answers took {latency_sum_us} µs in all, expected both below 2^60, and no time without answers")]
    Sum {
        /// Number of answers that the statistics claim.
        count: u64,
        /// Sum of their latencies, in microseconds.
        latency_sum_us: u64,
    },
}

impl Stats {
    /// Returns statistics from raw counters; `histogram` holds, for each of [`BINS`], the answers that were no errors.
    pub fn from_counts(errors: u64, latency_sum_us: u64, histogram: impl IntoIterator<Item = u32>) -> Self {
        let histogram: Vec<_> =
            histogram.into_iter().zip(0u16..).filter(|(n, _)| *n > 0).map(|(n, b)| (b, n)).collect();
        let count = errors + histogram.iter().map(|(_, n)| u64::from(*n)).sum::<u64>();
        Self { count, errors, latency_sum_us, histogram, classes: ClassCounts::default() }
    }

    /// Counts one answer. See [`StatsCounter`] for many.
    pub fn record(&mut self, latency_us: u64, error: bool) {
        self.count += 1;
        self.errors += u64::from(error);
        self.latency_sum_us += latency_us;
        if error {
            return;
        }
        let bin = bin_of(latency_us) as u16;
        match self.histogram.binary_search_by_key(&bin, |(b, _)| *b) {
            Ok(i) => self.histogram[i].1 += 1,
            Err(i) => self.histogram.insert(i, (bin, 1)),
        }
    }

    /// Returns the answers that were no errors by latency: (bin, answers), ascending.
    pub fn histogram(&self) -> &[(u16, u32)] {
        &self.histogram
    }

    /// Checks that the parts agree and can be added to, as in everything this program counted; in one pass over the bins.
    pub fn check(&self) -> Result<(), StatsError> {
        let Self { count, errors, latency_sum_us, histogram, classes: _ } = self;
        let (mut next, mut binned, mut is_full) = (0, 0, false);
        for &(bin, answers) in histogram {
            if bin < next || usize::from(bin) >= BINS || answers == 0 {
                return Err(StatsError::Bin { bin, answers });
            }
            next = bin + 1;
            binned += u64::from(answers);
            is_full |= answers == u32::MAX;
        }
        // A bin that is full counts no further.
        let agrees = errors.checked_add(binned).is_some_and(|all| all == *count || is_full && all < *count);
        if !agrees {
            return Err(StatsError::Count { count: *count, errors: *errors, binned });
        }
        if *count >= SUM_MAX || *latency_sum_us >= SUM_MAX || *count == 0 && *latency_sum_us > 0 {
            return Err(StatsError::Sum { count: *count, latency_sum_us: *latency_sum_us });
        }
        Ok(())
    }

    /// Returns errors ÷ answers, 0.0 to 1.0; none without answers.
    pub fn error_rate(&self) -> Option<f64> {
        (self.count > 0).then(|| self.errors as f64 / self.count as f64)
    }

    /// Returns the mean latency in milliseconds; none without answers.
    pub fn mean_ms(&self) -> Option<f64> {
        (self.count > 0).then(|| self.latency_sum_us as f64 / self.count as f64 / 1000.0)
    }

    /// Returns the latency in milliseconds that a share `q` (0.0 to 1.0) of the answers that were no errors stays at or below,
    /// within 1.5 %; none without such answers.
    pub fn quantile_ms(&self, q: f64) -> Option<f64> {
        let total: u64 = self.histogram.iter().map(|(_, n)| u64::from(*n)).sum();
        let rank = ((total as f64 * q).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bin, n) in &self.histogram {
            seen += u64::from(*n);
            if seen >= rank {
                return Some(middle_us(usize::from(*bin)) as f64 / 1000.0);
            }
        }
        None
    }
}

impl AddAssign<&Stats> for Stats {
    fn add_assign(&mut self, other: &Stats) {
        self.add_totals(other);
        let missing = self.add_known_bins(other);
        if missing > 0 {
            self.insert_missing_bins(other, missing);
        }
    }
}

impl Stats {
    /// Returns the same counts without the latencies' distribution: they have a mean, and no quantiles.
    pub(crate) fn totals(&self) -> Self {
        let Self { count, errors, latency_sum_us, classes, .. } = *self;
        Self { count, errors, latency_sum_us, histogram: Vec::new(), classes }
    }

    /// Adds another's counts without its latencies' distribution.
    pub(crate) fn add_totals(&mut self, other: &Stats) {
        self.count += other.count;
        self.errors += other.errors;
        self.latency_sum_us += other.latency_sum_us;
        self.classes += other.classes;
    }

    /// Adds the other's bins that are here as well; returns how many aren't.
    fn add_known_bins(&mut self, other: &Stats) -> usize {
        let (mut at, mut missing) = (0, 0);
        for (bin, answers) in &other.histogram {
            at += self.histogram[at..].iter().take_while(|(known, _)| known < bin).count();
            match self.histogram.get_mut(at).filter(|(known, _)| known == bin) {
                Some((_, sum)) => *sum = sum.saturating_add(*answers),
                None => missing += 1,
            }
        }
        missing
    }

    /// Puts the other's bins that aren't here in their places, from the last one on, so that each bin moves once.
    fn insert_missing_bins(&mut self, other: &Stats, missing: usize) {
        let mut kept = self.histogram.len();
        let mut free = kept + missing;
        self.histogram.resize(free, (0, 0));
        for new in other.histogram.iter().rev() {
            while kept > 0 && self.histogram[kept - 1].0 > new.0 {
                (free, kept) = (free - 1, kept - 1);
                self.histogram[free] = self.histogram[kept];
            }
            if kept == 0 || self.histogram[kept - 1].0 != new.0 {
                free -= 1;
                self.histogram[free] = *new;
            }
        }
    }
}

/// Takes away what was added before.
impl SubAssign<&Stats> for Stats {
    fn sub_assign(&mut self, other: &Stats) {
        self.count -= other.count;
        self.errors -= other.errors;
        self.latency_sum_us -= other.latency_sum_us;
        self.classes -= other.classes;
        let mut gone = other.histogram.iter().peekable();
        self.histogram.retain_mut(|(bin, answers)| {
            if let Some((_, less)) = gone.next_if(|(other, _)| other == bin) {
                // A bin that was full has lost count.
                *answers = answers.saturating_sub(*less);
            }
            *answers > 0
        });
    }
}

/// A counter for many answers at once; [`StatsCounter::take`] makes statistics of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StatsCounter {
    errors: u64,
    latency_sum_us: u64,
    /// None before the first answer that was no error: of many counters, most never count.
    histogram: Option<Box<[u32; BINS]>>,
    /// Answers of classes that are no errors by themselves.
    pub classes: ClassCounts,
}

impl StatsCounter {
    /// Counts one answer: its latency in microseconds, and whether it was an error.
    pub fn record(&mut self, latency_us: u64, error: bool) {
        self.latency_sum_us += latency_us;
        if error {
            self.errors += 1;
        } else {
            self.histogram.get_or_insert_with(|| Box::new([0; BINS]))[bin_of(latency_us)] += 1;
        }
    }

    /// Returns what was counted since the last call.
    pub fn take(&mut self) -> Stats {
        let counts = self.histogram.iter().flat_map(|histogram| histogram.iter().copied());
        let stats = Stats::from_counts(self.errors, self.latency_sum_us, counts);
        let stats = Stats { classes: std::mem::take(&mut self.classes), ..stats };
        (self.errors, self.latency_sum_us) = (0, 0);
        if let Some(histogram) = self.histogram.as_mut().filter(|_| stats.count > stats.errors) {
            histogram.fill(0);
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(answers: &[(u64, bool)]) -> Stats {
        let mut stats = Stats::default();
        answers.iter().for_each(|(us, error)| stats.record(*us, *error));
        stats
    }

    #[test]
    fn quantiles_are_within_the_stated_error() {
        let stats = of(&(1..=1000).map(|ms| (ms * 1000, false)).collect::<Vec<_>>());
        for (q, expected) in [(0.5, 500.0), (0.95, 950.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = stats.quantile_ms(q).unwrap();
            assert!((found / expected - 1.0).abs() <= 0.015 + 0.002, "p{q}: {found}, expected about {expected}");
        }
        assert_eq!(stats.mean_ms(), Some(500.5));
    }

    #[test]
    fn a_bin_ends_where_its_definition_says() {
        let ends = EDGES.ends.iter().take(BINS - 1);
        for us in (0..40_000).chain(ends.flat_map(|end| end - 1..=end + 1)).map(u64::from) {
            assert_eq!(bin_of(us), bin_by_logarithm(us), "{us} us");
        }
        assert_eq!((bin_of(u64::MAX), EDGES.ends[BINS - 1]), (BINS - 1, u32::MAX));
    }

    #[test]
    fn unsound_statistics_cannot_be_decoded() {
        let decode = |parts: (u64, u64, u64, Vec<(u16, u32)>)| {
            let bytes = crate::protocol::codec::encode(&parts);
            let json = serde_json::json!({"count": parts.0, "errors": parts.1, "latency_sum_us": parts.2, "histogram": parts.3});
            let read = crate::protocol::codec::decode::<Stats>(&bytes);
            assert_eq!(read.is_ok(), serde_json::from_value::<Stats>(json).is_ok(), "every format checks");
            read.map_err(|why| why.to_string())
        };
        let sound = of(&[(1_000, false), (1_000, false), (2_000, true)]);
        let bin = bin_of(1_000) as u16;
        assert_eq!(decode((3, 1, 4_000, vec![(bin, 2)])), Ok(sound));
        assert_eq!(decode((0, 0, 0, vec![])), Ok(Stats::default()));
        let full = (1 << 33, 0, 5, vec![(7, u32::MAX)]);
        assert!(decode(full).is_ok(), "a bin that is full counts no further");
        for (parts, why) in [
            ((0, 0, 9, vec![]), "0 answers took 9 µs"),
            ((3, 1, 4_000, vec![(bin, 3)]), "3 answers, expected 1 errors and those in bins, 3"),
            ((3, 1, 4_000, vec![(bin, 1)]), "3 answers, expected 1 errors and those in bins, 1"),
            ((1, 2, 4_000, vec![]), "1 answers, expected 2 errors"),
            ((1, u64::MAX, 4_000, vec![(bin, 2)]), "expected 18446744073709551615 errors"),
            ((1 << 60, 1 << 60, 4_000, vec![]), "expected both below 2^60"),
            ((1, 1, u64::MAX, vec![]), "expected both below 2^60"),
            ((1, 0, 9, vec![(BINS as u16, 1)]), "1 answers in bin 546"),
            ((2, 0, 9, vec![(5, 1), (5, 1)]), "1 answers in bin 5, expected"),
            ((2, 0, 9, vec![(6, 1), (5, 1)]), "1 answers in bin 5, expected"),
            ((0, 0, 0, vec![(5, 0)]), "0 answers in bin 5, expected"),
        ] {
            let found = decode(parts.clone()).unwrap_err();
            assert!(found.contains(why), "{parts:?}: {found}");
        }
    }

    #[test]
    fn without_answers_there_is_no_rate() {
        let none = Stats::default();
        assert_eq!((none.error_rate(), none.mean_ms(), none.quantile_ms(0.5)), (None, None, None));
    }

    proptest! {
        #[test]
        fn bins_ascend_and_are_narrow(us in 0u64..1 << 40) {
            let bin = bin_of(us);
            prop_assert!(bin < BINS);
            prop_assert!(bin_of(us + 1) >= bin);
            prop_assert_eq!(bin, bin_by_logarithm(us));
            let middle = middle_us(bin) as f64;
            prop_assert!(!(1_000..130_000_000).contains(&us) || (middle / us as f64 - 1.0).abs() < 0.0155, "{us} in {middle}");
        }

        #[test]
        fn merging_equals_having_seen_everything(
            left in prop::collection::vec((0u64..10_000_000, any::<bool>()), 0..50),
            right in prop::collection::vec((0u64..10_000_000, any::<bool>()), 0..50),
        ) {
            let mut merged = of(&left);
            merged += &of(&right);
            prop_assert_eq!(merged.check(), Ok(()));
            prop_assert_eq!(merged, of(&[left, right].concat()));
        }
    }
}
