//! What this program is: its version, the commit and the compiler that it was built from, and the formats that it speaks.
//!
//! `aviary version` prints it; HELLO carries it to the peers as facts, which a peer shows and decides nothing by.

use std::collections::BTreeMap;

use crate::adapters::disk::format;
use crate::backup;
use crate::node::frame::VERSIONS;

/// Version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Commit that the program was built from, as `git describe` names it; `unknown` without git.
pub const COMMIT: &str = env!("AVIARY_COMMIT");
/// Compiler that built the program.
pub const TOOLCHAIN: &str = env!("AVIARY_TOOLCHAIN");

/// Returns the version with its commit, such as `0.2.0 (3de05bc)`: what two builds are compared by.
pub fn build() -> String {
    format!("{VERSION} ({COMMIT})")
}

/// Returns the formats that this program writes, by name: files, and the newest version between nodes.
pub fn formats() -> BTreeMap<&'static str, u16> {
    [
        ("acceptor", format::ACCEPTOR.newest),
        ("backup", backup::VERSIONS.1),
        ("checkpoint", format::CHECKPOINT.newest),
        ("frame", VERSIONS.max),
        ("journal", format::JOURNAL.newest),
        ("run", format::RUN.newest),
    ]
    .into()
}

/// Returns what a node tells its peers about itself. A peer ignores names that it doesn't know.
pub fn facts() -> BTreeMap<String, String> {
    let formats = formats().into_iter().map(|(name, version)| (format!("format.{name}"), version.to_string()));
    [("build".to_string(), build())].into_iter().chain(formats).collect()
}
