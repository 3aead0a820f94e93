"""What others do to a node under the agent's eyes: conntrack flushed, a second agent, pids and cgroups used again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, losses, rows
from scenarios.faults import RECEIVES, SENDS, again_and_again, never_wrong
from scenarios.truth import clean, ends

from tracer.kernel.mounts import host_cgroups
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2) as made:
        yield made


def test_conntrack_flushed_again_and_again_under_load(tmp_path: Path) -> None:
    """A connection whose entry is dropped under its handshake is cut off from its backend, and ends by a timeout."""
    patience: dict[str, str | int] = {
        "net.ipv4.tcp_retries2": 3,
        "net.ipv4.tcp_orphan_retries": 2,
        "net.ipv4.tcp_fin_timeout": 2,
    }
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        made.node.run(["conntrack", "-F"])
        flushes += 1

    with Cluster(
        backends=3, clients=2, conntrack=Conntrack(timeouts=Conntrack.SHORT, events=1), syn_retries=2, synack_retries=1
    ) as made:
        for pod in (*made.client_pods, *made.backend_pods):
            pod.netns.sysctl(patience)
        with agent(made, tmp_path / "data", "--interval", "1s") as running:
            # Its entry, at least, is dropped under it. It sends nothing: that might be led to another backend.
            held = made.clients[0].hold(1, made.vip())
            with again_and_again(flush):
                for client in made.clients:
                    # Nothing is waited for: an answer may never come.
                    client.begin_connects(400, made.vip(), SENDS, 0, timeout=2, rate=200)
                ledger = np.concatenate([held, *(client.finish_connects() for client in made.clients)])
            running.stop()
        table = never_wrong(tmp_path / "data", made, unaccepted=True)
    dialled = {own: row for (own, _), row in zip(ends(ledger), ledger, strict=True)}
    assert flushes > 10
    assert len(dialled) == 801
    report = coverage(tmp_path / "data")
    assert table.conn_id.nunique() + losses(tmp_path / "data") == 801
    assert set(zip(table.src_ip, table.src_port, strict=True)) <= set(dialled)
    assert report.kept.sum() > 0, "entries were dropped under their connections"
    closed = table[table.closed]
    assert not closed.conn_id.duplicated().any()
    whole = table.groupby("conn_id").agg({"src_ip": "first", "src_port": "first", "bytes_sent": "sum", "closed": "any"})
    for life in whole[whole.closed].itertuples():
        assert life.bytes_sent <= int(dialled[life.src_ip, life.src_port]["sent"])


def test_two_agents_on_one_node_are_both_right(cluster: Cluster, tmp_path: Path) -> None:
    outputs = tmp_path / "one", tmp_path / "two"
    with agent(cluster, outputs[0], "--interval", "1s"), agent(cluster, outputs[1], "--roles", "client,server"):
        held = cluster.clients[1].hold(5, cluster.vip())["number"]
        cluster.clients[0].connect_many(300, cluster.vip(), SENDS, RECEIVES, rate=200)
        cluster.clients[1].exchange(held, SENDS, RECEIVES)
        cluster.clients[1].release(held)
        cluster.settle()
    told = []
    for output in outputs:
        table = never_wrong(output, cluster)
        clean(output)
        assert table.conn_id.nunique() == 305
        told.append(table.groupby(["src_ip", "src_port"])[["bytes_sent", "bytes_received"]].sum().sort_index())
    pd.testing.assert_frame_equal(*told)
    assert not set(rows(outputs[0]).conn_id) & set(rows(outputs[1]).conn_id)


#: Twice the same: a process of a pid that is asked for, in a cgroup of that name, under a name of its own, connects.
REUSE = """
import ctypes, json, os, socket, sys
where, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
class Arguments(ctypes.Structure):  # struct clone_args, include/uapi/linux/sched.h
    _fields_ = [(name, ctypes.c_uint64) for name in (
        "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
        "set_tid_size", "cgroup")]
def as_pid(pid):
    wanted = (ctypes.c_int * 1)(pid)
    arguments = Arguments(exit_signal=17, set_tid=ctypes.addressof(wanted), set_tid_size=1)
    result = libc.syscall(435, ctypes.byref(arguments), ctypes.sizeof(arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def connect(name, cgroup):
    os.close(0)
    open(f"{cgroup}/cgroup.procs", "w").write("0")
    libc.prctl(15, name.encode(), 0, 0, 0)
    client = socket.create_connection((address, port))
    told = [name, os.getpid(), os.stat(cgroup).st_ino, client.getsockname()[1]]
    client.close()
    os.write(1, json.dumps(told).encode() + b"\\n")
    os._exit(0)
first = 0
for name in ("earlier", "later"):
    os.mkdir(where)
    first = os.fork() if not first else as_pid(first)
    if not first:
        connect(name, where)
    assert os.waitpid(first, 0)[1] == 0
    os.rmdir(where)
"""


@contextmanager
def cgroup_tree() -> Iterator[Path]:
    """A path to the cgroup v2 tree, wherever it is mounted."""
    root = host_cgroups()
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{root}")
    finally:
        os.close(root)


def test_a_pid_and_a_cgroup_that_are_used_again_are_not_mixed_up(cluster: Cluster, tmp_path: Path) -> None:
    pod = cluster.client_pods[0]
    with agent(cluster, tmp_path / "data"), cgroup_tree() as tree:
        where = tree / f"vip-tracer-test-{os.getpid()}"
        process = pod.netns.popen(
            [sys.executable, "-c", REUSE, str(where), *map(str, cluster.vip())],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    told = [json.loads(line) for line in out.splitlines()]
    assert [name for name, *_ in told] == ["earlier", "later"]
    assert told[0][1] == told[1][1], "the same pid"
    assert told[0][2] != told[1][2], "another cgroup of the same name"
    table = rows(tmp_path / "data").set_index("src_port")
    assert len(table) == 2
    for name, pid, cgroup, port in told:
        row = table.loc[port]
        assert (row.comm, row.pid, row.cgroup_id) == (name, pid, cgroup)
