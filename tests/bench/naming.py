"""How fast batches are named, and what a whole cluster costs in time and memory.

    python -m tests.bench.naming [--services N] [--endpoints N] [--rows N]

Prints the rig and a small table. The cluster: services with a virtual address and slices of 100 endpoints; from JSON
text, as it comes over HTTP, page by page of 500 objects, to a book that can name. The batches: 16,384 rows of 300
clients, 200 services and 2,000 backends; the same with connections that began while pods came and went; the same with
a slice, or a pod of this node, that changes before each batch; and one in which every address is another. Not a test:
figures depend on the machine.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tracer.naming.book import Book
from tracer.naming.names import Namer
from tracer.naming.objects import Pod, Slice, read
from tracer.record import RECORD, Flag, Nat, NatSource

BATCH, CLIENTS, DIALLED, BACKENDS = 16_384, 300, 200, 2_000
SLICE, PAGE, NODES = 100, 500, 5_000
SECOND = 10**9
NOON = 1_795_500_000 * SECOND


@dataclasses.dataclass(frozen=True)
class Heard:
    """A change as the watch makes it."""

    kind: str
    what: str
    object: Any
    at_ns: int = NOON


def address(network: int, number: int) -> str:
    """The number's address in 10.0.0.0/8, one /9 or less for each network."""
    return f"10.{network + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def memory() -> tuple[float, float]:
    """Resident and peak resident memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
    return found["VmRSS:"], found["VmHWM:"]


def service(number: int) -> dict[str, Any]:
    """A service as the API writes it."""
    return {
        "metadata": {"namespace": f"ns-{number % 200}", "name": f"service-{number}", "uid": f"5f6a2526-{number:08x}"},
        "spec": {"clusterIP": address(96, number), "type": "ClusterIP", "ports": [{"name": "http", "port": 80}]},
    }


def endpoint(number: int, owner: int) -> dict[str, Any]:
    """An endpoint of a service as the API writes it."""
    name = f"service-{owner}-7d9f8c6b5-{number:05x}"
    target = {
        "kind": "Pod",
        "namespace": f"ns-{owner % 200}",
        "name": name,
        "uid": f"892981de-6164-425f-a081-{number:012x}",
    }
    return {
        "addresses": [address(128, number)],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{number % NODES}",
        "zone": f"zone-{number % 3}",
        "targetRef": target,
    }


def slices(services: int, endpoints: int) -> Iterator[dict[str, Any]]:
    """Slices of all services, which have equally many endpoints (at least one slice)."""
    each = max(1, endpoints // services)
    for owner in range(services):
        for part in range(0, each, SLICE):
            numbers = range(owner * each + part, owner * each + min(each, part + SLICE))
            labels = {"kubernetes.io/service-name": f"service-{owner}"}
            name, uid = f"service-{owner}-{part:05x}", f"4101e768-{owner:08x}-{part}"
            yield {
                "metadata": {"namespace": f"ns-{owner % 200}", "name": name, "uid": uid, "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": [endpoint(number, owner) for number in numbers],
            }


def node(number: int) -> dict[str, Any]:
    """A node as the API writes it."""
    return {
        "metadata": {"name": f"node-{number}", "uid": f"n-{number}"},
        "status": {"addresses": [{"type": "InternalIP", "address": address(80, number)}]},
    }


def pages(items: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The items as the text of list answers."""
    page: list[dict[str, Any]] = []
    for item in items:
        page.append(item)
        if len(page) == PAGE:
            yield json.dumps({"items": page})
            page = []
    yield json.dumps({"items": page})


def load(book: Book, kind: str, items: Iterator[dict[str, Any]]) -> float:
    """Has the book hear a list; returns the seconds from its text to its being known."""
    found, seconds = [], 0.0
    for text in pages(items):  # made one at a time, as they come from a socket
        begin = time.perf_counter()
        found += [read(kind, item) for item in json.loads(text)["items"]]
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    book.apply([Heard(kind, "all", found)])
    return seconds + time.perf_counter() - begin


def void(texts: list[str]) -> np.ndarray:
    """Addresses as they are in records."""
    raw = np.zeros((len(texts), 16), dtype=np.uint8)
    raw[:, 10:12] = 255
    raw[:, 12:] = [[int(part) for part in text.split(".")] for text in texts]
    return raw.view("V16").reshape(len(texts))


def batch(seed: int, clients: int, dialled: int, backends: int) -> np.ndarray:
    """A batch of rewritten connections with so many distinct values of each."""
    random = np.random.default_rng(seed)
    rows = np.zeros(BATCH, dtype=RECORD)
    rows["tuple"]["src"] = void([address(64, i) for i in range(clients)])[np.arange(BATCH) % clients]
    rows["tuple"]["dst"] = void([address(96, i) for i in range(dialled)])[random.permutation(BATCH) % dialled]
    rows["tuple"]["dst_port"], rows["tuple"]["protocol"] = 80, 6
    rows["backend"] = void([address(128, i) for i in range(backends)])[random.permutation(BATCH) % backends]
    rows["backend_port"], rows["nat"], rows["nat_source"] = 8080, Nat.DNAT, NatSource.CONNTRACK
    rows["flags"] = sum(Flag) & ~Flag.PROCESS
    return rows


def speed(book: Book, batches: list[np.ndarray], starts: np.ndarray, rows: int, changes: list[Heard]) -> float:
    """Rows named per second; before each batch one of the changes is heard, if there are any."""
    namer = Namer(book)
    namer.name(batches[0], starts)
    count = max(1, rows // BATCH)
    begin = time.perf_counter()
    for i in range(count):
        if changes:
            book.apply([changes[i % len(changes)]])
        namer.name(batches[i % len(batches)], starts)
    return count * BATCH / (time.perf_counter() - begin)


def say(rows: float, what: str) -> None:
    """Prints one figure."""
    print(f"{rows:>12,.0f} rows/s      {what}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=20_000)
    parser.add_argument("--endpoints", type=int, default=250_000)
    parser.add_argument("--rows", type=int, default=2_000_000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    python = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{platform.machine()}, Linux {platform.release()}, {python}, one core")
    print(f"{options.services:,} services, {options.endpoints:,} endpoints, {NODES:,} nodes, batches of {BATCH:,} rows")
    before, _ = memory()
    book = Book()
    seconds = load(book, "nodes", map(node, range(NODES)))
    seconds += load(book, "services", map(service, range(options.services)))
    seconds += load(book, "endpointslices", slices(options.services, options.endpoints))
    clients = [
        Pod(f"ns-{i}", f"client-{i}", f"c-{i}", tuple(a.tobytes() for a in void([address(64, i)])), started_ns=NOON)
        for i in range(CLIENTS)
    ]
    book.apply([Heard("pods", "all", clients)])
    resident, peak = memory()
    print(f"{seconds:>12.1f} s           from JSON text to names")
    print(f"{resident:>12.0f} MB          resident, {before:.0f} of them before loading (peak {peak:.0f})")

    usual = [batch(seed, CLIENTS, DIALLED, BACKENDS) for seed in range(8)]
    now = np.full(BATCH, NOON + SECOND, dtype=np.int64)
    early = NOON - np.random.default_rng(0).integers(-60, 120, BATCH) * SECOND
    part = [each for item in slices(10, 20 * SLICE) if isinstance(each := read("endpointslices", item), Slice)]
    smaller = [dataclasses.replace(each, endpoints=each.endpoints[1:]) for each in part]
    changes = [Heard("endpointslices", "set", each) for pair in zip(smaller, part, strict=True) for each in pair]
    pods = [Heard("pods", "set", dataclasses.replace(clients[0], phase=f"p{i}")) for i in range(2)]
    other = [batch(seed, BATCH, min(BATCH, options.services), min(BATCH, options.endpoints)) for seed in range(4)]
    say(speed(book, usual, now, options.rows, []), f"{CLIENTS} clients, {DIALLED} services, {BACKENDS:,} backends")
    say(speed(book, usual, early, options.rows, []), "the same, begun before and after names changed")
    say(speed(book, usual, now, options.rows, changes), "the same, a slice changed between batches")
    say(speed(book, usual, now, options.rows, pods), "the same, a pod of this node changed between batches")
    say(speed(book, other, now, options.rows // 8, pods), "every address of a batch another, and a pod changed")


if __name__ == "__main__":
    main()
