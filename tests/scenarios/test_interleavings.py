"""Random interleavings of connects, failures, closes, deletions and restarts: the rows are exactly the ledger's.

The ledger is kept by the clients and the servers of the lab, and here per run of the agent: what was opened, closed and
transferred while that run was watching.
"""

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, losses, rows, until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scenarios.truth import WORDS, accepted, ends, lives

from tracer.errors import TracerError
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Client, Ledger

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft")

EXAMPLES = int(os.environ.get("VIP_TRACER_INTERLEAVINGS", "6"))
NODE_PORT = 30080


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    short = Conntrack(accounting=True, timeouts=Conntrack.SHORT)
    with Cluster(backends=3, clients=2, outside=True, conntrack=short) as made:
        made.add_service("public", node_port=NODE_PORT)
        made.add_service("solo", [0])
        made.add_service("empty", [])
        made.add_service("dns", port=53, target_port=5353, protocol="udp")
        made.node.sysctl({"net.ipv4.icmp_ratelimit": 0})
        yield made


@dataclass
class Watched:
    """What one run of the agent must say of a connection."""

    opened: bool = False
    closed: bool = False
    sent: int = 0
    received: int = 0


@dataclass
class Connection:
    """One connection, as its ledger has it."""

    key: tuple[str, int, str, int, str]  # source, dialled, protocol
    role: str
    started: int
    result: str = "ok"
    rewritten: bool = True
    hidden: bool = False  # conntrack's entry was deleted: a later run cannot know its translation
    never: bool = False  # no entry was ever confirmed
    sent: int = 0
    received: int = 0
    watched: dict[int, Watched] = field(default_factory=lambda: defaultdict(Watched))


class World:
    """A lab, an agent that comes and goes, and the ledger."""

    def __init__(self, cluster: Cluster, output: Path) -> None:
        self.cluster, self.output = cluster, output
        self.run = -1
        self.stack = ExitStack()
        self.connections: list[Connection] = []
        self.held: dict[tuple[int, int], Connection] = {}
        self.next_port = 20_000
        self.watching = False

    def start(self) -> None:
        self.run += 1
        self.stack.enter_context(agent(self.cluster, self.output, "--interval", "1s"))
        self.watching = True
        for connection in self.held.values():
            connection.watched[self.run]  # found at the start: it has a row, whatever it does

    def stop(self) -> None:
        self.stack.close()
        self.watching = False

    @property
    def workers(self) -> list[Client]:
        return [*self.cluster.clients, self.cluster.outside_client]

    def target(self, worker: int, service: str) -> tuple[str, int]:
        """Clients outside know only the node port."""
        outside = worker == len(self.cluster.clients)
        return self.cluster.node_port("public") if outside else self.cluster.vip(service)

    def note(self, worker: int, ledger: Ledger, protocol: str = "tcp", *, rewritten: bool = True, never: bool = False,
             connected: bool = True) -> list[Connection]:  # fmt: skip
        made = []
        source = self.cluster.client_pods[worker].ips[4] if worker < len(self.cluster.clients) else None
        for (own, peer), row in zip(ends(ledger), ledger, strict=True):
            role = "client" if source and connected else "forwarded"
            connection = Connection(
                (source or own[0], own[1], *peer, protocol), role, int(row["started"]), WORDS[int(row["errno"])],
                rewritten, never=never,
            )  # fmt: skip
            if self.watching:
                connection.watched[self.run].opened = True
            self.count(connection, row)
            if row["ended"]:
                self.close(connection)
            self.connections.append(connection)
            made.append(connection)
        return made

    def count(self, connection: Connection, row: np.void) -> None:
        if self.watching:
            connection.watched[self.run].sent += int(row["sent"]) - connection.sent
            connection.watched[self.run].received += int(row["received"]) - connection.received
        connection.sent, connection.received = int(row["sent"]), int(row["received"])

    def close(self, connection: Connection) -> None:
        if self.watching:
            connection.watched[self.run].closed = True

    # -- what may happen ---------------------------------------------------------------------------------------------

    def connect(self, worker: int, count: int, service: str) -> None:
        ledger = self.workers[worker].connect_many(count, self.target(worker, service), 100 + count, 3000)
        self.note(worker, ledger)

    def refuse(self, worker: int, how: str) -> None:
        worker %= len(self.cluster.clients)
        where = self.cluster.vip("empty") if how == "rejected" else (self.cluster.backend_pods[0].ips[4], 9)
        ledger = self.workers[worker].connect_many(1, where)
        self.note(worker, ledger, rewritten=False, never=how == "rejected")

    def hold(self, worker: int, count: int, service: str) -> None:
        ledger = self.workers[worker].hold(count, self.target(worker, service))
        for connection, number in zip(self.note(worker, ledger), ledger["number"], strict=True):
            self.held[worker, int(number)] = connection

    def _chosen(self, worker: int, some: int) -> list[int]:
        mine = sorted(number for owner, number in self.held if owner == worker)
        return mine[: some + 1]

    def exchange(self, worker: int, some: int, size: int) -> None:
        numbers = self._chosen(worker, some)
        for row in self.workers[worker].exchange(numbers, size, size // 2 + 8):
            self.count(self.held[worker, int(row["number"])], row)

    def release(self, worker: int, some: int) -> None:
        numbers = self._chosen(worker, some)
        # A FIN makes no entry (conntrack calls it invalid, and kube-proxy drops it), data does.
        hidden = [number for number in numbers if self.held[worker, number].hidden]
        for row in self.workers[worker].exchange(hidden, 8, 8):
            self.count(self.held[worker, int(row["number"])], row)
        for row in self.workers[worker].release(numbers):
            connection = self.held.pop((worker, int(row["number"])))
            self.count(connection, row)
            self.close(connection)

    def datagrams(self, worker: int, count: int, connected: bool) -> None:
        worker %= len(self.cluster.clients)
        ledger = self.workers[worker].datagrams(
            count, self.cluster.vip("dns"), 50, 70, connected=connected, source_port=self.next_port
        )
        self.next_port += count
        self.note(worker, ledger, "udp", connected=connected)

    def delete(self) -> None:
        """Somebody deletes the entries of one service under its connections; what was closed has closed."""
        self.settle()
        address = self.cluster.vip("solo")[0]
        with contextlib.suppress(TracerError):  # there were none
            self.cluster.node.run(["conntrack", "-D", "-p", "tcp", "-d", address])
        for connection in self.held.values():
            connection.hidden |= connection.key[2] == address

    def restart(self) -> None:
        self.settle()
        if self.watching:
            self.stop()
        else:
            self.start()

    def settle(self) -> None:
        """Until both ends agree on what was closed: a FIN may still be under way."""
        self.cluster.settle()

    def finish(self) -> None:
        """Everything closed, and every entry gone."""
        for worker in range(len(self.workers)):
            self.release(worker, 1 << 16)
        self.settle()
        if not self.watching:
            self.start()
        until(self._forgotten, "conntrack to forget everything")
        self.stop()

    def _forgotten(self) -> bool:
        listed = self.cluster.node.run(["conntrack", "-L"])
        return not any(f"dport={port} " in listed for port in (80, 53, NODE_PORT))

    # -- and what the rows must be -----------------------------------------------------------------------------------

    def verify(self) -> None:
        table = rows(self.output) if list((self.output / "connections").rglob("*.parquet")) else pd.DataFrame()
        expected: dict[tuple[int, tuple[str, int, str, int, str]], list[Connection]] = defaultdict(list)
        for connection in self.connections:
            for run in connection.watched:
                expected[run, connection.key].append(connection)
        if not expected:
            assert not len(table)
            return
        runs = table.assign(run=table.conn_id.astype("uint64") // 2**48).groupby("run").ts.min().sort_values().index
        of_run = self._numbered(len(runs))
        found: dict[tuple[int, tuple[str, int, str, int, str]], list[object]] = defaultdict(list)
        for life in lives(table).sort_values("ts").itertuples():
            run = of_run[list(runs).index(life.conn_id // 2**48)]
            found[run, (life.src_ip, life.src_port, life.dst_ip, life.dst_port, life.protocol)].append(life)
        assert sorted(found) == sorted(expected), "not the ledger's connections"
        log = accepted(self.cluster.servers)
        for key, connections in expected.items():
            connections.sort(key=lambda connection: connection.started)
            assert len(found[key]) == len(connections), key
            for life, connection in zip(found[key], connections, strict=True):
                self._compare(life, connection, connection.watched[key[0]], log)
        assert losses(self.output) == 0
        report = coverage(self.output)
        assert report.lost_translation_map.sum() == 0
        assert report.untold.sum() <= len(self.connections)

    def _numbered(self, found: int) -> list[int]:
        """The runs that have rows, in order."""
        numbers = sorted({run for connection in self.connections for run in connection.watched})
        assert len(numbers) == found, "another number of runs has rows"
        return numbers

    def _compare(self, life: object, connection: Connection, watched: Watched, log: set[object]) -> None:
        what = (life, connection)
        assert life.role == connection.role, what
        assert life.opened == watched.opened, what
        if connection.role == "client" and life.protocol == "tcp":
            assert life.closed == watched.closed, what
            assert (None if pd.isna(life.result) else life.result) == (connection.result if watched.closed else None), (
                what
            )
        if life.protocol == "udp" or connection.role == "client":
            assert (life.bytes_sent, life.bytes_received) == (watched.sent, watched.received), what
        if connection.never:
            assert life.nat == "unknown", what
        elif not (connection.hidden and life.nat == "unknown"):
            assert ("dnat" in life.nat) == connection.rewritten, what
            if connection.result == "ok":
                seen_as = (life.snat_ip, int(life.snat_port)) if "snat" in life.nat else (life.src_ip, life.src_port)
                assert (life.protocol, seen_as, (life.backend_ip, int(life.backend_port))) in log, what


WORKER = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.just("connect"), WORKER, st.integers(1, 20), st.sampled_from(["web", "solo"])),
    st.tuples(st.just("refuse"), WORKER, st.sampled_from(["rejected", "closed"])),
    st.tuples(st.just("hold"), WORKER, st.integers(1, 5), st.sampled_from(["web", "solo"])),
    st.tuples(st.just("exchange"), WORKER, st.integers(0, 5), st.integers(8, 100_000)),
    st.tuples(st.just("release"), WORKER, st.integers(0, 3)),
    st.tuples(st.just("datagrams"), WORKER, st.integers(1, 30), st.booleans()),
    st.tuples(st.just("delete")),
    st.tuples(st.just("restart")),
)


@pytest.mark.timeout(600)
# Not shrunk: an example takes seconds, and hypothesis prints its steps.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, min_size=3, max_size=30))
def test_rows_are_the_ledger(cluster: Cluster, tmp_path: Path, steps: list[tuple[object, ...]]) -> None:
    output = tmp_path / "data"
    shutil.rmtree(output, ignore_errors=True)
    world = World(cluster, output)
    try:
        world.start()
        for name, *arguments in steps:
            getattr(world, name)(*arguments)
        world.finish()
        world.verify()
    finally:
        world.stop()
        for worker, number in list(world.held):
            world.workers[worker].release([number])
