"""A cluster that exists only in its tables: pods, services, kube-proxy's picks, lives of connections, agents' rows.

Seeded, in NumPy. A `World` gets pods and services, `dial` adds traffic (who dials when, and for how long), and
`agents.tables` makes the three tables of the schema as the agents of all nodes would have published them. What caused
what stands nowhere in them.

Times are seconds relative to the start of the range; connections may begin before it (negative times).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from .traffic import Dials

#: 2026-07-31T12:00:00Z, the start of the range.
EPOCH_NS = 1_785_499_200 * 10**9
INTERVAL_S = 60


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod; `node` is the number of its node."""

    name: str
    namespace: str
    workload: str
    ip: str
    node: int


@dataclasses.dataclass
class Backend:
    """An endpoint: ready in [joined, left), terminating in [left, gone); `weight`: of a balancer that is not fair."""

    pod: Pod
    port: int = 8080
    joined: float = -math.inf
    left: float = math.inf
    gone: float = math.inf
    weight: float = 1.0


@dataclasses.dataclass
class Service:
    """One port of a service; `hinted` puts zone hints on all endpoints, as topology-aware routing does."""

    name: str
    virtual_ip: str
    backends: list[Backend]
    port: int = 80
    protocol: str = "tcp"
    affinity_s: int | None = None
    internal_policy: str = "Cluster"
    hinted: bool = False
    namespace: str = "shop"


#: Who picks the backends: the place of one for each of the dials. It may also change what becomes of them.
Pick = Callable[["World", Service, Dials], np.ndarray]


class World:
    """Nodes in zones, pods on them, services, and the traffic so far."""

    def __init__(self, seed: int, nodes: int = 4, zones: int = 2, range_s: int = 3600) -> None:
        self.rng = np.random.default_rng(seed)
        self.range_s = range_s
        self.nodes = [f"node-{i}" for i in range(nodes)]
        self.zones = [f"zone-{chr(ord('a') + i % zones)}" for i in range(nodes)]
        #: Seconds by which each node's kube-proxy is behind, and the moment from which it hears nothing any more.
        self.lag = self.rng.uniform(0.2, 2.0, nodes)
        self.frozen = np.full(nodes, math.inf)
        self.lost: dict[int, Callable[[pa.Table], np.ndarray]] = {}
        self.services: list[Service] = []
        self._pods = 0
        self.traffic: list[tuple[Service, list[Pod], Dials, np.ndarray]] = []

    def pods(self, workload: str, n: int, nodes: Sequence[int] = (), namespace: str = "shop") -> list[Pod]:
        """Makes n pods of one ReplicaSet, on the given nodes in turn (default: all)."""
        places = list(nodes) or list(range(len(self.nodes)))
        template = "".join(self.rng.choice(list("bcdf456789"), 9))
        made = []
        for i in range(n):
            number, node = self._pods, places[i % len(places)]
            self._pods += 1
            name = f"{workload}-{template}-{''.join(self.rng.choice(list('bcdfghjklmnpqrstvwxz2456789'), 5))}"
            made.append(Pod(name, namespace, workload, f"10.{100 + node}.{number // 250}.{number % 250 + 2}", node))
        return made

    def service(self, name: str, backends: Sequence[Backend | Pod], **more: object) -> Service:
        """Makes a service over these backends."""
        n = len(self.services)
        address = f"10.96.{n // 250}.{n % 250 + 1}"
        ends = [b if isinstance(b, Backend) else Backend(b) for b in backends]
        made = Service(name, address, ends, **more)  # type: ignore[arg-type]
        self.services.append(made)
        return made

    def dial(self, service: Service, clients: list[Pod], dials: Dials, pick: Pick | None = None) -> np.ndarray:
        """Lets clients dial; returns the places of the backends they got (`pick`, default kube-proxy's)."""
        dials.node = np.array([pod.node for pod in clients])[dials.client] if len(dials) else dials.client
        got = (pick or kube_proxy)(self, service, dials)
        self.traffic.append((service, clients, dials, got))
        return got

    def eligible(self, service: Service, at: float, node: int) -> list[int]:
        """Places of the backends that kube-proxy of `node` would have in its rules at that moment."""
        seen = min(at - self.lag[node], self.frozen[node])
        ready = [i for i, b in enumerate(service.backends) if b.joined <= seen < b.left]
        if service.internal_policy == "Local":
            return [i for i in ready if service.backends[i].pod.node == node]
        if service.hinted:
            near = [i for i in ready if self.zones[service.backends[i].pod.node] == self.zones[node]]
            return near or ready
        return ready


def kube_proxy(world: World, service: Service, dials: Dials) -> np.ndarray:
    """What kube-proxy does (iptables and nftables modes): an independent pick among the node's endpoints, at random.

    With session affinity a client address keeps its backend while it comes back within `affinity_s`.
    """
    changes = sorted({t for b in service.backends for t in (b.joined, b.left) if math.isfinite(t)})
    got = np.zeros(len(dials), np.int64)
    for node in np.unique(dials.node):
        epoch = np.searchsorted(np.array(changes) + world.lag[node], dials.at, side="right")
        for number in np.unique(epoch[dials.node == node]):
            mine = np.flatnonzero((dials.node == node) & (epoch == number))
            among = np.array(world.eligible(service, float(dials.at[mine].max()), int(node)))
            weight = np.array([service.backends[i].weight for i in among])
            got[mine] = among[np.searchsorted(np.cumsum(weight / weight.sum())[:-1], world.rng.random(len(mine)))]
    return sticky(dials, got, service.affinity_s) if service.affinity_s is not None else got


def sticky(dials: Dials, got: np.ndarray, timeout_s: float) -> np.ndarray:
    """The same picks, but a client keeps its last backend until it has been away for `timeout_s`."""
    order = np.lexsort((dials.at, dials.client))
    client, at = dials.client[order], dials.at[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (client[1:] != client[:-1]) | (np.diff(at) > timeout_s)
    kept = np.empty_like(got)
    kept[order] = got[order][np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    return kept
