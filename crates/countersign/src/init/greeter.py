"""Says hello to whoever the mesh lets through, by the name the mesh verified."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Greeter(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        caller = self.headers.get("countersign-caller", "nobody")
        text = {"/hello": f"hello, {caller}\n", "/secret": "the secret\n"}.get(self.path, "nothing here\n").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Greeter).serve_forever()
