"""A workload that asks for its identities with PyPI's `spiffe`, as software written for SPIFFE does: it knows nothing of Countersign."""

import json
import os
import sys
import threading

import grpc
from cryptography import x509
from spiffe import WorkloadApiClient


def once():
    with WorkloadApiClient() as client:
        svid = client.fetch_x509_svid()
        bundles = client.fetch_x509_bundles()
        token = client.fetch_jwt_svid(audience={"orders"})
        keys = client.fetch_jwt_bundles()
        validated = client.validate_jwt_svid(token.token, "orders")
        own = svid.spiffe_id.trust_domain
        refused = []
        for attempt in (
            lambda: client.validate_jwt_svid(token.token, "somebody-else"),
            lambda: client.validate_jwt_svid(token.token[:-6] + "AAAAAA", "orders"),
            lambda: client.fetch_jwt_svid(audience={"orders"}, subject=type(svid.spiffe_id)(f"spiffe://{own}/somebody-else")),
        ):
            try:
                attempt()
                refused.append(None)
            except Exception as error:  # noqa: BLE001 the client wraps every status in a class of its own
                refused.append(str(error))
        leaf = svid.leaf
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        print(
            json.dumps(
                {
                    "id": str(svid.spiffe_id),
                    "names": [name.value for name in names],
                    "chain": len(svid.cert_chain),
                    "authorities": len(bundles.get_bundle_for_trust_domain(own).x509_authorities),
                    "jwt_keys": len(keys.get_bundle_for_trust_domain(own).jwt_authorities),
                    "jwt": str(token.spiffe_id),
                    "audience": sorted(token.audience),
                    "validated": str(validated.spiffe_id),
                    "again": client.fetch_jwt_svid(audience={"orders"}).token == token.token,
                    "refused": refused,
                }
            )
        )


def without_header():
    """The standard's own guard against requests that a workload is made to send."""
    channel = grpc.insecure_channel(os.environ["SPIFFE_ENDPOINT_SOCKET"].replace("unix://", "unix:"))
    found = {}
    for metadata in ([], [("workload.spiffe.io", "True")], [("workload.spiffe.io", "true")] * 2, [("workload.spiffe.io", "true")]):
        call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509Bundles")(b"", metadata=metadata, timeout=5)
        try:
            next(iter(call))
            found[str(len(found))] = "OK"
        except grpc.RpcError as error:
            found[str(len(found))] = error.code().name
    print(json.dumps(list(found.values())))


def each():
    """Says each X.509-SVID as it comes."""
    client = WorkloadApiClient()
    done = threading.Event()

    def came(context):
        svid = context.default_svid
        print(json.dumps({"id": str(svid.spiffe_id), "serial": f"{svid.leaf.serial_number:032x}"}), flush=True)

    client.stream_x509_contexts(came, lambda error: print(json.dumps({"error": str(error)}), flush=True))
    done.wait()


{"each": each, "once": once, "without_header": without_header}[sys.argv[1]]()
