"""A small cluster to name: objects, what is heard of them, and records of connections between them."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tracer.naming.book import Book
from tracer.naming.fields import address_bytes
from tracer.naming.holders import ServiceName, Who
from tracer.naming.objects import KINDS, Endpoint, Node, Pod, Service, ServicePort, Slice, SlicePort, read
from tracer.record import RECORD, Flag, Nat

SECOND = 10**9
#: Some moment, a whole second.
NOON = 1_795_500_000 * SECOND
SAMPLES = Path(__file__).resolve().parents[1] / "data" / "kube"


@dataclasses.dataclass(frozen=True)
class Heard:
    kind: str
    what: str
    object: Any
    at_ns: int = NOON


def raw(text: str) -> bytes:
    found = address_bytes(text)
    assert found is not None
    return found


def pod(name: str, ip: str | None = None, **fields: Any) -> Pod:
    namespace, _, plain = name.rpartition("/")
    known: dict[str, Any] = {"uid": f"uid-{plain}", "addresses": (raw(ip),) if ip else (), "node": "node1"}
    return Pod(namespace or "shop", plain, **(known | {"phase": "Running"} | fields))


def endpoint(ip: str, name: str | None = None, **fields: Any) -> Endpoint:
    target = {"pod_namespace": "shop", "pod": name, "uid": f"uid-{name}"} if name else {}
    return Endpoint((raw(ip),), **({"node": "node2", "zone": "b"} | target | fields))


def slice_(name: str, *endpoints: Endpoint, service: str = "web", ports: Iterable[SlicePort] | None = None) -> Slice:
    known = (SlicePort("http", 8080, 6),) if ports is None else tuple(ports)
    return Slice("shop", name, f"uid-{name}", service, "IPv4", known, endpoints)


def service(name: str, *ips: str, **fields: Any) -> Service:
    ports = fields.pop("ports", (ServicePort("http", 80, 6),))
    return Service("shop", name, f"uid-{name}", addresses=tuple(map(raw, ips)), ports=ports, **fields)


def node(name: str, *ips: str, zone: str | None = None) -> Node:
    return Node(name, f"uid-{name}", tuple(map(raw, ips)), zone, NOON - 3600 * SECOND)


def nodes(at_ns: int = NOON - 60 * SECOND) -> Heard:
    """Both nodes, as a list."""
    return Heard(
        "nodes", "all", [node("node1", "172.30.0.11", zone="a"), node("node2", "172.30.0.12", zone="b")], at_ns
    )


def book(*changes: Heard) -> Book:
    """A book that has heard of the nodes, and then of this."""
    made = Book()
    made.apply([nodes(), *changes])
    return made


def sample(kind: str) -> list[Any]:
    """The objects of a real cluster, raw."""
    return list(json.loads((SAMPLES / f"{kind}.json").read_text(encoding="utf-8"))["items"])


def sample_book(at_ns: int = NOON) -> Book:
    made = Book()
    made.apply([Heard(kind, "all", [read(kind, item) for item in sample(kind)], at_ns) for kind in KINDS])
    return made


def name_of(book: Book, ip: str, at_ns: int, port: int = 0) -> str | None:
    """The pod an address is said to be at a moment; None: nobody's; "?": ambiguous."""
    who: Who | None = book.whose(raw(ip), 6, port).at(at_ns)
    return None if who is None else "?" if who.ambiguous else who.pod


def service_of(book: Book, ip: str, port: int, at_ns: int = NOON, here: bool = False) -> str | None:
    found: ServiceName | None = book.service(raw(ip), 6, port, here).at(at_ns)
    return None if found is None else "?" if found.ambiguous else found.service


def records(*rows: dict[str, Any]) -> np.ndarray:
    """Records of TCP connections: src, dst, backend (text addresses), dst_port, backend_port, and record fields."""
    made = np.zeros(len(rows), dtype=RECORD)
    for i, given in enumerate(rows):
        row = {"src": "10.244.1.9", "dst": "10.96.0.9", "dst_port": 80, "backend_port": 8080, "nat": Nat.DNAT} | given
        row.setdefault("backend", row["dst"])
        for name in ("src", "dst"):
            made["tuple"][name][i] = np.void(raw(row.pop(name)))
        made["tuple"]["dst_port"][i] = row.pop("dst_port")
        made["tuple"]["protocol"][i] = row.pop("protocol", 6)
        made["backend"][i] = np.void(raw(row.pop("backend")))
        for name, value in row.items():
            made[name][i] = value
        if "cgroup_id" in row:
            made["flags"][i] |= Flag.PROCESS
    return made
