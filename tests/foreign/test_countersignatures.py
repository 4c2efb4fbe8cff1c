"""A sealed mesh, signed by a passkey in a real Chromium, as an outsider checks it: the assertions in its ledger are verified by `fido2`
and the public key of the authenticator itself, the challenge is computed again here, and nothing is taken from our own code."""

import base64
import copy
import json
import shutil
import struct
import subprocess

import pytest
from browsers import Browser, Running, countersign
from conftest import BINARY
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_der_private_key
from fido2 import cbor
from fido2.cose import ES256
from fido2.webauthn import AuthenticatorData, CollectedClientData
from test_ledger import Refused, body, bundle_of, flipped, leaf_hash, ours, root_of, sha256, swap_entries, verify_export


def decoded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def encoded(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def challenge_of(anchor, signed, change_set):
    """The seven fields that a signature is over, each behind its length."""
    fields = (
        b"countersign/v1", anchor, signed["purpose"].encode(), struct.pack(">Q", signed["base"]),
        bytes.fromhex(signed["root"]), sha256(change_set), bytes.fromhex(signed["nonce"]),
    )
    return sha256(b"".join(struct.pack(">I", len(field)) + field for field in fields))


def verify_countersignatures(directory, entries, keys, origins):
    """Verifies each countersignature of the ledger; returns the indexes of the entries that have one. `keys` are those of the operators,
    by operator and credential, from the operators themselves."""
    leaves = [leaf_hash(entry) for entry in entries]
    enrols = next(n for n, entry in enumerate(entries) if b'"kind":"add_factor"' in body(directory, json.loads(entry)["digest"]))
    anchor = sha256(entries[enrols])
    signed_entries, quorum = [], 0
    for index, entry in enumerate(entries):
        said = json.loads(entry)
        change_set = body(directory, said["digest"])
        signers = set()
        for signed in said.get("countersignatures", []):
            key = keys.get((signed["operator"], signed["credential"]))
            if key is None:
                raise Refused("a key that no operator has")
            base = signed["base"]
            if base != json.loads(change_set)["base"] or base > index or root_of(leaves[:base]).hex() != signed["root"]:
                raise Refused("made on another history")
            if (signed["purpose"] == "step_up") != (signed["operator"] == said["actor"]):
                raise Refused("an author's and another's signature are not the same")
            client, authenticator = CollectedClientData(decoded(signed["client_data_json"])), AuthenticatorData(decoded(signed["authenticator_data"]))
            if client.type != CollectedClientData.TYPE.GET or client.origin not in origins:
                raise Refused("another ceremony, or another origin")
            if client.challenge != challenge_of(anchor, signed, change_set):
                raise Refused("over something else")
            if authenticator.rp_id_hash != sha256(b"localhost") or not authenticator.is_user_verified():
                raise Refused("for somebody else, or nobody was verified")
            try:
                key.verify(bytes(authenticator) + client.hash, decoded(signed["signature"]))
            except InvalidSignature as error:
                raise Refused("the signature does not verify") from error
            signers.add(signed["operator"])
        if len(signers) < quorum:
            raise Refused(f"entry {index} of a sealed mesh has {len(signers)} signatures")
        if signers:
            signed_entries.append(index)
        for change in json.loads(change_set)["changes"]:
            quorum = change["quorum"] if change["kind"] == "seal_settings" else quorum
    return anchor, signed_entries


class Sealed:
    """An export, and what an outsider knows beforehand: the log's key and the operator's public key."""

    def __init__(self, tmp_path):
        mesh, alice = Running(tmp_path), Browser(tmp_path, "alice")
        try:
            alice.enrols(mesh.told["enroll"], "alice")
            alice.signs_in(mesh.origin)
            before = mesh.revision()
            alice.signs(mesh.asks("guests-are-welcome", "alice")["url"])
            alice.until(lambda _: mesh.revision() == before + 1)
            config = mesh.directory / "mesh.toml"
            config.write_text("\n".join([config.read_text(), "[seal]", "quorum = 1", ""]))
            alice.signs(mesh.asks("guests-are-invited", "alice")["url"])
            alice.until(lambda _: mesh.revision() == before + 2)

            # From here on the command verifies, shows and serves the page itself.
            policy = mesh.directory / "policies/greeter.cedar"
            policy.write_text(policy.read_text().replace("guests-are-invited", "guests-are-expected"))
            unsigned = countersign(mesh.directory, "apply")
            assert unsigned.returncode == 3, unsigned
            home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
            words = [BINARY, "-C", mesh.directory, "-o", "json", "apply", "--sign"]
            applying = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=home)
            shown, url = "", None
            while url is None:
                line = applying.stderr.readline()
                assert line, shown
                shown += line
                url = next((word for word in line.split() if word.startswith("http://localhost:7449/")), None)
            alice.open(url)
            assert "guests-are-expected" in alice.text() and shown.split("digest")[-1].split()[0] in alice.text()
            alice.shot("sign")
            alice.find("#sign").click()
            answer, said = applying.communicate(timeout=60)
            assert applying.returncode == 0, said
            assert json.loads(answer)["revision"] == before + 3
            # A control plane that is asked to take an unsigned change refuses it as its agents would.
            assert countersign(mesh.directory, "operator", "invite", "mallory", "--operator", "alice").returncode == 3

            self.origins = (mesh.origin, "http://localhost:7449")
            self.directory = tmp_path / "ledger"
            # Taking the whole ledger along is sensitive: the gate asks for the key first.
            asked = countersign(mesh.directory, "ledger", "export", self.directory)
            assert asked.returncode == 3 and json.loads(asked.stdout)["act"] == "export_ledger", asked
            alice.open(json.loads(asked.stdout)["url"])
            alice.find("[data-do=act-key] button").click()
            alice.until(lambda _: "It is open" in alice.text())
            assert countersign(mesh.directory, "ledger", "export", self.directory).returncode == 0
            self.vkey = json.loads(countersign(mesh.directory, "authority", "show").stdout)["log_key"]
            [passkey] = alice.cdp("WebAuthn.getCredentials", authenticatorId=alice.authenticator)["credentials"]
            public = load_der_private_key(base64.b64decode(passkey["privateKey"]), None).public_key()
            self.key = ES256.from_cryptography_key(public)
            self.keys = {("alice", encoded(base64.b64decode(passkey["credentialId"]))): self.key}
        finally:
            alice.quit()
            mesh.stop()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return Sealed(tmp_path_factory.mktemp("sealed"))


def operators(sealed, tmp_path, key=None, anchor=None):
    """What our own verifier is told beforehand."""
    lines = [f"alice {encoded(cbor.encode(key or sealed.key))}"] + ([f"anchor {anchor.hex()}"] if anchor else [])
    file = tmp_path / "operators.txt"
    file.write_text("\n".join(lines) + "\n")
    return "--operators", file


def test_every_countersignature_holds_by_fido2_and_by_our_own_verifier(sealed, tmp_path):
    entries = verify_export(sealed.directory, sealed.vkey)
    anchor, signed = verify_countersignatures(sealed.directory, entries, sealed.keys, sealed.origins)
    assert signed == [len(entries) - 3, len(entries) - 2, len(entries) - 1], "two on the dashboard's page, one on the command's"
    said = ours(sealed.directory, sealed.vkey, *operators(sealed, tmp_path, anchor=anchor))
    assert said.returncode == 0 and "verified" in said.stdout, said
    said = ours(sealed.directory, sealed.vkey, *operators(sealed, tmp_path, anchor=sha256(b"another mesh")))
    assert said.returncode == 1, said
    other = dict(sealed.key)
    other[-2], other[-3] = other[-3], other[-2]
    said = ours(sealed.directory, sealed.vkey, *operators(sealed, tmp_path, key=other))
    assert said.returncode == 1, said


def last_signed(entry):
    return entry["countersignatures"][0]


def flip(field):
    def edit(entry, _):
        data = bytearray(decoded(last_signed(entry)[field]))
        data[-1] ^= 1
        last_signed(entry)[field] = encoded(bytes(data))

    return edit


def client_says(key, value):
    def edit(entry, _):
        client = json.loads(decoded(last_signed(entry)["client_data_json"]))
        client[key] = value
        last_signed(entry)["client_data_json"] = encoded(json.dumps(client).encode())

    return edit


def says(key, value):
    return lambda entry, _: last_signed(entry).__setitem__(key, value)


def unverified(entry, _):
    data = bytearray(decoded(last_signed(entry)["authenticator_data"]))
    data[32] &= ~4
    last_signed(entry)["authenticator_data"] = encoded(bytes(data))


# Of the last entry, whose signature was made on the command's own page. What is edited is the entry alone, so that no tree and no checkpoint
# says it first.
FORGED = {
    "another signature": flip("signature"),
    "another authenticator's data": flip("authenticator_data"),
    "another origin": client_says("origin", "https://evil.example"),
    "another ceremony": client_says("type", "webauthn.create"),
    "another challenge": client_says("challenge", encoded(sha256(b"something else"))),
    "another nonce": says("nonce", "00" * 32),
    "another purpose": says("purpose", "countersign"),
    "another operator": says("operator", "mallory"),
    "another credential": says("credential", encoded(b"mallory's key")),
    "another base": lambda entry, _: last_signed(entry).__setitem__("base", last_signed(entry)["base"] - 1),
    "another history": says("root", "00" * 32),
    "nobody verified": unverified,
    "no signature": lambda entry, _: entry.__setitem__("countersignatures", []),
    "the signature of another entry": lambda entry, before: entry.__setitem__("countersignatures", before["countersignatures"]),
    "another change": lambda entry, before: entry.__setitem__("digest", before["digest"]),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_countersignature_is_refused_by_fido2(sealed, case):
    entries = verify_export(sealed.directory, sealed.vkey)
    last, before = json.loads(entries[-1]), json.loads(entries[-2])
    forged = copy.deepcopy(last)
    FORGED[case](forged, before)
    assert forged != last
    entries[-1] = json.dumps(forged, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises((Refused, ValueError)):
        verify_countersignatures(sealed.directory, entries, sealed.keys, sealed.origins)


def edited(entry_edit):
    """Edits the last entry of an export, and makes its tile what the entry hashes to."""

    def edit(directory):
        path = bundle_of(directory)
        data, entries = path.read_bytes(), []
        while data:
            length = int.from_bytes(data[:2], "big")
            entries.append(data[2 : 2 + length])
            data = data[2 + length :]
        entry = json.loads(entries[-1])
        entry_edit(entry, json.loads(entries[-2]))
        entries[-1] = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        path.write_bytes(b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries))
        next((directory / "tile/0").rglob("*/*")).write_bytes(b"".join(leaf_hash(entry) for entry in entries))

    return edit


TAMPERED = {name: edited(edit) for name, edit in FORGED.items()} | {
    "two entries swapped": swap_entries,
    "a flipped byte": lambda directory: flipped(bundle_of(directory), 60),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_export_of_a_sealed_mesh_is_refused_here_and_by_countersign(sealed, tmp_path, case):
    directory = tmp_path / "ledger"
    shutil.copytree(sealed.directory, directory)
    TAMPERED[case](directory)
    with pytest.raises((Refused, ValueError, IndexError)):
        verify_export(directory, sealed.vkey)
    said = ours(directory, sealed.vkey, *operators(sealed, tmp_path))
    assert said.returncode == 1 and "does not hold" in said.stderr, said
