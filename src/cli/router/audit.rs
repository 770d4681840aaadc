//! `aviary router audit`: the three topics, compared record by record.

use serde_json::json;

use super::{print, topics};
use crate::cli::Exit;
use crate::cli::output::Format;
use crate::config::router::RouterConfig;
use crate::router::audit::At;
use crate::router::compare::{Compared, compare};

/// Compares, and says what was found.
pub fn run(config: &RouterConfig, format: Format) -> anyhow::Result<Exit> {
    let Some(compared) = compare(topics(config)?.as_ref())? else {
        anyhow::bail!(
            "router {} has not begun to read {}, or is reclaiming the canary's unread records, expected one that runs",
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
