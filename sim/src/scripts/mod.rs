//! Event scripts: three cores driven by text files, with all that they put out recorded and reviewed as a diff.
//!
//! A script under `sim/scripts` is a header of `#` lines and blocks: commands, `----`, and what followed. After a change
//! that means to alter it, record again: `AVIARY_SCRIPTS=write cargo test -p sim scripts`, and read the diff. The header's
//! line `# catches: BUG => WORDS` ties a script to a seeded bug: with it, the script must come to a line that holds WORDS.
//!
//! Commands: `ask NODE TX OPERATION`, `deliver FROM TO [COUNT]` (up to the link's next message of a commit), `lose FROM TO`,
//! `hold FROM TO`, `release FROM TO`, `cut FROM TO`, `heal`, `settle` (deliver everything), `run MS`, `crash NODE`,
//! `start NODE`, `die NODE BEFORE…` (instead of its next output whose line begins so), `wipe NODE`, `shorten NODE COUNT`
//! (keep so many records), `observe NODE CANARY FAILED`, `trip NODE`, `show`, `log NODE`.

use std::fs;
use std::path::PathBuf;

use aviary_core::domain::ids::NodeId;

use crate::seeded_bugs;
use crate::subject::{Real, Subject};

mod cluster;
mod commands;
mod words;

/// Commands of a script, and the lines of what followed from them.
struct ScriptBlock {
    commands: Vec<String>,
    story: Vec<String>,
}

/// A script in blocks, as its file has them.
pub struct Script {
    header: Vec<String>,
    blocks: Vec<ScriptBlock>,
}

impl Script {
    fn parse(text: &str) -> Self {
        let (header, rest): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with('#'));
        let owned = |lines: &[&str]| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
        let block = |lines: &[&str]| {
            let end = lines.iter().position(|line| *line == "----");
            let (commands, story) = lines.split_at(end.unwrap_or(lines.len()));
            ScriptBlock { commands: owned(commands), story: owned(story.get(1..).unwrap_or_default()) }
        };
        let blocks = rest.split(|line| line.trim().is_empty()).filter(|lines| !lines.is_empty()).map(block);
        Self { header: owned(&header), blocks: blocks.collect() }
    }

    /// Returns the seeded bug that the script must catch, and what its story then holds.
    fn catches(&self) -> (&str, &str) {
        let line = self.header.iter().find_map(|line| line.strip_prefix("# catches: "));
        line.and_then(|line| line.split_once(" => ")).expect("a script names the seeded bug that it catches")
    }

    fn text(&self) -> String {
        let blocks = self.blocks.iter().map(|block| {
            let lines: Vec<_> = block.commands.iter().map(String::as_str).chain(["----"]).collect();
            let story: Vec<_> = block.story.iter().map(String::as_str).collect();
            [lines, story].concat().join("\n")
        });
        format!("{}\n\n{}\n", self.header.join("\n"), blocks.collect::<Vec<_>>().join("\n\n"))
    }
}

/// Plays a script's commands; returns it with what followed.
pub fn play<S: Subject>(script: &Script) -> Script {
    let mut cluster = cluster::ScriptCluster::<S>::new();
    let play = |block: &ScriptBlock| {
        block.commands.iter().for_each(|line| commands::obey(&mut cluster, line));
        ScriptBlock { commands: block.commands.clone(), story: std::mem::take(&mut cluster.story) }
    };
    Script { header: script.header.clone(), blocks: script.blocks.iter().map(play).collect() }
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap_or_else(|_| panic!("{name:?} is no node"))
}

fn all() -> Vec<(PathBuf, Script)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), Script::parse(&fs::read_to_string(path).unwrap()))).collect()
}

#[test]
fn every_script_comes_to_what_is_recorded() {
    let write = std::env::var("AVIARY_SCRIPTS").is_ok_and(|word| word == "write");
    let scripts = all();
    assert!(!scripts.is_empty());
    for (path, script) in scripts {
        let text = play::<Real>(&script).text();
        assert!(!text.contains("\nVIOLATION") && !text.contains("\nPANIC"), "{}:\n{text}", path.display());
        if write {
            fs::write(&path, &text).unwrap();
        }
        let recorded = fs::read_to_string(&path).unwrap();
        let differs = recorded.lines().zip(text.lines()).enumerate().find(|(_, (one, other))| one != other);
        assert!(
            recorded == text,
            "{} differs, first in {differs:?}; if that is meant: AVIARY_SCRIPTS=write cargo test -p sim scripts",
            path.display()
        );
    }
}

#[test]
fn every_script_catches_its_seeded_bug() {
    for (path, script) in all() {
        let (bug, words) = script.catches();
        let found = seeded_bugs::ALL.iter().find(|known| known.name == bug);
        let bug = found.unwrap_or_else(|| panic!("{}: no seeded bug is called {bug:?}", path.display()));
        let text = (bug.play)(&script).text();
        let caught = text.lines().filter(|line| !line.starts_with('#')).any(|line| line.contains(words));
        assert!(caught, "{}: with the bug, expected a line with {words:?}, found:\n{text}", path.display());
        let sound = script.text();
        let lines = sound.lines().filter(|line| !line.starts_with('#'));
        assert!(!lines.clone().any(|line| line.contains(words)), "{}: {words:?} without the bug", path.display());
    }
}
