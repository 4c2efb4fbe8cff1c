"""A gRPC server by grpcio, with bytes for messages: unary, and streaming each way."""

import os
import time
from concurrent import futures

import grpc


def hello(request, context):
    if request == b"fail":
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "asked to fail")
    context.set_trailing_metadata((("greeted", "yes"),))
    return b"hello " + request


def count(request, context):
    for number in range(int(request)):
        yield str(number).encode()


def forever(request, context):
    while context.is_active():
        yield b"tick"
        time.sleep(0.05)


def total(requests, context):
    return str(sum(int(request) for request in requests)).encode()


def echo(requests, context):
    for request in requests:
        yield request


METHODS = {
    "Hello": grpc.unary_unary_rpc_method_handler(hello),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Forever": grpc.unary_stream_rpc_method_handler(forever),
    "Total": grpc.stream_unary_rpc_method_handler(total),
    "Echo": grpc.stream_stream_rpc_method_handler(echo),
}
server = grpc.server(futures.ThreadPoolExecutor(16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("greet.Greeter", METHODS),))
assert server.add_insecure_port(f"127.0.0.1:{os.environ['PORT']}")
server.start()
server.wait_for_termination()
