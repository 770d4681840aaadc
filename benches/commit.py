#!/usr/bin/env python3
"""Latency of a commit, from the client's request to COMMITTED: three nodes on this machine, fsync on, health vote inside.

    cargo build --release && benches/commit.py [ROUNDS]

Where etcd is installed, three of its nodes are measured in the same run by the same client (puts of 256 bytes through
its HTTP gateway to the leader). Also prints failover: SIGKILL of the coordinator to the next commit at a survivor.
Everything listens on 127.0.0.1; all of it ends, and its directory is removed, with the script.
"""
import base64, http.client, json, os, shutil, socket, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AVIARY = os.path.join(ROOT, "target", "release", "aviary")
NODES = {name: (28080 + i, 28180 + i, 28280 + i) for i, name in enumerate("abc")}  # data, api, control
# Without mutual TLS: AVIARY_BENCH_PLAINTEXT=1.
PLAINTEXT = "[control]\nplaintext = true\n" if os.environ.get("AVIARY_BENCH_PLAINTEXT") else ""
ROLLOUT = """apiVersion: aviary/v1
kind: Rollout
metadata: { name: bench }
spec:
  stable: { version: v1, answer: node }
  canary: { version: v2, answer: node }
  steps: [ { setWeight: 5 }, { pause: {} }, { setWeight: 100 } ]
"""


def connect(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.connect()
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def ask(client, method, path, body=""):
    kind = "application/yaml" if body.startswith("apiVersion") else "application/json"
    client.request(method, path, body, {"content-type": kind})
    answer = client.getresponse()
    return answer.status, answer.read()


def timed(client, path, body):
    began = time.perf_counter()
    status, answer = ask(client, "POST", path, body)
    assert status == 200, (status, answer)
    return (time.perf_counter() - began) * 1000


def show(what, times):
    times = sorted(times)
    print(f"{what:34} p50 {times[len(times) // 2]:6.2f} ms   p99 {times[int(len(times) * 0.99)]:6.2f} ms   n {len(times)}")
    return times[len(times) // 2]


def wait_ready(name):
    while True:
        try:
            if ask(connect(NODES[name][0]), "GET", "/readyz?quorum")[0] == 200:
                return
        except OSError:
            pass
        # Pause between two tries.
        time.sleep(0.005)


class cluster:
    """Three nodes in `folder`, ready; they end with the block."""

    def __init__(self, folder):
        self.folder, self.running = folder, {}
        for name, (data, api, control) in NODES.items():
            text = (f'[node]\nid = "{name}"\ndata_dir = "{folder}/{name}"\n{PLAINTEXT}[log]\nlevel = "warn"\n'
                    f'[listen]\ndata = "127.0.0.1:{data}"\napi = "127.0.0.1:{api}"\ncontrol = "127.0.0.1:{control}"\n')
            for peer, (_, papi, pcontrol) in NODES.items():
                if peer != name:
                    text += f'[peers.{peer}]\ncontrol = "127.0.0.1:{pcontrol}"\napi = "127.0.0.1:{papi}"\n'
            with open(f"{folder}/{name}.toml", "w") as file:
                file.write(text)
        files = [word for name in NODES for word in ("--config", f"{folder}/{name}.toml")]
        subprocess.run([AVIARY, "cluster", "init", *files], check=True, stdout=subprocess.DEVNULL)

    def start(self, name):
        with open(f"{self.folder}/{name}.err", "a") as log:
            self.running[name] = subprocess.Popen([AVIARY, "node", "--config", f"{self.folder}/{name}.toml"], stderr=log)

    def kill(self, name):
        self.running[name].kill()

    def __enter__(self):
        for name in NODES:
            self.start(name)
        for name in NODES:
            wait_ready(name)
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()


def ours(folder, rounds):
    with cluster(folder) as nodes:
        client = connect(NODES["a"][1])
        timed(client, "/v1/rollouts", ROLLOUT)
        times = {"abort": [], "retry": []}
        for _ in range(rounds):
            for verb, found in times.items():
                found.append(timed(client, f"/v1/rollouts/bench/{verb}", "{}"))
        decreases = show("rollback (majority)", times["abort"])
        increases = show("start (every node's health vote)", times["retry"])
        failovers = []
        for _ in range(10):
            nodes.kill("a")
            began = time.perf_counter()
            while True:
                try:
                    status, answer = ask(connect(NODES["b"][1]), "POST", "/v1/rollouts/bench/abort", "{}")
                    if status == 200 and json.loads(answer)["status"] == "COMMITTED":
                        break
                except OSError:
                    pass
            failovers.append((time.perf_counter() - began) * 1000)
            nodes.running["a"].wait()
            nodes.start("a")
            wait_ready("a")
            while ask(connect(NODES["b"][1]), "POST", "/v1/rollouts/bench/retry", "{}")[0] != 200:
                # Pause between two tries: the node that came back has not caught up yet.
                time.sleep(0.1)
        show("failover, kill to next rollback", failovers)
        return decreases, increases


def etcd_leader():
    """Waits until a member says that it leads, and returns a connection to it."""
    while True:
        for i in range(3):
            try:
                client = connect(29370 + i)
                status = json.loads(ask(client, "POST", "/v3/maintenance/status", "{}")[1])
            except (OSError, http.client.HTTPException):
                continue
            if status.get("leader", "0") == status.get("header", {}).get("member_id"):
                return client
        # Pause between two tries.
        time.sleep(0.05)


def etcd(folder, rounds):
    peers = ",".join(f"n{i}=http://127.0.0.1:{29380 + i}" for i in range(3))
    running = []
    try:
        for i in range(3):
            client, peer = f"http://127.0.0.1:{29370 + i}", f"http://127.0.0.1:{29380 + i}"
            running.append(subprocess.Popen(
                ["etcd", "--name", f"n{i}", "--data-dir", f"{folder}/etcd{i}", "--listen-client-urls", client,
                 "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                 "--initial-cluster", peers], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        client = etcd_leader()
        put = json.dumps({"key": base64.b64encode(b"k").decode(), "value": base64.b64encode(b"x" * 256).decode()})
        return show("etcd put", [timed(client, "/v3/kv/put", put) for _ in range(2 * rounds)])
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    if not os.path.exists(AVIARY):
        sys.exit(f"{AVIARY} is missing: cargo build --release")
    folder = tempfile.mkdtemp(prefix="aviary-bench-", dir=os.path.join(ROOT, "target"))
    try:
        decreases, increases = ours(folder, rounds)
        if shutil.which("etcd"):
            beside = etcd(folder, rounds)
            print(f"ratio to etcd: rollback {decreases / beside:.2f}, start {increases / beside:.2f}")
        else:
            print("etcd is not installed: measured without it")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
