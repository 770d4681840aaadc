#!/usr/bin/env python3
"""The data plane under clients and servers that nobody here wrote; a line for each check.

    tests/clients.py [--aviary target/release/aviary] [--churn MINUTES] [--big MIB]

Uses curl, nghttp, h2load, h2spec, and Python's grpcio and websockets, as far as they are there; names what it skips.
With --churn it then makes and breaks connections for so long, and looks for what stays behind. Exit 1: a check failed.
"""
import argparse
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

failed = []


def check(name, good, found=""):
    print("%-7s %s%s" % ("ok" if good else "FAILED", name, "" if good else ": found %s" % str(found)[-400:]), flush=True)
    if not good:
        failed.append(name)


def skip(name, why):
    print("%-7s %s: %s" % ("skipped", name, why), flush=True)


class Upstream(BaseHTTPRequestHandler):
    """Python's own server: big answers, counted bodies, broken and late ones."""
    protocol_version = "HTTP/1.1"

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        url = urlparse(self.path)
        query = {k: int(v[0]) for k, v in parse_qs(url.query).items()}
        if url.path == "/big":
            left = query["bytes"]
            self.send_response(200)
            if query.get("open"):
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(left))
            self.end_headers()
            piece = bytes(1 << 20)
            while left:
                left -= self.wfile.write(piece[:min(left, len(piece))])
        elif url.path == "/die":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"part")
            self.close_connection = True
        else:
            # A server as slow as the client asks for.
            time.sleep(query.get("ms", 0) / 1000)
            self.answer(b"hello\n")

    do_HEAD = do_GET

    def do_POST(self):
        count = 0
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                while size:
                    size -= len(part := self.rfile.read(min(size, 1 << 20)))
                    count += len(part)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                part = self.rfile.read(min(left, 1 << 20))
                if not part:
                    self.close_connection = True
                    return
                left -= len(part)
                count += len(part)
        self.answer(b"%d\n" % count)

    do_PUT = do_POST

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *_):
        pass


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Proxy:
    def __init__(self, aviary, stable, canary=None):
        self.port = free_port()
        self.process = subprocess.Popen(
            [aviary, "proxy", "--listen", "127.0.0.1:%d" % self.port, "--stable", stable,
             "--canary", canary or stable, "--weight", "20", "--workers", "2"], stderr=subprocess.DEVNULL)
        self.url = "http://127.0.0.1:%d" % self.port
        for _ in range(100):
            try:
                return socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                # Pause between two tries.
                time.sleep(0.05)
        sys.exit("the proxy did not start")

    def rss_mib(self):
        status = open("/proc/%d/status" % self.process.pid).read()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.process.pid))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)


def run(*command, data=None, limit=120):
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
    return done.returncode, done.stdout.decode(errors="replace")


def raw(port, data, end=True):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(data)
        if end:
            s.shutdown(socket.SHUT_WR)
        found = b""
        while part := s.recv(65536):
            found += part
        return found


def curl(proxy, big_mib):
    if not shutil.which("curl"):
        return skip("curl", "not installed")
    for version in ("--http1.1", "--http1.0", "--http2-prior-knowledge", "--http2"):
        get = lambda *a, **k: run("curl", "-sS", "-m", "60", version, *a, **k)  # noqa: E731
        code, out = get("-i", proxy.url + "/predict")
        check("curl %s: GET" % version, code == 0 and " 200" in out and "x-served-by" in out and "hello" in out, out)
        code, out = get("-I", proxy.url + "/predict")
        check("curl %s: HEAD" % version, code == 0 and "content-length: 6" in out.lower(), out)
        code, out = get("--data-binary", "@-", proxy.url + "/predict", data=b"x" * 3_000_000)
        check("curl %s: 3 MB POST (asks to continue)" % version, (code, out) == (0, "3000000\n"), out)
        if version != "--http1.0":
            code, out = get("-T", "-", proxy.url + "/predict", data=b"y" * 2_000_000)
            check("curl %s: upload without a length" % version, (code, out) == (0, "2000000\n"), out)
        code, out = get("-o", os.devnull, proxy.url + "/die")
        check("curl %s: the upstream dies mid-body" % version, code in (18, 92, 56), (code, out))
        code, out = get(proxy.url + "/big?bytes=5000000&open=1", "-o", os.devnull, "-w", "%{size_download}")
        check("curl %s: an answer without a length" % version, (code, out) == (0, "5000000"), out)
    code, out = run("curl", "-sS", "-m", "60", *[proxy.url + "/predict"] * 5, "-w", "%{num_connects}\n")
    check("curl: five requests on one connection", out.split().count("1") == 1 and out.split().count("0") == 4, out)
    before = proxy.rss_mib()
    for version in ("--http1.1", "--http2-prior-knowledge"):
        size = big_mib << 20
        code, out = run("curl", "-sS", version, proxy.url + "/big?bytes=%d" % size, "-o", os.devnull, "-w",
                        "%{size_download}", limit=600)
        check("curl %s: %d MiB down" % (version, big_mib), (code, out) == (0, str(size)), out)
        sender = subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE)
        done = subprocess.run(["curl", "-sS", version, "-T", "-", proxy.url + "/predict"], stdin=sender.stdout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
        check("curl %s: %d MiB up" % (version, big_mib), done.stdout == b"%d\n" % size, done.stdout)
    grown = proxy.rss_mib() - before
    check("memory stays flat meanwhile (%+.1f MiB)" % grown, grown < 16, grown)


def sockets(proxy):
    out = raw(proxy.port, b"GET /predict?ms=200 HTTP/1.1\r\nHost: x\r\n\r\n")
    check("a client that closes its side is answered", b" 200 " in out and out.endswith(b"hello\n"), out)
    out = raw(proxy.port, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    check("a body that ends early is nobody's answer", b" 200 " not in out, out)
    slow = socket.create_connection(("127.0.0.1", proxy.port))
    slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 40\r\n\r\n")
    for _ in range(40):
        # A slow upload: 2 s for 40 bytes.
        time.sleep(0.05)
        slow.sendall(b"z")
    out = b""
    while part := slow.recv(1000):
        out += part
    check("a body that comes byte by byte", out.endswith(b"40\n"), out)
    out = raw(proxy.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    check("TLS on a plain port is refused", b" 400 " in out, out)


def http2(proxy):
    if shutil.which("nghttp"):
        code, out = run("nghttp", "-v", "--trailer", "x-sum: 7", "-d", "/etc/hostname", proxy.url + "/predict")
        check("nghttp: POST with trailers", ":status: 200" in out and "END_STREAM" in out, out)
    else:
        skip("nghttp", "not installed")
    if shutil.which("h2load"):
        for more in (["-m", "20"], ["--h1"]):
            code, out = run("h2load", "-n", "20000", "-c", "50", "-t", "1", *more, proxy.url + "/predict")
            good = "20000 succeeded, 0 failed, 0 errored, 0 timeout" in out and "20000 2xx" in out
            check("h2load %s: 20 000 requests" % " ".join(more), good, out)
    else:
        skip("h2load", "not installed")
    h2spec = shutil.which("h2spec")
    if h2spec:
        code, out = run(h2spec, "-h", "127.0.0.1", "-p", str(proxy.port), "-P", "/predict", "-o", "5", limit=600)
        total = re.search(r"(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed", out)
        # A port that speaks HTTP/1.1 too answers what is no preface as HTTP/1.1 has it, and then closes: h2spec wants silence.
        known = "\u00d7 2: Sends invalid connection preface" in out
        good = bool(total) and int(total[4]) == int(known)
        check("h2spec: %s%s" % (total[0] if total else "no result", ", the known one" if known else ""), good, out)
    else:
        skip("h2spec", "not installed")


def grpc_calls(aviary):
    try:
        import grpc
    except ImportError:
        return skip("gRPC", "Python's grpcio is not installed")

    def refuse(_, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
    handlers = grpc.method_handlers_generic_handler("t.T", {
        "One": grpc.unary_unary_rpc_method_handler(lambda m, c: m[::-1]),
        "Many": grpc.stream_stream_rpc_method_handler(lambda ms, c: (m * 2 for m in ms)),
        "No": grpc.unary_unary_rpc_method_handler(refuse)})
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    proxy = Proxy(aviary, "h2c://127.0.0.1:%d" % port)
    with grpc.insecure_channel("127.0.0.1:%d" % proxy.port) as channel:
        check("gRPC: a call", channel.unary_unary("/t.T/One")(b"abc", timeout=10) == b"cba")
        many = list(channel.stream_stream("/t.T/Many")(iter([b"%d" % i for i in range(500)]), timeout=30))
        check("gRPC: a stream both ways", many == [b"%d" % i * 2 for i in range(500)], len(many))
        big = bytes(3 << 20)
        check("gRPC: 3 MiB there and back", channel.unary_unary("/t.T/One")(big, timeout=30) == big)
        try:
            channel.unary_unary("/t.T/No")(b"", timeout=10)
            check("gRPC: a status", False)
        except grpc.RpcError as e:
            check("gRPC: a status", (e.code().name, e.details()) == ("FAILED_PRECONDITION", "not today"), e)
        server.stop(0).wait()
        try:
            channel.unary_unary("/t.T/One")(b"abc", timeout=10)
            check("gRPC: a dead server", False)
        except grpc.RpcError as e:
            check("gRPC: a dead server is UNAVAILABLE", e.code().name == "UNAVAILABLE", e)
    proxy.stop()


def websocket(aviary):
    try:
        from websockets.sync.client import connect
        from websockets.sync.server import serve
    except ImportError:
        return skip("WebSocket", "Python's websockets is not installed")

    def echo(ws):
        for message in ws:
            ws.send(message)
    server = serve(echo, "127.0.0.1", 0, max_size=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = Proxy(aviary, "http://127.0.0.1:%d" % server.socket.getsockname()[1])
    with connect("ws://127.0.0.1:%d/predict" % proxy.port, max_size=None) as ws:
        for message in ("hello", "x" * 1_000_000, b"\0" * 70_000):
            ws.send(message)
            check("WebSocket: %d units there and back" % len(message), ws.recv(10) == message)
    server.shutdown()
    proxy.stop()


def churn(proxy, minutes):
    """Connections made and broken in every way; afterwards nothing may be left of them."""
    stop = threading.Event()
    made = [0]
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"

    def one(dice):
        s = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        made[0] += 1
        with s:
            kind = dice.randrange(8)
            if kind == 0:
                s.sendall(request[:dice.randrange(len(request))])
            elif kind == 1:
                s.sendall(request + b"x" * dice.randrange(100))
            elif kind == 2:
                s.sendall(request + b"x" * 100)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind == 3:
                s.sendall(b"GET /big?bytes=1000000 HTTP/1.1\r\nHost: x\r\n\r\n")
                s.recv(dice.randrange(1, 100_000))
            elif kind == 4:
                s.sendall(bytes(dice.randrange(256) for _ in range(dice.randrange(1, 300))))
                s.recv(1000)
            elif kind == 5:
                s.sendall(b"GET /die HTTP/1.1\r\nHost: x\r\n\r\n")
                s.recv(1000)
            elif kind == 6:
                s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(dice.randrange(256) for _ in range(dice.randrange(40))))
            else:
                for _ in range(dice.randrange(1, 20)):
                    s.sendall(b"GET /predict HTTP/1.1\r\nHost: x\r\n\r\n")
                    s.recv(1000)

    def loop(seed):
        dice = random.Random(seed)
        while not stop.is_set():
            try:
                one(dice)
            except OSError:
                pass
            # The rate: with 8 threads at most 400 connections a second.
            time.sleep(0.02)
    threads = [threading.Thread(target=loop, args=(i,), daemon=True) for i in range(8)]
    [t.start() for t in threads]
    # Buffers and pools fill up first: growth is measured from here.
    time.sleep(min(30, minutes * 15))
    first, end, peak = proxy.rss_mib(), time.time() + minutes * 60, 0
    while time.time() < end:
        # Time between two measurements.
        time.sleep(min(60, minutes * 20))
        peak = max(peak, proxy.rss_mib())
        print("        %d connections, %.1f MiB, %d descriptors" % (made[0], proxy.rss_mib(), proxy.descriptors()), flush=True)
    stop.set()
    [t.join(10) for t in threads]
    # Half-open ones end after the header time-out, kept ones after theirs.
    time.sleep(12)
    grown, left = proxy.rss_mib() - first, proxy.descriptors()
    check("%d connections of churn leave nothing: %+.1f MiB, %d descriptors" % (made[0], grown, left),
          grown < 8 and left < 40, (grown, left))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aviary", default="target/release/aviary")
    parser.add_argument("--big", type=int, default=1024, metavar="MIB")
    parser.add_argument("--churn", type=float, default=0, metavar="MINUTES")
    arguments = parser.parse_args()
    server = Server(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = Proxy(arguments.aviary, "http://127.0.0.1:%d" % server.server_address[1])
    curl(proxy, arguments.big)
    sockets(proxy)
    http2(proxy)
    grpc_calls(arguments.aviary)
    websocket(arguments.aviary)
    if arguments.churn:
        churn(proxy, arguments.churn)
    check("the proxy ends when it is told to", proxy.stop() == 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
