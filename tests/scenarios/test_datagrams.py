"""UDP: a row per conntrack entry, with the process of connected sockets, and exactly the datagrams of both ledgers."""

import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, rows, scaled, until
from scenarios.truth import End, accepted, check, clean, ends, lives

from tracer.kernel import capture as capture_module
from tracer.kernel.capture import Capture, Options
from tracer.lab import topology, wire
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack, Pod
from tracer.lab.traffic import Client, Ledger, Server
from tracer.record import Role

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft", "ipv6")

SENDS, RECEIVES = 60, 250
SHORT = Conntrack(accounting=True, timeouts=Conntrack.SHORT)
COUNTED = ["bytes_sent", "bytes_received", "packets_sent", "packets_received"]


def with_dns(cluster: Cluster) -> None:
    cluster.add_service("dns", port=53, target_port=5353, protocol="udp", port_name="dns", node_port=30053)
    return cluster


@pytest.fixture(scope="module")
def world() -> Iterator[Cluster]:
    """One node; entries go seconds after their last packet; the outside serves on port 53, and pods on 5354 too."""
    with Cluster(backends=3, clients=2, families="dual", outside=True, hosts=1, conntrack=SHORT) as cluster:
        cluster.outside_server.listen(topology.outside_addresses((4, 6)).values(), 53, "udp")
        for server, pod in zip(cluster.servers, cluster.backend_pods, strict=True):
            server.listen(pod.addresses, 5354, "udp")
        with_dns(cluster)
        # each kind of traffic has a port of its own: two ways from one port to one socket may clash
        cluster.add_service("large", port=54, target_port=5355, protocol="udp")
        cluster.add_service("odd", port=55, target_port=5356, protocol="udp")
        yield cluster


@pytest.fixture
def emptied(world: Cluster) -> Cluster:
    """The same without an entry from the test before, which a port that comes again would continue."""
    world.node.run(["conntrack", "-F"])
    return world


@contextmanager
def lasting(cluster: Cluster, *timeouts: str) -> Iterator[None]:
    """Entries outlast an agent's start or stop, which may take longer than their two seconds."""
    names = [f"net.netfilter.nf_conntrack_{timeout}" for timeout in timeouts or ("udp_timeout",)]
    before = {name: int(cluster.node.run(["sysctl", "-n", name])) for name in names}
    cluster.node.sysctl(dict.fromkeys(names, 60))
    try:
        yield
    finally:
        cluster.node.sysctl(before)


class Made(NamedTuple):
    """Flows that one client made from one address to another; the ledger is None for a socket of this process."""

    client: Client | None
    source: str
    where: End
    ledger: Ledger | None
    port: int = 0


class Record(NamedTuple):
    """One run of the agent: the cluster, what was made in it, by its name, and the rows of it."""

    cluster: Cluster
    made: dict[str, list[Made]]
    table: pd.DataFrame
    counted: pd.Series
    probed: bool

    def check(self, made: Made, role: str = "client", **values: object) -> pd.DataFrame:
        """That these are exactly the rows of what was made, and that all of them have these values."""
        assert made.ledger is not None
        assert not made.ledger["errno"].any()
        servers = [*self.cluster.servers, self.cluster.outside_server]
        found = check_flows(of(self.table, made.where, made.source), made.ledger, servers, role)
        process = {"pid": made.client.pid, "comm": "lab-client"} if made.client else {"pid": None, "comm": None}
        assert_all_are(found, nat_source="conntrack", closed=True, rows=1, **(process | values))
        return found


@pytest.fixture(scope="module")
def record(world: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Everything short that the tests below look at."""
    output = tmp_path_factory.mktemp("datagrams") / "data"
    with agent(world, output):
        made = make(world)
        await_the_end(world)
    return Record(world, made, rows(output), clean(output), probed(output))


def make(cluster: Cluster) -> dict[str, list[Made]]:
    """All the flows of a record."""
    (one, other), (pod, second), node = cluster.clients, cluster.client_pods, cluster.nodes[0]
    host, outside, away = cluster.host_clients[0], cluster.outside_client, topology.outside_addresses((4, 6))
    found: dict[str, list[Made]] = {}

    def send(name: str, client: Client, source: str, where: End, flows: int = 10, times: int = 3,
             sends: int = SENDS, receives: int = RECEIVES, **how: bool) -> None:  # fmt: skip
        ledger = client.datagrams(flows, where, sends, receives, times=times, **how)
        found.setdefault(name, []).append(Made(client if how.get("connected", True) else None, source, where, ledger))

    for family in (4, 6):
        vip, direct = cluster.vip("dns", family), (cluster.backend_pods[0].ips[family], 5354)
        send("connected", one, pod.ips[family], vip)
        send("unconnected", other, second.ips[family], vip, connected=False)
        send("host", host, node.addresses[family], vip)
        send("from outside", outside, away[family], cluster.node_port("dns", 0, family))
        send("to outside", one, pod.ips[family], (away[family], 53))
        send("direct", one, pod.ips[family], direct)
        # conntrack has entries of these too, but no local socket claims them and nobody rewrote their destination
        send("transit", other, second.ips[family], (away[family], 53), connected=False)
        send("transit", other, second.ips[family], direct, connected=False)
        send("large", one, pod.ips[family], cluster.vip("large", family), 5, 2, 40_000, 20_000)
    for _ in range(4):
        ledger = other.datagrams(2, cluster.vip("odd"), SENDS, RECEIVES, source_port=5_000)
    found["same port"] = [Made(other, second.ips[4], cluster.vip("odd"), ledger)]
    odd = cluster.vip("odd")
    (mapped,) = dial_from(pod, socket.AF_INET6, (f"::ffff:{odd[0]}", odd[1]))
    found["mapped"] = [Made(None, pod.ips[4], odd, None, mapped)]
    wheres = cluster.vip("large"), cluster.node_port("dns")
    ports = dial_from(second, socket.AF_INET, *wheres)
    found["one after the other"] = [Made(None, second.ips[4], where, None, number)
                                    for where, number in zip(wheres, ports, strict=True)]  # fmt: skip
    return found


def dial_from(pod: Pod, family: socket.AddressFamily, *where: End) -> list[int]:
    """Connects one UDP socket, in this process, to each address in turn and exchanges; its own port at each."""

    def inside() -> list[int]:
        made = []
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            for address in where:
                sock.connect(address)
                made.append(int(sock.getsockname()[1]))
                sock.send(wire.HEADER.pack(SENDS - wire.HEADER.size, RECEIVES) + bytes(SENDS - wire.HEADER.size))
                assert len(sock.recv(65536)) == RECEIVES
        return made

    return pod.netns.call(inside)


def await_the_end(cluster: Cluster) -> None:
    """Looks at conntrack's table, which drops what has expired, until no UDP entry is left."""
    until(
        lambda: not any(cluster.node.run(["conntrack", "-L", "-p", "udp", "-f", f"ipv{f}"]) for f in cluster.families),
        "the UDP entries to go",
    )


def check_flows(table: pd.DataFrame, ledger: Ledger, servers: Sequence[Server], role: str = "client") -> pd.DataFrame:
    """`check`, of one client; and each flow has the bytes and datagrams that were counted, and no result."""
    found = check(table, ledger, servers, role=role)
    names = ("sent", "received", "datagrams_sent", "datagrams_received")
    counts = {int(row["local_port"]): [int(row[name]) for name in names] for row in ledger}
    for life in found.itertuples():
        assert [getattr(life, name) for name in COUNTED] == counts[life.src_port]
        headers = 28 if "." in life.src_ip else 48  # of UDP, and IPv4 or IPv6
        assert life.ip_bytes_sent == life.bytes_sent + headers * life.packets_sent
        assert life.ip_bytes_received == life.bytes_received + headers * life.packets_received
    assert_all_are(found, protocol="udp", result=None, connect_latency_us=None, rtt_us=None, retransmits=None,
                   opened=True)  # fmt: skip
    assert found.ct_id.is_unique
    return found


def assert_all_are(found: pd.DataFrame, **values: object) -> None:
    """Each of these columns has this value in every row; None is null."""
    for column, value in values.items():
        seen = set(found[column].astype(object).where(found[column].notna(), None))
        assert seen == {value}, column


def probed(output: Path) -> bool:
    """Whether the connect probe ran, because another test of this kernel rewrites in connect(): it knows more."""
    return "sys_enter_connect" in coverage(output).programs.iloc[0]


def of(table: pd.DataFrame, where: End, source: str) -> pd.DataFrame:
    """The rows of what was sent from that address to this one."""
    return table[(table.dst_ip == where[0]) & (table.dst_port == where[1]) & (table.src_ip == source)]


def test_a_connected_socket_has_its_process(record: Record) -> None:
    pod = record.cluster.client_pods[0]
    for made in record.made["connected"]:
        found = record.check(made, nat="dnat", snat_ip=None, netns=pod.netns.inode, ct_zone=0, packets_sent=3)
        assert found.cgroup_id.notna().all()


def test_an_unconnected_socket_is_nobodys(record: Record) -> None:
    """It may send to many; conntrack tells of its flows."""
    for made in record.made["unconnected"]:
        record.check(made, "forwarded", nat="dnat", snat_ip=None, cgroup_id=None, netns=None)


def test_what_is_masqueraded_or_not_rewritten(record: Record) -> None:
    """On the way in, on the way out, or for the host; and a pod dialled directly."""
    node = record.cluster.nodes[0]
    for made in record.made["host"]:
        record.check(made, nat="dnat+snat", netns=node.netns.inode)
    for made in record.made["from outside"]:
        record.check(made._replace(client=None), "forwarded", nat="dnat+snat", netns=None)
    for made, family in zip(record.made["to outside"], (4, 6), strict=True):
        record.check(made, nat="snat", snat_ip=node.addresses[family], backend_ip=made.where[0])
    for made in record.made["direct"]:
        record.check(made, nat="none", snat_ip=None, backend_ip=made.where[0], backend_port=made.where[1])


def test_datagrams_larger_than_a_packet(record: Record) -> None:
    """conntrack counts them as they were sent, having put the fragments together."""
    for made in record.made["large"]:
        record.check(made, nat="dnat", bytes_sent=80_000, bytes_received=40_000, packets_sent=2, packets_received=2)


def test_one_entry_is_one_row_however_many_sockets_it_served(record: Record) -> None:
    """A port that comes again continues its entry, which has the sum of what they sent."""
    (made,) = record.made["same port"]
    found = check(of(record.table, made.where, made.source), made.ledger, record.cluster.servers)
    assert sorted(found.src_port) == [5_000, 5_001]
    assert_all_are(found, pid=made.client.pid, bytes_sent=4 * SENDS, bytes_received=4 * RECEIVES, packets_sent=4,
                   packets_received=4, rows=1, opened=True, closed=True)  # fmt: skip


def test_ipv4_by_an_ipv6_socket_is_shown_as_ipv4(record: Record) -> None:
    (made,) = record.made["mapped"]
    (row,) = of(record.table, made.where, made.source).itertuples()
    assert ("udp", (row.src_ip, row.src_port), (row.backend_ip, row.backend_port)) in accepted(record.cluster.servers)
    assert (row.src_port, row.role, row.nat, row.pid) == (made.port, "client", "dnat", os.getpid())
    assert row.netns == record.cluster.client_pods[0].netns.inode
    assert [getattr(row, name) for name in COUNTED] == [SENDS, RECEIVES, 1, 1]


def test_a_socket_that_connects_to_one_after_the_other(record: Record) -> None:
    """It is known for the last; the flow before is as an unconnected socket's, unless the connect probe saw it."""
    first, last = ((made, *of(record.table, made.where, made.source).itertuples())
                   for made in record.made["one after the other"])  # fmt: skip
    for (made, row), known, nat in ((first, record.probed, "dnat"), (last, True, "dnat+snat")):
        assert (row.src_port, row.role, row.nat) == (made.port, "client" if known else "forwarded", nat)
        assert row.pid == os.getpid() if known else np.isnan(row.pid)


def test_a_record_has_nothing_else(record: Record) -> None:
    """Neither the unconnected flows that nobody rewrote: those are counted."""
    flows = {name: sum(1 if made.ledger is None else len(made.ledger) for made in several)
             for name, several in record.made.items()}  # fmt: skip
    assert record.counted.transit == flows.pop("transit") == 40
    assert len(record.table) == record.counted.flows == sum(flows.values())


def test_five_thousand_flows_are_five_thousand_rows(tmp_path: Path) -> None:
    with Cluster(backends=3, clients=2, conntrack=SHORT) as cluster:
        with_dns(cluster)
        with agent(cluster, tmp_path / "data"):
            with ThreadPoolExecutor(2) as both:
                calls = [both.submit(client.datagrams, scaled(2500), cluster.vip("dns"), SENDS, RECEIVES)
                         for client in cluster.clients]  # fmt: skip
            await_the_end(cluster)
        table = rows(tmp_path / "data")
        assert len(table) == clean(tmp_path / "data").flows == scaled(5000)
        assert table.conn_id.is_unique
        assert_all_are(table, role="client", protocol="udp", nat="dnat", snat_ip=None, opened=True, closed=True,
                       dst_ip=cluster.vip("dns")[0], dst_port=53, result=None)  # fmt: skip
        for client, pod in zip(cluster.clients, cluster.client_pods, strict=True):
            assert_all_are(table[table.pid == client.pid], src_ip=pod.ips[4], netns=pod.netns.inode)
        # what the clients counted, and what the servers counted: neither more flows nor other counts
        names = ["sent", "received", "datagrams_sent", "datagrams_received"]
        dialled = [(int(row["pid"]), int(row["local_port"]), *(int(row[name]) for name in names))
                   for call in calls for row in call.result()]  # fmt: skip
        assert sorted(table[["pid", "src_port", *COUNTED]].itertuples(index=False, name=None)) == sorted(dialled)
        names = ["received", "sent", "datagrams_received", "datagrams_sent"]
        served = [(*peer, *own, *(int(row[name]) for name in names))
                  for ledger in (server.ledger() for server in cluster.servers)
                  for (own, peer), row in zip(ends(ledger), ledger, strict=True)]  # fmt: skip
        columns = ["src_ip", "src_port", "backend_ip", "backend_port", *COUNTED]
        assert sorted(table[columns].itertuples(index=False, name=None)) == sorted(served)


def test_without_accounting_the_counters_are_null(tmp_path: Path) -> None:
    off = Conntrack(accounting=False, timeouts=Conntrack.SHORT)
    with Cluster(backends=2, clients=2, conntrack=off) as cluster:
        with_dns(cluster)
        connected, plain = cluster.clients
        with agent(cluster, tmp_path / "data", "--interval", "500ms"):
            ledger = connected.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES)
            unconnected = plain.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES, connected=False)
            await_the_end(cluster)
        table = rows(tmp_path / "data")
        assert table.conn_id.nunique() == 20
        assert_all_are(table, **dict.fromkeys([*COUNTED, "ip_bytes_sent", "ip_bytes_received"]))
        mine, others = table[table.role == "client"], table[table.role == "forwarded"]
        check(mine, ledger, cluster.servers)
        check(others, unconnected, cluster.servers, role="forwarded")
        clean(tmp_path / "data")


class Watched(NamedTuple):
    """A run of seconds with an interval of one: ledgers of what went on all the time, and of what paused."""

    cluster: Cluster
    connected: Ledger
    unconnected: Ledger
    paused: Ledger
    table: pd.DataFrame
    probed: bool


@pytest.fixture(scope="module")
def watched(world: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Long flows by IPv6, and by IPv4 flows whose sockets stay open past their entries' end and go on later."""
    world.node.run(["conntrack", "-F"])
    (one, other), vip = world.clients, world.vip("dns", 6)
    output = tmp_path_factory.mktemp("watched") / "data"
    with agent(world, output, "--interval", "1s", "--rotate", "1s"):
        paused = one.datagrams(3, world.vip("dns"), SENDS, RECEIVES, keep=True)["number"]
        with lasting(world, "udp_timeout", "udp_timeout_stream"):  # however slowly the traffic goes on, none ends
            connected = one.datagrams(3, vip, SENDS, RECEIVES, keep=True)["number"]
            plain = other.datagrams(3, vip, SENDS, RECEIVES, connected=False, keep=True)["number"]

            def go_on() -> bool:
                """A third of a second's traffic; whether an interim row of each of the six is there."""
                one.exchange(connected, SENDS, RECEIVES)
                other.exchange(plain, SENDS, RECEIVES)
                one.connect_many(3, world.vip(), SENDS, RECEIVES, rate=6)
                if not list(output.glob("connections/**/*.parquet")):
                    return False
                told = rows(output)
                return told[told.dst_ip == vip[0]].conn_id.nunique() == 6

            until(go_on, "interim rows of all flows")
        go_on()
        ledgers = one.release(connected), other.release(plain)
        await_the_end(world)
        one.exchange(paused, SENDS * 2, RECEIVES * 2, times=2)
        later = one.release(paused)
        await_the_end(world)
    clean(output)
    table = rows(output)
    return Watched(world, *ledgers, later, table[table.protocol == "udp"], probed(output))


def test_long_flows_have_rows_whose_sums_are_right(watched: Watched) -> None:
    (one, _), pods = watched.cluster.clients, watched.cluster.client_pods
    connected, forwarded = (watched.table[watched.table.src_ip == pod.ips[6]] for pod in pods)
    found = check_flows(connected, watched.connected, watched.cluster.servers)
    assert_all_are(found, nat="dnat", pid=one.pid, closed=True)
    found = check_flows(forwarded, watched.unconnected, watched.cluster.servers, "forwarded")
    assert_all_are(found, nat="dnat", pid=None, closed=True)
    for _, life in pd.concat((connected, forwarded)).sort_values("ts").groupby("conn_id"):
        assert len(life) >= 2
        assert life.started.nunique() == 1
        # increments: what one row tells no other does
        assert (life.packets_sent < life.packets_sent.sum()).all()


def test_a_socket_that_stays_open(watched: Watched) -> None:
    """Past its entry's end: a client's flow without a process. What it sends later is another flow, with a process."""
    client, pod = watched.cluster.clients[0], watched.cluster.client_pods[0]
    found = lives(watched.table[watched.table.src_ip == pod.ips[4]]).sort_values("started")
    assert len(found) == 6
    log = accepted(watched.cluster.servers)
    assert {("udp", (row.src_ip, row.src_port), (row.backend_ip, row.backend_port)) for row in found.itertuples()} < log
    assert_all_are(found, role="client", nat="dnat", netns=pod.netns.inode, opened=True, closed=True)
    early, late = found.iloc[:3], found.iloc[3:]
    for part in (early, late):
        assert sorted(part.src_port) == sorted(watched.paused["local_port"])
    process = {"pid": client.pid, "comm": "lab-client"} if watched.probed else {"pid": None, "comm": None}
    assert_all_are(early, **process, bytes_sent=SENDS, bytes_received=RECEIVES, packets_sent=1)
    assert_all_are(late, pid=client.pid, comm="lab-client", bytes_sent=4 * SENDS, bytes_received=4 * RECEIVES,
                   packets_sent=2, packets_received=2)  # fmt: skip


def test_a_graceful_stop_has_a_row_for_every_flow(emptied: Cluster, tmp_path: Path) -> None:
    """Their entries stand, so nothing is closed; a socket still open has no process."""
    cluster, (one, other) = emptied, emptied.clients
    with lasting(cluster), agent(cluster, tmp_path / "data"):
        closed = one.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES)
        held = one.datagrams(10, cluster.vip("dns", 6), SENDS, RECEIVES, keep=True)
        plain = other.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES, connected=False)
    one.release(held["number"])
    table = rows(tmp_path / "data")
    assert len(table) == 30
    assert_all_are(table, closed=False, opened=True, nat="dnat")
    first, second = cluster.client_pods
    found = check_flows(of(table, cluster.vip("dns"), first.ips[4]), closed, cluster.servers)
    assert_all_are(found, pid=one.pid)
    found = check_flows(of(table, cluster.vip("dns", 6), first.ips[6]), held, cluster.servers)
    assert_all_are(found, pid=one.pid if probed(tmp_path / "data") else None, netns=first.netns.inode)
    check_flows(of(table, cluster.vip("dns"), second.ips[4]), plain, cluster.servers, "forwarded")
    assert clean(tmp_path / "data").flows == 0


@pytest.mark.parametrize("network", ["unfiltered", "routed"])
def test_datagrams_between_pods(tmp_path: Path, network: str) -> None:
    """Where conntrack sees them there are rows of connected sockets; past conntrack there are none, by design."""
    with Cluster(backends=2, clients=1, network=network, conntrack=SHORT) as cluster:
        with_dns(cluster)
        client, pod, direct = cluster.clients[0], cluster.client_pods[0], (cluster.backend_pods[0].ips[4], 5354)
        cluster.servers[0].listen([direct[0]], direct[1], "udp")
        with agent(cluster, tmp_path / "data"):
            near = client.datagrams(10, direct, SENDS, RECEIVES)
            virtual = client.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES)
            await_the_end(cluster)
        table = rows(tmp_path / "data")
        found = check_flows(of(table, cluster.vip("dns"), pod.ips[4]), virtual, cluster.servers)
        assert_all_are(found, nat="dnat+snat" if network == "unfiltered" else "dnat", pid=client.pid)
        rest = of(table, direct, pod.ips[4])
        if network == "routed":
            assert_all_are(check_flows(rest, near, cluster.servers), nat="none", nat_source="conntrack")
        assert len(rest) == (10 if network == "routed" else 0)
        assert len(table) == clean(tmp_path / "data").flows == 10 + len(rest)


def test_datagrams_that_nobody_answers(tmp_path: Path) -> None:
    """A closed port (an ICMP error is no answer), and a server that is asked for none: where they went is known."""
    with Cluster(backends=2, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        client = cluster.clients[0]
        with agent(cluster, tmp_path / "data"):
            # One by one: what is sent at once may race (below).
            held = client.datagrams(6, cluster.vip("dns"), SENDS, 0, source_port=9000, keep=True)["number"]
            silent = client.exchange(held, SENDS, 0, times=2)
            client.release(held)
            for server in cluster.servers:
                server.stop_listening()
            refused = client.datagrams(6, cluster.vip("dns"), SENDS, RECEIVES, connected=False, timeout=0.05)
            await_the_end(cluster)
        table = rows(tmp_path / "data")
        assert len(table) == clean(tmp_path / "data").flows == 12
        backends = {(backend.ips[4], 5353) for backend in cluster.backend_pods}
        assert set(zip(table.backend_ip, table.backend_port, strict=True)) <= backends
        assert_all_are(table, nat="dnat", bytes_received=0, packets_received=0, closed=True, result=None)
        check_flows(table[table.role == "client"], silent, cluster.servers)
        check_flows(table[table.role == "forwarded"], refused, cluster.servers, "forwarded")


def send_and_close(where: End, count: int) -> list[int]:
    """Datagrams of 1,400 bytes, each from a connected socket of its own, which is closed at once; their ports."""
    found = []
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(where)
            found.append(int(sock.getsockname()[1]))
            sock.send(wire.HEADER.pack(1400 - wire.HEADER.size, 0) + bytes(1400 - wire.HEADER.size))
    return found


def queue(pod: Pod, rate: str) -> None:
    """All but the first of some large packets waits."""
    token_bucket = ["tbf", "rate", rate, "burst", "1600", "limit", "100000"]
    pod.netns.run(["tc", "qdisc", "add", "dev", "eth0", "root", *token_bucket])


def test_sockets_that_are_closed_before_conntrack_sees_their_datagrams_own_their_flows(tmp_path: Path) -> None:
    """As on loaded nodes, where softirqs wait: here a queue lets one of them out every 200 ms."""
    with Cluster(backends=2, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        pod, vip = cluster.client_pods[0], cluster.vip("dns")
        queue(pod, "64kbit")
        with agent(cluster, tmp_path / "data"):
            sent = pod.netns.call(lambda: send_and_close(vip, 5))
            until(lambda: len(accepted(cluster.servers)) == 5, "the datagrams to come")
            await_the_end(cluster)
        table = rows(tmp_path / "data")
        assert len(table) == clean(tmp_path / "data").flows == 5
        assert sorted(table.src_port) == sorted(sent)
        assert_all_are(table, role="client", nat="dnat", pid=os.getpid(), packets_sent=1, closed=True)


def test_owners_whose_datagrams_never_come_to_conntrack_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(backends=1, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        pod, vip = cluster.client_pods[0], cluster.vip("dns")
        queue(pod, "1kbit")
        with Capture(Options(node_netns=cluster.node.path, only_netns=(pod.netns.path,))) as capture:
            pod.netns.call(lambda: send_and_close(vip, 5))
            pod.netns.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
            assert capture.maps.count("owners") == 5
            await_the_end(cluster)
            for left in (4, 4, 0, 0):  # that of the one that came went with its entry
                if not left:
                    monkeypatch.setattr(capture_module, "_QUEUED_NS", 0)
                capture.reconcile()
                assert capture.maps.count("owners") == left
                assert capture.needs_reconciliation == (left > 0)


def test_an_owner_whose_datagrams_never_came_is_not_the_next_ones(tmp_path: Path) -> None:
    with Cluster(backends=1, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        pod, (ip, port) = cluster.client_pods[0], cluster.vip("dns")
        queue(pod, "1kbit")
        with agent(cluster, tmp_path / "data"):
            late = pod.netns.call(lambda: send_and_close((ip, port), 5))[-1]
            pod.netns.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
            sends = (f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', {late})); "
                     f"s.connect(('{ip}', {port})); s.send(bytes(20))")  # fmt: skip
            pod.netns.run([sys.executable, "-c", sends])
            await_the_end(cluster)
        (row,) = rows(tmp_path / "data").query("src_port == @late").itertuples()
        assert (row.role, row.nat) == ("client", "dnat")
        assert row.pid not in (0, os.getpid())
        assert row.comm.startswith("python")


def test_late_datagrams_without_a_virtual_address_have_rows_when_the_tracer_stops() -> None:
    with Cluster(backends=1, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        pod = cluster.client_pods[0]
        queue(pod, "64kbit")
        with Capture(Options(node_netns=cluster.node.path, only_netns=(pod.netns.path,))) as capture:
            sent = pod.netns.call(lambda: send_and_close((cluster.backend_pods[0].ips[4], 5353), 4))
            until(lambda: len(accepted(cluster.servers)) == 4, "the datagrams to come")
            records: list[np.ndarray] = []
            capture.stop(lambda: records.append(capture.drain()))
            rows = np.concatenate(records)
        assert sorted(rows["tuple"]["src_port"]) == sorted(sent)
        assert set(rows["role"]) == {Role.CLIENT}
        assert set(rows["pid"]) == {os.getpid()}


def race(where: End, count: int) -> None:
    """Two datagrams from each of so many connected sockets, sent by two processes at once, on two CPUs if there are."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    with ExitStack() as closing, mmap.mmap(-1, mmap.PAGESIZE) as shared, memoryview(shared).cast("Q") as turn:
        for sock in map(closing.enter_context, sockets):
            sock.connect(where)
        data = wire.HEADER.pack(SENDS - wire.HEADER.size, 0) + bytes(SENDS - wire.HEADER.size)
        cpus = sorted(os.sched_getaffinity(0))
        other = os.fork()
        if not other:
            os.sched_setaffinity(0, {cpus[-1]})
            turn[1] = 1  # here, and about to wait
            for place, sock in enumerate(sockets):
                while turn[0] <= place:
                    pass
                sock.send(data)
            os._exit(0)
        try:
            os.sched_setaffinity(0, {cpus[0]})
            while not turn[1]:
                time.sleep(0.001)
            for place, sock in enumerate(sockets):
                turn[0] = place + 1
                sock.send(data)
                time.sleep(0.001)
        finally:
            turn[0] = count  # so that the other ends, whatever happens here
            os.sched_setaffinity(0, cpus)
            assert os.waitpid(other, 0)[1] == 0


def test_datagrams_that_race_through_conntrack_to_two_backends_are_two_rows(tmp_path: Path) -> None:
    """As the two queries of a resolver: each CPU picks a backend, and conntrack does not announce the second entry."""
    with Cluster(backends=3, clients=1, conntrack=SHORT) as cluster:
        with_dns(cluster)
        with agent(cluster, tmp_path / "data"):
            cluster.client_pods[0].netns.call(lambda: race(cluster.vip("dns"), 100))
            await_the_end(cluster)
        table, seen = rows(tmp_path / "data"), accepted(cluster.servers)
        assert len(table) == clean(tmp_path / "data").flows == len(seen)
        assert_all_are(table, nat="dnat", opened=True, closed=True)
        where = zip(table.src_ip, table.src_port, table.backend_ip, table.backend_port, strict=True)
        assert {("udp", (client, port), (ip, backend)) for client, port, ip, backend in where} == seen
        assert table.packets_sent.sum() == 200
        assert len(seen) > 100 or len(os.sched_getaffinity(0)) == 1


def test_what_was_there_before_the_start_is_counted_from_then(emptied: Cluster, tmp_path: Path) -> None:
    cluster, client = emptied, emptied.clients[0]
    client.datagrams(5, cluster.vip("dns", 6), SENDS, RECEIVES)  # over, so in no row
    held = client.datagrams(4, cluster.vip("dns"), 1000, 1000, keep=True)["number"]
    with lasting(cluster):
        client.exchange(held, 1000, 1000)
        with agent(cluster, tmp_path / "data"):
            ledger = client.exchange(held, SENDS, RECEIVES)
            client.release(held)
    table = rows(tmp_path / "data")
    found = check(table, ledger, cluster.servers)
    assert_all_are(found, nat="dnat", nat_source="dump", opened=False, started=None, pid=client.pid, bytes_sent=SENDS,
                   bytes_received=RECEIVES, packets_sent=1, packets_received=1)  # fmt: skip
    clean(tmp_path / "data")
