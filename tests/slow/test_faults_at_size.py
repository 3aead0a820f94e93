"""The faults of the scenarios at their full size: minutes each, so by `make test-slow` alone.

What each came to is printed with `-rP`, as `make test-slow` has it.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_world import Agent, agent, coverage, losses, rows, until
from scenarios.faults import RECEIVES, SENDS, again_and_again, never_wrong
from scenarios.killing import kill_again_and_again
from scenarios.truth import clean

from tracer.lab import child
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = [pytest.mark.needs("bpf", "netns", "conntrack", "iptables"), pytest.mark.timeout(1800)]

KILLED, NAMESPACES, OPEN, STOPPED_S = 25, 1000, 100_000, 30


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2, conntrack=Conntrack(timeouts=Conntrack.SHORT)) as made:
        yield made


def say(*what: object) -> None:
    print(*what)  # noqa: T201  shown by -rP


def descriptors(running: Agent) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def test_a_hundred_kills(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    say("seed", seed)
    with Cluster(backends=3, clients=2) as cluster:
        tally = kill_again_and_again(cluster, tmp_path / "data", KILLED, seed)
    say(tally)
    assert tally.stale_files >= KILLED // 2


#: Makes namespaces, twenty at a time, with a connection inside each, and lets them go.
COME_AND_GO = """
import ctypes, os, socket, sys, time
libc = ctypes.CDLL(None)
def one():
    assert libc.unshare(0x40000000) == 0  # CLONE_NEWNET
    os.system("ip link set lo up")
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    time.sleep(0.3)
for batch in range(int(sys.argv[1]) // 20):
    children = []
    for _ in range(20):
        pid = os.fork()
        if not pid:
            one()
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    print(20 * (batch + 1), flush=True)
"""


def test_a_thousand_namespaces_under_load(cluster: Cluster, tmp_path: Path) -> None:
    """They are walked too: the agent is not told which namespaces are the node's."""
    first, second = cluster.clients
    with agent(cluster, tmp_path / "data", "--interval", "1s", scope=False) as running:
        dialled = len(first.connect_many(2000, cluster.vip(), SENDS, RECEIVES))
        until(lambda: not rows_open(cluster), "the first connections' entries to go", 60)
        before = running.resident(), descriptors(running)
        makes = subprocess.Popen(child.command(os.getpid(), "new", sys.executable, "-c", COME_AND_GO, str(NAMESPACES)),
                                 stdout=subprocess.PIPE)  # fmt: skip
        while makes.poll() is None:
            dialled += len(first.connect_many(100, cluster.vip(), SENDS, RECEIVES, rate=500))
            dialled += len(second.connect_many(100, cluster.vip(), SENDS, RECEIVES, rate=500))
        assert makes.returncode == 0
        made = int(makes.stdout.read().split()[-1])  # type: ignore[union-attr]
        cluster.settle()
        until(lambda: not rows_open(cluster), "the last connections' entries to go", 60)
        after = running.resident(), descriptors(running)
        running.stop()
    say(f"{made} namespaces, {dialled} connections; resident MB and descriptors: {before} before, {after} after")
    assert made == NAMESPACES
    assert after[1] <= before[1] + 2
    assert after[0] < before[0] + 40
    table = rows(tmp_path / "data")
    ours = table[table.netns.isin({pod.netns.inode for pod in cluster.client_pods})].conn_id.nunique()
    # Others' connections on this machine are seen as well, and their losses.
    assert ours <= dialled <= ours + losses(tmp_path / "data")
    assert coverage(tmp_path / "data").translations.iloc[-1] == 0


def rows_open(cluster: Cluster) -> int:
    """How many entries conntrack has; a listing drops what has expired."""
    return len(cluster.node.run(["conntrack", "-L"]).splitlines())


def test_a_hundred_thousand_connections_are_open_at_the_start(tmp_path: Path) -> None:
    with Cluster(backends=8, clients=10) as cluster:
        for client in cluster.clients:
            client.begin(do="hold", count=OPEN // 10, address=cluster.vip()[0], port=80, timeout=None, bind=None)
        for client in cluster.clients:
            client.finish()
        began = time.monotonic()
        with agent(cluster, tmp_path / "all", "--max-connections", "131072") as running:
            ready, resident = time.monotonic() - began, running.resident()
            running.stop()
        say(next(line for line in running.said.splitlines() if "ready after" in line))
        say(f"exec to ready {ready:.1f} s, {resident} MB resident")
        table = never_wrong(tmp_path / "all", cluster)
        assert len(table) == OPEN
        assert not table.opened.any()
        assert set(table.nat) == {"dnat"}
        assert clean(tmp_path / "all").adopted == OPEN

        with agent(cluster, tmp_path / "default"):
            pass
        report = coverage(tmp_path / "default")
        assert report.lost_connection_map.sum() == OPEN - 65_536, "what the default has no room for is counted"
        assert len(rows(tmp_path / "default")) == 65_536


def test_a_consumer_that_stands_still_for_half_a_minute(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data") as running:
        running.process.send_signal(signal.SIGSTOP)
        began, dialled = time.monotonic(), 0
        while time.monotonic() - began < STOPPED_S:
            for client in cluster.clients:
                client.begin_connects(500, cluster.vip(), SENDS, RECEIVES)
            dialled += sum(len(client.finish_connects()) for client in cluster.clients)
        running.process.send_signal(signal.SIGCONT)
        cluster.settle()
        running.stop()
    lost = losses(tmp_path / "data")
    say(f"{dialled} connections in {STOPPED_S} s, {lost} lost")
    assert len(never_wrong(tmp_path / "data", cluster)) + lost == dialled


def test_conntrack_flushed_for_long_under_load(cluster: Cluster, tmp_path: Path) -> None:
    for pod in (*cluster.client_pods, *cluster.backend_pods):
        pod.netns.sysctl({"net.ipv4.tcp_retries2": 3, "net.ipv4.tcp_orphan_retries": 2, "net.ipv4.tcp_fin_timeout": 2})
    dialled = 0
    with agent(cluster, tmp_path / "data", "--interval", "1s") as running:
        with again_and_again(lambda: cluster.node.run(["conntrack", "-F"])):
            for _ in range(10):
                for client in cluster.clients:
                    client.begin_connects(500, cluster.vip(), SENDS, 0, timeout=2, rate=200)
                dialled += sum(len(client.finish_connects()) for client in cluster.clients)
        running.stop()
    table = never_wrong(tmp_path / "data", cluster, unaccepted=True)
    lost = losses(tmp_path / "data")
    say(f"{dialled} connections, {lost} lost, {(table.nat == 'unknown').sum()} unknown")
    assert table.conn_id.nunique() + lost == dialled
