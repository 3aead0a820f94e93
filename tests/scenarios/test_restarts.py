"""Connections and flows that are older than the agent, outlive it, or see it restarted: each is told for as long as
somebody looked, and nothing of it twice."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, are_told, coverage, rows, until
from scenarios.truth import COUNTERS, accepted, at_rest, clean, destroy_tells_the_end, lives, proven, settled

from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Ledger
from tracer.record import Flag, Role

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SENDS, RECEIVES = 100, 300
UNSEEN = 7777

#: Entries that tell of their end although they were born while nobody listened, and that wait until they are deleted.
TELLING = Conntrack(timeouts={"time_wait": 60, "close": 60, "udp": 60, "udp_stream": 60}, events=1)


def ports(ledger: Ledger) -> list[int]:
    return [int(port) for port in ledger["local_port"]]


def came_to(table: pd.DataFrame, cluster: Cluster) -> None:
    """Each row's backend is the one whose server saw its client, masqueraded or not."""
    log = accepted(cluster.servers)
    for row in table.itertuples():
        seen_as = (row.snat_ip, int(row.snat_port)) if "snat" in row.nat else (row.src_ip, row.src_port)
        assert (row.protocol, seen_as, (row.backend_ip, int(row.backend_port))) in log


def delete_entries(cluster: Cluster) -> None:
    """All of the node's entries end now."""
    cluster.node.run(["conntrack", "-F"])


def runs(output: Path, first: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The lives of the first run, whose rows are given, and those of the runs since."""
    table = rows(output)
    later = table[~table.conn_id.isin(first.conn_id)]
    assert len(later) + len(first) == len(table), "a connection has another id in another run"
    return lives(first), lives(later)


def told(life: pd.DataFrame) -> dict[int, tuple[bool, bool, bool, int, int]]:
    """Port → opened, closed, whether its beginning is known, bytes each way."""
    assert life.src_port.is_unique
    return {
        row.src_port: (row.opened, row.closed, pd.notna(row.started), row.bytes_sent, row.bytes_received)
        for row in life.itertuples()
    }


def test_connections_that_two_runs_see_are_counted_once_and_only_while_somebody_looks(tmp_path: Path) -> None:
    output = tmp_path / "data"
    with Cluster(backends=3, clients=1) as cluster:
        client, vip = cluster.clients[0], cluster.vip()
        held = {name: client.hold(3, vip) for name in ("idle", "busy")}
        numbers = {name: ledger["number"] for name, ledger in held.items()}
        client.exchange([*numbers["idle"], *numbers["busy"]], 5000, 5000)
        client.connect_many(20, vip)
        with agent(cluster, output, "--interval", "500ms", "--rotate", "200ms"):
            held["born"] = client.hold(3, vip)
            numbers["born"] = held["born"]["number"]
            client.exchange([*numbers["busy"], *numbers["born"]], SENDS, RECEIVES)
            short = client.connect_many(40, vip, SENDS, RECEIVES)
            open_ports = [port for ledger in held.values() for port in ports(ledger)]
            until(lambda: are_told(output, open_ports), "interim rows")
            client.exchange([*numbers["busy"], *numbers["born"]], SENDS, RECEIVES)
            at_rest(cluster)
        first = rows(output)

        client.exchange([*numbers["busy"], *numbers["born"]], UNSEEN, UNSEEN)
        for name in ("idle", "busy", "born"):
            client.release(numbers[name][:1])
        client.connect_many(20, vip)
        held["found"] = client.hold(2, vip)
        numbers["found"] = held["found"]["number"]
        with agent(cluster, output, "--interval", "500ms"):
            for name in ("busy", "born", "found"):
                client.exchange(numbers[name][name != "found" :], SENDS, RECEIVES)
            last = client.connect_many(5, vip, SENDS, RECEIVES)
            for name in ("idle", "busy", "born"):
                client.release(numbers[name][1:])
            at_rest(cluster)

        before, after = runs(output, first)
        idle, busy, born, found = (ports(held[name]) for name in ("idle", "busy", "born", "found"))
        # opened, closed, beginning known, bytes each way
        expected = dict.fromkeys(idle, (False, False, False, 0, 0))
        expected |= dict.fromkeys(busy, (False, False, False, 2 * SENDS, 2 * RECEIVES))
        expected |= dict.fromkeys(born, (True, False, True, 2 * SENDS, 2 * RECEIVES))
        expected |= dict.fromkeys(ports(short), (True, True, True, SENDS, RECEIVES))
        assert told(before) == expected
        expected = dict.fromkeys(idle[1:], (False, True, False, 0, 0))
        expected |= dict.fromkeys(busy[1:] + born[1:], (False, True, False, SENDS, RECEIVES))
        expected |= dict.fromkeys(found, (False, False, False, SENDS, RECEIVES))
        expected |= dict.fromkeys(ports(last), (True, True, True, SENDS, RECEIVES))
        assert told(after) == expected
        assert (before[before.src_port.isin([*idle, *busy, *born])].rows >= 2).all()
        whole = pd.concat((before, after))
        assert set(whole.role) == {"client"}
        assert set(whole.nat) == {"dnat"}
        came_to(whole, cluster)
        sums = clean(output)
        assert sums.adopted == 6 + 8
        table = coverage(output)
        assert table[table["last"]].ts.iloc[0] <= table[table["first"]].started.iloc[1], "the gap can be told"


def difference(now: pd.DataFrame, then: pd.DataFrame | None, chosen: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """By the client's port: what conntrack counted since then, or since the entry's birth."""
    values = now.set_index("src_port")[COUNTERS].loc[list(chosen)]
    if then is not None:
        values = values - then.set_index("src_port")[COUNTERS].loc[list(chosen)]
    return {port: tuple(map(int, row)) for port, row in zip(values.index, values.to_numpy(), strict=True)}


def counted(life: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    """By the client's port: what its rows say conntrack counted."""
    assert life.src_port.is_unique
    return {port: tuple(map(int, row)) for port, row in zip(life.src_port, life[COUNTERS].to_numpy(), strict=True)}


def test_an_outside_host_keeps_its_node_port_connections_over_start_and_restart(tmp_path: Path) -> None:
    output = tmp_path / "data"
    with Cluster(backends=2, clients=1, outside=True, conntrack=TELLING) as cluster:
        cluster.add_service("np", node_port=30000)
        outside, where = cluster.outside_client, cluster.node_port("np")
        idle, busy, ending, unseen = (outside.hold(2, where) for _ in range(4))
        for ledger in (idle, busy, ending, unseen):
            outside.exchange(ledger["number"], 5000, 5000)
        outside.connect_many(5, where)  # over, but conntrack still has their entries
        at_start = at_rest(cluster)
        with agent(cluster, output, "--interval", "1s", "--rotate", "200ms"):
            outside.exchange([*busy["number"], *ending["number"], *unseen["number"]], SENDS, RECEIVES)
            born = outside.hold(2, where)
            outside.exchange(born["number"], SENDS, RECEIVES)
            outside.release(ending["number"])

            def interim() -> bool:
                outside.exchange(busy["number"], SENDS, RECEIVES)
                return are_told(output, ports(busy))

            until(interim, "an interim row of the busy ones")
            outside.exchange(busy["number"], SENDS, RECEIVES)
            at_stop = at_rest(cluster)
            cluster.node.run(["conntrack", "-D", "-p", "tcp", "--state", "TIME_WAIT"])
        first = rows(output)

        outside.exchange([*busy["number"], *unseen["number"], *born["number"]], UNSEEN, UNSEEN)
        outside.release(unseen["number"])
        assert list(at_rest(cluster).state).count("TIME_WAIT") == len(unseen)
        cluster.node.run(["conntrack", "-D", "-p", "tcp", "--state", "TIME_WAIT"])
        at_restart = settled(cluster.node)
        with agent(cluster, output, "--interval", "1s"):
            outside.exchange([*busy["number"], *born["number"]], SENDS, RECEIVES)
            outside.release([*busy["number"], *born["number"]])
            at_end = at_rest(cluster)
            assert set(at_end[at_end.src_port.isin(ports(busy))].state) == {"TIME_WAIT"}
            delete_entries(cluster)

        before, after = runs(output, first)
        older = [*ports(idle), *ports(busy), *ports(ending), *ports(unseen)]
        assert sorted(before.src_port) == sorted([*older, *ports(born)]), "what was over before has no row"
        assert sorted(after.src_port) == sorted([*ports(idle), *ports(busy), *ports(born)])
        assert counted(before) == difference(at_stop, at_start, older) | difference(at_stop, None, ports(born))
        assert counted(after) == difference(at_end, at_restart, after.src_port)
        assert counted(before)[ports(idle)[0]] == (0, 0, 0, 0)
        for life in (before, after):
            assert set(life.role) == {"forwarded"}
            assert set(life.nat) == {"dnat+snat"}
            assert life.bytes_sent.isna().all(), "conntrack does not tell TCP's headers and retransmissions apart"
            came_to(life, cluster)
        old = before.src_port.isin(older)
        assert not before[old].opened.any()
        assert before[old].started.isna().all()
        assert before[~old].opened.all()
        assert set(before[before.closed].src_port) == set(ports(ending))
        assert (before[before.src_port.isin(ports(busy))].rows >= 2).all()
        assert not after.opened.any()
        assert after.started.isna().all()
        assert after.closed.all()
        over = ~after.src_port.isin(ports(idle))
        assert set(after[over].result) <= proven("ok")
        assert after[~over].result.isna().all(), "nobody closed it: its entry was deleted"
        sums = clean(output)
        assert sums.opened == sums.adopted == 0


def flows_told(life: pd.DataFrame, accounting: bool) -> dict[int, tuple[bool, int, int]]:
    """Port → opened, bytes each way: 0 if all are null, as they must be without accounting."""
    assert life.src_port.is_unique
    assert (life.opened == life.started.notna()).all()
    assert (life[["bytes_sent", "bytes_received"]].notna() == accounting).all(axis=None)
    counts = life[["bytes_sent", "bytes_received"]].fillna(0).astype(int)
    values = zip(life.src_port, life.opened, counts.bytes_sent, counts.bytes_received, strict=True)
    return {port: (opened, sent, received) for port, opened, sent, received in values}


@pytest.mark.parametrize(("connected", "accounting"), [(True, True), (False, True), (True, False)])
def test_udp_flows_are_told_from_the_start_on_and_those_that_are_over_not_at_all(
    tmp_path: Path, connected: bool, accounting: bool
) -> None:
    output = tmp_path / "data"
    telling = Conntrack(accounting=accounting, timeouts=TELLING.timeouts, events=1)
    with Cluster(backends=2, clients=1, conntrack=telling) as cluster:
        cluster.add_service("dns", port=53, target_port=5353, protocol="udp")
        client, vip = cluster.clients[0], cluster.vip("dns")
        # Ports that the kernel gives to nobody: it may give one of a closed socket again.
        client.datagrams(4, vip, 5000, 5000, connected=connected, source_port=9000)  # over
        silent, held, released = (
            client.datagrams(2, vip, 5000, 5000, connected=connected, source_port=port, keep=True)
            for port in (9100, 9200, 9300)
        )
        with agent(cluster, output):
            # Where nothing is counted, only conntrack's times, in whole seconds, tell what moved since the start.
            time.sleep(0 if accounting else 1.5)
            client.exchange([*held["number"], *released["number"]], SENDS, RECEIVES, times=3)
            client.release(released["number"])
            born = client.datagrams(3, vip, SENDS, RECEIVES, connected=connected, source_port=9400)
            kept = client.datagrams(3, vip, SENDS, RECEIVES, connected=connected, source_port=9500, keep=True)
        first = rows(output)

        client.exchange([*held["number"], *kept["number"]], UNSEEN, UNSEEN)
        with agent(cluster, output):
            time.sleep(0 if accounting else 1.5)  # as before
            client.exchange(held["number"], SENDS, RECEIVES, times=2)
            client.release([*held["number"], *kept["number"], *silent["number"]])
            delete_entries(cluster)

        before, after = runs(output, first)
        factor = 1 if accounting else 0
        expected = dict.fromkeys(ports(held) + ports(released), (False, 3 * SENDS * factor, 3 * RECEIVES * factor))
        expected |= dict.fromkeys(ports(born) + ports(kept), (True, SENDS * factor, RECEIVES * factor))
        again = dict.fromkeys(ports(held), (False, 2 * SENDS * factor, 2 * RECEIVES * factor))
        if not accounting and not destroy_tells_the_end():
            again = {}  # nothing tells that they moved
        assert flows_told(before, accounting) == expected
        assert flows_told(after, accounting) == again
        assert not before.closed.any()
        assert after.closed.all()
        whole = pd.concat((before, after))
        assert set(whole.role) == {"client" if connected else "forwarded"}
        came_to(whole, cluster)
        clean(output)


def test_a_forwarded_connection_from_before_whose_end_only_a_dump_tells_is_closed_once() -> None:
    with Cluster(backends=2, clients=1, outside=True, conntrack=Conntrack(events=0)) as cluster:
        cluster.add_service("np", node_port=30000)
        outside, pods = cluster.outside_client, (*cluster.client_pods, *cluster.backend_pods)
        held = outside.hold(3, cluster.node_port("np"))
        outside.exchange(held["number"], 5000, 5000)
        cluster.node.sysctl({"net.netfilter.nf_conntrack_events": 1})
        at_start = settled(cluster.node)
        scope = (cluster.node.path, *(pod.netns.path for pod in pods))
        with Capture(Options(node_netns=cluster.node.path, only_netns=scope)) as capture:
            outside.exchange(held["number"], SENDS, RECEIVES)
            at_end = settled(cluster.node)
            capture.reconcile()
            delete_entries(cluster)
            assert capture.counters()["conntrack_destroy"] == 0
            capture.reconcile()
            taken = [capture.drain()]
            capture.stop(lambda: taken.append(capture.drain()))
            records = np.concatenate(taken)
            assert capture.counters()["untold"] == capture.totals()["translations"] + 3 == 3
        moved = difference(at_end, at_start, ports(held))
        names = ["packets_sent", "bytes_sent", "packets_received", "bytes_received"]  # a record's bytes are conntrack's
        assert len(records) == 3
        assert {int(row["tuple"]["src_port"]): tuple(int(row[name]) for name in names) for row in records} == moved
        assert (records["role"] == Role.FORWARDED).all()
        assert ((records["flags"] & (Flag.OPENED | Flag.CLOSED)) == Flag.CLOSED).all()
