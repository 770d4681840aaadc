#!/usr/bin/env python3
"""Checks a cluster of real nodes from outside, by a model of its own.

    tests/checker.py [--aviary target/release/aviary] [--seconds 120] [--seed N] [--no-faults NAME,…]

Three nodes in network namespaces, IPv6 throughout. Faults: kill, stop (SIGSTOP, a monotonic stall), cut (one way or both), disk (an
old copy of a node's disk comes back), clock (wall clocks jump by up to an hour, by a preloaded library), distance (80 ms ± 10 ms
between nodes, 1 % loss). Meanwhile operators write, readers read linearizably, and users send requests; all that they were told is
kept with its times. What must hold:

  acknowledged   what was answered COMMITTED is in every node's history at its slot, what was answered ABORTED changed nothing
  one key        a repeated key has the answer of the first time
  reads          a linearizable read shows no older state than an answer or a read that ended before it began
  ceiling        after an acknowledged rollback the canary answers nobody once the lease is over, until it is started again
  lease          a node that is cut off from both others serves stable once its lease is over
  one history    in the end all nodes have the same records
  nothing fails  users get their answers, except from a node that is down or stopped

Needs root, `ip` and `tc`; `cc` for clock. Ends with 0 and says so where they are missing. Exit 1: something didn't hold.
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

NAMES = "abc"
SERVICE = "svc"
# A lease, the difference of clocks' rates, and how late this program may note an answer.
LEASE_S, SLACK_S = 2.0, 0.4
FAULTS = ["kill", "stop", "cut", "disk", "clock", "distance"]
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static int (*real)(clockid_t, struct timespec *);
/* The file's text is read each time: the test changes it while the process runs. */
static long jump(void) {
  char text[32] = {0};
  int file = open(getenv("WALL_JUMP"), O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  long found = read(file, text, sizeof text - 1) > 0 ? atol(text) : 0;
  close(file);
  return found;
}
int clock_gettime(clockid_t id, struct timespec *at) {
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, at);
  if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += jump();
  return result;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  (void)zone;
  int result = clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
  return result;
}
time_t time(time_t *into) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (into) *into = now.tv_sec;
  return now.tv_sec;
}
"""


def run(*words, check=True):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr or done.stdout}")
    return done.stdout


class Network:
    """A namespace for each node, on a bridge."""

    def __init__(self):
        # Short: the name of an interface has at most 15 characters.
        self.id = f"{os.getpid() % 10000:04}"
        self.net = f"fd77:{os.getpid() % 0xffff:x}::"
        self.bridge = f"ck{self.id}"
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "link", "set", self.bridge, "up")
        run("ip", "-6", "addr", "add", f"{self.net}ff/64", "dev", self.bridge, "nodad")
        for i, name in enumerate(NAMES):
            space, outer = self.space(name), f"cv{self.id}{name}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outer, "master", self.bridge, "up")
            run("ip", "-n", space, "-6", "addr", "add", f"{self.address(name)}/64", "dev", "eth0", "nodad")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")

    def space(self, name):
        return f"ck{self.id}{name}"

    def address(self, name):
        return f"{self.net}{NAMES.index(name) + 1}"

    def cut(self, sender, receiver, is_cut):
        """Nothing from one node reaches the other, or does again."""
        run("ip", "-n", self.space(sender), "-6", "route", "add" if is_cut else "del", "blackhole",
            f"{self.address(receiver)}/128", check=False)

    def distance(self, is_far):
        """Packets from each node take 40 ms, so that 80 ms pass until an answer is back."""
        for name in NAMES:
            rule = ["root", "netem", "delay", "40ms", "5ms", "loss", "1%"] if is_far else ["root"]
            words = ["tc", "-n", self.space(name), "qdisc", "replace" if is_far else "del", "dev", "eth0", *rule]
            run(*words, check=is_far)

    def end(self):
        for name in NAMES:
            run("ip", "netns", "del", self.space(name), check=False)
        run("ip", "link", "del", self.bridge, check=False)


class Cluster:
    """The nodes and their disks."""

    def __init__(self, aviary, network, folder, has_clock):
        self.aviary, self.network, self.dir, self.shim = aviary, network, folder, None
        said = dict(line.split(":", 1) for line in run(aviary, "token", "--role", "admin", "--name", "checker").splitlines() if ":" in line)
        self.token = said["token"].strip()
        tokens = folder / "tokens"
        tokens.write_text(said["line"].strip() + "\n")
        tokens.chmod(0o600)
        configs = []
        for name in NAMES:
            at = f"[{network.address(name)}]"
            text = f'[node]\nid = "{name}"\ndata_dir = "{folder}/data-{name}"\n'
            text += f'[listen]\ndata = "{at}:8080"\napi = "{at}:50051"\ncontrol = "{at}:7001"\n[api]\ntokens_file = "{tokens}"\n'
            for peer in NAMES.replace(name, ""):
                text += f'[peers.{peer}]\ncontrol = "[{network.address(peer)}]:7001"\napi = "[{network.address(peer)}]:50051"\n'
            (folder / f"{name}.toml").write_text(text)
            configs += ["--config", folder / f"{name}.toml"]
            self.jump(name, 0)
        run(aviary, "cluster", "init", *configs)
        if has_clock:
            (folder / "shim.c").write_text(SHIM)
            run("cc", "-shared", "-fPIC", "-O2", "-o", folder / "shim.so", folder / "shim.c", "-ldl")
            self.shim = folder / "shim.so"
        self.processes = {}

    def jump(self, name, seconds):
        new = self.dir / f"jump-{name}.new"
        new.write_text(str(seconds))
        new.rename(self.dir / f"jump-{name}")

    def start(self, name):
        environment = dict(os.environ, WALL_JUMP=str(self.dir / f"jump-{name}"))
        if self.shim:
            environment["LD_PRELOAD"] = str(self.shim)
        console = open(self.dir / f"console-{name}", "a")
        words = ["ip", "netns", "exec", self.network.space(name), self.aviary, "node", "--config", self.dir / f"{name}.toml"]
        # `ip netns exec` becomes the program: the process is the node's.
        self.processes[name] = subprocess.Popen([str(word) for word in words], env=environment, stdout=console, stderr=console)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def signal(self, name, number):
        self.processes[name].send_signal(number)

    def ask(self, name, port, method, path, body=None, key=None, timeout=6):
        """Returns the status, the head and the body of an answer; raises OSError where there is none."""
        connection = http.client.HTTPConnection(self.network.address(name), port, timeout=timeout)
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        if key:
            headers["idempotency-key"] = key
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no answer: {error!r}") from error
        finally:
            connection.close()

    def until_ready(self, name, limit=30):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            try:
                if self.ask(name, 8080, "GET", "/readyz?quorum", timeout=2)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{name} was not ready within {limit} s")


class Model:
    """All that clients were told, with times of this machine's monotonic clock."""

    def __init__(self):
        self.lock = threading.Lock()
        self.writes, self.reads, self.served, self.failed = [], [], [], []
        # (node, from, until): no answer is owed.
        self.excused, self.cut_off = [], []
        self.broken = []

    def add(self, into, what):
        with self.lock:
            into.append(what)

    def wrong(self, rule, what):
        self.add(self.broken, f"{rule}: {what}")


class Clients:
    """Operators, readers and users, each a thread."""

    def __init__(self, cluster, model, seed):
        self.cluster, self.model, self.seed, self.stop = cluster, model, seed, threading.Event()
        work = [self.write] * 2 + [self.read] * 2
        self.threads = [threading.Thread(target=each, args=(i,)) for i, each in enumerate(work)]
        self.threads += [threading.Thread(target=self.use, args=(name,)) for name in NAMES]
        for thread in self.threads:
            thread.start()

    def write(self, number):
        chance, count = random.Random(f"{self.seed} {number}"), 0
        while not self.stop.is_set():
            count += 1
            verb = chance.choice(["retry", "promote", "promote", "pause", "resume", "abort"])
            key, name, began = f"k{number}-{count}", chance.choice(NAMES), time.monotonic()
            try:
                _, _, body = self.cluster.ask(name, 50051, "POST", f"/v1/rollouts/{SERVICE}/{verb}", "{}", key)
                answer = json.loads(body)
                word, slot = answer.get("code") or answer.get("status"), answer.get("slot")
            except (OSError, ValueError):
                word, slot = None, None
            self.model.add(self.model.writes, (began, time.monotonic(), verb, key, word, slot))
            time.sleep(chance.uniform(0.02, 0.2))

    def read(self, number):
        chance = random.Random(f"{self.seed} read {number}")
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                status, _, body = self.cluster.ask(chance.choice(NAMES), 8080, "GET", "/routing/state?consistency=linearizable")
                if status == 200:
                    state = json.loads(body)
                    self.model.add(self.model.reads, (began, time.monotonic(), state["slot"], state["version"], state["hash"]))
            except OSError:
                # A node that can't answer tells nothing that could be wrong.
                pass
            time.sleep(chance.uniform(0.01, 0.1))

    def use(self, name):
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                status, head, _ = self.cluster.ask(name, 8080, "POST", "/predict", "{}")
                self.model.add(self.model.served, (began, time.monotonic(), name, status, head.get("x-served-by")))
            except OSError as error:
                self.model.add(self.model.failed, (began, time.monotonic(), name, str(error)))
            time.sleep(0.01)

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join()


class Storm:
    """Faults, one or two at a time, each healed before the next."""

    def __init__(self, cluster, network, model, seed, faults):
        self.cluster, self.network, self.model = cluster, network, model
        self.chance, self.faults, self.counts = random.Random(f"{seed} storm"), faults, {}
        self.old = {}

    def round(self):
        fault = self.chance.choice(self.faults)
        self.counts[fault] = self.counts.get(fault, 0) + 1
        getattr(self, fault)()
        for name in NAMES:
            self.cluster.until_ready(name)

    def excused(self, name, began):
        # A request that was sent just before may end with the node, and one may wait at its closed port.
        self.model.add(self.model.excused, (name, began - 1, time.monotonic() + 1))

    def down(self, name, between=lambda: None):
        began = time.monotonic()
        self.cluster.kill(name)
        between()
        time.sleep(self.chance.uniform(0, 0.5))
        self.cluster.start(name)
        self.cluster.until_alive(name)
        self.excused(name, began)

    def kill(self):
        for name in self.chance.sample(NAMES, self.chance.randint(1, 3)):
            self.down(name)

    def stop(self):
        name, began = self.chance.choice(NAMES), time.monotonic()
        self.cluster.signal(name, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.1, 4))
        self.cluster.signal(name, signal.SIGCONT)
        self.excused(name, began)

    def cut(self):
        lone, both = self.chance.choice(NAMES), self.chance.random() < 0.5
        others = NAMES.replace(lone, "")
        ways = [(lone, other) for other in others] + [(other, lone) for other in others if both]
        for way in ways:
            self.network.cut(*way, True)
        began = time.monotonic()
        time.sleep(self.chance.uniform(0.5, 5))
        self.model.add(self.model.cut_off, (lone, began, time.monotonic()))
        if self.chance.random() < 0.3:
            self.down(self.chance.choice(NAMES))
        for way in ways:
            self.network.cut(*way, False)

    def disk(self):
        """A node comes back with an older copy of its disk, and is readmitted once it has said what to type."""
        name = self.chance.choice(NAMES)
        data, old = self.cluster.dir / f"data-{name}", self.cluster.dir / f"old-{name}"
        console = self.cluster.dir / f"console-{name}"

        def copy():
            shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(data, old)

        def put_back():
            shutil.rmtree(data)
            shutil.copytree(old, data)

        self.down(name, copy)
        self.cluster.until_ready(name)
        # Time in which it promises what it will have forgotten.
        time.sleep(self.chance.uniform(0.5, 2))
        told = console.stat().st_size
        self.down(name, put_back)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            said = console.read_text()[told:]
            at = said.find(f"aviary cluster readmit {name} --incarnation ")
            if at >= 0:
                incarnation = said[at:].split("--incarnation ")[1][:16]
                peer = self.chance.choice(NAMES.replace(name, ""))
                body = json.dumps({"node": name, "incarnation": incarnation})
                try:
                    self.cluster.ask(peer, 50051, "POST", "/v1/cluster/readmit", body)
                    self.cluster.until_ready(name, 3)
                    return
                except (OSError, RuntimeError):
                    # It is asked again.
                    pass
            time.sleep(0.1)
        self.model.wrong("disk", f"the old copy of {name}'s disk was not noticed, or it was not readmitted")

    def clock(self):
        name = self.chance.choice(NAMES)
        self.cluster.jump(name, self.chance.choice([-3600, -60, -5, 5, 60, 3600]))
        if self.chance.random() < 0.5:
            self.down(name)
        time.sleep(self.chance.uniform(0.5, 2))

    def distance(self):
        self.network.distance(True)
        time.sleep(self.chance.uniform(2, 6))
        if self.chance.random() < 0.5:
            self.down(self.chance.choice(NAMES))
        self.network.distance(False)


def until_alive(self, name, limit=30):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if self.processes[name].poll() is not None:
            raise RuntimeError(f"node {name} ended by itself: " + (self.dir / f"console-{name}").read_text()[-2000:])
        try:
            if self.ask(name, 8080, "GET", "/livez", timeout=2)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"{name} was not alive within {limit} s")


Cluster.until_alive = until_alive


def histories(cluster):
    """Returns what all nodes say was decided, once it is the same, or when it stays different for long."""
    end = time.monotonic() + 15
    while True:
        found = []
        for name in NAMES:
            _, _, body = cluster.ask(name, 50051, "GET", f"/v1/rollouts/{SERVICE}/history")
            told = json.loads(body)
            found.append(told["history"] if isinstance(told, dict) else told)
        keys = [[(record["slot"], record["hash"], record["txid"]) for record in history] for history in found]
        if keys[0] == keys[1] == keys[2] or time.monotonic() > end:
            return found, keys
        time.sleep(0.2)


def canary_weight(record):
    weights = record.get("weights") or {}
    if isinstance(weights, list):
        weights = {part[0]: part[1] for part in weights}
    return float(weights.get("v2", 0))


def judge(cluster, model):
    found, keys = histories(cluster)
    if not keys[0] == keys[1] == keys[2]:
        model.wrong("one history", [len(key) for key in keys])
        return
    records = {record["txid"]: record for record in found[0]}
    slots = [record["slot"] for record in found[0]]
    if sorted(set(slots)) != sorted(slots):
        model.wrong("one history", "a slot has two records")

    first = min(slots)
    for began, ended, verb, key, word, slot in model.writes:
        record = records.get(key)
        if word == "COMMITTED" and (record is None or record["slot"] != slot or record["status"] == "ABORTED"):
            model.wrong("acknowledged", f"{verb} {key} was COMMITTED at slot {slot}, found {record} (from {first} on)")
        if word == "ABORTED" and (record is None or record["status"] != "ABORTED"):
            model.wrong("acknowledged", f"{verb} {key} was ABORTED, found {record}")
    for i, (_, _, verb, key, word, slot) in enumerate(model.writes):
        # All would take minutes.
        if word in ("COMMITTED", "ABORTED", "UNCHANGED", "REFUSED") and (i % 7 == 0 or word == "ABORTED"):
            _, _, body = cluster.ask(NAMES[i % 3], 50051, "POST", f"/v1/rollouts/{SERVICE}/{verb}", "{}", key)
            again = json.loads(body)
            now = again.get("code") or again.get("status")
            if word in ("COMMITTED", "ABORTED") and (now, again.get("slot")) != (word, slot):
                model.wrong("one key", f"{verb} {key} was {word} at {slot}, is {now} at {again.get('slot')}")

    # What had ended before a read began is in it.
    ended = [(end, slot) for _, end, _, _, word, slot in model.writes if word == "COMMITTED"]
    ended += [(end, slot) for _, end, slot, _, _ in model.reads]
    ended.sort()
    most, at = 0, 0
    for began, _, slot, version, _ in sorted(model.reads):
        while at < len(ended) and ended[at][0] < began:
            most = max(most, ended[at][1])
            at += 1
        if slot < most:
            model.wrong("reads", f"a read saw slot {slot}, {most} was told before it began")

    # From an acknowledged end of the canary until anybody asked for it again, nobody may get it once leases are over.
    asked = {key: (began, ended) for began, ended, _, key, _, _ in model.writes}
    order = sorted(found[0], key=lambda record: record["slot"])
    lowered, share = [], 0.0
    for i, record in enumerate(order):
        weight = canary_weight(record) if record.get("weights") is not None else share
        if share > 0 and weight == 0 and record["status"] == "COMMITTED" and record["txid"] in asked:
            raised = next((asked[r["txid"]][0] for r in order[i + 1:] if r["txid"] in asked and r.get("weights") is not None
                           and canary_weight(r) > 0), float("inf"))
            lowered.append((asked[record["txid"]][1] + LEASE_S * 1.01 + SLACK_S, raised))
        share = weight
    canary = sorted((began, ended, name) for began, ended, name, _, by in model.served if by == "v2")
    for since, until in lowered:
        for began, ended, name in canary:
            # One that was sent on before the end of the lease may be answered later.
            if began > since and ended < until:
                model.wrong("ceiling", f"{name} served the canary {began - since:.2f} s after a rollback's last lease")
    for name, since, until in model.cut_off:
        for began, ended, server in canary:
            if server == name and since + LEASE_S * 1.01 + SLACK_S < began and ended < until:
                model.wrong("lease", f"{name} served the canary {began - since:.2f} s after it was cut off")
    for began, ended, name, why in model.failed:
        if not any(node == name and since <= ended and began <= until for node, since, until in model.excused):
            model.wrong("nothing fails", f"a request to {name} got no answer: {why}")
    for began, _, name, status, _ in model.served:
        if status != 200:
            model.wrong("nothing fails", f"{name} answered {status}")
    print(f"{len(order)} records, {len(lowered)} rollbacks with a time after which the canary is silent, {len(canary)} canary answers")


def main(arguments):
    faults = [fault for fault in FAULTS if fault not in arguments.no_faults.split(",")]
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        print(f"skipped: network namespaces need root and {' and '.join(missing) or 'nothing else'}")
        return
    if "clock" in faults and not shutil.which("cc"):
        faults.remove("clock")
    folder, model = pathlib.Path(tempfile.mkdtemp()), Model()
    network, cluster, clients = None, None, None
    print(f"REPRODUCE: tests/checker.py --aviary {arguments.aviary} --seconds {arguments.seconds} --seed {arguments.seed}", flush=True)
    try:
        network = Network()
        try:
            if "distance" in faults:
                network.distance(True)
                network.distance(False)
        except RuntimeError as error:
            faults.remove("distance")
            print(f"skipped: distance: {error}")
        cluster = Cluster(arguments.aviary, network, folder, "clock" in faults)
        for name in NAMES:
            cluster.start(name)
        for name in NAMES:
            cluster.until_ready(name)
        rollout = {"apiVersion": "aviary/v1", "kind": "Rollout", "metadata": {"name": SERVICE}, "spec": {
            "stable": {"version": "v1", "answer": "node"}, "canary": {"version": "v2", "answer": "node"},
            "steps": [step for weight in (20, 50) for step in ({"setWeight": weight}, {"pause": {}})] + [{"setWeight": 100}, {"pause": {}}]}}
        for _ in range(50):
            status, _, said = cluster.ask("a", 50051, "POST", "/v1/rollouts", json.dumps(rollout), "first")
            if status == 200:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"no rollout: {said}")
        clients = Clients(cluster, model, arguments.seed)
        storm, end = Storm(cluster, network, model, arguments.seed, faults), time.monotonic() + arguments.seconds
        while time.monotonic() < end and not model.broken:
            storm.round()
        clients.end()
        clients = None
        print(f"faults: {storm.counts}; {len(model.writes)} writes, {len(model.reads)} linearizable reads, "
              f"{len(model.served)} answers, {len(model.failed)} without one")
        # Longer than a ballot takes: afterwards nothing is open that could still be decided.
        time.sleep(4)
        judge(cluster, model)
        for name in NAMES:
            if "panicked" in (folder / f"console-{name}").read_text():
                model.wrong("nothing fails", f"{name} panicked: " + (folder / f"console-{name}").read_text()[-1500:])
    finally:
        if clients:
            clients.end()
        for process in cluster.processes.values() if cluster else []:
            process.kill()
            process.wait()
        if network:
            network.end()
        if model.broken or sys.exc_info()[0]:
            print(f"consoles are kept in {folder}")
        else:
            shutil.rmtree(folder)
    for broken in model.broken[:20]:
        print(f"BROKEN {broken}")
    if model.broken:
        sys.exit(f"{len(model.broken)} times something didn't hold")
    print("everything held")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aviary", default="target/release/aviary")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--no-faults", default="", metavar="NAME,…")
    main(parser.parse_args())
