"""openssl at the inbound listener of a sidecar: no certificate, no conversation."""

import socket
import subprocess


def inbound(mesh):
    return mesh.run["services"]["web"]["inbound"]


def s_client(mesh, *words):
    command = ["openssl", "s_client", "-connect", inbound(mesh), "-alpn", "h2", "-ign_eof", *words]  # until the server ends it
    done = subprocess.run(command, input=b"GET / HTTP/1.1\r\n\r\n", capture_output=True, timeout=20)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def test_without_a_certificate_there_is_no_conversation(mesh):
    _, said = s_client(mesh, "-tls1_3")
    assert "certificate required" in said or "alert number 116" in said, said
    assert "HTTP/1" not in said


def test_tls_1_2_is_refused(mesh):
    code, said = s_client(mesh, "-tls1_2")
    assert code != 0 and "protocol version" in said, said


def test_a_certificate_of_another_authority_is_refused(mesh, tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
         tmp_path / "key", "-out", tmp_path / "cert", "-days", "1", "-subj", "/CN=client",
         "-addext", "subjectAltName=URI:spiffe://foreign.example/client"],
        check=True,
        capture_output=True,
    )
    _, said = s_client(mesh, "-tls1_3", "-cert", tmp_path / "cert", "-key", tmp_path / "key")
    assert "alert" in said and "HTTP/1" not in said, said


def test_plaintext_gets_nothing(mesh):
    host, port = inbound(mesh).rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nhost: web.mesh\r\n\r\n")
        got = b""
        try:
            while chunk := plain.recv(4096):
                got += chunk
        except ConnectionResetError:
            pass
    assert b"HTTP/" not in got and len(got) <= 7, got  # at most a TLS alert


def test_the_server_shows_an_svid(mesh):
    _, said = s_client(mesh, "-tls1_3", "-showcerts")
    assert "BEGIN CERTIFICATE" in said
    leaf = said[said.index("-----BEGIN") : said.index("-----END") + 25]
    text = subprocess.run(["openssl", "x509", "-noout", "-text"], input=leaf.encode(), capture_output=True, check=True)
    text = text.stdout.decode()
    assert "URI:spiffe://foreign.example/web" in text
    assert "CA:FALSE" in text or "CA:TRUE" not in text
    assert "Digital Signature" in text and "TLS Web Client Authentication" in text
