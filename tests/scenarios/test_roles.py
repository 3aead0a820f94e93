"""Which rows there are by role, and what --exclude-cidr and --only-virtual leave of them: as asked, exactly."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, rows
from scenarios.truth import End, accepted, account, clean, ends, lives

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SENDS, RECEIVES = 100, 300
OUTSIDE = ("172.30.0.100", 9000)
#: Where pods are dialled directly: two ways from one port to one socket would clash, and the kernel chooses ports.
DIRECT_PORT = 9090

#: What is made in each test, by the role that its row has, and whether something was rewritten to a backend.
CLIENT = {"service", "other", "direct", "leaving", "connected", "direct_datagrams", "held", "held_datagrams"}
FORWARDED = {"unconnected", "node_port", "node_port_datagrams", "held_node_port"}
DIRECT = {"direct", "leaving", "direct_datagrams"}
#: What pods of the node accept.
ACCEPTED = {"service", "other", "direct", "held", "node_port", "held_node_port"}

#: Role, protocol, from where, whereto.
Key = tuple[str, str, End, End]
Bytes = tuple[int, int] | None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Both ends on one node, and a host outside; services of both protocols."""
    timeouts = {"time_wait": 60, "close": 60, "udp": 60, "udp_stream": 60}
    with Cluster(backends=3, clients=1, outside=True, conntrack=Conntrack(timeouts=timeouts, events=1)) as made:
        made.add_service("other", target_port=8081)
        made.add_service("np", node_port=30000)
        made.add_service("dns", port=53, target_port=5353, protocol="udp", node_port=30053)
        made.outside_server.listen([OUTSIDE[0]], OUTSIDE[1])
        made.servers[0].listen(made.backend_pods[0].addresses, DIRECT_PORT)
        yield made


class Run:
    """One agent's run over all kinds of traffic: what the applications at both ends counted, and what it wrote."""

    def __init__(self, cluster: Cluster, output: Path, *options: str) -> None:
        client, outside = cluster.clients[0], cluster.outside_client
        pod, self.pod = cluster.backend_pods[0].ips[4], cluster.client_pods[0].ips[4]
        self.cluster, self.output = cluster, output
        self.began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        with agent(cluster, output, "--interval", "500ms", *options):
            held = client.hold(2, cluster.vip())["number"]
            held_node_port = outside.hold(2, cluster.node_port("np"))["number"]
            self.ledgers = {
                "service": client.connect_many(11, cluster.vip(), SENDS, RECEIVES),
                "other": client.connect_many(7, cluster.vip("other"), SENDS, RECEIVES),
                "direct": client.connect_many(5, (pod, DIRECT_PORT), SENDS, RECEIVES),
                "leaving": client.connect_many(3, OUTSIDE, SENDS, RECEIVES),
                "node_port": outside.connect_many(6, cluster.node_port("np"), SENDS, RECEIVES),
                # From ports that the kernel gives to nobody, so that none is another flow's.
                "connected": client.datagrams(8, cluster.vip("dns"), SENDS, RECEIVES, source_port=9100),
                "unconnected": client.datagrams(
                    4, cluster.vip("dns"), SENDS, RECEIVES, connected=False, source_port=9200
                ),
                "direct_datagrams": client.datagrams(9, (pod, 5353), SENDS, RECEIVES),
                "node_port_datagrams": outside.datagrams(2, cluster.node_port("dns"), SENDS, RECEIVES),
            }
            cluster.settle()
            # What is over ends here, what is held is open when the agent stops: the two ways to make a flow's row.
            cluster.node.run(["conntrack", "-D", "-p", "tcp", "--state", "TIME_WAIT"])
            cluster.node.run(["conntrack", "-D", "-p", "udp"])
            datagrams = client.datagrams(2, cluster.vip("dns"), SENDS, RECEIVES, source_port=9000, keep=True)["number"]
            for _ in range(20):  # longer than an interval, and than a look that was late
                self.ledgers["held"] = client.exchange(held, SENDS, RECEIVES)
                self.ledgers["held_datagrams"] = client.exchange(datagrams, SENDS, RECEIVES)
                self.ledgers["held_node_port"] = outside.exchange(held_node_port, SENDS, RECEIVES)
                time.sleep(0.1)
        self.server_ledgers = [server.ledger() for server in cluster.servers]
        client.release([*held, *datagrams])
        outside.release(held_node_port)
        cluster.settle()
        cluster.node.run(["conntrack", "-F"])

    def dialled(self, kinds: set[str]) -> dict[Key, Bytes]:
        """The clients' account of these kinds. What conntrack counts of TCP are no application bytes: None."""
        told: dict[Key, Bytes] = {}
        for kind in kinds:
            role = "client" if kind in CLIENT else "forwarded"
            for ((address, port), peer), row in zip(ends(self.ledgers[kind]), self.ledgers[kind], strict=True):
                protocol = "udp" if row["protocol"] == 17 else "tcp"
                source = (self.pod if address == "0.0.0.0" else address, port)  # an unconnected socket's
                counted = role == "client" or protocol == "udp"
                told[role, protocol, source, peer] = (int(row["sent"]), int(row["received"])) if counted else None
        assert len(told) == sum(len(self.ledgers[kind]) for kind in kinds)
        return told

    def accepted(self, *, direct: bool = True) -> dict[Key, Bytes]:
        """The servers' account: from client to server is what they received. Without what was dialled `direct`."""
        return {
            ("server", "tcp", peer, own): (int(row["received"]), int(row["sent"]))
            for ledger in self.server_ledgers
            for (own, peer), row in zip(ends(ledger), ledger, strict=True)
            if row["protocol"] == 6 and row["started"] >= self.began and (direct or own[1] != DIRECT_PORT)
        }

    def check(self, expected: dict[Key, Bytes]) -> pd.DataFrame:
        """Exactly these, each once, to the backend whose server saw it; the lives."""
        life = lives(rows(self.output))
        found = {
            (row.role, row.protocol, (row.src_ip, row.src_port), (row.dst_ip, row.dst_port)): (
                None if pd.isna(row.bytes_sent) else (int(row.bytes_sent), int(row.bytes_received))
            )
            for row in life.itertuples()
        }
        assert len(found) == len(life), "a connection is there twice"
        assert found == expected
        log = accepted([*self.cluster.servers, self.cluster.outside_server])
        for row in life[life.role != "server"].itertuples():
            seen_as = (row.snat_ip, int(row.snat_port)) if "snat" in row.nat else (row.src_ip, row.src_port)
            assert (row.protocol, seen_as, (row.backend_ip, int(row.backend_port))) in log
        served = life[life.role == "server"]
        assert list(served.backend_ip) == list(served.dst_ip)
        assert list(served.backend_port) == list(served.dst_port)
        self.sums = clean(self.output)
        return life


ALL = CLIENT | FORWARDED


def test_both_ends_on_one_node_have_their_rows_and_sums_count_each_connection_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "data", "--roles", "client,forwarded,server")
    life = run.check(run.dialled(ALL) | run.accepted())
    assert len(run.accepted()) == sum(len(run.ledgers[kind]) for kind in ACCEPTED)
    asked = rows(run.output).query("role in ('client', 'forwarded')")
    dialled = [count for count in run.dialled(ALL).values() if count]
    assert asked.bytes_sent.sum() == sum(sent for sent, _ in dialled)
    assert asked.bytes_received.sum() == sum(received for _, received in dialled)
    assert asked.opened.sum() == sum(len(ledger) for ledger in run.ledgers.values())
    ways = {cluster.vip(), *((pod.ips[4], 8080) for pod in cluster.backend_pods)}
    held = life.src_port.isin(run.ledgers["held"]["local_port"]) & (life.src_ip == cluster.client_pods[0].ips[4])
    held &= np.array([way in ways for way in zip(life.dst_ip, life.dst_port, strict=True)])
    assert set(life[held].role) == {"client", "server"}
    assert (life[held].rows > 1).all()
    # The server's own end does not know what its client dialled, unless conntrack has just these two ends.
    served = life[life.role == "server"]
    direct = served.dst_port == DIRECT_PORT
    assert set(served[direct].nat) == {"none"}
    assert set(served[~direct].nat) == {"unknown"}
    assert served.pid.isna().all()
    assert run.sums.accepted == len(run.accepted())


@pytest.mark.parametrize("roles", ["client", "forwarded", "server"])
def test_only_the_roles_that_were_asked_for(cluster: Cluster, tmp_path: Path, roles: str) -> None:
    run = Run(cluster, tmp_path / "data", "--roles", roles)
    expected = run.dialled((CLIENT if "client" in roles else set()) | (FORWARDED if "forwarded" in roles else set()))
    run.check(expected | (run.accepted() if "server" in roles else {}))


#: Networks, and which kinds go there.
NETWORKS = {
    "two services": (("10.96.0.11/32", "10.96.0.13/32"), {"other", "connected", "unconnected", "held_datagrams"}),
    "the node": (("172.30.0.2/32",), {"node_port", "node_port_datagrams", "held_node_port"}),
    "the pods": (("10.244.0.0/16",), {"direct", "direct_datagrams"}),
    "all of IPv6": (("::/0",), set[str]()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_excluded_networks_are_left_out_by_what_was_dialled(cluster: Cluster, tmp_path: Path, name: str) -> None:
    networks, left_out = NETWORKS[name]
    options = [part for network in networks for part in ("--exclude-cidr", network)]
    run = Run(cluster, tmp_path / "data", "--roles", "client,forwarded,server", *options)
    # A server's row says the server's own address: that is in the pods' network.
    served = {} if name == "the pods" else run.accepted()
    run.check(run.dialled(ALL - left_out) | served)


def test_where_every_destination_is_excluded_there_is_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "data", "--roles", "client,forwarded,server", "--exclude-cidr", "0.0.0.0/0")
    assert not list((run.output / "connections").rglob("*.parquet"))
    assert not account(run.output)[["opened", "accepted", "flows", "written"]].any()


def test_only_virtual_destinations_and_of_those_all_but_one(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--roles", "client,forwarded,server", "--only-virtual", "--exclude-cidr", "10.96.0.11/32"]
    run = Run(cluster, tmp_path / "data", *options)
    kinds = ALL - DIRECT - {"other"}
    life = run.check(run.dialled(kinds) | run.accepted(direct=False))
    assert not life.nat.isin(("none", "snat")).any()


@pytest.mark.needs("ipv6")
def test_an_excluded_ipv6_network_leaves_ipv4_alone(tmp_path: Path) -> None:
    with Cluster(backends=2, clients=1, families="dual") as cluster:
        client, services = cluster.clients[0], {family: cluster.vip(family=family) for family in (4, 6)}
        with agent(cluster, tmp_path / "data", "--exclude-cidr", "fd00:10:96::/64"):
            ledgers = {family: client.connect_many(10, where, SENDS, RECEIVES) for family, where in services.items()}
            cluster.settle()
        table = rows(tmp_path / "data")
        assert sorted(table.src_port) == sorted(ledgers[4]["local_port"])
        assert set(table.dst_ip) == {services[4][0]}
        clean(tmp_path / "data")


@pytest.mark.parametrize("roles", ["forwarded", "forwarded,server"])
def test_what_was_refused_to_a_client_of_this_node_was_not_forwarded(tmp_path: Path, roles: str) -> None:
    """Although no row of the client's tells so: its socket claims the entry."""
    with Cluster(backends=2, clients=1, outside=True) as cluster:
        cluster.add_service("np", node_port=30000)
        for server in cluster.servers:
            server.stop_listening()
        with agent(cluster, tmp_path / "data", "--roles", roles):
            cluster.clients[0].connect_many(10, cluster.vip(), SENDS, RECEIVES)
            ledger = cluster.outside_client.connect_many(5, cluster.node_port("np"), SENDS, RECEIVES)
        table = rows(tmp_path / "data")
        assert sorted(table.src_port) == sorted(ledger["local_port"])
        assert set(table.role) == {"forwarded"}
        assert clean(tmp_path / "data").withdrawn == 10
