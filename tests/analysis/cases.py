"""Datasets with a known truth: every cause at three strengths, skew without a cause, and balanced services.

A case is a dataset with one service shop/web in trouble (and a healthy neighbour), and the cause that must come first.
Only `Case.truth` knows it; nothing in the tables does.
"""

import dataclasses

import pyarrow as pa

from . import agents, habits, traffic, troubles
from .troubles import STRENGTH, Build
from .world import World

BALANCED, UNEXPLAINED = "balanced", "none"


@dataclasses.dataclass(frozen=True)
class Case:
    """A dataset, and what is true of its service shop/web: the cause's name, `BALANCED` or `UNEXPLAINED`."""

    truth: str
    variant: str
    strength: str
    tables: dict[str, pa.Table]
    port: tuple[int, str] = (80, "tcp")


def _background(world: World) -> None:
    """A healthy neighbour, so that no dataset has one service only."""
    service = world.service("neighbour", world.pods("neighbour", 4))
    world.dial(service, world.pods("other", 6), traffic.requests(world.rng, 800, traffic.shares(6, 0.5)))


#: Cause → the ways it comes about here.
CAUSES: dict[str, tuple[Build, ...]] = {
    "long-lived-connections": (habits.long_lived,),
    "few-clients": (habits.hashed_clients, habits.heavy_client, habits.elephants),
    "session-affinity": (habits.affinity,),
    "late-backend": (troubles.late_joiner, troubles.late_unseen, troubles.left_early),
    "failing-backend": (troubles.refusing, troubles.timing_out, troubles.slow),
    "stale-translation": (troubles.stale, troubles.stale_udp),
    "deviating-node": (troubles.node_deviates,),
    "topology": (troubles.zone_hints, troubles.local_policy),
    "bypass": (habits.bypass,),
    "socket-balancer": (troubles.socket_balancer,),
    "udp-pinning": (habits.udp_pinning,),
    "rollout": (troubles.rollout, troubles.rollout_unseen),
    "loss": (troubles.loss, troubles.unresolved),
    UNEXPLAINED: (troubles.unfair,),
}


def troubled(build: Build, truth: str, strength: str, seed: int) -> Case:
    """One dataset with a cause; the seed goes through sizes of clusters, too."""
    world = World(seed, nodes=4 + seed % 4, zones=2 + seed % 2)
    _background(world)
    given = build(world, STRENGTH[strength]) or {}
    web = next(service for service in world.services if service.name == "web")
    return Case(truth, build.__name__, strength, agents.tables(world, **given), (web.port, web.protocol))


def balanced(world: World, name: str, size: int, pattern: str, clients: int) -> None:
    """Adds a service whose backends are dealt by chance alone; `size` is about the number of connections."""
    service = world.service(name, world.pods(name, int(world.rng.integers(2, 9))))
    pods = world.pods(f"{name}-client", clients)
    share = traffic.shares(clients, float(world.rng.uniform(0, 1.2)))
    if pattern == "pooled":
        each = max(1, size // (clients * 12))
        world.dial(service, pods, traffic.pools(world.rng, clients, each, life_s=600.0))
    else:
        burst = 15.0 if pattern == "bursty" else 1.0
        world.dial(service, pods, traffic.requests(world.rng, size, share, burst=burst))


def balanced_case(seed: int) -> Case:
    """One balanced dataset; the seed goes through patterns, sizes and numbers of clients."""
    world = World(seed)
    _background(world)
    pattern = traffic.PATTERNS[seed % 3]
    clients = (2, 5, 20, 3)[seed % 4]
    balanced(world, "web", (300, 1000, 3000, 6000)[seed // 3 % 4], pattern, clients)
    return Case(BALANCED, f"{pattern}, {clients} clients", "", agents.tables(world))


def many_balanced(seed: int, services: int) -> World:
    """A world of small balanced services, of every pattern and number of clients."""
    world = World(seed, nodes=3)
    for i in range(services):
        size = int(world.rng.integers(30, 600))
        balanced(world, f"s{i}", size, traffic.PATTERNS[i % 3], int(world.rng.choice([1, 2, 3, 8, 30])))
    return world
