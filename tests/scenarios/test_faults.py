"""When things break: nothing corrupt, nothing wrong, and losses equal to the count."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_world import agent, coverage, losses, rows, scaled, until
from scenarios.faults import RECEIVES, SENDS, again_and_again, never_wrong

from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2) as made:
        yield made


def test_a_consumer_that_stands_still_loses_by_count(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data", "--ring-bytes", "128KiB") as running:
        cluster.clients[0].connect_many(50, cluster.vip(), SENDS, RECEIVES)
        running.process.send_signal(signal.SIGSTOP)
        ledger = cluster.clients[1].connect_many(3000, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
        running.process.send_signal(signal.SIGCONT)
        cluster.clients[0].connect_many(50, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
        running.stop()
    assert "stopped (SIGTERM)" in running.said
    assert len(ledger) == 3000
    lost = losses(tmp_path / "data")
    assert lost == coverage(tmp_path / "data").lost_ring.sum()
    assert 1000 < lost < 3000
    assert len(rows(tmp_path / "data")) + lost == 3100
    never_wrong(tmp_path / "data", cluster)


def test_events_turned_off_while_it_runs(cluster: Cluster, tmp_path: Path) -> None:
    setting = "net.netfilter.nf_conntrack_events"
    on = cluster.node.run(["sysctl", "-n", setting]).strip()  # 2, "while somebody listens"; before 5.19 it was 1
    with agent(cluster, tmp_path / "data") as running:
        for events in (on, "0", on):
            cluster.node.sysctl({setting: events})
            cluster.clients[0].connect_many(100, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
        running.stop()
    table = rows(tmp_path / "data").sort_values("started")
    assert len(table) == 300
    assert list(table.nat) == ["dnat"] * 100 + ["unknown"] * 100 + ["dnat"] * 100
    assert coverage(tmp_path / "data").unresolved.sum() == 100
    never_wrong(tmp_path / "data", cluster)


def test_the_output_directory_deleted_under_load(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "data"
    with agent(cluster, output, "--rotate", "300ms") as running:
        cluster.clients[0].connect_many(100, cluster.vip(), SENDS, RECEIVES)
        until(lambda: list(output.rglob("[!.]*.parquet")), "a first file")

        def gone() -> bool:
            shutil.rmtree(output, ignore_errors=True)  # the agent may put a file into what is being emptied
            return not output.exists()

        until(gone, "the directory to be gone")

        def there_again() -> bool:
            cluster.clients[0].connect_many(20, cluster.vip(), SENDS, RECEIVES)
            return bool(list(output.glob("connections/**/[!.]*.parquet")))

        until(there_again, "the directory to be there again")
        shown = cluster.clients[1].connect_many(100, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
        running.stop()
    table = rows(output)
    mine = table[table.src_ip == cluster.client_pods[1].ips[4]]
    assert sorted(mine.src_port) == sorted(int(port) for port in shown["local_port"])
    never_wrong(output, cluster)


def test_namespaces_that_come_and_go_under_load(cluster: Cluster, tmp_path: Path) -> None:
    made = 0

    def come_and_go() -> None:
        nonlocal made
        with Namespace("brief"):
            made += 1

    with agent(cluster, tmp_path / "data", "--interval", "1s") as running:
        before = running.resident()
        with again_and_again(come_and_go):
            ledger = [client.connect_many(2000, cluster.vip(), SENDS, RECEIVES, rate=500) for client in cluster.clients]
        cluster.settle()
        grown = running.resident() - before
        running.stop()
    assert made > 10
    assert grown < 60
    # One that a busy machine lets stand for an interval has two rows.
    assert rows(tmp_path / "data").conn_id.nunique() + losses(tmp_path / "data") == sum(map(len, ledger))
    never_wrong(tmp_path / "data", cluster)


def test_many_connections_are_open_at_the_start(tmp_path: Path) -> None:
    with Cluster(backends=6, clients=4) as cluster:
        for client in cluster.clients:
            client.hold(scaled(2500), cluster.vip())
        with agent(cluster, tmp_path / "data") as running:
            running.stop()
        table = rows(tmp_path / "data")
        assert len(table) == scaled(10_000)
        assert not table.opened.any()
        assert set(table.nat) == {"dnat"}
        assert losses(tmp_path / "data") == 0
        never_wrong(tmp_path / "data", cluster)
