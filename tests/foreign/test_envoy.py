"""An Envoy that we did not build has its certificate, and what verifies its peers, from the agent: SDS on the socket of the Workload API."""

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import envoy
import pytest

from conftest import BINARY, HERE, ROOT

ENVOY = pathlib.Path(sys.executable).with_name("envoy")
CLIENT = HERE / "clients/mutual_tls.py"
DOMAIN = "foreign.example"


def documented(language):
    """The first block in a language of what the documentation says about Envoy."""
    text = (ROOT / "docs/workload-api.md").read_text()
    return re.search(rf"```{language}\n(.*?)```", text[text.index("## Envoy") :], re.DOTALL)[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Edge:
    """A mesh with an Envoy as a workload of it."""

    def __init__(self, directory, isolate, edge=None):
        self.directory = directory
        self.isolated = isolate == "auto"
        assert documented("toml") in (ROOT / "README.md").read_text()
        self.edge = edge or documented("toml").replace('"envoy"', f'"{ENVOY}"')
        bootstrap = documented("yaml")
        # In namespaces of its own every port is free, and an Envoy finds its socket where the data directory would be.
        self.port, self.admin, client = (8443, 9901, 8080) if self.isolated else (free_port(), free_port(), free_port())
        if not self.isolated:
            bootstrap = bootstrap.replace("8443", str(self.port)).replace("9901", str(self.admin))
            bootstrap = bootstrap.replace("workload.sock", "workload.sock" if edge else "agent/edge-1.sock")
        (directory / "envoy.yaml").write_text(bootstrap)
        self.client_port = client
        client = f'[services.client]\nrun = ["{sys.executable}", "{CLIENT}", "serve"]\nport = {client}\n'
        self.rest = f'trust_domain = "{DOMAIN}"\n[defaults]\nisolate = "{isolate}"\n{client}'
        (directory / "mesh.toml").write_text(self.rest + self.edge)
        self.log = open(directory / "up.log", "w")
        self.process = subprocess.Popen([BINARY, "up", directory], stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        self.until("the mesh is up", (directory / ".countersign/run.json").exists)

    def until(self, what, so, within=30):
        end = time.monotonic() + within
        while not (found := so()):
            assert self.process.poll() is None and time.monotonic() < end, f"in vain: {what}\n{(self.directory / 'up.log').read_text()[-6000:]}"
            time.sleep(0.1)
        return found

    def command(self, *words, check=True):
        done = subprocess.run([BINARY, "-C", self.directory, *map(str, words)], capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, how="svid"):
        """The serial of the certificate that the Envoy answers with; nothing when there is no answer."""
        if self.isolated:
            said = self.command("exec", "edge", "--", sys.executable, CLIENT, self.port, how, check=False)
        else:
            with socket.create_connection(("127.0.0.1", self.client_port), 30) as client, client.makefile("rw") as file:
                file.write(f"{self.port} {how}\n")
                file.flush()
                said = file.readline()
        answer = json.loads(said) if said else {"refused": "it could not be asked"}
        if "refused" in answer:
            return None
        assert answer["id"] == f"spiffe://{DOMAIN}/edge" and answer["status"] == "HTTP/1.1 200 OK"
        return answer["serial"]

    def start_envoy(self, program):
        """As somebody starts it who is not the agent."""
        words = [program, "--config-path", "envoy.yaml", "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
        return subprocess.Popen(words, cwd=self.directory, stdout=self.log, stderr=subprocess.STDOUT)

    def processes(self):
        return json.loads(self.command("-o", "json", "workload", "list"))["processes"]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(params=["auto", "off"])
def edge(tmp_path, request):
    edge = Edge(tmp_path, request.param)
    yield edge
    edge.stop()


def test_an_envoy_proves_itself_and_verifies_its_peers_and_rotates_while_it_runs(edge):
    serials = [edge.until("the Envoy answers", edge.attempt)]
    assert edge.attempt("nothing") is None
    assert edge.attempt("foreign") is None
    for _ in range(3):
        edge.command("identity", "revoke", "--serial", serials[-1], "--reason", "copied")
        serials.append(edge.until("another certificate", lambda: (serial := edge.attempt()) and serial not in serials and serial))


def test_an_envoy_believes_nobody_while_its_service_is_suspended_and_ends_with_it(tmp_path):
    edge = Edge(tmp_path, "off")
    try:
        edge.until("the Envoy answers", edge.attempt)
        envoy = http.client.HTTPConnection("127.0.0.1", edge.admin)
        envoy.connect()
        envoy.auto_open = False  # one connection: it ends with the Envoy
        edge.command("service", "suspend", "edge", "--reason", "its key was copied")
        edge.until("it believes nobody", lambda: edge.attempt() is None)
        edge.command("service", "resume", "edge")
        edge.until("it answers again", edge.attempt)
        envoy.request("GET", "/stats?filter=tls_inspector|ssl.connection_error")
        assert envoy.getresponse().status == 200
        (edge.directory / "mesh.toml").write_text(edge.rest)
        edge.until("it is gone", lambda: edge.attempt() is None)
    finally:
        edge.stop()


def test_an_envoy_that_the_agent_did_not_start_is_the_service_that_registers_it(tmp_path):
    program = pathlib.Path(envoy.__file__).with_name("_bin") / "envoy"
    selectors = [f"unix:uid:{os.getuid()}", f"unix:path:{program.resolve()}"]
    registered = f"[services.edge]\n[[services.edge.attest]]\nselectors = {json.dumps(selectors)}\n"
    edge = Edge(tmp_path, "off", registered.replace(str(program.resolve()), "/usr/bin/another"))
    started = []
    try:
        run = json.loads((tmp_path / ".countersign/run.json").read_text())
        assert run["sds"] == run["workload_api"] == f"unix://{tmp_path}/.countersign/workload.sock"
        started.append(edge.start_envoy(program))
        [refused] = edge.until("it is refused", edge.processes)
        assert "instance" not in refused and set(selectors) < set(refused["selectors"])
        assert edge.attempt() is None
        (tmp_path / "mesh.toml").write_text(edge.rest + registered)
        first = edge.until("the Envoy answers", edge.attempt)
        [attested] = [one for one in edge.processes() if "instance" in one]
        assert attested["pid"] == started[0].pid and attested["instance"].startswith("edge/p")
        edge.command("identity", "revoke", "--serial", first, "--reason", "copied")
        edge.until("another certificate", lambda: (serial := edge.attempt()) and serial != first)
        (tmp_path / "mesh.toml").write_text(edge.rest + edge.edge)
        edge.until("it believes nobody", lambda: edge.attempt() is None)
        edge.until("it is nobody", lambda: not [one for one in edge.processes() if "instance" in one])
    finally:
        for one in started:
            one.kill()
            one.wait()
        edge.stop()
