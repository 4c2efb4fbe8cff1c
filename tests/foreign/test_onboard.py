"""What `onboard` writes, each file read by the tool that it is for."""

import json
import pathlib
import subprocess
import sys

import pytest

from conftest import BINARY

TOOLS = pathlib.Path(sys.executable).parent
MESH = """trust_domain = "tiny.example"

[services.web]
port = 9000
"""
OPENAPI = """openapi: 3.1.0
info: { title: payments, version: "1" }
paths:
  /charges:
    get: { operationId: listCharges }
    post: { operationId: createCharge }
  /charges/{id}:
    get: { operationId: getCharge }
"""


def run(*words, **more):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120, **more)


@pytest.fixture(scope="module")
def onboarded(tmp_path_factory):
    root = tmp_path_factory.mktemp("onboard")
    mesh, service = root / "repo/mesh", root / "payments"
    for folder in [root / "repo/.git", mesh, service]:
        folder.mkdir(parents=True)
    (mesh / "mesh.toml").write_text(MESH)
    (service / "openapi.yaml").write_text(OPENAPI)
    done = run(BINARY, "-C", mesh, "onboard", service, "--caller", "web", "--", "./payments", "--say", '50% of $HOME "now"')
    assert done.returncode == 0, done.stderr
    return root


def test_the_mesh_directory_holds_what_its_tests_say_and_plans_on_what_was_there(onboarded):
    mesh, before = onboarded / "repo/mesh", onboarded / "before"
    tested = run(BINARY, "-C", mesh, "-o", "json", "policy", "test")
    assert tested.returncode == 0 and len(json.loads(tested.stdout)) == 4, tested.stdout + tested.stderr
    before.mkdir()
    (before / "mesh.toml").write_text(MESH)
    planned = run(BINARY, "-o", "json", "plan", mesh, "--from", before)
    assert planned.returncode == 0, planned.stderr
    kinds = sorted(change["kind"] for change in json.loads(planned.stdout)["changes"])
    assert kinds == ["declare_service", "declare_service", "set_policy", "set_policy"], "the service, and its caller that names it"
    same = run(BINARY, "plan", mesh, "--from", mesh)
    assert same.returncode == 0 and "nothing to change" in same.stdout


def test_the_unit_is_one_that_systemd_takes(onboarded):
    unit = onboarded / "payments/deploy/payments.service"
    # What it starts is not installed here; everything else is as it was written.
    installed = onboarded / "payments.service"
    installed.write_text(unit.read_text().replace("/usr/local/bin/countersign", str(BINARY)))
    verified = run("systemd-analyze", "verify", "--man=no", installed)
    assert verified.returncode == 0 and not verified.stderr, verified.stderr
    broken = onboarded / "broken.service"
    broken.write_text(installed.read_text().replace("Restart=on-failure", "Restart=perhaps"))
    assert "perhaps" in run("systemd-analyze", "verify", "--man=no", broken).stderr


def test_the_workflows_fit_their_schemas_and_an_auditor_finds_nothing(onboarded):
    repository = onboarded / "repo"
    workflow, gitlab = repository / ".github/workflows/mesh.yml", repository / ".gitlab-ci.yml"
    for schema, file in [("vendor.github-workflows", workflow), ("vendor.gitlab-ci", gitlab)]:
        words = ["--data-transform", "gitlab-ci"] if "gitlab" in schema else []
        checked = run(TOOLS / "check-jsonschema", "--builtin-schema", schema, *words, file)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    audited = run(TOOLS / "zizmor", "--offline", "--no-progress", workflow)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    broken = onboarded / "broken.yml"
    broken.write_text(workflow.read_text().replace("runs-on", "run-on"))
    assert run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", broken).returncode != 0


def test_the_manifests_are_resources_of_kubernetes(onboarded):
    manifest = onboarded / "payments/deploy/kubernetes.yaml"
    validated = run(TOOLS / "kubernetes-validate", "--strict", manifest)
    assert validated.returncode == 0, validated.stdout + validated.stderr
    broken = onboarded / "broken.yaml"
    broken.write_text(manifest.read_text().replace("replicas: 1", "replicas: one"))
    assert run(TOOLS / "kubernetes-validate", "--strict", broken).returncode != 0
