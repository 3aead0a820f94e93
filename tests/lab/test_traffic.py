"""The workers: exact bytes on both sides, thousands of fresh ports, and every way a connection can fail."""

import errno
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tracer.errors import TracerError, UsageError
from tracer.lab import wire
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.lab.topology import Pod
from tracer.lab.traffic import LEDGER, Ledger, addresses

pytestmark = pytest.mark.needs("netns", "iptables")


@pytest.fixture
def pair() -> Iterator[Cluster]:
    with Cluster(backends=1, clients=1) as cluster:
        yield cluster


def both(cluster: Cluster) -> tuple[Ledger, Ledger]:
    """The ledgers of client and server, each by the client's port."""
    cluster.settle()
    client = cluster.clients[0].ledger()
    server = np.concatenate([server.ledger() for server in cluster.servers])
    return np.sort(client, order="local_port"), np.sort(server, order="peer_port")


def dns(cluster: Cluster, family: int = 4) -> tuple[str, int]:
    """A UDP server in the first backend."""
    where = cluster.backend_pods[0].ips[family], 53
    if not cluster.servers[0].totals()["flows"]:
        cluster.servers[0].listen([where[0]], where[1], "udp")
    return where


def time_waits(pod: Pod) -> int:
    return len(pod.netns.run(["ss", "-tanH", "state", "time-wait"]).splitlines())


def test_a_row_is_the_same_bytes_on_both_sides() -> None:
    raw = wire.ROW.pack(1, 2, 3, 4, 5, wire.packed("10.0.0.1"), wire.packed("fd00::1"), 6, 7, 8, 9, 10, 11, 12, 13)
    (row,) = np.frombuffer(raw, dtype=LEDGER)
    assert [row[name] for name in LEDGER.names or () if row[name].dtype.kind != "V"] == list(range(1, 14))
    assert addresses(np.array([row["local"], row["peer"]])) == ["10.0.0.1", "fd00::1"]


@pytest.mark.parametrize(("sends", "receives"), [(0, 0), (8, 0), (8, 1), (1_000, 2_000), (3_000_000, 5_000_000)])
def test_every_byte_is_counted_on_both_sides(cluster: Cluster, sends: int, receives: int) -> None:
    before = [server.totals() for server in cluster.servers]
    rows = cluster.clients[0].connect_many(5, cluster.vip(), sends, receives)
    assert set(rows["errno"]) == {0}
    assert (set(rows["sent"]), set(rows["received"])) == ({sends}, {receives})
    client, server = both(cluster)
    assert np.array_equal(client["local_port"], server["peer_port"])
    assert np.array_equal(client["sent"], server["received"])
    assert np.array_equal(client["received"], server["sent"])
    after = [server.totals() for server in cluster.servers]
    assert sum(new["received"] - old["received"] for new, old in zip(after, before, strict=True)) == 5 * sends
    assert sum(new["sent"] - old["sent"] for new, old in zip(after, before, strict=True)) == 5 * receives


def test_times_are_in_order_and_the_process_is_named(cluster: Cluster) -> None:
    begin = wire.now()
    rows = cluster.clients[0].connect_many(50, cluster.vip())
    assert begin < rows["started"][0]
    assert (rows["started"] < rows["established"]).all()
    assert (rows["established"] < rows["ended"]).all()
    assert set(rows["pid"]) == {cluster.clients[0].pid}
    with open(f"/proc/{cluster.clients[0].pid}/comm", encoding="ascii") as file:
        assert file.read() == "lab-client\n"


def test_twenty_thousand_connections_have_twenty_thousand_ports() -> None:
    with Cluster(backends=3, clients=1) as cluster:
        rows = cluster.clients[0].connect_many(20_000, cluster.vip())
        assert not rows["errno"].any()
        assert len(np.unique(rows["local_port"])) == 20_000
        client, server = both(cluster)
        assert np.array_equal(client["local_port"], server["peer_port"])


def test_held_connections_exchange_and_close(pair: Cluster) -> None:
    client = pair.clients[0]
    numbers = client.hold(3, pair.vip())["number"]
    assert client.totals()["held"] == 3
    assert (client.ledger()["ended"] == 0).all()
    rows = client.exchange(numbers[:2], sends=100, receives=200, times=4)
    assert rows["sent"].tolist() == [400, 400]
    assert rows["received"].tolist() == [800, 800]
    pair.settle()
    totals = pair.servers[0].totals()
    assert [totals[name] for name in ("accepted", "open", "sent", "received")] == [3, 3, 1_600, 800]
    client.release(numbers[:1])
    client.release(numbers[1:], reset=True)
    ours, theirs = both(pair)
    assert (ours["ended"] > 0).all()
    assert sorted(theirs["errno"]) == [0, errno.ECONNRESET, errno.ECONNRESET]
    with pytest.raises(TracerError, match="is not open"):
        client.exchange(numbers, sends=100, receives=100)
    assert client.totals()["held"] == 0  # and the client still answers


def test_a_half_close_ends_on_both_sides_and_leaves_the_time_wait_here(pair: Cluster) -> None:
    client = pair.clients[0]
    numbers = client.hold(3, pair.vip())["number"]
    client.exchange(numbers, 100, 200)
    rows = client.release(numbers, half=True)
    assert (rows["errno"].tolist(), rows["received"].tolist()) == ([0] * 3, [200] * 3)
    assert pair.servers[0].totals()["open"] == 0  # already: the client has read the server's end
    assert (time_waits(pair.client_pods[0]), time_waits(pair.backend_pods[0])) == (3, 0)
    with pytest.raises(UsageError, match="not both"):
        client.release([], half=True, reset=True)


def test_a_server_that_closes_first_has_the_time_wait(pair: Cluster) -> None:
    pair.servers[0].close_first()
    for size in (1, 1_448, 100_000):
        rows = pair.clients[0].connect_many(20, pair.vip(), 100, size)
        assert (set(rows["errno"]), set(rows["received"])) == ({0}, {size})
    ours, theirs = both(pair)
    assert np.array_equal(ours["received"], theirs["sent"])
    assert (time_waits(pair.client_pods[0]), time_waits(pair.backend_pods[0])) == (0, 60)
    (number,) = pair.clients[0].hold(1, pair.vip())["number"]
    (row,) = pair.clients[0].exchange([number], 100, 100, times=2)
    assert (row["errno"] > 0, row["received"]) == (True, 100)


def test_several_listeners_share_a_port(pair: Cluster) -> None:
    where = (pair.backend_pods[0].ips[4], 9_000)
    pair.servers[0].listen([where[0]], where[1], reuse_port=4)
    pair.servers[0].listen([where[0]], where[1], "udp", reuse_port=4)
    for protocol, kind in (("tcp", "-tlnH"), ("udp", "-ulnH")):
        sockets = pair.backend_pods[0].netns.run(["ss", kind, "sport", "=", ":9000"])
        assert len(sockets.splitlines()) == 4, protocol
    pair.clients[0].connect_many(50, where)
    rows = pair.clients[0].datagrams(50, where)
    assert set(rows["errno"]) == {0}
    client, server = both(pair)
    assert len(client) == 100
    for protocol in (6, 17):
        ours, theirs = (ledger[ledger["protocol"] == protocol] for ledger in (client, server))
        assert np.array_equal(ours["local_port"], theirs["peer_port"])
    with pytest.raises(TracerError, match=r"could not listen: Address already in use"):
        pair.servers[0].listen([where[0]], where[1])
    with pytest.raises(UsageError, match="not sctp"):
        pair.servers[0].listen([where[0]], where[1], "sctp")
    with pytest.raises(UsageError, match="over udp"):
        pair.servers[0].listen([where[0]], where[1], "udp", mptcp=True)


@pytest.mark.parametrize("connected", [True, False])
def test_udp_flows_agree_to_the_byte_and_the_datagram(pair: Cluster, connected: bool) -> None:
    where = dns(pair)
    rows = pair.clients[0].datagrams(5_000, where, 40, 120, times=2, connected=connected)
    assert set(rows["errno"]) == {0}
    assert len(np.unique(rows["local_port"])) == 5_000
    client, server = both(pair)
    assert (set(client["protocol"]), set(server["protocol"])) == ({17}, {17})
    assert np.array_equal(client["local_port"], server["peer_port"])
    assert set(client["sent"]) == set(server["received"]) == {80}
    assert set(client["received"]) == set(server["sent"]) == {240}
    for name in ("datagrams_sent", "datagrams_received"):
        assert set(client[name]) == set(server[name]) == {2}
    assert set(addresses(server["local"])) == set(addresses(client["peer"])) == {where[0]}
    assert set(addresses(client["local"])) == {pair.client_pods[0].ips[4] if connected else "0.0.0.0"}
    assert (client["started"] <= client["established"]).all()
    assert (client["established"] < client["ended"]).all()
    assert pair.servers[0].totals() == {
        "accepted": 0, "open": 0, "flows": 5_000, "sent": 1_200_000, "received": 400_000,
        "datagrams_sent": 10_000, "datagrams_received": 10_000,
    }  # fmt: skip
    assert pair.clients[0].totals() == {"attempted": 0, "established": 0, "held": 0, "flows": 5_000}


@pytest.mark.parametrize("connected", [True, False])
def test_udp_of_any_size_from_chosen_ports(pair: Cluster, connected: bool) -> None:
    where, client, server = dns(pair), pair.clients[0], pair.servers[0]
    port = 20_000
    for sends, receives in ((8, 0), (8, 1), (65_507, 65_507)):
        rows = client.datagrams(3, where, sends, receives, connected=connected, source_port=port)
        assert rows["local_port"].tolist() == [port, port + 1, port + 2]
        assert (set(rows["errno"]), set(rows["sent"]), set(rows["received"])) == ({0}, {sends}, {receives})
        wait_until(lambda port=port: server.totals()["flows"] == (port - 20_000) * 3 // 10 + 3, "all datagrams")
        port += 10
    theirs = server.ledger()
    assert theirs["received"].tolist() == [8] * 6 + [65_507] * 3
    assert theirs["sent"].tolist() == [0] * 3 + [1] * 3 + [65_507] * 3
    held = client.datagrams(1, where, connected=connected, source_port=port, keep=True)
    with pytest.raises(TracerError, match="Address already in use"):
        client.datagrams(1, where, connected=connected, source_port=port)
    client.release(held["number"])
    for sends, receives in ((7, 0), (65_508, 0), (8, 65_508)):
        with pytest.raises(UsageError, match="A datagram holds"):
            client.datagrams(1, where, sends, receives)


@pytest.mark.parametrize("connected", [True, False])
def test_udp_flows_can_be_kept(pair: Cluster, connected: bool) -> None:
    where, client = dns(pair), pair.clients[0]
    numbers = client.datagrams(3, where, connected=connected, keep=True)["number"]
    client.exchange(numbers[:2], 50, 70, times=3)
    with pytest.raises(TracerError, match="it is a UDP flow"):
        client.release(numbers, reset=True)
    pair.settle()  # flows are no connections
    rows = client.release(numbers)
    assert (rows["sent"].tolist(), rows["received"].tolist()) == ([250, 250, 100], [310, 310, 100])
    assert rows["datagrams_received"].tolist() == [4, 4, 1]
    assert (rows["ended"] > 0).all()
    assert sorted(pair.servers[0].ledger()["received"]) == [100, 250, 250]


def test_lost_datagrams_are_noted(pair: Cluster) -> None:
    client, silent, closed = pair.clients[0], ("10.244.1.251", 53), (pair.backend_pods[0].ips[4], 54)
    for connected in (True, False):
        rows = client.datagrams(2, silent, times=5, connected=connected, timeout=0.05)
        assert rows["errno"].tolist() == [errno.ETIMEDOUT] * 2
        assert (rows["datagrams_sent"].tolist(), rows["datagrams_received"].tolist()) == ([1, 1], [0, 0])
    (row,) = client.datagrams(1, closed)
    assert row["errno"] == errno.ECONNREFUSED  # told by ICMP, which only a connected socket hears
    (row,) = client.datagrams(1, closed, connected=False, timeout=0.05)
    assert row["errno"] == errno.ETIMEDOUT


def test_an_answer_from_elsewhere_is_noted(pair: Cluster) -> None:
    address = pair.backend_pods[0].ips[4]

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((address, 0))
        return made

    netns = pair.backend_pods[0].netns
    with netns.call(bound) as asked, netns.call(bound) as other, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: other.sendto(b"x" * 100, asked.recvfrom(1_000)[1]))
        (row,) = pair.clients[0].datagrams(1, asked.getsockname(), connected=False)
        answer.result()
    assert (row["errno"], row["received"]) == (errno.EREMOTEIO, 0)


@pytest.mark.needs("ipv6")
def test_udp_over_ipv6() -> None:
    with Cluster(backends=1, clients=1, families="ipv6") as cluster:
        for connected in (True, False):
            rows = cluster.clients[0].datagrams(10, dns(cluster, 6), 100, 300, connected=connected)
            assert (set(rows["errno"]), set(rows["received"])) == ({0}, {300})
        assert set(addresses(cluster.servers[0].ledger()["peer"])) == {cluster.client_pods[0].ips[6]}


def test_failures_are_rows_with_their_errno(pair: Cluster) -> None:
    client, server = pair.clients[0], pair.servers[0]
    server.reset()
    (row,) = client.connect_many(1, pair.vip(), 100, 100)
    assert row["errno"] == errno.ECONNRESET
    assert row["established"] > 0
    server.reset(False)
    server.stop_listening()
    (row,) = client.connect_many(1, pair.vip())
    assert row["errno"] == errno.ECONNREFUSED
    assert row["established"] == 0
    (row,) = client.connect_many(1, ("10.244.1.251", 80), timeout=0.05)  # nobody has this address
    assert row["errno"] == errno.ECANCELED
    assert row["local_port"] > 0
    assert len(client.ledger()) == 3


def test_a_rate_is_kept_to_and_workers_run_side_by_side(cluster: Cluster) -> None:
    client = cluster.clients[0]
    began = wire.now()
    client.begin_connects(20, cluster.vip(), rate=100)
    with pytest.raises(UsageError, match="call finish"):
        client.totals()
    rows = client.finish_connects()
    assert int(rows["started"][-1]) - began > 0.18e9


def test_sizes_that_make_no_sense_are_refused(cluster: Cluster) -> None:
    for sends, receives in ((7, 0), (0, 1), (1 << 32, 0), (8, 1 << 32)):
        with pytest.raises(UsageError):
            cluster.clients[0].connect_many(1, cluster.vip(), sends, receives)


def test_a_killed_worker_is_an_error_that_names_it(pair: Cluster) -> None:
    os.kill(pair.servers[0].pid, signal.SIGKILL)
    with pytest.raises(TracerError, match=r"The server in web-0 \(process \d+\) is gone: it was killed"):
        pair.servers[0].totals()
