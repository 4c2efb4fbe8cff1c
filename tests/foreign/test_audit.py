"""The audit trail of a mesh that `up` runs, read as tools for the Open Cybersecurity Schema Framework read it: line by line."""

import json
import stat

from browsers import Running, countersign

# What the schema (1.5) requires of an event of each class, beside what it requires of all.
REQUIRED = {
    3001: {"user"},
    3002: {"user", "service"},
    3004: {"entity"},
    3005: {"user"},
    6002: {"app"},
    6003: {"actor", "api", "src_endpoint"},
}
ALL = {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid", "status_id", "message"}


def test_what_an_operator_does_in_a_browser_stands_in_lines_that_other_tools_read(tmp_path, browser):
    mesh = Running(tmp_path)
    alice = browser("alice")
    try:
        alice.enrols(mesh.told["enroll"], "alice")
        alice.signs_in(mesh.origin)
        cookies = [cookie["value"] for cookie in alice.cdp("Network.getAllCookies")["cookies"]]
        assert cookies
        refused = countersign(mesh.directory, "decision", "list", "--operator", "alice")
        assert refused.returncode == 3, refused
        assert json.loads(countersign(mesh.directory, "session", "revoke", "--operator", "alice").stdout) == {"ended": 1}
    finally:
        mesh.stop()
    trail = mesh.directory / ".countersign/audit.jsonl"
    assert stat.S_IMODE(trail.stat().st_mode) == 0o600
    text = trail.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for number, line in enumerate(lines):
        missing = (ALL | REQUIRED[line["class_uid"]]) - line.keys()
        assert not missing, (missing, line)
        assert line["type_uid"] == line["class_uid"] * 100 + line["activity_id"]
        assert line["metadata"]["sequence"] == number and line["metadata"]["product"]["name"] == "Countersign"
    said = [line["message"] for line in lines]
    assert said[0] == "the control plane started" and said[-1] == "the control plane stopped"
    for expected in ("an operator enrolled a factor", "an operator signed in", "an act was not let pass", "a session was ended",
                     "an identity was issued", "a change was applied"):
        assert expected in said, said
    [refusal] = [line for line in lines if line["message"] == "an act was not let pass"]
    assert refusal["actor"]["user"]["name"] == "alice" and refusal["api"]["operation"] == "read_decisions"
    assert refusal["status"] == "Failure" and refusal["status_detail"]
    link = mesh.told["enroll"].split("#")[1]
    for secret in [link, *cookies]:
        assert secret not in text
