"""A disk that fills up or becomes read-only under the running agent, on a real file system that nobody else sees."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_world import Agent, agent, coverage, losses, rows, until
from scenarios.faults import RECEIVES, SENDS, never_wrong

from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

#: A small file system at the output directory, in a mount namespace of the agent's own that ends with it.
SMALL_DISK = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2) as made:
        yield made


@contextmanager
def on_a_small_disk(cluster: Cluster, output: Path) -> Iterator[tuple[Agent, Path]]:
    """An agent that writes there, and a path by which that is seen from here, also when the agent is gone."""
    output.mkdir()
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", SMALL_DISK, "sh", str(output)]
    with agent(cluster, output, "--rotate", "200ms", prefix=prefix) as running:
        inside = os.open(f"/proc/{running.process.pid}/root{output}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert not list(output.iterdir()), "its file system is its own"
            yield running, Path(f"/proc/self/fd/{inside}")
        finally:
            os.close(inside)


def fill(running: Agent, where: Path) -> Callable[[], object]:
    """Leaves not a byte; returns what ends that."""
    ballast = where / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        all(iter(lambda: file.write(bytes(4096)), None))
    return ballast.unlink


def protect(running: Agent, where: Path) -> Callable[[], object]:
    """Makes it read-only, for whoever opens something from now on; returns what ends that."""

    def mount(*what: str, check: bool = True) -> bool:
        enter = ["nsenter", f"--mount=/proc/{running.process.pid}/ns/mnt"]
        return subprocess.run([*enter, *what, str(running.output)], check=check).returncode == 0

    def protected() -> bool:
        # A second mount of the same over the first: that one cannot change, because the agent's lock is open there. Nor
        # can this one if the agent opened a file in between.
        mount("mount", "--bind", str(running.output))
        return mount("mount", "-o", "remount,bind,ro", check=False) or not mount("umount", "--lazy")

    until(protected, "a moment in which the agent writes nothing")
    return lambda: mount("umount", "--lazy")


@pytest.mark.parametrize(
    ("break_it", "reason"), [(fill, "No space left on device"), (protect, "Read-only file system")]
)
def test_tracing_goes_on_and_what_finds_no_place_is_counted(
    cluster: Cluster, tmp_path: Path, break_it: Callable[[Agent, Path], Callable[[], object]], reason: str
) -> None:
    first, second = cluster.clients
    with on_a_small_disk(cluster, tmp_path / "data") as (running, inside):
        dialled = len(first.connect_many(100, cluster.vip(), SENDS, RECEIVES))
        until(lambda: list(inside.rglob("connections/**/[!.]*.parquet")), "a first file")
        mend = break_it(running, inside)

        def failing() -> bool:
            nonlocal dialled
            dialled += len(second.connect_many(50, cluster.vip(), SENDS, RECEIVES))
            return "cannot write to" in running.said

        until(failing, "the agent to say that it cannot write")
        dialled += len(second.connect_many(500, cluster.vip(), SENDS, RECEIVES))
        cluster.settle()
        assert "works again;" not in running.said
        mend()
        until(lambda: "works again;" in running.said, "the agent to say that it can write again")
        dialled += len(first.connect_many(100, cluster.vip(), SENDS, RECEIVES))
        cluster.settle()
        running.stop()
        table, report = rows(inside), coverage(inside)
        never_wrong(inside, cluster)
        lost = losses(inside)
        assert not list(inside.rglob(".*.tmp"))
    assert reason in running.said
    assert running.said.count("cannot write to") == 1, "said once"
    assert report.opened.sum() == report.closed.sum() == dialled, "tracing went on"
    assert lost == report.lost_writer.sum() >= 50
    assert len(table) + lost == report.emitted.sum() == dialled
    assert len(table) == report.written.sum() > 100
    # Nothing of the time between is missing in the account.
    assert list(report.started[1:]) == list(report.ts[:-1])


def test_a_disk_budget_is_kept_and_what_it_cost_is_counted(cluster: Cluster, tmp_path: Path) -> None:
    output, dialled = tmp_path / "data", 0
    with agent(cluster, output, "--rotate", "200ms", "--disk-budget", "400KiB") as running:

        def deleted() -> bool:
            nonlocal dialled
            dialled += len(cluster.clients[0].connect_many(300, cluster.vip(), SENDS, RECEIVES))
            return "--disk-budget" in running.said

        until(deleted, "the oldest files to go")
        cluster.settle()
        running.stop()
    gone = int(coverage(output).lost_expired.sum())
    assert gone > 0
    assert len(rows(output)) + gone == dialled
    assert losses(output) == gone
    assert sum(path.stat().st_blocks * 512 for path in output.rglob("*.parquet")) <= 400 << 10
