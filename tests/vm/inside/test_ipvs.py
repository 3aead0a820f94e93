"""kube-proxy's IPVS mode: conntrack hears of IPVS' choice (vs.conntrack=1), so every row has its backend.

Not among the other scenarios, for the kernel of a development machine may lack the module: `make test-kernels` runs it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_world import agent, losses, rows
from scenarios.test_dataplanes import LEAST, expected, hold, release, told
from scenarios.truth import lives

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "ipvs")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(
        backends=3, clients=3, hosts=1, proxy="ipvs", network="routed", outside=True,
        conntrack=Conntrack(timeouts=Conntrack.SHORT),
    ) as made:  # fmt: skip
        made.add_service("sticky", port=81, affinity_seconds=600)
        made.add_service("anywhere", port=82, node_port=30082, load_balancer=True)
        made.add_service("here", port=83, node_port=30083, external_policy="Local")
        made.add_service("dns", port=53, target_port=5353, protocol="udp")
        yield made


def test_pods_and_hosts_reach_services(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data") as running:
        plans = [(client, cluster.vip(), 8) for client in cluster.clients]
        plans += [(client, cluster.vip("sticky"), 4) for client in cluster.clients]
        plans += [(cluster.host_clients[0], cluster.vip(), 4)]
        ledger = release(cluster, hold(cluster, *plans))
        running.stop()
    found = lives(rows(running.output))
    right = expected(cluster, ledger)
    assert told(found) == right
    assert len({backend for backend, _, _ in right.values()}) == 3
    assert set(found.nat_source) == {"conntrack"}
    assert losses(running.output) == 0
    sticky = found[found.dst_port == 81]
    assert (sticky.groupby("src_ip").backend_ip.nunique() == 1).all()


def test_what_comes_from_outside(cluster: Cluster, tmp_path: Path) -> None:
    outside = cluster.outside_client
    with agent(cluster, tmp_path / "data") as running:
        plans = [
            (outside, cluster.node_port("anywhere"), 6),
            (outside, cluster.load_balancer("anywhere"), 6),
            (outside, cluster.node_port("here"), 6),
        ]
        ledger = release(cluster, hold(cluster, *plans))
        cluster.node.run(["conntrack", "-D", "-p", "tcp", "--orig-src", "172.30.0.100"])
        running.stop()
    found = lives(rows(running.output))
    found = found[found.role == "forwarded"]
    right = expected(cluster, ledger)
    assert told(found) == right
    assert {nat for _, _, nat in right.values()} == {"dnat+snat", "dnat"}


def test_udp(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data") as running:
        ledger = cluster.clients[0].datagrams(9, cluster.vip("dns"), LEAST, 300, times=2)
        cluster.settle()
        cluster.node.run(["conntrack", "-D", "-p", "udp"])
        running.stop()
    assert not ledger["errno"].any()
    found = lives(rows(running.output))
    assert len(found) == 9
    assert set(found.nat) == {"dnat"}
    assert set(found.dst_ip) == {cluster.vip("dns")[0]}
    assert set(found.backend_ip) <= {pod.ips[4] for pod in cluster.backend_pods}
    assert found.backend_ip.nunique() == 3
