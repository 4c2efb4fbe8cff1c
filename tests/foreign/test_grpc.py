"""grpcio on both ends of the mesh."""

import json


def test_every_kind_of_call_passes_with_its_trailers_and_status(mesh):
    answer = json.loads(mesh.script("client", "greet.py", "all").stdout)
    assert answer == {
        "hello": "hello mesh",
        "trailers": "yes",
        "failed": ["FAILED_PRECONDITION", "asked to fail"],
        "count": True,
        "total": "42",
        "echo": sum(range(0, 60000, 600)),
    }


def test_a_denial_is_permission_denied(mesh):
    answer = json.loads(mesh.script("stranger", "greet.py", "hello").stdout)
    assert answer["code"] == "PERMISSION_DENIED"


def test_an_open_stream_ends_with_permission_denied_when_its_permit_does(mesh):
    stream = mesh.start("client", "sh", "-c", f"exec {__import__('sys').executable} {__file__.rsplit('/', 1)[0]}/clients/greet.py forever")
    try:
        assert stream.stdout.readline() == "open\n"
        mesh.forbid("greeter")
        assert json.loads(stream.stdout.readline())["code"] == "PERMISSION_DENIED"
    finally:
        stream.kill()
        mesh.permit("greeter")
