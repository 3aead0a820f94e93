"""What a user starts: doctor, which compiles the programs for this kernel, and an agent, as processes of their own.

The other scenarios fork their agents in a guest and share compiled programs (tests/vm/forked.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import agent_world
import pytest
from agent_world import agent, losses, rows

from tracer.kernel import btf
from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def nothing_is_there_yet(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIP_TRACER_CACHE", str(empty))
    monkeypatch.setattr(agent_world, "launch", agent_world.started)


def test_doctor_finds_everything() -> None:
    done = subprocess.run([sys.executable, "-m", "tracer", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSING" not in done.stdout
    assert os.uname().release in done.stdout


def test_a_second_look_is_only_where_tracepoints_may_be_preempted() -> None:
    major = int(os.uname().release.partition(".")[0])
    assert btf.are_tracepoints_preemptible() == (major >= 7)


def test_an_agent_traces(tmp_path: Path) -> None:
    with Cluster(backends=2, clients=1) as cluster:
        with agent(cluster, tmp_path / "data") as running:
            ledger = cluster.clients[0].connect_many(10, cluster.vip(), 100, 300)
            cluster.settle()
            running.stop()
        table = rows(tmp_path / "data")
        assert sorted(table.src_port) == sorted(int(port) for port in ledger["local_port"])
        assert (set(table.nat), set(table.result), losses(tmp_path / "data")) == ({"dnat"}, {"ok"}, 0)
