//! `aviary router plan` and `status`: what would be, and what is.

use serde_json::json;

use super::{print, topics};
use crate::cli::Exit;
use crate::cli::output::{Format, facts, table};
use crate::config::router::{HooksConfig, RouterConfig};
use crate::domain::side::Side;
use crate::ports::Topic;
use crate::router::obstacles::obstacles;
use crate::router::snapshot::RouterSnapshot;

/// Prints what `start` would do, and what prevents it; exit code 1 if anything does.
pub fn plan(config: &RouterConfig, format: Format) -> anyhow::Result<Exit> {
    let topics = topics(config)?;
    let seen = RouterSnapshot::look(topics.as_ref())?;
    let Some(partitions) = topics.partitions(&config.source)? else {
        anyhow::bail!("topic {} does not exist, expected the topic to split", config.source);
    };
    let wrong = obstacles(topics.as_ref(), config, &seen.control)?;
    let mut make = Vec::new();
    for topic in
        [config.control(), config.service(Side::Stable).topic.clone(), config.service(Side::Canary).topic.clone()]
    {
        if topics.partitions(&topic)?.is_none() {
            make.push(topic);
        }
    }
    let bounds = topics.topic_bounds(Topic::Source)?;
    let (members, reads) = topics.service(Side::Stable, Topic::Source)?;
    let mut rows = Vec::new();
    if seen.control.phase.is_none() {
        for (partition, (next, (low, high))) in reads.iter().zip(&bounds).enumerate() {
            let next = next.unwrap_or(*low);
            rows.push(json!({ "partition": partition, "from": next, "low": low, "high": high, "unread": high - next }));
        }
    }
    let note = match (members, seen.control.phase.is_none()) {
        (0, true) => {
            "nobody is in stable's group: a service that assigns its partitions itself (Flink, Spark) can't be counted, and \
                      must be stopped by its hook or by hand; `start` watches its places for 5 s"
        }
        _ => "",
    };
    let hooks = match &config.hooks {
        HooksConfig::Manual => "by hand".to_string(),
        HooksConfig::Exec { argv, .. } => argv.join(" "),
        HooksConfig::Http { url, .. } => url.clone(),
    };
    let share = match &config.follow {
        Some(follow) => format!("that of rollout {} at {}", config.name, follow.api.join(", ")),
        None => config.weight.to_string(),
    };
    let value = json!({
        "router": config.name, "source": config.source, "partitions": rows, "topics_to_make": make, "hooks": hooks,
        "weight": share, "stable_members": members, "phase": seen.words(), "in_the_way": wrong, "note": note,
    });
    print(format, &value, || {
        let service = |side| {
            let service = config.service(side);
            format!("{} ({}), group {}", service.version, service.topic, service.group)
        };
        let mut text = facts(&[
            ("router", format!("{}, {}", config.name, seen.words())),
            ("source", format!("{}, {partitions} partitions", config.source)),
            ("stable", format!("{}, {} consumers read the source", service(Side::Stable), members)),
            ("canary", service(Side::Canary)),
            ("weight", share),
            ("hooks", hooks),
            ("creates topics", make.join(", ")),
            ("prevented by", wrong.join("; ")),
            ("note", note.into()),
        ]);
        if !rows.is_empty() {
            let mut places = table(["PARTITION", "FROM OFFSET", "UNREAD BY STABLE"]);
            for row in &rows {
                places.add_row([&row["partition"], &row["from"], &row["unread"]].map(ToString::to_string));
            }
            text = format!("{text}\n\n{}", places.trim_fmt());
        }
        text
    })?;
    Ok(if wrong.is_empty() { Exit::Done } else { Exit::Refused })
}

/// Shows where a router is.
pub fn status(config: &RouterConfig, format: Format) -> anyhow::Result<Exit> {
    let topics = topics(config)?;
    let seen = RouterSnapshot::look(topics.as_ref())?;
    let lags = match seen.splits.is_empty() {
        true => [Vec::new(), Vec::new()],
        false => seen.lags(topics.as_ref())?,
    };
    let unread: Vec<i64> = match seen.splits.is_empty() {
        true => Vec::new(),
        false => topics
            .topic_bounds(Topic::Source)?
            .iter()
            .zip(&seen.next)
            .map(|((_, high), next)| (high - next).max(0))
            .collect(),
    };
    let behind: Vec<i64> = match seen.splits.is_empty() {
        true => Vec::new(),
        false => {
            let (ends, bounds) = (topics.stable_ends(Topic::Source)?, topics.topic_bounds(Topic::Source)?);
            ends.iter()
                .zip(&bounds)
                .zip(&seen.next)
                .map(|((end, (_, high)), next)| (high - end.max(next)).max(0))
                .collect()
        }
    };
    let added = topics.partitions(&config.source)?.unwrap_or(0).saturating_sub(seen.splits.len());
    let partitions = seen.splits.iter().enumerate().map(|(partition, split)| {
        let (weight, weight_version) = split.weight();
        json!({
            "partition": partition, "next": seen.next[partition], "unread": unread[partition],
            "behind_open_transaction": behind[partition], "changing_since_ms": split.changing_since_ms(),
            "weight": weight.fraction(), "weight_version": weight_version, "changing": split.former().is_some(), "taken": split.taken(),
            "stable": split.given(Side::Stable), "canary": split.given(Side::Canary),
            "stable_lag": lags[0][partition], "canary_lag": lags[1][partition],
        })
    });
    let partitions: Vec<_> = partitions.collect();
    let sum = |side| seen.splits.iter().map(|split| split.given(side)).sum::<u64>();
    let taken: u64 = seen.splits.iter().map(|split| split.taken()).sum();
    let value = json!({
        "router": config.name, "source": config.source, "phase": seen.words(), "state": seen.control.phase,
        "taken": taken, "stable": sum(Side::Stable), "canary": sum(Side::Canary), "partitions": partitions,
        "lost": seen.control.lost, "partitions_not_read": if seen.splits.is_empty() { 0 } else { added },
    });
    print(format, &value, || {
        let mut text = facts(&[
            ("router", config.name.to_string()),
            ("source", config.source.clone()),
            ("phase", seen.words().into()),
            ("records", format!("{taken} = {} stable + {} canary", sum(Side::Stable), sum(Side::Canary))),
            ("lost", some(seen.control.lost, "records that were gone before the router read them, at most")),
            (
                "open transactions",
                some(
                    behind.iter().sum::<i64>() as u64,
                    "offsets of the source wait behind a producer's open transaction",
                ),
            ),
            (
                "partitions not read",
                some(added as u64 * u64::from(!seen.splits.is_empty()), "came after the start: the winner's"),
            ),
        ]);
        if !seen.splits.is_empty() {
            let mut rows =
                table(["PARTITION", "NEXT", "UNREAD", "WEIGHT", "STABLE", "CANARY", "STABLE LAG", "CANARY LAG"]);
            for (partition, split) in seen.splits.iter().enumerate() {
                let changing = if split.former().is_some() { " (changing)" } else { "" };
                rows.add_row([
                    partition.to_string(),
                    seen.next[partition].to_string(),
                    unread[partition].to_string(),
                    format!("{}{changing}", split.weight().0),
                    split.given(Side::Stable).to_string(),
                    split.given(Side::Canary).to_string(),
                    lags[0][partition].to_string(),
                    lags[1][partition].to_string(),
                ]);
            }
            text = format!("{text}\n\n{}", rows.trim_fmt());
        }
        text
    })?;
    Ok(Exit::Done)
}

/// Returns a count with what it counts; empty where there is nothing to count.
fn some(count: u64, what: &str) -> String {
    if count == 0 { String::new() } else { format!("{count} {what}") }
}
