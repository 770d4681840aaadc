#!/usr/bin/env python3
"""Floods against each port of a node, one after the other; a line for each.

    tests/floods.py [--aviary target/release/aviary] [--seconds 5] [--only NAME]

Three nodes and this program's probes run on one core, a flooder at a time on another. Probes are what well-behaved users and
operators send: each must be answered with 200 within 200 ms, or within twice the slowest of those without a flood where the
machine is slower, and the node's memory may grow by 32 MiB. A flood that fails is tried twice more, because other work on the machine
makes probes late, too. Exit 1: a flood failed three times.
"""
import argparse
import asyncio
import json
import os
import pathlib
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

LIMIT_MS = 200
MEMORY_MIB = 32
CONNECTIONS_MAX, REQUESTS_MAX = 2000, 1000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 1, 3, 4, 6, 9


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def head(path):
    """An HTTP/2 request's fields: GET, http, the path, and the authority x."""
    path = path.encode()
    return b"\x82\x86\x04" + bytes([len(path)]) + path + b"\x01\x01x"


def opening(window=None):
    return PREFACE + frame(SETTINGS, 0, 0, b"" if window is None else struct.pack(">HI", 4, window))


async def swallow(reader):
    try:
        while await reader.read(65536):
            pass
    except OSError:
        # The server ended the connection.
        pass


class Flood:
    """What connections of a kind do, and how many there are at once."""

    def __init__(self, port, path, token):
        self.port, self.path, self.token = port, path, token
        self.count = 0

    async def window_zero(self, reader, writer):
        # A server takes what was promised, and the client takes nothing of it.
        streams = b"".join(frame(HEADERS, 5, 1 + 2 * i, head(self.path)) for i in range(200))
        writer.write(opening(0) + streams)
        self.count += 200
        await swallow(reader)

    async def idle(self, reader, writer):
        writer.write(f"GET {self.path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        self.count += 1
        await swallow(reader)

    async def half_head(self, reader, writer):
        writer.write(f"POST {self.path} HTTP/1.1\r\nhost: x\r\nx-slow: ".encode())
        self.count += 1
        await swallow(reader)

    async def half_body(self, reader, writer):
        writer.write(f"POST {self.path} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf".encode())
        self.count += 1
        await swallow(reader)

    async def silent(self, reader, _):
        self.count += 1
        await swallow(reader)

    async def half_hello(self, reader, writer):
        writer.write(b"AVRY\x00\x02\x00\x00\x00\x00\x31")
        self.count += 1
        await swallow(reader)

    async def repeated(self, reader, writer, pieces, each):
        writer.write(opening())
        swallowing = asyncio.ensure_future(swallow(reader))
        while not swallowing.done():
            writer.write(next(pieces))
            self.count += each
            await writer.drain()
            # The other connections' turn.
            await asyncio.sleep(0)

    async def rapid_reset(self, reader, writer):
        def pieces():
            first = 1
            while True:
                ids = range(first, first + 200, 2)
                yield b"".join(frame(HEADERS, 5, i, head(self.path)) + frame(RST_STREAM, 0, i, b"\0\0\0\x08") for i in ids)
                first += 200
        await self.repeated(reader, writer, pieces(), 100)

    async def continuation(self, reader, writer):
        def pieces():
            yield frame(HEADERS, 1, 1, head(self.path))
            while True:
                # A field of 16 KB, without an end.
                yield frame(CONTINUATION, 0, 1, b"\x00\x01x\x7f\xd1\x7e" + bytes(16336))
        await self.repeated(reader, writer, pieces(), 1)

    async def settings(self, reader, writer):
        batch = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 500
        await self.repeated(reader, writer, iter(lambda: batch, None), 500)

    async def ping(self, reader, writer):
        batch = frame(PING, 0, 0, b"12345678") * 500
        await self.repeated(reader, writer, iter(lambda: batch, None), 500)

    async def deaf_ping(self, _, writer):
        # What the server answers is never read.
        writer.write(opening())
        batch = frame(PING, 0, 0, b"12345678") * 500
        while True:
            writer.write(batch)
            self.count += 500
            await writer.drain()
            await asyncio.sleep(0)

    async def request(self, reader, writer):
        asked = f"GET {self.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.token}\r\n\r\n".encode()
        while True:
            writer.write(asked)
            if not await read_answer(reader):
                return
            self.count += 1

    async def stream(self, reader, writer):
        writer.write(f"GET {self.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.token}\r\n\r\n".encode())
        self.count += 1
        await swallow(reader)

    async def again_and_again(self, behaviour):
        while True:
            writer = None
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
                await behaviour(reader, writer)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                pass
            finally:
                if writer:
                    writer.transport.abort()
            # So that a refused connection doesn't keep the flooder's core for itself.
            await asyncio.sleep(0.01)


# Name → (behaviour, connections at once, path by port).
READ = "?consistency=linearizable"
FLOODS = {
    "window-zero": (Flood.window_zero, 60, {"data": "/predict", "api": "/livez"}),
    "idle": (Flood.idle, 2500, {"data": "/predict", "api": "/livez"}),
    "half-heads": (Flood.half_head, 2500, {"data": "/predict", "api": "/v1/cluster"}),
    "half-bodies": (Flood.half_body, 1500, {"data": "/predict", "api": "/v1/rollouts/svc/pause"}),
    "rapid-reset": (Flood.rapid_reset, 20, {"data": "/predict", "api": "/livez"}),
    "continuation": (Flood.continuation, 20, {"data": "/predict", "api": "/livez"}),
    "settings": (Flood.settings, 20, {"data": "/predict", "api": "/livez"}),
    "ping": (Flood.ping, 20, {"data": "/predict", "api": "/livez"}),
    "deaf-ping": (Flood.deaf_ping, 50, {"data": "/predict", "api": "/livez"}),
    "linearizable-reads": (Flood.request, 600, {"data": "/routing/state" + READ, "api": "/routing/state" + READ}),
    "event-streams": (Flood.stream, 900, {"api": "/v1/events"}),
    "silent": (Flood.silent, 2500, {"data": "", "api": "", "control": ""}),
    "half-hellos": (Flood.half_hello, 600, {"control": ""}),
}


async def read_answer(reader):
    """Returns the status of an answer that was read whole; none at the connection's end."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
    await reader.readexactly(length)
    return int(head.split(b" ")[1])


async def flood(arguments):
    behaviour, connections, paths = FLOODS[arguments.flood]
    flooder = Flood(arguments.port, paths[arguments.on], arguments.token)
    tasks = [asyncio.ensure_future(flooder.again_and_again(lambda r, w: behaviour(flooder, r, w))) for _ in range(connections)]
    await asyncio.sleep(arguments.seconds)
    print(flooder.count, flush=True)
    for task in tasks:
        task.cancel()
    os._exit(0)


class Probes:
    """Requests of users and operators, each on a connection of its own, and how long they took."""

    def __init__(self, ports, token):
        self.ports, self.token, self.times, self.bad = ports, token, {}, []

    async def ask(self, kind, port, method, path):
        began = time.monotonic()
        try:
            status = await asyncio.wait_for(self.answered(port, method, path), 5)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            status = repr(error)
        took = 1000 * (time.monotonic() - began)
        self.times.setdefault(kind, []).append(took)
        if status != 200:
            self.bad.append(f"{kind}: {status} after {took:.0f} ms")

    async def answered(self, port, method, path):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[port])
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\ncontent-type: "
                         f"application/json\r\nauthorization: Bearer {self.token}\r\n\r\n{{}}".encode())
            return await read_answer(reader)
        finally:
            writer.transport.abort()

    async def run(self, seconds):
        end, turn, asked = time.monotonic() + seconds, 0, []
        while time.monotonic() < end:
            kinds = [("user", "data", "POST", "/predict")]
            if turn % 4 == 0:
                kinds.append(("read", "api", "GET", "/v1/cluster"))
            if turn % 8 == 0:
                kinds.append(("write", "api", "POST", "/v1/rollouts/svc/" + ("pause" if turn % 16 else "resume")))
            asked += [asyncio.ensure_future(self.ask(*kind)) for kind in kinds]
            turn += 1
            # The rate of the probes.
            await asyncio.sleep(0.05)
        await asyncio.gather(*asked)

    def slowest(self):
        return {kind: max(times) for kind, times in self.times.items()}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """Three nodes and a server, on one core."""

    def __init__(self, aviary, core):
        self.aviary, self.core, self.processes = aviary, core, []
        self.dir = pathlib.Path(tempfile.mkdtemp())
        said = dict(line.split(": ", 1) for line in self.run("token", "--role", "admin", "--name", "probe").splitlines() if ": " in line)
        self.token = said["token"].strip()
        tokens = self.dir / "tokens"
        tokens.write_text(said["line"].strip() + "\n")
        tokens.chmod(0o600)
        self.ports = {name: {port: free_port() for port in ("data", "api", "control")} for name in "abc"}
        for name, ports in self.ports.items():
            lines = [f'[node]\nid = "{name}"\ndata_dir = "{self.dir}/data-{name}"\n[listen]']
            lines += [f'{port} = "127.0.0.1:{number}"' for port, number in ports.items()]
            lines += [f'[api]\ntokens_file = "{tokens}"',
                      f"[data]\nworkers = 1\nconnections_max = {CONNECTIONS_MAX}\nrequests_max = {REQUESTS_MAX}"]
            lines += [f'[peers.{peer}]\ncontrol = "127.0.0.1:{theirs["control"]}"\napi = "127.0.0.1:{theirs["api"]}"'
                      for peer, theirs in self.ports.items() if peer != name]
            (self.dir / f"{name}.toml").write_text("\n".join(lines) + "\n")
        configs = [argument for name in "abc" for argument in ("--config", f"{self.dir}/{name}.toml")]
        self.run("cluster", "init", *configs)
        self.server = free_port()
        self.spawn("upstream", "--listen", f"127.0.0.1:{self.server}", "--version", "v1")
        self.pids = {name: self.spawn("node", "--config", f"{self.dir}/{name}.toml") for name in "abc"}

    def run(self, *arguments):
        return subprocess.run([self.aviary, *arguments], check=True, capture_output=True, text=True).stdout

    def spawn(self, *arguments):
        console = open(self.dir / "console", "a")
        pin = lambda: os.sched_setaffinity(0, {self.core})
        process = subprocess.Popen([self.aviary, *arguments], stdout=console, stderr=console, preexec_fn=pin)
        self.processes.append(process)
        return process.pid

    def resident_mib(self):
        text = pathlib.Path(f"/proc/{self.pids['a']}/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024

    def ask(self, method, path, body, kind="application/json"):
        import urllib.request
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports['a']['api']}{path}", body.encode(), method=method)
        request.add_header("content-type", kind)
        request.add_header("authorization", f"Bearer {self.token}")
        return urllib.request.urlopen(request, timeout=5).read()

    def ready(self):
        url = f"http://127.0.0.1:{self.server}"
        rollout = {"apiVersion": "aviary/v1", "kind": "Rollout", "metadata": {"name": "svc"}, "spec": {
            "stable": {"version": "v1", "url": url}, "canary": {"version": "v2", "url": url},
            "steps": [{"setWeight": 20}, {"pause": {}}, {"setWeight": 100}, {"pause": {}}]}}
        for _ in range(200):
            try:
                return self.ask("POST", "/v1/rollouts", json.dumps(rollout), "application/yaml")
            except OSError:
                # Until the nodes have found each other.
                time.sleep(0.1)
        sys.exit("the nodes took no rollout: " + (self.dir / "console").read_text()[-2000:])

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.dir)


async def measured(cluster, seconds, token, flooder=None):
    """Runs probes, and a flooder beside them; returns the probes, the memory's growth in MiB, and what the flooder sent."""
    probes, before, most = Probes(cluster.ports["a"], token), cluster.resident_mib(), 0.0
    process = None
    if flooder:
        process = await asyncio.create_subprocess_exec(*flooder, stdout=subprocess.PIPE)
        # Until it is at its work.
        await asyncio.sleep(0.5)
    running = asyncio.ensure_future(probes.run(seconds))
    while not running.done():
        most = max(most, cluster.resident_mib() - before)
        await asyncio.sleep(0.1)
    sent = 0
    if process:
        out, _ = await process.communicate()
        sent = int(out or 0)
    return probes, most, sent


async def main(arguments):
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = cores[-1], cores[0]
    os.sched_setaffinity(0, {ours})
    cluster = Cluster(arguments.aviary, ours)
    failed = []
    try:
        cluster.ready()
        await measured(cluster, 1, cluster.token)
        calm, _, _ = await measured(cluster, arguments.seconds, cluster.token)
        usual = calm.slowest()
        limits = {kind: max(LIMIT_MS, 2 * slowest) for kind, slowest in usual.items()}
        said = ", ".join(f"{kind} {ms:.0f}" for kind, ms in usual.items())
        print(f"without a flood, slowest in ms: {said}", flush=True)
        if calm.bad:
            sys.exit(f"probes fail without a flood: {calm.bad[:3]}")
        for name, (_, _, paths) in FLOODS.items():
            for on in paths:
                if arguments.only not in (None, name, f"{name}@{on}"):
                    continue
                flooder = [sys.executable, __file__, "--flood", name, "--on", on, "--port", str(cluster.ports["a"][on]),
                           "--seconds", str(arguments.seconds + 1), "--core", str(theirs), "--token", cluster.token]
                for attempt in range(3):
                    probes, grown, sent = await measured(cluster, arguments.seconds, cluster.token, flooder)
                    slowest = probes.slowest()
                    late = [kind for kind, ms in slowest.items() if ms > limits[kind]]
                    good = not late and not probes.bad and grown <= MEMORY_MIB and sent > 0
                    said = ", ".join(f"{kind} {ms:.0f}" for kind, ms in slowest.items())
                    word = "ok" if good else "FAILED" if attempt == 2 else "again"
                    print(f"{word:7} {name} on {on}: {sent} sent, memory {grown:+.1f} MiB, slowest in ms: {said}", flush=True)
                    if probes.bad:
                        print(f"        {len(probes.bad)} bad of {sum(map(len, probes.times.values()))}: {probes.bad[:3]}")
                    # What the flood left ends: the next one is another.
                    await asyncio.sleep(1)
                    if good:
                        break
                else:
                    failed.append(f"{name} on {on}")
        if "panicked" in (cluster.dir / "console").read_text():
            failed.append("a node panicked: " + (cluster.dir / "console").read_text()[-2000:])
    finally:
        cluster.stop()
    if failed:
        sys.exit("failed: " + "; ".join(failed))
    print("all floods were survived")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aviary", default="target/release/aviary")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--only", metavar="NAME[@PORT]")
    for hidden in ("--flood", "--on", "--token"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.flood:
        os.sched_setaffinity(0, {arguments.core})
        asyncio.run(flood(arguments))
    else:
        asyncio.run(main(arguments))
