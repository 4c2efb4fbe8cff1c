"""An authority above that is not ours: OpenSSL signs the key that signs the mesh's intermediates, and verifies what is shown on the wire."""

import json
import re
import subprocess
import threading
import time

import pytest

from conftest import Mesh

ROOT = "[ext]\nbasicConstraints = critical, CA:TRUE{}\nkeyUsage = critical, keyCertSign, cRLSign\n"


@pytest.fixture
def own(tmp_path):
    mesh = Mesh(tmp_path, None)
    yield mesh
    mesh.stop()


def openssl(*words, check=True, **more):
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, **more)
    assert not check or done.returncode == 0, done.stderr
    return done


class Above:
    """A certificate authority of OpenSSL's in a directory; its key is RSA, as that of many."""

    def __init__(self, directory, name):
        self.directory, self.certificate, self.key = directory, directory / f"{name}.pem", directory / f"{name}.key"
        subject = f"/C=DE/O=Foreign/CN={name}"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", subject, "-keyout", self.key,
                "-out", self.certificate, "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def sign(self, request, limits=", pathlen:1", days=365, more=""):
        """The chain that answers a request: what was signed, and the root."""
        extensions = self.directory / "extensions"
        extensions.write_text(ROOT.format(limits) + more)
        signed = openssl("x509", "-req", "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial", "-days", days,
                         "-extfile", extensions, "-extensions", "ext", input=request)
        return signed.stdout + self.certificate.read_text()


def accept(mesh, chain, check=True):
    file = mesh.directory / "chain.pem"
    file.write_text(chain)
    return mesh.command("authority", "accept", "--chain", file, check=check)


def shown(mesh, service):
    """The chain on the wire, leaf first."""
    inbound = mesh.run["services"][service]["inbound"]
    said = openssl("s_client", "-connect", inbound, "-alpn", "h2", "-showcerts", check=False, input="", timeout=20).stdout
    chain = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", said, re.DOTALL)
    return list(dict.fromkeys(chain))


def verifies(mesh, chain, root):
    (mesh.directory / "leaf.pem").write_text(chain[0])
    (mesh.directory / "between.pem").write_text("".join(chain[1:]))
    done = openssl("verify", "-x509_strict", "-no-CApath", "-no-CAstore", "-CAfile", root, "-untrusted",
                   mesh.directory / "between.pem", mesh.directory / "leaf.pem", check=False)
    return done.returncode == 0, done.stdout + done.stderr


def until(what, so, within=30):
    end = time.monotonic() + within
    while not (found := so()):
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.2)
    return found


class Asking(threading.Thread):
    """Requests, one after the other, until told to stop."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh, self.answers, self.ends = mesh, [], threading.Event()
        self.start()

    def run(self):
        while not self.ends.is_set():
            done = self.mesh.exec("client", "curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "http://web.mesh/a", check=False)
            self.answers.append(done.stdout)

    def some_more(self):
        enough = len(self.answers) + 5
        until("some more are answered", lambda: len(self.answers) >= enough)

    def stop(self):
        self.ends.set()
        self.join()
        assert set(self.answers) == {"200"}, self.answers


def test_openssl_takes_over_while_requests_run_and_renews_and_openssl_verifies_what_is_shown(own, tmp_path):
    above = Above(tmp_path, "offline")
    before = tmp_path / "before.pem"
    before.write_text(json.loads(own.command("-o", "json", "authority", "show").stdout)["bundle_pem"])
    asking = Asking(own)
    try:
        asking.some_more()
        request = own.command("authority", "request").stdout
        assert openssl("req", "-verify", "-noout", "-text", input=request).stdout.count("URI:spiffe://foreign.example") == 1
        assert "prepared: root 2" in accept(own, above.sign(request)).stdout
        until("every host holds it", lambda: "active: root 2" in own.command("authority", "activate", "2", check=False).stdout)
        asking.some_more()
        own.command("authority", "taint", "1")
        chain = until("the new chain is shown", lambda: (found := shown(own, "web")) and verifies(own, found, above.certificate)[0] and found)
        # The last is the same intermediate as the old root certifies it: OpenSSL takes the first of one name, and tries no other.
        assert len(chain) == 4 and verifies(own, [chain[0], chain[-1]], before)[0], "both roots lead to it"
        asking.some_more()
        assert "replaced: what signs below root 2" in accept(own, above.sign(own.command("authority", "request").stdout)).stdout
        asking.some_more()
        held = lambda: {one["id"] for one in json.loads(own.command("-o", "json", "identity", "list", "--authority", "2").stdout)}
        until("everybody has an identity of it", lambda: len(held()) >= 6)
        asking.some_more()
        assert "revoked: root 1" in own.command("authority", "revoke", "1", "--force").stdout
        asking.some_more()
        own.command("identity", "revoke", "--id", "spiffe://foreign.example/web", "--reason", "copied")
        chain = until("the next one is shown", lambda: (found := shown(own, "web")) and len(found) == 3 and found)
        good, said = verifies(own, chain, above.certificate)
        assert good, said
        assert not verifies(own, chain, before)[0]
    finally:
        asking.stop()
    bundle = json.loads(own.command("-o", "json", "authority", "show").stdout)["bundle_pem"]
    pem = lambda text: re.sub(r"\s", "", text)
    assert pem(bundle) == pem(above.certificate.read_text()), "the bundle carries the root of the authority above alone"


def test_what_openssl_signed_otherwise_than_asked_is_refused_with_what_to_do(own, tmp_path):
    above, other = Above(tmp_path, "offline"), Above(tmp_path, "other")
    request = own.command("authority", "request").stdout
    assert own.command("authority", "request").stdout == request, "it waits for its answer"
    foreign = openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "their.key", "-subj", "/CN=theirs").stdout
    good = above.sign(request)
    first, second = re.findall(r"-----BEGIN.*?-----END CERTIFICATE-----\n", good, re.DOTALL)
    for chain, said in [
        (above.sign(foreign), "no certificate of the chain is of the key that was asked for"),
        (above.sign(request, limits=", pathlen:0"), "allows 0 signing certificates below it, and 1 are there"),
        (above.sign(request).replace(second, other.certificate.read_text()), "is followed by `C=DE, O=Foreign, CN=other`"),
        (second + first, "is number 2 of the chain, and has to be the first"),
        (first, "the chain has 1 certificates"),
        (above.sign(request, days=2), "too soon"),
        (above.sign(request, days=0), "expired on"),
        (above.sign(request, more="nameConstraints = critical, permitted;URI:foreign.example\n"), "constrains names by URIs"),
        (above.sign(request, more="subjectAltName = URI:spiffe://elsewhere.example\n"), "names `spiffe://elsewhere.example`"),
        (good + (tmp_path / "their.key").read_text(), "holds a private key, and none of it was sent"),
        ("nothing", "the chain has 0 certificates"),
    ]:
        refused = accept(own, chain, check=False)
        assert refused.returncode != 0 and said in refused.stderr and "help:" in refused.stderr, refused.stderr
    leaf = openssl("x509", "-req", "-CA", above.certificate, "-CAkey", above.key, "-CAcreateserial", "-days", "30", input=request).stdout
    refused = accept(own, leaf + above.certificate.read_text(), check=False)
    assert "it says no CA:TRUE" in refused.stderr, refused.stderr
    assert [one["state"] for one in json.loads(own.command("-o", "json", "authority", "show").stdout)["roots"]] == ["active"]
    assert "prepared: root 2" in accept(own, good).stdout
