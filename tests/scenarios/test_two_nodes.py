"""Two nodes, an agent on each: every connection is one node's, and sums over both are the applications'."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from agent_world import agent, coverage, rows, until
from scenarios.truth import COUNTERS, accepted, clean, ends, lives, settled

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Ledger

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SENDS, RECEIVES = 100, 300
NODES = ("node-1", "node-2")


@pytest.fixture(scope="module", params=["bridge", "routed"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A client and two backends on each node, services over all backends and over one node's, and a host outside."""
    timeouts = {"time_wait": 60, "close": 60, "udp": 60, "udp_stream": 60}
    conntrack = Conntrack(timeouts=timeouts, events=1)
    with Cluster(backends=4, clients=2, nodes=2, outside=True, network=request.param, conntrack=conntrack) as made:
        for number in (0, 1):
            here = [index for index, pod in enumerate(made.backend_pods) if pod.node is made.nodes[number]]
            made.add_service(f"on-{number}", here)
        made.add_service("np", node_port=30000)
        made.add_service("local", node_port=30001, external_policy="Local")
        made.add_service("dns", port=53, target_port=5353, protocol="udp")
        yield made


def delete_entries(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.netns.run(["conntrack", "-F"])


def far(cluster: Cluster, node: int) -> int:
    """How many entries a node has only passed on: neither end of their rewrite is here, no local socket dialled."""
    table = settled(cluster.nodes[node].netns)
    here = [pod.ips[4] for pod in cluster.client_pods if pod.node is cluster.nodes[node]]
    plain = (table.dst_ip == table.backend_ip) & (table.dst_port == table.backend_port)
    return int((plain & ~table.src_ip.isin(here)).sum())


class Told:
    """What clients counted, by the node whose rows must say it, and by role."""

    def __init__(self) -> None:
        self.expected: dict[tuple[str, str, str, str, int, str, int], tuple[int, int] | None] = {}

    def add(self, node: int, role: str, ledger: Ledger) -> None:
        for (source, peer), row in zip(ends(ledger), ledger, strict=True):
            protocol = "udp" if row["protocol"] == 17 else "tcp"
            counted = (int(row["sent"]), int(row["received"])) if role == "client" else None
            self.expected[NODES[node], role, protocol, *source, *peer] = counted

    def check(self, table: pd.DataFrame, cluster: Cluster) -> pd.DataFrame:
        """Each in one row's life of one node, with the backend whose server saw it; the lives."""
        life = lives(table)
        found = {
            (row.node, row.role, row.protocol, row.src_ip, row.src_port, row.dst_ip, row.dst_port): (
                None if pd.isna(row.bytes_sent) else (int(row.bytes_sent), int(row.bytes_received))
            )
            for row in life.itertuples()
        }
        assert len(found) == len(life), "a connection is there twice"
        assert found == self.expected
        log = accepted(cluster.servers)
        for row in life.itertuples():
            seen_as = (row.snat_ip, int(row.snat_port)) if "snat" in row.nat else (row.src_ip, row.src_port)
            assert (row.protocol, seen_as, (row.backend_ip, int(row.backend_port))) in log
        dialled = [counted for counted in self.expected.values() if counted]
        assert table.bytes_sent.sum() == sum(sent for sent, _ in dialled)
        assert table.bytes_received.sum() == sum(received for _, received in dialled)
        return life


def test_short_connections_between_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    output, told, outside = tmp_path / "data", Told(), cluster.outside_client
    with agent(cluster, output), agent(cluster, output, node="node-2"):
        for number, client in enumerate(cluster.clients):
            for name in ("web", "on-0", "on-1"):
                told.add(number, "client", client.connect_many(30, cluster.vip(name), SENDS, RECEIVES))
            told.add(number, "client", client.datagrams(20, cluster.vip("dns"), SENDS, RECEIVES))
            node_port = cluster.node_port("np", number)
            told.add(number, "forwarded", outside.connect_many(30, node_port, SENDS, RECEIVES))
            local = cluster.node_port("local", number)
            told.add(number, "forwarded", outside.connect_many(10, local, SENDS, RECEIVES))
        cluster.settle()
        passed_on = [far(cluster, number) for number in (0, 1)]
        delete_entries(cluster)
    life = told.check(rows(output), cluster)
    assert (life.rows == 1).all()
    assert life.closed.all()
    both = {pod.ips[4] for pod in cluster.backend_pods}
    for node in NODES:
        assert set(life[life.node == node].backend_ip) == both, "each node's clients reach the backends of both"
        assert set(life[(life.node == node) & (life.dst_port == 30001)].nat) == {"dnat"}
    assert clean(output).unresolved == 0
    assert transit(output) == dict(zip(NODES, passed_on, strict=True))
    assert min(passed_on) >= 30


def transit(output: Path) -> dict[str, int]:
    """Node → how many entries it only passed on, as its agent counted them."""
    return {
        str(node): int(count) for node, count in coverage(output).groupby("node", observed=True).transit.sum().items()
    }


def published(output: Path) -> set[int]:
    """The client's ports of the rows so far."""
    files = list((output / "connections").rglob("[!.]*.parquet"))
    return set(rows(output).src_port) if files else set()


def test_long_connections_between_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    outputs, told, outside = [tmp_path / node for node in NODES], Told(), cluster.outside_client
    options = "--interval", "1s", "--rotate", "200ms"
    with agent(cluster, outputs[0], *options), agent(cluster, outputs[1], *options, node="node-2"):
        workers = [*cluster.clients, outside]
        held = [client.hold(8, cluster.vip())["number"] for client in cluster.clients]
        held.append([number for node in (0, 1) for number in outside.hold(4, cluster.node_port("np", node))["number"]])
        flows = [
            client.datagrams(4, cluster.vip("dns"), SENDS, RECEIVES, keep=True)["number"] for client in cluster.clients
        ]

        def interim() -> bool:
            """Exchanges on all of them; whether each has been told of already."""
            ports: set[int] = set()
            for worker, numbers in zip([*workers, *cluster.clients], [*held, *flows], strict=True):
                ports |= set(map(int, worker.exchange(numbers, SENDS, RECEIVES)["local_port"]))
            return ports <= published(outputs[0]) | published(outputs[1])

        until(interim, "interim rows of all that is held")
        interim()
        for number, client in enumerate(cluster.clients):
            told.add(number, "client", client.release([*held[number], *flows[number]]))
        ledger = outside.release(held[2])
        for number in (0, 1):
            told.add(number, "forwarded", ledger[4 * number : 4 * number + 4])
        cluster.settle()
        counted = pd.concat([settled(node.netns) for node in cluster.nodes])
        passed_on = [far(cluster, number) for number in (0, 1)]
        delete_entries(cluster)
    life = told.check(pd.concat([rows(output) for output in outputs]), cluster)
    assert (life.rows > 1).all()
    assert life.opened.all()
    assert life.closed.all()
    # What conntrack counted where the rewrite was made, and not where it was passed on.
    forwarded = life[life.role == "forwarded"]
    rewritten = counted[counted.dst_port == 30000]
    order = ["src_port", *COUNTERS]
    assert sorted(map(tuple, forwarded[order].astype(int).to_numpy())) == sorted(
        map(tuple, rewritten[order].astype(int).to_numpy())
    )
    for number, output in enumerate(outputs):
        clean(output)
        assert transit(output) == {NODES[number]: passed_on[number]}
