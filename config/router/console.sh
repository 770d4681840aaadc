#!/usr/bin/env bash
# A hook of `aviary router` that runs Kafka's console consumer as the service. An example; the tests use it too.
#
#   console.sh start|stop stable|canary TOPIC GROUP
#
# A start of a running service and a stop of a stopped one do nothing. Each record that a service reads becomes a line of DIR/SIDE.log:
# partition, offset, headers, key, value.
#
# SERVICES_DIR      DIR for logs and process ids; default: target/router-services
# KAFKA_BOOTSTRAP   the broker; the router sets it
# OFFSET_RESET      auto.offset.reset of the group; default: none, because the router sets its offsets
# KAFKA_JARS        directory of the broker's jars; default: that of scripts/tools.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${SERVICES_DIR:-$root/target/router-services}
jars=${KAFKA_JARS:-$("$root/scripts/tools.sh" kafka)}
[ $# = 4 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
call=$1 side=$2 topic=$3 group=$4
mkdir -p "$dir"
pid_file=$dir/$side.pid topic_file=$dir/$side.topic

runs() { [ -s "$pid_file" ] && kill -0 "$(cat "$pid_file")" 2>/dev/null; }

stop() {
  runs || return 0
  kill "$(cat "$pid_file")"
  for _ in $(seq 300); do runs || return 0; sleep 0.1; done
  echo "console.sh: $side did not end within 30 s" >&2
  return 1
}

# A call with an older number than the last one is late, and does nothing.
exec 9>"$dir/$side.lock"
flock 9
number=${AVIARY_CALL:-}
if [ -n "$number" ]; then
  [ "$number" -ge "$(cat "$dir/${AVIARY_ROUTER:-hand}.$side.call" 2>/dev/null || echo 0)" ] || exit 0
  echo "$number" >"$dir/${AVIARY_ROUTER:-hand}.$side.call"
fi

case "$call" in
  stop)
    # Only if it reads that topic: a newer call may have started it on another one.
    [ "$(cat "$topic_file" 2>/dev/null)" != "$topic" ] || stop ;;
  start)
    if runs && [ "$(cat "$topic_file")" = "$topic" ]; then exit 0; fi
    stop
    echo "$topic" >"$topic_file"
    setsid nohup java -Xmx128m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp "$jars/*" org.apache.kafka.tools.consumer.ConsoleConsumer \
      --bootstrap-server "$KAFKA_BOOTSTRAP" --topic "$topic" --group "$group" --isolation-level read_committed \
      --consumer-property auto.offset.reset=${OFFSET_RESET:-none} --consumer-property auto.commit.interval.ms=500 \
      --property print.partition=true --property print.offset=true --property print.headers=true --property print.key=true \
      >>"$dir/$side.log" 2>>"$dir/$side.err" </dev/null 9>&- &
    echo $! >"$pid_file" ;;
  *) echo "console.sh: found $call, expected start or stop" >&2; exit 2 ;;
esac
