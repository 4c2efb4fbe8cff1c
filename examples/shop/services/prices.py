"""Prices as they change: `/stream` is server-sent events, `/socket` a WebSocket (RFC 6455) that also echoes."""

import base64
import hashlib
import json
import random
import struct
import threading
import time

from shop import serve

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def price():
    return {"item": str(random.randint(1, 3)), "price": random.randint(3, 60)}


def stream(request, *_):
    request.send_response(200)
    request.send_header("content-type", "text/event-stream")
    request.send_header("transfer-encoding", "chunked")
    request.end_headers()
    request.close_connection = True
    try:
        while True:
            event = f"data: {json.dumps(price())}\n\n".encode()
            request.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            request.wfile.flush()
            time.sleep(0.5)
    except OSError:
        pass  # the listener left, or may not listen any more


def frame(opcode, payload):
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    return head + struct.pack(">BH", 126, len(payload)) + payload


def read_frame(source):
    first, second = source.read(2)
    length = second & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", source.read(2))
    elif length == 127:
        (length,) = struct.unpack(">Q", source.read(8))
    mask = source.read(4) if second & 0x80 else bytes(4)
    payload = bytes(b ^ mask[i % 4] for i, b in enumerate(source.read(length)))
    return first & 0x0F, payload


def socket(request, *_):
    key = request.headers.get("sec-websocket-key", "").encode()
    if not key:
        return request.answer(426, {"error": "this is a WebSocket"})
    request.send_response(101)
    request.send_header("upgrade", "websocket")
    request.send_header("connection", "Upgrade")
    request.send_header("sec-websocket-accept", base64.b64encode(hashlib.sha1(key + GUID).digest()).decode())
    request.end_headers()
    request.close_connection = True
    writing = threading.Lock()

    def send(opcode, payload):
        with writing:
            request.wfile.write(frame(opcode, payload))

    def tick():
        try:
            while True:
                time.sleep(0.5)
                send(1, json.dumps(price()).encode())
        except (OSError, ValueError):
            pass  # the other end is gone

    threading.Thread(target=tick, daemon=True).start()
    try:
        while True:
            opcode, payload = read_frame(request.rfile)
            if opcode == 8:
                return send(8, payload)
            if opcode == 9:
                send(10, payload)
            elif opcode in (1, 2):
                send(opcode, payload)
    except (OSError, ValueError):
        pass


serve({("GET", "stream"): stream, ("GET", "socket"): socket})
