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
use aviary::proxy::request::{FIELDS_MAX, Gateway, HEAD_BYTES_MAX};
use aviary::proxy::wire::{self, Opening, Room};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::harness::{Cluster, MANUAL, http, rollout as example};
use crate::formats::bodies;

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

/// What servers are told of the clients of these tests.
const GATEWAY: Gateway = Gateway { peer: "192.0.2.9", service: "svc", configured: &[] };

/// Reads a request, and returns the head that a server gets with what was understood of it.
fn canonical(bytes: &[u8]) -> Option<(Vec<u8>, String)> {
    let mut room = Room::default();
    let Ok(Opening::Request(asked, length)) = wire::request(bytes, false, &mut room) else { return None };
    assert!(length <= HEAD_BYTES_MAX && asked.fields.len() <= FIELDS_MAX && asked.method != "CONNECT");
    let mut out = Vec::new();
    asked.write(&GATEWAY, &mut out);
    let (method, path, host) = (asked.method, &asked.path_and_query, asked.host(&GATEWAY));
    Some((out, format!("{method} {path} {host} {:?} {} {}", asked.body, asked.awaits_continue, asked.wants_websocket)))
}

#[test]
fn altered_requests_are_refused_or_mean_one_thing_to_the_proxy_and_to_servers() {
    let requests = [
        "POST /predict?a=1 HTTP/1.1\r\nhost: a.example:80\r\ncontent-length: 2\r\nx-user-id: 7\r\n\r\n",
        "POST http://b.example/p HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncookie: a=1\r\ncookie: b=2\r\n\r\n",
        "GET / HTTP/1.0\r\nconnection: keep-alive, x-mine, content-length, host\r\nx-mine: 1\r\n\r\n",
        "GET /ws HTTP/1.1\r\nhost: [::1]:8080\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        "GET /h2 HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: x\r\nte: trailers\r\nx-forwarded-for: 192.0.2.1\r\nforwarded: for=192.0.2.1\r\n\r\n",
        "PUT /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\nproxy-connection: x\r\n\r\n",
    ];
    let (taken, refused) = (Cell::new(0), Cell::new(0));
    let cases = (0..requests.len(), edits(6));
    runner(20_000)
        .run(&cases, |(which, edits)| {
            let bytes = edited(requests[which].as_bytes().to_vec(), &edits);
            let Some((out, meaning)) = canonical(&bytes) else {
                refused.set(refused.get() + 1);
                return Ok(());
            };
            taken.set(taken.get() + 1);
            // A server that reads strictly understands the same, and what the proxy wrote is complete.
            let again = canonical(&out);
            prop_assert!(again.is_some(), "no server can read {:?}", String::from_utf8_lossy(&out));
            prop_assert_eq!(again.map(|(_, meaning)| meaning), Some(meaning));
            let text = String::from_utf8_lossy(&out).to_lowercase();
            let count = |name: &str| text.matches(&format!("\r\n{name}: ")).count();
            prop_assert_eq!(count("host"), 1, "{}", text);
            prop_assert!(count("content-length") + count("transfer-encoding") <= 1, "{}", text);
            prop_assert!(count("http2-settings") + count("proxy-connection") + count("keep-alive") == 0, "{}", text);
            prop_assert_eq!(count("upgrade"), count("connection"), "{}", text);
            prop_assert!(text.ends_with("\r\n\r\n") && text.matches("\r\n\r\n").count() == 1, "{}", text);
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
