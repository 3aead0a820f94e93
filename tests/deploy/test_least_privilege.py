"""The agent with exactly the overlay's capabilities: it traces all that it does with all of them, and none is spare."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from agent_world import agent, coverage, losses, published, rows, until
from command_world import command, environment
from deploy.manifests import container
from scenarios.truth import check

from tracer.kernel.checks import CAPABILITIES
from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

ADDED = tuple(container("least-privilege", "agent")["securityContext"]["capabilities"]["add"])
#: The agent without its own look at what it is allowed to do: what the kernel says counts here.
UNCHECKED = "from tracer.kernel import checks; checks.CAPABILITIES = {}; from tracer.cli import main; main()"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A client in a pod and one outside, a TCP and a UDP service."""
    with Cluster(backends=2, clients=1, hosts=1) as made:
        made.add_service("dns", protocol="udp", port=53, target_port=8081)
        yield made


def only(capabilities: tuple[str, ...], netns: str) -> list[str]:
    """Starts a program in a namespace as root with these capabilities alone, which it can never exceed."""
    kept = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
    return [
        "nsenter", f"--net={netns}", "setpriv", f"--bounding-set={kept}", "--inh-caps=-all", "--no-new-privs",
    ]  # fmt: skip


def test_the_overlay_has_what_the_agent_demands_and_no_more() -> None:
    security = container("least-privilege", "agent")["securityContext"]
    assert {f"CAP_{name}" for name in ADDED} == set(CAPABILITIES)
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["allowPrivilegeEscalation"] is False


def tcp(output: Path) -> pd.DataFrame:
    """What is published of TCP so far."""
    if not published(output):
        return pd.DataFrame({"opened": pd.Series(dtype=bool)})
    table = rows(output)
    return table[table.protocol == "tcp"]


def test_it_traces_everything(cluster: Cluster, tmp_path: Path) -> None:
    """Sockets found in pods at the start, and their interim rows; both tracepoints; conntrack's stream and dump; the
    cgroup program, by which UDP rows have a process; the connect probe, on a tracefs of its own.
    """
    client = cluster.clients[0]
    numbers = client.hold(3, cluster.vip())["number"]
    started = only(ADDED, cluster.node.path)
    options = "--interval", "2s", "--rotate", "500ms", "--connect-probe", "on"
    with agent(cluster, tmp_path / "data", *options, prefix=started) as running:
        ledger = client.connect_many(30, cluster.vip(), 100, 300)
        datagrams = client.datagrams(5, cluster.vip("dns"), 100, 300)
        until(lambda: (~tcp(tmp_path / "data").opened).any(), "a row of what was held before the start")
        running.stop()
    client.release(numbers)
    table = rows(tmp_path / "data")
    assert "WARNING" not in running.said
    assert losses(tmp_path / "data") == 0
    said = coverage(tmp_path / "data")
    assert said.adopted.sum() == 3
    programs = set(said.programs.iloc[-1].split(","))
    assert {"cgroup/sock_release", "tracepoint/sys_enter_connect", "iter/tcp", "socket_filter/ctnetlink"} <= programs
    connections = tcp(tmp_path / "data")
    whole = connections[connections.opened]
    check(whole, ledger, cluster.servers)
    assert whole.pid.notna().all()
    held = connections[~connections.opened]
    assert held.conn_id.nunique() == 3
    assert len(held) > 3, "interim rows"
    assert set(held.nat) == {"dnat"}
    flows = table[table.protocol == "udp"]
    assert set(flows.role) == {"client"}
    assert flows.pid.notna().all()
    assert sorted(flows[flows.opened].src_port) == sorted(int(port) for port in datagrams["local_port"])


@pytest.mark.parametrize("without", ADDED)
def test_none_can_be_left_out(without: str, cluster: Cluster, tmp_path: Path) -> None:
    kept = tuple(name for name in ADDED if name != without)
    pod = cluster.client_pods[0].netns.path
    options = ["agent", "--output", str(tmp_path / "data"), "--only-netns", pod, "--duration", "1s"]
    options += ["--connect-probe", "on"]
    started = only(kept, cluster.node.path)
    checked, unchecked = (
        subprocess.run(
            [*started, *program, *options], env=environment(), capture_output=True, text=True, check=False, timeout=60
        )
        for program in (command(), [sys.executable, "-c", UNCHECKED])
    )
    for done in (checked, unchecked):
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
    assert f"privilege: running as root without CAP_{without}. Give the container" in checked.stderr
    assert "privilege" not in unchecked.stderr
    assert "not permitted" in unchecked.stderr or "Permission denied" in unchecked.stderr
