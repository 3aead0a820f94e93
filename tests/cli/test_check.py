"""``vip-tracer check``: another process judges a running agent by its maps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from agent_world import agent
from command_world import run, sentence
from privilege import nobody

from tracer.kernel import libbpf, witness
from tracer.kernel.maps import TRANSLATION
from tracer.lab.cluster import Cluster
from tracer.record import TUPLE

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


def test_a_running_agent(tmp_path: Path) -> None:
    with Cluster(backends=2, clients=1) as cluster, agent(cluster, tmp_path / "data") as running:
        client, which = cluster.clients[0], ("check", "--pid", str(running.process.pid))
        held = client.hold(6, cluster.vip())["number"]
        done = run(*which)
        assert done.returncode == 0, done.stderr
        assert [line.split() for line in done.stdout.splitlines()] == [
            ["compared", "agreeing", "missing", "stale", "wrong"],
            ["translations", "6", "6", "0", "0", "0"],
            ["connections", "6", "6", "0", "0", "-"],
            ["backends", "6", "6", "0", "-", "0"],
        ]
        assert done.stderr == ""

        (maps,) = [one for one in witness.running() if one.pid == running.process.pid]
        fd = libbpf.map_by_id(maps.ids["vt_translations"])
        keys, values = libbpf.map_items(fd, TUPLE, TRANSLATION)
        libbpf.map_delete(fd, keys[0].tobytes())
        done = run(*which, "-o", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["accounts"]["translations"] == {
            "compared": 6, "agreeing": 5, "missing": 1, "stale": 0, "wrong": 0,
        }  # fmt: skip
        (lacking,) = found["disagreements"]
        vip, ports = cluster.vip(), {int(key["src_port"]) for key in keys}
        assert lacking["dst"] == f"{vip[0]}:{vip[1]}"
        assert int(lacking["src"].rsplit(":", 1)[1]) in ports
        assert lacking["there"] in {f"{pod.ips[4]}:8080" for pod in cluster.backend_pods}

        bent = values[1:2].copy()
        bent["backend_port"] = 9
        libbpf.map_update(fd, keys[1].tobytes(), bent.tobytes())
        os.close(fd)
        done = run(*which)
        assert done.returncode == 1
        assert "wrong translation: tcp " in done.stdout
        assert "missing translation: tcp " in done.stdout
        assert "What the agent holds is not what the kernel says" in done.stderr
        client.release(held)


def test_a_process_that_traces_nothing() -> None:
    said = sentence(run("check", "--pid", str(os.getpid())), 3)
    assert said.startswith(f"vip-tracer: Process {os.getpid()} does not trace this node")


def test_without_privilege() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tracer", "check"], capture_output=True, text=True, check=False, preexec_fn=nobody
    )
    assert done.returncode == 1
    assert "Only root may look into a running agent" in done.stderr
    assert "Traceback" not in done.stderr
