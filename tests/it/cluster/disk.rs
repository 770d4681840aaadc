//! Disks lie, fill up and disappear; processes die at any moment.
//!
//! AVIARY_ROUNDS says how often (default few, for every change's tests).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::harness::{Cluster, MANUAL, NAMES, copy, http, rollout, wait};

fn rounds(default: usize) -> usize {
    std::env::var("AVIARY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn started() -> Cluster {
    let cluster = Cluster::start();
    begin(&cluster);
    cluster
}

fn begin(cluster: &Cluster) {
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
}

/// Has one more record decided, through node `i`; returns its key and slot.
fn decide(cluster: &Cluster, i: usize, number: usize) -> Option<(String, u64, &'static str)> {
    let key = format!("key-{number}");
    let verb = if number.is_multiple_of(2) { "pause" } else { "resume" };
    let path = format!("/v1/rollouts/svc/{verb}");
    let answer = http(cluster.nodes[i].api, "POST", &path, &[("idempotency-key", &key)], "{}").ok()?;
    (answer.status == 200 && answer.json()["status"] == "COMMITTED")
        .then(|| (key, answer.json()["slot"].as_u64().unwrap(), verb))
}

fn console(cluster: &Cluster, i: usize) -> String {
    fs::read_to_string(cluster.dir.path().join(format!("{}.console", NAMES[i]))).unwrap_or_default()
}

fn members(cluster: &Cluster, i: usize) -> Option<Value> {
    Some(http(cluster.nodes[i].api, "GET", "/v1/cluster", &[], "").ok()?.json()["members"].clone())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true if path.file_name().unwrap().to_string_lossy().starts_with("quarantine") => {}
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

/// Damages one file, or the journal as a whole; returns what was done, in words.
fn damage(dir: &Path, random: &mut SmallRng) -> String {
    let files = files(dir);
    let path = &files[random.random_range(0..files.len())];
    let shown = path.strip_prefix(dir).unwrap().display().to_string();
    let mut bytes = fs::read(path).unwrap();
    let at = if bytes.is_empty() { 0 } else { random.random_range(0..bytes.len()) };
    match random.random_range(0..7) {
        0 if !bytes.is_empty() => {
            bytes[at] ^= 1 << random.random_range(0..8);
            fs::write(path, bytes).unwrap();
            format!("a bit flipped in {shown} at {at}")
        }
        1 => {
            let end = (at + 4096).min(bytes.len());
            bytes[at..end].fill(0);
            fs::write(path, bytes).unwrap();
            format!("{shown} zeroed from {at}")
        }
        2 => {
            bytes.truncate(at);
            fs::write(path, bytes).unwrap();
            format!("{shown} truncated to {at}")
        }
        3 => {
            fs::remove_file(path).unwrap();
            format!("{shown} removed")
        }
        4 => {
            fs::remove_dir_all(dir.join("journal")).unwrap();
            "the journal's directory removed".into()
        }
        5 => {
            fs::write(dir.join("journal/snap.0000000000000042.generating"), b"half").unwrap();
            "a half-written snapshot left".into()
        }
        _ => {
            let mut acceptor = fs::read(dir.join("acceptor")).unwrap();
            let half = acceptor.len() / 2;
            let slot = random.random_range(0..3);
            let (from, to) = [(0, half), (half, 2 * half), (0, 2 * half)][slot];
            acceptor[from..to].fill(0xff);
            fs::write(dir.join("acceptor"), acceptor).unwrap();
            format!("acceptor slots ruined: {}", ["first", "second", "both"][slot])
        }
    }
}

#[test]
fn whatever_is_damaged_a_node_heals_or_says_why_and_never_votes_from_less() {
    let mut cluster = started();
    let mut random = SmallRng::seed_from_u64(3);
    let (mut refused, mut readmitted, mut healed) = (0, 0, 0);
    for round in 0..rounds(10) {
        assert!(decide(&cluster, 0, 2 * round).is_some(), "round {round}");
        cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
        cluster.kill(2);
        let dir = cluster.data_dir(2);
        let kept = cluster.dir.path().join("kept");
        copy(&dir, &kept);
        let what = damage(&dir, &mut random);
        assert!(decide(&cluster, 0, 2 * round + 1).is_some(), "{what}: two nodes go on");
        cluster.spawn(2, None);
        let port = cluster.nodes[2].data;
        let began = Instant::now();
        let ready = wait(&format!("{what}: an end or a start"), Duration::from_secs(15), || {
            if cluster.nodes[2].process.as_mut().unwrap().ended_within(Duration::ZERO) {
                return Some(false);
            }
            http(port, "GET", "/livez", &[], "").ok().map(|_| true)
        });
        if !ready {
            // It can't be helped here: one line names the file, and nothing was lost that was there.
            let text = console(&cluster, 2);
            let last = text.lines().rev().find(|line| line.starts_with("error: ")).unwrap_or_default();
            assert!(last.contains("data-c"), "{what}: the last error names no file: {text}");
            cluster.nodes[2].process = None;
            fs::remove_dir_all(&dir).unwrap();
            copy(&kept, &dir);
            cluster.spawn(2, None);
            println!("refused: {last}");
            refused += 1;
        }
        fs::remove_dir_all(&kept).unwrap();
        let caught_up = wait(&format!("{what}: caught up"), Duration::from_secs(5), || {
            let (a, c) = (cluster.state(0)?, cluster.state(2)?);
            (a["hash"] == c["hash"] && a["slot"] == c["slot"]).then_some(c)
        });
        if caught_up["mode"] == "learner" {
            // Its acceptor file is gone: its vote must not count. With one more node dead, nothing can be decided.
            let incarnation = wait("its incarnation", Duration::from_secs(3), || {
                let why = members(&cluster, 0)?["c"]["counts_not"].as_str()?.to_string();
                Some(why.split("incarnation is ").nth(1)?[..16].to_string())
            });
            if readmitted == 0 {
                cluster.kill(1);
                let answer = cluster.post(0, "/v1/rollouts/svc/abort", None, "{}");
                assert_eq!(answer.status, 503, "{what}: {}", String::from_utf8_lossy(&answer.body));
                cluster.spawn(1, None);
                cluster.wait_ready(1);
                // Longer than a ballot takes: the abort may still be decided now that there are two again, or never.
                std::thread::sleep(Duration::from_secs(2));
            }
            let body = format!("{{\"node\": \"c\", \"incarnation\": \"{incarnation}\"}}");
            let answer = cluster.post(0, "/v1/cluster/readmit", None, &body);
            assert_eq!(answer.status, 200, "{what}: {}", String::from_utf8_lossy(&answer.body));
            readmitted += 1;
        } else {
            healed += 1;
        }
        let took = began.elapsed();
        wait(&format!("{what}: counted again"), Duration::from_secs(5), || {
            let state = cluster.state(2)?;
            (state["mode"] == "normal").then_some(())
        });
        wait(&format!("{what}: a rollout that isn't over"), Duration::from_secs(10), || {
            if cluster.state(0)?["phase"] != "RolledBack" {
                return Some(());
            }
            let _ = cluster.post(0, "/v1/rollouts/svc/retry", None, "{}");
            None
        });
        println!("round {round}: {what}: {} in {:.1} s", if ready { "started" } else { "refused" }, took.as_secs_f64());
    }
    println!("{healed} healed (of them {refused} after a repair by hand), {readmitted} readmitted");
    cluster.assert_no_panic();
}

#[test]
fn processes_killed_at_any_moment_lose_nothing_that_was_acknowledged() {
    kill_at_any_moment(Cluster::start());
}

/// With a checkpoint every few records, most of the deaths are in the middle of one, or of taking over a peer's.
#[test]
fn processes_killed_while_they_compact_lose_nothing_that_was_acknowledged() {
    kill_at_any_moment(Cluster::start_with("\n[history]\nrecords = 4\ncheckpoint_every = 2\n"));
}

fn kill_at_any_moment(mut cluster: Cluster) {
    begin(&cluster);
    let mut random = SmallRng::seed_from_u64(4);
    let mut acknowledged = Vec::new();
    let mut slowest = Duration::ZERO;
    let mut number = 0;
    for _ in 0..rounds(10) {
        let victim = random.random_range(0..3);
        let until = Instant::now() + Duration::from_micros(random.random_range(0..60_000));
        while Instant::now() < until {
            number += 1;
            acknowledged.extend(decide(&cluster, (victim + 1) % 3, number));
        }
        cluster.kill(victim);
        number += 1;
        acknowledged.extend(decide(&cluster, (victim + 1) % 3, number));
        // Sometimes it dies while it starts, too.
        if random.random_range(0..3) == 0 {
            cluster.spawn(victim, None);
            // How far it gets in its start.
            std::thread::sleep(Duration::from_micros(random.random_range(0..50_000)));
            cluster.kill(victim);
        }
        cluster.spawn(victim, None);
        let began = Instant::now();
        cluster.wait_ready(victim);
        slowest = slowest.max(began.elapsed());
    }
    println!("{} acknowledged, slowest start {:.2} s", acknowledged.len(), slowest.as_secs_f64());
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
    for (n, (key, slot, verb)) in acknowledged.iter().enumerate() {
        let path = format!("/v1/rollouts/svc/{verb}");
        let answer = cluster.post(n % 3, &path, Some(key), "{}").json();
        assert_eq!((&answer["slot"], &answer["repeated"]), (&(*slot).into(), &true.into()), "{key}: {answer}");
    }
    cluster.assert_no_panic();
}

#[test]
fn a_checkpoint_that_is_damaged_while_its_node_runs_is_written_again_for_a_peer_that_needs_it() {
    let mut cluster = Cluster::start_with("\n[history]\nrecords = 4\ncheckpoint_every = 16\n");
    begin(&cluster);
    cluster.kill(2);
    let decided = (0..40).filter(|number| decide(&cluster, 0, *number).is_some()).count();
    assert_eq!(decided, 40, "two of three decide");
    for i in [0, 1] {
        let path = cluster.data_dir(i).join("checkpoint");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(5));
    assert!([0, 1].iter().any(|i| console(&cluster, *i).contains("the checkpoint can't be read: it is written again")));
    cluster.assert_no_panic();
}

#[test]
fn a_full_disk_stops_its_node_only_and_says_so() {
    let mut cluster = Cluster::found();
    let dir = cluster.data_dir(2);
    let kept = cluster.dir.path().join("kept");
    copy(&dir, &kept);
    let mount = |args: &[&str]| std::process::Command::new(args[0]).args(&args[1..]).output();
    let mounted = mount(&["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", dir.to_str().unwrap()]);
    if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
        println!("SKIPPED a_full_disk_stops_its_node_only_and_says_so: no tmpfs can be mounted here: {mounted:?}");
        return;
    }
    copy(&kept, &dir);
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    let filler = fs::File::create(dir.join("filler")).unwrap();
    // It warns, and holds increases, before it has to stop.
    let free = || rustix::fs::statvfs(&dir).map(|found| found.f_bavail * found.f_frsize).unwrap();
    for at in (0..).take_while(|_| free() > 300_000) {
        std::os::unix::fs::FileExt::write_at(&filler, &[1; 4096], at * 4096).unwrap();
    }
    wait("a warning", Duration::from_secs(5), || {
        console(&cluster, 2).contains("the disk is nearly full").then_some(())
    });
    let refused = cluster.post(0, "/v1/rollouts/svc/promote", None, r#"{"full": true}"#);
    let text = String::from_utf8_lossy(&refused.body).to_string();
    assert!(refused.status == 409 && text.contains("c: abstains: the disk is nearly full"), "{text}");
    let filled =
        (0..).take_while(|at| std::os::unix::fs::FileExt::write_at(&filler, &[1; 4096], at * 4096).is_ok()).count();
    drop(filler);
    let mut slowest = Duration::ZERO;
    let mut ended = false;
    for number in 0..20_000 {
        let began = Instant::now();
        assert!(decide(&cluster, 0, number).is_some(), "the others decide");
        slowest = slowest.max(began.elapsed());
        ended = cluster.nodes[2].process.as_mut().unwrap().ended_within(Duration::ZERO);
        if ended {
            break;
        }
    }
    assert!(ended, "node c still runs on a disk filled with {filled} blocks");
    let text = console(&cluster, 2);
    println!("slowest decision {slowest:?}; {}", text.lines().last().unwrap_or_default());
    assert!(text.contains("the disk is full: free space, then start the node again"), "{text}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    cluster.nodes[2].process = None;

    fs::remove_file(dir.join("filler")).unwrap();
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(5));
    cluster.kill(2);
    let unmounted = mount(&["umount", dir.to_str().unwrap()]);
    assert!(unmounted.unwrap().status.success());
}
