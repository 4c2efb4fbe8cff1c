"""A command that is signed in on the dashboard in a real Chromium, and its session used by a DPoP client that we did not write (joserfc)."""

import base64
import hashlib
import json
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from browsers import Running
from conftest import BINARY
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from joserfc import jwk, jws
from selenium.webdriver.common.by import By


@pytest.fixture
def mesh(tmp_path):
    running = Running(tmp_path)
    yield running
    running.stop()


def encoded(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decoded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Client:
    """A client of RFC 9449, section 4.2 and 7.1."""

    def __init__(self, key):
        self.key = key

    def proof(self, method, url, token=None, **changed):
        claims = {"jti": secrets.token_urlsafe(16), "htm": method, "htu": url, "iat": int(time.time())}
        if token:
            claims["ath"] = encoded(hashlib.sha256(token.encode()).digest())
        header = {"typ": "dpop+jwt", "alg": "ES256", "jwk": self.key.as_dict(private=False)}
        return jws.serialize_compact(header, json.dumps(claims | changed), self.key)

    def thumbprint(self):
        return self.key.thumbprint()


def ask(method, url, body=None, **headers):
    request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}"), error.headers


def test_a_command_is_allowed_on_the_page_and_its_session_is_good_for_its_key_alone(mesh, browser, tmp_path):
    alice = browser("alice")
    alice.enrols(mesh.told["enroll"], "alice")
    alice.signs_in(mesh.origin)
    logins = tmp_path / "logins"
    environment = {**os.environ, "COUNTERSIGN_LOGIN_DIR": str(logins)}

    def command(*words):
        words = [BINARY, "-o", "json", "--at", mesh.origin, *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd="/", env=environment)

    words = [BINARY, "-o", "json", "--at", mesh.origin, "login", "--no-browser"]
    login = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment)
    asked = json.loads(login.stdout.readline())
    alice.open(asked["verification_uri_complete"])
    assert asked["user_code"] in alice.text() and asked["key"] in alice.text()
    alice.shot("device")
    alice.find("[data-do=device] [value=allow]").click()
    alice.until(lambda _: "countersign logout" in alice.text() and "Allow it" not in alice.text())
    alice.shot("device-answered")
    answer, said = login.communicate(timeout=60)
    assert login.returncode == 0, said
    assert json.loads(answer)["who"] == "alice"
    alice.open(f"{mesh.origin}/device?code={asked['user_code']}")
    assert "no command waits" in alice.text(), "a code is answered once"
    assert alice.complaints() == []

    assert json.loads(command("status").stdout)["protected"]
    assert json.loads(command("whoami").stdout)["who"] == "alice"
    assert command("host", "invite").returncode != 0, "what the machine of the mesh may do is refused from afar"

    # The same session, by another implementation.
    [file] = logins.glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    kept = json.loads(file.read_text())
    pem = load_der_private_key(decoded(kept["key"]), None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    client, token, url = Client(jwk.ECKey.import_key(pem)), kept["token"], f"{mesh.origin}/v1/status"
    assert client.thumbprint() == asked["key"]
    good = client.proof("GET", url, token)
    status, answer, _ = ask("GET", url, authorization=f"DPoP {token}", dpop=good)
    assert status == 200 and answer["protected"], answer
    for case, headers in {
        "shown again": {"authorization": f"DPoP {token}", "dpop": good},
        "no proof": {"authorization": f"DPoP {token}"},
        "a bearer": {"authorization": f"Bearer {token}", "dpop": client.proof("GET", url, token)},
        "another method": {"authorization": f"DPoP {token}", "dpop": client.proof("POST", url, token)},
        "another address": {"authorization": f"DPoP {token}", "dpop": client.proof("GET", f"{mesh.origin}/v1/mesh", token)},
        "another token": {"authorization": f"DPoP {token}", "dpop": client.proof("GET", url, token[::-1])},
        "too old": {"authorization": f"DPoP {token}", "dpop": client.proof("GET", url, token, iat=int(time.time()) - 300)},
        "another key": {"authorization": f"DPoP {token}", "dpop": Client(jwk.ECKey.generate_key("P-256")).proof("GET", url, token)},
    }.items():
        status, answer, sent = ask("GET", url, **headers)
        assert status == 401 and sent["www-authenticate"].startswith("DPoP "), (case, status, answer)
    changes = f"{mesh.origin}/v1/changes"
    forged = {"change_set": {"base": 1, "changes": []}, "bodies": {}, "shown": {"operator": "mallory"}}
    status, answer, _ = ask(
        "POST", changes, json.dumps(forged).encode(), authorization=f"DPoP {token}", dpop=client.proof("POST", changes, token), content_type="application/json"
    )
    assert status == 403 and "another operator" in json.dumps(answer), answer

    assert command("logout").returncode == 0 and not file.exists()
    status, _, _ = ask("GET", url, authorization=f"DPoP {token}", dpop=client.proof("GET", url, token))
    assert status == 401, "the session ended on the dashboard too"


def test_the_device_flow_as_rfc_8628_has_it(mesh, browser):
    alice = browser("alice")
    alice.enrols(mesh.told["enroll"], "alice")
    alice.signs_in(mesh.origin)
    client = Client(jwk.ECKey.generate_key("P-256"))
    form = {"content_type": "application/x-www-form-urlencoded"}

    def begin(**more):
        fields = {"client_id": "countersign", "dpop_jkt": client.thumbprint(), "device_name": "a test"} | more
        return ask("POST", f"{mesh.origin}/device/authorize", urllib.parse.urlencode(fields).encode(), **form)

    def poll(code, by=client):
        url = f"{mesh.origin}/device/token"
        fields = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "client_id": "countersign", "device_code": code}
        return ask("POST", url, urllib.parse.urlencode(fields).encode(), dpop=by.proof("POST", url), **form)

    assert begin(client_id="other")[1]["error"] == "invalid_client"
    status, begun, _ = begin()
    assert status == 200 and begun["interval"] >= 5 and begun["expires_in"] >= 300, begun
    assert poll(begun["device_code"])[1]["error"] == "authorization_pending"
    assert poll(begun["device_code"])[1]["error"] == "slow_down"
    assert poll("no such code")[1]["error"] == "invalid_grant"
    assert poll(begun["device_code"], Client(jwk.ECKey.generate_key("P-256")))[1]["error"] == "invalid_grant"
    alice.open(begun["verification_uri"])
    alice.find("#code").send_keys(begun["user_code"].lower().replace("-", " "))
    alice.find("main form button").click()
    alice.until(lambda _: "a test" in alice.text())
    alice.find("[data-do=device] [value=deny]").click()
    alice.until(lambda driver: not driver.find_elements(By.CSS_SELECTOR, "[data-do=device] button:enabled") or "enied" in alice.text())
    time.sleep(1)
    assert poll(begun["device_code"])[1]["error"] == "access_denied"
