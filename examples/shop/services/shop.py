"""What the services of the shop share: a JSON server, and calls to other services through the sidecar."""

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


class Refused(Exception):
    """The other service, or the mesh, said no."""

    def __init__(self, status, body):
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


def call(method, url, body=None):
    """Calls `http://<service>.mesh/…`; HTTP_PROXY, which the mesh sets, takes it to the sidecar."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode(errors="replace")) from None


class Service(BaseHTTPRequestHandler):
    """Answers from `routes`: a function by (method, first path segment), called with (handler, rest of path, body)."""

    protocol_version = "HTTP/1.1"
    routes = {}

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def caller(self):
        """The verified SPIFFE ID of whoever called; the sidecar sets it and nobody else can."""
        return self.headers.get("countersign-caller", "nobody")

    def handle_any(self):
        length = int(self.headers.get("content-length") or 0)
        data = self.rfile.read(length)
        _, _, path = self.path.partition("/")
        first, _, rest = path.partition("?")[0].partition("/")
        act = self.routes.get((self.command, first))
        if act is None:
            return self.answer(404, {"error": "no such thing"})
        try:
            act(self, rest, json.loads(data) if data else None)
        except Refused as refused:
            self.answer(502, {"error": "a service behind this one refused", "status": refused.status, "said": refused.body})

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, *_):
        pass


def serve(routes):
    """Serves `routes` on 127.0.0.1:$PORT until the process is stopped."""
    server = type("Server", (ThreadingHTTPServer,), {"daemon_threads": True, "request_queue_size": 128})
    handler = type("Handler", (Service,), {"routes": routes})
    server(("127.0.0.1", int(os.environ["PORT"])), handler).serve_forever()
