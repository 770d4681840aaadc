//! `aviary router audit`: the three topics, compared record by record.

use serde_json::json;

use super::{RouterSnapshot, broker, print};
use crate::adapters::kafka::{KafkaBroker, OffsetRange};
use crate::cli::Exit;
use crate::cli::output::Format;
use crate::config::router::RouterConfig;
use crate::domain::course::RouterPhase;
use crate::domain::split::Side;
use crate::ports::Topic;
use crate::router::audit::{At, Audit, Findings, read_source};

/// How far the topics were compared, and what was found.
pub struct Compared {
    /// Where each partition of the source begins to be compared.
    pub from: Vec<i64>,
    /// Where that ends.
    pub until: Vec<i64>,
    /// Result for these offsets. Copies of later records belong to the next audit.
    pub findings: Findings,
    /// Records that the source doesn't hold any more, at least.
    pub gone: i64,
}

/// Compares what a router has read up to this moment; none when it has not begun.
pub fn compare(broker: &KafkaBroker) -> anyhow::Result<Option<Compared>> {
    let seen = RouterSnapshot::look(broker)?;
    let Some(from) = seen.course.phase.as_ref().and_then(RouterPhase::from).cloned() else { return Ok(None) };
    anyhow::ensure!(
        seen.splits.len() == from.len(),
        "the router's places are gone: brokers keep them for some days after the end"
    );
    let until = seen.next.clone();
    let bounds = broker.topic_bounds(Topic::Source)?;
    let begin: Vec<i64> = from.iter().zip(&bounds).map(|(from, (low, _))| *from.max(low)).collect();
    let gone = begin.iter().zip(&from).map(|(begin, from)| begin - from).sum();
    let mut audit = Audit::new(begin.clone());
    let ranges = begin.iter().zip(&until).map(|(from, until)| OffsetRange { from: *from, until: *until, known: None });
    let ranges: Vec<_> = ranges.collect();
    broker.scan(Topic::Source, &ranges, &mut |partition, offset, _| audit.source(At { partition, offset }))?;
    for side in Side::BOTH {
        let bounds = broker.topic_bounds(Topic::Of(side))?;
        let known = bounds.iter().zip(&seen.splits);
        let ranges =
            known.map(|((low, high), split)| OffsetRange { from: *low, until: *high, known: split.last(side) });
        let ranges: Vec<_> = ranges.collect();
        broker.scan(Topic::Of(side), &ranges, &mut |partition, offset, source| {
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
    let after = RouterSnapshot::look(broker)?;
    let moved = |seen: &RouterSnapshot| seen.splits.iter().map(|split| split.reclaimed()).collect::<Vec<_>>();
    if matches!(after.course.phase, Some(RouterPhase::Reclaiming { .. })) || moved(&after) != moved(&seen) {
        return Ok(None);
    }
    Ok(Some(Compared { from: begin, until, findings: audit.findings(), gone }))
}

/// Compares, and says what was found.
pub fn run(config: &RouterConfig, format: Format) -> anyhow::Result<Exit> {
    let Some(compared) = compare(&broker(config)?)? else {
        anyhow::bail!(
            "router {} has not begun to read {}, or is taking back what the canary has not read",
            config.name,
            config.source
        );
    };
    let Compared { from, until, findings, gone } = &compared;
    let value = json!({ "router": config.name, "from": from, "until": until, "gone": gone, "findings": findings });
    print(format, &value, || {
        let mut text = findings.to_string();
        for (kind, At { partition, offset }) in &findings.examples {
            text = format!("{text}\n{kind}: {}/{partition}/{offset}", config.source);
        }
        if *gone > 0 {
            text = format!("{text}\nnot compared: up to {gone} records that the source doesn't hold any more");
        }
        text
    })?;
    Ok(if findings.violations() == 0 { Exit::Done } else { Exit::Refused })
}
