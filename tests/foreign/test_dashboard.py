"""The dashboard in a real Chromium."""

import base64
import json
import urllib.request

import pytest
from browsers import Running, countersign
from conftest import ROOT
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

# Fields and buttons that a screen reader would have no name for.
UNNAMED = """
    return [...document.querySelectorAll("input:not([type=hidden]), button, a")]
        .filter((e) => !(e.labels?.length || e.innerText.trim() || e.textContent.trim() || e.getAttribute("aria-label")))
        .map((e) => e.outerHTML);
"""


@pytest.fixture
def mesh(tmp_path):
    running = Running(tmp_path)
    yield running
    running.stop()


def test_a_passkey_makes_the_owner_and_signs_what_the_page_shows(mesh, browser):
    alice = browser("alice")
    alice.open(mesh.origin)
    assert "no operator yet" in alice.text()
    alice.shot("sign-in-unprotected")
    alice.open(mesh.told["enroll"])
    alice.shot("enroll")
    alice.enrols(mesh.told["enroll"], "alice")
    assert "recovery codes" in alice.text()
    assert "#" not in alice.driver.current_url, "the link's secret has left the address bar"
    alice.shot("enrolled")
    assert json.loads(countersign(mesh.directory, "status").stdout)["protected"]

    again = browser("again")
    again.enrols(mesh.told["enroll"], "mallory")
    assert "the invitation is not good" in again.text()

    alice.open(f"{mesh.origin}/sign-in")
    alice.shot("sign-in")
    alice.signs_in(mesh.origin)
    alice.shot("overview")
    refusal = mesh.asks("guests-are-welcome", "alice")
    assert refusal["outcome"] == "step_up" and refusal["requires"]["factor"] == "phr"
    assert refusal["url"] == f"{mesh.origin}/changes/{refusal['change']}"
    before = mesh.revision()
    alice.open(refusal["url"])
    assert refusal["digest"] in alice.text() and "guests-are-welcome" in alice.text()
    alice.shot("change")
    alice.signs(refusal["url"])
    alice.until(lambda _: mesh.revision() == before + 1)
    alice.until(lambda driver: not driver.find_elements(By.CSS_SELECTOR, "[data-do=change-key]"))
    alice.shot("change-applied")
    detail = json.loads(countersign(mesh.directory, "change", "show", str(before + 1)).stdout)
    [signed] = json.loads(detail["entry"])["countersignatures"]
    assert signed["operator"] == "alice" and signed["purpose"] == "step_up"
    for path in ("", "sign-in", "nowhere", "enroll", "changes", "ledger", f"ledger/{before + 1}", "operators", "account"):
        alice.open(f"{mesh.origin}/{path}")
        alice.shot(f"page-{path.replace('/', '-') or 'overview'}")
        [heading] = alice.driver.find_elements(By.TAG_NAME, "h1")
        assert heading.text
        assert alice.driver.execute_script(UNNAMED) == [], path
    alice.open(f"{mesh.origin}/ledger/{before + 1}")
    assert "verified" in alice.text() and "counts" in alice.text()
    assert alice.complaints() == []

    [session] = json.loads(countersign(mesh.directory, "session", "list").stdout)
    assert session["who"] == "alice" and session["factor"] == "platform"
    assert countersign(mesh.directory, "session", "revoke", "0000").returncode == 1
    assert json.loads(countersign(mesh.directory, "session", "revoke", "--operator", "alice").stdout) == {"ended": 1}
    alice.open(refusal["url"])
    assert "/sign-in?next=" in alice.driver.current_url, "nobody is signed in any more"


def test_what_an_honest_browser_never_sends_changes_nothing(mesh, browser):
    alice = browser("alice")
    alice.enrols(mesh.told["enroll"], "alice")
    alice.signs_in(mesh.origin)
    first = mesh.asks("guests-are-welcome", "alice")
    path = f"/changes/{first['change']}"
    alice.open(first["url"])
    before = mesh.revision()

    def refused(signed, why):
        status, answer = alice.fetch(f"{path}/sign", signed)
        assert status in (403, 410), answer
        assert why in json.dumps(answer), answer

    _, challenge = alice.fetch(f"{path}/challenge", {})
    good = alice.signed(challenge)
    forged = json.loads(base64.urlsafe_b64decode(good["client_data_json"] + "=="))
    forged["origin"] = "https://evil.example"
    forged = base64.urlsafe_b64encode(json.dumps(forged).encode()).decode().rstrip("=")
    refused({**good, "client_data_json": forged}, "origin")
    refused(good, "ended already")

    other = mesh.asks("guests-are-invited", "alice")
    _, challenge = alice.fetch(f"/changes/{other['change']}/challenge", {})
    refused(alice.signed(challenge), "ended already")

    alice.cdp("WebAuthn.setUserVerified", authenticatorId=alice.authenticator, isUserVerified=False)
    _, challenge = alice.fetch(f"{path}/challenge", {})
    assert "NotAllowedError" in str(alice.signed(challenge)), "the browser itself asks for verification"
    _, challenge = alice.fetch(f"{path}/challenge", {})
    challenge["options"]["userVerification"] = "discouraged"
    refused(alice.signed(challenge), "not verified")
    alice.cdp("WebAuthn.setUserVerified", authenticatorId=alice.authenticator, isUserVerified=True)

    [key] = alice.cdp("WebAuthn.getCredentials", authenticatorId=alice.authenticator)["credentials"]
    alice.cdp("WebAuthn.removeCredential", authenticatorId=alice.authenticator, credentialId=key["credentialId"])
    alice.cdp("WebAuthn.addCredential", authenticatorId=alice.authenticator, credential={**key, "signCount": 0})
    _, challenge = alice.fetch(f"{path}/challenge", {})
    refused(alice.signed(challenge), "count")
    assert mesh.revision() == before

    # A page of another origin has no session, and its requests are not looked at.
    request = urllib.request.Request(f"{mesh.origin}{path}/challenge", b"{}", {"origin": "https://evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code == 403


def test_two_operators_with_the_keyboard_alone_and_pages_that_follow(tmp_path, browser):
    shipped = (ROOT / "crates/core/src/gate/shipped.cedar").read_text()
    two = '@id("two-for-policies")\n@countersign("1")\nforbid (principal is Operator, action in Action::"policies", resource);\n'
    mesh = Running(tmp_path, gate=shipped + two)
    try:
        alice, bob = browser("alice"), browser("bob")
        alice.enrols(mesh.told["enroll"], "alice")
        alice.signs_in(mesh.origin)

        # By Tab and Enter only: the skip link first, then the form that invites.
        alice.open(f"{mesh.origin}/operators")
        tabs(alice, lambda element: element.get_attribute("class") == "skip", most=1)
        tabs(alice, lambda element: element.get_attribute("id") == "invite-name")
        alice.driver.switch_to.active_element.send_keys("bob", Keys.TAB, "owner", Keys.ENTER)
        alice.until(lambda driver: "/changes/" in driver.current_url)
        assert "bob is invited, as owner" in alice.text()
        tabs(alice, lambda element: element.text == "Sign and apply")
        alice.driver.switch_to.active_element.send_keys(Keys.ENTER)
        alice.until(lambda _: "/enroll#" in alice.text())
        alice.shot("invited")
        link = alice.find("[data-invitations] code").text
        bob.enrols(link, "bob")
        bob.signs_in(mesh.origin)
        bob.open(f"{mesh.origin}/changes")
        assert "Nothing waits" in bob.text()

        before = mesh.revision()
        asked = mesh.asks("guests-are-welcome", "alice")
        bob.until(lambda _: "guests-are-welcome" in bob.text())
        bob.shot("queue")
        alice.open(asked["url"])
        alice.signs(asked["url"])
        alice.until(lambda _: "waits for the countersignature" in alice.text())
        alice.shot("change-waits")
        own, answer = alice.fetch(f"/changes/{asked['change']}/challenge", {})
        assert own == 200 and mesh.revision() == before, answer
        bob.open(asked["url"])
        assert asked["digest"] in bob.text() and "Which decisions change" in bob.text()
        bob.shot("countersign")
        bob.signs(asked["url"])
        bob.until(lambda _: mesh.revision() == before + 1)
        alice.until(lambda _: f"applied, as revision {before + 1}" in alice.text())
        bob.open(f"{mesh.origin}/ledger/{before + 1}")
        assert bob.text().count("counts") == 2, bob.text()
        bob.shot("entry-countersigned")

        # An owner ends another's session, and the other's page goes to the sign-in by itself.
        bob.open(f"{mesh.origin}/changes")
        alice.open(f"{mesh.origin}/operators")
        alice.shot("operators")
        row = next(row for row in alice.driver.find_elements(By.CSS_SELECTOR, "tbody tr") if "bob" in row.text)
        row.find_element(By.TAG_NAME, "button").click()
        bob.driver.execute_script("htmx.trigger('#live', 'sse:changed')")
        bob.until(lambda driver: "/sign-in" in driver.current_url)
        assert alice.complaints() == [] and bob.complaints() == []
    finally:
        mesh.stop()


def tabs(browser, reached, most=80):
    """Presses Tab until the focus is there, and can be seen."""
    for _ in range(most):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        element = browser.driver.switch_to.active_element
        if reached(element):
            assert element.value_of_css_property("outline-style") != "none", element.get_attribute("outerHTML")
            return
    pytest.fail("the keyboard does not reach it")
