"""A service that joins a protected mesh: found by nobody and reaching nobody, seen with curl, until an operator approves it."""

import base64
import json
import subprocess
import time
import urllib.parse

from conftest import BINARY
from test_gate import code, countersign, directory  # noqa: F401 the fixture

SERVICE = '\n[services.shop]\nrun = ["python3", "services/greeter.py"]\nupstreams = ["greeter"]\n'
POLICIES = """
@id("web-shops") permit (principal == Workload::"web", action, resource in Service::"shop");
@id("all-are-greeted") permit (principal, action, resource in Service::"greeter");
"""


def enrolled(place):
    """Enrols alice; gives her codes, each once, as soon as its time allows."""
    words = [BINARY, "-C", place, "-o", "json", "operator", "enroll", "--totp", "--operator", "alice"]
    enrol = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = json.loads(enrol.stdout.readline())["otpauth"]
    encoded = urllib.parse.parse_qs(urllib.parse.urlparse(url).query)["secret"][0]
    secret = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
    step = int(time.time()) // 30
    enrol.communicate(code(secret, step) + "\n", timeout=60)
    assert enrol.returncode == 0
    while True:
        step += 1
        while int(time.time()) // 30 < step - 1:
            time.sleep(0.1)
        yield code(secret, step)


def status_of(place, caller, url):
    words = ["exec", caller, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code} %header{countersign-reason}", url]
    asked = subprocess.run([BINARY, "-C", place, *words], capture_output=True, text=True, timeout=60)
    return asked.stdout.split()


def until(what, holds):
    end = time.monotonic() + 30
    while not (found := holds()):
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.1)
    return found


def test_a_new_service_is_found_by_nobody_and_reaches_nobody_until_it_is_approved(directory):  # noqa: F811
    codes = enrolled(directory)
    mesh, policies = directory / "mesh.toml", directory / "policies/shop.cedar"
    called = 'upstreams = ["greeter"]'
    mesh.write_text(mesh.read_text().replace(called, called.replace("]", ', "shop"]'), 1) + SERVICE)
    policies.write_text(POLICIES)
    applied = countersign(directory, "apply", "--otp", next(codes))
    assert json.loads(applied.stdout)["outcome"] == "applied", applied

    def waiting():
        listed = json.loads(countersign(directory, "service", "list", "--pending").stdout)
        return [service for service in listed if service["instances"]]

    (waits,) = until("it runs in quarantine", waiting)
    assert (waits["name"], waits["state"]) == ("shop", "quarantined")
    nowhere = status_of(directory, "web", "http://nowhere.mesh/hello")
    assert nowhere == ["404", "unknown-service"]
    assert status_of(directory, "web", "http://shop.mesh/hello") == nowhere, "it looks like one that does not exist"
    assert status_of(directory, "shop", "http://greeter.mesh/hello") == nowhere, "and everything looks so to it"

    def missing():
        shown = json.loads(countersign(directory, "service", "show", "shop").stdout)
        return [line["what"] for line in shown["checklist"] if "help" in line]

    until("all but its contract is there", lambda: missing() == ["contract"])
    mesh.write_text(mesh.read_text().replace(SERVICE, SERVICE + 'contract = "none"\n'))
    assert countersign(directory, "apply", "--otp", next(codes)).returncode == 0
    until("all of its checklist is there", lambda: missing() == [])
    shown = json.loads(countersign(directory, "service", "show", "shop").stdout)
    (telemetry,) = [line["found"] for line in shown["checklist"] if line["what"] == "telemetry"]
    assert telemetry == "record, metric and span received of 1 sidecars"
    (instance,) = shown["instances"]
    assert instance["telemetry"]["verified_at_ms"] <= time.time() * 1000 and "silent_since_ms" not in instance["telemetry"]

    listed = countersign(directory, "decision", "list", "--service", "shop", "--probes", "--otp", next(codes))
    (judged,) = {record["judged"] for record in json.loads(listed.stdout)}
    assert judged == "as_probe", "nobody has called it but its own sidecar"
    approved = countersign(directory, "service", "approve", "shop", "--otp", next(codes))
    assert approved.returncode == 0, approved
    until("it is found", lambda: status_of(directory, "web", "http://shop.mesh/hello") == ["200"])
    listed = countersign(directory, "decision", "list", "--service", "shop", "--first-contact", "--otp", next(codes))
    (first,) = json.loads(listed.stdout)
    assert (first["inputs"]["path"], first["inputs"]["principal"].rsplit("/")[-1]) == ("/hello", "web")
    until("it finds others", lambda: status_of(directory, "shop", "http://greeter.mesh/hello") == ["200"])
    assert json.loads(countersign(directory, "service", "list", "--pending").stdout) == []
    assert countersign(directory, "ledger", "verify").returncode == 0
