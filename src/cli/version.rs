//! `aviary version`: what this program is.

use serde_json::json;

use super::Exit;
use super::output::{self, Format, facts};
use crate::about;
use crate::node::frame::VERSIONS;

/// Prints version, commit, compiler and formats.
pub fn run(format: Format) -> anyhow::Result<Exit> {
    output::print(format, &json().to_string(), |_| text())?;
    Ok(Exit::Done)
}

fn text() -> String {
    let formats: Vec<_> = about::formats().into_iter().map(|(name, version)| format!("{name} {version}")).collect();
    facts(&[
        ("aviary", about::VERSION.into()),
        ("commit", about::COMMIT.into()),
        ("built with", about::TOOLCHAIN.into()),
        ("between nodes", format!("protocol {VERSIONS}")),
        ("formats", formats.join(", ")),
    ])
}

fn json() -> serde_json::Value {
    json!({
        "version": about::VERSION,
        "commit": about::COMMIT,
        "toolchain": about::TOOLCHAIN,
        "protocol": VERSIONS,
        "formats": about::formats(),
    })
}
