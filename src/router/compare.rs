//! The three topics of a router, compared record by record.

use super::audit::{At, Audit, Findings, read_source};
use super::snapshot::{LookError, RouterSnapshot};
use crate::domain::router_state::RouterPhase;
use crate::domain::side::Side;
use crate::ports::{OffsetRange, RouterTopics, Topic};

/// How far the topics were compared, and what was found.
pub struct Compared {
    /// Where each partition of the source begins to be compared.
    pub from: Vec<i64>,
    /// Offset at which the comparison ends, by partition.
    pub until: Vec<i64>,
    /// What was found there. Copies of records after it are the next audit's.
    pub findings: Findings,
    /// Records that the source doesn't hold any more, at least.
    pub gone: i64,
}

/// Compares what a router has read up to this moment; none when it has not begun, or is taking back what the canary has not read.
pub fn compare(topics: &dyn RouterTopics) -> Result<Option<Compared>, LookError> {
    let seen = RouterSnapshot::look(topics)?;
    let Some(from) = seen.control.phase.as_ref().and_then(RouterPhase::from).cloned() else { return Ok(None) };
    if seen.splits.len() != from.len() {
        return Err(LookError::Gone);
    }
    let until = seen.next.clone();
    let bounds = topics.topic_bounds(Topic::Source)?;
    let begin: Vec<i64> = from.iter().zip(&bounds).map(|(from, (low, _))| *from.max(low)).collect();
    let gone = begin.iter().zip(&from).map(|(begin, from)| begin - from).sum();
    let mut audit = Audit::new(begin.clone());
    let ranges = begin.iter().zip(&until).map(|(from, until)| OffsetRange { from: *from, until: *until, known: None });
    let ranges: Vec<_> = ranges.collect();
    topics.scan(Topic::Source, &ranges, &mut |partition, offset, _| audit.source(At { partition, offset }))?;
    for side in Side::BOTH {
        let bounds = topics.topic_bounds(Topic::Of(side))?;
        let known = bounds.iter().zip(&seen.splits);
        let ranges =
            known.map(|((low, high), split)| OffsetRange { from: *low, until: *high, known: split.last(side) });
        let ranges: Vec<_> = ranges.collect();
        topics.scan(Topic::Of(side), &ranges, &mut |partition, offset, source| {
            let taken_back = seen.splits[partition].reclaimed().is_some_and(|reclaimed| offset >= reclaimed);
            let at = source.and_then(read_source);
            let later = at.is_some_and(|at| until.get(at.partition).is_some_and(|until| at.offset >= *until));
            let before = at.is_some_and(|at| begin.get(at.partition).is_some_and(|begin| at.offset < *begin));
            if !(later || before && gone > 0 || side == Side::Canary && taken_back) {
                audit.copy(side, at);
            }
        })?;
    }
    // What was given back meanwhile stands in both topics, or in neither.
    let after = RouterSnapshot::look(topics)?;
    let moved = |seen: &RouterSnapshot| seen.splits.iter().map(|split| split.reclaimed()).collect::<Vec<_>>();
    if matches!(after.control.phase, Some(RouterPhase::Reclaiming { .. })) || moved(&after) != moved(&seen) {
        return Ok(None);
    }
    Ok(Some(Compared { from: begin, until, findings: audit.findings(), gone }))
}
