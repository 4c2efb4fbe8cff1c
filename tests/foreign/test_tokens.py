"""Access tokens with curl: as a stream that ends with its token, and in the hands of a thief who owns a host."""

import base64
import json
import subprocess
import time

import pytest
from conftest import Mesh
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from test_gate import countersign, directory  # noqa: F401 the fixture


def decoded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def pem(der, name="CERTIFICATE"):
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {name}-----\n{text}-----END {name}-----\n"


class Thief:
    """Whoever has read the identity of a host's agent: it asks control as the agent does, by gRPC that curl sends."""

    def __init__(self, place, scratch):
        self.run = json.loads((place / ".countersign/run.json").read_text())
        self.scratch = scratch
        kept = json.loads((place / ".countersign/agent/identity.json").read_text())
        self.agent = self.keep("agent", [decoded(der) for der in kept["chain"]], decoded(kept["key"]))

    def keep(self, name, chain, key_der):
        certificate, key = self.scratch / f"{name}.crt", self.scratch / f"{name}.key"
        certificate.write_text("".join(map(pem, chain)))
        key.write_text(pem(key_der, "PRIVATE KEY"))
        return ["--cert", certificate, "--key", key]

    def call(self, method, *fields):
        """One unary call; the fields of its answer, as protobuf numbers them."""
        message = b"".join(bytes([number << 3 | 2]) + varint(len(value)) + value for number, value in fields)
        body = self.scratch / "body"
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        url = f"{self.run['control']}/countersign.v1.Mesh/{method}"
        words = ["curl", "-sSk", "--http2", *self.agent, "-H", "content-type: application/grpc", "-H", "te: trailers"]
        answer = subprocess.run([*words, "--data-binary", f"@{body}", url], capture_output=True, check=True, timeout=30)
        assert answer.stdout, "the call failed"
        return read(answer.stdout[5:])

    def identity(self, instance):
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        chain = self.call("IssueX509Svid", (1, instance.encode()), (2, request.public_bytes(serialization.Encoding.DER)))
        chain = [value for number, value in chain if number == 1]
        key_der = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return chain[0], self.keep(instance.replace("/", "-"), chain, key_der)

    def tokens(self, instance, leaf):
        issued = self.call("IssueTokens", (1, instance.encode()), (3, leaf))
        tokens = [dict(read(value)) for number, value in issued if number == 1]
        return {token[1].decode(): token[2].decode() for token in tokens}

    def get(self, identity, token, service="greeter", path="/hello"):
        url = f"https://{self.run['services'][service]['inbound']}{path}"
        shown = ["-H", f"countersign-token: {token}"] if token else []
        words = ["curl", "-sSk", "--http2", *identity, *shown, "-H", f"host: {service}.mesh", "-w", "\n%{http_code}", url]
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
        body, status = answer.rsplit("\n", 1)
        return int(status), body


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def read(message):
    """The fields of a protobuf message of texts, bytes and numbers."""
    fields, at = [], 0

    def number():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            fields.append((tag >> 3, number()))
        else:
            length = number()
            fields.append((tag >> 3, message[at : at + length]))
            at += length
    return fields


def test_a_stolen_token_is_refused_and_takes_its_family_with_it(directory, tmp_path):  # noqa: F811
    thief = Thief(directory, tmp_path)
    leaf, web = thief.identity("web/stolen")
    tokens = thief.tokens("web/stolen", leaf)
    assert list(tokens) == ["greeter"], "what it declares as an upstream"
    header, claims, _ = tokens["greeter"].split(".")
    header, claims = json.loads(decoded(header)), json.loads(decoded(claims))
    assert (header["alg"], header["typ"]) == ("ES256", "at+jwt")
    certificate = x509.load_der_x509_certificate(leaf)
    assert decoded(claims["cnf"]["x5t#S256"]) == certificate.fingerprint(hashes.SHA256())
    assert claims["exp"] - claims["iat"] == 300
    assert thief.get(web, tokens["greeter"])[0] == 200, "its holder's key shows it"
    status, body = thief.get(web, None)
    assert (status, json.loads(body)["error"]) == (401, "token-missing")

    _, other = thief.identity("greeter/thief")
    status, body = thief.get(other, tokens["greeter"])
    assert (status, json.loads(body)["error"]) == (401, "token-refused")
    shown = json.loads(countersign(directory, "decision", "show", json.loads(body)["decision"]).stdout)["record"]
    assert shown["reason"] == "token_refused"
    assert (shown["inputs"]["token"]["fault"], shown["inputs"]["token"]["id"]) == ("another_key", claims["jti"])

    end = time.monotonic() + 30
    while thief.get(web, tokens["greeter"])[0] == 200:
        assert time.monotonic() < end, "its family lives on"
        time.sleep(0.05)
    listed = json.loads(countersign(directory, "token", "show", claims["jti"]).stdout)
    assert listed["revoked"] and listed["family"] == claims["family"]
    trail = (directory / ".countersign/audit.jsonl").read_text()
    assert "a stolen access token was shown" in trail and claims["jti"] in trail
    again = thief.tokens("web/stolen", leaf)["greeter"]
    assert thief.get(web, again)[0] == 200, "who is entitled to one gets another"
    hello = countersign(directory, "exec", "web", "--", "curl", "-s", "http://greeter.mesh/hello")
    assert "web" in hello.stdout, hello
    tokens_in_logs = subprocess.run(["grep", "-rl", tokens["greeter"], directory, directory.parent / "up.log"], capture_output=True)
    assert tokens_in_logs.returncode == 1, tokens_in_logs.stdout


@pytest.fixture
def demanding(tmp_path, database):
    mesh = Mesh(tmp_path, database, tokens="required")
    yield mesh
    mesh.stop()


def until_it_answers(mesh):
    end = time.monotonic() + 20
    while mesh.exec("client", "curl", "-sf", "http://web.mesh/", check=False).returncode != 0:
        assert time.monotonic() < end, "it never gets a token"
        time.sleep(0.05)


def test_a_stream_ends_with_the_token_that_it_was_permitted_with_and_the_next_request_has_another(demanding):
    mesh = demanding
    until_it_answers(mesh)
    listed = json.loads(mesh.command("-o", "json", "token", "list", "--subject", "client").stdout)
    assert {token["service"] for token in listed} == {"web", "greeter", "chat", "db"}
    stream = mesh.start("client", "curl", "-sSN", "http://web.mesh/events")
    assert "data: 0" in stream.stdout.readline()
    revoked = mesh.command("token", "revoke", "--subject", "client", "--reason", "its key may be known")
    assert "enforced: all" in revoked.stdout
    assert stream.wait(20) != 0, "it does not look whole"
    until_it_answers(mesh)
    seen = json.loads(mesh.exec("client", "curl", "-s", "-H", "countersign-token: mine", "http://web.mesh/").stdout)
    assert not [name for name in seen["headers"] if "token" in name], "no application sees one"
