"""Traffic with one hidden cause of imbalance, made by real rules and real connections.

Knows how to make one pod of the service "web" get about twice the bytes of its peers, for one cause or another, and
what the pods themselves counted meanwhile. Finding the cause is the product's work, not this module's.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tracer.errors import UsageError
from tracer.lab.cluster import Cluster
from tracer.lab.traffic import addresses

#: Bytes of one request and of its answer, for every connection of the scenario alike.
SENDS, RECEIVES = 500, 8_000
#: Long-lived connections in the pool of the cause "long-lived".
POOL = 8
#: How often the extra traffic catches up with the rest.
_SLICE_SECONDS = 0.25

#: Called with the share done (0 to 1) and a word on what is happening.
Progress = Callable[[float, str], None]
#: Carries out as many exchanges as it is given, all with the pod that shall get more.
Extra = Callable[[int], None]


@dataclass(frozen=True)
class Truth:
    """What really happened, as the pods themselves counted it. Lists go by the number of the backend."""

    cause: str
    culprit: int | None  # the number of the backend that got more
    names: list[str]
    ips: list[str]
    connections: list[int]
    bytes: list[int]  # received and sent
    seconds: float

    @property
    def ratio(self) -> float:
        """The busiest pod's bytes over the mean of the others."""
        busiest = int(np.argmax(self.bytes))
        others = [count for index, count in enumerate(self.bytes) if index != busiest]
        return self.bytes[busiest] / max(float(np.mean(others)), 1.0)


@contextmanager
def _long_lived(cluster: Cluster, culprit: int) -> Iterator[Extra]:
    """A worker opened its pool while the service had one backend, and has kept it since."""
    worker = cluster.clients[-1]
    cluster.set_backends("web", [culprit])
    pool = [int(number) for number in worker.hold(POOL, cluster.vip())["number"]]
    cluster.set_backends("web", range(len(cluster.servers)))
    turn = 0

    def extra(count: int) -> None:
        nonlocal turn
        chosen = [pool[(turn + step) % POOL] for step in range(count)]
        turn += count
        worker.exchange(chosen, SENDS, RECEIVES)

    yield extra
    worker.release(pool)  # not after an error or Ctrl-C, when the worker may be in the middle of an answer


@contextmanager
def _second_service(cluster: Cluster, culprit: int) -> Iterator[Extra]:
    """Another service leads to one of the pods too, and has traffic of its own."""
    if "admin" not in cluster.services:
        cluster.add_service("admin", [culprit])
    else:
        cluster.set_backends("admin", [culprit])

    def extra(count: int) -> None:
        cluster.clients[-1].connect_many(count, cluster.vip("admin"), SENDS, RECEIVES)

    yield extra


@contextmanager
def _flapping(cluster: Cluster, culprit: int) -> Iterator[Extra]:
    """All pods but one are unready again and again for a moment, and whoever dials then lands on that one."""

    def extra(count: int) -> None:
        cluster.set_backends("web", [culprit])
        crowd = cluster.clients[:-1]
        for number, client in enumerate(crowd):
            dials = count // len(crowd) + (number < count % len(crowd))
            client.begin_connects(dials, cluster.vip(), SENDS, RECEIVES)
        for client in crowd:
            client.finish_connects()
        cluster.set_backends("web", range(len(cluster.servers)))

    yield extra


@contextmanager
def _nothing(cluster: Cluster, culprit: int) -> Iterator[Extra]:
    """The control: an even load."""
    yield lambda count: None


_SCENARIOS = {
    "long-lived": _long_lived,
    "second-service": _second_service,
    "flapping": _flapping,
    "none": _nothing,
}
CAUSES = tuple(_SCENARIOS)


def run(
    cluster: Cluster,
    seconds: float = 8.0,
    rate: float = 500.0,
    progress: Progress | None = None,
    *,
    cause: str = "long-lived",
    seed: int | None = None,
) -> Truth:
    """Makes traffic for about so many seconds, with `rate` short connections a second, and tells the truth about it.

    `cause` is one of `CAUSES`, or "random" for any but "none"; `seed` decides that and the pod. The short connections
    are spread by the rules alone; the pod that gets more gets it by the cause alone, as much again as each pod has by
    then. Every connection is closed at the end.
    """
    choice = random.Random(seed)
    if cause == "random":
        cause = choice.choice([name for name in CAUSES if name != "none"])
    if cause not in _SCENARIOS:
        raise UsageError(f"There is no cause {cause!r}: choose among random, {', '.join(CAUSES)}")
    if len(cluster.servers) < 2 or len(cluster.clients) < 2:
        raise UsageError("The scenario needs two backends and two clients at least: make a larger cluster")
    culprit = choice.randrange(len(cluster.servers))
    tell = progress or (lambda share, what: None)
    before = [server.totals() for server in cluster.servers]
    began = time.monotonic()
    tell(0.0, "connecting")
    with _SCENARIOS[cause](cluster, culprit) as extra:
        _drive(cluster, seconds, rate, extra, tell)
    cluster.settle()
    after = [server.totals() for server in cluster.servers]
    tell(1.0, "done")
    return Truth(
        cause=cause,
        culprit=None if cause == "none" else culprit,
        names=[pod.name for pod in cluster.backend_pods],
        ips=[pod.addresses[0] for pod in cluster.backend_pods],
        connections=[new["accepted"] - old["accepted"] for new, old in zip(after, before, strict=True)],
        bytes=[
            new["sent"] + new["received"] - old["sent"] - old["received"]
            for new, old in zip(after, before, strict=True)
        ],
        seconds=time.monotonic() - began,
    )


def _drive(cluster: Cluster, seconds: float, rate: float, extra: Extra, tell: Progress) -> None:
    """Slices of short connections from all clients but the last, each followed by the extra traffic it calls for."""
    crowd = cluster.clients[:-1]
    slices = max(1, round(seconds / _SLICE_SECONDS))
    each = max(1, round(rate * seconds / slices / len(crowd)))
    made = added = 0
    for number in range(slices):
        for client in crowd:
            client.begin_connects(each, cluster.vip(), SENDS, RECEIVES, rate=rate / len(crowd))
        for client in crowd:
            made += len(client.finish_connects())
        due = made // len(cluster.servers) - added
        extra(due)
        added += due
        tell((number + 1) / slices, f"{made} short connections")


def dialled(cluster: Cluster) -> dict[str, int]:
    """How many connections the clients made to each address and port: the truth on the dialling side."""
    counts: dict[str, int] = {}
    for client in cluster.clients:
        rows = client.ledger()
        for address, port in zip(addresses(rows["peer"]), rows["peer_port"], strict=True):
            key = f"{address}:{port}"
            counts[key] = counts.get(key, 0) + 1
    return counts
