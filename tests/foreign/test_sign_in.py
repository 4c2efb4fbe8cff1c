"""People sign in through a certified OpenID Connect provider that we did not write (oidc-provider), in a real Chromium, and its
back-channel logout ends their sessions, their commands and their open pages."""

import json
import os
import socket
import subprocess
import time
import urllib.request

import pytest
from browsers import Running, countersign
from conftest import BINARY, ROOT

NODE = ROOT / "target/test-node"


class Provider:
    """The provider, and who is in which group there."""

    def __init__(self, tmp_path, origin):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.groups = f"http://127.0.0.1:{port}", tmp_path / "groups.json"
        self.groups.write_text(json.dumps({"eve": ["staff", "others"], "mallory": ["others"]}))
        self.log = tmp_path / "provider.log"
        words = ["node", ROOT / "tests/foreign/oidc/provider.mjs", str(port), origin, self.groups]
        environment = {**os.environ, "TEST_NODE": str(NODE)}
        self.running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=open(self.log, "w"), text=True, env=environment)
        assert any(line == "ready\n" for line in iter(self.running.stdout.readline, "")), self.log.read_text()

    def logouts(self):
        return self.log.read_text().count("backchannel.success")

    def stop(self):
        self.running.terminate()
        self.running.wait(30)


@pytest.fixture
def mesh(tmp_path):
    running = Running(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def provider(tmp_path, mesh):
    running = Provider(tmp_path, mesh.origin)
    yield running
    running.stop()


def through_the_provider(browser, origin, name):
    browser.open(f"{origin}/sign-in")
    browser.find("a[href*='/sign-in/with/corp']").click()
    browser.find("input[name=login]").send_keys(name)
    browser.find("input[name=password]").send_keys("anything")
    browser.find("button[type=submit]").click()


def signs_out_at(provider, browser):
    browser.open(f"{provider.url}/session/end")
    browser.find("button[name=logout]").click()
    browser.until(lambda driver: "/session/end/success" in driver.current_url)


def test_whom_the_provider_vouches_for_asks_an_operator_countersigns_and_a_logout_there_ends_it_here(mesh, provider, browser, tmp_path):
    alice, eve = browser("alice"), browser("eve")
    alice.enrols(mesh.told["enroll"], "alice")
    alice.signs_in(mesh.origin)
    with open(mesh.directory / "mesh.toml", "a") as file:
        file.write(f"""
[issuers.corp]
url = "{provider.url}"
audience = "countersign:pipelines"

[sign_in.corp]
issuer = "corp"
client_id = "countersign"
roles = {{ staff = ["editor"] }}
""")
    asked = countersign(mesh.directory, "apply", "--operator", "alice")
    assert asked.returncode == 3, (asked.stdout, asked.stderr)
    before = mesh.revision()
    alice.signs(json.loads(asked.stdout)["url"])
    alice.until(lambda _: mesh.revision() == before + 1)

    # In no group that counts: nobody here, and told why.
    through_the_provider(eve, mesh.origin, "mallory")
    eve.until(lambda _: "is in no group that means anything here" in eve.text())
    assert "others" in eve.text()
    assert eve.driver.get_cookie("countersign") is None
    signs_out_at(provider, eve)

    through_the_provider(eve, mesh.origin, "eve")
    eve.until(lambda driver: driver.current_url == f"{mesh.origin}/" and "corp:eve" in eve.text())
    eve.open(f"{mesh.origin}/account")
    assert "You are no operator" in eve.text() and "editor" in eve.text()
    eve.shot("account-of-a-person")
    eve.open(f"{mesh.origin}/decisions")
    assert "closed to whom a provider vouched for" in eve.text()
    assert [line for line in eve.complaints() if mesh.origin in line] == []

    # A command of hers, from elsewhere, asks for a change; alice countersigns it with her passkey.
    environment = {**os.environ, "COUNTERSIGN_LOGIN_DIR": str(tmp_path / "logins")}

    def command(*words):
        words = [BINARY, "-o", "json", "--at", mesh.origin, *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=mesh.directory, env=environment)

    words = [BINARY, "-o", "json", "--at", mesh.origin, "login", "--no-browser"]
    login = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment)
    eve.open(json.loads(login.stdout.readline())["verification_uri_complete"])
    eve.find("[data-do=device] [value=allow]").click()
    answer, said = login.communicate(timeout=60)
    assert login.returncode == 0, said
    assert json.loads(answer)["who"] == "corp:eve"
    policy = mesh.directory / "policies/greeter.cedar"
    policy.write_text(policy.read_text().replace(policy.read_text().split('@id("')[1].split('"')[0], "asked-by-eve"))
    proposed = command("apply")
    assert proposed.returncode == 3, (proposed.stdout, proposed.stderr)
    refusal = json.loads(proposed.stdout)
    assert refusal["outcome"] == "needs_countersign", refusal
    eve.open(refusal["url"])
    assert "You asked for it" in eve.text() and "Withdraw" in eve.text()
    before = mesh.revision()
    alice.signs(refusal["url"])
    alice.until(lambda _: mesh.revision() == before + 1)
    entry = json.loads(countersign(mesh.directory, "change", "show", str(before + 1)).stdout)
    assert "corp:eve" in json.dumps(entry), entry

    # She signs out at the provider: nothing of it is left here.
    eve.open(f"{mesh.origin}/")
    cookie = eve.driver.get_cookie("countersign")["value"]
    page = urllib.request.Request(f"{mesh.origin}/events", headers={"cookie": f"countersign={cookie}", "accept": "text/event-stream"})
    stream = urllib.request.urlopen(page, timeout=60)
    heard, end = provider.logouts(), time.monotonic() + 60
    signs_out_at(provider, eve)
    while provider.logouts() == heard:
        assert time.monotonic() < end, provider.log.read_text()
        time.sleep(0.05)
    eve.open(f"{mesh.origin}/")
    eve.until(lambda driver: "/sign-in" in driver.current_url)
    assert command("whoami").returncode != 0
    stream.read()  # It ends.
    sessions = json.loads(countersign(mesh.directory, "session", "list").stdout)
    assert [session["who"] for session in sessions] == ["alice"], sessions
