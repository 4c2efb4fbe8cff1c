"""A mesh of one service, whose output is read line by line."""

import contextlib
import pathlib
import signal
import subprocess
import sys

from conftest import BINARY, HERE


@contextlib.contextmanager
def small_mesh(directory: pathlib.Path, isolate: str, script: str, *words: str, more: str = ""):
    """Runs a client of ours as the service `asker`, beside what `more` declares; gives the lines it writes."""
    run = [sys.executable, str(HERE / "clients" / script), *words]
    quoted = ", ".join(f'"{word}"' for word in run)
    (directory / "mesh.toml").write_text(
        f'trust_domain = "foreign.example"\n[defaults]\nisolate = "{isolate}"\n[services.asker]\nrun = [{quoted}]\n{more}'
    )
    process = subprocess.Popen(
        [BINARY, "up", directory], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield (line[line.index("{"):] for line in process.stdout if "{" in line and '"id"' in line)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
