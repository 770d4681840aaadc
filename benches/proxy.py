#!/usr/bin/env python3
"""`aviary proxy` beside nginx and HAProxy: the same load, in turns, in one run.

    cargo build --release && benches/proxy.py [--rounds 3] [--seconds 3] [--share 1000000]

One worker on core 0; wrk and the upstreams (nginx, two ports) on core 1; 200-byte POSTs, 95 % to one port, 5 % to the
other. Prints requests per second, CPU time per request and the median latency, and ratios to HAProxy of the same round.
Then, with --share, how many of that many requests the canary got at 5 % and at 0.01 %. Needs wrk, nginx and haproxy.
"""
import argparse
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STABLE, CANARY = 19081, 19082
TMP = pathlib.Path(tempfile.mkdtemp(prefix="aviary-bench-"))
started = []

NGINX = """daemon off; worker_processes 1; pid %(tmp)s/%(name)s.pid; error_log %(tmp)s/%(name)s.log crit;
events { worker_connections 8192; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path %(tmp)s; proxy_temp_path %(tmp)s;
  fastcgi_temp_path %(tmp)s; uwsgi_temp_path %(tmp)s; scgi_temp_path %(tmp)s; default_type application/json;
  %(http)s }
"""
UPSTREAM = """server { listen 127.0.0.1:%d reuseport backlog=4096; location / { return 200 '{"model":"v1","score":0.97}'; } }
  server { listen 127.0.0.1:%d reuseport backlog=4096; location / { return 200 '{"model":"v2","score":0.97}'; } }""" % (STABLE, CANARY)
SPLIT = """split_clients "$request_id" $version { 5%%%% canary; * stable; }
  upstream stable { server 127.0.0.1:%d; keepalive 1024; keepalive_requests 100000000; }
  upstream canary { server 127.0.0.1:%d; keepalive 1024; keepalive_requests 100000000; }
  server { listen 127.0.0.1:%%(port)d backlog=4096; location / { proxy_pass http://$version; proxy_http_version 1.1;
    proxy_set_header Connection ""; proxy_set_header X-Forwarded-For $remote_addr; } }""" % (STABLE, CANARY)
HAPROXY = """global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  http-reuse always
frontend predict
  bind 127.0.0.1:%%(port)d backlog 4096
  default_backend versions
backend versions
  balance roundrobin
  server stable 127.0.0.1:%d weight 95
  server canary 127.0.0.1:%d weight 5
""" % (STABLE, CANARY)
LUA = """wrk.method = "POST"
wrk.body = string.rep("x", 200)
wrk.headers["Content-Type"] = "application/json"
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args) canary = 0 end
function response(status, headers, body) if headers["x-served-by"] == "canary" then canary = canary + 1 end end
function done(s, latency, requests)
  local e, sum = s.errors, 0
  for _, t in ipairs(threads) do sum = sum + t:get("canary") end
  print(string.format("RESULT %d %f %f %d %d", s.requests, s.duration / 1e6, latency:percentile(50),
    e.connect + e.read + e.write + e.status + e.timeout, sum))
end
"""


def start(core, *command):
    process = subprocess.Popen(["taskset", "-c", core, *map(str, command)], stderr=subprocess.DEVNULL)
    started.append(process)
    return process


def wait(port):
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            # Pause between two tries.
            time.sleep(0.05)
    sys.exit("nothing listens on port %d" % port)


def tree(pid):
    children = pathlib.Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split()
    return [pid] + [p for c in children for p in tree(int(c))]


def cpu(pids):
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def rss(pids):
    return sum(int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/%d/status" % p).read_text())[1]) for p in pids) / 1024


def wrk(port, connections, seconds):
    command = ["taskset", "-c", "1", "wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, "-s", TMP / "post.lua",
               "http://127.0.0.1:%d/predict" % port]
    out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
    count, took, p50, errors, canary = re.search(r"RESULT (\d+) (\S+) (\S+) (\d+) (\d+)", out).groups()
    return int(count), float(took), float(p50), int(errors), int(canary)


def aviary(port, weight, program):
    return [program, "proxy", "--listen", "127.0.0.1:%d" % port, "--stable", "http://127.0.0.1:%d" % STABLE,
            "--canary", "http://127.0.0.1:%d" % CANARY, "--weight", weight, "--workers", 1]


def nginx(name, http):
    conf = TMP / (name + ".conf")
    conf.write_text(NGINX % dict(tmp=TMP, name=name, http=http))
    return ["nginx", "-c", conf, "-e", TMP / "error.log"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--share", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--aviary", default=ROOT / "target/release/aviary")
    a = parser.parse_args()
    missing = [p for p in ("wrk", "nginx", "haproxy", "taskset") if not shutil.which(p)]
    if missing:
        sys.exit("benches/proxy.py: not installed: " + ", ".join(missing))
    (TMP / "post.lua").write_text(LUA)
    start("1", *nginx("upstream", UPSTREAM))
    (TMP / "haproxy.cfg").write_text(HAPROXY % dict(port=19102))
    contenders = {"haproxy": (19102, ["haproxy", "-q", "-db", "-f", TMP / "haproxy.cfg"]),
                  "nginx": (19103, nginx("split", SPLIT % dict(port=19103))),
                  "aviary": (19101, aviary(19101, 5, a.aviary))}
    processes = {name: start("0", *command) for name, (port, command) in contenders.items()}
    for port in [STABLE, CANARY] + [port for port, _ in contenders.values()]:
        wait(port)
    bad = 0
    for connections in (64, 512, 1):
        print("\n%d connections\n%-8s %9s %9s %9s %9s %9s %9s" %
              (connections, "", "req/s", "x haproxy", "CPU us", "x haproxy", "p50 us", "RSS MiB"))
        found = {name: [] for name in contenders}
        for _ in range(a.rounds):
            for name, (port, _) in contenders.items():
                wrk(port, connections, 1)
                pids = tree(processes[name].pid)
                before = cpu(pids)
                count, took, p50, errors, _ = wrk(port, connections, a.seconds)
                found[name].append((count / took, (cpu(pids) - before) / count * 1e6, p50, rss(pids)))
                bad += errors
        for name, rounds in sorted(found.items()):
            rate, cost, p50, memory = map(statistics.median, zip(*rounds))
            ratio = lambda i: statistics.median(r[i] / h[i] for r, h in zip(rounds, found["haproxy"]))  # noqa: E731
            print("%-8s %9.0f %9.2f %9.2f %9.2f %9.0f %9.1f" % (name, rate, ratio(0), cost, ratio(1), p50, memory))
    print("\nanswers that were none or not 2xx: %d" % bad)
    for number, weight in enumerate(("5", "0.01") if a.share else ()):
        port = 19110 + number
        start("0", *aviary(port, weight, a.aviary))
        wait(port)
        total = canary = 0
        while total < a.share:
            count, _, _, _, got = wrk(port, 64, 2)
            total, canary = total + count, canary + got
        share = float(weight) / 100
        deviations = (canary - total * share) / (total * share * (1 - share)) ** 0.5
        print("at %s %%: %d of %d requests went to the canary, %+.2f standard deviations off" %
              (weight, canary, total, deviations))
        bad += abs(deviations) > 3
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        code = main()
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        [process.wait() for process in started]
        shutil.rmtree(TMP)
    sys.exit(code)
