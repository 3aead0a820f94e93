"""What makes load uneven on the cluster's side, at three strengths: the thing itself is made, never its symptoms.

Every function here troubles the service shop/web of a world by the strength `s`, a value of `STRENGTH`; what it returns
is what the cluster does not tell (arguments of `agents.tables`).
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from . import traffic
from .traffic import Dials
from .world import Backend, Pod, Service, World, kube_proxy

#: Strengths, and each as a number in (0, 1).
STRENGTH = {"weak": 0.15, "medium": 0.5, "strong": 0.9}

Build = Callable[[World, float], dict[str, bool] | None]


def web(world: World, n: int = 0, clients: int = 0) -> tuple[Service, list[Pod], Dials]:
    """A service of 5 to 9 backends, 10 to 20 clients, 2,500 to 6,000 short connections, in bursts or not."""
    rng = world.rng
    service = world.service("web", world.pods("web", n or int(rng.integers(5, 10))))
    pods = world.pods("client", clients or int(rng.integers(10, 21)))
    share = traffic.shares(len(pods), float(rng.uniform(0, 0.7)))
    burst = float(rng.choice([1.0, 1.0, 8.0]))
    return service, pods, traffic.requests(rng, int(rng.integers(2500, 6000)), share, burst=burst)


def by(world: World, s: float, weak: tuple[float, float], medium: float, strong: float) -> float:
    """A number for the strength; weak ones are drawn from a range.

    Its lower end is a skew of some 2 to 4 % of the load, or trouble that is seen without one: below that, the load is
    even, and calling it balanced is right.
    """
    return {STRENGTH["weak"]: float(world.rng.uniform(*weak)), STRENGTH["medium"]: medium}.get(s, strong)


def late_unseen(world: World, s: float) -> dict[str, bool]:
    """A backend that joined late, with no API server to tell of it."""
    late_joiner(world, s)
    return {"with_endpoints": False}


def left_early(world: World, s: float) -> None:
    """A backend that was scaled away in the range."""
    service, clients, dials = web(world)
    service.backends[1].left = 3600 - by(world, s, (800.0, 1200.0), 1500.0, 3000.0)
    service.backends[1].gone = service.backends[1].left + 30
    world.dial(service, clients, dials)


def late_joiner(world: World, s: float) -> None:
    """A backend that joined in the range."""
    service, clients, dials = web(world)
    service.backends[2].joined = by(world, s, (800.0, 1200.0), 1500.0, 3000.0)
    world.dial(service, clients, dials)


def refusing(world: World, s: float) -> None:
    """A backend that refuses connections; whoever is refused tries again."""
    service, clients, dials = web(world)
    _failing(world, service, clients, dials, by(world, s, (0.02, 0.25), 0.5, 0.98), "refused", 0.0004)


def timing_out(world: World, s: float) -> None:
    """A backend behind which packets vanish."""
    service, clients, dials = web(world)
    _failing(world, service, clients, dials, by(world, s, (0.002, 0.1), 0.5, 0.98), "timeout", 127.0)


def _failing(
    world: World, service: Service, clients: list[Pod], dials: Dials, part: float, how: str, after: float
) -> None:
    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        got = kube_proxy(w, v, d)
        d.fail(np.flatnonzero((got == 4) & (w.rng.random(len(d)) < part)), how, after)
        return got

    for _ in range(3):
        world.dial(service, clients, dials, pick)
        again = dials.take(dials.result != "ok")
        again.at = again.at + again.life + world.rng.exponential(1.0, len(again))
        dials = traffic.make(world.rng, again.at, again.client, world.rng.lognormal(-1.2, 0.8, len(again)))


def slow(world: World, s: float) -> None:
    """A backend whose accept queue is full: SYNs are sent again after 1, 3, 7 s."""
    service, clients, dials = web(world)
    part = by(world, s, (0.01, 0.1), 0.6, 0.95)

    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        got = kube_proxy(w, v, d)
        late = (got == 1) & (w.rng.random(len(d)) < part)
        wait = w.rng.choice([1.02, 3.05, 7.1], late.sum(), p=[0.5, 0.3, 0.2])
        d.latency[late] += wait
        d.life[late] += wait
        return got

    world.dial(service, clients, dials, pick)


def stale(world: World, s: float) -> None:
    """A pod is gone, and one node goes on sending to it: UDP flows that conntrack still holds, or old rules."""
    service, clients, dials = web(world)
    node = clients[0].node
    gone = len(service.backends) - 1
    service.backends[gone].left, service.backends[gone].gone = -200.0, -180.0
    world.frozen[node] = -1000.0

    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        got = kube_proxy(w, v, d)
        d.fail(np.flatnonzero(got == gone), "timeout", 127.0)
        return got

    tilt(world, dials, clients, node, by(world, s, (0.01, 0.2), 0.6, 0.95))
    world.dial(service, clients, dials, pick)


def stale_udp(world: World, s: float) -> None:
    """The pod behind a UDP service was replaced; clients with a fixed port keep their old translation."""
    service = world.service("web", world.pods("web", 4), protocol="udp", port=53)
    service.backends[3].left, service.backends[3].gone = -600.0, -590.0
    clients = world.pods("client", 12)
    dials = traffic.requests(world.rng, 3000, traffic.shares(12, 0.2), life_s=30.0)
    kept = round(by(world, s, (5, 150), 300, 900))
    world.dial(service, clients, dials)
    old = traffic.requests(world.rng, kept, traffic.shares(12, 0.2), life_s=60.0)
    old.received[:] = 0
    world.dial(service, clients, old, lambda w, v, d: np.full(len(d), 3))


def tilt(world: World, dials: Dials, clients: list[Pod], node: int, part: float) -> None:
    """Moves dials so that clients on `node` make this part of them."""
    there = [i for i, c in enumerate(clients) if c.node == node]
    others = [i for i, c in enumerate(clients) if c.node != node]
    here = world.rng.random(len(dials)) < part
    dials.client = np.where(here, world.rng.choice(there, len(dials)), world.rng.choice(others, len(dials)))


def node_deviates(world: World, s: float) -> None:
    """kube-proxy of one node has heard nothing since the service had half its backends."""
    service, clients, dials = web(world)
    for late in service.backends[len(service.backends) // 2 :]:
        late.joined = -5000.0
    node = clients[1].node
    world.frozen[node] = -9000.0
    tilt(world, dials, clients, node, by(world, s, (0.08, 0.2), 0.4, 0.75))
    world.dial(service, clients, dials)


def zone_hints(world: World, s: float) -> None:
    """As many endpoints in each zone, and most clients in one of them."""
    service, clients, dials = web(world, n=int(world.rng.choice([4, 6, 8])))
    service.hinted = True
    in_a = world.rng.random(len(dials)) < by(world, s, (0.54, 0.6), 0.75, 0.95)
    a = [i for i, c in enumerate(clients) if world.zones[c.node] == "zone-a"]
    b = [i for i in range(len(clients)) if i not in a]
    dials.client = np.where(in_a, world.rng.choice(a, len(dials)), world.rng.choice(b, len(dials)))
    world.dial(service, clients, dials)


def local_policy(world: World, s: float) -> None:
    """internalTrafficPolicy Local: nodes with many clients and few endpoints."""
    places = {0.15: [0, 0, 1, 1, 2, 2, 3, 3], 0.5: [0, 1, 1, 2, 2, 3, 3, 3], 0.9: [0, 1, 1, 1, 2, 2, 3, 3, 3, 3]}[s]
    service = world.service("web", world.pods("web", len(places), places), internal_policy="Local")
    clients = world.pods("client", 12, range(4))
    dials = traffic.requests(world.rng, 4000, traffic.shares(12, by(world, s, (0.4, 1.0), 0.0, 0.0)))
    if s > 0.7:
        tilt(world, dials, clients, 0, 0.5)
    world.dial(service, clients, dials)


def socket_balancer(world: World, s: float) -> None:
    """On some nodes a program at connect() picks the backend, and not evenly."""
    service, clients, dials = web(world)
    nodes = {0.15: 1, 0.5: 2, 0.9: 4}[s]
    weights = (
        world.rng.permutation(np.linspace(0, 1, len(service.backends))) ** 2 * by(world, s, (2.0, 4.0), 6.0, 12.0) + 0.5
    )

    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        d.socket = d.node < nodes
        fair = kube_proxy(w, v, d)
        return np.where(d.socket, w.rng.choice(len(weights), len(d), p=weights / weights.sum()), fair)

    world.dial(service, clients, dials, pick)


def rollout(world: World, s: float) -> None:
    """A new template replaces the pods one after the other; the new ones were not there from the start."""
    old, new = world.pods("web", 6), world.pods("web", 6)
    n = 6 if s > 0.3 else int(world.rng.integers(1, 7))
    begin, step = by(world, s, (20.0, 3400.0), 1200.0, 2700.0), 60.0 if s > 0.3 else 10.0
    backends = [Backend(pod) for pod in old]
    for i in range(n):
        at = begin + i * step
        backends[i].left, backends[i].gone = at + 10, at + 40
        backends.append(Backend(new[i], joined=at))
    service = world.service("web", backends)
    clients = world.pods("client", 12)
    world.dial(service, clients, traffic.requests(world.rng, 4000, traffic.shares(12, 0.4)))


def rollout_unseen(world: World, s: float) -> dict[str, bool]:
    """The same with no API server to tell of it: names and addresses only."""
    rollout(world, s)
    return {"with_endpoints": False}


def loss(world: World, s: float) -> None:
    """One node's agent lost rows, and those it lost are not a fair sample: it was busy while one backend was asked."""
    service, clients, dials = web(world)
    world.dial(service, clients, dials)
    victim, part = service.backends[3].pod.ip, by(world, s, (0.25, 0.5), 0.6, 0.95)
    for node in range(len(world.nodes)):

        def loses(table: pa.Table) -> np.ndarray:
            backend = np.asarray(table["backend_ip"].combine_chunks().dictionary_decode())
            return (backend == victim) & (world.rng.random(len(table)) < part)

        world.lost[node] = loses


def unresolved(world: World, s: float) -> None:
    """The translations of one backend's connections were not learnt: they are unknown."""
    service, clients, dials = web(world)
    part = by(world, s, (0.25, 0.5), 0.6, 0.95)

    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        got = kube_proxy(w, v, d)
        d.resolved = ~((got == 3) & (w.rng.random(len(d)) < part))
        return got

    world.dial(service, clients, dials, pick)


def unfair(world: World, s: float) -> None:
    """Nobody knows why: one backend gets more, from everybody, all the time."""
    service, clients, dials = web(world)
    service.backends[0].weight = by(world, s, (1.2, 1.5), 1.8, 4.0)
    world.dial(service, clients, dials)
