"""Nothing is left behind: after an exception, Ctrl-C, or kill -9 of whoever made the cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest

from tracer.errors import TracerError
from tracer.lab import topology
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until

pytestmark = pytest.mark.needs("netns", "iptables")

PARENT = """
import json, sys
from tracer.lab import child
from tracer.lab.cluster import Cluster
child.die_with(int(sys.argv[1]))
with Cluster(backends=3, clients=2) as cluster:
    cluster.clients[0].hold(5, cluster.vip())
    lasting = cluster.node.popen(["sleep", "infinity"])
    pods = [cluster.node, *(pod.netns for pod in cluster.backend_pods + cluster.client_pods)]
    workers = [worker.pid for worker in cluster.servers + cluster.clients]
    print(json.dumps([[pod.inode for pod in pods], [pod.pid for pod in pods] + workers + [lasting.pid]]), flush=True)
    cluster.clients[1].connect_many(10**9, cluster.vip())
"""


def inhabitants(inodes: set[int], started_before: float) -> set[int]:
    """The processes in these network namespaces, but for younger ones: the kernel reuses inode numbers at once."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
            if (process / "ns/net").stat().st_ino in inodes and ticks / os.sysconf("SC_CLK_TCK") < started_before:
                found.add(int(process.name))
        except OSError:
            continue  # it has ended
    return found


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def pids_of(cluster: Cluster) -> set[int]:
    pods = cluster.backend_pods + cluster.client_pods
    return {cluster.node.pid, *(pod.netns.pid for pod in pods), *(w.pid for w in cluster.servers + cluster.clients)}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_parent_is_the_end_of_everything(how: signal.Signals) -> None:
    links = interfaces()
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=root
    ) as parent:
        try:
            assert parent.stdout
            inodes, pids = json.loads(parent.stdout.readline())
            assert (len(inodes), len(pids)) == (6, 12)
            wait_until(lambda: inhabitants(set(inodes), inf) == set(pids), "every process to be in its namespace")
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            parent.send_signal(how)
            parent.wait(30)
        finally:
            parent.kill()
    wait_until(lambda: not inhabitants(set(inodes), now), "the namespaces to empty")
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "init to reap the orphans")
    assert interfaces() == links


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_process_and_no_zombie(error: type[BaseException]) -> None:
    before, links = children(), interfaces()

    def fail() -> None:
        with Cluster(backends=2, clients=1) as cluster:
            pids = pids_of(cluster)
            assert len(pids) == 7
            assert pids <= children()
            raise error

    with pytest.raises(error):
        fail()
    assert children() == before
    assert interfaces() == links


def test_a_cluster_that_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    monkeypatch.setattr(topology, "_VIRTUAL", {4: "nonsense-{}"})
    with pytest.raises((TracerError, ValueError)), Cluster(backends=1, clients=1):
        pass
    assert children() == before


def test_without_the_right_to_make_namespaces_it_says_so() -> None:
    lines = "from tracer.lab.cluster import Cluster\nwith Cluster(1, 1): pass"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", lines],
        capture_output=True,
        text=True,
        cwd=str(Path(__file__).parents[2]),
        check=False,
    )
    assert "could not be made (Operation not permitted" in done.stderr
    assert "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN" in done.stderr
