"""A protected mesh, with codes that Python's own hmac makes from what the enrolment prints (RFC 6238)."""

import base64
import hashlib
import hmac
import json
import signal
import struct
import subprocess
import time
import urllib.parse

import pytest

from conftest import BINARY


def code(secret, step):
    tag = hmac.new(secret, struct.pack(">Q", step), hashlib.sha1).digest()
    at = tag[-1] & 15
    return f"{(struct.unpack('>I', tag[at:at + 4])[0] & 0x7fffffff) % 1_000_000:06}"


def countersign(directory, *arguments, given=None):
    words = [BINARY, "-C", directory, "-o", "json", *arguments]
    return subprocess.run(words, input=given, capture_output=True, text=True, timeout=60)


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "mesh"
    subprocess.run([BINARY, "init", place], check=True, capture_output=True)
    log = open(tmp_path / "up.log", "w")
    words = [BINARY, "up", "--no-watch", "--api", "127.0.0.1:0", place]
    up = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60
        while not (place / ".countersign/run.json").exists():
            assert up.poll() is None and time.monotonic() < end, (tmp_path / "up.log").read_text()
            time.sleep(0.05)
        yield place
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(60)


def test_an_authenticator_of_another_make_enrols_and_applies_each_code_once(directory):
    words = [BINARY, "-C", directory, "-o", "json", "operator", "enroll", "--totp", "--operator", "alice"]
    enrol = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = json.loads(enrol.stdout.readline())
    assert set(first) == {"operator", "otpauth"} and first["operator"] == "alice"
    query = urllib.parse.parse_qs(urllib.parse.urlparse(first["otpauth"]).query)
    encoded = query["secret"][0]
    secret = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
    used = int(time.time()) // 30
    enrol.communicate(code(secret, used) + "\n", timeout=60)
    assert enrol.returncode == 0

    policy = directory / "policies/greeter.cedar"
    policy.write_text(policy.read_text().replace("guests-are-greeted", "guests-are-welcome"))
    refused = countersign(directory, "apply")
    refusal = json.loads(refused.stdout)
    assert refused.returncode == 3 and refusal["outcome"] == "step_up", refused
    assert set(refusal) == {"outcome", "change", "digest", "requires", "url"}

    # The next step is taken already, and is later than the one that enrolled.
    fresh = code(secret, used + 1)
    applied = countersign(directory, "apply", "--otp", fresh)
    assert applied.returncode == 0, applied
    assert json.loads(applied.stdout)["digest"] == refusal["digest"]

    policy.write_text(policy.read_text().replace("guests-are-welcome", "guests-are-greeted"))
    again = countersign(directory, "apply", "--otp", fresh)
    assert again.returncode == 3 and "used already" in again.stderr, again
    assert json.loads(countersign(directory, "status").stdout)["protected"] is True
