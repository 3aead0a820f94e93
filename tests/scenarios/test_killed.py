"""An agent that is killed, in whatever way and moment: the dataset stays whole, and nothing stays but the dataset."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import kernel_objects
import pytest
from agent_world import PATIENCE_S, published, until
from scenarios.killing import MOMENTS, RECEIVES, SENDS, Run, kill_again_and_again, own

from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2) as made:
        yield made


@pytest.mark.timeout(600)
def test_killed_at_any_moment_the_dataset_stays_whole_and_the_next_run_resumes(
    cluster: Cluster, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201  shown if it fails
    tally = kill_again_and_again(cluster, tmp_path / "data", 1, seed)
    assert tally.kills == len(MOMENTS)
    assert tally.stale_files >= 1


@contextmanager
def harmless(cluster: Cluster) -> Iterator[list[str]]:
    """What the block does leaves no BPF object, mount, setting or event listener behind.

    Gives the beginning of a command that is to be run in a mount namespace of its own: others mount things meanwhile.
    """
    places = [cluster.nodes[0].netns, cluster.client_pods[0].netns]
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "infinity"]) as holder:
        try:
            until(lambda: os.readlink(f"/proc/{holder.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"), "a namespace")

            def settings() -> set[tuple[int, str, str]]:
                return {(place.inode, *one) for place in places for one in kernel_objects.settings(place).items()}

            orphans, mounts = own(kernel_objects.orphans()), kernel_objects.mounts(holder.pid)
            before, listeners = settings(), kernel_objects.listeners(places[0])
            yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
            until(lambda: not own(kernel_objects.orphans()) - orphans, "the kernel to free programs, maps and links")
            assert kernel_objects.mounts(holder.pid) - mounts == set()
            assert settings() ^ before == set()
            assert kernel_objects.listeners(places[0]) == listeners
        finally:
            holder.kill()


def loader_of(run: Run) -> int | None:
    """The process that compiles and attaches, if it is at it."""
    try:
        found = [pid for task in Path(f"/proc/{run.process.pid}/task").iterdir()
                 for pid in (task / "children").read_text().split()]  # fmt: skip
    except OSError:
        found = []
    return int(found[0]) if found else None


def caught_loader(run: Run, at_work: Callable[[int], bool]) -> int | None:
    """The process that compiles and attaches, stopped in the middle of it; None if it was too quick for us."""
    end = time.monotonic() + PATIENCE_S
    while not run.is_ready():
        assert time.monotonic() < end, "waited for the loader"
        child = loader_of(run)
        if child is not None and at_work(child):
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(child, signal.SIGSTOP)
                return child
        time.sleep(0.001)
    return None


def is_attaching(child: int) -> bool:
    """Whether it has loaded a program, which nobody else holds yet."""
    return not {"prog", "link"}.isdisjoint(kind for kind, _ in kernel_objects.held(child))


def is_compiling(child: int) -> bool:
    """Whether it has taken in the compiler."""
    try:
        return "libbcc" in Path(f"/proc/{child}/maps").read_text()
    except OSError:
        return False  # it has ended


def caught(
    cluster: Cluster, output: Path, *options: str, prefix: Sequence[str], at_work: Callable[[int], bool]
) -> tuple[Run, int]:
    """An agent whose loading child is stopped in the middle of it; and that child."""
    for _ in range(10):
        run = Run.start(cluster, output, *options, prefix=prefix)
        child = caught_loader(run, at_work)
        if child is not None:
            return run, child
        run.kill()
    raise AssertionError("it was always too quick")


def kill_all(run: Run) -> None:
    """The agent first: it would end by itself without its loader."""
    run.process.kill()
    for pid in kernel_objects.processes(run.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGKILL", "SIGKILL and the probe", "all at the start"])
def test_whatever_ends_it_nothing_is_left(cluster: Cluster, tmp_path: Path, how: str) -> None:
    options = ("--connect-probe", "on") if "probe" in how else ()
    with harmless(cluster) as apart:
        if how == "all at the start":
            run, _ = caught(cluster, tmp_path / "data", prefix=apart, at_work=lambda child: True)
            kill_all(run)
            assert run.process.wait(30) == -signal.SIGKILL
        else:
            run = Run.start(cluster, tmp_path / "data", "--rotate", "100ms", *options, prefix=apart)
            run.wait_until_ready()
            held = kernel_objects.held(run.process.pid)
            assert {kind for kind, _ in held} == {"prog", "map", "link"}
            assert own(held) == {one for one in held if one[0] != "link"}, "what is looked for afterwards is all"
            assert kernel_objects.listeners(cluster.nodes[0].netns) == 1
            cluster.clients[0].connect_many(50, cluster.vip(), SENDS, RECEIVES)
            run.process.send_signal(getattr(signal, how.partition(" ")[0]))
            assert run.process.wait(60) == (-signal.SIGKILL if "KILL" in how else 0)
        until(lambda: not kernel_objects.processes(run.mark), "all of its processes to end")


@pytest.mark.parametrize("at_work", [is_attaching, is_compiling])
def test_the_loading_child_killed_half_way(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_work: Callable[[int], bool]
) -> None:
    if at_work is is_compiling:
        monkeypatch.delenv("VIP_TRACER_CACHE")
    with harmless(cluster) as apart:
        run, child = caught(cluster, tmp_path / "data", prefix=apart, at_work=at_work)
        os.kill(child, signal.SIGKILL)
        assert run.process.wait(60) == 1
        said = run.said.read_text()
        assert "The loader ended without an answer (exit code -9)" in said
        assert "Traceback" not in said
        assert not published(tmp_path / "data")


class Limit:
    """A memory cgroup of its own (v1 or v2) with a limit; removed at the end."""

    def __init__(self, megabytes: int) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        root, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
        self.path = root / f"vip-tracer-test-{os.getpid()}"
        self.path.mkdir()
        (self.path / name).write_text(f"{megabytes << 20}\n")

    def prefix(self) -> list[str]:
        """Executes a command inside, so that it is there from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def kills(self) -> int:
        lines = (self.path / name for name in ("memory.oom_control", "memory.events"))
        text = "".join(path.read_text() for path in lines if path.exists())
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


@contextmanager
def limited(megabytes: int) -> Iterator[Limit]:
    limit = Limit(megabytes)
    try:
        yield limit
    finally:
        until(lambda: not (limit.path / "cgroup.procs").read_text().split(), "the cgroup to be empty")
        limit.path.rmdir()


@pytest.mark.needs("memory-cgroup")
def test_killed_for_want_of_memory(cluster: Cluster, tmp_path: Path) -> None:
    """By the kernel, as a container that reaches its limit; it begins with less than it needs."""
    with harmless(cluster) as apart, limited(60) as limit:
        run = Run.start(cluster, tmp_path / "data", prefix=[*apart, *limit.prefix()])
        status = run.process.wait(PATIENCE_S)
        kills = limit.kills()
        until(lambda: not kernel_objects.processes(run.mark), "all of its processes to end")
    said = run.said.read_text()
    assert "Traceback" not in said
    # Either is killed, or is refused the memory for its maps, which is a sentence.
    assert (status, kills > 0) == (-signal.SIGKILL, True) or (status == 1 and said.strip()), (status, kills, said)


def test_nothing_that_is_left_goes_unnoticed(cluster: Cluster) -> None:
    """The checks above can fail."""
    with pytest.raises(AssertionError, match="nf_conntrack_acct"), harmless(cluster):
        cluster.node.sysctl({"net.netfilter.nf_conntrack_acct": 0})
    with pytest.raises(AssertionError, match="/mnt"), harmless(cluster) as apart:
        subprocess.run([*apart, "mount", "-t", "tmpfs", "none", "/mnt"], check=True)
