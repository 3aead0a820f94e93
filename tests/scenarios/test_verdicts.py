"""Real connections through real rules, one cause of imbalance each: the verdict, and the cause that comes first."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import kube_lab
import pytest
from agent_world import Agent, agent
from kube_api import KubeApi, serving
from scenarios.truth import ends

import tracer
from tracer.analysis.diagnose import Finding
from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

NODES = 2


class World:
    """A cluster of two nodes with its API, and the agents of both nodes."""

    def __init__(self, cluster: Cluster, api: KubeApi, where: Path) -> None:
        self.cluster, self.api, self.output = cluster, api, where / "data"
        self._config = api.kubeconfig(where / "kubeconfig")
        self._stack = ExitStack()
        self._agents: list[Agent] = []
        self.tell()

    def tell(self) -> None:
        """Tells the API what the cluster is now."""
        for kind, objects in kube_lab.objects(self.cluster).items():
            self.api.set(kind, *objects)

    def trace(self) -> None:
        """Starts the agents."""
        for node in self.cluster.nodes:
            options = ("--kubeconfig", str(self._config), "--name-wait", "0.5s", "--interval", "1s")
            self._agents.append(self._stack.enter_context(agent(self.cluster, self.output, *options, node=node.name)))

    def crowd(self, dials: int, service: str = "web") -> None:
        """So many connections of each client at once."""
        for client in self.cluster.clients:
            client.begin_connects(dials, self.cluster.vip(service), 200, 2000)
        for client in self.cluster.clients:
            client.finish_connects()

    def said(self, service: str = "web") -> Finding:
        """Stops the agents, and asks for the verdict."""
        self.cluster.settle()
        self._stack.close()
        (finding,) = tracer.diagnose(self.output, service=f"shop/{service}").findings
        print(finding.answer)  # noqa: T201  seen with -s
        return finding

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Cluster(backends=4, clients=6, nodes=NODES) as cluster, serving() as api:
        made = World(cluster, api, tmp_path)
        try:
            yield made
        finally:
            made.close()


def first(finding: Finding) -> tuple[str, str]:
    return finding.verdict.word, finding.causes[0].name if finding.causes else ""


def uneven(finding: Finding) -> set[str]:
    """In which measures; but for how long connections last, which on a busy machine is the scheduler's choice."""
    return set(finding.verdict.measures) - {"connection_time"} if finding.verdict.word == "uneven" else set()


def test_an_even_load(world: World) -> None:
    world.trace()
    world.crowd(300)  # so many that chance alone is not uneven but once in 10^8 times
    found = world.said()
    assert uneven(found) == set()
    assert found.backends["connections"].sum() == 6 * 300
    assert found.backends["fair_share"].tolist() == pytest.approx([0.25] * 4)


def test_connections_from_before(world: World) -> None:
    cluster = world.cluster
    cluster.set_backends("web", [2])
    held = [client.hold(3, cluster.vip())["number"] for client in cluster.clients]
    cluster.set_backends("web", range(4))
    world.tell()
    world.trace()
    for _ in range(4):
        for client, numbers in zip(cluster.clients, held, strict=True):
            client.exchange(numbers, 5000, 50_000, times=10)
        world.crowd(30)
    found = world.said()
    assert first(found) == ("uneven", "long-lived-connections")
    assert found.backends.sort_values("bytes_share")["backend"].iloc[-1] == "web-2"


def stuck(cluster: Cluster, service: str) -> dict[str, set[str]]:
    """Dials once with each client; which backends each node's clients have now."""
    for client in cluster.clients:
        client.connect_many(1, cluster.vip(service))
    cluster.settle()
    nodes = {pod.ips[4]: pod.node.name for pod in cluster.client_pods}
    last: dict[str, tuple[int, str]] = {}
    for server in cluster.servers:
        ledger = server.ledger()
        for ((own, _), (client, _)), row in zip(ends(ledger), ledger, strict=True):
            last[client] = max(last.get(client, (0, "")), (int(row["started"]), own))
    found: dict[str, set[str]] = {}
    for client, (_, own) in last.items():
        found.setdefault(nodes[client], set()).add(own)
    return found


def test_session_affinity(world: World) -> None:
    cluster = world.cluster
    cluster.add_service("sticky", affinity_seconds=600)
    while alone := [pods for pods in stuck(cluster, "sticky").values() if len(pods) == 1]:
        # One node's three clients stick to one backend: that looks like a node with other rules, and it is a rare draw.
        print(f"drawn again: {alone}")  # noqa: T201  seen with -s
        cluster.set_backends("sticky", [])
        cluster.set_backends("sticky", range(4))
    world.tell()
    world.trace()
    for number, client in enumerate(cluster.clients):
        client.connect_many(30 * 2**number, cluster.vip("sticky"), 200, 2000)
    assert first(world.said("sticky")) == ("uneven", "session-affinity")


def test_a_backend_that_refuses(world: World) -> None:
    world.cluster.servers[1].stop_listening()
    world.trace()
    world.crowd(150)
    found = world.said()
    assert first(found) == ("uneven", "failing-backend")
    assert "web-1" in found.causes[0].sentence
    assert found.backends.set_index("backend")["failures"]["web-1"] > 150


def test_a_backend_that_joined_late(world: World) -> None:
    cluster = world.cluster
    cluster.set_backends("web", range(3))
    world.tell()
    world.trace()
    for turn in range(10):
        if turn == 8:
            cluster.set_backends("web", range(4))
            world.tell()
        for client in cluster.clients:
            client.begin_connects(25, cluster.vip(), rate=25)  # a second
        for client in cluster.clients:
            client.finish_connects()
    found = world.said()
    assert first(found) == ("uneven", "late-backend")
    assert "web-3 joined" in found.causes[0].sentence


def test_a_client_that_dials_a_pod(world: World) -> None:
    cluster = world.cluster
    world.trace()
    world.crowd(60)
    cluster.clients[0].connect_many(400, (cluster.backend_pods[0].ips[4], 8080), 200, 2000)
    found = world.said()
    assert first(found) == ("uneven", "bypass")


def test_a_node_whose_rules_are_old(world: World) -> None:
    cluster = world.cluster
    cluster.set_backends("web", (0, 1))
    old = cluster.saved_rules(node=1)
    cluster.set_backends("web", range(4))
    cluster.nodes[1].netns.run([f"iptables-{cluster.iptables}-restore", "--table", "nat"], feed=old)
    world.tell()
    world.trace()
    world.crowd(150)
    found = world.said()
    assert first(found) == ("uneven", "deviating-node")
    assert "node-2" in found.causes[0].sentence


def test_a_udp_flow_that_never_ends(world: World) -> None:
    cluster = world.cluster
    cluster.add_service("dns", port=53, target_port=5353, protocol="udp")
    world.tell()
    world.trace()
    (pinned,) = cluster.clients[0].datagrams(1, cluster.vip("dns"), 100, 400, keep=True)
    for client in cluster.clients:
        client.datagrams(100, cluster.vip("dns"), 100, 400)
        cluster.clients[0].exchange([pinned["number"]], 100, 400, times=1000)
        time.sleep(0.5)  # longer than the interval, all in all
    found = world.said("dns")
    flows = [len(server.ledger()) for server in cluster.servers]
    assert sum(flows) == 601
    if sum((count - 601 / 4) ** 2 / (601 / 4) for count in flows) > 11.34:
        return  # one draw in a hundred (chi-square, three degrees of freedom) has flows that alone may be uneven
    # One flow that has most of the bytes proves nothing beyond chance: the verdict says so.
    assert first(found) == ("inconclusive", "udp-pinning")
    assert found.causes[0].numbers["share"] > 0.5


def test_a_pod_that_serves_another_service_too(world: World) -> None:
    cluster = world.cluster
    cluster.add_service("admin", [3])
    world.tell()
    world.trace()
    world.crowd(300)
    world.crowd(150, "admin")
    found = world.said()
    assert uneven(found) == set()
    assert "web-3 gets" in found.note
    assert "shop/admin:80/tcp" in found.note
