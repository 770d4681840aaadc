//! `aviary judge` and `aviary replay`, as other programs and people would use them.

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
        ("{\"timestamp_ms\":1,\"version\":\"canary\",\"status\":200,\"latency_ms\":-1}", "expected both to be 0 to"),
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

const ROLLOUT: &str = "apiVersion: aviary/v1
kind: Rollout
metadata: { name: svc }
spec:
  stable: { version: v1, url: 'http://127.0.0.1:1' }
  canary: { version: v2, url: 'http://127.0.0.1:2' }
  steps: [ { setWeight: 20 }, { pause: { duration: 10m } }, { setWeight: 100 } ]
  analysis:
    minSamples: 50
    window: 10s
    metrics:
      - { name: errors, strategy: THRESHOLD, thresholdRange: { max: 5 } }
      - { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.01 }
";

#[test]
fn a_recording_is_judged_by_a_rollouts_own_rules_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let (rollout, recording) = (dir.path().join("rollout.yaml"), dir.path().join("recording.ndjson"));
    std::fs::write(&rollout, ROLLOUT).unwrap();
    std::fs::write(&recording, requests(30, 20, false)).unwrap();
    let replay = |more: &[&str]| {
        let output = aviary().arg("replay").arg("-f").arg(&rollout).args(more).arg(&recording).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let json = replay(&["--json"]);
    assert_eq!(replay(&["--json"]), json, "the same each time");
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let windows: Vec<_> = lines.iter().filter(|line| line["is_window"] == true).collect();
    let spans: Vec<_> = windows.iter().map(|line| (line["from_ms"].as_u64(), line["to_ms"].as_u64())).collect();
    assert_eq!(
        spans,
        [(Some(0), Some(10_000)), (Some(10_000), Some(20_000)), (Some(20_000), Some(30_000))],
        "each once"
    );
    assert!(windows[1]["verdict"]["Hold"].as_str().unwrap().contains("errors-vs-stable"), "{}", windows[1]);
    assert_eq!(windows[2]["verdict"]["Rollback"], "errors: 100.00 % of 200 answers, limit 5 %");
    let found =
        lines.iter().find(|line| line["sequential"].is_object() && line["verdict"]["Rollback"].is_string()).unwrap();
    let reason = found["verdict"]["Rollback"].as_str().unwrap();
    assert!(reason.contains("errors-vs-stable") && reason.contains("20 of 420 failed, stable's 0 of 1680"), "{reason}");
    assert_eq!((&found["to_ms"], &found["sequential"]["bound"]), (&21_000.into(), &100.0.into()));
    let text = replay(&[]);
    assert!(text.contains("00:00:20-00:00:30  ROLLBACK errors: 100.00 %"), "{text}");
    // `judge -f` decides by the same rules, window by window.
    let (_, judged, _) = judge(&["-f", rollout.to_str().unwrap()], &requests(30, 20, true));
    assert_eq!((&judged[8]["decision"], &judged[9]["decision"]), (&"HOLD".into(), &"HOLD".into()));
    assert_eq!((&judged[20]["decision"], judged.len()), (&"ROLLBACK".into(), 30));
    let (code, _, complaint) = judge(&["-f", "/nowhere.yaml"], "");
    assert!(code == Some(1) && complaint.contains("/nowhere.yaml"), "{complaint}");
}

#[test]
fn a_plan_says_what_a_rollout_can_find() {
    let dir = tempfile::tempdir().unwrap();
    let rollout = dir.path().join("rollout.yaml");
    std::fs::write(&rollout, ROLLOUT.replace("10m", "2m")).unwrap();
    let plan = |rps: &str| {
        let mut command = aviary();
        command.args(["plan", "-o", "json", "--runs", "10", "--error-rate", "1", "--rps", rps, "-f"]).arg(&rollout);
        let output = command.output().unwrap();
        (output.status.success(), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let steps = |rps: &str| {
        let (_, stdout, complaint) = plan(rps);
        let plan: Value = serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {complaint}"));
        plan["steps"].as_array().unwrap().clone()
    };
    let (busy, quiet) = (steps("200"), steps("2"));
    assert_eq!((busy.len(), &busy[0]["stopped_though_healthy"], &busy[0]["runs"]), (2, &0.into(), &10.into()));
    let found = |steps: &[Value]| steps[0]["errors_found"]["size"].as_f64().unwrap_or(2.0);
    assert!(found(&busy) <= 0.02 && found(&quiet) > found(&busy), "{busy:?} {quiet:?}");
    assert!(busy[0]["ready_seconds"].as_u64() < Some(100) && quiet[0]["ready_seconds"].is_null(), "{busy:?} {quiet:?}");
    let (ok, _, complaint) = plan("0");
    assert!(!ok && complaint.contains("expected 0.001 to 10000000"), "{complaint}");
}

#[test]
fn requests_that_come_late_are_judged_with_those_of_their_own_time() {
    let dir = tempfile::tempdir().unwrap();
    let rollout = dir.path().join("rollout.yaml");
    std::fs::write(&rollout, ROLLOUT).unwrap();
    let windows = |name: &str, recording: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, recording).unwrap();
        let output = aviary().arg("replay").arg("-f").arg(&rollout).arg("--json").arg(&path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let lines: Vec<Value> =
            String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let closed = lines.into_iter().filter(|line| line["is_window"] == true);
        closed.map(|line| (line["canary"].clone(), line["stable"].clone())).collect::<Vec<_>>()
    };
    let all = requests(40, 25, false);
    let in_order = windows("in-order", all.clone());
    let mut late: Vec<(u64, &str)> = all
        .lines()
        .filter(|line| line.contains("\"id\""))
        .map(|line| {
            let request: Value = serde_json::from_str(line).unwrap();
            let (id, at) = (request["id"].as_u64().unwrap(), request["timestamp_ms"].as_u64().unwrap());
            (at + id * 7_919 % 3_000, line)
        })
        .collect();
    late.sort();
    let messy = windows("late", late.iter().map(|(_, line)| format!("{line}\n")).collect());
    assert_eq!((in_order.len(), messy.len()), (4, 4));
    // The first seconds pass before anybody knows how late requests come.
    assert_eq!(messy[1..], in_order[1..]);
}
