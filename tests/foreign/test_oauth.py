"""The token service with clients that we did not write: npm's oauth4webapi and openid-client with JWT-SVIDs and DPoP, curl with an
X.509-SVID in the handshake. The SVIDs come from the Workload API, to processes that no agent started."""

import base64
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from conftest import BINARY, HERE, ROOT

NODE = ROOT / "target/test-node"
BILLING = "spiffe://foreign.example/countersign/client/billing"
SHOP, PAYMENTS, BANK = (f"spiffe://foreign.example/{name}" for name in ("shop", "payments", "bank"))
POLICIES = """
@id("shop-pays") permit (principal == Workload::"shop", action in Action::"write", resource in Service::"payments");
@id("shop-reads") permit (principal == Workload::"shop", action == Action::"http:GET", resource in Service::"payments");
@id("payments-at-the-bank") permit (principal == Workload::"payments", action == Action::"http:POST", resource in Service::"bank");
@id("shop-at-the-bank") permit (principal == Workload::"shop", action in Action::"write", resource in Service::"bank");
@id("billing-reads") permit (principal == Workload::"spiffe://foreign.example/countersign/client/billing", action == Action::"http:GET", resource in Service::"payments");
"""


def private_jwk():
    numbers = ec.generate_private_key(ec.SECP256R1()).private_numbers()
    encoded = lambda number: base64.urlsafe_b64encode(number.to_bytes(32, "big")).decode().rstrip("=")  # noqa: E731
    x, y = numbers.public_numbers.x, numbers.public_numbers.y
    return {"kty": "EC", "crv": "P-256", "kid": "1", "x": encoded(x), "y": encoded(y), "d": encoded(numbers.private_value)}


class TokenService:
    """A mesh of which nothing runs but what asks: two interpreters that are registered as two services."""

    def __init__(self, directory):
        self.directory = directory
        shop = pathlib.Path(sys.executable).resolve()
        payments = directory / "payments-python"
        shutil.copy(shop, payments)
        digest = hashlib.sha256(shop.read_bytes()).hexdigest()
        self.programs = {"shop": shop, "payments": payments}
        self.alive = {}
        text = 'trust_domain = "foreign.example"\n[services.bank]\nport = 9\n'
        for service, upstream in (("shop", "payments"), ("payments", "bank")):
            selectors = [f"unix:uid:{os.getuid()}", f"unix:path:{self.programs[service]}", f"unix:sha256:{digest}"]
            text += f'[services.{service}]\nupstreams = ["{upstream}"]\n[services.{service}.attest]\nselectors = {json.dumps(selectors)}\n'
        self.billing = private_jwk()
        public = {name: value for name, value in self.billing.items() if name != "d"}
        text += f"[clients.billing]\nservices = [\"payments\"]\nkeys = ['{json.dumps(public)}']\n"
        (directory / "mesh.toml").write_text(text)
        (directory / "policies").mkdir()
        (directory / "policies/all.cedar").write_text(POLICIES)
        self.log = open(directory / "up.log", "w")
        self.process = subprocess.Popen([BINARY, "up", directory], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        run, self.ca = directory / ".countersign/run.json", directory / ".countersign/token-ca.pem"
        for _ in range(600):
            if run.exists() and self.ca.exists():
                break
            assert self.process.poll() is None, (directory / "up.log").read_text()
            time.sleep(0.1)
        self.run = json.loads(run.read_text())
        self.issuer = self.run["token"]

    def svid(self, service):
        """Its id and a JWT-SVID for the issuer; the X.509-SVID lies in a directory of its name."""
        environment = {**os.environ, "SPIFFE_ENDPOINT_SOCKET": self.run["workload_api"], "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [self.programs[service], HERE / "clients/svid.py", self.directory / f"{service}.svid", self.issuer]
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.alive[service] = subprocess.Popen(words, env=environment, stderr=self.log, **piped)
        said = self.alive[service].stdout.readline()
        assert said, (self.directory / "up.log").read_text()
        return json.loads(said)

    def end(self, service):
        """The process that its SVIDs were issued to is gone."""
        process = self.alive.pop(service)
        process.communicate(timeout=30)
        assert process.returncode == 0

    def curl(self, path, *form, service=None, headers=()):
        words = ["curl", "-sS", "--cacert", self.ca, "-w", "\n%{http_code}", self.issuer + path]
        for parameter in form:
            words += ["--data-urlencode", parameter]
        for header in headers:
            words += ["-H", header]
        if service:
            words += ["--cert", self.directory / f"{service}.svid/svid.pem", "--key", self.directory / f"{service}.svid/svid.key"]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
        body, status = answer.rsplit("\n", 1)
        return int(status), json.loads(body) if body else None

    def asks(self, *words):
        said = subprocess.run([BINARY, "-C", self.directory, "-o", "json", *words], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    def stop(self):
        for service in list(self.alive):
            self.end(service)
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = TokenService(tmp_path_factory.mktemp("oauth"))
    yield running
    running.stop()


def test_libraries_that_we_did_not_write_get_use_exchange_and_revoke_tokens_that_are_bound_to_their_keys(service):
    caller, callee = service.svid("shop"), service.svid("payments")
    assert (caller["id"], callee["id"]) == (SHOP, PAYMENTS)
    outside = {"id": BILLING, "key": service.billing}
    given = {"issuer": service.issuer, "caller": caller, "callee": callee, "next": BANK, "outside": outside}
    environment = {**os.environ, "TEST_NODE": str(NODE), "NODE_EXTRA_CA_CERTS": str(service.ca)}
    asked = subprocess.run(
        ["node", HERE / "clients/oauth.mjs", json.dumps(given)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert asked.returncode == 0, asked.stderr
    told = json.loads(asked.stdout)
    assert told["metadata"]["issuer"] == service.issuer
    assert told["nonces_asked_for"] >= 1
    assert told["token"]["type"] == "dpop" and told["token"]["expires_in"] == 300
    assert set(told["token"]["scope"].split()) >= {"http:GET", "http:POST"} and "http:HEAD" not in told["token"]["scope"]
    assert told["narrow"] == "http:GET"
    assert (told["wide"], told["elsewhere"], told["unbound"]) == ("invalid_scope", "invalid_target", "invalid_request")

    said = told["validated"]
    assert (said["iss"], said["sub"], said["client_id"], said["aud"]) == (service.issuer, SHOP, SHOP, PAYMENTS)
    assert list(said["cnf"]) == ["jkt"]
    assert told["for_another"] and told["stolen"], "neither is validated"
    seen = told["seen"]
    assert (seen["active"], seen["token_type"], seen["sub"], seen["cnf"]) == (True, "DPoP", SHOP, said["cnf"])

    assert told["exchanged"] == {
        "type": "dpop",
        "issued": "urn:ietf:params:oauth:token-type:access_token",
        "scope": "http:POST",
    }
    acting = told["acting"]
    assert (acting["sub"], acting["client_id"], acting["aud"], acting["act"]) == (SHOP, PAYMENTS, BANK, {"sub": PAYMENTS})
    assert acting["exp"] <= said["exp"]
    assert told["revoked"] == told["revoked_with_it"] == {"active": False}
    assert told["exchange_of_revoked"] == "invalid_request"
    outside = told["outside"]
    assert (outside["type"], outside["scope"], outside["elsewhere"]) == ("dpop", "http:GET", "invalid_target")
    assert (outside["seen"]["active"], outside["seen"]["sub"], outside["seen"]["client_id"]) == (True, BILLING, BILLING)
    assert told["openid_client"] == {**told["openid_client"], "type": "dpop", "seen": True, "revoked": False}


def test_curl_gets_a_token_bound_to_the_certificate_that_it_shows_and_operators_see_and_revoke_it(service):
    if "shop" not in service.alive:
        service.svid("shop")
    status, metadata = service.curl("/.well-known/oauth-authorization-server")
    assert status == 200 and metadata["tls_client_certificate_bound_access_tokens"] is True
    ask = ("grant_type=client_credentials", f"client_id={SHOP}", "audience=payments", "scope=http:GET")
    status, given = service.curl("/token", *ask, service="shop")
    assert (status, given["token_type"], given["scope"]) == (200, "Bearer", "http:GET")
    shown = f"token={given['access_token']}"
    status, seen = service.curl("/introspect", f"client_id={SHOP}", shown, service="shop")
    assert seen["active"] and list(seen["cnf"]) == ["x5t#S256"]
    assert seen["jti"] in {one["id"] for one in service.asks("token", "list", "--subject", "shop")}

    assert service.curl("/token", *ask)[0] == 401, "without the certificate"
    status, refused = service.curl("/token", *ask, service="shop", headers=["DPoP: a", "DPoP: b"])
    assert (status, refused["error"]) == (400, "invalid_dpop_proof")
    service.asks("token", "revoke", "--id", seen["jti"], "--reason", "lost")
    assert service.curl("/introspect", f"client_id={SHOP}", shown, service="shop") == (200, {"active": False})
    # Nobody on the mesh hop takes it either: it names another issuer than sidecars believe.
    assert seen["iss"] == service.issuer != "https://foreign.example"

    # What was copied from the process is worth nothing once the process is gone.
    service.end("shop")
    for _ in range(100):
        try:
            refused = service.curl("/token", *ask, service="shop")[0] == 401
        except subprocess.CalledProcessError:
            refused = True  # in the handshake
        if refused:
            break
        time.sleep(0.1)
    assert refused
