"""Measures Countersign beside its peers, interleaved in one run, and writes bench/results/.

    bench/run.py [--pairs N] [--seconds S] [--only pair,law,policies,connections,start,decide,contract,token,gate,fanout,append,verify,failover]

The pair: load generator -> sidecar -> HTTP/2 over mutual TLS -> sidecar -> nginx with a 1 KB answer. Both proxies of a pair
share core 0; load generator and backend share core 1. Everything listens on loopback and every load ends by itself.
"""

import argparse
import base64
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = ROOT / "target/release/countersign"
LAWLESS = ROOT / "target/lawless/release/countersign"  # RUSTFLAGS=--cfg=countersign_bench_lawless
ENVOY = next((ROOT / "target/test-python").glob("lib/python3*/site-packages/envoy/_bin/envoy"), None)
RESULTS = ROOT / "bench/results"
TICKS = os.sysconf("SC_CLK_TCK")
PROXY_CORE, LOAD_CORE = "0", "1"
CARGO_BENCH = ["cargo", "bench", "--quiet", "--locked", "--workspace", "--bench"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_http(url, seconds=20):
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return answer.read()
        except OSError as error:
            if time.monotonic() > end:
                sys.exit(f"{url} did not answer within {seconds} s: {error}")
            time.sleep(0.05)


def cpu_seconds(pids):
    total = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def resident_mb(pids):
    kb = 0
    for pid in pids:
        kb += int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])
    return kb / 1024


def pin(pids, core):
    for pid in pids:
        subprocess.run(["taskset", "-a", "-p", "-c", core, str(pid)], check=True, stdout=subprocess.DEVNULL)


class Backend:
    """nginx with one worker and a 1 KB answer."""

    def __init__(self, scratch):
        self.port = free_port()
        body = "x" * 1024
        config = scratch / "nginx.conf"
        config.write_text(
            f"""daemon off; worker_processes 1; pid {scratch}/nginx.pid; error_log {scratch}/nginx.log crit;
            events {{ worker_connections 4096; }}
            http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600;
              client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;
              uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
              server {{ listen 127.0.0.1:{self.port}; location / {{ return 200 "{body}"; }} }} }}"""
        )
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        self.process = subprocess.Popen(["taskset", "-c", LOAD_CORE, nginx, "-p", str(scratch), "-c", str(config)])
        wait_http(f"http://127.0.0.1:{self.port}/")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)


class Ours:
    """Two sidecars of a mesh that `countersign up` runs, without isolation so that the load generator reaches them."""

    name = "countersign"

    def __init__(self, scratch, backend, policies=1, binary=BINARY):
        self.directory = scratch / f"mesh-{policies}"
        (self.directory / "policies").mkdir(parents=True)
        (self.directory / "mesh.toml").write_text(
            f"""trust_domain = "bench.example"
[defaults]
isolate = "off"
[services.backend]
port = {backend.port}
[services.client]
port = {free_port()}
upstreams = ["backend"]
"""
        )
        permits = [
            '@id("client-reads") permit (principal == Workload::"client", action == Action::"http:GET",'
            ' resource in Service::"backend") when { context.request.path like "/*" };\n'
        ]
        for n in range(policies - 1):
            permits.append(
                f'@id("other-{n}") permit (principal == Workload::"spiffe://bench.example/others/n{n}",'
                f' action == Action::"http:GET", resource in Service::"backend")'
                f' when {{ context.request.path like "/{n}/*" }};\n'
            )
        (self.directory / "policies/bench.cedar").write_text("".join(permits))
        self.log = open(scratch / f"up-{policies}.log", "w")
        started = time.monotonic()
        self.process = subprocess.Popen(
            [binary, "up", self.directory], stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL
        )
        run_file = self.directory / ".countersign/run.json"
        while not run_file.exists():
            if self.process.poll() is not None or time.monotonic() - started > 60:
                sys.exit(f"`up` did not get ready; see {self.log.name}")
            time.sleep(0.005)
        run = json.loads(run_file.read_text())
        self.url = f"http://{run['services']['client']['upstreams']['backend']}/"
        wait_http(self.url)
        self.start_seconds = time.monotonic() - started
        self.pids = self.sidecars()
        assert len(self.pids) == 2, self.pids

    def sidecars(self):
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and b"sidecar" in words[1:2]:
                found.append(int(entry.name))
        return found

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


def certificates(scratch):
    """A root and two SVIDs, made with openssl."""

    def run(*words, **more):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=scratch, **more)

    run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "root.key", "-out",
        "root.pem", "-subj", "/CN=bench root", "-days", "2")
    for name in ("client", "backend"):
        run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key", "-out",
            f"{name}.csr", "-subj", f"/CN={name}")
        (scratch / f"{name}.ext").write_text(
            f"subjectAltName=URI:spiffe://bench.example/{name}\nkeyUsage=critical,digitalSignature\n"
            "extendedKeyUsage=serverAuth,clientAuth\n"
        )
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-out",
            f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext")


class Envoys:
    """Two Envoys: HTTP/1.1 in, HTTP/2 over mutual TLS 1.3 between, RBAC at the second; one worker each, no access log."""

    name = "envoy"

    def __init__(self, scratch, backend, policies=1):
        if not (scratch / "root.pem").exists():
            certificates(scratch)
        front, middle = free_port(), free_port()
        self.middle = middle
        tls = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["h2"],
        }

        def common(me, peer):
            return tls | {
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": f"{scratch}/{me}.pem"},
                        "private_key": {"filename": f"{scratch}/{me}.key"},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": f"{scratch}/root.pem"},
                    "match_typed_subject_alt_names": [
                        {"san_type": "URI", "matcher": {"exact": f"spiffe://bench.example/{peer}"}}
                    ],
                },
            }

        def kind(name):
            return f"type.googleapis.com/envoy.extensions.{name}"

        def listener(port, filters, socket_tls):
            chain = {
                "filters": [
                    {
                        "name": "hcm",
                        "typed_config": {
                            "@type": kind("filters.network.http_connection_manager.v3.HttpConnectionManager"),
                            "stat_prefix": "in",
                            "route_config": {
                                "virtual_hosts": [
                                    {
                                        "name": "all",
                                        "domains": ["*"],
                                        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "next"}}],
                                    }
                                ]
                            },
                            "http_filters": filters
                            + [
                                {
                                    "name": "router",
                                    "typed_config": {"@type": kind("filters.http.router.v3.Router")},
                                }
                            ],
                        },
                    }
                ]
            }
            if socket_tls:
                chain["transport_socket"] = {"name": "tls", "typed_config": socket_tls}
            address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
            return {"name": "in", "address": address, "filter_chains": [chain]}

        def cluster(port, upstream_tls):
            made = {
                "name": "next",
                "type": "STATIC",
                "connect_timeout": "1s",
                "load_assignment": {
                    "cluster_name": "next",
                    "endpoints": [
                        {
                            "lb_endpoints": [
                                {
                                    "endpoint": {
                                        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}
                                    }
                                }
                            ]
                        }
                    ],
                },
            }
            if upstream_tls:
                made["transport_socket"] = {"name": "tls", "typed_config": upstream_tls}
                made["typed_extension_protocol_options"] = {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": kind("upstreams.http.v3.HttpProtocolOptions"),
                        "explicit_http_config": {"http2_protocol_options": {}},
                    }
                }
            return made

        def rule(path, principal):
            return {
                "permissions": [
                    {
                        "and_rules": {
                            "rules": [
                                {"header": {"name": ":method", "string_match": {"exact": "GET"}}},
                                {"url_path": {"path": {"prefix": path}}},
                            ]
                        }
                    }
                ],
                "principals": [{"authenticated": {"principal_name": {"exact": principal}}}],
            }

        rules = {"client-reads": rule("/", "spiffe://bench.example/client")}
        for n in range(policies - 1):
            rules[f"a-other-{n}"] = rule(f"/{n}/", f"spiffe://bench.example/others/n{n}")
        rbac = {
            "name": "rbac",
            "typed_config": {
                "@type": kind("filters.http.rbac.v3.RBAC"),
                "rules": {"action": "ALLOW", "policies": rules},
            },
        }
        down = {
            "@type": kind("transport_sockets.tls.v3.DownstreamTlsContext"),
            "common_tls_context": common("backend", "client"),
            "require_client_certificate": True,
        }
        up = {
            "@type": kind("transport_sockets.tls.v3.UpstreamTlsContext"),
            "common_tls_context": common("client", "backend"),
        }
        self.processes = []
        for which, (inbound, outbound) in enumerate(
            [
                (listener(front, [], None), cluster(middle, up)),
                (listener(middle, [rbac], down), cluster(backend.port, None)),
            ]
        ):
            config = scratch / f"envoy-{policies}-{which}.json"
            config.write_text(json.dumps({"static_resources": {"listeners": [inbound], "clusters": [outbound]}}))
            self.processes.append(
                subprocess.Popen(
                    [ENVOY, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "error"],
                    stdin=subprocess.DEVNULL,
                )
            )
        self.pids = [process.pid for process in self.processes]
        self.url = f"http://127.0.0.1:{front}/"
        wait_http(self.url)

    def stop(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(20)


def h2load(url, *words):
    command = ["taskset", "-c", LOAD_CORE, "h2load", "--h1", "-t", "1", *map(str, words), url]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout
    codes = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    if int(codes[2]) + int(codes[3]) + int(codes[4]) or not int(codes[1]):
        sys.exit(f"answers other than 2xx from {url}:\n{output}")
    return float(re.search(r"([\d.]+) req/s", output)[1]), int(codes[1])


def closed_loop(target, seconds):
    """64 connections, as fast as it goes."""
    before = cpu_seconds(target.pids)
    rate, done = h2load(target.url, "-c", 64, "-D", seconds, "--warm-up-time", 1)
    # h2load counts what came after the warm-up; the processor time covers both, so it is scaled to the counted part.
    spent = (cpu_seconds(target.pids) - before) * seconds / (seconds + 1)
    return {"requests_per_second": rate, "cpu_seconds_per_100k": spent / done * 100_000}


def fixed_rate(target, seconds, scratch, rate=1000, connections=64):
    """1 000 requests a second over 64 connections; every request's duration is logged."""
    log = scratch / "latency.log"
    log.unlink(missing_ok=True)
    h2load(target.url, "-c", connections, "-D", seconds, "--rps", rate / connections, "--log-file", log)
    durations = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())

    def at(share):
        return durations[min(len(durations) - 1, int(len(durations) * share))]

    return {"p50_us": at(0.5), "p99_us": at(0.99), "p99_9_us": at(0.999), "requests": len(durations)}


def held_connections(target, count=1000):
    """Resident memory idle, and with `count` idle connections that each made one request."""
    idle = resident_mb(target.pids)
    host, port = re.match(r"http://([\d.]+):(\d+)/", target.url).groups()
    held = []
    for _ in range(count):
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall(b"GET / HTTP/1.1\r\nhost: backend.mesh\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200"), "a held connection was refused"
        held.append(connection)
    loaded = resident_mb(target.pids)
    for connection in held:
        connection.close()
    return {"resident_idle_mb": idle, f"resident_{count}_connections_mb": loaded}


def interval(values):
    values = sorted(values)
    return {"median": statistics.median(values), "low": values[0], "high": values[-1], "n": len(values)}


def ratio(ours, theirs):
    return interval([a / b for a, b in zip(ours, theirs)])


def bench_pair(options, scratch, backend):
    ours = Ours(scratch, backend)
    others = [Envoys(scratch, backend)] if ENVOY else []
    everyone = [ours, *others]
    for target in everyone:
        pin(target.pids, PROXY_CORE)
    memory = {target.name: {"resident_idle_mb": resident_mb(target.pids)} for target in everyone}
    runs = {target.name: [] for target in everyone}
    direct = []
    for pair in range(options.pairs):
        for target in everyone if pair % 2 == 0 else everyone[::-1]:
            run = closed_loop(target, options.seconds) | fixed_rate(target, options.seconds, scratch)
            runs[target.name].append(run)
            print(f"  pair {pair + 1}/{options.pairs} {target.name}: {run}", flush=True)
        direct.append(h2load(f"http://127.0.0.1:{backend.port}/", "-c", 64, "-D", 2)[0])
    for target in everyone:
        memory[target.name] |= held_connections(target)
        target.stop()
    result = {"runs": runs, "memory": memory, "direct_requests_per_second": interval(direct)}
    if others:
        result["ratio_to_envoy"] = {
            key: ratio([run[key] for run in runs["countersign"]], [run[key] for run in runs["envoy"]])
            for key in ("requests_per_second", "cpu_seconds_per_100k", "p50_us", "p99_us", "p99_9_us")
        }
    return result


def bench_policies(options, scratch, backend):
    """What 1 000 policies cost against 1, for each."""
    result = {}
    for kind in [Ours] + ([Envoys] if ENVOY else []):
        few, many = kind(scratch / "few", backend), kind(scratch / "many", backend, policies=1000)
        for target in (few, many):
            pin(target.pids, PROXY_CORE)
        pairs = [(closed_loop(few, options.seconds), closed_loop(many, options.seconds)) for _ in range(options.pairs)]
        result[kind.name] = {
            key: ratio([many[key] for _, many in pairs], [few[key] for few, _ in pairs])
            for key in ("requests_per_second", "cpu_seconds_per_100k")
        }
        few.stop()
        many.stop()
        print(f"  1 000 policies against 1, {kind.name}: {result[kind.name]}", flush=True)
    return result


def bench_start(options, scratch, backend):
    """From `up` on a new directory to the first allowed request, the services being there already."""
    seconds = []
    for n in range(options.pairs):
        target = Ours(scratch / f"start-{n}", backend)
        seconds.append(target.start_seconds)
        target.stop()
    return {"first_start_to_first_request_seconds": interval(seconds)}


def pem(kind, der_base64url):
    der = base64.urlsafe_b64decode(der_base64url + "=" * (-len(der_base64url) % 4))
    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""])


def handshakes(address, pid, chain, key, group, seconds, clients=8):
    """New mutual TLS 1.3 connections until HTTP/2 speaks, one after the other from each client; no resumption."""
    command = ["taskset", "-c", LOAD_CORE, *CARGO_BENCH, "handshakes", "--"]
    command += map(str, (address, chain, key, group, seconds, clients))
    before = cpu_seconds([pid])
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    spent = cpu_seconds([pid]) - before
    done = json.loads(output.strip().splitlines()[-1])["connections"]
    return {"connections_per_second": done / seconds, "cpu_milliseconds_per_connection": spent / done * 1e3}


def bench_connections(options, scratch, backend):
    """Full handshakes at the callee's proxy, both ends showing P-256 certificates, ours with an intermediate. X25519 for
    both, and for ours its own preference, the hybrid X25519MLKEM768, as well."""
    ours = Ours(scratch / "connections", backend)
    identity = json.loads((ours.directory / ".countersign/agent/identity.json").read_text())
    chain, key = scratch / "agent.pem", scratch / "agent.key"
    chain.write_text("".join(pem("CERTIFICATE", der) for der in identity["chain"]))
    key.write_text(pem("PRIVATE KEY", identity["key"]))
    run = json.loads((ours.directory / ".countersign/run.json").read_text())
    inbound = run["services"]["backend"]["inbound"]
    pid = listener_pid(ours.pids, int(inbound.rsplit(":", 1)[1]))
    targets = {
        "countersign": (inbound, pid, chain, key, "x25519"),
        "countersign hybrid": (inbound, pid, chain, key, "x25519mlkem768"),
    }
    envoys = Envoys(scratch, backend) if ENVOY else None
    if envoys:
        address = f"127.0.0.1:{envoys.middle}"
        targets["envoy"] = (address, envoys.pids[1], scratch / "client.pem", scratch / "client.key", "x25519")
    for _, pid, *_ in targets.values():
        pin([pid], PROXY_CORE)
    runs = {name: [] for name in targets}
    for _ in range(options.pairs):
        for name, (address, pid, *shown) in targets.items():
            runs[name].append(handshakes(address, pid, *shown, options.seconds))
    for target in filter(None, (ours, envoys)):
        target.stop()
    result = {"runs": runs}
    if envoys:
        result["ratio_to_envoy"] = {
            key: ratio([run[key] for run in runs["countersign"]], [run[key] for run in runs["envoy"]])
            for key in runs["envoy"][0]
        }
    return result


def listener_pid(pids, port):
    """Which of these processes listens on a port of 127.0.0.1."""
    inodes = {
        line.split()[9]
        for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1] == f"0100007F:{port:04X}" and line.split()[3] == "0A"
    }
    for pid in pids:
        for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(descriptor)[8:-1] in inodes:
                return pid
    sys.exit(f"nobody listens on {port}")


def bench_law(options, scratch, backend):
    """What judging and recording cost: this build against one compiled without them (the live table stays in both)."""
    with_law = Ours(scratch / "law", backend)
    without = Ours(scratch / "lawless", backend, binary=LAWLESS)
    for target in (with_law, without):
        pin(target.pids, PROXY_CORE)
    pairs = []
    for pair in range(options.pairs):
        first, second = (with_law, without) if pair % 2 == 0 else (without, with_law)
        measured = {id(first): closed_loop(first, options.seconds), id(second): closed_loop(second, options.seconds)}
        pairs.append((measured[id(with_law)], measured[id(without)]))
    with_law.stop()
    without.stop()
    return {
        f"{key}_with_law_to_without": ratio([a[key] for a, _ in pairs], [b[key] for _, b in pairs])
        for key in ("requests_per_second", "cpu_seconds_per_100k")
    }


def cargo_bench(name):
    """A benchmark of the workspace prints one JSON object on its last line."""
    output = subprocess.run([*CARGO_BENCH, name], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output.strip().splitlines()[-1])


def bench_decide(*_):
    return cargo_bench("decide")


def bench_contract(*_):
    return cargo_bench("contract")


def bench_token(*_):
    return cargo_bench("token")


def bench_gate(*_):
    return cargo_bench("gate")


def bench_fanout(*_):
    return cargo_bench("fanout")


def bench_append(*_):
    return cargo_bench("append")


def bench_verify(*_):
    return cargo_bench("verify")


def bench_failover(*_):
    return cargo_bench("failover")


PARTS = {
    "pair": bench_pair,
    "law": bench_law,
    "policies": bench_policies,
    "connections": bench_connections,
    "start": bench_start,
    "decide": bench_decide,
    "contract": bench_contract,
    "token": bench_token,
    "gate": bench_gate,
    "fanout": bench_fanout,
    "append": bench_append,
    "verify": bench_verify,
    "failover": bench_failover,
}


def envoy_version():
    if not ENVOY:
        return None
    said = subprocess.run([ENVOY, "--version"], capture_output=True, text=True).stdout
    return re.search(r"version: \w+/([\d.]+)", said)[1]


def machine():
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else "unknown",
        "cores": os.cpu_count(),
        "kernel": os.uname().release.split("-")[0],
        "envoy": envoy_version(),
    }


def figure(value, digits=2):
    """One number, or a median with its interval."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def flat(value, name=""):
    """Every number of a result with its path."""
    if isinstance(value, dict) and "median" not in value:
        for key, below in value.items():
            yield from flat(below, f"{name}.{key}" if name else key)
    elif isinstance(value, (int, float, dict)):
        yield name, value


def write_table():
    """bench/README.md from whatever results there are."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` from `results/*.json`. Medians, and in brackets the lowest and highest of the interleaved runs.",
        "The pair is measured as: load generator → sidecar → HTTP/2 over mutual TLS → sidecar → nginx, 1 KB answers, 64",
        "connections; both proxies of a pair on one core, load and backend on the other; policy, record and live table on.",
    ]
    for part in PARTS:
        path = RESULTS / f"{part}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        at, machine_, runs = result.pop("at"), result.pop("machine"), result.pop("runs", {})
        beside = f", Envoy {machine_['envoy']}" if machine_["envoy"] else ""
        lines += ["", f"## {part}", "", f"{at[:10]}, {machine_['cores']} cores of {machine_['processor']}{beside}", ""]
        if runs:
            names = list(runs)
            lines += ["| | " + " | ".join(names) + " | ratio |", "|---|" + "---|" * (len(names) + 1)]
            for key in runs[names[0]][0]:
                if key == "requests":
                    continue
                cells = [figure(interval([run[key] for run in runs[name]])) for name in names]
                ratio_ = result.get("ratio_to_envoy", {}).get(key)
                lines.append(f"| {key} | " + " | ".join(cells) + f" | {figure(ratio_) if ratio_ else ''} |")
            lines.append("")
            result.pop("ratio_to_envoy", None)
        lines += ["| | |", "|---|---|"]
        lines += [f"| {name} | {figure(value)} |" for name, value in flat(result)]
    (ROOT / "bench/README.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for sub in ("few", "many", "law", "lawless", "connections", *(f"start-{n}" for n in range(options.pairs))):
            (scratch / sub).mkdir()
        parts = options.only.split(",")
        backend = Backend(scratch) if any(PARTS[part].__code__.co_argcount for part in parts) else None
        try:
            for part in parts:
                print(f"{part}:", flush=True)
                result = PARTS[part](options, scratch, backend)
                result = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(), **result}
                (RESULTS / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        finally:
            if backend:
                backend.stop()
    write_table()


main()
