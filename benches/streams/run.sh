#!/usr/bin/env bash
# A splitter of records written with Kafka Streams, exactly once, for benchmarks to hold the router against.
#
#   benches/streams/run.sh BOOTSTRAP SOURCE STABLE CANARY WEIGHT_BP [THREADS]
#
# Sends each record of topic SOURCE to CANARY or STABLE (Split.java says how), from the earliest record on, or from where an earlier run
# with this SOURCE left off. All three topics must exist, with as many partitions. Java takes this script's place: its pid is the one to
# end, with SIGTERM. Streams leaves its group by timeout, as ever: started again with the same SOURCE, it may wait 45 s for its partitions.
# Needs java 17+, and Maven the first time.
#
# AVIARY_SERVICES_DIR   jars and state; default target/services
# STREAMS_JAVA_OPTS     options of java; default -Xmx256m
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benches/streams
dir=${AVIARY_SERVICES_DIR:-$root/target/services}
jars=$dir/streams-jars

fail() { echo "run.sh: $*" >&2; exit 1; }

if [ $# -lt 5 ] || [ $# -gt 6 ]; then sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; fi
command -v java >/dev/null || fail "java is missing, expected 17 or newer"
if ! [ -e "$jars/done" ]; then
  command -v mvn >/dev/null || fail "mvn is missing, expected Maven to fetch the jars of Kafka Streams"
  echo "run.sh: fetching the jars of Kafka Streams" >&2
  mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$jars" >&2
  touch "$jars/done"
fi
read -ra options <<<"${STREAMS_JAVA_OPTS:--Xmx256m}"
exec java "${options[@]}" -cp "$jars/*" "$here/Split.java" "$1" "$2" "$3" "$4" "$5" "${6:-1}" "$dir/streams-state-$$"
