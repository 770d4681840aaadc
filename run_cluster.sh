#!/usr/bin/env bash
# Builds Aviary, starts two demo model servers and three nodes, and shows a rollout and a rollback under traffic.
# See --help. Needs bash, curl and cargo. It stops every process that it started, by process id.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'HELP'
usage: ./run_cluster.sh [--no-demo | --keep]

  (nothing)   act 1: a rollout from v1 to v2 in steps of 5, 20, 50 and 100 %
              act 2: a rollout from v2 to v3, which fails at 20 % and is rolled back; then everything stops
  --no-demo   start only the nodes and model servers, print their addresses, and run until Ctrl-C
  --keep      after the demo, run until Ctrl-C
  --help      print this text

Each run creates its own cluster under data/demo-<pid> and removes it at the end; it never touches other data.
Logs remain in logs/<node>.log, logs/demo/*.out and logs/demo/load-*.ndjson.
Exit code: 0 success, 1 a step of the demo failed, 130 Ctrl-C during the demo.
HELP
}

demo=yes keep=no
for argument in "$@"; do
  case "$argument" in
    --no-demo) demo=no ;;
    --keep) keep=yes ;;
    --help | -h) usage; exit 0 ;;
    *) printf 'error: found %s, expected --no-demo, --keep or --help\n' "$argument" >&2; exit 64 ;;
  esac
done

nodes=(a b c)
data_ports=(8081 8082 8083)
api_ports=(50051 50052 50053)
control_ports=(7001 7002 7003)
upstream_ports=(9101 9102)
api=http://127.0.0.1:50051,http://127.0.0.1:50052,http://127.0.0.1:50053
predict=http://127.0.0.1:8081/predict,http://127.0.0.1:8082/predict,http://127.0.0.1:8083/predict
service=fraud-model
rollout=config/rollout.yaml
data=data/demo-$$
out=logs/demo
pids=()
load=
aviary=

say() { printf '%s\n' "$*"; }
title() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Stops exactly the processes that this script started: TERM to all, KILL for those that stay.
cleanup() {
  local code=$? pid tries
  trap - EXIT
  trap '' INT TERM
  for pid in "${pids[@]+"${pids[@]}"}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]+"${pids[@]}"}"; do
    for ((tries = 0; tries < 60; tries++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf -- "$data"
  rmdir data 2>/dev/null || true
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

need() { command -v "$1" >/dev/null || fail "found no $1, expected it on the PATH: $2"; }

port_owner() {
  if command -v ss >/dev/null; then
    ss -Hltnp "sport = :$1" 2>/dev/null | sed -n 's/.*users:(("\([^"]*\)",pid=\([0-9]*\).*/\1, pid \2/p' | head -n 1
  elif command -v lsof >/dev/null; then
    lsof -nP -iTCP:"$1" -sTCP:LISTEN 2>/dev/null | sed -n '2s/^\([^ ]*\) *\([0-9]*\).*/\1, pid \2/p'
  fi
}

check_ports() {
  local port owner taken=no
  for port in "${data_ports[@]}" "${api_ports[@]}" "${control_ports[@]}" "${upstream_ports[@]}"; do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      owner=$(port_owner "$port" || true)
      printf 'error: port %s is taken by %s, expected it free\n' "$port" "${owner:-a process of another user}" >&2
      taken=yes
    fi
  done
  [[ $taken == no ]] || exit 1
}

# start NAME COMMAND...: runs it in the background, its words in logs/demo/NAME.out, its pid in $started.
start() {
  local name=$1
  shift
  "$@" >"$out/$name.out" 2>&1 &
  started=$!
  pids+=("$started")
}

stop() {
  kill -TERM "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
  forget "$1"
}

# Takes a process that ended off the list: its number may be another's by the time the list is stopped.
forget() {
  local other left=()
  for other in "${pids[@]}"; do [[ $other == "$1" ]] || left+=("$other"); done
  pids=("${left[@]+"${left[@]}"}")
}

# wait_for NAME PID URL: until it answers, or 90 s (a port can be lent out for 65), or its process ends.
wait_for() {
  local tries
  printf 'waiting for %s ' "$1"
  for ((tries = 0; tries < 450; tries++)); do
    if curl -fsS -o /dev/null --max-time 1 "$3" 2>/dev/null; then
      say "ready"
      return
    fi
    if ! kill -0 "$2" 2>/dev/null; then
      say "ended"
      tail -n 20 "$out/$1.out" >&2
      fail "$1 ended at its start; its last words are above"
    fi
    ((tries % 5)) || printf '.'
    sleep 0.2
  done
  say "not ready"
  tail -n 20 "$out/$1.out" >&2
  fail "$1 did not answer $3 within 90 s; its last words are above"
}

field() { "$aviary" get "$service" --field "$1" 2>/dev/null || true; }

# All three nodes must serve by the same record within 0.5 s of a commit; the slower truth is shown, not hidden.
show_agreement() {
  local tries table
  for ((tries = 0; tries < 20; tries++)); do
    if table=$("$aviary" get "$service" --all-nodes); then
      say "$table"
      return
    fi
    sleep 0.1
  done
  say "$table"
  return 1
}

# follow FILE [COMMAND]: applies the rollout and follows it to its end; after each commit it shows what each node serves
# by, then calls COMMAND with the line. Returns the code of `aviary apply --wait`.
follow() {
  local file=$1 line lines applying code=0
  shift
  exec {lines}< <(exec "$aviary" apply -f "$file" --wait 2>>"$out/apply.out")
  applying=$!
  pids+=("$applying")
  while IFS= read -r line <&"$lines"; do
    say "$line"
    if [[ $line == *COMMITTED* ]]; then
      show_agreement || fail "the nodes did not agree within 2 s after this commit"
      [[ $# -eq 0 ]] || "$@" "$line"
    fi
  done
  exec {lines}<&-
  wait "$applying" || code=$?
  forget "$applying"
  return "$code"
}

fault() {
  curl -fsS -o /dev/null -X PUT -H 'content-type: application/json' -d "$2" "http://127.0.0.1:$1/fault"
}

break_canary_at_20() {
  if [[ $1 == *v3=20%* ]]; then
    say "-- v3 now fails every request"
    fault 9101 '{"error_percent":100}' || fail "the demo model server v3 took no fault"
  fi
}

write_second_rollout() {
  cat >"$1" <<YAML
apiVersion: aviary/v1
kind: Rollout
metadata: { name: $service }
spec:
  stable: { version: v2, url: "http://127.0.0.1:9102" }
  canary: { version: v3, url: "http://127.0.0.1:9101" }
  steps:
    - setWeight: 5
    - pause: { duration: 5s }
    - setWeight: 20
    - pause: { duration: 30s }
    - setWeight: 100
  bake: { duration: 5s }
  analysis:
    window: 10s
    minSamples: 20
    metrics:
      - { name: errors, strategy: THRESHOLD, thresholdRange: { max: 5 }, onFailure: rollback }
YAML
}

start_load() {
  start "load-$1" "$aviary" load --url "$predict" --rate 200 --users 1000 --report "$out/load-$1.ndjson"
  load=$started
}

# Before a service's first commit no node routes it, and every request is answered 503.
load_from_the_first_commit() { [[ -n $load ]] || start_load 1; }

act_1() {
  title "act 1: $rollout, v1 -> v2, under 200 requests a second"
  follow "$rollout" load_from_the_first_commit || fail "the first rollout is $(field phase), expected Completed: $(field reason) $(tail -n 3 "$out/apply.out")"
  stop "$load"
  say "traffic: $(grep 'requests' "$out/load-1.out" | tail -n 1)"
}

act_2() {
  title "act 2: v2 -> v3, which fails at 20 %"
  stop "$upstream_v1"
  start upstream-v3 "$aviary" upstream --listen 127.0.0.1:9101 --version v3
  wait_for upstream-v3 "$started" http://127.0.0.1:9101/healthz
  write_second_rollout "$data/rollout-2.yaml"
  start_load 2
  follow "$data/rollout-2.yaml" break_canary_at_20 && fail "the second rollout completed, expected a rollback"
  [[ $(field phase) == RolledBack ]] || fail "the second rollout is $(field phase), expected RolledBack"
  sleep 2
  stop "$load"
  say "traffic: $(grep 'requests' "$out/load-2.out" | tail -n 1)"
  grep '^v3: ' "$out/load-2.out" || fail "the traffic saw no failed answer of v3, expected some before the rollback"
}

stay() {
  say "running until Ctrl-C"
  local pid
  while sleep 1; do
    for pid in "${pids[@]}"; do
      kill -0 "$pid" 2>/dev/null || fail "process $pid ended by itself; see $out and logs"
    done
  done
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash is $BASH_VERSION, expected 4.4 or later"
need cargo "https://rustup.rs installs it"
need curl "your system's packages have it"
for file in "$rollout" config/node-a.toml config/node-b.toml config/node-c.toml; do
  [[ -r $file ]] || fail "found no $file, expected it beside this script"
done
check_ports

title "building (the first time takes some minutes)"
cargo build --release --locked --bin aviary
target=${CARGO_TARGET_DIR:-target}
aviary=$target/release/aviary
export AVIARY_API=$api
unset AVIARY_TOKEN
mkdir -p "$data" "$out"
: >"$out/apply.out"

title "starting two model servers and three nodes"
"$aviary" cluster init --data-root "$data" \
  --config config/node-a.toml --config config/node-b.toml --config config/node-c.toml
start upstream-v1 "$aviary" upstream --listen 127.0.0.1:9101 --version v1
upstream_v1=$started
wait_for upstream-v1 "$started" http://127.0.0.1:9101/healthz
start upstream-v2 "$aviary" upstream --listen 127.0.0.1:9102 --version v2
wait_for upstream-v2 "$started" http://127.0.0.1:9102/healthz
node_pids=()
for node in "${nodes[@]}"; do
  start "node-$node" "$aviary" node --config "config/node-$node.toml" --data-root "$data"
  node_pids+=("$started")
done
for i in 0 1 2; do
  wait_for "node-${nodes[i]}" "${node_pids[i]}" "http://127.0.0.1:${data_ports[i]}/readyz?quorum"
done

for i in 0 1 2; do
  say "node ${nodes[i]}  predict http://127.0.0.1:${data_ports[i]}/predict  api http://127.0.0.1:${api_ports[i]}"
done
say "model servers  v1 http://127.0.0.1:9101  v2 http://127.0.0.1:9102"

if [[ $demo == no ]]; then
  say "next: $aviary apply -f $rollout --wait"
  stay
fi
act_1
act_2
title "summary"
"$aviary" history "$service"
say "act 1 completed at 100 % on all nodes; act 2 was rolled back on all nodes; logs are in logs/"
[[ $keep == no ]] || stay
