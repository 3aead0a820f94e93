"""Every way in which programs connect: one row per connection, its own backend, and bytes to the last one."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, losses, rows, scaled
from scenarios.truth import account, check, ends, lives

from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.lab.traffic import Ledger, Server, socket_statistics

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft", "ipv6")

SENDS, RECEIVES = 100, 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three backends, two clients, TCP Fast Open allowed to both sides."""
    with Cluster(backends=3, clients=2, families="dual", syn_retries=1) as made:
        for pod in (*made.backend_pods, *made.client_pods):
            pod.netns.sysctl({"net.ipv4.tcp_fastopen": 3})
        yield made


@pytest.fixture(autouse=True)
def forgotten(cluster: Cluster) -> None:
    """conntrack has forgotten what was before."""
    cluster.node.run(["conntrack", "-F"])


def serve(cluster: Cluster, **how: Any) -> None:
    """The backends of "web" listen anew, in a way of their own."""
    for server, pod in zip(cluster.servers, cluster.backend_pods, strict=True):
        server.stop_listening()
        server.listen(pod.addresses, 8080, **how)


@pytest.fixture
def plainly_afterwards(cluster: Cluster) -> Iterator[None]:
    yield
    serve(cluster)


def translated(output: Path, ledger: Ledger, cluster: Cluster, result: str = "ok") -> pd.DataFrame:
    """Exactly the ledger's connections, each in one row, with the backend that accepted it."""
    found = check(rows(output), ledger, cluster.servers)
    for column, value in {
        "rows": 1, "opened": True, "closed": True, "nat": "dnat", "nat_source": "conntrack", "result": result,
    }.items():  # fmt: skip
        assert set(found[column]) == {value}, column
    sums = account(output)
    assert (sums["opened"], sums["unresolved"], sums["ambiguous"], sums["flows"]) == (len(found), 0, 0, 0)
    return found


@pytest.mark.parametrize("probe", ["off", "on"])
def test_ways_that_need_nothing_of_the_server(cluster: Cluster, tmp_path: Path, probe: str) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--connect-probe", probe):
        ledgers = [client.connect_as("nonblocking", 20, cluster.vip(family=family), SENDS, RECEIVES)
                   for family in (4, 6)]  # fmt: skip
        ledgers.append(client.connect_as("mapped", 20, cluster.vip(), SENDS, RECEIVES))
        ledgers += [client.connect_as("io_uring", 20, cluster.vip(), SENDS, RECEIVES, in_worker=in_worker)
                    for in_worker in (False, True)]  # fmt: skip
        cluster.settle()
    found = translated(tmp_path / "data", np.concatenate(ledgers), cluster)
    assert len(found) == 100
    assert (found.connect_latency_us > 0).all()
    # also of what a thread of the kernel's does for the process
    assert set(found.pid) == {client.pid}


@pytest.mark.parametrize("probe", ["off", "on"])
def test_a_second_attempt_on_the_same_socket(cluster: Cluster, tmp_path: Path, probe: str) -> None:
    """Two attempts, two rows: the first one refused, and its port given back."""
    client = cluster.clients[0]
    closed = cluster.backend_pods[0].ips[4], 8099
    with agent(cluster, tmp_path / "data", "--connect-probe", probe):
        ledger = client.connect_as("retry", 10, cluster.vip(), SENDS, RECEIVES, first=closed)
        cluster.settle()
    found = check(rows(tmp_path / "data"), ledger, cluster.servers)
    kinds = found.groupby(["dst_ip", "nat", "result", "bytes_sent"]).size().to_dict()
    assert kinds == {(closed[0], "none", "refused", 0): 10, (cluster.vip()[0], "dnat", "ok", SENDS): 10}
    assert (found.rows == 1).all()
    assert found.conn_id.is_unique
    assert account(tmp_path / "data")["opened"] == 20


@pytest.mark.parametrize("reset", [False, True])
def test_the_same_source_port_again_and_again(cluster: Cluster, tmp_path: Path, reset: bool) -> None:
    """Over a time-wait, conntrack's entry serves the next connection too, without telling; after a RST it does not."""
    client = cluster.clients[0]
    bind = cluster.client_pods[0].ips[4], 20_000
    with agent(cluster, tmp_path / "data"):
        ledger = client.connect_as("fixed-port", 200, cluster.vip(), SENDS, RECEIVES, bind=bind, reset=reset)
        cluster.settle()
    assert not ledger["errno"].any()
    found = lives(rows(tmp_path / "data")).sort_values("started")
    assert len(found) == 200
    assert set(zip(found.src_ip, found.src_port, strict=True)) == {bind}
    assert (set(found.nat), set(found.result)) == ({"dnat"}, {"ok"})
    assert (set(found.bytes_sent), set(found.bytes_received)) == ({SENDS}, {RECEIVES})
    right = [own for _, own in sorted(accepted_from(cluster, bind))][-200:]
    assert list(zip(found.backend_ip, found.backend_port, strict=True)) == right
    sums = account(tmp_path / "data")
    assert (sums["opened"], sums["flows"]) == (200, 0)


def accepted_from(cluster: Cluster, source: tuple[str, int]) -> list[tuple[int, tuple[str, int]]]:
    """When, and by which backend, connections from there were accepted."""
    ledger = np.concatenate([server.ledger() for server in cluster.servers])
    whole = zip(ends(ledger), ledger["started"].tolist(), strict=True)
    return [(started, own) for (own, peer), started in whole if peer == source]


def counter(cluster: Cluster, name: str) -> int:
    """A counter of the first client pod's kernel, since the pod was made."""
    return int(cluster.client_pods[0].netns.run(["nstat", "-asz", name]).split(name)[1].split()[0])


@pytest.mark.parametrize("how", ["fastopen", "sendto-fastopen"])
@pytest.mark.usefixtures("plainly_afterwards")
def test_fast_open(cluster: Cluster, tmp_path: Path, how: str) -> None:
    """Without a cookie, with the right one, and with one of another backend, whose data is then sent again."""
    client = cluster.clients[0]
    serve(cluster, fastopen=True)
    before = counter(cluster, "TcpExtTCPFastOpenActive")
    with agent(cluster, tmp_path / "data", "--connect-probe", "on"):
        ledger = client.connect_as(how, 40, cluster.vip(), 3_000, RECEIVES)
        cluster.settle()
    assert counter(cluster, "TcpExtTCPFastOpenActive") > before, "no data was accepted with a SYN"
    found = translated(tmp_path / "data", ledger, cluster)
    assert len(found) == 40


@pytest.mark.usefixtures("plainly_afterwards")
def test_servers_that_share_a_port(cluster: Cluster, tmp_path: Path) -> None:
    serve(cluster, reuse_port=4)
    with agent(cluster, tmp_path / "data", "--roles", "client,forwarded,server"):
        ledger = cluster.clients[0].connect_many(200, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
    table = rows(tmp_path / "data")
    found = check(table[table.role == "client"], ledger, cluster.servers)
    assert (len(found), set(found.nat)) == (200, {"dnat"})
    served = table[table.role == "server"]
    assert len(served) == len(table) - 200 == 200
    assert sorted(zip(served.src_port, served.backend_ip, strict=True)) == sorted(
        zip(found.src_port, found.backend_ip, strict=True)
    )
    assert (set(served.bytes_sent), set(served.bytes_received)) == ({SENDS}, {RECEIVES})
    sums = account(tmp_path / "data")
    assert (sums["opened"], sums["accepted"]) == (200, 200)


def settle_subflows(cluster: Cluster) -> None:
    """`settle`, and until the client's kernel has closed every subflow: MPTCP does so after it closed its parent."""
    cluster.settle()
    wait_until(lambda: not socket_statistics(cluster.client_pods[0].netns), "the subflows to close")


@pytest.mark.needs("mptcp")
@pytest.mark.parametrize("mptcp", [False, True])
@pytest.mark.usefixtures("plainly_afterwards")
def test_mptcp(cluster: Cluster, tmp_path: Path, mptcp: bool) -> None:
    """The subflow has the row; its parent, which fires too, has none. A server without it makes plain TCP of it."""
    client = cluster.clients[0]
    serve(cluster, mptcp=mptcp)
    before = counter(cluster, "MPTcpExtMPCapableSYNACKRX")
    with agent(cluster, tmp_path / "data", "--connect-probe", "on"):
        ledger = client.connect_as("mptcp", 20, cluster.vip(), SENDS, RECEIVES)
        settle_subflows(cluster)
    assert counter(cluster, "MPTcpExtMPCapableSYNACKRX") - before == (20 if mptcp else 0)
    found = translated(tmp_path / "data", ledger, cluster)
    assert (len(found), set(found.protocol)) == (20, {"tcp"})


@pytest.mark.needs("mptcp")
@pytest.mark.usefixtures("plainly_afterwards")
def test_bytes_of_mptcp_are_those_of_the_subflow(cluster: Cluster, tmp_path: Path) -> None:
    """MPTCP may send data again on the same subflow, to which it is new (MPTcpExtDuplicateData): never less, then."""
    serve(cluster, mptcp=True)
    with agent(cluster, tmp_path / "data"):
        ledger = cluster.clients[0].connect_as("mptcp", 20, cluster.vip(), 5_000, 70_000)
        settle_subflows(cluster)
    assert not ledger["errno"].any()
    found = lives(rows(tmp_path / "data"))
    assert sorted(found.src_port) == sorted(ledger["local_port"])
    assert (set(found.nat), set(found.result)) == ({"dnat"}, {"ok"})
    assert (found.bytes_sent >= 5_000).all()
    assert (found.bytes_received >= 70_000).all()
    assert account(tmp_path / "data")["opened"] == 20


def test_socket_pointers_that_are_reused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """Of thousands, the kernel may not show the end of some: those are counted, none is mixed up."""
    with agent(cluster, tmp_path / "data"):
        for client in cluster.clients:
            client.begin_connects(scaled(2_000), cluster.vip(), 0, 0)
        ledger = np.concatenate([client.finish_connects() for client in cluster.clients])
        cluster.settle()
    table, report = rows(tmp_path / "data"), coverage(tmp_path / "data")
    # One of which the kernel showed nothing but the beginning is counted as lost, and may have conntrack's row.
    table = table[table.role == "client"]
    seen = set(zip(table.src_ip, table.src_port, strict=True))
    shown = np.array([own in seen for own, _ in ends(ledger)])
    found = check(table, ledger[shown], cluster.servers)
    assert len(found) == len(table)
    assert len(found) + report.lost_end.sum() == len(ledger) == scaled(4_000)
    assert losses(tmp_path / "data") == report.lost_end.sum()
    assert (set(found.nat), set(found.result)) == ({"dnat"}, {"ok"})
    assert (found.bytes_sent + found.bytes_received == 0).all()
    assert report.opened.sum() + report.late_begin.sum() == scaled(4_000)
    assert report.flows.sum() <= report.lost_end.sum()


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """Two backends and two clients; the second client's pod has the first one's address too."""
    with Cluster(backends=2, clients=2, syn_retries=1) as made:
        # which it shall not answer for
        made.client_pods[1].netns.sysctl({"net.ipv4.conf.all.arp_ignore": 1})
        made.client_pods[1].netns.run(["ip", "addr", "add", f"{made.client_pods[0].ips[4]}/32", "dev", "lo"])
        yield made


def by_pod(table: pd.DataFrame, cluster: Cluster) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the first and of the second client pod."""
    first, second = (table[table.netns == pod.netns.inode] for pod in cluster.client_pods)
    assert len(first) + len(second) == len(table)
    return first, second


def test_one_tuple_from_two_namespaces_through_one_node(pair: Cluster, tmp_path: Path) -> None:
    """To conntrack both are one connection; the second client never gets an answer."""
    source = pair.client_pods[0].ips[4], 30_000
    first, second = pair.clients
    with agent(pair, tmp_path / "data"):
        held = first.hold(1, pair.vip(), bind=source)
        first.exchange(held["number"], SENDS, RECEIVES)
        assert second.hold(1, pair.vip(), bind=source)["errno"][0]
        first.exchange(held["number"], SENDS, RECEIVES)
        held = first.release(held["number"])
        pair.settle()
    ours, others = by_pod(rows(tmp_path / "data"), pair)
    assert set(check(ours, held, pair.servers).nat) == {"dnat"}
    (other,) = others.itertuples()
    assert (other.src_ip, other.src_port, other.dst_ip) == (*source, pair.vip()[0])
    assert (other.result, other.nat, pd.isna(other.backend_ip)) == ("timeout", "unknown", True)
    assert account(tmp_path / "data")["ambiguous"] > 0


@pytest.mark.parametrize("opens_first", [0, 1])
@pytest.mark.parametrize("closes_first", [0, 1])
def test_one_tuple_open_in_two_namespaces(pair: Cluster, tmp_path: Path, opens_first: int, closes_first: int) -> None:
    """Both stand, and only the first client's passes the node: the second one's must not get its backend."""
    source = pair.client_pods[0].ips[4], 30_000
    address, port = pair.vip()
    pod = pair.client_pods[1].netns
    pod.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"])
    with Server(pod) as server, agent(pair, tmp_path / "data"):
        server.listen([address], port)
        held = {
            number: pair.clients[number].hold(1, pair.vip(), bind=source)["number"]
            for number in (opens_first, 1 - opens_first)
        }
        for number, numbers in held.items():
            pair.clients[number].exchange(numbers, SENDS, RECEIVES)
        # by RST: such a socket is gone at once
        ledgers = {
            number: pair.clients[number].release(held[number], reset=True)
            for number in (closes_first, 1 - closes_first)
        }
        wait_until(lambda: server.totals()["open"] == 0, "the second pod's server to see the end")
        wait_until(lambda: not any(each.totals()["open"] for each in pair.servers), "the backend to see the end")
    ours, others = by_pod(rows(tmp_path / "data"), pair)
    (other,) = others.itertuples()
    assert (other.nat, pd.isna(other.backend_ip)) == ("unknown", True)
    (our,) = ours.itertuples()
    if our.nat == "unknown":
        assert pd.isna(our.backend_ip)
    else:
        check(ours, ledgers[0], pair.servers)
    for row in (our, other):
        assert (row.bytes_sent, row.bytes_received, row.result) == (SENDS, RECEIVES, "ok")
    assert account(tmp_path / "data")["ambiguous"] > 0


@pytest.fixture
def lossy(cluster: Cluster) -> Iterator[None]:
    """The node drops every seventh full segment between clients and backends, in both directions."""
    rules = (
        "add table inet lossy\nadd chain inet lossy forward { type filter hook forward priority filter ; }\n"
        "add rule inet lossy forward tcp dport 8080 meta length > 200 numgen inc mod 7 == 3 drop\n"
        "add rule inet lossy forward tcp sport 8080 meta length > 200 numgen inc mod 7 == 5 drop\n"
    )
    cluster.node.run(["nft", "-f", "-"], rules)
    yield
    cluster.node.run(["nft", "delete", "table", "inet", "lossy"])


def at_rest(cluster: Cluster) -> dict[tuple[str, int, str, int], dict[str, int]]:
    """What the kernel counts of the first client's sockets, once no late acknowledgement changes it any more."""
    seen = []

    def resting() -> bool:
        time.sleep(0.25)  # TCP_DELACK_MAX is 200 ms
        seen.append(socket_statistics(cluster.client_pods[0].netns, "dport", "=", ":80"))
        return seen[-2:-1] == seen[-1:]

    wait_until(resting, "the sockets to come to rest")
    return seen[-1]


@pytest.mark.parametrize("open_at_the_end", [True, False])
@pytest.mark.usefixtures("lossy")
def test_a_lossy_path(cluster: Cluster, tmp_path: Path, open_at_the_end: bool) -> None:
    """Retransmits and round trip are the socket's own; what is sent again is counted once."""
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--interval", "1s") as running:
        held = client.hold(4, cluster.vip())["number"]
        ledger = client.exchange(held, 20_000, 50_000, times=3)
        truth = at_rest(cluster)
        if not open_at_the_end:
            ledger = client.release(held)
            cluster.settle()
        running.stop()
    if open_at_the_end:
        client.release(held)
    assert not ledger["errno"].any()
    assert set(ledger["sent"]) == {60_000}
    found = lives(rows(tmp_path / "data"))
    assert len(found) == 4
    if open_at_the_end:
        assert found.result.isna().all()
        assert not found.closed.any()
    else:
        check(rows(tmp_path / "data"), ledger, cluster.servers)
    assert set(found.nat) == {"dnat"}
    assert (set(found.bytes_sent), set(found.bytes_received)) == ({60_000}, {150_000})
    assert found.retransmits.sum() > 0
    for life in found.itertuples():
        known = truth[life.src_ip, life.src_port, life.dst_ip, life.dst_port]
        # A busy machine may be late with the answer to the FIN, which is sent again then.
        assert life.retransmits - known["retrans"] in ((0,) if open_at_the_end else (0, 1))
        if open_at_the_end:
            assert life.rtt_us == known["rtt"]
    account(tmp_path / "data")
