"""What the node process costs in user space: time to ready, resident memory while it writes, CPU per row.

How: the real agent on a cluster of namespaces, clients that connect as fast as they can, /proc of the agent before and
after. With --services beside an API server that tells of so many, of ten endpoints each; with --scrape the agent
listens, and its metrics are asked for that often.
Run it as root: python -m tests.bench.node_process [--connections N] [--services N] [--scrape SECONDS]
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests import kube_lab
from tests.bench import naming
from tests.bench.proc import cpu_seconds, memory
from tests.kube_api import KubeApi, serving
from tracer.kernel.maps import Sizes
from tracer.lab.cluster import Cluster


@contextlib.contextmanager
def api_server(cluster: Cluster, services: int, directory: str) -> Iterator[list[str]]:
    """An API server that knows the cluster and so many services more; yields the agent's options for it."""
    if not services:
        yield []
        return
    with serving(bookmark_s=30.0) as api:
        fill(api, cluster, services)
        yield ["--kubeconfig", str(api.kubeconfig(Path(directory, "kubeconfig")))]


def fill(api: KubeApi, cluster: Cluster, services: int) -> None:
    for kind, objects in kube_lab.objects(cluster).items():
        api.set(kind, *objects)
    api.set("services", *map(naming.service, range(services)))
    api.set("endpointslices", *naming.slices(services, 10 * services))


def scrape(address: str, every_s: float, took: list[float]) -> None:
    """Asks for the metrics until nobody answers; notes what each time took, in seconds."""
    with contextlib.suppress(OSError):
        while True:
            began = time.monotonic()
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
                answer.read()
            took.append(time.monotonic() - began)
            time.sleep(every_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=40_000)
    parser.add_argument("--services", type=int, default=0)
    parser.add_argument("--scrape", type=float, default=0.0)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(backends=6, clients=2) as cluster,
        api_server(cluster, arguments.services, directory) as names,
    ):
        ready = Path(directory) / "ready"
        pods = [pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods)]
        command = [sys.executable, "-m", "tracer", "agent", "--output", f"{directory}/data", "--node", "node-1"]
        command += ["--netns", cluster.node.path, "--ready-file", str(ready), "--rotate", "2s"]
        command += [part for path in (cluster.node.path, *pods) for part in ("--only-netns", path)]
        command += names
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command += ["--listen", address] if arguments.scrape else []
        began = time.monotonic()
        agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not ready.exists():
            assert agent.poll() is None, "the agent did not start"
            time.sleep(0.005)
        to_ready = time.monotonic() - began
        scraped: list[float] = []
        if arguments.scrape:
            threading.Thread(target=scrape, args=(address, arguments.scrape, scraped), daemon=True).start()
            time.sleep(3 * arguments.scrape)
        idle = memory(agent.pid, "VmRSS")
        before = sum(cpu_seconds(agent.pid))
        began = time.monotonic()
        for client in cluster.clients:
            client.begin_connects(arguments.connections // 2, cluster.vip(), 100, 100)
        for client in cluster.clients:
            client.finish_connects()
        took = time.monotonic() - began
        time.sleep(2.5)  # one rotation more
        used = sum(cpu_seconds(agent.pid)) - before
        resident, peak = memory(agent.pid, "VmRSS"), memory(agent.pid, "VmHWM")
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        size = sum(path.stat().st_size for path in Path(directory, "data", "connections").rglob("*.parquet"))
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs; {arguments.connections} connections in {took:.1f} s")
    print(f"  services told of          {arguments.services:6d}")
    if scraped:
        print(
            f"  scrapes                   {len(scraped):6d}, median {sorted(scraped)[len(scraped) // 2] * 1e3:.1f} ms"
        )
    print(f"  exec to ready             {to_ready:6.2f} s")
    print(f"  resident when ready       {idle / 1e6:6.1f} MB")
    print(f"  resident while writing    {resident / 1e6:6.1f} MB (peak {peak / 1e6:.1f} MB)")
    print(f"  user and system CPU       {used / arguments.connections * 1e6:6.1f} µs per row")
    print(f"  bytes per row on disk     {size / arguments.connections:6.1f}")
    print(f"  kernel memory of the maps {Sizes().kernel_bytes() / 1e6:6.1f} MB, preallocated")


if __name__ == "__main__":
    main()
