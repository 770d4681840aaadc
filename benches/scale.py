#!/usr/bin/env python3
"""What many rollouts at once cost: three nodes on this machine, analysis windows, events reported over HTTP.

    cargo build --release && benches/scale.py [--services 1000] [--window 10] [--rate 20000] [--seconds 60]

Starts the rollouts one after the other, and prints how long each quarter of them took, and the processor time of a node for it. Then it reports events to the API ports
of all nodes and prints, for each node, its processor time (user and system, from /proc, so that it counts only what the node
itself used) and its resident memory; and how long after its end a window was decided. Other load on the machine makes the
windows' times longer, and hardly changes the rest. `--spread` gives the events latencies between 20 and 500 ms instead of
20 ms for all; `--sequential` adds the comparison with stable; `--program` measures another build. Everything listens on
127.0.0.1; all of it ends, and its directory is removed, with the script.
"""
import argparse, datetime, json, math, os, random, shutil, sys, tempfile, threading, time

import commit

ROLLOUT = """apiVersion: aviary/v1
kind: Rollout
metadata: {{ name: {name} }}
spec:
  stable: {{ version: v1, answer: node }}
  canary: {{ version: v2, answer: node }}
  steps: [ {{ setWeight: 20 }}, {{ pause: {{}} }}, {{ setWeight: 100 }} ]
  analysis:
    window: {window}s
    minSamples: 20
    metrics:
      - {{ name: errors, strategy: THRESHOLD, thresholdRange: {{ max: 5 }}, onFailure: rollback }}
      - {{ name: latency, strategy: THRESHOLD, statistic: mean, thresholdRange: {{ max: 500 }}, onFailure: pause }}
"""
SEQUENTIAL = """      - { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.005 }
      - { name: latency-vs-stable, strategy: SEQUENTIAL, quantile: 0.95, allowedIncrease: 0.10 }
"""
BATCHES_PER_SECOND = 20
TEMPLATES = 60
HERTZ = os.sysconf("SC_CLK_TCK")


def processor_seconds(path):
    with open(path) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / HERTZ


def threads(pid):
    """Returns the processor time of each kind of thread, by its name without its number."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/comm") as file:
                name = file.read().strip().rstrip("0123456789-")
            found[name] = found.get(name, 0.0) + processor_seconds(f"/proc/{pid}/task/{task}/stat")
        except FileNotFoundError:
            pass
    return found


def resident_kib(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def head():
    return json.loads(commit.ask(commit.connect(commit.NODES["a"][1]), "GET", "/v1/cluster")[1])["head"]


def start_rollouts(client, options, pids):
    used = lambda: sum(processor_seconds(f"/proc/{pid}/stat") for pid in pids) / len(pids)  # noqa: E731
    began, before, quarters, repeated = time.perf_counter(), used(), [], 0
    processor = [before]
    for number in range(options.services):
        text = ROLLOUT.format(name=f"s{number}", window=options.window)
        while commit.ask(client, "POST", "/v1/rollouts", text + SEQUENTIAL * options.sequential)[0] != 200:
            # A node of a machine that is too busy didn't vote in time.
            repeated += 1
        if (number + 1) % max(1, options.services // 4) == 0:
            quarters.append(time.perf_counter() - began - sum(quarters))
            processor.append(used())
    took = time.perf_counter() - began
    print(f"{options.services} rollouts started in {took:.1f} s, by quarters: " + ", ".join(f"{q:.1f} s" for q in quarters)
          + f"; processor time of a node {used() - before:.1f} s, by quarters: "
          + ", ".join(f"{now - last:.2f} s" for last, now in zip(processor, processor[1:]))
          + f"; {repeated} repeated" * (repeated > 0))


def templates(options, node):
    """Returns batches of events that lack only their time."""
    draws, at, made = random.Random(node), node * options.services // 3, []
    for _ in range(TEMPLATES):
        events = []
        for _ in range(options.rate // BATCHES_PER_SECOND // 3):
            version = "v2" if at // options.services % 5 == 0 else "v1"
            latency = min(500.0, max(20.0, draws.lognormvariate(math.log(80), 0.6))) if options.spread else 20
            events.append('{"service":"s%d","version":"%s","status":200,"latency_ms":%.3f,"event_time":@}'
                          % (at % options.services, version, latency))
            at += 1
        made.append((("[" + ",".join(events) + "]").encode(), len(events)))
    return made


class Reporter(threading.Thread):
    """Reports events to one node at a fixed rate, until it is told to stop."""

    def __init__(self, node, name, options):
        super().__init__()
        self.batches, self.port = templates(options, node), commit.NODES[name][1]
        self.ending, self.sent, self.failure = threading.Event(), 0, None

    def run(self):
        client, began, number = commit.connect(self.port), time.perf_counter(), 0
        while not self.ending.is_set():
            # The rate is made of batches; a late one is sent at once.
            time.sleep(max(0.0, began + number / BATCHES_PER_SECOND - time.perf_counter()))
            body, events = self.batches[number % TEMPLATES]
            client.request("POST", "/v1/telemetry", body.replace(b"@", b"%d" % (time.time() * 1000)),
                           {"content-type": "application/json"})
            answer = client.getresponse()
            told = json.loads(answer.read())
            # A rollout that was rolled back has no canary any more.
            if answer.status != 200 or told["accepted"] < events * 0.9:
                self.failure = told
                return
            number, self.sent = number + 1, self.sent + events


def decisions(name, through):
    """Returns all decisions up to a slot, from a node's event stream."""
    client = commit.connect(commit.NODES[name][1])
    client.request("GET", "/v1/events", headers={"last-event-id": "0"})
    stream, found, identity = client.getresponse(), [], 0
    while identity < through * 4096:
        line = stream.readline().decode().strip()
        if line.startswith("data:"):
            found.append(json.loads(line[5:]))
        elif line.startswith("id:"):
            identity = int(line[3:])
    client.close()
    return found


def milliseconds(time):
    return datetime.datetime.fromisoformat(time).timestamp() * 1000


def lateness(events, since):
    """Returns the seconds from a window's end until it was decided, of windows that ended after `since`."""
    starts, late = {}, []
    for event in events:
        if event["event"] == "routing" and event["state"]["status"] == "COMMITTED":
            starts.setdefault(event["state"]["service"], milliseconds(event["state"]["timestamp"]))
        elif event["event"] == "analyzed":
            end = starts[event["service"]] + event["window_verdict"]["to_ms"]
            if end >= since:
                late.append((milliseconds(event["decided_at"]) - end) / 1000)
    return sorted(late)


def measure(nodes, options):
    pids = {name: process.pid for name, process in nodes.running.items()}
    empty = {name: resident_kib(pid) for name, pid in pids.items()}
    start_rollouts(commit.connect(commit.NODES["a"][1]), options, list(pids.values()))
    reporters = [Reporter(number, name, options) for number, name in enumerate(commit.NODES)]
    [reporter.start() for reporter in reporters]
    # The first windows hold less than a whole window's events.
    time.sleep(options.window)
    began, since, first = time.perf_counter(), time.time() * 1000, head()
    sent = sum(reporter.sent for reporter in reporters)
    before = {name: (processor_seconds(f"/proc/{pid}/stat"), threads(pid)) for name, pid in pids.items()}
    time.sleep(options.seconds)
    elapsed, last = time.perf_counter() - began, head()
    sent = sum(reporter.sent for reporter in reporters) - sent
    for name, pid in pids.items():
        used, by_thread = processor_seconds(f"/proc/{pid}/stat") - before[name][0], threads(pid)
        shares = {kind: (now - before[name][1].get(kind, 0.0)) / elapsed * 100 for kind, now in by_thread.items()}
        most = sorted(shares.items(), key=lambda share: -share[1])[:4]
        print(f"node {name}: {used / elapsed * 100:.1f} % of a core ("
              + ", ".join(f"{kind} {share:.1f}" for kind, share in most if share >= 0.1)
              + f"), {(resident_kib(pid) - empty[name]) / options.services:.1f} KiB a service")
    [reporter.ending.set() for reporter in reporters]
    [reporter.join() for reporter in reporters]
    assert all(reporter.failure is None for reporter in reporters), [reporter.failure for reporter in reporters]
    late = lateness(decisions("b", last), since)
    at = lambda share: late[round((len(late) - 1) * share)]  # noqa: E731
    print(f"{sent / elapsed:.0f} events/s, {(last - first) / elapsed:.1f} slots/s; {len(late)} windows decided after their end: "
          f"p50 {at(0.5):.2f} s, p99 {at(0.99):.2f} s, last {late[-1]:.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--window", type=int, default=10, help="length of a window, in seconds")
    parser.add_argument("--rate", type=int, default=20_000, help="events a second, of all services together")
    parser.add_argument("--seconds", type=int, default=60, help="how long is measured")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--program", default=commit.AVIARY)
    options = parser.parse_args()
    commit.AVIARY = options.program
    if not os.path.exists(commit.AVIARY):
        sys.exit(f"{commit.AVIARY} is missing: cargo build --release")
    folder = tempfile.mkdtemp(prefix="aviary-bench-", dir=os.path.join(commit.ROOT, "target"))
    try:
        with commit.cluster(folder) as nodes:
            measure(nodes, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
