//! The JSON Schemas of files: what an editor is told is what the program accepts, for every file of this repository.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use aviary::config::{documents, node, rollout, router};
use jsonschema::Validator;
use serde_json::{Value, json};

use crate::cluster::harness;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Described {
    Rollout,
    Node,
    Router,
}

fn validators() -> BTreeMap<Described, Validator> {
    let of = |name: &str| {
        let output = harness::aviary().args(["schema", name]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
        jsonschema::validator_for(&schema).unwrap_or_else(|why| panic!("{why}"))
    };
    BTreeMap::from([
        (Described::Rollout, of("rollout")),
        (Described::Node, of("node")),
        (Described::Router, of("router")),
    ])
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => files(&entry, found),
            false => found.push(entry),
        }
    }
}

/// Returns the fenced blocks of a page that are files in themselves.
fn blocks(page: &str) -> Vec<String> {
    let fenced = page.split("```").skip(1).step_by(2);
    fenced.filter_map(|block| block.strip_prefix("yaml\n")).map(str::to_owned).collect()
}

/// Returns what a text of YAML describes, document by document.
fn described(place: &str, text: &str) -> Vec<(String, Described, Value, String)> {
    let mut found = Vec::new();
    for document in documents(text) {
        let Ok(value) = serde_saphyr::from_str::<Value>(&document) else { continue };
        match (value["apiVersion"].as_str(), value["kind"].as_str()) {
            (Some("aviary/v1"), Some("Rollout")) => found.push((place.into(), Described::Rollout, value, document)),
            (Some("aviary/v1"), Some("Router")) => found.push((place.into(), Described::Router, value, document)),
            _ => {}
        }
    }
    found
}

/// Returns every file of a rollout, a node and a router in the repository, with its place and text.
fn samples() -> Vec<(String, Described, Value, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![root.join("README.md")];
    ["config", "deploy", "docs"].iter().for_each(|folder| files(&root.join(folder), &mut paths));
    let mut found = Vec::new();
    for path in paths {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let place = path.strip_prefix(root).unwrap().display().to_string();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("yaml" | "yml" | "json") => found.extend(described(&place, &text)),
            Some("md") => blocks(&text).iter().for_each(|block| found.extend(described(&place, block))),
            Some("toml") => {
                let value: Value = toml::from_str(&text).unwrap();
                if value["node"].is_object() {
                    found.push((place, Described::Node, value, text));
                }
            }
            _ => {}
        }
    }
    found
}

#[test]
fn every_file_of_the_repository_is_as_its_schema_says() {
    let validators = validators();
    let mut counts = BTreeMap::<Described, usize>::new();
    for (place, what, value, text) in samples() {
        let errors: Vec<_> = validators[&what].iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{place}: {errors:?}");
        let is_accepted = match what {
            Described::Rollout => rollout::parse(&text, &place).map(drop).map_err(|why| why.to_string()),
            Described::Router => router::RouterConfig::of(&text, &place).map(drop).map_err(|why| why.to_string()),
            Described::Node => node::NodeConfig::of(&text, Path::new(&place)).map(drop).map_err(|why| why.to_string()),
        };
        is_accepted.unwrap_or_else(|why| panic!("{why}"));
        *counts.entry(what).or_default() += 1;
    }
    assert!(counts[&Described::Node] >= 9 && counts[&Described::Rollout] >= 2, "{counts:?}");
    assert!(counts[&Described::Router] >= 1, "{counts:?}");
}

#[test]
fn what_the_program_refuses_by_its_shape_the_schema_refuses_too() {
    let validators = validators();
    let samples = samples();
    for what in [Described::Rollout, Described::Node, Described::Router] {
        let (place, _, value, _) = samples.iter().find(|(_, found, ..)| *found == what).unwrap();
        // An unknown key at any place where keys are fixed.
        let parts: &[&str] = match what {
            Described::Rollout => &["", "/metadata", "/spec", "/spec/stable", "/spec/steps/0", "/spec/analysis"],
            Described::Node => &["", "/node", "/listen"],
            Described::Router => &["", "/metadata", "/spec", "/spec/stable", "/spec/kafka"],
        };
        for part in parts {
            let mut wrong = value.clone();
            let at = wrong.pointer_mut(part).unwrap_or_else(|| panic!("{place} has no {part}"));
            at.as_object_mut().unwrap().insert("surelyUnknown".into(), json!(1));
            assert!(!validators[&what].is_valid(&wrong), "{place}: {part}");
        }
        // A part that is missing, and one of another kind.
        for part in parts.iter().filter(|part| part.matches('/').count() == 1) {
            let mut wrong = value.clone();
            *wrong.pointer_mut(part).unwrap() = json!(7);
            assert!(!validators[&what].is_valid(&wrong), "{place}: {part}");
        }
    }
    let (_, _, value, _) = samples.iter().find(|(_, found, ..)| *found == Described::Rollout).unwrap();
    for (part, wrong) in
        [("/spec/steps/0/setWeight", json!("5")), ("/spec/steps", json!({})), ("/metadata/name", json!("a b"))]
    {
        let mut file = value.clone();
        *file.pointer_mut(part).unwrap_or_else(|| panic!("no {part}")) = wrong;
        assert!(!validators[&Described::Rollout].is_valid(&file), "{part}");
    }
}
