"""A mesh of the real binary around services and clients that we did not write."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("COUNTERSIGN", ROOT / "target/release/countersign"))
HERE = pathlib.Path(__file__).resolve().parent

MESH = """
trust_domain = "foreign.example"

[defaults]
tokens = "{tokens}"

[services.client]
run = ["{python}", "services/idle.py"]
upstreams = ["web", "greeter", "chat", "db"]

[services.stranger]
run = ["{python}", "services/idle.py"]
upstreams = ["web", "greeter", "db"]

[services.web]
run = ["{python}", "services/web.py"]

[services.greeter]
run = ["{python}", "services/greeter.py"]
protocol = "grpc"

[services.chat]
run = ["{python}", "services/chat.py"]

[services.db]
port = {db_port}
protocol = "tcp"
mesh_port = 5432
"""

POLICIES = {
    "web": 'permit (principal == Workload::"client", action, resource in Service::"web");',
    "greeter": 'permit (principal == Workload::"client", action == Action::"grpc:call", resource in Service::"greeter");',
    "chat": 'permit (principal == Workload::"client", action == Action::"http:GET", resource in Service::"chat");',
    "db": 'permit (principal == Workload::"client", action == Action::"tcp:connect", resource in Service::"db");',
}


class Mesh:
    """A running mesh and its directory."""

    def __init__(self, directory, database, environment=None, tokens="optional"):
        self.directory = directory
        self.database = database
        shutil.copytree(HERE / "services", directory / "services")
        (directory / "policies").mkdir()
        port = database.port if database else 5432
        (directory / "mesh.toml").write_text(MESH.format(python=sys.executable, db_port=port, tokens=tokens))
        for name in POLICIES:
            self.write_policy(name)
        self.log = open(directory / "up.log", "w")
        self.process = subprocess.Popen(
            [BINARY, "up", directory],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        run_file = directory / ".countersign/run.json"
        end = time.monotonic() + 60
        while not run_file.exists():
            assert self.process.poll() is None and time.monotonic() < end, (directory / "up.log").read_text()
            time.sleep(0.05)
        self.run = json.loads(run_file.read_text())

    def write_policy(self, name, text=None):
        path = self.directory / "policies" / f"{name}.cedar"
        path.write_text(f'@id("{name}")\n{POLICIES[name] if text is None else text}\n')

    def command(self, *words, check=True, **more):
        return subprocess.run(
            [BINARY, "-C", self.directory, *map(str, words)], check=check, capture_output=True, text=True, timeout=60, **more
        )

    def exec(self, service, *words, **more):
        """Runs a program as the workload of `service` would run."""
        return self.command("exec", service, "--", *words, **more)

    def start(self, service, *words):
        """The same, without waiting for its end."""
        return subprocess.Popen(
            [BINARY, "-C", self.directory, "exec", service, "--", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def script(self, service, name, *words, **more):
        return self.exec(service, sys.executable, HERE / "clients" / name, *words, **more)

    def forbid(self, name):
        """Takes a permit away, everywhere, before it returns."""
        self.write_policy(name, POLICIES[name].replace("permit", "forbid", 1))
        self.command("apply", "--wait", "10s")

    def permit(self, name):
        self.write_policy(name)
        self.command("apply", "--wait", "10s")

    def sidecars(self):
        """The processes of this mesh's sidecars."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and words[1:2] == [b"sidecar"]:
                found.append(int(entry.name))
        return found

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


class Database:
    """A PostgreSQL of Debian's, on loopback, outside the mesh's namespaces."""

    def __init__(self, directory):
        import socket

        self.directory = directory
        binaries = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.become:
            os.chmod(directory, 0o755)
            for parent in directory.parents:
                if parent.stat().st_uid == os.geteuid() and parent != pathlib.Path("/") and len(parent.parts) > 2:
                    os.chmod(parent, parent.stat().st_mode | 0o055)
            shutil.chown(directory, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        data = directory / "data"
        subprocess.run(
            [*self.become, binaries / "initdb", "-D", data, "-A", "trust", "-U", "shop", "--no-sync"],
            check=True,
            capture_output=True,
        )
        self.process = subprocess.Popen(
            [*self.become, binaries / "postgres", "-D", data, "-p", str(self.port), "-k", directory, "-c", "fsync=off"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end and self.process.poll() is None, "PostgreSQL did not start"
                time.sleep(0.1)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    database = Database(tmp_path_factory.mktemp("database"))
    yield database
    database.stop()


@pytest.fixture(scope="session")
def mesh(tmp_path_factory, database):
    mesh = Mesh(tmp_path_factory.mktemp("mesh"), database)
    yield mesh
    mesh.stop()


@pytest.fixture
def browser(tmp_path):
    """Opens browsers, each with an authenticator of its own."""
    from browsers import Browser

    opened = []

    def opens(name):
        opened.append(Browser(tmp_path, name))
        return opened[-1]

    yield opens
    for one in opened:
        one.quit()
