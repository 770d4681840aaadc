//! Generates the gRPC code from `proto/`, without protoc, and names the commit and the compiler that the program is built from.

use std::path::PathBuf;
use std::process::Command;

const FILES: [&str; 3] =
    ["proto/aviary/v1/decision.proto", "proto/aviary/v1/rollout.proto", "proto/aviary/v1/telemetry.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    name_commit_and_compiler();
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("aviary.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().build_transport(false).btree_map(".").compile_fds(descriptors)?;
    Ok(())
}

/// Sets the variables that `src/about.rs` reads. Packagers, whose sources have no git, set AVIARY_COMMIT themselves.
fn name_commit_and_compiler() {
    println!("cargo::rerun-if-env-changed=AVIARY_COMMIT");
    // Files that change with each commit and checkout; a path that is missing would run this script at each build. A debug
    // build names the commit of its last full build instead: it would compile everything again after each commit.
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let git_paths = ["HEAD", "logs/HEAD"].map(|name| output("git", &["rev-parse", "--git-path", name]));
    for path in git_paths.into_iter().flatten().filter(|path| release && PathBuf::from(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
    let given = std::env::var("AVIARY_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(|| output("git", &["describe", "--always", "--tags"]));
    let compiler = std::env::var("RUSTC").ok().and_then(|rustc| output(&rustc, &["--version"]));
    for (name, value) in [("AVIARY_COMMIT", commit), ("AVIARY_TOOLCHAIN", compiler)] {
        println!("cargo::rustc-env={name}={}", value.as_deref().unwrap_or("unknown"));
    }
}

/// Returns the first line that a program prints; none if it is missing, fails, or prints nothing.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(str::trim).filter(|line| !line.is_empty()).map(String::from)
}
