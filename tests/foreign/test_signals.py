"""What is said of a caller or of its host, with curl and the `websockets` library: it denies what comes and cuts what is open."""

import json
import sys
import time

import pytest
from conftest import HERE, Mesh

LOW_RISK = 'permit (principal == Workload::"client", action, resource in Service::"{}") when {{ context.risk.workload < 70 }};'
COMPLIANT = """permit (principal == Workload::"client", action, resource in Service::"web")
when { context has posture.compliant && context.posture.compliant };"""


@pytest.fixture
def warned(tmp_path, database):
    mesh = Mesh(tmp_path, database)
    for name in ["web", "chat"]:
        mesh.write_policy(name, LOW_RISK.format(name))
    mesh.command("apply", "--wait", "10s")
    yield mesh
    mesh.stop()


def answer(mesh):
    return mesh.exec("client", "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://web.mesh/").stdout


def until(mesh, status):
    end = time.monotonic() + 20
    while (got := answer(mesh)) != status:
        assert time.monotonic() < end, got
        time.sleep(0.05)


def events(mesh):
    stream = mesh.start("client", "curl", "-sSN", "http://web.mesh/events")
    assert "data: 0" in stream.stdout.readline()
    return stream


def last_denial(mesh, service):
    found = json.loads(mesh.command("-o", "json", "decision", "list", "--outcome", "deny", "--service", service).stdout)
    cut = [one for one in found if one["judged"] == "while_open"]
    assert cut, found
    return cut[0]


def send(mesh, *words):
    return json.loads(mesh.command("-o", "json", "signal", "send", "--reason", "a scanner", *words).stdout)


def test_a_risk_cuts_a_download_a_websocket_and_a_polling_client_and_the_record_says_why(warned):
    mesh = warned
    until(mesh, "200")
    stream = events(mesh)
    socket = mesh.start("client", sys.executable, HERE / "clients/chat.py", "stay")
    assert socket.stdout.readline() == "open\n"
    send(mesh, "--subject", "workload:client", "--kind", "risk", "--value", "40")
    assert answer(mesh) == "200", "less than the policies mind"
    sent = send(mesh, "--subject", "workload:client", "--kind", "risk", "--value", "80", "--ttl", "1h")
    assert answer(mesh) == "403", "the command returns when it is enforced"
    assert stream.wait(20) != 0, "it does not look whole"
    assert json.loads([line for line in socket.stdout if line != "open\n"][-1]) == {"code": 1008}

    record = last_denial(mesh, "web")
    assert (record["reason"], record["inputs"]["condition"]) == ("no_policy_permits", {"risk": 80})
    assert record["signal_seq"] == sent["signal"] and record["ended"]["how"] == "cut"
    shown = mesh.command("decision", "show", record["id"]).stdout
    assert "risk" in shown and "80" in shown, shown
    explained = mesh.command("policy", "explain", "--decision", record["id"]).stdout
    assert "its condition did not hold" in explained, explained
    why = mesh.command("risk", "explain", "workload:client").stdout
    assert why.startswith("the risk of workload:client is 80: local said 80"), why
    assert json.loads(mesh.command("-o", "json", "risk", "list").stdout)[0]["risk"] == 80
    listed = json.loads(mesh.command("-o", "json", "signal", "list").stdout)
    assert [(one["subject"], one["value"], one["reason"]) for one in listed] == [("workload:client", "80", "a scanner")]

    cleared = mesh.command("signal", "clear", "--subject", "workload:client", "--kind", "risk", "--reason", "mended")
    assert "enforced: all" in cleared.stdout
    assert answer(mesh) == "200"
    assert "a signal was sent" in (mesh.directory / ".countersign/audit.jsonl").read_text()


def test_a_posture_of_the_host_lets_its_workloads_through_until_it_turns_or_ends(warned):
    mesh = warned
    host = json.loads(mesh.command("-o", "json", "host", "list").stdout)[0]["host"]
    mesh.write_policy("web", COMPLIANT)
    mesh.command("apply", "--wait", "10s")
    assert answer(mesh) == "403", "nobody says anything of the host"
    posture = ["--subject", f"host:{host}", "--kind", "posture", "--value"]
    send(mesh, *posture, "compliant")
    until(mesh, "200")
    stream = events(mesh)
    send(mesh, *posture, "not_compliant")
    assert stream.wait(20) != 0
    record = last_denial(mesh, "web")
    assert record["inputs"]["condition"]["posture"] == {"compliant": False}
    send(mesh, *posture, "compliant", "--ttl", "4s")
    stream = events(mesh)
    assert stream.wait(20) != 0, "it ends by itself, and takes along what rests on it"
    assert answer(mesh) == "403"


def test_who_is_contained_asks_nobody_until_they_are_released(warned):
    mesh = warned
    until(mesh, "200")
    stream = events(mesh)
    contained = mesh.command("contain", "workload:client", "--reason", "it scans the network")
    assert "enforced: all" in contained.stdout
    assert answer(mesh) == "403"
    assert stream.wait(20) != 0
    record = last_denial(mesh, "web")
    assert (record["reason"], record["inputs"]["condition"]["contained"]) == ("contained", True)
    assert "1 contained" in mesh.command("status").stdout
    mesh.command("release", "workload:client", "--reason", "it was the scanner of the auditors")
    assert answer(mesh) == "200"
    assert mesh.command("release", "workload:client", "--reason", "again", check=False).returncode != 0


def test_what_makes_no_sense_is_said(warned):
    mesh = warned
    for words, says in [
        (["--subject", "workload:nobody", "--kind", "risk", "--value", "80"], "there is no workload:nobody"),
        (["--subject", "workload:client", "--kind", "risk", "--value", "800"], "0 to 100"),
        (["--subject", "workload:client", "--kind", "posture", "--value", "compliant"], "host"),
        (["--subject", "client", "--kind", "risk", "--value", "80"], "workload:"),
        (["--subject", "workload:client", "--kind", "mood", "--value", "80"], "posture"),
        (["--subject", "workload:client", "--kind", "risk", "--value", "80", "--half-life", "1s"], "one minute"),
    ]:
        refused = mesh.command("signal", "send", "--reason", "x", *words, check=False)
        assert refused.returncode != 0 and says in refused.stderr, refused
