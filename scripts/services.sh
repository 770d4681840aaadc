#!/usr/bin/env bash
# Runs a real Apache Kafka (KRaft, one broker) and a real Redis for tests on this machine; also a Prometheus, if it is named.
#
#   scripts/services.sh up [kafka] [redis] [prometheus]     start the services that do not run; print how and where
#   scripts/services.sh down [kafka] [redis] [prometheus]   stop the services that `up` started
#   scripts/services.sh fetch                  install and fetch what `up` needs, without a start
#   scripts/services.sh need PROGRAM...        exit 0 if these Debian packages' programs are there, after an install if needed
#   scripts/services.sh status                 print addresses; exit 0 if both services answer
#   scripts/services.sh env                    print lines for `eval`: KAFKA_BOOTSTRAP, REDIS_URL, AVIARY_KAFKA_JARS
#
# A service comes from the first available source: KAFKA_BOOTSTRAP or REDIS_URL, if set (then it is only checked); docker compose;
# programs on this machine (java 17+ with Maven's jars; redis-server). With REQUIRE_SERVICES=1, root on Debian or Ubuntu installs missing
# programs first.
#
# AVIARY_SERVICES_DIR   data and logs; default: target/services
# AVIARY_KAFKA_JARS     the broker's jars; default: those of scripts/tools.sh
# KAFKA_PORT, REDIS_PORT, PROMETHEUS_PORT   default: 19092, 16379, 19090
# KAFKA_PROPERTIES      more lines of the broker's settings, where it is started from its jars
# PROMETHEUS_TARGETS    targets scraped every second, `host:port,host:port`; needs the program prometheus
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=${AVIARY_SERVICES_DIR:-$root/target/services}
kafka_port=${KAFKA_PORT:-19092}
redis_port=${REDIS_PORT:-16379}
prometheus_port=${PROMETHEUS_PORT:-19090}

say() { echo "services.sh: $*" >&2; }
fail() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
runs() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
docker_works() { [ -z "${AVIARY_NO_DOCKER:-}" ] && has docker && docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }
compose() { KAFKA_PORT=$kafka_port REDIS_PORT=$redis_port docker compose -p aviary-services -f "$root/scripts/services.compose.yaml" "$@"; }

# Waits until `$@` succeeds, at most $1 seconds.
wait_for() {
  local tries=$(($1 * 10)); shift
  for _ in $(seq "$tries"); do "$@" && return 0; sleep 0.1; done
  return 1
}

install() {
  local package=$1
  [ "${REQUIRE_SERVICES:-}" = 1 ] && [ "$(id -u)" = 0 ] && has apt-get || return 1
  say "installing $package"
  mkdir -p "$dir"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$package"; } >"$dir/install.log" 2>&1 ||
    { tail -5 "$dir/install.log" >&2; return 1; }
}

java_version() { java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -1; }

# Sees to it that java and the broker's jars are there; sets `jars`.
kafka_programs() {
  has java || install default-jre-headless || fail "kafka: no docker and no java, expected one of them (REQUIRE_SERVICES=1 installs java)"
  [ "$(java_version)" -ge 17 ] || fail "kafka: java is $(java_version), expected 17 or newer"
  jars=${AVIARY_KAFKA_JARS:-}
  [ -z "$jars" ] || return 0
  "$root/scripts/tools.sh" have kafka || has mvn || install maven || fail "kafka: mvn is missing, expected Maven to fetch the broker's jars"
  "$root/scripts/tools.sh" have kafka || say "kafka: fetching the broker's jars, about 55 MB"
  jars=$("$root/scripts/tools.sh" kafka)
}

kafka_up() {
  if [ -n "${KAFKA_BOOTSTRAP:-}" ]; then
    local first=${KAFKA_BOOTSTRAP%%,*}
    answers "${first%:*}" "${first##*:}" || fail "KAFKA_BOOTSTRAP is $KAFKA_BOOTSTRAP, and nothing answers there"
    say "kafka: $KAFKA_BOOTSTRAP (KAFKA_BOOTSTRAP)"
    return
  fi
  if runs "$dir/kafka.pid" && answers 127.0.0.1 "$kafka_port"; then say "kafka: runs already, 127.0.0.1:$kafka_port"; return; fi
  answers 127.0.0.1 "$kafka_port" && fail "kafka: port $kafka_port is taken, expected it free (KAFKA_PORT names another)"
  if docker_works; then
    compose up -d --wait kafka >&2
    say "kafka: 127.0.0.1:$kafka_port (docker compose)"
    return
  fi
  kafka_programs
  mkdir -p "$dir/kafka"
  local controller=$((kafka_port + 1))
  cat >"$dir/kafka/server.properties" <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller
listeners=PLAINTEXT://127.0.0.1:$kafka_port,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAINTEXT://127.0.0.1:$kafka_port
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$dir/kafka/data
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
${KAFKA_PROPERTIES:-}
EOF
  cat >"$dir/kafka/log4j2.yaml" <<'EOF'
Configuration:
  Appenders:
    Console: { name: out, target: SYSTEM_OUT, PatternLayout: { pattern: "%d %p %c{1} %m%n" } }
  Loggers:
    Root: { level: WARN, AppenderRef: { ref: out } }
EOF
  local run=(java -cp "$jars/*" "-Dlog4j2.configurationFile=$dir/kafka/log4j2.yaml")
  if ! [ -e "$dir/kafka/data/meta.properties" ]; then
    local id
    id=$("${run[@]}" kafka.tools.StorageTool random-uuid | tail -1)
    "${run[@]}" kafka.tools.StorageTool format -t "$id" -c "$dir/kafka/server.properties" >"$dir/kafka/format.log" 2>&1 ||
      { cat "$dir/kafka/format.log" >&2; fail "kafka: the data directory can't be formatted"; }
  fi
  setsid nohup "${run[@]}" -Xms256m -Xmx512m -XX:+UseSerialGC kafka.Kafka "$dir/kafka/server.properties" \
    >>"$dir/kafka/broker.log" 2>&1 </dev/null &
  echo $! >"$dir/kafka.pid"
  kafka_ready() { ! runs "$dir/kafka.pid" || answers 127.0.0.1 "$kafka_port"; }
  wait_for 60 kafka_ready && runs "$dir/kafka.pid" ||
    { tail -20 "$dir/kafka/broker.log" >&2; fail "kafka: no answer within 60 s"; }
  say "kafka: 127.0.0.1:$kafka_port (java, process $(cat "$dir/kafka.pid"))"
}

redis_up() {
  if [ -n "${REDIS_URL:-}" ]; then
    local at=${REDIS_URL#*://}; at=${at##*@}; at=${at%%/*}
    answers "${at%:*}" "${at##*:}" || fail "REDIS_URL is $REDIS_URL, and nothing answers there"
    say "redis: $REDIS_URL (REDIS_URL)"
    return
  fi
  if runs "$dir/redis.pid" && answers 127.0.0.1 "$redis_port"; then say "redis: runs already, 127.0.0.1:$redis_port"; return; fi
  answers 127.0.0.1 "$redis_port" && fail "redis: port $redis_port is taken, expected it free (REDIS_PORT names another)"
  if docker_works; then
    compose up -d --wait redis >&2
    say "redis: 127.0.0.1:$redis_port (docker compose)"
    return
  fi
  has redis-server || install redis-server || fail "redis: no docker and no redis-server, expected one of them (REQUIRE_SERVICES=1 installs it)"
  mkdir -p "$dir/redis"
  setsid nohup redis-server --bind 127.0.0.1 --port "$redis_port" --dir "$dir/redis" --appendonly yes --save '' \
    >>"$dir/redis/redis.log" 2>&1 </dev/null &
  echo $! >"$dir/redis.pid"
  redis_ready() { ! runs "$dir/redis.pid" || answers 127.0.0.1 "$redis_port"; }
  wait_for 20 redis_ready && runs "$dir/redis.pid" ||
    { tail -5 "$dir/redis/redis.log" >&2; fail "redis: no answer within 20 s"; }
  say "redis: 127.0.0.1:$redis_port (redis-server, process $(cat "$dir/redis.pid"))"
}

prometheus_up() {
  if runs "$dir/prometheus.pid" && answers 127.0.0.1 "$prometheus_port"; then say "prometheus: runs already, 127.0.0.1:$prometheus_port"; return; fi
  answers 127.0.0.1 "$prometheus_port" && fail "prometheus: port $prometheus_port is taken, expected it free (PROMETHEUS_PORT names another)"
  has prometheus || install prometheus || fail "prometheus: the program is missing (REQUIRE_SERVICES=1 installs it)"
  mkdir -p "$dir/prometheus"
  local targets=${PROMETHEUS_TARGETS:-127.0.0.1:50051,127.0.0.1:50052,127.0.0.1:50053}
  cat >"$dir/prometheus/prometheus.yml" <<EOF
global: { scrape_interval: 1s }
scrape_configs:
  - job_name: aviary
    static_configs: [ { targets: [ "${targets//,/\", \"}" ] } ]
EOF
  setsid nohup prometheus --config.file "$dir/prometheus/prometheus.yml" --storage.tsdb.path "$dir/prometheus/data" \
    --web.listen-address "127.0.0.1:$prometheus_port" >>"$dir/prometheus/prometheus.log" 2>&1 </dev/null &
  echo $! >"$dir/prometheus.pid"
  prometheus_ready() { ! runs "$dir/prometheus.pid" || answers 127.0.0.1 "$prometheus_port"; }
  wait_for 20 prometheus_ready && runs "$dir/prometheus.pid" ||
    { tail -5 "$dir/prometheus/prometheus.log" >&2; fail "prometheus: no answer within 20 s"; }
  say "prometheus: 127.0.0.1:$prometheus_port (process $(cat "$dir/prometheus.pid"))"
}

stop() {
  local name=$1 pid
  if runs "$dir/$name.pid"; then
    pid=$(cat "$dir/$name.pid")
    kill "$pid"
    gone() { ! kill -0 "$pid" 2>/dev/null; }
    wait_for 20 gone || kill -9 "$pid"
    say "$name: stopped"
  fi
  rm -f "$dir/$name.pid"
  if [ "$name" != prometheus ] && docker_works && [ -n "$(compose ps -q "$name" 2>/dev/null)" ]; then compose rm -sf "$name" >&2; fi
}

verb=${1:-}; shift || true
if [ "$verb" = need ]; then
  for program in "$@"; do has "$program" || install "$program" || { say "$program is not installed"; exit 1; }; done
  exit
fi
if [ "$verb" = fetch ]; then
  [ -n "${KAFKA_BOOTSTRAP:-}" ] || docker_works || kafka_programs
  for program in redis-server prometheus; do has "$program" || install "$program" || say "$program is not installed"; done
  exit
fi
if [ $# -gt 0 ]; then names=("$@"); else names=(kafka redis); fi
for name in "${names[@]}"; do
  case "$name" in kafka | redis | prometheus) ;; *) fail "found $name, expected kafka, redis or prometheus" ;; esac
done
case "$verb" in
  up) for name in "${names[@]}"; do "${name}_up"; done ;;
  down) for name in "${names[@]}"; do stop "$name"; done ;;
  status)
    state=0
    for pair in "kafka ${KAFKA_BOOTSTRAP:-127.0.0.1:$kafka_port}" "redis ${REDIS_URL:-127.0.0.1:$redis_port}"; do
      read -r name at <<<"$pair"
      plain=${at#*://}; plain=${plain##*@}; plain=${plain%%/*}; plain=${plain%%,*}
      if answers "${plain%:*}" "${plain##*:}"; then echo "$name: answers at $at"; else echo "$name: no answer at $at"; state=1; fi
    done
    exit "$state" ;;
  env)
    echo "export KAFKA_BOOTSTRAP=${KAFKA_BOOTSTRAP:-127.0.0.1:$kafka_port}"
    if [ -n "${AVIARY_KAFKA_JARS:-}" ]; then echo "export AVIARY_KAFKA_JARS=$AVIARY_KAFKA_JARS"
    elif "$root/scripts/tools.sh" have kafka; then echo "export AVIARY_KAFKA_JARS=$("$root/scripts/tools.sh" kafka)"; fi
    echo "export REDIS_URL=${REDIS_URL:-redis://127.0.0.1:$redis_port}" ;;
  *) sed -n '2,19s/^# \{0,1\}//p' "$0"; [ -z "$verb" ] || exit 2 ;;
esac
