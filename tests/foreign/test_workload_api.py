"""Identities for a workload, asked for with PyPI's `spiffe` and bare grpcio; and a workload that proposes with its own."""

import json
import subprocess

import pytest

from conftest import BINARY
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
