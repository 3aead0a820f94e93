"""What makes load uneven on the clients' side: as `troubles`, at three strengths each."""

import math

import numpy as np

from . import traffic
from .traffic import Dials
from .troubles import by, web
from .world import Service, World, kube_proxy, sticky


def long_lived(world: World, s: float) -> None:
    """Pools were filled when there were half as many backends, and are still open; whoever dials now gets any."""
    service, clients, short = web(world)
    for late in service.backends[len(service.backends) // 2 :]:
        late.joined = -1500.0
    world.dial(service, clients, short)
    rate = by(world, s, (1.0, 60.0), 5_000.0, 16_000.0)
    size = 4 if s < 0.3 else round(8 * s)
    pool = traffic.pools(world.rng, len(clients), size, life_s=60_000.0, rate=rate)
    if s < 0.3:
        pool.life = np.minimum(pool.life, 3000.0 + world.rng.uniform(1, 30, len(pool)))
    world.dial(service, clients, pool)


def elephants(world: World, s: float) -> None:
    """A handful of connections of one client each carry most of the bytes; new connections are even."""
    service, clients, short = web(world)
    world.dial(service, clients, short)
    few = traffic.pools(world.rng, 3, 1, life_s=100_000.0, rate=by(world, s, (1500.0, 3000.0), 4_000.0, 20_000.0))
    if s < 0.3:
        few.life = np.minimum(few.life, 3000.0 + world.rng.uniform(300, 1200, len(few)))
    world.dial(service, clients[:3], few)


def hashed_clients(world: World, s: float) -> None:
    """A balancer that hashes the client's address, and few clients, one of them heavy."""
    service, clients, _ = web(world, clients=5)
    heavy = by(world, s, (0.0, 0.3), 0.8, 1.6)
    if s < 0.3:
        clients += world.pods("client", 200)
    dials = traffic.requests(world.rng, 4000, traffic.shares(len(clients), heavy))
    world.dial(service, clients, dials, lambda w, v, d: sticky(d, kube_proxy(w, v, d), math.inf))


def heavy_client(world: World, s: float) -> None:
    """One client keeps to one backend (it dials from one source port, and conntrack still knows it); others do not."""
    service, clients, dials = web(world)
    heavy = int(world.rng.integers(len(clients)))
    part = by(world, s, (0.01, 0.1), 0.3, 0.7)
    dials.client = np.where(world.rng.random(len(dials)) < part, heavy, dials.client)
    victim = int(world.rng.integers(len(service.backends)))
    world.dial(service, clients, dials, lambda w, v, d: np.where(d.client == heavy, victim, kube_proxy(w, v, d)))


def affinity(world: World, s: float) -> None:
    """ClientIP affinity and clients of very different weight."""
    n = round(by(world, s, (80, 400), 25, 9))
    service, _, _ = web(world)
    service.affinity_s = 10_800
    dials = traffic.requests(world.rng, 5000, traffic.shares(n, 0.3 + s))
    world.dial(service, world.pods("client", n), dials)


def bypass(world: World, s: float) -> None:
    """Some clients have resolved the pods' own addresses, and keep to one or two of them."""
    service, clients, dials = web(world)
    dials.direct = dials.client < round(1 + 5 * s)
    dials.direct &= world.rng.random(len(dials)) < by(world, s, (0.35, 0.7), 1.0, 1.0)

    def pick(w: World, v: Service, d: Dials) -> np.ndarray:
        return np.where(d.direct, (d.client % 3) // 2, kube_proxy(w, v, d))

    world.dial(service, clients, dials, pick)


def udp_pinning(world: World, s: float) -> None:
    """DNS: resolvers that ask from one port for ever have one flow each, however much they ask."""
    service = world.service("web", world.pods("web", 5), protocol="udp", port=53)
    clients = world.pods("client", 10)
    world.dial(service, clients, traffic.requests(world.rng, 2500, traffic.shares(10, 0.3), life_s=5.0))
    rate = by(world, s, (1.0, 150.0), 500.0, 3_000.0)
    pinned = traffic.pools(world.rng, max(2, round(5 * s)), 1, life_s=200_000.0, rate=rate)
    pinned.packet[:] = 100.0
    # the pinned ones go where the first answers came from: two nodes' caches, not all five backends
    world.dial(service, clients, pinned, lambda w, v, d: d.client % 2)
