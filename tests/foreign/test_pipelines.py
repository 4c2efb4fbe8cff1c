"""Jobs of a CI system, with tokens that joserfc signs (RFC 7515, 7517), shaped as GitHub and GitLab document theirs, and the way in
which GitHub hands them to a job."""

import base64
import hmac
import http.server
import json
import os
import subprocess
import threading
import time
import urllib.parse
import uuid

import pytest
from joserfc import jwk, jws, jwt

from conftest import BINARY
from test_gate import code, countersign, directory  # noqa: F401

AUDIENCE = "countersign:mesh.example"
REQUEST_SECRET = "the-secret-of-the-job"


class Issuer:
    """A provider on loopback: discovery, its keys, and GitHub's way of asking for a token."""

    def __init__(self):
        self.keys = {
            "ES256": jwk.ECKey.generate_key("P-256", {"kid": "es", "use": "sig"}),
            "RS256": jwk.RSAKey.generate_key(2048, {"kid": "rs", "use": "sig"}),
            "PS256": jwk.RSAKey.generate_key(2048, {"kid": "ps", "use": "sig"}),
            "EdDSA": jwk.OKPKey.generate_key("Ed25519", {"kid": "ed", "use": "sig"}),
        }
        self.issued = []
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                at = urllib.parse.urlparse(self.path)
                if at.path == "/.well-known/openid-configuration":
                    answer = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/jwks", "id_token_signing_alg_values_supported": list(issuer.keys)}
                elif at.path == "/jwks":
                    answer = {"keys": [key.as_dict(private=False) for key in issuer.keys.values()]}
                elif at.path == "/token" and self.headers["Authorization"] == f"Bearer {REQUEST_SECRET}":
                    audience = urllib.parse.parse_qs(at.query)["audience"][0]
                    issuer.issued.append(audience)
                    answer = {"count": 1, "value": issuer.sign("RS256", {**issuer.github(), "aud": audience})}
                else:
                    self.send_error(403)
                    return
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def common(self):
        now = int(time.time())
        return {"iss": self.url, "aud": AUDIENCE, "iat": now, "nbf": now - 5, "exp": now + 300, "jti": str(uuid.uuid4())}

    def github(self):
        """As docs.github.com, "OpenID Connect reference", shows it."""
        return self.common() | {
            "sub": "repo:octo-org/octo-repo:environment:prod", "environment": "prod", "ref": "refs/heads/main",
            "sha": "example-sha", "repository": "octo-org/octo-repo", "repository_owner": "octo-org", "actor_id": "12",
            "repository_visibility": "private", "repository_id": "74", "repository_owner_id": "65", "run_id": "example-run-id",
            "run_number": "10", "run_attempt": "2", "runner_environment": "github-hosted", "actor": "octocat",
            "workflow": "example-workflow", "head_ref": "", "base_ref": "", "event_name": "workflow_dispatch",
            "enterprise": "avocado-corp", "ref_type": "branch",
            "job_workflow_ref": "octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
        }

    def gitlab(self):
        """As docs.gitlab.com, "OpenID Connect (OIDC) authentication using ID tokens", shows it."""
        return self.common() | {
            "namespace_id": "72", "namespace_path": "my-group", "project_id": "20", "project_path": "my-group/my-project",
            "user_id": "1", "user_login": "sample-user", "user_email": "sample-user@example.com", "user_identities": [
                {"provider": "github", "extern_uid": "2435223452345"}],
            "pipeline_id": "574", "pipeline_source": "push", "job_id": "302", "ref": "feature-branch-1", "ref_type": "branch",
            "ref_path": "refs/heads/feature-branch-1", "ref_protected": "false", "groups_direct": ["mygroup/mysubgroup"],
            "environment": "test-environment2", "environment_protected": "false", "deployment_tier": "testing",
            "runner_id": 1, "runner_environment": "self-hosted", "sha": "714a629c0b401fdce83e847fc9589983fc6f46bc",
            "project_visibility": "public", "sub": "project_path:my-group/my-project:ref_type:branch:ref:feature-branch-1",
        }

    def sign(self, algorithm, claims, **header):
        key = self.keys[algorithm]
        return jwt.encode({"alg": algorithm, "kid": key.kid, "typ": "JWT"} | header, claims, key, algorithms=[algorithm])

    def mesh_toml(self):
        return f"""
[issuers.ci]
url = "{self.url}"
audience = "{AUDIENCE}"

[pipelines.github]
issuer = "ci"
claims = {{ repository_id = "74", environment = "prod" }}

[pipelines.gitlab]
issuer = "ci"
claims = {{ project_id = "20", ref_protected = "false" }}
"""


class World:
    def __init__(self, directory, issuer, secret, step):
        self.directory, self.issuer, self.secret, self.step = directory, issuer, secret, step
        self.run = json.loads((directory / ".countersign/run.json").read_text())

    def propose(self, token=None, *more, environment=None, start=False):
        """What a job runs: nothing of the operator's machine is in its environment."""
        words = [BINARY, "-o", "json", "propose", self.directory, "--ci", "--control", self.run["pipelines"], *more]
        given = {"PATH": os.environ["PATH"]} | ({"COUNTERSIGN_ID_TOKEN": token} if token else {}) | (environment or {})
        if start:
            return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
        return subprocess.run(words, capture_output=True, text=True, timeout=60, env=given)

    def otp(self):
        """A code that was not used yet: the app's next one, once its time has come."""
        self.step = max(self.step + 1, int(time.time()) // 30)
        # The step after the one of now is accepted as well.
        while int(time.time()) // 30 + 1 < self.step:
            time.sleep(0.5)
        return code(self.secret, self.step)

    def edit(self, old, new):
        policy = self.directory / "policies/greeter.cedar"
        text = policy.read_text()
        assert old in text
        policy.write_text(text.replace(old, new))


@pytest.fixture
def world(tmp_path, directory):  # noqa: F811
    issuer = Issuer()
    mesh = directory / "mesh.toml"
    mesh.write_text(mesh.read_text() + issuer.mesh_toml())
    applied = countersign(directory, "apply")
    assert applied.returncode == 0, applied
    words = [BINARY, "-C", directory, "-o", "json", "operator", "enroll", "--totp", "--operator", "alice"]
    enrol = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    query = urllib.parse.parse_qs(urllib.parse.urlparse(json.loads(enrol.stdout.readline())["otpauth"]).query)
    encoded = query["secret"][0]
    secret = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
    step = int(time.time()) // 30
    enrol.communicate(code(secret, step) + "\n", timeout=60)
    assert enrol.returncode == 0
    return World(directory, issuer, secret, step)


def test_a_job_of_github_waits_for_a_countersignature_and_exactly_that_is_applied_once(world):
    world.edit("guests-are-greeted", "guests-are-welcome")
    github = {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{world.issuer.url}/token?api-version=2.0",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": REQUEST_SECRET,
    }
    # First without waiting: the answer of the gate, exit code 3.
    waits = world.propose(None, "--audience", AUDIENCE, environment=github)
    refusal = json.loads(waits.stdout)
    assert waits.returncode == 3 and refusal["outcome"] == "needs_countersign", waits
    assert world.issuer.issued == [AUDIENCE]

    # Run again, with --wait: it is the same pending change.
    job = world.propose(None, "--audience", AUDIENCE, "--wait", "2m", environment=github, start=True)
    time.sleep(2)
    assert job.poll() is None
    pending = json.loads(countersign(world.directory, "change", "list", "--pending").stdout)
    assert [change["id"] for change in pending] == [refusal["change"]]
    author = pending[0]["author"]
    assert author["name"] == "github" and "repository=octo-org/octo-repo" in author["claims"], author
    countersigned = countersign(world.directory, "change", "countersign", refusal["change"], "--otp", world.otp())
    assert countersigned.returncode == 0, countersigned
    out, err = job.communicate(timeout=60)
    applied = json.loads(out)
    assert job.returncode == 0 and applied["outcome"] == "applied", (out, err)
    assert applied["digest"] == refusal["digest"]
    changes = json.loads(countersign(world.directory, "change", "list").stdout)
    assert (changes[0]["actor"], changes[0]["digest"]) == ("pipeline:github", refusal["digest"])
    again = world.propose(None, "--audience", AUDIENCE, environment=github)
    assert again.returncode == 0 and json.loads(again.stdout)["outcome"] == "unchanged", again


def test_a_job_of_gitlab_plans_again_when_another_change_came_first(world):
    world.edit("guests-are-greeted", "guests-are-welcome")
    job = world.propose(world.issuer.sign("RS256", world.issuer.gitlab()), "--wait", "3m", start=True)
    end = time.monotonic() + 30
    while not (pending := json.loads(countersign(world.directory, "change", "list", "--pending").stdout)):
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.2)
    first = pending[0]["id"]
    invited = countersign(world.directory, "operator", "invite", "bob", "--roles", "editor", "--otp", world.otp())
    assert invited.returncode == 0, invited
    while True:
        pending = json.loads(countersign(world.directory, "change", "list", "--pending").stdout)
        waiting = [change["id"] for change in pending if change["state"]["state"] == "needs_countersign"]
        if waiting:
            break
        assert time.monotonic() < end + 30 and job.poll() is None, job.communicate()
        time.sleep(0.2)
    assert waiting != [first]
    countersigned = countersign(world.directory, "change", "countersign", waiting[0], "--operator", "alice", "--otp", world.otp())
    assert countersigned.returncode == 0, countersigned
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and json.loads(out)["outcome"] == "applied", (out, err)
    assert "a new countersignature is needed" in err.replace("\n", " "), err


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "PS256", "EdDSA"])
def test_each_algorithm_of_another_make_is_verified(world, algorithm):
    world.edit("guests-are-greeted", "guests-are-welcome")
    waits = world.propose(world.issuer.sign(algorithm, world.issuer.gitlab()))
    assert waits.returncode == 3 and json.loads(waits.stdout)["outcome"] == "needs_countersign", waits


def test_tokens_of_somebody_else_propose_nothing(world):
    world.edit("guests-are-greeted", "guests-are-welcome")
    issuer, now = world.issuer, int(time.time())
    stranger = Issuer()
    stranger.url = issuer.url
    good = issuer.github()
    public = issuer.keys["RS256"].as_pem(private=False)
    # joserfc itself refuses to do this.
    parts = [json.dumps({"alg": "HS256", "kid": "rs"}).encode(), json.dumps(good).encode()]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    tag = base64.urlsafe_b64encode(hmac.digest(public, signed, "sha256")).rstrip(b"=")
    mac = (signed + b"." + tag).decode()
    unsigned = jws.serialize_compact({"alg": "none"}, json.dumps(good), jwk.OctKey.generate_key(256), algorithms=["none"])
    brought = stranger.keys["ES256"]
    for case, token, said in [
        ("another's key of the same name", stranger.sign("ES256", good), "none of its issuer's keys"),
        ("a key in the header", stranger.sign("ES256", good, jwk=brought.as_dict(private=False)), "none of its issuer's keys"),
        ("a MAC with the public key", mac, "`alg` is `HS256`"),
        ("unsigned", unsigned, "`alg` is `none`"),
        ("a key of another algorithm", issuer.sign("RS256", good, kid="es"), "none of its issuer's keys"),
        ("expired", issuer.sign("ES256", good | {"iat": now - 900, "nbf": now - 900, "exp": now - 100}), "it has expired"),
        ("of the future", issuer.sign("ES256", good | {"iat": now + 600}), "in the future"),
        ("for somebody else", issuer.sign("ES256", good | {"aud": "https://github.com/octo-org"}), "it is meant for"),
        ("for several", issuer.sign("ES256", good | {"aud": [AUDIENCE, "sts.amazonaws.com"]}), "it is meant for"),
        ("too long", issuer.sign("ES256", good | {"more": "x" * 16384}), "is no token"),
        ("the name, registered anew", issuer.sign("ES256", good | {"repository_id": "75"}), "of no pipeline"),
    ]:
        refused = world.propose(token)
        assert refused.returncode in (1, 3) and said in refused.stderr, (case, refused)
    assert json.loads(countersign(world.directory, "change", "list", "--pending").stdout) == []
    # The token stands nowhere in what the control plane keeps.
    token = issuer.sign("ES256", issuer.github())
    assert world.propose(token).returncode == 3
    for kept in (world.directory / ".countersign").glob("control.db*"):
        assert token.encode() not in kept.read_bytes(), kept
