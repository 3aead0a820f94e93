"""Connections that fail, each in its own way: the right word for it, and the backend where conntrack knows one."""

import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, rows
from scenarios.truth import account, check

from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.lab.traffic import Client, Ledger, socket_statistics

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft")

SENDS, RECEIVES = 100, 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three backends, two clients, and a service for each way to fail; SYNs are repeated once."""
    with Cluster(backends=3, clients=2, syn_retries=1) as made:
        made.add_service("closed", [0, 1], target_port=8081)
        made.add_service("silent", [2], target_port=8083)
        made.add_service("resetting", [0], target_port=8084)
        # a refusal as a host without a listener makes it
        for number in (0, 1):
            made.backend_pods[number].netns.run(["nft", "-f", "-"], _inbound("dport 8081 reject with tcp reset"))
        made.backend_pods[2].netns.run(["nft", "-f", "-"], _inbound("dport 8083 counter drop"))
        yield made


def _inbound(rule: str) -> str:
    return (
        "add table inet lab\nadd chain inet lab input { type filter hook input priority filter ; }\n"
        f"add rule inet lab input tcp {rule}\n"
    )


def observe(cluster: Cluster, output: Path, act: Callable[[], Ledger]) -> pd.DataFrame:
    """The rows, one for each connection, while that was done; nothing else, and nothing lost."""
    cluster.node.run(["conntrack", "-F"])
    with agent(cluster, output):
        ledger = act()
    found = check(rows(output), ledger, cluster.servers)
    assert (found.rows == 1).all()
    assert found.opened.all()
    assert found.closed.all()
    sums = account(output)
    assert sums["closed"] == len(found)
    assert sums["flows"] == sums["withdrawn"], "a failure of a client here is no other node's"
    return found


def to(cluster: Cluster, *numbers: int) -> set[str]:
    return {cluster.backend_pods[number].ips[4] for number in numbers}


def never_stood(found: pd.DataFrame) -> None:
    assert found.connect_latency_us.isna().all()
    assert (found.bytes_sent + found.bytes_received == 0).all()


def both(cluster: Cluster, count: int, where: tuple[str, int]) -> Ledger:
    """So many connects by each client, at once."""
    for client in cluster.clients:
        client.begin_connects(count, where)
    return np.concatenate([client.finish_connects() for client in cluster.clients])


@pytest.mark.parametrize("proxy", ["iptables", "nftables"])
def test_a_service_without_endpoints(proxy: str, tmp_path: Path) -> None:
    with Cluster(backends=1, clients=2, proxy=proxy) as cluster:
        # every refusal is meant to come
        cluster.node.sysctl({"net.ipv4.icmp_ratelimit": 0})
        cluster.set_backends("web", [])
        found = observe(cluster, tmp_path / "data", lambda: both(cluster, 2, cluster.vip()))
        assert (len(found), set(found.result)) == (4, {"refused"})
        # the filter rule answers, so conntrack makes no entry
        assert set(found.nat) == {"unknown"}
        assert found.backend_ip.isna().all()
        never_stood(found)


def test_a_port_that_nobody_listens_on(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.clients[0]
    direct = cluster.backend_pods[0].ips[4], 8099

    def act() -> Ledger:
        return np.concatenate((client.connect_many(10, cluster.vip("closed")), client.connect_many(5, direct)))

    found = observe(cluster, tmp_path / "data", act)
    assert set(found.result) == {"refused"}
    service = found[found.dst_ip == cluster.vip("closed")[0]]
    assert (len(service), set(service.nat), set(service.backend_port)) == (10, {"dnat"}, {8081})
    assert set(service.backend_ip) <= to(cluster, 0, 1)
    plain = found[found.dst_ip == direct[0]]
    assert (len(plain), set(plain.nat), set(plain.backend_ip)) == (5, {"none"}, {direct[0]})
    never_stood(found)


@pytest.mark.parametrize("network", ["bridge", "routed"])
def test_a_backend_that_is_gone(network: str, tmp_path: Path) -> None:
    with Cluster(backends=1, clients=1, network=network) as cluster:
        # it does not answer for its address any more
        cluster.backend_pods[0].netns.run(["ip", "addr", "flush", "dev", "eth0"])
        device = "cni0" if network == "bridge" else "cali0"
        cluster.node.sysctl({f"net.ipv4.neigh.{device}.retrans_time_ms": 50, "net.ipv4.icmp_ratelimit": 0})
        found = observe(cluster, tmp_path / "data", lambda: cluster.clients[0].connect_many(3, cluster.vip()))
        assert (len(found), set(found.result)) == (3, {"unreachable"})
        if network == "routed":
            assert (set(found.nat), set(found.backend_ip)) == ({"dnat"}, to(cluster, 0))
        else:
            # a bridge asks for the hardware address before conntrack confirms the entry (br_netfilter_hooks.c)
            assert set(found.nat) == {"unknown"}
            assert found.backend_ip.isna().all()
        never_stood(found)


def dropped(cluster: Cluster) -> int:
    """How many SYNs came to where nobody answers."""
    rules = cluster.backend_pods[2].netns.run(["nft", "list", "chain", "inet", "lab", "input"])
    (count,) = re.findall(r"counter packets (\d+)", rules)
    return int(count)


def test_silence(cluster: Cluster, tmp_path: Path) -> None:
    """Until the client's kernel gives up (net.ipv4.tcp_syn_retries), two connections at once."""
    before = dropped(cluster)
    found = observe(cluster, tmp_path / "data", lambda: both(cluster, 1, cluster.vip("silent")))
    assert (len(found), set(found.result)) == (2, {"timeout"})
    assert (set(found.nat), set(found.backend_ip), set(found.backend_port)) == ({"dnat"}, to(cluster, 2), {8083})
    assert found.packets_sent.sum() == dropped(cluster) - before
    assert found.retransmits.tolist() == (found.packets_sent - 1).tolist()
    assert (found.retransmits > 0).all()
    never_stood(found)


def test_a_reset_by_the_peer(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.servers[0]
    server.reset()
    try:
        found = observe(
            cluster,
            tmp_path / "data",
            lambda: cluster.clients[0].connect_many(10, cluster.vip("resetting"), SENDS, RECEIVES),
        )
    finally:
        server.reset(False)
    assert set(found.result) == {"reset"}
    assert (set(found.nat), set(found.backend_ip), set(found.backend_port)) == ({"dnat"}, to(cluster, 0), {8084})
    assert (set(found.bytes_sent), set(found.bytes_received)) == ({SENDS}, {0})
    assert (found.connect_latency_us > 0).all()


def test_a_client_that_gives_up(cluster: Cluster, tmp_path: Path) -> None:
    """It closes at once, closes after a while, or is killed: before the connection stands."""
    client, where = cluster.clients[0], cluster.vip("silent")

    def act() -> Ledger:
        at_once = client.connect_as("abort", 5, where)
        later = client.connect_many(3, where, timeout=0.05)
        nonblocking = client.connect_as("nonblocking", 3, where, timeout=0.05)
        return np.concatenate((at_once, later, nonblocking))

    found = observe(cluster, tmp_path / "data", act)
    assert (len(found), set(found.result)) == (11, {"aborted"})
    assert (set(found.nat), set(found.backend_ip), set(found.backend_port)) == ({"dnat"}, to(cluster, 2), {8083})
    never_stood(found)


def test_a_client_that_is_killed_while_it_connects(cluster: Cluster, tmp_path: Path) -> None:
    cluster.node.run(["conntrack", "-F"])
    with Client(cluster.client_pods[0].netns) as doomed, agent(cluster, tmp_path / "data"):
        doomed.begin_connects(1, cluster.vip("silent"))
        wait_until(lambda: bool(connecting(cluster)), "the connect to begin")
        (port,) = connecting(cluster)
        doomed.close()
        wait_until(lambda: not connecting(cluster), "the kernel to close its socket")
    (row,) = rows(tmp_path / "data").to_dict("records")
    assert (row["src_port"], row["pid"], row["comm"]) == (port, doomed.pid, "lab-client")
    assert (row["result"], row["nat"], row["opened"], row["closed"]) == ("aborted", "dnat", True, True)
    assert {row["backend_ip"]} == to(cluster, 2)
    account(tmp_path / "data")


def connecting(cluster: Cluster) -> list[int]:
    """Source ports of the first client pod's connects to where nobody answers."""
    return [key[1] for key in socket_statistics(cluster.client_pods[0].netns, "dst", cluster.vip("silent")[0])]


def test_a_client_that_ends_by_rst(cluster: Cluster, tmp_path: Path) -> None:
    """Its own decision, of a connection that stood and lost nothing: ok."""
    client = cluster.clients[0]

    def act() -> Ledger:
        held = client.hold(6, cluster.vip())["number"]
        client.exchange(held, SENDS, RECEIVES)
        return client.release(held, reset=True)

    found = observe(cluster, tmp_path / "data", act)
    assert (len(found), set(found.result), set(found.nat)) == (6, {"ok"}, {"dnat"})
    assert (set(found.bytes_sent), set(found.bytes_received)) == ({SENDS}, {RECEIVES})


def test_no_source_port_left(cluster: Cluster, tmp_path: Path) -> None:
    """connect() then fails after the socket went to SYN_SENT, without a port."""
    cluster.node.run(["conntrack", "-F"])
    pod, client = cluster.client_pods[1].netns, cluster.clients[1]
    pod.sysctl({"net.ipv4.ip_local_port_range": "61000 61003"})
    try:
        with agent(cluster, tmp_path / "data"):
            held = client.hold(4, cluster.vip())
            failed = client.connect_many(3, cluster.vip())
            held = client.release(held["number"])
            cluster.settle()
    finally:
        pod.sysctl({"net.ipv4.ip_local_port_range": "10240 65535"})
    assert set(failed["errno"]) == {errno.EADDRNOTAVAIL}
    table = rows(tmp_path / "data")
    check(table[table.result == "ok"], held, cluster.servers)
    refused = table[table.result == "EADDRNOTAVAIL"]
    assert (len(refused), len(table)) == (3, 7)
    assert (set(refused.nat), set(refused.src_port), set(refused.dst_ip)) == ({"unknown"}, {0}, {cluster.vip()[0]})
    account(tmp_path / "data")
