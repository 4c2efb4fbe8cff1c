"""A process that has its SVIDs from the socket of the Workload API, with PyPI's `spiffe`, and writes them down for other programs. It
stays until its standard input ends: they are worth nothing once it is gone.

svid.py DIRECTORY AUDIENCE
"""

import json
import pathlib
import sys

from cryptography.hazmat.primitives import serialization
from spiffe import WorkloadApiClient

directory, audience = pathlib.Path(sys.argv[1]), sys.argv[2]
directory.mkdir()
with WorkloadApiClient() as client:
    svid = client.fetch_x509_svid()
    token = client.fetch_jwt_svid(audience={audience})
chain = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in svid.cert_chain)
(directory / "svid.pem").write_bytes(chain)
key = svid.private_key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
(directory / "svid.key").write_bytes(key)
print(json.dumps({"id": str(svid.spiffe_id), "jwt": token.token}), flush=True)
sys.stdin.read()
