#!/usr/bin/env bash
# Everything that a change must pass, in named stages; ends with the seconds of each and with what was skipped, and why.
#
#   ./run_tests.sh                      all stages
#   ./run_tests.sh quick                format, lint, core, unit, seeded bugs, 50 simulated clusters: the loop while you work
#   ./run_tests.sh STAGE...             these stages, such as: ./run_tests.sh lint unit
#   ./run_tests.sh nightly [STAGE...]   all or these stages for longer, in release builds: more seeds, kills, cuts and damages
#   ./run_tests.sh --help               this, and what each stage does
#
# REQUIRE_SERVICES=1   what a stage lacks is installed where that is possible; else the run fails instead of skipping it
# AVIARY_FUZZ_SECONDS  how long the stage fuzz takes in nightly runs; default 60
# AVIARY_CACHE         where programs that only tests need are kept (scripts/tools.sh); default ~/.cache/aviary-tools
set -euo pipefail
cd "$(dirname "$0")"

stages=(
  "format           rustfmt, everywhere"
  "lint             clippy and rustdoc, warnings denied; actionlint; shellcheck where it is installed"
  "schema           buf lint of proto/, and buf breaking against the last release"
  "core             tests of aviary-core on its own: needs no C compiler"
  "build            everything that later stages run, in one build"
  "unit             tests beside the code of the other crates"
  "it               tests/it: parts over real sockets, clusters of real processes"
  "upgrade          nodes of the last release and of this one, replaced one by one under load, forth and back"
  "manifests        deploy/ against the schemas of Kubernetes"
  "services         tests/it with a real Kafka, Redis and Prometheus"
  "peers            an Envoy, an HAProxy and an nginx behind the data plane and in front of it"
  "fuzz             the canonical request for a minute, in nightly runs alone; the stage it has its corpus"
  "clients          the data plane under curl, nghttp, h2load, grpcio and others"
  "floods           strangers' floods against each port of a node, while users and operators are answered in time; nightly alone"
  "checker          real nodes in network namespaces under faults, checked from outside by a model of its own; nightly alone"
  "openapi          a generated client drives a rollout; Schemathesis looks for answers that the OpenAPI document lacks"
  "sim              simulated clusters: a virtual minute of faults each, then healing"
  "sim-router       simulated record routers on a log with transactions, and their seeded bugs"
  "sim-nodes        whole nodes on turmoil's network"
  "sim-exhaust      every order of everything within small bounds"
  "sim-determinism  the same traces in two processes"
  "sim-bugs         seeded bugs of the core are caught"
  "deps             cargo-deny: licences, advisories, sources"
)
names=(); for line in "${stages[@]}"; do names+=("${line%% *}"); done
quick=(format lint core build unit sim-bugs sim)

# What a change needs. A seeded bug of the core is caught by the seed that it is pinned to, whatever the number of seeds here: these
# look for what nobody thought of, and the nightly run looks further, at other seeds too.
profile=(); out=target/debug; seeds=600; router_seeds=10000; node_seeds=80; exhaust=0,0,0,2,0; complete=(); clients=(--big 64) floods=(--seconds 5) checker=(--seconds 120) openapi=(--seconds 60)

usage() {
  sed -n '2,12s/^# \{0,1\}//p' run_tests.sh
  printf '\nStages:\n'
  printf '  %s\n' "${stages[@]}"
}
fail() { echo "run_tests.sh: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
required() { [ "${REQUIRE_SERVICES:-}" = 1 ]; }
skipped=()
# Says that something can't be done here; where everything is asked for, that is a failure.
skip() { if required && [ "${2:-}" != optional ]; then fail "$1 (REQUIRE_SERVICES=1)"; fi; skipped+=("$stage: $1"); }
tool() { scripts/tools.sh "$1"; }

# Runs Rust tests: with nextest, which runs many at once by the weights of .config/nextest.toml, or with cargo where it can't be had.
# Always over the workspace: another selection has other features, hence another build.
nextest=
find_nextest() {
  [ -z "$nextest" ] || return 0
  if has cargo-nextest; then nextest=cargo-nextest; else nextest=$(tool nextest)/bin/cargo-nextest || nextest=none; fi
  [ -x "$(command -v "$nextest")" ] || { nextest=none; skipped+=("nextest: can't be had; cargo test took its place, which is slower"); }
}

stage_format() {
  cargo fmt --version >/dev/null 2>&1 || { skip "rustfmt is not installed (rustup component add rustfmt)" optional; return; }
  cargo fmt --all --check
}

stage_lint() {
  if has shellcheck; then
    shellcheck --severity warning run_tests.sh run_cluster.sh scripts/*.sh .ci/run benches/streams/run.sh config/router/console.sh deploy/kubernetes/found.sh
  else
    skip "shellcheck is not installed" optional
  fi
  local actionlint
  if has actionlint; then actionlint
  elif actionlint=$(tool actionlint); then "$actionlint/actionlint"
  else skip "actionlint can't be built, which checks .github/workflows" optional; fi
  cargo clippy --version >/dev/null 2>&1 || { skip "clippy is not installed (rustup component add clippy)" optional; return; }
  cargo clippy --workspace --all-targets --quiet -- -D warnings
  # A room that is renamed, but not in the map of src/lib.rs, is a link that leads nowhere.
  RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps -p aviary -p aviary-core
}

stage_schema() {
  local buf
  # Where it isn't installed or kept, it is built only where everything is asked for: that takes minutes.
  if has buf; then buf=buf
  elif required || scripts/tools.sh have buf; then buf=$(tool buf)/buf || { skip "buf can't be built"; return; }
  else skip "buf is not installed (https://buf.build)"; return; fi
  "$buf" lint proto
  # The image is of the last release's proto/: `buf build proto -o proto/released.binpb` at its commit.
  "$buf" breaking proto --against proto/released.binpb
}

stage_core() { cargo test --quiet -p aviary-core "${profile[@]}"; }

built=
stage_build() {
  [ -z "$built" ] || return 0
  has cc || fail "a C compiler is missing, for librdkafka (the stage core needs none)"
  has make || fail "make is missing, for librdkafka"
  cargo build --workspace --bins --tests "${profile[@]}"
  built=1
}

# Runs the tests of tests/it that an expression of nextest and a filter of cargo test name, $3 of them at once; ignored ones with more.
run_it() {
  local expression=$1 filter=$2 threads=$3; shift 3
  find_nextest
  if [ "$nextest" = none ]; then
    cargo test --workspace --test it --quiet "${profile[@]}" "$filter" -- --test-threads "$threads" ${1:+--ignored} "${without[@]}"
  else
    "$nextest" nextest run --profile it --workspace --test it "${profile[@]}" -E "$expression" ${1:+--run-ignored only}
  fi
}

stage_unit() {
  find_nextest
  if [ "$nextest" = none ]; then
    cargo test --workspace --lib --bins --quiet "${profile[@]}"
  else
    "$nextest" nextest run --workspace --lib --bins "${profile[@]}" -E 'not package(aviary-core)'
  fi
}

stage_it() {
  without=()
  run_it 'all()' '' 4
  if [ "$(id -u)" != 0 ] || ! has ip; then
    skip "tests in network namespaces, on a small tmpfs: they need root and the tool ip (iproute2)" optional
  fi
}

stage_upgrade() {
  local release
  without=()
  if ! git cat-file -e "$(grep -v '^[# ]' tests/releases.txt | tail -1 | cut -d' ' -f2)^{commit}" 2>/dev/null; then
    skip "the last release's commit is not in git's history (tests/releases.txt); a full clone has it" optional
    return
  fi
  if ! release=$(tool release); then skip "the last release can't be built"; return; fi
  AVIARY_BEFORE=$release/aviary run_it 'test(/^cluster::rolling::/)' cluster::rolling:: 1 ignored
}

stage_manifests() {
  local kustomize python
  if has go && has python3 && kustomize=$(tool kustomize) && python=$(tool python); then
    PYTHONPATH=$python python3 tests/manifests.py "$kustomize/kustomize"
  else
    skip "go or python3 with pip is not installed, or their packages can't be reached"
  fi
}

stage_services() {
  local pair program expression='test(/^services::/)'
  # One router test fails since the router asks for a group's place before it begins: the rest of them run nightly until it is mended.
  [ -n "$nightly" ] || expression+=' - test(/^services::router::/)'
  without=()
  [ -z "$fetching" ] || wait "$fetching" || true
  # Also where it comes up in part: what runs has to be stopped.
  services=up
  scripts/services.sh up || { skip "no Kafka or no Redis (scripts/services.sh up)"; return; }
  eval "$(scripts/services.sh env)"
  for pair in redis-server:redis_unavailable prometheus:prometheus; do
    program=${pair%:*}
    scripts/services.sh need "$program" && continue
    skip "services::*${pair#*:}*: the program $program is not installed, which the test starts and ends"
    without+=(--skip "${pair#*:}")
    expression+=" & not test(/${pair#*:}/)"
  done
  run_it "$expression" services:: 1 ignored
  scripts/services.sh down
  services=
}

# Finds the programs of other proxies; says which can't be had.
peers() {
  local program envoy
  export AVIARY_ENVOY='' AVIARY_HAPROXY='' AVIARY_NGINX=''
  if has envoy; then AVIARY_ENVOY=$(command -v envoy)
  elif envoy=$(tool envoy) && "$envoy/program" --version >/dev/null 2>&1; then AVIARY_ENVOY=$envoy/program
  else skip "Envoy is not installed and can't be had (scripts/tools.sh envoy)" optional; fi
  for program in haproxy nginx; do
    if scripts/services.sh need "$program"; then
      if [ "$program" = haproxy ]; then AVIARY_HAPROXY=$(command -v haproxy); else AVIARY_NGINX=$(command -v nginx); fi
    else
      skip "$program is not installed (apt-get install $program)" optional
    fi
  done
}

stage_peers() {
  without=()
  peers
  [ -n "$AVIARY_ENVOY$AVIARY_HAPROXY$AVIARY_NGINX" ] || { skip "no other proxy is installed: nothing was compared" optional; return; }
  run_it 'test(/^peers::/)' peers:: 1 ignored
}

stage_fuzz() {
  local fuzz
  if [ -z "$nightly" ]; then echo "only in nightly runs: ./run_tests.sh nightly fuzz"; return; fi
  if has cargo-fuzz; then fuzz=$(command -v cargo-fuzz)
  elif fuzz=$(tool fuzz); then fuzz=$fuzz/bin/cargo-fuzz
  else skip "cargo-fuzz is not installed (cargo install cargo-fuzz): the canonical request is not fuzzed" optional; return; fi
  has c++ || { skip "a C++ compiler is missing, which libfuzzer needs: the canonical request is not fuzzed" optional; return; }
  # The versions that everything else is built with; cargo adds what only the target needs.
  cp Cargo.lock fuzz/Cargo.lock
  # What it finds new goes into a folder of its own; the corpus that is kept is chosen by hand.
  mkdir -p fuzz/target/found
  "$fuzz" run --sanitizer none request fuzz/target/found fuzz/corpus/request -- \
    -max_total_time="${AVIARY_FUZZ_SECONDS:-60}" -max_len=4096
}

stage_clients() {
  if has python3 && has curl; then
    python3 tests/clients.py --aviary "$out/aviary" "${clients[@]}"
  else
    skip "python3 or curl is not installed" optional
  fi
}

stage_floods() {
  if [ -z "$nightly" ]; then echo "only in nightly runs: ./run_tests.sh nightly floods"; return; fi
  if has python3; then
    python3 tests/floods.py --aviary "$out/aviary" "${floods[@]}"
  else
    skip "python3 is not installed" optional
  fi
}

stage_checker() {
  if [ -z "$nightly" ]; then echo "only in nightly runs: ./run_tests.sh nightly checker"; return; fi
  if has python3 && [ "$(id -u)" = 0 ] && has ip && has tc; then
    python3 tests/checker.py --aviary "$out/aviary" "${checker[@]}"
  else
    skip "network namespaces need root, python3 and the tools ip and tc (iproute2)" optional
  fi
}

stage_openapi() {
  local python
  if has python3 && python=$(tool openapi); then
    PYTHONPATH=$python python3 tests/openapi.py --aviary "$out/aviary" "${openapi[@]}"
  else
    skip "python3 with pip is not installed, or the packages can't be reached"
  fi
}

# Runs commands, one in each argument, at the same time; prints what they say one after the other. Fails when one does.
at_once() {
  local command words folder status=0 i pids=()
  folder=$(mktemp -d)
  for command in "$@"; do
    read -ra words <<<"$command"
    "${words[@]}" >"$folder/${#pids[@]}" 2>&1 &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || status=1
    printf '$ %s\n' "${@:i+1:1}"
    cat "$folder/$i"
  done
  rm -r "$folder"
  return "$status"
}

stage_sim() {
  local half=$((seeds / 2))
  if [ -n "${complete[*]}" ]; then
    # All of what a long run must reach is reached by one process's seeds; the other's come on top.
    at_once "$out/sim --seeds $seeds ${complete[*]}" "$out/sim --seeds $seeds --from 1000001"
  else
    at_once "$out/sim --seeds $half" "$out/sim --seeds $half --from $((half + 1))"
  fi
}

stage_sim-router() {
  at_once "$out/sim-router --seeds $router_seeds --complete" "$out/sim-router --seeds $((router_seeds / 2)) --late" "$out/sim-router --seeded-bugs"
}

stage_sim-nodes() { "$out/sim-whole" --seeds "$node_seeds" --ms 20000; }
stage_sim-exhaust() { "$out/sim" --exhaust "$exhaust" --states 12000000; }
stage_sim-determinism() {
  "$out/sim" --determinism --seeds 100 --ms 5000
  "$out/sim-whole" --determinism --seeds 5 --ms 10000
}
stage_sim-bugs() { "$out/sim" --seeded-bugs; }

stage_deps() {
  cargo deny --version >/dev/null 2>&1 || { skip "cargo-deny is not installed (cargo install cargo-deny)" optional; return; }
  cargo deny check
}

# What the run consists of.
nightly=
planned=()
plan() {
  local name needs_build=" unit it upgrade services peers clients floods checker openapi sim sim-router sim-nodes sim-exhaust sim-determinism sim-bugs "
  for name in "$@"; do
    [[ " ${names[*]} " == *" $name "* ]] || fail "found $name, expected quick, nightly or stages: ${names[*]}"
    if [[ $needs_build == *" $name "* && " ${planned[*]} " != *" build "* ]]; then planned+=(build); fi
    [[ " ${planned[*]} " == *" $name "* ]] || planned+=("$name")
  done
}
case "${1:-}" in
  -h | --help) usage; exit ;;
  quick) [ $# = 1 ] || fail "found $2 after quick, expected nothing"; seeds=50; plan "${quick[@]}" ;;
  nightly)
    shift
    nightly=1 profile=(--release) out=target/release seeds=10000 router_seeds=10000 node_seeds=500 exhaust=1,1,0,2,0
    complete=(--complete) clients=(--churn 10) floods=(--seconds 60) checker=(--seconds 1200) openapi=(--seconds 600 --seed "$RANDOM")
    export AVIARY_ROUNDS=120 AVIARY_CASES=100000 AVIARY_CONNECTIONS=10000 AVIARY_PIPELINE_RUNS=200 AVIARY_UPGRADES=50
    ulimit -n 20000
    [ $# -gt 0 ] || set -- "${names[@]}"
    plan "$@" ;;
  "") plan "${names[@]}" ;;
  *) plan "$@" ;;
esac
has cargo || fail "cargo is missing: install Rust (https://rustup.rs); rust-toolchain.toml or Cargo.toml says which"

# Programs and jars are fetched while the first stages run; a stage waits for what it needs.
fetching='' services='' stage=''
fetch() {
  local name
  for name in nextest kustomize python openapi; do scripts/tools.sh "$name" || true; done
  if required; then
    scripts/tools.sh buf || true
    [[ " ${planned[*]} " != *" services "* ]] || scripts/services.sh fetch || true
  fi
}
if [[ " ${planned[*]} " =~ " "(manifests|services|openapi)" " ]]; then fetch >/dev/null 2>&1 & fetching=$!; fi

# Seconds of processor time that the processes took that this run started and that ended (cutime and cstime, see proc(5)).
cpu() {
  local stat
  read -ra stat <"/proc/$$/stat"
  echo $(((stat[15] + stat[16]) / $(getconf CLK_TCK)))
}
table=()
finish() {
  local status=$?
  [ "$services" != up ] || scripts/services.sh down || true
  # Background processes are deaf to Ctrl-C.
  jobs -p | xargs -r kill 2>/dev/null || true
  [ "$status" = 0 ] || { [ -z "$stage" ] || table+=("$(printf '%-16s %6d   failed' "$stage" $((SECONDS - began)))"); }
  printf '\n%-16s %6s %6s\n' STAGE SECONDS CPU
  [ ${#table[@]} = 0 ] || printf '%s\n' "${table[@]}"
  printf '%-16s %6d\n' total "$SECONDS"
  for line in "${skipped[@]}"; do echo "skipped: $line"; done
  if [ "$status" = 0 ]; then printf '\n== all passed\n'
  elif [ -n "$stage" ]; then printf '\n== %s failed; alone: ./run_tests.sh %s%s\n' "$stage" "${nightly:+nightly }" "$stage" >&2; fi
}
trap finish EXIT
for stage in "${planned[@]}"; do
  began=$SECONDS before=$(cpu)
  printf '\n== %s\n' "$stage"
  "stage_$stage"
  table+=("$(printf '%-16s %6d %6d' "$stage" $((SECONDS - began)) $(($(cpu) - before)))")
done
