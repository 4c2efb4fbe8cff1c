"""Asks the greeter, through the mesh: HTTP_PROXY, which the mesh sets, takes `greeter.mesh` to this service's sidecar."""

import os
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        try:
            with urllib.request.urlopen("http://greeter.mesh/hello", timeout=10) as answer:
                status, text = 200, b"the greeter says: " + answer.read()
        except urllib.error.HTTPError as error:
            status, text = 502, f"the greeter did not answer: {error}\n".encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Web).serve_forever()
