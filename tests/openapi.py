#!/usr/bin/env python3
"""The HTTP API as programs see it that are made from its OpenAPI document; a line for each check.

    PYTHONPATH=$(scripts/tools.sh openapi) tests/openapi.py [--aviary target/release/aviary] [--seconds 60] [--seed N]

Three real nodes. A Python client that openapi-python-client generates from the document of one of them drives a rollout through all
its steps. Then Schemathesis looks for answers that the document doesn't describe, for so many seconds. Exit 1: a check failed.
"""
import argparse
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

NODES = "abc"
ROLLOUT = {
    "apiVersion": "aviary/v1",
    "kind": "Rollout",
    "metadata": {"name": "svc", "labels": {"team": "fraud"}},
    "spec": {
        "stable": {"version": "v1", "answer": "node"},
        "canary": {"version": "v2", "answer": "node"},
        "steps": [{"setWeight": 20}, {"pause": {}}, {"setWeight": 50}, {"pause": {}}, {"setWeight": 100}],
        "bake": {"duration": "10m"},
    },
}
# Schemathesis: names that there are, so that it sees more than refusals. A rollout file is more than its shape: one of the right
# shape may be refused; `full` and `skip_wait` exclude each other. 422 is the answer to a key of another request, and to telemetry of which nothing counts.
SETTINGS = """
[parameters]
"path.name" = "svc"
"query.service" = "svc"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "422"]

[[operations]]
include-name = "POST /v1/rollouts"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409", "422"]

[[operations]]
include-name = "POST /v1/rollouts/{name}/promote"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409", "422"]
"""
failed = []


def check(name, good, found=""):
    print("%-7s %s%s" % ("ok" if good else "FAILED", name, "" if good else ": found %s" % str(found)[-2000:]), flush=True)
    if not good:
        failed.append(name)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what, seconds, attempt):
    """Tries until it works; returns what came of it."""
    end = time.monotonic() + seconds
    while True:
        try:
            found = attempt()
            if found:
                return found
        except OSError:
            pass
        if time.monotonic() > end:
            raise SystemExit("%s: not within %d s" % (what, seconds))
        time.sleep(0.05)


class Cluster:
    """Three nodes in a folder of their own, with a token for each role."""

    def __init__(self, aviary, folder):
        self.aviary, self.folder, self.processes = aviary, folder, []
        self.ports = {node: {kind: free_port() for kind in ("data", "api", "control")} for node in NODES}
        self.tokens = {}
        with open(os.path.join(folder, "tokens"), "w") as tokens:
            for role in ("viewer", "operator", "admin"):
                command = [aviary, "token", "--role", role, "--name", role]
                made = subprocess.run(command, capture_output=True, text=True, check=True)
                told = dict(line.split(":", 1) for line in made.stdout.splitlines())
                self.tokens[role] = told["token"].strip()
                tokens.write(told["line"].strip() + "\n")
        os.chmod(os.path.join(folder, "tokens"), 0o600)
        arguments = [argument for node in NODES for argument in ("--config", self.config(node))]
        subprocess.run([aviary, "cluster", "init", *arguments], check=True, capture_output=True)
        for node in NODES:
            console = open(os.path.join(folder, node + ".console"), "w")
            command = [aviary, "node", "--config", os.path.join(folder, node + ".toml")]
            self.processes.append(subprocess.Popen(command, stdout=console, stderr=console))
        for node in NODES:
            until("node " + node, 60, lambda: urllib.request.urlopen(self.url(node) + "/readyz").status == 200)

    def config(self, node):
        path, ports = os.path.join(self.folder, node + ".toml"), self.ports[node]
        lines = ["[node]", 'id = "%s"' % node, 'data_dir = "%s/data-%s"' % (self.folder, node), "[listen]"]
        lines += ['%s = "127.0.0.1:%d"' % kind for kind in ports.items()]
        lines += ["[log]", 'file = "%s/%s.log"' % (self.folder, node), "[api]", 'tokens_file = "%s/tokens"' % self.folder]
        for peer in NODES.replace(node, ""):
            lines += ["[peers.%s]" % peer]
            lines += ['%s = "127.0.0.1:%d"' % (kind, self.ports[peer][kind]) for kind in ("control", "api")]
        with open(path, "w") as file:
            file.write("\n".join(lines) + "\n")
        return path

    def url(self, node):
        return "http://127.0.0.1:%d" % self.ports[node]["api"]

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=30)


def generate(cluster):
    """Generates a client from a node's document and imports it."""
    config = os.path.join(cluster.folder, "generator.yaml")
    with open(config, "w") as file:
        # The generated code is run, not read.
        file.write("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", cluster.url("a") + "/v1/openapi.json"]
    command += ["--meta", "none", "--config", config, "--output-path", os.path.join(cluster.folder, "generated_client")]
    made = subprocess.run(command, capture_output=True, text=True)
    check("a generator makes a client of the document", made.returncode == 0, made.stdout + made.stderr)
    # It knows neither YAML nor lines of JSON, which these two take beside JSON: that is all it may leave out.
    known = ["WARNING parsing POST %s within default." % path for path in ("/v1/rollouts", "/v1/telemetry")]
    left_out = [line.strip() for line in (made.stdout + made.stderr).splitlines() if line.startswith(("WARNING", "ERROR", "Unable"))]
    check("the generator knows the shapes of the document", sorted(left_out) == known, made.stdout + made.stderr)
    sys.path.insert(0, cluster.folder)
    return importlib.import_module("generated_client")


class Caller:
    """Calls the generated client's operations, by their names."""

    def __init__(self, client):
        self.client = client

    def __call__(self, operation, *arguments, **named):
        module = importlib.import_module("generated_client.api.default." + operation)
        return module.sync_detailed(*arguments, client=self.client, **named)


class Events(threading.Thread):
    """Follows the events of a node, as the generated models."""

    def __init__(self, client):
        super().__init__(daemon=True)
        self.client, self.seen, self.ids, self.open = client, [], [], threading.Event()
        self.start()

    def run(self):
        models = importlib.import_module("generated_client.models")
        http = self.client.get_httpx_client()
        with http.stream("GET", "/v1/events", timeout=60) as answer:
            self.open.set()
            for line in answer.iter_lines():
                if line.startswith("id:"):
                    self.ids.append(int(line[3:]))
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    name = "".join(word.capitalize() for word in event["event"].split("_")) + "Announcement"
                    self.seen.append(getattr(models, name).from_dict(event))


def rollout(cluster):
    """A whole rollout by the generated client: apply, wait, promote, pause, abort, history, errors and events."""
    package = generate(cluster)
    models = importlib.import_module("generated_client.models")
    call = Caller(package.AuthenticatedClient(base_url=cluster.url("b"), token=cluster.tokens["operator"]))
    events = Events(package.AuthenticatedClient(base_url=cluster.url("c"), token=cluster.tokens["viewer"], timeout=60))
    events.open.wait(10)
    body, everywhere = models.RolloutFile.from_dict(ROLLOUT), models.WriteConsistency.EVERYWHERE
    applied = call("apply_rollout", body=body, idempotency_key="begin", consistency=everywhere)
    check("apply is committed", applied.parsed.status == models.ChangeStatus.COMMITTED, applied.content)
    check("all nodes route with it", applied.parsed.reach.served_by == ["a", "b", "c"], applied.content)
    again = call("apply_rollout", body=body, idempotency_key="begin").parsed
    check("the same key gives the same answer", (again.repeated, again.slot) == (True, applied.parsed.slot), again)

    def weight(node, share):
        client = package.Client(base_url=cluster.url(node), headers={"authorization": "Bearer " + cluster.tokens["viewer"]})
        state = Caller(client)("get_routing_state", service="svc").parsed
        return state.weights.additional_properties.get("v2") == share and state

    for node in NODES:
        check("node %s routes 20 %%" % node, weight(node, 0.2), node)
    listed = call("list_rollouts", selector="team=fraud", limit=1).parsed
    check("the rollout is listed by its label", [rollout.name for rollout in listed.rollouts] == ["svc"], listed)
    until("enough time at the first step", 30, lambda: call("get_rollout", "svc").parsed.phase == models.Phase.PROGRESSING)
    paused = call("pause_rollout", "svc", body=models.ChangeDetails(reason="a look")).parsed
    check("pause is committed", paused.status == models.ChangeStatus.COMMITTED, paused)
    resumed = call("resume_rollout", "svc", body=models.ChangeDetails()).parsed
    check("resume is committed", resumed.status == models.ChangeStatus.COMMITTED, resumed)
    promoted = call("promote_rollout", "svc", body=models.ChangeDetails(full=True), consistency=everywhere)
    good = promoted.parsed.status == models.ChangeStatus.COMMITTED and weight("c", 1.0)
    check("a full promotion leads to 100 %", good, promoted.content)
    aborted = call("abort_rollout", "svc", body=models.ChangeDetails(reason="odd scores"), consistency=everywhere)
    check("abort leads back to stable", aborted.parsed.state.weights.additional_properties == {"v1": 1.0}, aborted.content)
    history = call("get_history", "svc").parsed.history
    kinds = [entry.kind for entry in history]
    check("the history has it all", kinds == ["Start", "Pause", "Resume", "Promote", "Rollback"], kinds)
    check("each record has its actor", {entry.actor for entry in history} == {"operator"}, history)
    refused = call("resume_rollout", "svc", body=models.ChangeDetails())
    good = isinstance(refused.parsed, models.Problem) and refused.parsed.code == models.Code.REFUSED
    check("a refusal is a problem with its code", good and refused.status_code == 409, refused.content)
    unknown = call("get_rollout", "none")
    check("an unknown rollout is a problem", unknown.parsed.code == models.Code.NOT_FOUND, unknown.content)
    until("the events", 10, lambda: aborted.parsed.sequence in events.ids)
    told = [event for event in events.seen if isinstance(event, models.RoutingAnnouncement)]
    told = [event.kind.value for event in told if event.state.status == models.Status.COMMITTED]
    check("the events tell the same", told == kinds, told)


def schemathesis(cluster, name, role, arguments, seconds, seed, settings=""):
    """Runs Schemathesis against one node; its report is printed when it finds something."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", cluster.url("a") + "/v1/openapi.json", "--checks", "all"]
    command += ["--header", "Authorization: Bearer " + cluster.tokens[role], "--max-time", str(seconds), "--seed", str(seed)]
    # A request under load may take a while, and an answer that takes longer than the node's own limits is a fault.
    command += ["--request-timeout", "12", "--continue-on-failure", "--warnings", "off", *arguments]
    with open(os.path.join(cluster.folder, "schemathesis.toml"), "w") as file:
        file.write(settings)
    run = subprocess.run(command, capture_output=True, text=True, cwd=cluster.folder, timeout=seconds * 3 + 120)
    check("Schemathesis finds nothing %s (seed %d)" % (name, seed), run.returncode == 0, "")
    if run.returncode:
        print(run.stdout[-20000:] + run.stderr[-4000:], flush=True)
    else:
        print("        " + " · ".join(line.strip() for line in run.stdout.splitlines() if "generated" in line or "passed" in line))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--aviary", default="target/release/aviary")
    arguments.add_argument("--seconds", type=int, default=60, help="for Schemathesis")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--keep", action="store_true", help="keep the nodes' folder")
    options = arguments.parse_args()
    folder = tempfile.mkdtemp(prefix="aviary-openapi.")
    cluster = Cluster(os.path.abspath(options.aviary), folder)
    try:
        rollout(cluster)
        # A stream doesn't end. What only an administrator may is below. A lease that isn't there is 503, as load balancers read it.
        operator = ["--exclude-path", "/v1/events", "--exclude-path-regex", "^/v1/cluster/[a-z-]+$|^/lease/"]
        seconds = max(options.seconds // 3, 1)
        schemathesis(cluster, "about a rollout", "operator", operator, seconds, options.seed, SETTINGS)
        names = SETTINGS.replace('"svc"', '"no-such-service"')
        schemathesis(cluster, "about none", "operator", operator, seconds, options.seed, names)
        # A member that was made up would be added, and end the majority: only requests that must be refused.
        admin = ["--include-path-regex", "^/v1/cluster/(add|remove|cordon|uncordon|readmit|set-default)$", "--mode", "negative"]
        schemathesis(cluster, "as an administrator", "admin", admin, seconds, options.seed)
        lines = [line for node in NODES for line in open(os.path.join(folder, node + ".console"))]
        check("no node panicked", not any("panicked" in line for line in lines), lines[-5:])
        check("all nodes still run", all(process.poll() is None for process in cluster.processes))
    finally:
        cluster.stop()
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
