"""How long a cluster's first lists take over HTTP, and what they cost in memory: requests, JSON, objects, book.

    python -m tests.bench.api_load [--services N] [--endpoints N]

A server in another process has the answers ready, each list whole as from the API server's watch cache, and watches
that say nothing. Prints the rig and the figures. Not a test: they depend on the machine.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.bench.naming import NODES, memory, node, service, slices
from tracer.naming.api import PATHS
from tracer.naming.book import Book
from tracer.naming.objects import KINDS
from tracer.naming.watch import Watches

PODS = 110


def pod(number: int) -> dict[str, Any]:
    """A pod of this node as the API writes it, without what nobody reads."""
    name = f"client-{number}"
    meta = {"namespace": f"ns-{number % 200}", "name": name, "uid": f"892981de-6164-425f-b081-{number:012x}"}
    status = {"phase": "Running", "podIPs": [{"ip": f"10.64.0.{number}"}], "startTime": "2026-11-01T00:00:00Z"}
    return {"metadata": meta, "spec": {"nodeName": "node-0"}, "status": status}


def answers(services: int, endpoints: int) -> dict[str, bytes]:
    """The body of each kind's list, by path."""
    items: dict[str, Iterator[Any]] = {
        "services": map(service, range(services)),
        "endpointslices": slices(services, endpoints),
        "pods": map(pod, range(PODS)),
        "nodes": map(node, range(NODES)),
    }
    whole = {"kind": "List", "metadata": {"resourceVersion": "7"}}
    return {PATHS[kind]: json.dumps(whole | {"items": list(made)}).encode() for kind, made in items.items()}


def serve(ready: Connection, services: int, endpoints: int) -> None:
    """The server's process: sends its port and the bytes of all lists when it is ready."""
    bodies = answers(services, endpoints)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            watch = "watch" in parse_qs(url.query)
            self.send_response(200)
            if not watch:
                self.send_header("Content-Length", str(len(bodies[url.path])))
                self.end_headers()
                self.wfile.write(bodies[url.path])
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            time.sleep(3600)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    ready.send((server.server_address[1], sum(map(len, bodies.values()))))
    server.serve_forever()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=20_000)
    parser.add_argument("--endpoints", type=int, default=250_000)
    options = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, options.services, options.endpoints), daemon=True
    )
    server.start()
    port, size = ours.recv()
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "kubeconfig")
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "c"}}
        user = {"name": "c", "user": {}}
        content = {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "c"}
        config.write_text(json.dumps(content), encoding="ascii")
        watches, book = Watches(config, "node-0"), Book()
    before, _ = memory()
    begin, cpu = time.perf_counter(), time.process_time()
    watches.start()
    while len(book.synced) < len(KINDS):
        book.apply(watches.changes())
        time.sleep(0.02)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    resident, peak = memory()
    watches.stop()
    server.kill()
    print(
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    print(
        f"{options.services:,} services, {options.endpoints:,} endpoints, {NODES:,} nodes: {size / 1e6:.0f} MB of JSON"
    )
    print(f"{seconds:>12.1f} s           from the first request to names ({cpu:.1f} s of CPU)")
    print(f"{resident:>12.0f} MB          resident, {before:.0f} of them before (peak {peak:.0f})")


if __name__ == "__main__":
    main()
