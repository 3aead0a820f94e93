"""A real cluster: where connections go, against the node's conntrack and the backends' own ledgers."""

import errno
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import witness
from witness import Where, entries

from tracer.errors import TracerError, UsageError
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import addresses

pytestmark = pytest.mark.needs("netns", "iptables")


def translations(cluster: Cluster, family: int = 4) -> dict[tuple[str, int, str], Where]:
    """(client, port, virtual IP) → (backend, port), as `conntrack -L` in the node has it."""
    return {(*entry.client, entry.dialled[0]): entry.backend for entry in entries(cluster.node, family)}


def accepted(cluster: Cluster) -> dict[Where, Where]:
    """(client, port) → (backend, port), as the backends have it."""
    return dict(witness.accepted(cluster.servers).keys())


def assert_fair(counts: list[int]) -> None:
    """Six standard deviations of a binomial: wrong once in 10^8 runs."""
    total, share = sum(counts), 1 / len(counts)
    slack = 6 * (total * share * (1 - share)) ** 0.5
    assert all(abs(count - total * share) < slack for count in counts), counts


def test_conntrack_and_the_backends_agree_on_every_connection(any_backend: Cluster) -> None:
    cluster = any_backend
    made = np.concatenate([client.connect_many(450, cluster.vip()) for client in cluster.clients])
    assert not made["errno"].any()
    cluster.settle()
    truth = accepted(cluster)
    assert len(truth) == 900
    vip = cluster.vip()[0]
    expected = {(client, port, vip): backend for (client, port), backend in truth.items()}
    assert translations(cluster) == expected
    dialled = set(zip(addresses(made["local"]), made["local_port"].tolist(), strict=True))
    assert dialled == set(truth)
    assert_fair([server.totals()["accepted"] for server in cluster.servers])
    assert cluster.iptables in ("nft", "legacy")


def test_the_node_itself_reaches_the_service_masqueraded(any_backend: Cluster) -> None:
    def dial() -> tuple[str, int]:
        with socket.create_connection(any_backend.vip(), timeout=5) as connection:
            host, port = connection.getsockname()
            return host, port

    host, port = any_backend.node.call(dial)
    assert host == "172.30.0.2"
    assert (host, port, any_backend.vip()[0]) in translations(any_backend)

    def seen() -> bool:
        return any(client == "10.244.1.1" for client, _ in accepted(any_backend))

    wait_until(seen, "the backend to see the node's masqueraded connection")


@pytest.mark.parametrize("backend", ["nft", "legacy"])
@pytest.mark.parametrize("families", ["ipv6", "dual"])
def test_ipv6_likewise(backend: str, families: str) -> None:
    with Cluster(backends=2, clients=1, families=families, iptables=backend) as cluster:
        for family in cluster.families:
            made = cluster.clients[0].connect_many(100, cluster.vip(family=family))
            assert not made["errno"].any()
        cluster.settle()
        truth = accepted(cluster)
        assert len(truth) == 100 * len(cluster.families)
        seen = {key[:2]: value for family in cluster.families for key, value in translations(cluster, family).items()}
        assert seen == truth
        assert any(":" in backend for backend, _ in truth.values())


def test_a_change_moves_new_connections_only(cluster: Cluster) -> None:
    client = cluster.clients[0]
    pool = client.hold(20, cluster.vip())["number"]
    before = accepted_after_settling(cluster)
    cluster.set_backends("web", [1])
    client.connect_many(30, cluster.vip())
    client.exchange(pool, 1_000, 2_000)
    after = accepted_after_settling(cluster)
    assert [new - old for new, old in zip(after, before, strict=True)] == [0, 30]
    assert [change.backends for change in cluster.history[-2:]] == [(0, 1), (1,)]
    client.release(pool)
    cluster.set_backends("web", [0, 1])
    cluster.settle()
    held = [rows[rows["received"] == 1_000] for rows in (server.ledger() for server in cluster.servers)]
    assert sum(map(len, held)) == 20


def accepted_after_settling(cluster: Cluster) -> list[int]:
    cluster.settle()
    return [server.totals()["accepted"] for server in cluster.servers]


def test_a_service_without_backends_refuses(cluster: Cluster) -> None:
    cluster.set_backends("web", [])
    try:
        # takes a second: the ICMP error comes while connect() holds the socket, and only the second SYN's counts
        rows = cluster.clients[0].connect_many(1, cluster.vip())
    finally:
        cluster.set_backends("web", [0, 1])
    assert set(rows["errno"]) == {errno.ECONNREFUSED}


def test_a_second_service_has_its_own_address_and_port(cluster: Cluster) -> None:
    cluster.add_service("admin", [0], port=8443, target_port=9443)
    assert cluster.vip("admin") == ("10.96.0.11", 8443)
    cluster.clients[0].connect_many(5, cluster.vip("admin"))
    cluster.settle()
    assert sum(port == 9443 for _, port in accepted(cluster).values()) == 5
    assert cluster.servers[1].ledger()["local_port"].tolist().count(9443) == 0


@pytest.fixture(scope="module")
def short() -> Iterator[Cluster]:
    timeouts = Conntrack(accounting=False, timestamps=True, timeouts=Conntrack.SHORT)
    with Cluster(backends=1, clients=1, conntrack=timeouts) as made:
        yield made


def test_conntrack_is_set_up_as_asked(short: Cluster) -> None:
    short.clients[0].connect_many(1, short.vip())
    entry = short.node.run(["conntrack", "-L", "-o", "ktimestamp"])
    assert "bytes=" not in entry
    assert "[start=" in entry
    assert int(entry.split()[2]) <= max(Conntrack.SHORT.values())


def test_the_errors_say_what_to_do(cluster: Cluster) -> None:
    wrongs: list[dict[str, Any]] = [{"families": "ipx"}, {"backends": 10_000}, {"iptables": "bpf"}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match=r"choose|room for"), Cluster(**wrong):
            pass
    with pytest.raises(UsageError, match="backends 0 to 1"):
        cluster.set_backends("web", [2])
    with pytest.raises(UsageError, match="a service web already"):
        cluster.add_service("web")
    closed = Cluster(backends=1, clients=0)
    with pytest.raises(TracerError, match="not open"):
        closed.add_service("web")
