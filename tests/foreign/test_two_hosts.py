"""Two hosts, each a network namespace, with a wire between them that is cut and healed. Needs root for `ip netns`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import BINARY, HERE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making two network namespaces with a wire needs root")

MESH = """
trust_domain = "two.example"

[defaults]
max_staleness = "4s"

[services.near]
run = ["{python}", "services/idle.py"]
upstreams = ["far"]

[services.far]
run = ["{python}", "services/web.py"]
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True)


class TwoHosts:
    """`east` runs the control plane and service `near`, `west` runs service `far`."""

    EAST, WEST = f"csg-east-{os.getpid()}", f"csg-west-{os.getpid()}"

    def __init__(self, directory):
        self.directory = directory
        self.processes = []
        for name in ("services", "clients"):
            (directory / name).symlink_to(HERE / name)
        (directory / "policies").mkdir()
        (directory / "mesh.toml").write_text(MESH.format(python=sys.executable))
        self.policy(True)
        for host, address in ((self.EAST, "10.81.0.1/24"), (self.WEST, "10.81.0.2/24")):
            ip("netns", "add", host)
        ip("link", "add", "wire", "netns", self.EAST, "type", "veth", "peer", "name", "wire", "netns", self.WEST)
        for host, address in ((self.EAST, "10.81.0.1/24"), (self.WEST, "10.81.0.2/24")):
            ip("-n", host, "addr", "add", address, "dev", "wire")
            ip("-n", host, "link", "set", "wire", "up")
            ip("-n", host, "link", "set", "lo", "up")

    def policy(self, permitted):
        effect = "permit" if permitted else "forbid"
        (self.directory / "policies/far.cedar").write_text(
            f'@id("near-calls-far") {effect} (principal == Workload::"near", action, resource in Service::"far");'
        )

    def on(self, host, *words):
        return ["ip", "netns", "exec", host, *map(str, words)]

    def start(self, host, name, *words):
        log = open(self.directory / f"{name}.log", "w")
        process = subprocess.Popen(
            self.on(host, BINARY, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        self.processes.append(process)
        return process

    def start_control(self, name="control"):
        control = self.start(self.EAST, name, "control", self.directory, "--listen", "10.81.0.1:8443")
        self.wait(lambda: self.command("status", check=False).returncode, 0)
        self.command("apply")
        return control

    def start_agents(self):
        """One on each host; the token comes by the environment, as it would on a real host."""
        for host, name, service in ((self.EAST, "east", "near"), (self.WEST, "west", "far")):
            token = json.loads(self.command("host", "invite", "-o", "json").stdout)["token"]
            os.environ["COUNTERSIGN_JOIN"] = token
            self.start(
                host, name, "--data-dir", self.directory / name, "agent", self.directory, "--service", service,
                "--host", name, "--control", "https://10.81.0.1:8443",
            )
            del os.environ["COUNTERSIGN_JOIN"]

    def command(self, *words, check=True):
        done = subprocess.run(
            self.on(self.EAST, BINARY, "-C", self.directory, *words), capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def call(self):
        """The status that `near` gets from `far`."""
        done = subprocess.run(
            self.on(self.EAST, BINARY, "-C", self.directory, "--data-dir", self.directory / "east", "exec", "near", "--",
                    "curl", "-s", "-o", "/dev/null", "--max-time", "3", "-w", "%{http_code}", "http://far.mesh/"),
            capture_output=True, text=True, timeout=30,
        )
        return done.stdout or done.stderr

    def wire(self, state):
        ip("-n", self.WEST, "link", "set", "wire", state)

    def wait(self, what, expected, seconds=30):
        end = time.monotonic() + seconds
        while (got := what()) != expected:
            assert time.monotonic() < end, f"still {got!r} instead of {expected!r}\n" + self.logs()
            time.sleep(0.2)

    def logs(self):
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.directory.glob("*.log")))

    def stop(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        for host in (self.EAST, self.WEST):
            subprocess.run(["ip", "netns", "del", host], check=False)


@pytest.fixture
def hosts(tmp_path):
    hosts = TwoHosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.stop()


def test_a_cut_wire_goes_stale_and_a_healed_one_resumes_without_a_restart(hosts):
    hosts.start_control()
    hosts.start_agents()
    hosts.wait(hosts.call, "200")

    # The wire is cut: `far` cannot be reached at all.
    hosts.wire("down")
    hosts.wait(lambda: hosts.call() in ("502", "503", "504"), True)
    hosts.policy(False)
    hosts.command("apply")

    # Healed: what was missed is taken up, with no restart.
    hosts.wire("up")
    hosts.wait(hosts.call, "403")
    hosts.policy(True)
    hosts.command("apply", "--wait", "10s")
    assert hosts.call() == "200"


def test_without_a_control_plane_the_last_view_holds_until_it_is_stale(hosts):
    control = hosts.start_control()
    hosts.start_agents()
    hosts.wait(hosts.call, "200")
    control.send_signal(signal.SIGKILL)
    control.wait()
    assert hosts.call() == "200", "the last view holds"
    hosts.wait(hosts.call, "503")
    hosts.start_control("control-again")
    hosts.wait(hosts.call, "200")
