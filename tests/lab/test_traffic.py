"""The workers: exact bytes on both sides, thousands of fresh ports, and every way a connection can fail."""

import errno
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from tracer.errors import TracerError, UsageError
from tracer.lab import wire
from tracer.lab.cluster import Cluster
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


def test_a_row_is_the_same_bytes_on_both_sides() -> None:
    raw = wire.ROW.pack(1, 2, 3, 4, 5, wire.packed("10.0.0.1"), wire.packed("fd00::1"), 6, 7, 8, 9, 10)
    (row,) = np.frombuffer(raw, dtype=LEDGER)
    assert [row[name] for name in LEDGER.names or () if row[name].dtype.kind != "V"] == list(range(1, 11))
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
    assert pair.servers[0].totals() == {"accepted": 3, "open": 3, "sent": 1_600, "received": 800}
    client.release(numbers[:1])
    client.release(numbers[1:], reset=True)
    ours, theirs = both(pair)
    assert (ours["ended"] > 0).all()
    assert sorted(theirs["errno"]) == [0, errno.ECONNRESET, errno.ECONNRESET]
    with pytest.raises(TracerError, match="is not open"):
        client.exchange(numbers, sends=100, receives=100)
    assert client.totals()["held"] == 0  # and the client still answers


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
    client.begin_connects(20, cluster.vip(), rate=100)
    with pytest.raises(UsageError, match="call finish"):
        client.totals()
    rows = client.finish_connects()
    assert (rows["started"][-1] - rows["started"][0]) > 0.18e9


def test_sizes_that_make_no_sense_are_refused(cluster: Cluster) -> None:
    for sends, receives in ((7, 0), (0, 1), (1 << 32, 0), (8, 1 << 32)):
        with pytest.raises(UsageError):
            cluster.clients[0].connect_many(1, cluster.vip(), sends, receives)


def test_a_killed_worker_is_an_error_that_names_it(pair: Cluster) -> None:
    os.kill(pair.servers[0].pid, signal.SIGKILL)
    with pytest.raises(TracerError, match=r"The server in web-0 \(process \d+\) is gone: it was killed"):
        pair.servers[0].totals()
