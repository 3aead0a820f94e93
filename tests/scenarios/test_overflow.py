"""Everything that can be full is full, under load: what was offered is what was written or counted, exactly."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from agent_world import agent, coverage, rows
from scenarios.faults import RECEIVES, SENDS, never_wrong

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

LOCAL, OUTSIDE, DATAGRAMS = 1200, 400, 200


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Entries tell of their end, and wait until they are deleted."""
    lasting = Conntrack(timeouts={"time_wait": 120, "close": 120, "udp": 120, "udp_stream": 120}, events=1)
    with Cluster(backends=3, clients=2, outside=True, conntrack=lasting) as made:
        made.add_service("np", node_port=30000)
        made.add_service("dns", port=53, target_port=5353, protocol="udp", node_port=30053)
        yield made


@dataclass
class Account:
    """What came of LOCAL connections of two pods, and of OUTSIDE connections and DATAGRAMS flows of a host outside."""

    clients: pd.DataFrame
    flows: pd.DataFrame
    counted: pd.Series

    def balances(self) -> None:
        """The accounts of bpf/counters.h, against what the applications did and what is on disk."""
        counted = self.counted
        began = counted[["opened", "accepted", "adopted", "late_begin", "failed"]].sum()
        assert began == counted.opened + counted.late_begin == LOCAL
        lost = counted[["lost_ring", "lost_connection_map", "lost_end"]].sum()
        assert began == counted.closed + lost + counted.excluded
        assert counted.closed == len(self.clients)
        assert len(self.clients) + lost == LOCAL
        assert counted.flows == len(self.flows) + counted.lost_flow_ring + counted.withdrawn
        assert counted.emitted == counted.written == len(self.clients) + len(self.flows)
        assert counted.unresolved == (self.clients.nat == "unknown").sum()
        assert not counted[["lost_writer", "malformed_events", "ambiguous"]].any()


def under_load(cluster: Cluster, output: Path, *options: str) -> Account:
    first, second, outside = *cluster.clients, cluster.outside_client
    # No dump in between: it would put in what found no room.
    with agent(cluster, output, "--interval", "1h", *options):
        for client in (first, second):
            client.begin_connects(LOCAL // 2, cluster.vip(), SENDS, RECEIVES)
        outside.connect_many(OUTSIDE, cluster.node_port("np"), SENDS, RECEIVES)
        outside.datagrams(DATAGRAMS, cluster.node_port("dns"), SENDS, RECEIVES)
        for client in (first, second):
            client.finish_connects()
        cluster.settle()
        cluster.node.run(["conntrack", "-F"])
    table = rows(output)
    account = Account(
        never_wrong(output, cluster),
        table[table.role == "forwarded"],
        coverage(output).sum(numeric_only=True),
    )
    assert table.conn_id.is_unique
    assert set(account.flows.nat) <= {"dnat+snat"}
    account.balances()
    return account


def test_a_ring_that_is_full_all_the_time(cluster: Cluster, tmp_path: Path) -> None:
    """It has room for 19 records."""
    account = under_load(cluster, tmp_path / "data", "--ring-bytes", "4096")
    counted = account.counted
    assert counted.lost_ring > 0
    assert counted.lost_flow_ring > 0, "they end all at once"
    assert counted.flows - counted.withdrawn == OUTSIDE + DATAGRAMS
    assert counted.unresolved == counted.lost_translation_map == counted.lost_connection_map == 0


def test_a_connection_map_that_is_full_most_of_the_time(cluster: Cluster, tmp_path: Path) -> None:
    """A connection that found no room stays lost, although others end before it does."""
    account = under_load(cluster, tmp_path / "data", "--max-connections", "1")
    counted = account.counted
    assert 0 < counted.lost_connection_map < LOCAL
    assert counted.lost_ring == counted.unresolved == counted.lost_translation_map == 0
    assert len(account.flows) == OUTSIDE + DATAGRAMS, "a lost connection is not taken for a flow"


def test_a_translation_map_that_is_full_all_the_time(cluster: Cluster, tmp_path: Path) -> None:
    account = under_load(cluster, tmp_path / "data", "--max-translations", "500")
    counted = account.counted
    assert len(account.clients) == LOCAL
    assert counted.conntrack_new == LOCAL + OUTSIDE + DATAGRAMS
    assert counted.lost_translation_map == LOCAL + OUTSIDE + DATAGRAMS - 500
    # Each that was lost is a row without a translation, or a flow without a row.
    assert counted.lost_translation_map == counted.unresolved + OUTSIDE + DATAGRAMS - len(account.flows)


def test_all_of_them_at_once(cluster: Cluster, tmp_path: Path) -> None:
    sizes = ("--ring-bytes", "4096", "--max-connections", "1", "--max-translations", "300")
    counted = under_load(cluster, tmp_path / "data", *sizes).counted
    for what in ("lost_connection_map", "lost_translation_map", "lost_flow_ring", "unresolved"):
        assert counted[what] > 0, what
    assert counted.lost_translation_map == LOCAL + OUTSIDE + DATAGRAMS - 300


def test_refusals_that_find_the_ring_full_are_lost_once(cluster: Cluster, tmp_path: Path) -> None:
    """Each has two records: what conntrack tells of its entry's end, which its socket's own row withdraws."""
    cluster.add_service("refusing", port=86, target_port=9999, node_port=30086, served=False)
    first, second, outside = *cluster.clients, cluster.outside_client
    with agent(cluster, tmp_path / "data", "--ring-bytes", "4096"):
        for client in (first, second):
            client.begin_connects(LOCAL // 2, cluster.vip("refusing"), SENDS, RECEIVES)
        away = outside.connect_many(OUTSIDE, cluster.node_port("refusing"), SENDS, RECEIVES)
        ledgers = [away, *(client.finish_connects() for client in (first, second))]
        cluster.settle()
    assert {int(code) for ledger in ledgers for code in ledger["errno"]} == {errno.ECONNREFUSED}
    table, counted = rows(tmp_path / "data"), coverage(tmp_path / "data").sum(numeric_only=True)
    assert set(table.nat) <= {"dnat", "dnat+snat"}
    assert set(table.result) == {"refused"}
    own, others = table[table.role == "client"], table[table.role == "forwarded"]
    assert counted.lost_ring > 0
    assert len(own) + counted.lost_ring == LOCAL
    assert counted.lost_flow_ring > 0
    assert len(others) + counted.lost_flow_ring == OUTSIDE
    assert counted.flows == len(others) + counted.lost_flow_ring + counted.withdrawn
