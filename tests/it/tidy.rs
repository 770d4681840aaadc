//! The house rules that no compiler knows: who may import whom. That the core is pure is held by its manifest and `core/tests/pure.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Room → the rooms it may import (`crate::ROOM`); `protocol::record` and `node::handle` are doors of their own.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("ports", &["domain", "protocol::record", "protocol::checkpoint", "protocol::ledger", "schema"]),
    ("node", &["domain", "protocol", "ports", "node"]),
    ("config", &["domain", "protocol", "config", "proxy::settings"]),
    (
        "adapters",
        &["domain", "protocol", "ports", "adapters", "config::node", "config::router", "schema", "telemetry::event"],
    ),
    ("listener", &["listener"]),
    ("proxy", &["domain", "protocol", "ports", "node::handle", "listener", "proxy", "api::read"]),
    ("router", &["domain", "ports", "router"]),
    ("synthetic", &["domain"]),
    ("telemetry", &["domain", "protocol", "ports", "node::handle", "telemetry"]),
    ("decisions", &["domain", "protocol", "ports", "node::handle", "schema", "decisions"]),
    (
        "api",
        &[
            "domain",
            "protocol",
            "ports",
            "node::handle",
            "node::log",
            "listener",
            "api",
            "config::rollout",
            "telemetry",
            "schema",
            "decisions",
        ],
    ),
];

fn sources(room: &Path) -> Vec<PathBuf> {
    if room.with_extension("rs").is_file() {
        return vec![room.with_extension("rs")];
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(room).unwrap_or_else(|e| panic!("{}: {e}", room.display())) {
        let path = entry.unwrap().path();
        if path.file_stem().is_some_and(|name| name == "tests") {
            continue;
        }
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// Returns a file's lines of production code with their numbers: no comments, nothing below the first test module.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").enumerate();
    lines.filter(|(_, l)| !l.trim_start().starts_with("//")).map(|(n, l)| (n + 1, l.to_string())).collect()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn rooms_import_only_what_they_may() {
    let mut wrong = BTreeSet::new();
    for (room, allowed) in MAY_IMPORT {
        for path in sources(&root().join(room)) {
            for (number, line) in code(&path) {
                for import in line.match_indices("crate::").map(|(at, _)| &line[at + 7..]) {
                    if !allowed.iter().any(|door| import.starts_with(door)) {
                        wrong.insert(format!("{}:{number}: {}", path.display(), line.trim()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the house's directions:\n{wrong:#?}");
}

/// Returns what stands between the first `before` in a file of the project and the next double quote or `-`.
fn found_in(file: &str, before: &str) -> String {
    let text = fs::read_to_string(root().with_file_name(file)).unwrap();
    let rest = text.split_once(before).unwrap_or_else(|| panic!("{file}: expected {before:?}")).1;
    rest.split(['"', '-']).next().unwrap().to_string()
}

#[test]
fn the_image_is_built_with_the_pinned_toolchain() {
    let pinned = found_in("rust-toolchain.toml", "channel = \"");
    assert_eq!(found_in("deploy/Dockerfile", "FROM rust:"), pinned);
    let number = |version: &str| version.split('.').map(|part| part.parse().unwrap()).collect::<Vec<u32>>();
    let oldest = found_in("Cargo.toml", "rust-version = \"");
    assert!(number(&oldest) <= number(&pinned), "rust-version is {oldest}, expected at most {pinned}");
}

#[test]
fn nothing_is_left_to_do_in_comments() {
    let words = ["TO", "FIX"].map(|half| format!("{half}{}", if half == "TO" { "DO" } else { "ME" }));
    let all = ["src", "core/src", "sim/src"].into_iter().flat_map(|room| sources(&root().with_file_name(room)));
    for path in all {
        let text = fs::read_to_string(&path).unwrap();
        assert!(!words.iter().any(|word| text.contains(word)), "{} leaves something to do", path.display());
    }
}
