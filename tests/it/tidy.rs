//! Rules of the code that no compiler knows: who may import whom. That the core is pure is held by its manifest and `core/tests/pure.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::words::files;

/// Room → the rooms it may import (`crate::ROOM`); `protocol::record` and `node::handle` are listed apart from their rooms.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("ports", &["domain", "protocol::record", "protocol::checkpoint", "protocol::ledger", "schema"]),
    ("node", &["backoff", "domain", "entropy", "protocol", "ports", "node"]),
    ("config", &["domain", "protocol", "config", "proxy::settings"]),
    (
        "adapters",
        &[
            "domain",
            "protocol",
            "ports",
            "adapters",
            "config::node",
            "config::router",
            "http_client",
            "listener",
            "schema",
            "telemetry::event",
        ],
    ),
    ("backup", &["domain", "protocol"]),
    ("entropy", &[]),
    ("http_client", &["http_client"]),
    ("listener", &["listener"]),
    ("model", &["code", "domain", "protocol", "model", "node::frame"]),
    ("status", &["code", "domain", "model", "protocol", "node::handle", "node::log"]),
    (
        "proxy",
        &["domain", "entropy", "http_client", "protocol", "ports", "node::handle", "listener", "status", "proxy"],
    ),
    // Its shell reads its file, and follows a cluster's rollout as any client does. What it works on comes through `ports`.
    ("router", &["backoff", "domain", "model", "ports", "protocol::Mode", "router", "config::router", "client"]),
    ("client", &["client", "domain::text", "http_client", "model", "adapters::tls::check_private"]),
    ("synthetic", &["domain"]),
    ("telemetry", &["domain", "http_client", "protocol", "ports", "node::handle", "telemetry"]),
    ("decisions", &["backoff", "domain", "protocol", "ports", "node::handle", "schema", "decisions"]),
    (
        "api",
        &[
            "backup",
            "code",
            "domain",
            "entropy",
            "http_client",
            "model",
            "protocol",
            "ports",
            "node::handle",
            "node::log",
            "listener",
            "status",
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
                    if !allowed.iter().any(|path| import.starts_with(path)) {
                        wrong.insert(format!("{}:{number}: {}", path.display(), line.trim()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "imports that MAY_IMPORT does not allow:\n{wrong:#?}");
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
fn unsafe_code_is_in_one_module_and_each_block_says_why_it_is_sound() {
    let rooms = ["src", "core/src", "sim/src", "sim/whole/src"];
    let mut blocks = 0;
    for path in rooms.into_iter().flat_map(|room| sources(&root().with_file_name(room))) {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let is_code = |line: &str| !line.trim_start().starts_with("//") && !line.contains('`');
        for at in (0..lines.len()).filter(|at| is_code(lines[*at]) && lines[*at].contains("unsafe {")) {
            assert!(path.ends_with("adapters/kafka/native.rs"), "{}:{} is unsafe", path.display(), at + 1);
            let above = lines[..at].iter().rev().take(8).take_while(|line| !line.trim().ends_with(['}', ';']));
            assert!(above.into_iter().any(|line| line.contains("// SAFETY:")), "{}:{}", path.display(), at + 1);
            blocks += 1;
        }
    }
    assert!(blocks > 0, "no unsafe block was found: this test reads the wrong files");
}

#[test]
fn nothing_is_left_to_do_in_comments() {
    let words = ["TO", "FIX"].map(|half| format!("{half}{}", if half == "TO" { "DO" } else { "ME" }));
    let all = ["src", "core/src", "sim/src", "sim/whole/src"]
        .into_iter()
        .flat_map(|room| sources(&root().with_file_name(room)));
    for path in all {
        let text = fs::read_to_string(&path).unwrap();
        assert!(!words.iter().any(|word| text.contains(word)), "{} leaves something to do", path.display());
    }
}

/// Rooms whose files must not import each other in a circle.
const WITHOUT_CIRCLES: [&str; 2] = ["proxy", "api"];

/// Returns the modules of a room (`api`, `api::auth`, …) with their production code in one line each.
fn modules(room: &str) -> BTreeMap<String, String> {
    let modules = sources(&root().join(room)).into_iter().filter(|path| !path.ends_with("wire_tests.rs")).map(|path| {
        let place = path.strip_prefix(root()).unwrap().with_extension("");
        let name = place.iter().map(|part| part.to_str().unwrap()).collect::<Vec<_>>().join("::");
        let lines: Vec<_> = code(&path).into_iter().map(|(_, line)| line).collect();
        (name.strip_suffix("::mod").unwrap_or(&name).to_string(), lines.join(" "))
    });
    modules.collect()
}

/// Returns the paths that begin here: one, or those of a list in braces.
fn listed(code: &str) -> Vec<&str> {
    let Some(list) = code.strip_prefix('{') else { return vec![code] };
    let (mut depth, mut from, mut found) = (1, 0, Vec::new());
    for (at, c) in list.char_indices() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth == 0 || (depth == 1 && c == ',') {
            found.push(list[from..at].trim());
            from = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    found.retain(|path| !path.is_empty());
    found
}

/// Returns the modules that `name` imports by `super::`, `crate::`, or as a child.
fn imports(name: &str, modules: &BTreeMap<String, String>) -> BTreeSet<String> {
    let code = &modules[name];
    let parent = |of: &str| of.rsplit_once("::").map_or("", |(parent, _)| parent).to_string();
    let mut found = BTreeSet::new();
    for (at, word) in code.match_indices("super::").chain(code.match_indices("crate::")) {
        if code[..at].ends_with("super::") {
            continue;
        }
        let (mut base, mut rest) =
            if word == "super::" { (parent(name), &code[at + 7..]) } else { ("".into(), &code[at + 7..]) };
        while let Some(further) = rest.strip_prefix("super::") {
            (base, rest) = (parent(&base), further);
        }
        for path in listed(rest) {
            let mut module = base.clone();
            for part in path.trim().split("::") {
                let part = part.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
                let deeper = if module.is_empty() { part.to_string() } else { format!("{module}::{part}") };
                match modules.contains_key(&deeper) {
                    true => module = deeper,
                    false => break,
                }
            }
            found.insert(module);
        }
    }
    for child in modules.keys().filter(|other| parent(other) == name) {
        let short = format!("{}::", child.rsplit("::").next().unwrap());
        let mut uses = code.match_indices(&short);
        if uses.any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':'))) {
            found.insert(child.clone());
        }
    }
    found.retain(|module| modules.contains_key(module) && module != name);
    found
}

/// Returns the modules that import themselves by way of others.
fn in_circles(modules: &BTreeMap<String, String>) -> Vec<&str> {
    let graph: BTreeMap<_, _> = modules.keys().map(|name| (name.as_str(), imports(name, modules))).collect();
    let comes_back = |name: &str| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![name]);
        while let Some(module) = next.pop() {
            next.extend(graph[module].iter().map(String::as_str).filter(|other| seen.insert(*other)));
        }
        seen.contains(name)
    };
    graph.keys().copied().filter(|name| comes_back(name)).collect()
}

#[test]
fn files_of_a_room_import_no_circle() {
    for room in WITHOUT_CIRCLES {
        let modules = modules(room);
        assert!(modules.len() > 5 && modules.contains_key(room), "{:?}", modules.keys());
        let circle = in_circles(&modules);
        let how: Vec<_> = circle.iter().map(|name| format!("{name} imports {:?}", imports(name, &modules))).collect();
        assert!(circle.is_empty(), "a circle among the files of {room}:\n{}", how.join("\n"));
    }
}

#[test]
fn circles_are_found() {
    let room = |files: [(&str, &str); 4]| files.map(|(name, code)| (name.to_string(), code.to_string())).into();
    let sound = room([
        ("a", "mod b; mod c; pub use b::B; fn serve() { c::run() }"),
        ("a::b", "use crate::domain::c; struct B;"),
        ("a::c", "use super::b::{self, B}; use super::d::E;"),
        ("a::d", "use super::{ b::B, }; use crate::a::b;"),
    ]);
    assert_eq!(in_circles(&sound), [""; 0]);
    assert_eq!(imports("a::c", &sound).into_iter().collect::<Vec<_>>(), ["a::b", "a::d"]);
    for (name, code, circle) in [
        ("a::b", "use super::{X, Y};", &["a", "a::b", "a::c", "a::d"][..]),
        ("a::b", "fn f() { crate::a::d::g() }", &["a::b", "a::d"]),
        ("a::b", "use super::{ d::{Y, Z}, d::E };", &["a::b", "a::d"]),
        ("a::d", "use super::super::a::c::C;", &["a::c", "a::d"]),
    ] {
        let mut wrong = sound.clone();
        wrong.insert(name.into(), code.into());
        assert_eq!(in_circles(&wrong), circle, "{name}: {code}");
    }
}

/// Files that look into JSON by the names of its keys, each with why: none of them is a node's answer.
const KEYS_OF_ITS_OWN: [(&str, &str); 4] = [
    ("cli/show.rs", "the path that a user gives to `get --field`"),
    ("cli/plan.rs", "its own estimate, which it has just made"),
    ("cli/judge.rs", "makes its own answer"),
    ("cli/router/status.rs", "rows of its own plan"),
];

/// Returns the lines of code that search JSON for a key by its name.
fn key_searches(lines: Vec<(usize, String)>) -> Vec<usize> {
    let search = regex::Regex::new(r#"\w\["[a-z_]+"\]|\.pointer(_mut)?\(|(?:json|value|body|answer)\.get\(""#).unwrap();
    lines.into_iter().filter(|(_, line)| search.is_match(line)).map(|(number, _)| number).collect()
}

#[test]
fn clients_of_the_api_read_typed_answers() {
    let mut found = BTreeMap::<String, Vec<usize>>::new();
    for path in ["cli", "client", "router"].iter().flat_map(|room| sources(&root().join(room))) {
        let lines = key_searches(code(&path));
        if !lines.is_empty() {
            found.insert(path.strip_prefix(root()).unwrap().display().to_string(), lines);
        }
    }
    let allowed: BTreeSet<_> = KEYS_OF_ITS_OWN.iter().map(|(file, _)| file.to_string()).collect();
    let wrong: Vec<_> = found.iter().filter(|(file, _)| !allowed.contains(*file)).collect();
    assert!(wrong.is_empty(), "JSON is searched for keys: {wrong:?}");
    let stale: Vec<_> = allowed.iter().filter(|file| !found.contains_key(*file)).collect();
    assert!(stale.is_empty(), "no exception is needed for {stale:?}");
}

#[test]
fn searches_for_a_key_are_found() {
    let found = |line: &str| !key_searches(vec![(1, line.to_string())]).is_empty();
    for line in ["let at = self.json[\"at\"];", "answer.pointer(\"/slot\")", "if let Some(x) = value.get(\"status\") {"]
    {
        assert!(found(line), "{line}");
    }
    for line in
        ["table([\"NODE\", \"HEAD\"])", "headers.get(\"x-served-by\")", "json!({ \"a\": list[0] })", "&[\"--api\"]"]
    {
        assert!(!found(line), "{line}");
    }
}

/// Most results in the whole tree whose error is a text: nobody can branch on one, or look into it.
const TEXT_ERRORS_MAX: usize = 5;

/// Returns the error of a `Result<` whose arguments begin here; none for an alias with one argument.
fn error_type(arguments: &str) -> Option<&str> {
    let (mut depth, mut from, mut found) = (0, 0, Vec::new());
    for (at, c) in arguments.char_indices() {
        match c {
            '<' | '(' | '[' => depth += 1,
            '>' if arguments[..at].ends_with('-') => {}
            '>' | ')' | ']' => depth -= 1,
            ';' | '{' if depth == 0 => return None,
            _ => {}
        }
        if depth < 0 || (depth == 0 && c == ',') {
            found.push(arguments[from..at].trim());
            from = at + 1;
        }
        if depth < 0 {
            break;
        }
    }
    found.retain(|argument| !argument.is_empty());
    found.get(1).copied()
}

/// Returns the numbers of the lines with a result whose error is a text.
fn text_errors(code: &str) -> Vec<usize> {
    let results =
        code.match_indices("Result<").filter(|(at, word)| error_type(&code[at + word.len()..]) == Some("String"));
    results.map(|(at, _)| 1 + code[..at].matches('\n').count()).collect()
}

#[test]
fn few_errors_are_texts() {
    let mut found = Vec::new();
    for path in ["src", "core", "sim", "benches", "tests"].into_iter().flat_map(|room| files(room, ".rs")) {
        let lines = text_errors(&fs::read_to_string(&path).unwrap());
        found.extend(lines.into_iter().map(|line| format!("{}:{line}", path.display())));
    }
    assert!(
        found.len() <= TEXT_ERRORS_MAX,
        "{} errors are texts, expected at most {TEXT_ERRORS_MAX}:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn errors_that_are_texts_are_found() {
    for (code, lines) in [
        ("fn f() -> Result<(), TEXT> {\n}\nlet x: Vec<Result<u8, TEXT>> = y;", &[1, 3][..]),
        ("fn f(\n) -> Result<\n    BTreeMap<u8, Vec<u8>>,\n    TEXT,\n> {", &[2]),
        ("fn f(g: impl Fn() -> Result<impl Fn() -> u8, TEXT>);", &[1]),
        ("fn f() -> Result<BTreeMap<u8, TEXT>, Error> {", &[]),
        ("fn f() -> io::Result<TEXT> { g::<u8, TEXT>() }", &[]),
        ("fn f() -> Result<TEXT, StringError> {", &[]),
    ] {
        assert_eq!(text_errors(&code.replace("TEXT", "String")), lines, "{code}");
    }
}
