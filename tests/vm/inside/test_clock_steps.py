"""The wall clock steps by an hour, forth and back, under an agent that traces: in a guest, whose clock is nobody's."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from agent_world import agent, coverage, losses, rows, until

from tracer.lab.cluster import Cluster
from tracer.store import layout

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "guest")

SENDS, RECEIVES = 100, 300
HOUR_S = 3600
NS = 1_000_000_000


@pytest.fixture
def wall_clock() -> Iterator[None]:
    """Half past, so that no hour ends by itself meanwhile; set right again afterwards."""
    offset = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    step(HOUR_S // 2 - int(time.time()) % HOUR_S)
    yield
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_BOOTTIME) + offset)


def step(seconds: int) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


@pytest.mark.usefixtures("wall_clock")
def test_the_wall_clock_steps_by_an_hour(tmp_path: Path) -> None:
    output = tmp_path / "data"
    with (
        Cluster(backends=3, clients=1) as cluster,
        agent(cluster, output, "--interval", "1s", "--rotate", "500ms") as running,
    ):
        client, ledger = cluster.clients[0], []
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        held = client.hold(3, cluster.vip())["number"]

        def files_of(hour: int) -> int:
            return len(list(layout.partition(output, "connections", hour).glob("[!.]*.parquet")))

        for seconds in (0, HOUR_S, -HOUR_S, -HOUR_S, HOUR_S):
            step(seconds)
            now = time.time_ns() // (HOUR_S * NS)
            before = files_of(now)
            client.exchange(held, SENDS, RECEIVES)
            ledger.append(client.connect_many(40, cluster.vip(), SENDS, RECEIVES))
            until(lambda now=now, before=before: files_of(now) > before, "a file of the hour that it is now")
        longer = client.release(held)
        lasted = time.clock_gettime(time.CLOCK_BOOTTIME) - began
        cluster.settle()
        running.stop()

    table = rows(output)
    assert losses(output) == 0
    sums = coverage(output).sum(numeric_only=True)
    assert sums.written == sums.emitted == len(table)
    # no file has rows of an hour that is not its own
    files = list(output.glob("connections/**/[!.]*.parquet"))
    assert len({path.parent for path in files}) == 3
    for path in files:
        of_rows = pq.read_table(path, columns=["ts"]).column("ts").cast("int64").to_numpy() // (HOUR_S * NS)
        assert set(of_rows) == {layout.hour_of(path.parts)}, path
    # what is measured is not the wall clock
    short = table[~table.src_port.isin(longer["local_port"].tolist())]
    assert sorted(short[short.opened].src_port) == sorted(np.concatenate(ledger)["local_port"].tolist())
    assert (short.duration_us < lasted * 1e6).all()
    assert (table.connect_latency_us.dropna() <= lasted * 1e6).all()
    for _, life in table[table.src_port.isin(longer["local_port"].tolist())].groupby("conn_id"):
        assert (life.opened.sum(), life.closed.sum()) == (1, 1)
        assert (life.bytes_sent.sum(), life.bytes_received.sum()) == (5 * SENDS, 5 * RECEIVES)
        assert life.duration_us.sum() <= lasted * 1e6
        assert life.started.nunique() == 1
    assert set(table.nat) == {"dnat"}
