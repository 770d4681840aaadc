//! The field's words, where people meet the program and in its code: `tests/words.txt` lists what must not appear, and what to say
//! instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use regex::Regex;

/// A word that must not appear.
struct Forbidden {
    word: Regex,
    instead: String,
    except: Option<Regex>,
}

impl Forbidden {
    /// Reads a line of the list.
    fn parse(line: &str) -> Self {
        let (word, rest) = line.split_once(" => ").unwrap_or_else(|| panic!("{line:?} has no \" => \""));
        let mut parts = rest.split(" ; ");
        let instead = parts.next().unwrap().to_string();
        let (mut except, mut because) = (None, false);
        for part in parts {
            match part.split_once(": ") {
                Some(("except", pattern)) => except = Some(Regex::new(pattern).unwrap()),
                Some(("because", why)) => because = !why.is_empty(),
                _ => panic!("{part:?} in {line:?}, expected except: or because:"),
            }
        }
        assert_eq!(except.is_some(), because, "{line:?}: an exception has a reason, and only an exception");
        Self { word: Regex::new(&format!(r"\b(?:{word})\b")).unwrap(), instead, except }
    }

    /// Returns true when a line, as words in small letters, has the word where it may not.
    fn is_in(&self, words: &str) -> bool {
        self.word.is_match(words) && !self.except.as_ref().is_some_and(|except| except.is_match(words))
    }
}

fn list() -> Vec<Forbidden> {
    let text = fs::read_to_string(root().join("tests/words.txt")).unwrap();
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(Forbidden::parse).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a text as words in small letters: names are split where a capital or an underscore begins the next word.
fn words(text: &str) -> String {
    let mut words = String::with_capacity(text.len() + 16);
    let mut before = ' ';
    for c in text.chars() {
        if c.is_uppercase() && before.is_lowercase() {
            words.push(' ');
        }
        words.extend(if c == '_' { ' ' } else { c }.to_lowercase());
        before = c;
    }
    words
}

/// A text, and where it stands.
type Text = (String, String);

/// Returns every complaint about these texts, line by line.
fn complaints(texts: &[Text], list: &[Forbidden]) -> Vec<String> {
    let mut found = BTreeSet::new();
    for (place, text) in texts {
        for line in text.lines() {
            let words = words(line);
            for forbidden in list.iter().filter(|forbidden| forbidden.is_in(&words)) {
                found.insert(format!(
                    "{place}: {:?}, expected {}: {}",
                    forbidden.word.as_str(),
                    forbidden.instead,
                    line.trim()
                ));
            }
        }
    }
    found.into_iter().collect()
}

/// Returns the files below a directory that end so.
pub fn files(dir: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false if path.to_string_lossy().ends_with(ending) => found.push(path),
                false => {}
            }
        }
    }
    assert!(!found.is_empty(), "no {ending} below {dir}");
    found.sort();
    found
}

/// Returns the help of the program and of all its verbs.
fn help() -> Vec<Text> {
    let (mut texts, mut open) = (Vec::new(), vec![Vec::<String>::new()]);
    while let Some(verb) = open.pop() {
        let output = Command::new(env!("CARGO_BIN_EXE_aviary")).args(&verb).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Usage: aviary"), "aviary {} --help: {text}", verb.join(" "));
        let verbs = text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        // A verb stands two columns in; what explains it, further.
        let verbs = verbs.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let verbs = verbs.map(|line| line.split_whitespace().next().unwrap()).filter(|verb| *verb != "help");
        open.extend(verbs.map(|next| [verb.clone(), vec![next.to_string()]].concat()));
        texts.push((format!("aviary {} --help", verb.join(" ")), text));
    }
    assert!(texts.len() > 25, "{} verbs found", texts.len());
    texts
}

/// Returns the string literals of the program, without those of its tests, and the names that serde gives to fields and variants.
fn literals_and_keys() -> Vec<Text> {
    let token =
        Regex::new(r###"(?s)//[^\n]*|b?r".*?"|b?r#".*?"#|b?r##".*?"##|"(?:\\.|[^"\\])*"|'(?:\\.[^']*|[^'\\])'"###)
            .unwrap();
    let derive = Regex::new(r"(?s)#\[derive\([^)]*\b(?:Serialize|Deserialize)\b[^)]*\)\].*?\n\}").unwrap();
    let name = Regex::new(r"(?m)^\s+(?:pub(?:\([a-z]+\))? )?(\w+)(?::| \{|\(|,)").unwrap();
    let mut texts = Vec::new();
    for path in [files("src", ".rs"), files("core/src", ".rs")].concat() {
        let place = path.strip_prefix(root()).unwrap().display().to_string();
        if ["/tests/", "tests.rs", "/power/", "conformance.rs", "fixtures.rs"].iter().any(|test| place.contains(test)) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap();
        for literal in token.find_iter(code).filter(|found| !found.as_str().starts_with("//")) {
            texts.push((place.clone(), literal.as_str().replace("\\n", "\n")));
        }
        for item in derive.find_iter(code) {
            texts.extend(name.captures_iter(item.as_str()).map(|key| (place.clone(), key[1].to_string())));
        }
    }
    texts
}

fn whole(paths: Vec<PathBuf>) -> Vec<Text> {
    let text =
        |path: PathBuf| (path.strip_prefix(root()).unwrap().display().to_string(), fs::read_to_string(&path).unwrap());
    paths.into_iter().map(text).collect()
}

#[test]
fn help_and_errors_and_names_and_docs_use_the_fields_words() {
    let docs = [files("docs", ".md"), vec![root().join("README.md"), root().join("ARCHITECTURE.md")]].concat();
    let texts = [help(), literals_and_keys(), whole(files("proto", ".proto")), whole(docs)].concat();
    let found = complaints(&texts, &list());
    assert!(found.is_empty(), "tests/words.txt says what to write instead\n{}", found.join("\n"));
}

/// Files that name old words on purpose.
const ABOUT_WORDS: [&str; 1] = ["tests/it/words.rs"];

#[test]
fn names_and_comments_use_the_fields_words() {
    let code = ["core/src", "src", "sim", "tests", "benches"].map(|dir| files(dir, ".rs")).concat();
    let scripts = [files("tests", ".py"), files("benches", ".py"), files("scripts", ".sh")].concat();
    let scenes = files("sim/scripts", ".txt");
    let whole = whole([code, scripts, scenes].concat()).into_iter();
    let texts: Vec<_> = whole.filter(|(place, _)| !ABOUT_WORDS.contains(&&**place)).collect();
    assert!(texts.len() > 200, "{} files found", texts.len());
    let found = complaints(&texts, &list());
    assert!(found.is_empty(), "tests/words.txt says what to write instead\n{}", found.join("\n"));
}

#[test]
fn the_list_finds_its_words_however_they_are_written_and_spares_its_exceptions() {
    let list = list();
    let found = |text: &str| !complaints(&[("here".into(), text.into())], &list).is_empty();
    for text in
        ["the last raise", "last_lowering", "LastLowering", "\"benched\"", "x-aviary-epoch", "The door", "a breaker"]
    {
        assert!(found(text), "{text:?} is not found");
    }
    for text in ["raises the weight", "indoors", "the leader epoch", "the circuit breaker", "AVIARY_CIRCUIT_BREAKER"] {
        assert!(!found(text), "{text:?} is found");
    }
}

/// As many type names may be defined more than once: a reader who searches for one should find one.
const DEFINED_TWICE_MAX: usize = 10;

/// Returns the types and traits that a file defines, with their lines; without associated types, and without test modules.
fn defined(text: &str) -> Vec<(usize, String)> {
    let name = Regex::new(r"^(?:pub(?:\([^)]*\))? )?(struct|enum|union|trait|type) (\w+)").unwrap();
    let impls = Regex::new(r"^(?:pub(?:\([^)]*\))? )?(?:impl|trait)\b").unwrap();
    let mut found = Vec::new();
    // The indentation of the test module, and of the `impl` or trait, that the line is in.
    let (mut tests, mut inside, mut marked) = (None, None, false);
    for (number, line) in text.lines().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let ends = |block: Option<usize>| block.is_some_and(|at| code == "}" && indent == at);
        if tests.is_some() {
            tests = tests.filter(|_| !ends(tests));
            continue;
        }
        inside = inside.filter(|_| !ends(inside));
        if marked && code.starts_with("mod ") && code.ends_with('{') {
            tests = Some(indent);
        } else if let Some(item) = name.captures(code).filter(|item| &item[1] != "type" || inside.is_none()) {
            found.push((number + 1, item[2].to_string()));
        }
        if inside.is_none() && impls.is_match(code) && !code.ends_with('}') {
            inside = Some(indent);
        }
        marked = code == "#[cfg(test)]" || (marked && code.starts_with("#["));
    }
    found
}

/// Returns the names that these texts define more than once, each with its places.
fn defined_twice(texts: &[Text]) -> Vec<String> {
    let mut places = BTreeMap::<String, Vec<String>>::new();
    for (place, text) in texts {
        for (line, name) in defined(text) {
            places.entry(name).or_default().push(format!("{place}:{line}"));
        }
    }
    let twice = places.into_iter().filter(|(_, places)| places.len() > 1);
    twice.map(|(name, places)| format!("{name}: {}", places.join(", "))).collect()
}

#[test]
fn few_type_names_are_defined_more_than_once() {
    let texts = whole(["core/src", "src", "sim"].map(|dir| files(dir, ".rs")).concat());
    let tests = Regex::new(r"(?:^|[/_])tests(?:/|\.rs$)").unwrap();
    let texts: Vec<_> = texts.into_iter().filter(|(place, _)| !tests.is_match(place)).collect();
    let names: usize = texts.iter().map(|(_, text)| defined(text).len()).sum();
    assert!(names > 400, "{names} names found");
    let twice = defined_twice(&texts);
    assert!(
        twice.len() <= DEFINED_TWICE_MAX,
        "{} type names are defined more than once, expected at most {DEFINED_TWICE_MAX}\n{}",
        twice.len(),
        twice.join("\n")
    );
}

#[test]
fn names_that_are_defined_twice_are_found() {
    let text = |place: &str, text: &str| (place.to_string(), text.to_string());
    let one = "pub struct Disk {\n    kind: Kind,\n}\n\nimpl Store for Disk {\n    type Error = Fault;\n    fn kind() {}\n}\n\
               pub(crate) enum Kind { A }\n#[cfg(test)]\nmod tests {\n    struct Kind;\n}\n";
    let two = "#[cfg(test)]\nmod later;\npub trait Disk<T>: Send {\n    type Error;\n}\n// struct Kind is elsewhere\n\
               type Error = String;\nfn f() {\n    struct Local;\n}\n";
    assert_eq!(defined_twice(&[text("one.rs", one), text("two.rs", two)]), ["Disk: one.rs:1, two.rs:3"]);
    let all = [text("a.rs", two), text("b.rs", two)];
    assert_eq!(
        defined_twice(&all),
        ["Disk: a.rs:3, b.rs:3", "Error: a.rs:7, b.rs:7", "Local: a.rs:9, b.rs:9"],
        "without what an impl or a trait names"
    );
}
