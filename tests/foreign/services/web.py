"""HTTP/1.1 of Python's standard library: echoes, streams events, counts what it is sent."""

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body, content_type="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/events":
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            try:
                for number in range(10_000):
                    event = f"data: {number}\n\n".encode()
                    self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
                    time.sleep(0.05)
            except OSError:
                pass
        elif self.path.startswith("/bytes/"):
            left = int(self.path.rsplit("/", 1)[1])
            self.send_response(200)
            self.send_header("content-type", "application/octet-stream")
            self.send_header("content-length", str(left))
            self.end_headers()
            block = b"x" * (1 << 20)
            while left:
                left -= self.wfile.write(block[: min(left, len(block))])
        else:
            self.answer({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}})

    def do_POST(self):
        digest, length = hashlib.sha256(), 0
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunk = self.rfile.read(size)
                self.rfile.readline()
                digest.update(chunk)
                length += len(chunk)
            self.rfile.readline()
        else:
            left = int(self.headers.get("content-length") or 0)
            while left and (chunk := self.rfile.read(min(left, 1 << 20))):
                digest.update(chunk)
                length += len(chunk)
                left -= len(chunk)
        self.answer({"length": length, "sha256": digest.hexdigest()})

    do_PUT = do_POST

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


Server(("127.0.0.1", int(os.environ["PORT"])), Web).serve_forever()
