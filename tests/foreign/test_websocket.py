"""The `websockets` library on both ends of the mesh."""

import json
import sys

from conftest import HERE


def test_messages_of_every_length_pass(mesh):
    assert json.loads(mesh.script("client", "chat.py", "echo").stdout) == {"echoed": True}


def test_an_open_socket_is_closed_with_1008_when_its_permit_ends(mesh):
    socket = mesh.start("client", sys.executable, HERE / "clients/chat.py", "stay")
    try:
        assert socket.stdout.readline() == "open\n"
        mesh.forbid("chat")
        last = [line for line in socket.stdout if line != "open\n"][-1]
        assert json.loads(last) == {"code": 1008}
    finally:
        socket.kill()
        mesh.permit("chat")
