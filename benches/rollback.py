#!/usr/bin/env python3
"""Time from a failing canary's first failed answer to its last answer at any node: three nodes, 20 % canary.

    cargo build --release && benches/rollback.py [RUNS] [REQUESTS_PER_SECOND]

Each run starts a rollout, sends open-loop traffic to all three nodes, makes the canary fail every request, and reads from
the load generator's report when clients saw its first failure and its last answer. Everything listens on 127.0.0.1; all of
it ends, and its directory is removed, with the script.
"""
import http.client, json, os, shutil, socket, subprocess, sys, tempfile, time

import commit

UPSTREAMS = {"stable": 28391, "canary": 28392}
ROLLOUT = """apiVersion: aviary/v1
kind: Rollout
metadata: { name: bench }
spec:
  stable: { version: v1, url: "http://127.0.0.1:28391" }
  canary: { version: NAME, url: "http://127.0.0.1:28392" }
  steps: [ { setWeight: 20 }, { pause: {} }, { setWeight: 100 } ]
"""


def fault(percent):
    client = http.client.HTTPConnection("127.0.0.1", UPSTREAMS["canary"], timeout=10)
    client.request("PUT", "/fault", json.dumps({"error_percent": percent}), {"content-type": "application/json"})
    assert client.getresponse().status == 200


def run(client, number, rate, folder):
    """Returns the milliseconds of exposure and the canary answers that clients got in them."""
    name = f"c{number}"
    fault(0)
    commit.timed(client, "/v1/rollouts", ROLLOUT.replace("NAME", name))
    report = f"{folder}/load-{number}.ndjson"
    urls = ",".join(f"http://127.0.0.1:{data}/predict" for data, _, _ in commit.NODES.values())
    load = subprocess.Popen([commit.AVIARY, "load", "--url", urls, "--rate", str(rate), "--duration", "3s", "--report", report],
                            stdout=subprocess.DEVNULL)
    # The canary serves well for the first third of the load: only a later failure is measured.
    time.sleep(1)
    fault(100)
    assert load.wait() == 0
    with open(report) as file:
        summary = json.loads(file.readlines()[-1])
    answers = summary["versions"][name]
    assert answers["non_2xx"] > 0, "the canary's failures reached nobody"
    while commit.ask(client, "POST", "/v1/rollouts/bench/abort", "{}")[0] != 200:
        # Pause between two tries.
        time.sleep(0.1)
    return answers["exposed_ms_after_first_failure"], answers["non_2xx"]


def wait_listening(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            # Pause between two tries.
            time.sleep(0.01)


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rate = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    folder = tempfile.mkdtemp(prefix="aviary-bench-", dir=os.path.join(commit.ROOT, "target"))
    upstreams = []
    try:
        with commit.cluster(folder):
            for (role, port), version in zip(UPSTREAMS.items(), ("v1", "v2")):
                upstreams.append(subprocess.Popen([commit.AVIARY, "upstream", "--listen", f"127.0.0.1:{port}", "--version", version],
                                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            for port in UPSTREAMS.values():
                wait_listening(port)
            client = commit.connect(commit.NODES["a"][1])
            found = [run(client, number, rate, folder) for number in range(runs)]
        commit.show(f"first failure to last, {rate}/s", [ms for ms, _ in found])
        print(f"failed canary answers in that time: {sorted(n for _, n in found)}")
    finally:
        for process in upstreams:
            process.terminate()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


main()
