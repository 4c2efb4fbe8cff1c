"""Two OpenTelemetry collectors, made of the published protocol alone: OTLP over gRPC, and over HTTP with protobuf. With
`tls`, the files of a key and its certificate, over TLS."""

import ssl
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as traces_grpc


def plain(value):
    """An OTLP value as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, kind)


def attributes(given):
    return {one.key: plain(one.value) for one in given}


class Span:
    """A span and who told it."""

    def __init__(self, resource, scope, span):
        self.resource, self.scope = resource, scope
        self.trace_id, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.name, self.status = span.name, span.status.code
        self.kind = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}[span.kind]
        self.began, self.ended = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes = attributes(span.attributes)

    def __repr__(self):
        return f"{self.kind} {self.name} of {self.resource.get('service.name')}: {self.attributes}"


class Collector:
    """What was exported, and a way to wait for it."""

    def __init__(self):
        self.changed = threading.Condition()
        self.spans, self.headers = [], []
        self.metrics = {}  # by service.name, service.instance.id and scope: when it arrived, resource, metrics

    def take_traces(self, request, headers):
        with self.changed:
            self.headers.append(headers)
            for of_resource in request.resource_spans:
                resource = attributes(of_resource.resource.attributes)
                for of_scope in of_resource.scope_spans:
                    self.spans += [Span(resource, of_scope.scope.name, span) for span in of_scope.spans]
            self.changed.notify_all()

    def take_metrics(self, request, headers):
        with self.changed:
            self.headers.append(headers)
            for of_resource in request.resource_metrics:
                resource = attributes(of_resource.resource.attributes)
                for of_scope in of_resource.scope_metrics:
                    key = resource["service.name"], resource["service.instance.id"], of_scope.scope.name
                    self.metrics[key] = time.time(), resource, list(of_scope.metrics)
            self.changed.notify_all()

    def wait(self, find, within=30):
        """What `find` finds, as soon as it finds something."""
        end = time.monotonic() + within
        with self.changed:
            while not (found := find()):
                left = end - time.monotonic()
                assert left > 0, f"it did not arrive; what did: {self.spans} {list(self.metrics)}"
                self.changed.wait(left)
            return found

    def of_trace(self, trace_id, count):
        """All spans of a trace, once there are `count`."""
        found = lambda: [span for span in self.spans if span.trace_id == trace_id]
        return self.wait(lambda: len(found()) >= count and found())


class OverGrpc(Collector, traces_grpc.TraceServiceServicer, metrics_grpc.MetricsServiceServicer):
    protocol = "grpc"

    def __init__(self, tls=None):
        super().__init__()
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        traces_grpc.add_TraceServiceServicer_to_server(_Traces(self), self.server)
        metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self.server)
        if tls:
            key, certificate = (path.read_bytes() for path in tls)
            credentials = grpc.ssl_server_credentials([(key, certificate)])
            self.endpoint = f"https://127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', credentials)}"
        else:
            self.endpoint = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def stop(self):
        self.server.stop(0).wait()


class _Traces(traces_grpc.TraceServiceServicer):
    def __init__(self, collector):
        self.collector = collector

    def Export(self, request, context):
        self.collector.take_traces(request, dict(context.invocation_metadata()))
        return traces_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, collector):
        self.collector = collector

    def Export(self, request, context):
        self.collector.take_metrics(request, dict(context.invocation_metadata()))
        return metrics_pb2.ExportMetricsServiceResponse()


class OverHttp(Collector):
    protocol = "http/protobuf"

    def __init__(self, tls=None):
        super().__init__()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                headers = {name.lower(): value for name, value in self.headers.items()}
                assert headers["content-type"] == "application/x-protobuf"
                body = self.rfile.read(int(headers["content-length"]))
                if self.path == "/v1/traces":
                    collector.take_traces(traces_pb2.ExportTraceServiceRequest.FromString(body), headers)
                elif self.path == "/v1/metrics":
                    collector.take_metrics(metrics_pb2.ExportMetricsServiceRequest.FromString(body), headers)
                else:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls[1], tls[0])
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()


def samples(metrics):
    """OTLP metrics as a Prometheus page has them: {(sample, labels): number}."""
    found = {}

    def add(name, labels, value):
        found[name, tuple(sorted(labels.items()))] = float(value)

    for metric in metrics:
        kind = metric.WhichOneof("data")
        for point in getattr(metric, kind).data_points:
            labels = attributes(point.attributes)
            if kind == "histogram":
                add(f"{metric.name}_count", labels, point.count)
                add(f"{metric.name}_sum", labels, point.sum)
                assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
                total = 0
                for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts):
                    total += count
                    add(f"{metric.name}_bucket", {**labels, "le": str(float(bound))}, total)
            else:
                if kind == "sum":
                    assert metric.sum.is_monotonic and metric.sum.aggregation_temporality == 2
                    assert 0 < point.start_time_unix_nano <= point.time_unix_nano
                add(metric.name, labels, getattr(point, point.WhichOneof("value")))
    return found
