//! Bytes that nobody meant: what is read from disks, wires, files and sockets never panics, and what is taken is whole.
//!
//! The corpus is small and kept here: values of each format, the example rollout, one request of each kind.
//! `AVIARY_CASES=100000` for longer runs. Frames have their own, beside the frame codec.

use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use aviary::config::rollout;
use aviary::protocol::checkpoint::Checkpoint;
use aviary::protocol::codec;
use aviary::protocol::message::Message;
use aviary::protocol::record::{AcceptorState, Chosen, Record, Slot};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::harness::{Cluster, MANUAL, http, rollout as example};
use crate::formats::bodies;

#[path = "../../fuzz/canonical.rs"]
mod canonical;

fn rounds(default: u32) -> u32 {
    std::env::var("AVIARY_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn runner(default: u32) -> TestRunner {
    TestRunner::new(Config { cases: rounds(default), failure_persistence: None, ..Config::default() })
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// One change to some bytes.
#[derive(Debug, Clone)]
enum Edit {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, u8),
    Repeat(prop::sample::Index, u8),
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<prop::sample::Index>;
    let edit = prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        1 => at().prop_map(Edit::Cut),
        2 => (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        2 => (at(), 1u8..9).prop_map(|(at, count)| Edit::Remove(at, count)),
        1 => (at(), 1u8..40).prop_map(|(at, count)| Edit::Repeat(at, count)),
    ];
    prop::collection::vec(edit, 1..most)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        if bytes.is_empty() {
            break;
        }
        let length = bytes.len();
        match edit {
            Edit::Set(at, byte) => bytes[at.index(length)] = *byte,
            Edit::Cut(at) => bytes.truncate(at.index(length)),
            Edit::Insert(at, more) => drop(bytes.splice(at.index(length)..at.index(length), more.iter().copied())),
            Edit::Remove(at, count) => {
                let from = at.index(length);
                drop(bytes.drain(from..(from + usize::from(*count)).min(length)));
            }
            Edit::Repeat(at, count) => {
                let (from, to) = (at.index(length), (at.index(length) + usize::from(*count)).min(length));
                let part = bytes[from..to].to_vec();
                drop(bytes.splice(from..from, part));
            }
        }
    }
    bytes
}

/// What is taken is the one encoding of what it says.
fn takes<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) -> bool {
    match codec::decode::<T>(bytes) {
        Ok(value) => {
            assert_eq!(codec::encode(&value), bytes, "{value:?}");
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

#[test]
fn altered_records_acceptor_states_and_messages_are_refused_or_whole() {
    let corpus = bodies();
    assert!(corpus.len() > 15);
    let taken = Cell::new(0);
    let cases = (0..corpus.len(), edits(5));
    runner(20_000)
        .run(&cases, |(which, edits)| {
            let bytes = edited(corpus[which].1.clone(), &edits);
            let found = [
                takes::<Chosen>(&bytes),
                takes::<Record>(&bytes),
                takes::<AcceptorState>(&bytes),
                takes::<Message>(&bytes),
            ];
            taken.set(taken.get() + found.iter().filter(|taken| **taken).count());
            for format in [3, 4] {
                let _ = Checkpoint { slot: Slot(7), format, bytes: bytes.clone().into() }.ledger();
            }
            Ok(())
        })
        .unwrap();
    assert!(taken.get() > 0, "no alteration was harmless: nothing was tested behind the decoder");
}

#[test]
fn altered_rollout_files_are_refused_with_words_or_keep_the_rules() {
    let good = fs::read(path("config/rollout.yaml")).unwrap();
    let (taken, refused) = (Cell::new(0), Cell::new(0));
    runner(4_000)
        .run(&edits(6), |edits| {
            let text = String::from_utf8_lossy(&edited(good.clone(), &edits)).into_owned();
            match rollout::parse(&text, "fuzzed.yaml") {
                Ok(spec) => {
                    taken.set(taken.get() + 1);
                    prop_assert!(spec.stages.windows(2).all(|pair| pair[0].weight <= pair[1].weight));
                    prop_assert_eq!(spec.stages.last().unwrap().weight.bp(), 10_000);
                    prop_assert!(spec.stable.version != spec.canary.version);
                }
                Err(error) => {
                    refused.set(refused.get() + 1);
                    prop_assert!(error.to_string().starts_with("fuzzed.yaml"), "{}", error);
                }
            }
            Ok(())
        })
        .unwrap();
    println!("{} taken, {} refused", taken.get(), refused.get());
    assert!(taken.get() > 0 && refused.get() > 0);
}

/// Returns the fuzz target's corpus: a file for each kind of request.
fn corpus() -> Vec<Vec<u8>> {
    let files = fs::read_dir(path("fuzz/corpus/request")).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn altered_requests_are_refused_or_mean_one_thing_to_the_proxy_and_to_servers() {
    let requests = corpus();
    assert!(requests.len() >= 20, "{} files in the corpus", requests.len());
    let taken: usize = requests.iter().map(|request| canonical::check(request)).sum();
    assert!(taken >= 10, "{taken} of the corpus are taken");
    let (taken, refused) = (Cell::new(0), Cell::new(0));
    let cases = (0..requests.len(), edits(6));
    runner(20_000)
        .run(&cases, |(which, edits)| {
            match canonical::check(&edited(requests[which].clone(), &edits)) {
                0 => refused.set(refused.get() + 1),
                found => taken.set(taken.get() + found),
            }
            Ok(())
        })
        .unwrap();
    assert!(taken.get() > 0 && refused.get() > 0, "{} taken, {} refused", taken.get(), refused.get());
}

#[test]
fn malformed_requests_on_both_http_ports_cost_nothing_but_an_answer() {
    let cluster = Cluster::start();
    let text = example("x", "y", MANUAL).replace("url: \"x\"", "answer: node").replace("url: \"y\"", "answer: node");
    cluster.apply(0, &text);
    let node = &cluster.nodes[0];
    let requests = [
        "POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nx-user-id: 7\r\n\r\n{}",
        "POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "POST /v1/rollouts/svc/abort HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
        "GET /v1/events HTTP/1.1\r\nhost: a\r\nlast-event-id: 4\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        "GET /v1/rollouts/svc?consistency=linearizable HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    let cases = (0..requests.len(), any::<bool>(), edits(6));
    runner(600)
        .run(&cases, |(which, data, edits)| {
            let bytes = edited(requests[which].as_bytes().to_vec(), &edits);
            let port = if data { node.data } else { node.api };
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.read(&mut [0; 512]);
            Ok(())
        })
        .unwrap();
    for port in [node.data, node.api] {
        assert_eq!(http(port, "GET", "/livez", &[], "").unwrap().status, 200);
    }
    assert_eq!(http(node.data, "POST", "/predict", &[], "{}").unwrap().status, 200);
    cluster.assert_no_panic();
}
