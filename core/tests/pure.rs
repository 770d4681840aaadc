//! What Cargo can't hold: the standard library is in reach of every crate. The core may use these parts of it; a clock, a
//! file, a socket, a thread, the environment and a hash map aren't among them.

use std::fs;
use std::path::{Path, PathBuf};

/// Parts of the standard library without effects and without an order of their own. Of `std::time` there is what renders a
/// given time, of `std::sync` what shares a value.
const PURE: &[&str] = &[
    "array::from_fn",
    "borrow::Borrow",
    "borrow::Cow",
    "cmp::",
    "collections::BTreeMap",
    "collections::BTreeSet",
    "collections::VecDeque",
    "fmt",
    "mem::",
    "ops::",
    "slice::",
    "str::",
    "sync::Arc",
    "sync::LazyLock",
    "time::Duration",
    "time::UNIX_EPOCH",
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .collect()
}

/// Returns what a text uses of `std`, `core` and `alloc` that isn't in [`PURE`]; groups in braces are looked into.
fn impure(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for root in ["std::", "core::", "alloc::"] {
        for (at, _) in code.match_indices(root) {
            let is_path = code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
            if is_path {
                continue;
            }
            let rest = &code[at + root.len()..];
            let path = &rest[..rest.find(|c: char| !(c.is_alphanumeric() || "_:".contains(c))).unwrap_or(rest.len())];
            let group = rest[path.len()..].strip_prefix('{').map(|rest| rest.split('}').next().unwrap_or(rest));
            let paths: Vec<String> = match group {
                Some(group) => group.split(',').map(|item| format!("{path}{}", item.trim())).collect(),
                None => vec![path.to_string()],
            };
            let is_pure = |path: &String| PURE.iter().any(|pure| path.starts_with(pure));
            found.extend(paths.into_iter().filter(|path| !is_pure(path)));
        }
    }
    found
}

#[test]
fn the_core_has_no_clock_no_io_and_no_hash_map() {
    let files = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(files.len() > 30, "found {} files of the core", files.len());
    let wrong = files.iter().flat_map(|path| {
        let found = impure(&fs::read_to_string(path).unwrap());
        // How long a test looks may be asked of the environment.
        let is_test =
            path.components().any(|part| Path::new(part.as_os_str()).file_stem().is_some_and(|p| p == "tests"));
        let found = found.into_iter().filter(move |what| !(is_test && what == "env::var"));
        found.into_iter().map(move |what| format!("{}: {what}", path.display()))
    });
    let wrong: Vec<_> = wrong.collect();
    assert!(wrong.is_empty(), "the core uses more of std than its list allows:\n{wrong:#?}");
}

#[test]
fn the_check_sees_what_it_is_for() {
    let seen = [
        ("use std::fs;", "fs"),
        ("let now = std::time::Instant::now();", "time::Instant::now"),
        ("use std::collections::{BTreeMap, HashMap};", "collections::HashMap"),
        ("use std::{env, fmt};", "env"),
        ("    let x = 1;\n#[cfg(test)]\nmod later;\nuse std::thread;", "thread"),
        ("use core::time::Never;", "time::Never"),
    ];
    for (text, what) in seen {
        assert_eq!(impure(text), [what], "{text}");
    }
    assert_eq!(impure("use std::collections::{BTreeMap, VecDeque};\n// std::fs"), Vec::<String>::new());
}
