"""A WebSocket client by the `websockets` library, through the sidecar's loopback listener. Prints one JSON object."""

import json
import os
import sys

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

with connect(f"ws://{os.environ['COUNTERSIGN_UPSTREAM_CHAT']}/", proxy=None) as socket:
    if sys.argv[1] == "echo":
        sent = ["x" * size for size in (0, 1, 125, 126, 65_535, 65_536, 300_000)]
        got = []
        for message in sent:
            socket.send(message)
            while (answer := socket.recv(timeout=10)) == "tick":
                pass
            got.append(answer)
        print(json.dumps({"echoed": got == sent}))
    else:
        try:
            while True:
                socket.recv(timeout=30)
                print("open", flush=True)
        except ConnectionClosed as closed:
            print(json.dumps({"code": closed.rcvd and closed.rcvd.code}))
