//! The pages that people read name files that are there.

use std::fs;
use std::path::{Path, PathBuf};

const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/analysis.md",
    "docs/integrations.md",
    "docs/operations.md",
    "docs/performance.md",
    "docs/rollouts.md",
    "docs/router.md",
    "docs/upgrades.md",
];
/// Folders whose files a page may name in backquotes.
const FOLDERS: &[&str] =
    &["benches", "config", "core", "deploy", "docs", "fuzz", "proto", "scripts", "sim", "src", "tests"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files of this project that a page links to or names in backquotes, as seen from the project's root.
fn named(page: &str, text: &str) -> Vec<PathBuf> {
    let folder = Path::new(page).parent().unwrap();
    let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let links = links.filter(|link| !link.is_empty() && !link.contains("://")).map(|link| folder.join(link));
    // Every second part stands between two backquotes.
    let quoted = text.split('`').skip(1).step_by(2).filter(|code| {
        let first = code.split_once('/').map_or("", |(first, _)| first);
        FOLDERS.contains(&first) && !code.contains([' ', '*', ':', '<'])
    });
    links.chain(quoted.map(PathBuf::from)).collect()
}

#[test]
fn pages_name_files_that_exist() {
    let mut missing = Vec::new();
    for page in PAGES {
        let found = named(page, &fs::read_to_string(root().join(page)).unwrap());
        missing.extend(found.into_iter().filter(|file| !root().join(file).exists()).map(|file| (*page, file)));
    }
    assert!(missing.is_empty(), "pages name files that are not there: {missing:#?}");
}

#[test]
fn links_and_quoted_paths_are_found() {
    let text = "See [the router](router.md#limits), [Rust](https://rustup.rs), `src/lib.rs`, `cargo test` and `I1/I2`.";
    let found = named("docs/page.md", text);
    assert_eq!(found, [Path::new("docs/router.md"), Path::new("src/lib.rs")]);
}
