"""Spans and metrics at an OpenTelemetry collector that is not ours, and a mesh that does not mind when there is none."""

import json
import re
import secrets
import socket
import subprocess
import time
import urllib.request

import pytest

from collectors import OverGrpc, OverHttp, samples
from conftest import BINARY, Mesh

HASTE = {"OTEL_METRIC_EXPORT_INTERVAL": "1000", "OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_EXPORTER_OTLP_TIMEOUT": "1000"}


@pytest.fixture(scope="module", params=[OverGrpc, OverHttp], ids=["grpc", "http"])
def told(request, tmp_path_factory):
    collector = request.param()
    environment = {
        **HASTE,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": collector.protocol,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20of-the-mesh",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=foreign",
    }
    mesh = Mesh(tmp_path_factory.mktemp("told"), None, environment)
    yield mesh, collector
    mesh.stop()
    collector.stop()


def call(mesh, service, url, traceparent=None):
    """The status, the body, and what the workload saw of the trace."""
    words = ["-H", f"traceparent: {traceparent}"] if traceparent else []
    shown = mesh.exec(service, "curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", *words, url).stdout
    body, _, status = shown.rpartition("\n")
    return int(status), json.loads(body)


def test_an_allowed_call_is_a_chain_of_spans_from_caller_to_workload(told):
    mesh, collector = told
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    status, seen = call(mesh, "client", "http://web.mesh/items/%37?secret=1", f"00-{trace}-{parent}-01")
    assert status == 200
    client, server = sorted(collector.of_trace(trace, 2), key=lambda span: span.kind)
    assert (client.kind, client.parent) == ("CLIENT", parent)
    assert (server.kind, server.parent) == ("SERVER", client.id)
    assert seen["headers"]["traceparent"] == f"00-{trace}-{server.id}-01", "the workload's own span comes under it"
    # Two processes, one clock: taken at the two ends, microseconds apart.
    assert client.began - 1_000_000 <= server.began <= server.ended <= client.ended + 1_000_000

    for span, service in ((client, "client"), (server, "web")):
        assert span.name == "GET" and span.status == 0
        assert span.scope == "countersign-proxy"
        assert span.resource["service.name"] == service
        assert span.resource["service.namespace"] == "foreign.example"
        assert re.fullmatch(f"{service}/1-[0-9a-f]+", span.resource["service.instance.id"])
        assert span.resource["deployment.environment.name"] == "foreign"
        assert span.resource["telemetry.distro.name"] == "countersign" and span.resource["host.name"]
        for key, value in {
            "http.request.method": "GET",
            "url.path": "/items/7",  # the path that was judged, and nothing of the query
            "http.response.status_code": 200,
            "server.address": "web.mesh",
            "countersign.end": "completed",
        }.items():
            assert span.attributes[key] == value, key
        assert "secret" not in repr(span)
    assert client.attributes["url.full"] == "http://web.mesh/items/7"
    assert "countersign.decision.id" not in client.attributes, "judged at the callee"
    decided = server.attributes
    assert decided["countersign.decision.outcome"] == "permit"
    assert decided["countersign.decision.reason"] == "permitted"
    assert decided["countersign.decision.policies"] == ["web"]
    assert decided["countersign.caller"] == "spiffe://foreign.example/client"
    assert decided["countersign.revision"] >= 1
    record = json.loads(mesh.command("decision", "show", decided["countersign.decision.id"], "-o", "json").stdout)
    assert trace in json.dumps(record), "the record and the span are of one decision"


def test_a_denied_call_is_told_with_what_denied_it(told):
    mesh, collector = told
    trace = secrets.token_hex(16)
    status, denied = call(mesh, "stranger", "http://web.mesh/a", f"00-{trace}-{secrets.token_hex(8)}-01")
    assert status == 403
    client, server = sorted(collector.of_trace(trace, 2), key=lambda span: span.kind)
    assert server.parent == client.id
    assert client.attributes["http.response.status_code"] == server.attributes["http.response.status_code"] == 403
    assert (client.status, client.attributes["error.type"]) == (2, "403")
    assert server.status == 0, "the callee's side did what it should"
    assert server.attributes["countersign.decision.id"] == denied["decision"]
    assert server.attributes["countersign.decision.outcome"] == "deny"
    assert server.attributes["countersign.decision.reason"] == "no_policy_permits"
    assert server.attributes["countersign.decision.policies"] == []
    assert server.attributes["countersign.caller"] == "spiffe://foreign.example/stranger"
    assert server.attributes["countersign.refusal"] == "denied"


def test_a_call_to_nowhere_is_the_callers_span_alone(told):
    mesh, collector = told
    trace = secrets.token_hex(16)
    mesh.exec("client", "curl", "-sS", "-H", f"traceparent: 00-{trace}-{secrets.token_hex(8)}-01", "http://nowhere.mesh/")
    (client,) = collector.of_trace(trace, 1)
    assert (client.kind, client.attributes["http.response.status_code"]) == ("CLIENT", 404)
    assert client.attributes["error.type"] == client.attributes["countersign.refusal"] == "unknown-service"


def test_a_trace_that_its_caller_does_not_keep_is_not_told_and_goes_on_as_it_came(told):
    mesh, collector = told
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    given = f"00-{trace}-{parent}-00"
    _, seen = call(mesh, "client", "http://web.mesh/", given)
    assert seen["headers"]["traceparent"] == given
    after = secrets.token_hex(16)
    call(mesh, "client", "http://web.mesh/", f"00-{after}-{parent}-01")
    collector.of_trace(after, 2)
    assert not [span for span in collector.spans if span.trace_id == trace]


def test_a_change_is_a_span(told):
    mesh, collector = told
    mesh.forbid("chat")
    mesh.permit("chat")
    status = json.loads(mesh.command("status", "-o", "json").stdout)
    found = lambda: [s for s in collector.spans if s.attributes.get("countersign.revision") == status["revision"] and s.name == "change"]
    (change,) = collector.wait(found)
    assert (change.kind, change.scope, change.parent) == ("INTERNAL", "countersign-control", "")
    assert change.attributes["countersign.change.actor"] == "local"
    assert change.attributes["countersign.change.count"] == 1
    assert re.fullmatch("[0-9a-f]{64}", change.attributes["countersign.change.digest"])
    assert change.resource["service.name"] == "countersign"


def page(url):
    """{(sample, labels): number} of a page of Prometheus text."""
    found = {}
    with urllib.request.urlopen(url) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("#"):
                continue
            name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)(?: # .*)?", line).groups()
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels or ""))
            if "le" in pairs:
                pairs["le"] = str(float(pairs["le"]))
            found[name, tuple(sorted(pairs.items()))] = float(value)
    return found


def test_the_metrics_of_every_sidecar_are_those_that_prometheus_reads(told):
    mesh, collector = told
    call(mesh, "client", "http://web.mesh/")
    for service in ("client", "stranger", "web", "greeter", "chat"):
        url = f"{mesh.run['services'][service]['admin']}/metrics"
        same_pages(collector, url, service, "countersign-proxy")
    exported = samples(of(collector, "web", "countersign-proxy")[2])
    assert exported["countersign_decisions_total", (("outcome", "permit"), ("reason", "permitted"))] >= 1
    assert exported["countersign_spans_total", ()] >= 1


def test_the_metrics_of_the_control_plane_are_those_that_prometheus_reads(told):
    mesh, collector = told
    same_pages(collector, mesh.run["metrics"], "countersign", "countersign-control")
    own = samples(collector.wait(lambda: of(collector, "countersign", "countersign"))[2])
    assert own["countersign_telemetry_spans_total", ()] >= 1
    assert own["countersign_telemetry_spans_shed_total", ()] == 0


def of(collector, service, scope):
    return next((told for key, told in collector.metrics.items() if key[0] == service and key[2] == scope), None)


def same_pages(collector, url, service, scope):
    """What stands still between two looks at a page is what the export between them says."""
    before = page(url)
    since = time.time()
    newer = lambda: (told := of(collector, service, scope)) and told[0] > since + 1.2 and told
    _, resource, metrics = collector.wait(newer)
    after = page(url)
    exported = samples(metrics)
    assert set(exported) == set(after), "the same names with the same labels"
    still = {key for key in after if before.get(key) == after[key]}
    assert len(still) > len(after) / 2
    assert {key: exported[key] for key in still} == {key: after[key] for key in still}
    assert resource["service.name"] == service and resource["service.namespace"] == "foreign.example"


def test_the_collector_is_shown_the_headers_that_were_given_and_a_workload_is_not(told):
    mesh, collector = told
    collector.wait(lambda: collector.headers)
    assert all(headers.get("authorization") == "Bearer of-the-mesh" for headers in collector.headers)
    pid = mesh.run["services"]["web"]["pids"][0]
    with open(f"/proc/{pid}/environ", "rb") as environ:
        assert b"of-the-mesh" not in environ.read()


def self_signed(directory, name):
    key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE",
         "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return key, certificate


@pytest.mark.parametrize("kind", [OverGrpc, OverHttp])
def test_a_collector_over_tls_must_be_one_that_was_named(tmp_path, kind):
    key, certificate = self_signed(tmp_path, "collector")
    _, other = self_signed(tmp_path, "other")
    collector = kind(tls=(key, certificate))
    for name, trusted, arrives in (("refused", other, False), ("named", certificate, True)):
        environment = {
            **HASTE,
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": collector.protocol,
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(trusted),
        }
        directory = tmp_path / name
        directory.mkdir()
        mesh = Mesh(directory, None, environment)
        try:
            trace = secrets.token_hex(16)
            status, _ = call(mesh, "client", "http://web.mesh/", f"00-{trace}-{secrets.token_hex(8)}-01")
            assert status == 200
            if arrives:
                assert len(collector.of_trace(trace, 2)) == 2
            else:
                time.sleep(2)
        finally:
            mesh.stop()
        log = (directory / "up.log").read_text()
        assert ("telemetry does not arrive" not in log) == arrives, log
        assert bool(collector.spans) == arrives
    collector.stop()


@pytest.mark.parametrize("collector", ["absent", "silent"])
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_does_not_answer_is_a_warning_and_no_more(tmp_path, collector, protocol):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if collector == "absent":
            listener.close()
        environment = {
            **HASTE,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_TRACES_SAMPLER": "always_on",
        }
        mesh = Mesh(tmp_path, None, environment)
        try:
            end = time.monotonic() + 20
            while call(mesh, "client", "http://web.mesh/")[0] != 200:  # until it is known where its instance is
                assert time.monotonic() < end, (tmp_path / "up.log").read_text()
            for _ in range(3):
                began = time.monotonic()
                status, seen = call(mesh, "client", "http://web.mesh/")
                assert status == 200 and seen["headers"]["traceparent"].endswith("-01")
                assert time.monotonic() - began < 5
                time.sleep(1.5)
            began = time.monotonic()
        finally:
            mesh.stop()
        assert time.monotonic() - began < 12
        log = (tmp_path / "up.log").read_text()
        assert 1 <= log.count("telemetry does not arrive") <= 2, "once for spans, once for metrics"


def test_settings_that_cannot_be_meant_are_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")
    (tmp_path / "mesh.toml").write_text('trust_domain = "foreign.example"\n')
    up = subprocess.run([BINARY, "up", tmp_path], capture_output=True, text=True, timeout=30)
    assert up.returncode == 2 and "OTEL_TRACES_SAMPLER" in up.stderr and "parentbased_" in up.stderr
