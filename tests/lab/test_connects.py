"""Every way to connect really goes: told by the kernel's own counters, and by two ledgers that agree to the byte."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tracer.errors import TracerError, UsageError
from tracer.lab import io_uring
from tracer.lab.cluster import Cluster
from tracer.lab.connection import UnableError
from tracer.lab.connects import WAYS
from tracer.lab.netns import Namespace, wait_until
from tracer.lab.traffic import Ledger, addresses, socket_statistics

pytestmark = pytest.mark.needs("netns", "iptables")

FASTOPEN, MPTCP, SILENT = 8082, 8083, "10.244.1.251"  # two ports; an address that nobody has


@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    with Cluster(backends=1, clients=1) as cluster:
        for pod in (*cluster.backend_pods, *cluster.client_pods):
            pod.netns.sysctl({"net.ipv4.tcp_fastopen": 3})
        cluster.servers[0].listen(cluster.backend_pods[0].addresses, FASTOPEN, fastopen=True)
        yield cluster


def backend(cluster: Cluster, port: int) -> tuple[str, int]:
    return cluster.backend_pods[0].ips[4], port


def source(cluster: Cluster, port: int) -> tuple[str, int]:
    return cluster.client_pods[0].ips[4], port


def kernel_counts(namespace: Namespace, family: str) -> dict[str, int]:
    """A line pair of /proc/net/netstat, such as TcpExt or MPTcpExt."""
    lines = namespace.run(["cat", "/proc/net/netstat"]).splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith(f"{family}:"))
    return dict(zip(names, map(int, values), strict=True))


def check(cluster: Cluster, rows: Ledger) -> Ledger:
    """The server's newest rows, which must be those connections that stood, to the byte."""
    cluster.settle()
    stood = rows[rows["established"] > 0]
    ledger = cluster.servers[0].ledger()
    theirs = np.sort(ledger[ledger["protocol"] == 6], order="started")[-len(stood) :]
    assert stood["local_port"].tolist() == theirs["peer_port"].tolist()
    assert addresses(stood["local"]) == addresses(theirs["peer"])
    assert stood["sent"].tolist() == theirs["received"].tolist()
    assert stood["received"].tolist() == theirs["sent"].tolist()
    assert set(rows["protocol"]) == {6}
    return theirs


@pytest.mark.parametrize("how", ["nonblocking", "io_uring", "mptcp", "mapped", "fastopen", "sendto-fastopen"])
def test_each_way_arrives_at_the_service_with_every_byte(lab: Cluster, how: str) -> None:
    rows = lab.clients[0].connect_as(how, 5, lab.vip(), 1_000, 400_000)
    assert (rows["errno"].tolist(), rows["sent"].tolist(), rows["received"].tolist()) == (
        [0] * 5,
        [1_000] * 5,
        [400_000] * 5,
    )
    assert set(addresses(rows["peer"])) == {lab.vip()[0]}
    assert (rows["started"] < rows["established"]).all()
    assert (rows["established"] < rows["ended"]).all()
    check(lab, rows)


@pytest.mark.parametrize("how", ["nonblocking", "io_uring", "mptcp", "mapped", "fastopen", "sendto-fastopen"])
def test_each_way_is_refused_with_its_errno(lab: Cluster, how: str) -> None:
    (row,) = lab.clients[0].connect_as(how, 1, backend(lab, 9))
    assert (row["errno"], row["established"], row["sent"]) == (errno.ECONNREFUSED, 0, 0)
    assert row["ended"] > row["started"]
    assert row["local_port"] > 0


def test_nonblocking_gives_up_in_time(lab: Cluster) -> None:
    (row,) = lab.clients[0].connect_as("nonblocking", 1, (SILENT, 80), timeout=0.05)
    assert (row["errno"], row["established"]) == (errno.ECANCELED, 0)


def test_a_retry_is_two_attempts_on_one_socket(lab: Cluster) -> None:
    rows = lab.clients[0].connect_as("retry", 3, lab.vip(), 100, 200, first=backend(lab, 9))
    assert rows["errno"].tolist() == [errno.ECONNREFUSED, 0] * 3
    assert rows["peer_port"].tolist() == [9, 80] * 3
    assert (rows["local_port"] > 0).all()
    assert (rows["ended"][0::2] == rows["started"][1::2]).all()
    check(lab, rows)
    with pytest.raises(TracerError, match=r"could not be refused by .*, port 80, before trying again: give `first`"):
        lab.clients[0].connect_as("retry", 1, lab.vip(), first=lab.vip())


@pytest.mark.parametrize("reset", [False, True])
def test_a_fixed_port_is_used_again_at_once(lab: Cluster, reset: bool) -> None:
    bind = source(lab, 20_000 + reset)
    before = kernel_counts(lab.client_pods[0].netns, "TcpExt")
    rows = lab.clients[0].connect_as("fixed-port", 5, lab.vip(), 100, 200, bind=bind, reset=reset)
    assert rows["errno"].tolist() == [0] * 5
    assert set(zip(addresses(rows["local"]), rows["local_port"], strict=True)) == {bind}
    theirs = check(lab, rows)
    assert theirs["errno"].tolist() == [errno.ECONNRESET if reset else 0] * 5
    assert (rows["ended"][:-1] < rows["started"][1:]).all()
    left = lab.client_pods[0].netns.run(["ss", "-tanH", "state", "time-wait", "sport", "=", f":{bind[1]}"])
    assert len(left.splitlines()) == (0 if reset else 1)  # the last; its predecessors were taken over
    after = kernel_counts(lab.client_pods[0].netns, "TcpExt")
    assert after["TCPSynRetrans"] == before["TCPSynRetrans"]


@pytest.mark.parametrize("how", ["fastopen", "sendto-fastopen"])
def test_fastopen_sends_its_data_with_the_syn_once_it_has_a_cookie(lab: Cluster, how: str) -> None:
    where = backend(lab, FASTOPEN)
    lab.clients[0].connect_as(how, 1, where)  # fetches the cookie, unless another test has
    before = [kernel_counts(pod.netns, "TcpExt") for pod in (lab.client_pods[0], lab.backend_pods[0])]
    rows = lab.clients[0].connect_as(how, 5, where, 300_000, 200)
    after = [kernel_counts(pod.netns, "TcpExt") for pod in (lab.client_pods[0], lab.backend_pods[0])]
    assert after[0]["TCPFastOpenActive"] - before[0]["TCPFastOpenActive"] == 5
    assert after[1]["TCPFastOpenPassive"] - before[1]["TCPFastOpenPassive"] == 5
    assert rows["errno"].tolist() == [0] * 5
    check(lab, rows)


def test_fastopen_that_the_pod_does_not_allow_is_an_error() -> None:
    with Cluster(backends=1, clients=1) as cluster:
        for namespace in (cluster.client_pods[0].netns, cluster.backend_pods[0].netns):
            namespace.sysctl({"net.ipv4.tcp_fastopen": 0})
        for how in ("fastopen", "sendto-fastopen"):
            with pytest.raises(TracerError, match=r"could not use TCP Fast Open: net\.ipv4\.tcp_fastopen is 0"):
                cluster.clients[0].connect_as(how, 1, cluster.vip())
        with pytest.raises(TracerError, match=r"could not use TCP Fast Open.*set it to 3"):
            cluster.servers[0].listen(cluster.backend_pods[0].addresses, FASTOPEN, fastopen=True)
        assert cluster.clients[0].totals()["attempted"] == 0


@pytest.mark.needs("ipv6")
def test_the_ways_go_over_ipv6_too() -> None:
    with Cluster(backends=1, clients=1, families="dual") as cluster:
        client, vip = cluster.clients[0], cluster.vip(family=6)
        bind, closed = (cluster.client_pods[0].ips[6], 20_000), (cluster.backend_pods[0].ips[6], 9)
        for pod in cluster.client_pods:
            pod.netns.sysctl({"net.ipv4.tcp_fastopen": 1})
        options = {"fixed-port": {"bind": bind}, "retry": {"first": closed}}
        for how in ("nonblocking", "io_uring", "mptcp", "fastopen", "sendto-fastopen", "fixed-port", "retry"):
            rows = client.connect_as(how, 2, vip, 1_000, 2_000, **options.get(how, {}))
            assert np.count_nonzero(rows["errno"] == 0) == 2
            check(cluster, rows)


def completions(process: int) -> int:
    """How many operations the rings of a process have completed (fdinfo of io_uring, kernel 5.1+)."""
    found = 0
    for entry in Path(f"/proc/{process}/fd").iterdir():
        if os.readlink(entry) == "anon_inode:[io_uring]":
            lines = Path(f"/proc/{process}/fdinfo/{entry.name}").read_text().splitlines()
            found = max(found, *(int(line.split()[1]) for line in lines if line.startswith("CqTail:")))
    return found


@pytest.mark.parametrize("in_worker", [False, True])
def test_io_uring_connects_in_either_thread(lab: Cluster, in_worker: bool) -> None:
    client = lab.clients[0]
    before = completions(client.pid)
    rows = client.connect_as("io_uring", 20, lab.vip(), in_worker=in_worker)
    assert rows["errno"].tolist() == [0] * 20
    assert completions(client.pid) - before == 20
    threads = [comm.read_text() for comm in Path(f"/proc/{client.pid}/task").glob("*/comm")]
    assert not in_worker or any(comm.startswith("iou-wrk") for comm in threads)
    check(lab, rows)


def test_a_kernel_without_io_uring_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_uring, "_SETUP", 9_999)  # a system call that no kernel has
    with pytest.raises(UnableError, match=r"io_uring_setup failed .Function not implemented.: the kernel lacks"):
        io_uring.Ring()


def test_a_mapped_connection_is_an_ipv6_socket_with_ipv4_on_the_wire(lab: Cluster) -> None:
    rows = lab.clients[0].connect_as("mapped", 1, lab.vip(), keep=True)
    assert f"[::ffff:{lab.vip()[0]}]:80" in lab.client_pods[0].netns.run(["ss", "-6tnH"])
    assert (*source(lab, rows["local_port"][0]), *lab.vip()) in socket_statistics(lab.client_pods[0].netns)
    check(lab, lab.clients[0].release(rows["number"]))


@pytest.mark.needs("mptcp")
def test_mptcp_is_spoken_where_the_server_speaks_it_and_falls_back_elsewhere(lab: Cluster) -> None:
    namespaces = [lab.client_pods[0].netns, lab.backend_pods[0].netns]
    lab.servers[0].listen(lab.backend_pods[0].addresses, MPTCP, mptcp=True)
    before = [kernel_counts(namespace, "MPTcpExt") for namespace in namespaces]
    rows = lab.clients[0].connect_as("mptcp", 3, backend(lab, MPTCP), 100, 200_000)
    check(lab, rows)
    between = [kernel_counts(namespace, "MPTcpExt") for namespace in namespaces]
    assert between[0]["MPCapableSYNTX"] - before[0]["MPCapableSYNTX"] == 3
    assert between[1]["MPCapableACKRX"] - before[1]["MPCapableACKRX"] == 3
    check(lab, lab.clients[0].connect_as("mptcp", 3, lab.vip()))
    after = kernel_counts(namespaces[0], "MPTcpExt")
    assert after["MPCapableSYNTX"] - between[0]["MPCapableSYNTX"] == 3
    assert after["MPCapableSYNACKRX"] == between[0]["MPCapableSYNACKRX"]


@pytest.mark.needs("mptcp")
def test_mptcp_that_the_pod_does_not_allow_is_an_error() -> None:
    with Cluster(backends=1, clients=1) as cluster:
        cluster.client_pods[0].netns.sysctl({"net.mptcp.enabled": 0})
        with pytest.raises(TracerError, match=r"could not make an MPTCP socket .*net\.mptcp\.enabled is 0"):
            cluster.clients[0].connect_as("mptcp", 1, cluster.vip())


def test_an_aborted_connection_says_whether_it_stood() -> None:
    with Cluster(backends=1, clients=1) as cluster:
        client, server = cluster.clients[0], cluster.servers[0]
        rows = client.connect_as("abort", 5, (SILENT, 80))
        assert rows["errno"].tolist() == [errno.ECANCELED] * 5
        assert not rows["established"].any()
        assert (rows["local_port"] > 0).all()
        assert server.totals()["accepted"] == 0
        rows = client.connect_as("abort", 5, cluster.vip())
        assert rows["errno"].tolist() == [errno.ECANCELED] * 5
        stood = np.count_nonzero(rows["established"])
        wait_until(lambda: server.totals()["accepted"] >= stood, "the server to see what stood")
        (row,) = client.connect_as("abort", 1, backend(cluster, 9))
        assert row["errno"] in (errno.ECANCELED, errno.ECONNREFUSED)


def test_what_is_kept_can_be_used_and_released(lab: Cluster) -> None:
    client = lab.clients[0]
    for how in ("nonblocking", "io_uring", "mptcp", "mapped", "fastopen", "sendto-fastopen", "retry"):
        options = {"first": backend(lab, 9)} if how == "retry" else {}
        rows = client.connect_as(how, 2, lab.vip(), 100, 200, keep=True, **options)
        kept = rows[rows["ended"] == 0]["number"]
        assert len(kept) == 2
        client.exchange(kept, 1_000, 3_000, times=2)
        rows = client.release(kept)
        assert (rows["sent"].tolist(), rows["received"].tolist()) == ([2_100] * 2, [6_200] * 2)
        check(lab, rows)


def test_held_connections_agree_with_the_kernel_at_both_ends(lab: Cluster) -> None:
    client, namespaces = lab.clients[0], (lab.client_pods[0].netns, lab.backend_pods[0].netns)
    bind = source(lab, 30_000)
    held = client.hold(3, lab.vip(), bind=bind)
    assert held["local_port"].tolist() == [30_000, 30_001, 30_002]
    rows = client.exchange(held["number"], 1_000, 50_000, times=4)

    def both() -> list[dict[str, int]]:
        ours = socket_statistics(namespaces[0], "sport = :30001")
        theirs = socket_statistics(namespaces[1], "dport = :30001")
        return [ours[*source(lab, 30_001), *lab.vip()], theirs[*backend(lab, 8080), *source(lab, 30_001)]]

    def quiet() -> bool:
        ours, theirs = both()
        return ours["segs_out"] == theirs["segs_in"] and ours["segs_in"] == theirs["segs_out"] + 1  # the SYN-ACK

    wait_until(quiet, "the last acknowledgement")
    ours, theirs = both()
    assert ours["bytes_acked"] - 1 == ours["bytes_sent"] == theirs["bytes_received"] == rows["sent"][1] == 4_000
    assert theirs["bytes_acked"] == theirs["bytes_sent"] == ours["bytes_received"] == rows["received"][1] == 200_000
    assert max(ours["retrans"], theirs["retrans"]) <= 2  # a busy machine may be late with an answer
    assert ours["rtt"] > 0
    assert len(socket_statistics(namespaces[0])) == 3
    client.release(held["number"])
    lab.settle()
    assert socket_statistics(namespaces[0]) == {}


def test_a_tuple_can_be_taken_once(lab: Cluster) -> None:
    client = lab.clients[0]
    (held,) = client.hold(1, lab.vip(), bind=source(lab, 31_000))
    (row,) = client.connect_as("fixed-port", 1, lab.vip(), bind=source(lab, 31_000))
    assert row["errno"] == errno.EADDRNOTAVAIL
    (row,) = client.connect_as("fixed-port", 1, backend(lab, 8080), bind=source(lab, 31_000))
    assert row["errno"] == 0  # another tuple, as its socket sees it
    client.release([held["number"]])
    with pytest.raises(TracerError, match=r"could not bind to 10\.0\.0\.9, port 1:"):
        client.hold(1, lab.vip(), bind=("10.0.0.9", 1))
    lab.settle()


def test_ways_and_options_that_there_are_not_are_refused(lab: Cluster) -> None:
    client = lab.clients[0]
    for how, options, said in (
        ("smoke", {}, "no way to connect called 'smoke': choose one of nonblocking, "),
        ("abort", {"keep": True}, "abort takes no option keep: it knows none"),
        ("retry", {}, "retry needs the option first"),
        ("fixed-port", {"reset": True}, "fixed-port needs the option bind"),
    ):
        with pytest.raises(UsageError, match=said):
            client.connect_as(how, 1, lab.vip(), **options)
    with pytest.raises(UsageError, match="raise `sends`"):
        client.connect_as("fastopen", 1, lab.vip(), 0, 0)
    with pytest.raises(UsageError, match="can be mapped, not fd00::1"):
        client.connect_as("mapped", 1, ("fd00::1", 80))
    assert set(WAYS) >= {
        "nonblocking",
        "retry",
        "fixed-port",
        "fastopen",
        "sendto-fastopen",
        "io_uring",
        "mptcp",
        "mapped",
        "abort",
    }
