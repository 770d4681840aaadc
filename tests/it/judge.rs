//! `aviary judge`, as another program would use it.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::cluster::harness::aviary;

/// Returns exit code, lines and complaints for what is sent.
fn judge(arguments: &[&str], input: &str) -> (Option<i32>, Vec<Value>, String) {
    let mut command = aviary();
    command.arg("judge").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_string();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.code(), lines, String::from_utf8(output.stderr).unwrap())
}

/// Returns so many seconds of a hundred requests each, a fifth the canary's, which fails from a second on.
fn requests(seconds: u64, fails_from: u64, ticks: bool) -> String {
    let mut text = String::from("{\"type\":\"start\",\"canary_share\":0.2,\"tick_ms\":1000,\"horizon_ms\":600000}\n");
    for second in 0..seconds {
        for i in 0..100 {
            let canary = i % 5 == 0;
            let (version, status) =
                (if canary { "canary" } else { "stable" }, if canary && second >= fails_from { 503 } else { 200 });
            let (id, at) = (second * 100 + i, second * 1000 + i * 10);
            let line = format!(
                "{{\"id\":{id},\"timestamp_ms\":{at},\"version\":\"{version}\",\"status\":{status},\"latency_ms\":{}}}\n",
                50 + i
            );
            text += &line;
            // It comes twice, and counts once.
            text += &line;
        }
        if ticks {
            text += &format!("{{\"type\":\"tick\",\"timestamp_ms\":{}}}\n", (second + 1) * 1000);
        }
    }
    text + "{\"type\":\"end\"}\n"
}

#[test]
fn harm_is_judged_with_its_evidence_and_the_same_each_time() {
    let (code, lines, _) = judge(&[], &requests(30, 20, true));
    assert_eq!((code, lines.len()), (Some(0), 30));
    let at = lines.iter().position(|line| line["decision"] == "ROLLBACK").expect("found");
    let found = &lines[at];
    assert_eq!((at, found["timestamp_ms"].as_u64()), (20, Some(21_000)), "in the first second of it");
    assert_eq!((&found["canary"]["requests"], &found["canary"]["errors"]), (&420.into(), &20.into()));
    assert!(found["e"].as_f64() >= Some(100.0) && found["e_errors"].as_f64() >= Some(100.0), "{found}");
    assert_eq!(judge(&[], &requests(30, 20, true)).1, lines, "a replay decides alike");
    // Without ticks, each second of the requests' own time is one; the last is still open.
    let (_, streamed, _) = judge(&[], &requests(30, 20, false));
    assert_eq!(streamed, lines[..29]);
}

#[test]
fn what_is_no_request_is_named_by_its_line() {
    for (line, expected) in [
        (
            "{\"timestamp_ms\":1,\"version\":\"beta\",\"status\":200,\"latency_ms\":1}",
            "expected \"stable\" or \"canary\"",
        ),
        (
            "{\"timestamp_ms\":1,\"version\":\"canary\",\"status\":200,\"latency_ms\":-1}",
            "expected both to be at least 0",
        ),
        ("{\"timestamp_ms\":1,\"version\":\"canary\"}", "missing field"),
        ("{\"type\":\"stop\"}", "unknown variant"),
        ("nothing", "expected"),
    ] {
        let (code, _, complaint) = judge(&[], &format!("{{\"type\":\"start\"}}\n\n{line}\n"));
        assert!(code == Some(1) && complaint.contains("line 3") && complaint.contains(expected), "{complaint}");
    }
    let (code, _, complaint) = judge(&["--alpha", "2"], "");
    assert!(code != Some(0) && complaint.contains("expected 0.0001 to 0.5"), "{complaint}");
}
