"""curl, h2load and raw sockets through the mesh."""

import hashlib
import json
import pathlib
import re
import time

import pytest


def curl(mesh, service, *words, **more):
    return mesh.exec(service, "curl", "-sS", "--max-time", "20", *words, **more)


@pytest.mark.parametrize("way", ["by-proxy", "by-name", "by-listener", "h2c"])
def test_a_permitted_request_arrives_with_its_verified_caller(mesh, way):
    words = {
        "by-proxy": ["http://web.mesh/a?b=c"],
        "by-name": ["--noproxy", "*", "http://web.mesh/a?b=c"],
        "by-listener": ["--noproxy", "*", "UPSTREAM/a?b=c"],
        "h2c": ["--noproxy", "*", "--http2-prior-knowledge", "UPSTREAM/a?b=c"],
    }[way]
    if way == "by-name" and not mesh.run["services"]["client"]["isolated"]:
        pytest.skip("names resolve only inside a workload's own namespace, and this kernel gives none")
    script = "exec curl -sS --max-time 20 " + " ".join(f"'{w}'" for w in words).replace(
        "'UPSTREAM/", "\"http://$COUNTERSIGN_UPSTREAM_WEB\"'/"
    )
    answer = json.loads(mesh.exec("client", "sh", "-c", script).stdout)
    assert answer["path"] == "/a?b=c"
    assert answer["headers"]["countersign-caller"] == "spiffe://foreign.example/client"
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", answer["headers"]["traceparent"])


def test_a_denial_says_its_decision_and_nothing_more(mesh):
    answer = curl(mesh, "stranger", "-i", "http://web.mesh/a").stdout
    head, _, body = answer.partition("\n\n")
    assert head.startswith("HTTP/1.1 403 ")
    denied = json.loads(body)
    assert set(denied) == {"error", "decision"} and denied["error"] == "denied"
    shown = mesh.command("decision", "show", denied["decision"], "-o", "json").stdout
    record = json.loads(shown)
    assert "no_policy_permits" in shown and denied["decision"] in json.dumps(record)


def test_a_service_that_is_not_there_is_404_at_the_callers_own_sidecar(mesh):
    assert curl(mesh, "client", "-o", "/dev/null", "-w", "%{http_code}", "http://nowhere.mesh/").stdout == "404"


def test_nobody_sets_the_callers_identity_but_the_mesh(mesh):
    answer = curl(mesh, "client", "-H", "countersign-caller: spiffe://foreign.example/root",
                  "-H", "x-forwarded-client-cert: URI=spiffe://foreign.example/root", "http://web.mesh/").stdout
    headers = json.loads(answer)["headers"]
    assert headers["countersign-caller"] == "spiffe://foreign.example/client"
    assert "x-forwarded-client-cert" not in headers


@pytest.mark.parametrize("path", ["/a/../b", "/%2e%2e/b", "/a%2fb", "/a%00b", "/a\\b", "/a%5cb", "/a/%2E%2e/b"])
def test_a_path_that_could_mean_two_things_is_refused(mesh, path):
    code = curl(mesh, "client", "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", f"http://web.mesh{path}").stdout
    assert code == "400"


@pytest.mark.parametrize("words", [["-H", "transfer-encoding: chunked"], ["-H", "expect: 100-continue"], []])
def test_a_large_upload_arrives_whole(mesh, tmp_path, words):
    data = bytes(range(256)) * 4096 * 32
    (tmp_path / "body").write_bytes(data)
    answer = json.loads(curl(mesh, "client", *words, "--data-binary", f"@{tmp_path}/body", "http://web.mesh/up").stdout)
    assert answer == {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def most_resident(pid):
    """The most memory that a process ever held, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def test_a_gigabyte_passes_each_way_and_no_sidecar_grows_by_it(mesh, tmp_path):
    size = 1 << 30
    with open(tmp_path / "body", "wb") as body:
        body.truncate(size)
    before = {pid: most_resident(pid) for pid in mesh.sidecars()}
    assert len(before) >= 2
    for words, expected in [
        (["-o", "/dev/null", "-w", "%{size_download}", f"http://web.mesh/bytes/{size}"], str(size)),
        (["-T", tmp_path / "body", "http://web.mesh/up"], f'"length": {size}'),
    ]:
        curling = mesh.start("client", "curl", "-sS", "--max-time", "200", *words)
        assert expected in curling.communicate(timeout=240)[0]
    for pid, held in before.items():
        assert most_resident(pid) - held < 32 << 20, "32 MB more than before"


def test_a_large_download_arrives_whole(mesh):
    size = 200 * 1024 * 1024
    got = curl(mesh, "client", "-o", "/dev/null", "-w", "%{size_download}", f"http://web.mesh/bytes/{size}").stdout
    assert int(got) == size


def test_an_event_stream_ends_when_its_permit_does_and_another_goes_on(mesh):
    stream = mesh.start("client", "curl", "-sSN", "--max-time", "30", "http://web.mesh/events")
    try:
        assert stream.stdout.readline().startswith("data: 0")
        mesh.forbid("web")
        began = time.monotonic()
        stream.wait(10)
        assert time.monotonic() - began < 5
        assert stream.returncode not in (0, 28), "cut, and neither finished nor timed out"
    finally:
        stream.kill()
        mesh.permit("web")
    assert json.loads(curl(mesh, "client", "http://web.mesh/again").stdout)["path"] == "/again"


def test_h2load_finds_no_failed_request(mesh):
    script = 'exec h2load -n 2000 -c 16 -m 8 "http://$COUNTERSIGN_UPSTREAM_WEB/load"'
    output = mesh.exec("client", "sh", "-c", script).stdout
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in output, output
    assert "status codes: 2000 2xx" in output
