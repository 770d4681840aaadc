//! What prevents a rollout that has not begun: all that can be known before anything is touched.

use crate::config::router::RouterConfig;
use crate::domain::router_state::RouterState;
use crate::domain::side::Side;
use crate::ports::{OffsetRange, OutsideError, RouterTopics, Topic};

/// Returns what prevents the rollout from beginning; empty if nothing does, or if it has begun.
///
/// # Errors
/// When the broker doesn't answer, or the members of a service's group can't be counted.
pub fn obstacles(
    topics: &dyn RouterTopics,
    config: &RouterConfig,
    control: &RouterState,
) -> Result<Vec<String>, OutsideError> {
    let mut found = Vec::new();
    let Some(partitions) = topics.partitions(&config.source)? else {
        return Ok(vec![format!("topic {} does not exist, expected the topic to split", config.source)]);
    };
    if let Some(rollout) = control.rollout.as_ref().filter(|rollout| **rollout != config.identity()) {
        let [v1, v2] = &rollout.versions;
        found.push(format!(
            "the topics of router {} are those of {v1} to {v2}, expected another metadata.name for another rollout",
            config.name
        ));
    }
    if control.phase.is_some() {
        return Ok(found);
    }
    let own = [Side::Stable, Side::Canary].map(|side| (config.service(side).topic.clone(), partitions));
    for (topic, count) in own.into_iter().chain([(config.control(), 1)]) {
        if let Some(other) = topics.partitions(&topic)?.filter(|other| *other != count) {
            found.push(format!("topic {topic} has {other} partitions, expected {count}"));
        }
    }
    let bounds = topics.topic_bounds(Topic::Source)?;
    let (_, reads) = topics.service(Side::Stable, Topic::Source)?;
    for (partition, (next, (low, high))) in reads.iter().zip(&bounds).enumerate() {
        if next.is_none() && low != high {
            found.push(format!(
                "partition {partition} has records, and group {} no place in it: let it read this topic, or set its place \
                 (kafka-consumer-groups --reset-offsets)",
                config.service(Side::Stable).group
            ));
        }
    }
    for side in Side::BOTH {
        let service = config.service(side);
        let (members, _) = topics.service(side, Topic::Of(side))?;
        if side == Side::Canary && members > 0 {
            found.push(format!(
                "group {} has {members} members, expected none before the router starts it",
                service.group
            ));
        }
        if has_records(topics, Topic::Of(side))? {
            found.push(format!(
                "topic {} has records, expected none: of an earlier rollout of this name?",
                service.topic
            ));
        }
    }
    Ok(found)
}

fn has_records(topics: &dyn RouterTopics, topic: Topic) -> Result<bool, OutsideError> {
    let bounds = topics.topic_bounds(topic)?;
    let ranges = bounds.iter().map(|(low, high)| OffsetRange { from: *low, until: *high, known: None });
    let (ranges, mut found): (Vec<_>, bool) = (ranges.collect(), false);
    topics.scan(topic, &ranges, &mut |_, _, _| found = true)?;
    Ok(found)
}
