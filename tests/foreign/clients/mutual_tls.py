"""Asks what listens on a port of this machine over mutual TLS: with the SVID of the workload that this runs as (`svid`), with `nothing`, or
with a certificate that somebody else made and that names the same workload (`foreign`). Verifies what answers by the bundle of the mesh.
As a service (`serve`) it does so for whoever asks it, in one line."""

import datetime
import json
import os
import signal
import socket
import ssl
import sys
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from spiffe import WorkloadApiClient

PEM, PKCS8, PLAIN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


def foreign(name):
    key = ec.generate_private_key(ec.SECP256R1())
    now, whose = datetime.datetime.now(datetime.timezone.utc), x509.Name([])
    certificate = x509.CertificateBuilder(whose, whose, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(hours=1))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name)])
    return [certificate.add_extension(names, critical=True).sign(key, hashes.SHA256())], key


def main(port, how):
    with WorkloadApiClient() as client:
        svid = client.fetch_x509_svid()
        authorities = client.fetch_x509_bundles().get_bundle_for_trust_domain(svid.spiffe_id.trust_domain).x509_authorities
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata="".join(one.public_bytes(PEM).decode() for one in authorities))
    if how != "nothing":
        chain, key = foreign(str(svid.spiffe_id)) if how == "foreign" else (svid.cert_chain, svid.private_key)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join([key.private_bytes(PEM, PKCS8, PLAIN), *(one.public_bytes(PEM) for one in chain)]))
            file.flush()
            context.load_cert_chain(file.name)
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as tcp, context.wrap_socket(tcp) as tls:
            certificate = tls.getpeercert()
            tls.sendall(b"GET / HTTP/1.1\r\nhost: edge\r\nconnection: close\r\n\r\n")
            answer = b""
            while part := tls.recv(4096):
                answer += part
    except OSError as error:
        return {"refused": str(error)}
    [(_, name)] = [one for one in certificate["subjectAltName"] if one[0] == "URI"]
    return {"status": answer.decode().split("\r\n")[0], "id": name, "serial": certificate["serialNumber"].lower().rjust(32, "0")}


def serve():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.create_server(("127.0.0.1", int(os.environ["PORT"]))) as server:
        while True:
            with server.accept()[0] as asked, asked.makefile("rw") as file:
                if line := file.readline().split():
                    file.write(json.dumps(main(int(line[0]), line[1])) + "\n")


if sys.argv[1] == "serve":
    serve()
print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
