#!/usr/bin/env bash
# Everything a change must pass: format, lints, tests over real processes, simulation. Prints what it skipped, and why.
# `./run_tests.sh nightly` does the same for about an hour: many more seeds, kills, cuts and damages, in release builds.
set -euo pipefail
cd "$(dirname "$0")"

case "${1:-}" in
  "") profile=(); sim=./target/debug/sim; aviary=./target/debug/aviary; clients=(--big 64); seeds=300; whole=20; rounds=() ; exhaust=0,0,0,2,0 ;;
  nightly) profile=(--release); sim=./target/release/sim; aviary=./target/release/aviary; clients=(--churn 10); seeds=10000; whole=500; rounds=(AVIARY_ROUNDS=120 AVIARY_CASES=100000 AVIARY_CONNECTIONS=10000); exhaust=1,1,0,2,0 ;;
  *) echo "run_tests.sh: found $1, expected nothing or: nightly" >&2; exit 1 ;;
esac

skipped=()
step() { printf '\n== %s\n' "$*"; }
need() { command -v "$1" >/dev/null || { echo "run_tests.sh: $1 is missing: $2" >&2; exit 1; }; }
need cargo "install Rust 1.90 or newer (https://rustup.rs)"
need cc "install a C compiler, for librdkafka (or build with --no-default-features)"
need make "install make, for librdkafka (or build with --no-default-features)"

step "format"
if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else skipped+=("format: rustfmt is not installed (rustup component add rustfmt)"); fi

step "lints"
if cargo clippy --version >/dev/null 2>&1; then
  cargo clippy --workspace --all-targets --quiet -- -D warnings
else
  skipped+=("lints: clippy is not installed (rustup component add clippy)")
fi

step "schema"
tools=$PWD/target/tools
mkdir -p "$tools"
# The program, where it isn't installed, is built only where everything is asked for: that takes minutes.
buf=$(command -v buf || echo "$tools/buf")
if [ ! -x "$buf" ] && [ "${REQUIRE_SERVICES:-}" = 1 ] && command -v go >/dev/null; then
  GOBIN=$tools go install github.com/bufbuild/buf/cmd/buf@v1.50.0 >"$tools/log" 2>&1 || tail -5 "$tools/log" >&2
fi
if [ -x "$buf" ]; then "$buf" lint proto; else skipped+=("schema: buf is not installed (https://buf.build)"); fi

step "tests"
if [ -n "${1:-}" ]; then ulimit -n 20000; fi
env "${rounds[@]}" cargo test --workspace --quiet "${profile[@]}"

step "manifests"
manifest_tools() {
  [ -x "$tools/kustomize" ] && [ -x "$tools/python/bin/python" ] && return 0
  command -v go >/dev/null && command -v python3 >/dev/null || return 1
  GOBIN=$tools go install sigs.k8s.io/kustomize/kustomize/v5@v5.5.0 >"$tools/log" 2>&1 || return 1
  python3 -m venv "$tools/python" >>"$tools/log" 2>&1 || return 1
  "$tools/python/bin/pip" install --quiet kubernetes-validate pyyaml >>"$tools/log" 2>&1
}
if manifest_tools; then
  "$tools/python/bin/python" tests/manifests.py "$tools/kustomize"
elif [ "${REQUIRE_SERVICES:-}" = 1 ]; then
  cat "$tools/log" >&2 || true
  echo "run_tests.sh: the manifests can't be validated, expected go and python3 with venv (REQUIRE_SERVICES=1)" >&2
  exit 1
else
  skipped+=("manifests: go or python3 with venv is not installed, or their packages can't be reached")
fi

step "tests with a real Kafka and a real Redis"
if scripts/services.sh up; then
  trap 'scripts/services.sh down' EXIT
  eval "$(scripts/services.sh env)"
  without=()
  for pair in redis-server:redis_away prometheus:prometheus; do
    program=${pair%:*}
    scripts/services.sh need "$program" && continue
    [ "${REQUIRE_SERVICES:-}" != 1 ] || exit 1
    without+=(--skip "${pair#*:}")
    skipped+=("services::*${pair#*:}*: the program $program is not installed, which the test starts and ends")
  done
  # One after the other: each is a broker, three nodes and more.
  cargo test --quiet "${profile[@]}" --test it services:: -- --ignored --test-threads 1 "${without[@]}"
  scripts/services.sh down
  trap - EXIT
elif [ "${REQUIRE_SERVICES:-}" = 1 ]; then
  echo "run_tests.sh: no Kafka or no Redis, expected both with REQUIRE_SERVICES=1" >&2
  exit 1
else
  skipped+=("$(cargo test --quiet "${profile[@]}" --test it services:: -- --ignored --list | sed -n 's/: test$/: needs Kafka or Redis (scripts\/services.sh up)/p')")
fi

step "data plane under clients that nobody here wrote"
if command -v python3 >/dev/null && command -v curl >/dev/null; then
  cargo build --quiet "${profile[@]}"
  python3 tests/clients.py --aviary "$aviary" "${clients[@]}"
else
  skipped+=("data plane under other clients: python3 or curl is not installed")
fi

step "simulation: $seeds seeds, each a virtual minute of faults, then healing"
cargo build --quiet --package sim "${profile[@]}"
if [ -n "${1:-}" ]; then complete=(--complete); else complete=(); fi
"$sim" --seeds "$seeds" "${complete[@]}"
step "simulation: the record router, on a log with transactions: 10000 seeds, and 5000 whose hooks come late"
"$sim" --router --seeds 10000 --complete
"$sim" --router --seeds 5000 --late
"$sim" --router --teeth
step "simulation: whole nodes on turmoil's network, $whole seeds"
"$sim" --whole --seeds "$whole" --ms 20000
step "simulation: every order of everything, within $exhaust (crashes, wipes, timeouts, questions, losses)"
"$sim" --exhaust "$exhaust" --states 12000000
step "simulation: the same traces in two processes"
"$sim" --determinism --seeds 100 --ms 5000
step "simulation: seeded bugs are caught"
"$sim" --teeth --ms 60000

if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null; then
  skipped+=("tests in network namespaces, on a small tmpfs: they need root and the tool ip (iproute2)")
fi

step "dependencies"
if cargo deny --version >/dev/null 2>&1; then cargo deny check; else skipped+=("dependencies: cargo-deny is not installed (cargo install cargo-deny)"); fi

printf '\n== all passed\n'
for line in "${skipped[@]:-}"; do [ -z "$line" ] || echo "skipped: $line"; done
