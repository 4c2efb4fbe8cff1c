"""Which authenticators a Chromium may enrol where the mesh names the models. What a virtual one shows for its model is a packed
attestation with a certificate that its own key signed (Web Authentication, 8.2)."""

import base64
import datetime
import json
import re

from browsers import Running, countersign
from conftest import ROOT
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

CHROMIUM = "01020304-0506-0708-0102-030405060708"
OTHER = "ee882879-721c-4913-9775-3dfcce97072a"
UNUSED = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign",
          "encipher_only", "decipher_only"]
EXAMPLE = (ROOT / "crates/core/tests/mesh/mesh.toml").read_text()


def factors(model, pem):
    return f'[factors]\nauthenticators = ["{model}"]\nattestation_roots = """\n{pem}"""\n'


def maker_of(leaf):
    """A root of the name and key that signed `leaf`: a trust anchor is a name and a key, whoever signed its certificate."""
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder(issuer_name=leaf.issuer, subject_name=leaf.issuer, public_key=leaf.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, **dict.fromkeys(UNUSED, False)), critical=True)
    )
    signed = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def test_a_passkey_is_made_where_the_authenticator_proves_to_be_of_a_model_that_may_be_enrolled(tmp_path, browser):
    others = re.search(r"-----BEGIN.*?-----END CERTIFICATE-----\n", EXAMPLE, re.S)[0]
    mesh = Running(tmp_path, more=f"\n{factors(OTHER, others)}")
    plain = (mesh.directory / "mesh.toml").read_text().split("[factors]")[0]
    alice = browser("alice")

    def asks():
        alice.open(f"{mesh.origin}/sign-in")
        alice.open(mesh.told["enroll"])
        alice.driver.execute_script("const real = create; create = async (o) => (window.made = await real(o))")
        alice.find("[data-do=enroll-key] [name=operator]").send_keys("alice")
        alice.find("[data-do=enroll-key] [value=platform]").click()

    def lists(model, pem):
        (mesh.directory / "mesh.toml").write_text(plain + factors(model, pem))
        applied = countersign(mesh.directory, "apply")
        assert applied.returncode == 0, applied.stderr

    try:
        asks()
        alice.until(lambda _: "nobody whom the mesh believes vouches for this authenticator" in alice.text())
        assert f"begin again with one that may be enrolled, and let the browser show its make and model: {OTHER}" in alice.text()
        alice.shot("enroll-of-another-model")
        shown = alice.driver.execute_script("return window.made.response.attestationObject")
        shown = base64.urlsafe_b64decode(shown + "==")
        at = shown.index(b"\x63x5c\x81\x59") + 6
        leaf = shown[at + 2 : at + 2 + int.from_bytes(shown[at : at + 2])]
        chromiums = maker_of(x509.load_der_x509_certificate(leaf))

        lists(OTHER, chromiums)
        asks()
        alice.until(lambda _: "an authenticator of this model may not be enrolled" in alice.text())
        assert not json.loads(countersign(mesh.directory, "status").stdout)["protected"]

        lists(CHROMIUM, chromiums)
        asks()
        alice.until(lambda _: "Enrolled" in alice.text())
        listed = json.loads(countersign(mesh.directory, "factor", "list").stdout)
        assert [factor["model"] for factor in listed if factor["signs"]] == [CHROMIUM]
        alice.signs_in(mesh.origin)
        alice.open(f"{mesh.origin}/account")
        assert CHROMIUM in alice.text()
        assert alice.complaints() == []
    finally:
        mesh.stop()
