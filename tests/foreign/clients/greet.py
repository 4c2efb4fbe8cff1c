"""A gRPC client by grpcio. Prints one JSON object; the first argument says what to do."""

import json
import os
import sys

import grpc

channel = grpc.insecure_channel(os.environ["COUNTERSIGN_UPSTREAM_GREETER"], [("grpc.enable_http_proxy", 0)])


def method(kind, name):
    return getattr(channel, kind)(f"/greet.Greeter/{name}", None, None)


def run(what):
    if what == "all":
        answer, call = method("unary_unary", "Hello").with_call(b"mesh", timeout=10)
        try:
            method("unary_unary", "Hello")(b"fail", timeout=10)
            failed = None
        except grpc.RpcError as error:
            failed = [error.code().name, error.details()]
        return {
            "hello": answer.decode(),
            "trailers": dict(call.trailing_metadata()).get("greeted"),
            "failed": failed,
            "count": [n.decode() for n in method("unary_stream", "Count")(b"1000", timeout=10)] == [str(n) for n in range(1000)],
            "total": method("stream_unary", "Total")(iter([b"1", b"2", b"39"]), timeout=10).decode(),
            "echo": sum(len(m) for m in method("stream_stream", "Echo")(iter([bytes(n) for n in range(0, 60000, 600)]), timeout=20)),
        }
    if what == "hello":
        return {"hello": method("unary_unary", "Hello")(b"mesh", timeout=10).decode()}
    if what == "forever":
        ticks = 0
        for _ in method("unary_stream", "Forever")(b"", timeout=30):
            ticks += 1
            if ticks == 3:
                print("open", flush=True)
        return {"ticks": ticks}
    sys.exit(f"{what}?")


try:
    print(json.dumps(run(sys.argv[1])))
except grpc.RpcError as error:
    print(json.dumps({"code": error.code().name, "details": error.details()}))
