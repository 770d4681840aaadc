//! Rooms of the core, which are its files, know each other in one direction only: no circle of `use` among them.
//!
//! A re-export (`pub use`) shows what is in a room and is no knowledge of its own: a name that is imported by way of one counts
//! for the room that defines it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

type Room = Vec<String>;

/// The rooms by their module paths, with their text, without tests.
fn rooms(folder: &Path, path: &[String], found: &mut BTreeMap<Room, String>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_stem().unwrap().to_str().unwrap().to_string();
        if name == "tests" || name == "fixtures" {
            continue;
        }
        let inner = if ["lib", "mod"].contains(&name.as_str()) { path.to_vec() } else { [path, &[name]].concat() };
        if entry.is_dir() {
            rooms(&entry, &inner, found);
        } else {
            let text = fs::read_to_string(&entry).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let code = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            found.insert(inner, code);
        }
    }
}

/// Returns the paths that a `use` names, one for each name in its braces.
fn expand(text: &str) -> Vec<String> {
    let text = text.trim();
    let Some((head, rest)) = text.split_once('{') else {
        return vec![text.split(" as ").next().unwrap().trim_end_matches("::self").trim().to_string()];
    };
    let inner = &rest[..rest.rfind('}').unwrap()];
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inner.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            c => parts.last_mut().unwrap().push(c),
        }
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expand(&format!("{head}{}", part.trim()))).collect()
}

/// Returns the `use` paths of a text: private ones, or those that are shown on.
fn uses(text: &str, shown: bool) -> Vec<String> {
    let statements = text.split(';').filter_map(|statement| {
        let line = statement.rfind("use ").filter(|at| {
            let before = statement[..*at].rsplit('\n').next().unwrap().trim();
            before.is_empty() != shown && (before.is_empty() || before.starts_with("pub"))
        })?;
        Some(statement[line + 4..].to_string())
    });
    statements.flat_map(|path| expand(&path)).collect()
}

/// Returns the paths that a text names outside of its `use` statements.
fn inline(text: &str) -> Vec<String> {
    let starts = ["crate::", "super::"].into_iter().flat_map(|start| text.match_indices(start)).map(|(at, _)| at);
    let own = starts.filter(|at| !text[..*at].ends_with("::"));
    own.map(|at| text[at..].chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c)).collect()).collect()
}

/// Returns the room that a path in `from` leads to; none for what isn't of this crate.
fn lead(from: &Room, path: &str, rooms: &BTreeMap<Room, String>) -> Option<Room> {
    let mut at = from.clone();
    let mut segments = path.split("::").map(str::trim).peekable();
    match segments.peek().copied()? {
        "crate" => {
            at.clear();
            segments.next();
        }
        "self" => drop(segments.next()),
        "super" => {}
        first if rooms.contains_key(&[from.as_slice(), &[first.to_string()]].concat()) => {}
        _ => return None,
    }
    for segment in segments {
        let inner = [at.as_slice(), &[segment.to_string()]].concat();
        if segment == "super" {
            at.pop();
        } else if rooms.contains_key(&inner) {
            at = inner;
        } else {
            let shown = uses(rooms.get(&at)?, true);
            let defined = shown.iter().find(|path| path.rsplit("::").next() == Some(segment));
            return match defined {
                Some(path) => lead(&at, path, rooms).or(Some(at)),
                None => Some(at),
            };
        }
    }
    Some(at)
}

fn edges(rooms: &BTreeMap<Room, String>) -> BTreeMap<Room, BTreeSet<Room>> {
    let known = |(room, text): (&Room, &String)| {
        let paths = uses(text, false).into_iter().chain(inline(text));
        let led = paths.filter_map(|path| lead(room, &path, rooms)).filter(|to| to != room);
        (room.clone(), led.collect())
    };
    rooms.iter().map(known).collect()
}

/// Returns a circle, if there is one: rooms each of which knows the next, the last one the first.
fn circle(edges: &BTreeMap<Room, BTreeSet<Room>>) -> Option<Vec<String>> {
    fn visit(
        room: &Room,
        edges: &BTreeMap<Room, BTreeSet<Room>>,
        done: &mut BTreeSet<Room>,
        way: &mut Vec<Room>,
    ) -> Option<Vec<String>> {
        if let Some(at) = way.iter().position(|known| known == room) {
            return Some(way[at..].iter().map(|room| room.join("::")).collect());
        }
        if !done.insert(room.clone()) {
            return None;
        }
        way.push(room.clone());
        let found = edges[room].iter().find_map(|next| visit(next, edges, done, way));
        way.pop();
        found
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|room| visit(room, edges, &mut done, &mut Vec::new()))
}

#[test]
fn no_circle_among_the_rooms_of_the_core() {
    let mut found = BTreeMap::new();
    rooms(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &[], &mut found);
    assert!(found.len() > 40, "found {} rooms", found.len());
    let edges = edges(&found);
    let count: usize = edges.values().map(BTreeSet::len).sum();
    assert!(count > 100, "found {count} edges among {} rooms", found.len());
    assert_eq!(circle(&edges), None, "rooms that know each other in a circle");
}

#[test]
fn the_check_sees_what_it_is_for() {
    let of = |texts: &[(&str, &str)]| {
        let rooms = texts.iter().map(|(path, text)| {
            (path.split("::").filter(|s| !s.is_empty()).map(String::from).collect(), text.to_string())
        });
        circle(&edges(&rooms.collect()))
    };
    let straight = [("", "mod a;\nmod b;"), ("a", "use super::b::{self, Thing};\n"), ("b", "use std::fmt;\n")];
    assert_eq!(of(&straight), None);
    let direct = [("", ""), ("a", "use crate::b::Thing;\n"), ("b", "use crate::{\n    a::Other,\n};\n")];
    assert_eq!(of(&direct), Some(vec!["a".to_string(), "b".into()]));
    let inline = [("", ""), ("a", "use crate::b::Thing;\n"), ("b", "fn f() -> crate::a::Other {}\n")];
    assert_eq!(of(&inline), Some(vec!["a".to_string(), "b".into()]));
    // By way of what a parent shows.
    let shown = [("", "pub use b::Thing;\n"), ("a", "use crate::Thing;\n"), ("b", "use crate::a::Other;\n")];
    assert_eq!(of(&shown), Some(vec!["a".to_string(), "b".into()]));
}
