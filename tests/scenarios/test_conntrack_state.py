"""Entries that are deleted under their connection, reused, or not made at all; and that nothing is kept for ever."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from agent_world import agent, are_told, rows, until
from scenarios.truth import COUNTERS, account, at_rest, check, clean, ends, entries, lives, proven, settled

from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import OWNER
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack, Node
from tracer.lab.traffic import Ledger, Server
from tracer.record import RESULT_OPEN, TUPLE, Flag, Nat, Role

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SENDS, RECEIVES = 100, 300
#: The kernel's own timeouts; every entry tells of its end, whether or not somebody listened when it was born.
PLAIN = Conntrack(events=1)
UNTRACKED = """
table ip untracked {
    chain prerouting {
        type filter hook prerouting priority raw;
        tcp dport 9090 notrack
        tcp sport 9090 notrack
    }
}
"""


@pytest.fixture
def single() -> Iterator[Cluster]:
    """One backend: so what conntrack finds anew in the middle of a connection is rewritten to where it was."""
    with Cluster(backends=1, clients=1, outside=True, conntrack=PLAIN) as cluster:
        yield cluster


def capture_of(cluster: Cluster) -> Capture:
    pods = (pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods))
    return Capture(Options(node_netns=cluster.node.path, only_netns=(cluster.node.path, *pods)))


def stopped(capture: Capture) -> npt.NDArray[np.void]:
    """All records up to the end of the capture."""
    taken = [capture.drain()]
    capture.stop(lambda: taken.append(capture.drain()))
    return np.concatenate(taken)


def delete(cluster: Cluster, how: str) -> None:
    cluster.node.run(["conntrack", "-F"] if how == "-F" else ["conntrack", "-D", "-p", "tcp"])


@pytest.mark.parametrize("how", ["-D", "-F"])
def test_a_connection_goes_on_with_a_new_entry_and_stays_one_connection(
    single: Cluster, tmp_path: Path, how: str
) -> None:
    client, vip = single.clients[0], single.vip()
    with agent(single, tmp_path / "data", "--interval", "500ms", "--rotate", "200ms"):
        opened = client.hold(5, vip)
        held = opened["number"]
        client.exchange(held, SENDS, RECEIVES)
        delete(single, how)
        client.exchange(held, SENDS, RECEIVES)
        others = client.connect_many(20, vip, SENDS, RECEIVES)
        until(lambda: are_told(tmp_path / "data", opened["local_port"].tolist()), "interim rows")
        at_rest(single)
        delete(single, how)
        # Else the first packet were a FIN, of which conntrack makes no entry (nf_conntrack_proto_tcp.c, tcp_new).
        client.exchange(held, SENDS, RECEIVES)
        done = client.release(held)
        at_rest(single)
        delete(single, how)
    found = check(rows(tmp_path / "data"), np.concatenate((done, others)), single.servers)
    assert set(found.nat) == {"dnat"}
    assert (found.rows > 1).sum() >= 5
    sums = clean(tmp_path / "data")
    assert sums.flows == sums.unresolved == 0
    assert sums.kept >= 10


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_an_entry_from_before_the_agent_is_deleted_under_its_connection(tmp_path: Path, told: bool) -> None:
    """With nf_conntrack_events=2, the default, an entry that was born while nobody listened tells nobody of its end."""
    with Cluster(backends=1, clients=1, conntrack=Conntrack(events=int(told))) as cluster:
        client = cluster.clients[0]
        opened = client.hold(3, cluster.vip())
        held = opened["number"]
        cluster.node.sysctl({"net.netfilter.nf_conntrack_events": 1})
        with agent(cluster, tmp_path / "data", "--interval", "500ms", "--rotate", "200ms"):
            client.exchange(held, SENDS, RECEIVES)
            delete(cluster, "-D")
            client.exchange(held, SENDS, RECEIVES)
            others = client.connect_many(20, cluster.vip(), SENDS, RECEIVES)
            until(lambda: are_told(tmp_path / "data", opened["local_port"].tolist()), "interim rows")
            done = client.release(held)
            at_rest(cluster)
            delete(cluster, "-D")
        found = check(rows(tmp_path / "data"), np.concatenate((done, others)), cluster.servers)
        assert set(found.nat) == {"dnat"}
        found = found[found.src_port.isin(done["local_port"])]
        assert (found.rows > 1).all()
        assert not found.opened.any()
        assert clean(tmp_path / "data").flows == 0


@pytest.mark.parametrize("end", ["stop", "release"])
def test_reconciliation_does_not_make_a_second_connection_of_it(single: Cluster, end: str) -> None:
    """conntrack's table is read while a connection has no entry there, and again with its new one."""
    client = single.clients[0]
    with capture_of(single) as capture:
        held = client.hold(3, single.vip())
        client.exchange(held["number"], SENDS, RECEIVES)
        delete(single, "-D")
        capture.reconcile()
        client.exchange(held["number"], SENDS, RECEIVES)
        capture.reconcile()
        if end == "release":
            client.release(held["number"])
            at_rest(single)
            capture.reconcile()
            delete(single, "-D")
        records = stopped(capture)
    assert sorted(records["tuple"]["src_port"]) == sorted(held["local_port"])
    assert (records["role"] == Role.CLIENT).all()
    assert (records["nat"] == Nat.DNAT).all()
    assert (records["bytes_sent"] == 2 * SENDS).all()
    assert (records["result"] == (RESULT_OPEN if end == "stop" else 0)).all()


def test_a_connection_whose_new_entry_leads_elsewhere_keeps_the_backend_it_had(tmp_path: Path) -> None:
    """The service has moved on meanwhile: the other backend knows nothing of the connection, and resets it."""
    with Cluster(backends=2, clients=1, conntrack=PLAIN) as cluster:
        client = cluster.clients[0]
        cluster.set_backends("web", [0])
        with agent(cluster, tmp_path / "data"):
            held = client.hold(3, cluster.vip())["number"]
            client.exchange(held, SENDS, RECEIVES)
            cluster.set_backends("web", [1])
            delete(cluster, "-D")
            client.exchange(held, SENDS, RECEIVES)
            done = client.release(held)
        found = check(rows(tmp_path / "data"), done, cluster.servers)
        assert set(found.backend_ip) == {cluster.backend_pods[0].ips[4]}
        assert set(found.result) == {"reset"}
        clean(tmp_path / "data")


def counted(life: pd.DataFrame) -> list[tuple[int, ...]]:
    """The client's port and conntrack's counters, of rows or of entries."""
    return sorted(tuple(map(int, row)) for row in life[["src_port", *COUNTERS]].to_numpy())


def test_a_forwarded_connection_whose_entry_is_deleted_is_told_as_two(single: Cluster, tmp_path: Path) -> None:
    # The source is kept: a new entry, masqueraded anew, would get another port, and the backend would not know it.
    single.add_service("np", node_port=30000, external_policy="Local")
    outside = single.outside_client
    with agent(single, tmp_path / "data"):
        held = outside.hold(3, single.node_port("np"))["number"]
        outside.exchange(held, SENDS, RECEIVES)
        first = settled(single.node)
        delete(single, "-D")
        outside.exchange(held, SENDS, RECEIVES)
        done = outside.release(held)
        second = at_rest(single)
        delete(single, "-D")
    found = lives(rows(tmp_path / "data"))
    assert set(found.role) == {"forwarded"}
    assert set(found.nat) == {"dnat"}
    assert found.opened.all()
    assert found.closed.all()
    found = found.sort_values("ts")
    earlier, later = found.iloc[:3], found.iloc[3:]
    assert len(found) == 6
    assert earlier.result.isna().all()
    assert set(later.result.dropna()) <= {"ok"}  # an old kernel does not prove it of an entry that began in the middle
    assert counted(earlier) == counted(first)
    assert counted(later) == counted(second)
    assert sorted(earlier.src_port) == sorted(later.src_port) == sorted(done["local_port"])
    assert set(found.backend_ip) == {single.backend_pods[0].ips[4]}
    sums = clean(tmp_path / "data")
    assert sums.flows == 6
    assert sums.opened == 0


@pytest.mark.needs("nft")
def test_what_conntrack_is_told_not_to_track_is_unknown(single: Cluster, tmp_path: Path) -> None:
    pod, client = single.backend_pods[0], single.clients[0]
    single.add_service("dark", port=9090, target_port=9090)
    single.node.run(["nft", "-f", "-"], UNTRACKED)
    with agent(single, tmp_path / "data"):
        direct = client.connect_many(10, (pod.ips[4], 9090), SENDS, RECEIVES)
        hopeless = client.connect_many(1, single.vip("dark"), timeout=0.5)  # nobody rewrites it
        at_rest(single)
    found = lives(rows(tmp_path / "data"))
    assert sorted(found.src_port) == sorted([*direct["local_port"], *hopeless["local_port"]])
    assert set(found.role) == {"client"}
    assert set(found.nat) == {"unknown"}
    nothing = ["nat_source", "backend_ip", "backend_port", "snat_ip", "snat_port", "ct_id", "ct_zone"]
    assert found[nothing].isna().all(axis=None)
    assert found.set_index("dst_ip").result.to_dict() == {pod.ips[4]: "ok", single.vip("dark")[0]: "aborted"}
    assert (found[found.result == "ok"].bytes_sent == SENDS).all()
    assert account(tmp_path / "data").unresolved == 11


def in_order(ledger: Ledger, servers: list[Server]) -> list[str]:
    """The backends of connections that were made one after the other: by when the servers saw them."""
    seen = [(int(row["started"]), own[0]) for server in servers
            for (own, _), row in zip(ends(server.ledger()), server.ledger(), strict=True)]  # fmt: skip
    return [backend for _, backend in sorted(seen)][-len(ledger) :]


@pytest.mark.parametrize("reset", [False, True])
def test_a_port_that_is_used_again_has_a_row_and_a_backend_for_each_use(tmp_path: Path, reset: bool) -> None:
    with Cluster(backends=3, clients=1, conntrack=PLAIN) as cluster:
        client, bind = cluster.clients[0], (cluster.client_pods[0].ips[4], 20_000)
        # The last entry of those is there when the agent starts: over, and then used again.
        client.connect_as("fixed-port", 5, cluster.vip(), SENDS, RECEIVES, bind=bind, reset=reset)
        with agent(cluster, tmp_path / "data"):
            ledger = client.connect_as("fixed-port", 40, cluster.vip(), SENDS, RECEIVES, bind=bind, reset=reset)
            at_rest(cluster)
        table = rows(tmp_path / "data").sort_values("started")
        assert len(table) == table.conn_id.nunique() == 40
        assert set(table.src_port) == {20_000}
        assert set(table.nat) == {"dnat"}
        assert list(table.backend_ip) == in_order(ledger, cluster.servers)
        assert list(table.bytes_sent) == list(ledger["sent"])
        assert list(table.bytes_received) == list(ledger["received"])
        sums = clean(tmp_path / "data")
        assert sums.opened == sums.closed == 40
        assert sums.flows == 0


def test_an_outside_port_that_is_used_again_has_a_row_for_each_use(tmp_path: Path) -> None:
    with Cluster(backends=3, clients=1, outside=True, conntrack=PLAIN) as cluster:
        cluster.add_service("np", node_port=30000)
        where, bind = cluster.node_port("np"), ("172.30.0.100", 20_000)
        cluster.outside_client.connect_as("fixed-port", 3, where, SENDS, RECEIVES, bind=bind)
        with agent(cluster, tmp_path / "data"):
            ledger = cluster.outside_client.connect_as("fixed-port", 20, where, SENDS, RECEIVES, bind=bind)
            at_rest(cluster)
            delete(cluster, "-D")
        table = rows(tmp_path / "data").sort_values("started")
        assert len(table) == table.conn_id.nunique() == 20
        assert set(table.role) == {"forwarded"}
        assert set(table.result) <= proven("ok")
        assert list(table.backend_ip) == in_order(ledger, cluster.servers)
        assert clean(tmp_path / "data").flows == 20


def gone(node: Node) -> None:
    """Waits until conntrack has nothing left; a listing drops what has expired."""
    until(lambda: entries(node.netns).empty, "conntrack's entries to expire")


def test_nothing_is_kept_for_ever(tmp_path: Path) -> None:
    short = Conntrack(timeouts=Conntrack.SHORT, events=0)
    with Cluster(backends=1, clients=2, outside=True, conntrack=short) as cluster:
        cluster.add_service("np", node_port=30000)
        cluster.add_service("dns", port=53, target_port=5353, protocol="udp", node_port=30053)
        client, other, outside, vip = *cluster.clients, cluster.outside_client, cluster.vip()
        older = client.hold(3, vip)["number"]
        older_flows = client.datagrams(3, cluster.vip("dns"), keep=True)["number"]
        outside_older = outside.hold(2, cluster.node_port("np"))["number"]
        cluster.node.sysctl({"net.netfilter.nf_conntrack_events": 1})  # those will not tell of their end
        with capture_of(cluster) as capture:
            held = client.hold(5, vip)["number"]
            client.exchange([*held, *older, *older_flows], SENDS, RECEIVES)
            cluster.node.run(["conntrack", "-D", "-p", "tcp", "--src", cluster.client_pods[0].ips[4]])
            client.exchange([*held, *older], SENDS, RECEIVES)
            client.connect_many(50, vip, SENDS, RECEIVES)
            client.connect_as("abort", 5, vip, 0, 0)
            client.connect_many(5, (cluster.client_pods[1].ips[4], 7), 0, 0)  # nobody listens
            other.connect_many(20, (cluster.backend_pods[0].ips[4], 8080), SENDS, RECEIVES)
            other.connect_as("fixed-port", 5, vip, bind=(cluster.client_pods[1].ips[4], 20_000))
            kept = other.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES, keep=True)["number"]
            for connected in (True, False):
                other.datagrams(10, cluster.vip("dns"), SENDS, RECEIVES, connected=connected)
            outside.connect_many(10, cluster.node_port("np"), SENDS, RECEIVES)
            outside.datagrams(5, cluster.node_port("dns"), SENDS, RECEIVES)
            capture.interim(capture.drain)
            capture.reconcile()
            # The end of what was closed may still be on its way.
            until(lambda: capture.totals()["open_connections"] == 8, "eight connections to be open")
            client.release([*held, *older, *older_flows])
            outside.release(outside_older)
            gone(cluster.nodes[0])
            other.release(kept)  # their entries are gone already
            capture.drain()
            for _ in range(2):
                capture.reconcile()
                capture.sweep()
            totals = capture.totals()
            assert {name: totals[name] for name in ("open_connections", "translations", "lost_end")} == {
                "open_connections": 0, "translations": 0, "lost_end": 0,
            }  # fmt: skip
            assert libbpf.map_count(capture.maps.owners, TUPLE, OWNER) == 0
            assert not (capture.drain()["flags"] & Flag.PROVISIONAL).any()


def fill(node: Node, path: Path) -> int:
    """Fills the node's conntrack table with entries that may not be dropped for others (ASSURED); how many were made.

    The limit is the machine's (nf_conntrack_max), but each namespace's entries are counted by themselves
    (__nf_conntrack_alloc), so that a namespace can be filled without touching a setting.
    """
    room = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    lines = (
        f"-I -s 198.18.{number >> 24}.1 -d 203.0.{number >> 16 & 255}.{number >> 8 & 255} -p udp "
        f"--sport {1024 + (number & 255)} --dport 53 -u SEEN_REPLY,ASSURED -t 600\n"
        for number in range(room)
    )
    path.write_text("".join(lines))
    # It stops at the first that finds no room.
    node.netns.run(["sh", "-c", f"conntrack -R {path} >/dev/null 2>&1 || true"], timeout=100)
    return int(node.netns.run(["conntrack", "-C"]))


def test_a_full_table_refuses_connections_and_nothing_is_made_up(tmp_path: Path) -> None:
    with Cluster(backends=1, clients=1, syn_retries=1) as cluster:
        client, vip = cluster.clients[0], cluster.vip()
        with agent(cluster, tmp_path / "data", "--max-translations", "1000"):
            held = client.hold(3, vip)["number"]
            made = fill(cluster.nodes[0], tmp_path / "entries")
            assert made >= int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
            refused = client.connect_many(2, vip, SENDS, RECEIVES)
            assert set(refused["errno"]) == {110}
            client.exchange(held, SENDS, RECEIVES)
            client.release(held)
            cluster.settle()  # what is closed has entries until it is over
            cluster.node.run(["conntrack", "-F"])
            through = client.connect_many(4, vip, SENDS, RECEIVES)
            at_rest(cluster)
        table = lives(rows(tmp_path / "data"))
    assert (len(table), set(table.role)) == (9, {"client"})
    dropped = table[table.result == "timeout"]
    assert (len(dropped), set(dropped.nat), dropped.backend_ip.count()) == (2, {"unknown"}, 0)
    stood = table[table.result == "ok"]
    assert (len(stood), set(stood.nat)) == (7, {"dnat"})
    assert set(through["errno"]) == {0}
    sums = account(tmp_path / "data")
    assert sums["unresolved"] == 2
    # What the tracer itself had no room for is counted, each.
    assert sums["lost_translation_map"] >= made - 1000 - 3
