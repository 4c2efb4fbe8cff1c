"""A ledger as an outsider checks it: RFC 6962 and C2SP notes written again here, with hashlib and Ed25519 of `cryptography`."""

import base64
import hashlib
import json
import os
import shutil
import struct
import subprocess

import pytest
from conftest import BINARY, ROOT
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Refused(Exception):
    """What is not to be believed, and why."""


def sha256(data):
    return hashlib.sha256(data).digest()


def leaf_hash(entry):
    return sha256(b"\0" + entry)


def node_hash(left, right):
    return sha256(b"\1" + left + right)


def root_of(leaves):
    """MTH of RFC 6962, 2.1, as it is written there."""
    if not leaves:
        return sha256(b"")
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return node_hash(root_of(leaves[:split]), root_of(leaves[split:]))


def verify_inclusion(proof, leaf, index, size, root):
    """RFC 9162, 2.1.3.2."""
    if index >= size:
        raise Refused("beyond the tree")
    fn, sn, found = index, size - 1, leaf
    for sibling in proof:
        if sn == 0:
            raise Refused("a proof that is too long")
        if fn & 1 or fn == sn:
            found = node_hash(sibling, found)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = node_hash(found, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn or found != root:
        raise Refused("it does not lead to the root")


def verify_consistency(proof, first, first_root, second, second_root):
    """RFC 9162, 2.1.4.2."""
    if first == second:
        if proof or first_root != second_root:
            raise Refused("one size, two roots")
        return
    if first == 0:
        if proof:
            raise Refused("nothing needs no proof")
        return
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    if not path:
        raise Refused("no proof")
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    old = new = path[0]
    for step in path[1:]:
        if sn == 0:
            raise Refused("a proof that is too long")
        if fn & 1 or fn == sn:
            old, new = node_hash(step, old), node_hash(step, new)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            new = node_hash(new, step)
        fn, sn = fn >> 1, sn >> 1
    if sn or old != first_root or new != second_root:
        raise Refused("it does not lead from one root to the other")


def verify_note(note, vkey):
    """C2SP signed-note: the text, if the key of `vkey` signed it."""
    name, key_id, encoded = vkey.split("+", 2)
    kind_and_key = base64.b64decode(encoded, validate=True)
    if sha256(name.encode() + b"\n" + kind_and_key)[:4].hex() != key_id:
        raise Refused("the key's id is another's")
    text, separator, lines = note.rpartition("\n\n")
    if not separator:
        raise Refused("no signatures")
    text += "\n"
    public = Ed25519PublicKey.from_public_bytes(kind_and_key[1:])
    for line in lines.splitlines():
        dash, signer, signature = line.split(" ")
        signature = base64.b64decode(signature, validate=True)
        if dash != "\u2014" or signer != name or signature[:4].hex() != key_id:
            continue
        message, signature = text.encode(), signature[4:]
        if kind_and_key[0] == 4:  # C2SP tlog-cosignature: a time is signed, too
            (seconds,), signature = struct.unpack(">Q", signature[:8]), signature[8:]
            message = f"cosignature/v1\ntime {seconds}\n".encode() + message
        try:
            public.verify(signature, message)
        except InvalidSignature as error:
            raise Refused("the signature does not verify") from error
        return text
    raise Refused("not signed by this key")


def checkpoint_of(text):
    origin, size, root = text.splitlines()[:3]
    return origin, int(size), base64.b64decode(root, validate=True)


def tile_path(prefix, index, width):
    parts = [f"{index % 1000:03}"]
    while index >= 1000:
        index //= 1000
        parts.insert(0, f"x{index % 1000:03}")
    return f"tile/{prefix}/{'/'.join(parts)}" + (f".p/{width}" if width < 256 else "")


def verify_export(directory, vkey):
    """Everything that can be recomputed without knowing what a change means; returns the entries."""
    origin, size, root = checkpoint_of(verify_note((directory / "checkpoint").read_text(), vkey))
    if origin != vkey.split("+")[0]:
        raise Refused("another log")
    entries, leaves = [], []
    for bundle in range((size + 255) // 256):
        width = min(256, size - bundle * 256)
        path = directory / tile_path("entries", bundle, width)
        data = path.read_bytes() if path.exists() else b""
        for _ in range(width):
            length = int.from_bytes(data[:2], "big")
            entry, data = data[2 : 2 + length], data[2 + length :]
            if len(entry) != length or not length:
                raise Refused("a bundle is cut short")
            entries.append(entry)
        if data:
            raise Refused("a bundle holds too much")
        leaves = [leaf_hash(entry) for entry in entries]
        if (directory / tile_path(0, bundle, width)).read_bytes() != b"".join(leaves[bundle * 256 :]):
            raise Refused("a tile is not what its entries hash to")
    if root_of(leaves) != root:
        raise Refused("the entries are not those that were signed")
    for index, entry in enumerate(entries):
        said = json.loads(entry)
        if said["index"] != index:
            raise Refused(f"entry {index} says another index")
        change_set = body(directory, said["digest"])
        for change in json.loads(change_set)["changes"]:
            for digest in digests_in(change):
                body(directory, digest)
    return entries


def digests_in(change):
    """The texts that a change refers to, wherever it says `body`."""
    if isinstance(change, dict):
        for key, value in change.items():
            if key == "body" and isinstance(value, str):
                yield value
            else:
                yield from digests_in(value)


def body(directory, digest):
    path = directory / "body" / digest[:2] / digest
    data = path.read_bytes() if path.exists() else b""
    if sha256(data).hex() != digest:
        raise Refused(f"body {digest[:12]} does not hash to its name")
    return data


@pytest.fixture(scope="module")
def exported(mesh, tmp_path_factory):
    """An export of a ledger with some history, and the log's key, learnt from the control plane's own machine."""
    mesh.forbid("web")
    mesh.permit("web")
    directory = tmp_path_factory.mktemp("export") / "ledger"
    mesh.command("ledger", "export", directory)
    vkey = json.loads(mesh.command("-o", "json", "authority", "show").stdout)["log_key"]
    return directory, vkey


def ours(directory, vkey, *more):
    return subprocess.run(
        [BINARY, "ledger", "verify", "--offline", directory, "--log-key", vkey, *more], capture_output=True, text=True, timeout=60, cwd="/"
    )


def test_an_export_is_what_its_log_signed(exported):
    directory, vkey = exported
    entries = verify_export(directory, vkey)
    assert len(entries) >= 3
    said = ours(directory, vkey)
    assert said.returncode == 0 and f"verified: {len(entries)} entries of countersign/foreign.example" in said.stdout, said


def test_proofs_of_entries_and_of_growth_hold_by_rfc_9162(mesh, exported):
    directory, vkey = exported
    entries = verify_export(directory, vkey)
    leaves = [leaf_hash(entry) for entry in entries]
    for index, entry in enumerate(entries):
        proof = mesh.command("ledger", "prove", index).stdout
        head, note = proof.split("\n\n", 1)
        header, said, *hashes = head.splitlines()
        assert (header, said) == ("c2sp.org/tlog-proof@v1", f"index {index}")
        _, size, root = checkpoint_of(verify_note(note, vkey))
        hashes = [base64.b64decode(line, validate=True) for line in hashes]
        verify_inclusion(hashes, leaf_hash(entry), index, size, root)
        for wrong in (entry[:-1] + b" ", entry + b"\n"):
            with pytest.raises(Refused):
                verify_inclusion(hashes, leaf_hash(wrong), index, size, root)
        for other in {index + 1, size - 1 - index} - {index}:
            with pytest.raises(Refused):
                verify_inclusion(hashes, leaf_hash(entry), other, size, root)
    for old in range(1, len(entries) + 1):
        head, note = mesh.command("ledger", "prove", "--from", old).stdout.split("\n\n", 1)
        first, *hashes = head.splitlines()
        hashes = [base64.b64decode(line, validate=True) for line in hashes]
        _, size, root = checkpoint_of(verify_note(note, vkey))
        assert first == f"old {old}"
        verify_consistency(hashes, old, root_of(leaves[:old]), size, root)
        with pytest.raises(Refused):
            verify_consistency(hashes, old, sha256(b"another history"), size, root)


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def largest_body(directory):
    return max((directory / "body").glob("*/*"), key=lambda path: path.stat().st_size)


def bundle_of(directory):
    return next((directory / "tile/entries").rglob("*/*"))


def tile_of(directory):
    return next((directory / "tile/0").rglob("*/*"))


def swap_entries(directory):
    path = bundle_of(directory)
    data = path.read_bytes()
    first = 2 + int.from_bytes(data[:2], "big")
    second = first + 2 + int.from_bytes(data[first : first + 2], "big")
    path.write_bytes(data[first:second] + data[:first] + data[second:])


def drop_entry(directory):
    path = bundle_of(directory)
    data = path.read_bytes()
    path.write_bytes(data[2 + int.from_bytes(data[:2], "big") :])


def edit_checkpoint(old, new):
    def edit(directory):
        path = directory / "checkpoint"
        lines = path.read_text().split("\n")
        lines[old] = new(lines[old])
        path.write_text("\n".join(lines))

    return edit


TAMPERED = {
    "a flipped byte in an entry": lambda d: flipped(bundle_of(d), 40),
    "two entries swapped": swap_entries,
    "a missing entry": drop_entry,
    "a bundle cut short": lambda d: bundle_of(d).write_bytes(bundle_of(d).read_bytes()[:-1]),
    "no bundle": lambda d: bundle_of(d).unlink(),
    "an edited body": lambda d: flipped(largest_body(d), 5),
    "no body": lambda d: largest_body(d).unlink(),
    "a tile cut short": lambda d: tile_of(d).write_bytes(tile_of(d).read_bytes()[:-32]),
    "an altered tile": lambda d: flipped(tile_of(d), 7),
    "another root": edit_checkpoint(2, lambda _: base64.b64encode(sha256(b"forged")).decode()),
    "a larger size": edit_checkpoint(1, lambda size: str(int(size) + 1)),
    "a smaller size": edit_checkpoint(1, lambda size: str(int(size) - 1)),
    "another origin": edit_checkpoint(0, lambda _: "countersign/other.example"),
    "no signature": edit_checkpoint(4, lambda _: ""),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_export_is_refused_here_and_by_countersign(exported, tmp_path, case):
    directory, vkey = exported
    copy = tmp_path / "ledger"
    shutil.copytree(directory, copy)
    TAMPERED[case](copy)
    with pytest.raises((Refused, ValueError, IndexError)):
        verify_export(copy, vkey)
    said = ours(copy, vkey)
    assert said.returncode == 1 and "does not hold" in said.stderr, said


def test_the_commands_that_check_it_by_hand_are_those_of_the_document(exported, tmp_path):
    directory, vkey = exported
    copy = tmp_path / "ledger"
    shutil.copytree(directory, copy)
    by_hand = (ROOT / "docs/ledger.md").read_text().split("## By hand")[1].split("\n## ")[0]
    commands = "".join(by_hand.split("```text\n")[n].split("```")[0] for n in (1, 2))
    bundle = bundle_of(copy).relative_to(copy).as_posix()
    commands = commands.replace("tile/entries/000.p/4", bundle)
    said = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=copy, env={**os.environ, "VKEY": vkey}, capture_output=True, text=True, timeout=60
    )
    lines = said.stdout.splitlines()
    assert said.returncode == 0 and lines[0] == "Signature Verified Successfully", said
    assert lines[1].split()[0] == tile_of(copy).read_bytes()[:32].hex()
    assert len(lines) > 3 and all(line.split()[0] == line.split("/")[-1] for line in lines[2:]), said.stdout


def test_a_foreign_key_and_a_missing_witness_are_refused(exported):
    directory, vkey = exported
    name, _, encoded = vkey.split("+", 2)
    other = bytes([1]) + sha256(b"not a key that anyone has")
    key_id = sha256(name.encode() + b"\n" + other)[:4].hex()
    foreign = f"{name}+{key_id}+{base64.b64encode(other).decode()}"
    with pytest.raises(Refused):
        verify_export(directory, foreign)
    assert "no known key signed the note" in ours(directory, foreign).stderr
    witness = bytes([4]) + base64.b64decode(encoded)[1:]
    key_id = sha256(b"beta\n" + witness)[:4].hex()
    said = ours(directory, vkey, "--witness", f"beta+{key_id}+{base64.b64encode(witness).decode()}")
    assert said.returncode == 1 and "0 witnesses cosigned it; 1 are asked for" in said.stderr, said


def test_a_witness_on_another_machine_cosigns_what_this_verifier_believes(mesh, exported, tmp_path):
    directory, vkey = exported
    witness = subprocess.Popen(
        [BINARY, "-o", "json", "ledger", "witness", tmp_path / "witness", "--listen", "127.0.0.1:0", "--name", "beta", "--log", vkey],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        started = json.loads(witness.stdout.readline())
        note = (directory / "checkpoint").read_text()
        answer = subprocess.run(
            ["curl", "-s", "-m", "10", "--data-binary", "@-", started["url"] + "/add-checkpoint"],
            input=f"old 0\n\n{note}",
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout
        assert verify_note(note + answer, started["key"]) == verify_note(note, vkey)
        (directory / "checkpoint").write_text(note + answer)
        said = ours(directory, vkey, "--witness", started["key"])
        assert said.returncode == 0 and "witness   beta at " in said.stdout, said
    finally:
        (directory / "checkpoint").write_text(note)
        witness.terminate()
        witness.wait(10)
