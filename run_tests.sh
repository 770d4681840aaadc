#!/usr/bin/env bash
# Everything a change must pass: format, lints, tests over real processes, simulation. Prints what it skipped, and why.
set -euo pipefail
cd "$(dirname "$0")"

skipped=()
step() { printf '\n== %s\n' "$*"; }
need() { command -v "$1" >/dev/null || { echo "run_tests.sh: $1 is missing: $2" >&2; exit 1; }; }
need cargo "install Rust 1.90 or newer (https://rustup.rs)"

step "format"
if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else skipped+=("format: rustfmt is not installed (rustup component add rustfmt)"); fi

step "lints"
if cargo clippy --version >/dev/null 2>&1; then
  cargo clippy --workspace --all-targets --quiet -- -D warnings
else
  skipped+=("lints: clippy is not installed (rustup component add clippy)")
fi

step "tests"
cargo test --workspace --quiet

step "simulation: ${SIM_SEEDS:-300} seeds, each a virtual minute of faults, then healing"
cargo build --quiet --package sim
./target/debug/sim --seeds "${SIM_SEEDS:-300}"
step "simulation: whole nodes on turmoil's network"
./target/debug/sim --whole --seeds "${SIM_WHOLE_SEEDS:-20}" --ms 20000
step "simulation: the same traces in two processes"
./target/debug/sim --determinism --seeds 20 --ms 5000
step "simulation: seeded bugs are caught"
./target/debug/sim --teeth --ms 20000

step "dependencies"
if cargo deny --version >/dev/null 2>&1; then cargo deny check; else skipped+=("dependencies: cargo-deny is not installed (cargo install cargo-deny)"); fi

printf '\n== all passed\n'
for line in "${skipped[@]:-}"; do [ -z "$line" ] || echo "skipped: $line"; done
