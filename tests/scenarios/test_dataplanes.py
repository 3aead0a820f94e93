"""kube-proxy's kinds of rules, by every way in: the rows say which backend it was, and as whom it saw the client.

Each connection of a test carries another number of bytes, so the client's ledger row and the server's are known to be
of one connection without asking conntrack: what the rows have to say follows from the two, exactly.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, losses, rows, until
from scenarios.truth import WORDS, End, destroy_tells_the_end, ends, lives, proven

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Client, Ledger

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft", "ipv6")

PROXIES = {
    "iptables-legacy": {"proxy": "iptables", "iptables": "legacy"},
    "iptables-nft": {"proxy": "iptables", "iptables": "nft"},
    "nftables": {"proxy": "nftables"},
}
FAMILIES = (4, 6)
OUTSIDE = {4: "172.30.0.100", 6: "fd00:172:30::100"}
#: The backends by number: those that answer, one that resets what it gets, one that listens to nobody.
ANSWERING, RESETTING, REFUSING = (0, 1, 2), 3, 4
RECEIVES = 300
#: The first connection's bytes; the next ones send one more each.
LEAST = 100
#: Below the ports that the lab's kernel chooses from, so that no test's connections from outside have another's tuple.
FIRST_PORT = 2_000

#: A client, what it dials, and how often.
Plan = tuple[Client, End, int]


@pytest.fixture(scope="module", params=PROXIES)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    yield from made(request.param)


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[Cluster]:
    """For what does not depend on the kind of rules."""
    yield from made("iptables-nft")


def made(proxy: str) -> Iterator[Cluster]:
    timeouts = Conntrack(timeouts=Conntrack.SHORT)
    options: dict[str, Any] = PROXIES[proxy]
    with Cluster(backends=5, clients=5, families="dual", outside=True, conntrack=timeouts, **options) as cluster:
        assert cluster.iptables == proxy.removeprefix("iptables-")
        cluster.set_backends("web", ANSWERING)
        cluster.add_service("sticky", ANSWERING, port=81, affinity_seconds=3600)
        cluster.add_service("anywhere", ANSWERING, port=82, node_port=30082, load_balancer=True)
        cluster.add_service("here", ANSWERING, port=83, node_port=30083, load_balancer=True, external_policy="Local")
        cluster.add_service("own", [0], port=84)
        cluster.add_service("resetting", [RESETTING], port=85, node_port=30085)
        cluster.add_service("refusing", [REFUSING], port=86, node_port=30086, external_policy="Local")
        cluster.add_service("empty", [], port=87, node_port=30087)
        cluster.servers[RESETTING].reset()
        cluster.servers[REFUSING].stop_listening()
        yield cluster


def hold(cluster: Cluster, *plans: Plan) -> list[tuple[Client, list[int]]]:
    """Opens these connections and exchanges once on each, another number of bytes; clients and what they hold."""
    sizes = itertools.count(LEAST)
    held = []
    for client, where, count in plans:
        bind = None
        if client is cluster.outside_client:
            bind = (OUTSIDE[6 if ":" in where[0] else 4], FIRST_PORT + client.totals()["attempted"])
        opened = client.hold(count, where, bind=bind)
        assert not opened["errno"].any(), opened["errno"]
        numbers = opened["number"].tolist()
        for number in numbers:
            client.exchange([number], next(sizes), RECEIVES)
        held.append((client, numbers))
    return held


def release(cluster: Cluster, held: list[tuple[Client, list[int]]]) -> Ledger:
    """Closes them; what the clients know of them, when the servers have seen the ends."""
    ledger = np.concatenate([client.release(numbers) for client, numbers in held])
    cluster.settle()
    return ledger


def fail(cluster: Cluster, service: str, count: int) -> Ledger:
    """Dials a service's node port in vain, from outside, in each family."""
    where = [cluster.node_port(service, family=family) for family in FAMILIES]
    # with a timeout the client asks for its port before the kernel forgets it
    return np.concatenate([cluster.outside_client.connect_many(count, one, timeout=20) for one in where])


def expected(cluster: Cluster, ledger: Ledger) -> dict[tuple[End, End], tuple[End, End | None, str]]:
    """(source, destination) as dialled -> (backend, source after masquerading, nat), by both ends' ledgers alone."""
    served = {}
    for server in cluster.servers:
        theirs = server.ledger()
        theirs = theirs[theirs["started"] >= ledger["started"].min()]
        for (backend, source), size in zip(ends(theirs), theirs["received"].tolist(), strict=True):
            assert size not in served, f"two connections of {size} bytes"
            served[size] = backend, source
    assert sorted(served) == sorted(ledger["sent"].tolist()), "the servers served others"
    found = {}
    for (own, dialled), size in zip(ends(ledger), ledger["sent"].tolist(), strict=True):
        backend, source = served[size]
        rewrites = ["dnat"] * (backend != dialled) + ["snat"] * (source != own)
        found[own, dialled] = backend, source if source != own else None, "+".join(rewrites) or "none"
    assert len(found) == len(ledger)
    return found


def told(table: pd.DataFrame) -> dict[tuple[End, End], tuple[End | None, End | None, str]]:
    """The same as the rows have it; one life each."""
    found = {}
    for row in table.itertuples():
        source, dialled = (row.src_ip, row.src_port), (row.dst_ip, row.dst_port)
        assert (source, dialled) not in found, f"two connections from {source} to {dialled}"
        found[source, dialled] = (
            end(row.backend_ip, row.backend_port), end(row.snat_ip, row.snat_port), row.nat
        )  # fmt: skip
    return found


def end(address: Any, port: Any) -> End | None:
    assert pd.isna(address) == pd.isna(port)
    return None if pd.isna(address) else (address, int(port))


def finished(output: Path) -> pd.DataFrame:
    """The lives that an agent recorded, once its account is seen to balance: nothing lost, nothing unclear."""
    table = rows(output)
    report = coverage(output)
    total = report.sum(numeric_only=True)
    of_sockets, flows = table[table.role == "client"], table[table.role == "forwarded"]
    assert len(of_sockets) + len(flows) == len(table) == total.emitted == total.written
    assert losses(output) == 0
    assert total.opened + total.late_begin == of_sockets.conn_id.nunique()
    assert total.closed + total.interim == len(of_sockets)
    assert total.flows - total.withdrawn == flows.closed.sum()
    unclear = ["adopted", "excluded", "unresolved", "ambiguous", "after_pause", "malformed_events", "enobufs", "untold"]
    assert not total[unclear].any(), total[unclear]
    found = lives(table)
    assert found.opened.all()
    assert found.closed.all()
    assert set(found.nat_source) <= {"conntrack"}
    return found


def check_clients(found: pd.DataFrame, cluster: Cluster, ledger: Ledger) -> None:
    """Pods' own connections: the right ones, and each with its client's counts."""
    assert told(found) == expected(cluster, ledger)
    assert set(found.role) == {"client"}
    assert set(found.result) == {"ok"}
    by_tuple = found.set_index(["src_ip", "src_port", "dst_ip", "dst_port"])
    for (own, dialled), row in zip(ends(ledger), ledger, strict=True):
        life = by_tuple.loc[(*own, *dialled)]
        assert (life.bytes_sent, life.bytes_received) == (row["sent"], row["received"])
        assert life.pid == row["pid"]


# -- conntrack's own account -----------------------------------------------------------------------------------------

_WAY = r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+) packets=(\d+) bytes=(\d+) "
_ENTRY = re.compile(rf"^tcp +6 \d+ (\w+) {_WAY}(?:\[UNREPLIED\] )?{_WAY}.*\bid=(\d+)", re.MULTILINE)


class Entry(NamedTuple):
    """An entry as `conntrack -L` printed it."""

    state: str
    ct_id: int
    packets_sent: int
    packets_received: int
    ip_bytes_sent: int
    ip_bytes_received: int


def entries(cluster: Cluster) -> dict[tuple[End, End], Entry]:
    """Every TCP entry of the node by (source, destination) as dialled; conntrack drops what is over as it lists."""
    found = {}
    for family in FAMILIES:
        text = cluster.node.run(["conntrack", "-L", "-p", "tcp", "-o", "id", "-f", f"ipv{family}"])
        for state, src, dst, sport, dport, packets, size, *reply, ct_id in _ENTRY.findall(text):
            counts = map(int, (packets, reply[4], size, reply[5]))
            found[(src, int(sport)), (dst, int(dport))] = Entry(state, int(ct_id), *counts)
    return found


def until_gone(cluster: Cluster, ledger: Ledger) -> dict[tuple[End, End], Entry]:
    """Waits until conntrack has dropped the entries of these connections; what it printed of each at last."""
    wanted, last = set(ends(ledger)), {}

    def gone() -> bool:
        now = {key: entry for key, entry in entries(cluster).items() if key in wanted}
        last.update(now)
        return not now

    until(gone, "conntrack to drop the entries")
    return last


def check_flows(found: pd.DataFrame, ledger: Ledger, printed: dict[tuple[End, End], Entry]) -> None:
    """Rows that only conntrack told of: its own counts, the clients' time, and nothing that it cannot know."""
    lasted = dict(zip(ends(ledger), ((ledger["ended"] - ledger["started"]) // 1000).tolist(), strict=True))
    assert set(found.role) == {"forwarded"}
    assert set(found.protocol) == {"tcp"}
    for row in found.itertuples():
        key = (row.src_ip, row.src_port), (row.dst_ip, row.dst_port)
        assert [getattr(row, name) for name in Entry._fields[1:]] == list(printed[key][1:])
        # conntrack keeps no time of the last packet; what it still waits it tells in whole seconds, if at all
        assert row.duration_us - lasted[key] >= -1_000_000
        assert row.duration_us - lasted[key] <= 1_000_000 or (row.result is None and not destroy_tells_the_end())
    unknown = ["pid", "comm", "cgroup_id", "netns", "bytes_sent", "bytes_received", "connect_latency_us", "rtt_us"]
    assert found[unknown].isna().all().all()


# -- the scenarios ---------------------------------------------------------------------------------------------------


def test_a_pod_reaches_a_service(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data"):
        plans = [(cluster.clients[0], cluster.vip(family=family), 40) for family in FAMILIES]
        ledger = release(cluster, hold(cluster, *plans))
    found = finished(tmp_path / "data")
    check_clients(found, cluster, ledger)
    assert set(found.nat) == {"dnat"}
    assert set(found.backend_ip) == {cluster.backend_pods[n].ips[family] for n in ANSWERING for family in FAMILIES}
    assert set(found.backend_port) == {8080}


def test_a_client_stays_with_its_backend_where_the_service_wants_it(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data"):
        plans = [(client, cluster.vip("sticky", family), 12) for client in cluster.clients[1:] for family in FAMILIES]
        ledger = release(cluster, hold(cluster, *plans))
    found = finished(tmp_path / "data")
    check_clients(found, cluster, ledger)
    assert set(found.nat) == {"dnat"}
    assert found.groupby("src_ip").size().tolist() == [12] * 8
    assert set(found.groupby("src_ip").backend_ip.nunique()) == {1}


def test_a_pod_reaches_itself_through_its_own_service(cluster: Cluster, tmp_path: Path) -> None:
    pod = cluster.backend_pods[0]
    itself = cluster.client_in(pod)
    with agent(cluster, tmp_path / "data"):
        plans = [(itself, cluster.vip("own", family), 10) for family in FAMILIES]
        ledger = release(cluster, hold(cluster, *plans))
    found = finished(tmp_path / "data")
    check_clients(found, cluster, ledger)
    assert set(found.nat) == {"dnat+snat"}
    assert set(found.src_ip) == set(found.backend_ip) == set(pod.addresses)
    assert not set(found.snat_ip) & set(pod.addresses)


def test_what_comes_from_outside_is_a_row_with_its_backend(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data"):
        ways = [way(name, family=family) for name in ("anywhere", "here")
                for way in (cluster.node_port, cluster.load_balancer) for family in FAMILIES]  # fmt: skip
        held = hold(cluster, *((cluster.outside_client, way, 10) for way in ways))
        ledger = release(cluster, held)
        printed = until_gone(cluster, ledger)
    found = finished(tmp_path / "data")
    assert told(found) == expected(cluster, ledger)
    assert set(found.result) <= proven("ok")
    assert {entry.state for entry in printed.values()} == {"TIME_WAIT"}
    check_flows(found, ledger, printed)
    anywhere = {cluster.node_port("anywhere")[1], cluster.load_balancer("anywhere")[1]}
    masqueraded = found.dst_port.isin(anywhere)
    assert len(found[masqueraded]) == len(found[~masqueraded]) == 40
    assert set(found[masqueraded].nat) == {"dnat+snat"}
    assert (found[masqueraded].snat_port != found[masqueraded].src_port).any()
    assert set(found[~masqueraded].nat) == {"dnat"}


def test_what_fails_from_outside_is_told_as_far_as_conntrack_proves_it(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.outside_client
    with agent(cluster, tmp_path / "data"):
        ways = [cluster.node_port(name, family=family) for name in ("resetting", "here") for family in FAMILIES]
        stood = release(cluster, hold(cluster, *((client, way, 4) for way in ways)))
        refused = fail(cluster, "refusing", 4)
        rejected = fail(cluster, "empty", 1)  # the kernel sends a peer one ICMPv6 error a second
        printed = until_gone(cluster, np.concatenate([stood, refused, rejected]))
    assert not printed.keys() & set(ends(rejected)), "what the node itself rejects makes no entry"
    assert {WORDS[number] for number in stood["errno"]} == {"ok", "reset"}
    assert {WORDS[number] for number in np.concatenate([refused, rejected])["errno"]} == {"refused"}
    found = finished(tmp_path / "data")
    nobody = cluster.backend_pods[REFUSING]
    right = expected(cluster, stood)
    for own, dialled in ends(refused):
        right[own, dialled] = (nobody.ips[6 if ":" in dialled[0] else 4], 8080), None, "dnat"
    assert told(found) == right
    known = np.concatenate([stood, refused])
    results = {((row.src_ip, row.src_port), (row.dst_ip, row.dst_port)): row.result for row in found.itertuples()}
    for key, number in zip(ends(known), known["errno"], strict=True):
        assert results.pop(key) in proven(WORDS[number])
    assert not results
    assert set(found.role) == {"forwarded"}
    refusals = found[found.dst_port == cluster.node_port("refusing")[1]]
    assert len(refusals) == len(refused)
    assert set(refusals.packets_sent) == set(refusals.packets_received) == {1}


def test_a_long_connection_from_outside_has_a_row_per_interval(one_cluster: Cluster, tmp_path: Path) -> None:
    cluster, client, output = one_cluster, one_cluster.outside_client, tmp_path / "data"
    ways = [cluster.node_port(name, family=family) for name in ("anywhere", "here") for family in FAMILIES]

    def has_had_three_rows_each() -> bool:
        for held_client, numbers in held:
            held_client.exchange(numbers, LEAST, RECEIVES)
        if not any((output / "connections").rglob("*.parquet")):
            return False
        seen = rows(output).groupby("conn_id").size()
        return len(seen) == len(ways) and seen.min() >= 3

    with agent(cluster, output, "--interval", "1s", "--rotate", "500ms"):
        held = hold(cluster, *((client, way, 1) for way in ways))
        until(has_had_three_rows_each, "three rows of each connection")
        ledger = release(cluster, held)
        printed = until_gone(cluster, ledger)
    found = finished(output)
    assert told(found) == expected(cluster, ledger)
    assert set(found.result) <= proven("ok")
    assert found.rows.min() >= 4
    check_flows(found, ledger, printed)
