"""`vip-tracer agent` as a process: what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_world import Talk, command, environment, namespaces, run, sentence

from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.store import reader

pytestmark = pytest.mark.needs("bpf", "netns", "iptables")


@contextmanager
def running(cluster: Cluster, output: Path, *more: str) -> Iterator[tuple["subprocess.Popen[str]", Talk]]:
    """An agent that is ready. It is killed at the end if it still runs."""
    output.mkdir(exist_ok=True)
    ready, talk = output.parent / "ready", Talk(output.parent / "stderr")
    with (
        talk.path.open("w") as stderr,
        subprocess.Popen(
            command("agent", "--output", output, "--node", "n", "--ready-file", ready, *namespaces(cluster), *more),
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(),
        ) as process,
    ):  # fmt: skip
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None, "the agent to be ready")
            assert process.poll() is None, talk.path.read_text()
            yield process, talk
        finally:
            process.kill()


def ports(root: Path) -> list[int]:
    return sorted(p for path in reader.files(root) for b in reader.batches(path) for p in b["src_port"].to_pylist())


def test_a_second_agent_is_refused_and_the_first_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    with running(cluster, tmp_path / "data") as (first, talk):
        before = cluster.clients[0].connect_many(2, cluster.vip())
        ready = tmp_path / "ready"
        second = run("agent", "--output", tmp_path / "data", "--node", "n", "--ready-file", ready, *namespaces(cluster))
        assert "another agent is writing to" in sentence(second, 1)
        assert ready.read_text() == f"{first.pid}\n"
        after = cluster.clients[0].connect_many(3, cluster.vip())
        cluster.settle()
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=30)
    assert (first.returncode, out) == (0, ""), talk.path.read_text()
    assert "5 rows written, nothing lost" in talk
    assert not ready.exists()
    assert ports(tmp_path / "data") == sorted(int(row["local_port"]) for rows in (before, after) for row in rows)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_no_thread_is_left_that_a_stop_signal_would_kill(how: signal.Signals, cluster: Cluster, tmp_path: Path) -> None:
    """But for the main one, which waits for it: else the signal may find it at work and take another."""
    with running(cluster, tmp_path / "data") as (process, talk):
        masks = {
            int(thread.name): int(
                next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16
            )
            for thread in Path(f"/proc/{process.pid}/task").iterdir()
            if (status := (thread / "status").read_text())
        }
        del masks[process.pid]
        assert len(masks) >= 2
        for mask in masks.values():
            assert mask >> (how - 1) & 1, masks
        process.send_signal(how)
        assert process.wait(30) == 0
        assert f"stopped ({how.name})" in talk


def test_it_stops_by_itself_and_takes_its_options_from_the_environment(cluster: Cluster, tmp_path: Path) -> None:
    pods = [cluster.node, *(pod.netns for pod in cluster.client_pods)]
    variables = {
        "VIP_TRACER_AGENT_OUTPUT": str(tmp_path / "data"), "VIP_TRACER_AGENT_NODE": "elsewhere",
        "VIP_TRACER_AGENT_NETNS": cluster.node.path, "VIP_TRACER_AGENT_DURATION": "100ms",
        "VIP_TRACER_AGENT_ONLY_NETNS": " ".join(pod.path for pod in pods),
        "VIP_TRACER_AGENT_READY_FILE": str(tmp_path / "ready"), "VIP_TRACER_AGENT_INTERVAL": "250ms",
    }  # fmt: skip
    (tmp_path / "ready").write_text("of one that was killed")
    done = run("agent", env=variables)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "stopped (duration)" in done.stderr
    assert not (tmp_path / "ready").exists()
    (path,) = reader.files(tmp_path / "data", "coverage")
    (row, *_) = (row for batch in reader.batches(path, "coverage") for row in batch.to_pylist())
    assert (row["node"], row["interval_s"]) == ("elsewhere", 0), json.dumps(row, default=str)


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/nowhere"])
def test_an_output_that_cannot_be_written_is_a_sentence(where: str, cluster: Cluster) -> None:
    said = sentence(run("agent", "--output", where, *namespaces(cluster)), 1)
    assert f"cannot write to {where}" in said
    assert "--output" in said


def test_a_ready_file_that_cannot_be_written_is_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    where = tmp_path / "nowhere" / "ready"
    done = run("agent", "--output", tmp_path / "data", "--ready-file", where, *namespaces(cluster))
    assert f"cannot write {where}" in sentence(done, 1)
    assert os.listdir(tmp_path / "data")  # it had begun, and ended in good order
