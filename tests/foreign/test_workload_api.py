"""Identities for a workload, asked for with PyPI's `spiffe` and bare grpcio; and a workload that proposes with its own."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from conftest import BINARY, HERE
from small import small_mesh


@pytest.mark.parametrize("isolate", ["auto", "off"])
def test_software_written_for_spiffe_works_unchanged(tmp_path, isolate):
    with small_mesh(tmp_path, isolate, "workload_api.py", "once") as lines:
        answer = json.loads(next(lines))
    refused = answer.pop("refused")
    assert answer == {
        "id": "spiffe://foreign.example/asker",
        "names": ["spiffe://foreign.example/asker"],
        "chain": 2,
        "authorities": 1,
        "jwt_keys": 2,
        "jwt": "spiffe://foreign.example/asker",
        "audience": ["orders"],
        "validated": "spiffe://foreign.example/asker",
        "again": True,
    }
    for said, expected in zip(refused, ["not meant for `somebody-else`", "no key of its trust domain", "PERMISSION_DENIED"], strict=True):
        assert expected in said


def test_software_that_the_agent_did_not_start_is_known_by_its_user_and_its_program(tmp_path):
    program = pathlib.Path(sys.executable).resolve()
    selectors = [f"unix:uid:{os.getuid()}", f"unix:path:{program}", f"unix:sha256:{hashlib.sha256(program.read_bytes()).hexdigest()}"]
    registered = f"[services.batch]\n[services.batch.attest]\nselectors = {json.dumps(selectors)}\n"
    with small_mesh(tmp_path, "auto", "workload_api.py", "once", more=registered) as lines:
        assert json.loads(next(lines))["id"] == "spiffe://foreign.example/asker"
        run_file = tmp_path / ".countersign/run.json"
        while not run_file.exists():
            time.sleep(0.1)
        socket = json.loads(run_file.read_text())["workload_api"]

        def once(interpreter):
            environment = {**os.environ, "SPIFFE_ENDPOINT_SOCKET": socket, "PYTHONPATH": os.pathsep.join(sys.path)}
            ask = [interpreter, HERE / "clients/workload_api.py", "once"]
            return subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=60)

        said = json.loads(once(sys.executable).stdout)
        assert (said["id"], said["jwt"], said["validated"]) == ("spiffe://foreign.example/batch",) * 3
        # The same content at another path, run by the same user, is nobody.
        elsewhere = tmp_path / "python"
        shutil.copy(program, elsewhere)
        refused = [BINARY, "-C", tmp_path, "-o", "json", "workload", "list"]
        asking = subprocess.Popen(
            [elsewhere, HERE / "clients/workload_api.py", "once"],
            env={**os.environ, "SPIFFE_ENDPOINT_SOCKET": socket, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHOME": sys.base_prefix},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while True:
                found = json.loads(subprocess.run(refused, check=True, capture_output=True, text=True).stdout)["processes"]
                if strangers := [one for one in found if f"unix:path:{elsewhere}" in one["selectors"]]:
                    break
                time.sleep(0.1)
            assert "instance" not in strangers[0]
        finally:
            asking.kill()
            asking.wait()


def test_software_written_for_spiffe_has_another_identity_when_its_own_is_revoked(tmp_path):
    with small_mesh(tmp_path, "auto", "workload_api.py", "each") as lines:
        seen = [json.loads(next(lines))["serial"]]
        for _ in range(3):
            revoke = [BINARY, "-C", tmp_path, "-o", "json", "identity", "revoke", "--serial", seen[-1], "--reason", "copied"]
            revoked = json.loads(subprocess.run(revoke, check=True, capture_output=True, text=True).stdout)
            assert [one["serial"] for one in revoked["identities"]] == [seen[-1]]
            while (serial := json.loads(next(lines))["serial"]) in seen:
                pass
            seen.append(serial)


def test_a_request_without_the_header_of_the_standard_is_refused(mesh):
    answer = json.loads(mesh.script("client", "workload_api.py", "without_header").stdout)
    assert answer == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "INVALID_ARGUMENT", "OK"]


def test_a_workload_finds_its_own_socket_and_nothing_else_in_the_place_of_the_data_directory(mesh):
    found = mesh.exec("client", "sh", "-c", "ls -A $(dirname ${SPIFFE_ENDPOINT_SOCKET#unix://})").stdout.split()
    assert found == ["workload.sock"]
