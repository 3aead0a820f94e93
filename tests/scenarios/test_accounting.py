"""`--enable-accounting`: the one setting that the agent may be asked to change, in the node's namespace alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_world import agent, rows
from command_world import run
from scenarios.truth import lives, settled

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SETTING = "net.netfilter.nf_conntrack_acct"
SENDS, RECEIVES = 100, 300


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=2, clients=1, outside=True, conntrack=Conntrack(accounting=False, events=1)) as made:
        made.add_service("np", node_port=30000)
        yield made


def setting(cluster: Cluster) -> str:
    return cluster.node.run(["sysctl", "-n", SETTING]).strip()


def forwarded(cluster: Cluster, output: Path, *options: str) -> tuple[str, int]:
    """What the agent said, and what conntrack counted of five connections from outside, as their rows tell it."""
    with agent(cluster, output, *options) as running:
        cluster.outside_client.connect_many(5, cluster.node_port("np"), SENDS, RECEIVES)
        settled(cluster.nodes[0].netns)
        cluster.node.run(["conntrack", "-F"])
        running.stop()
    table = lives(rows(output))
    assert (len(table), set(table.role)) == (5, {"forwarded"})
    assert table.packets_sent.isna().all() == table.ip_bytes_sent.isna().all()
    return running.said, int(table.ip_bytes_sent.fillna(0).sum())


def test_it_is_left_alone_unless_asked_for_and_then_set_said_and_left(cluster: Cluster, tmp_path: Path) -> None:
    here = Path("/proc/sys", *SETTING.split(".")).read_text()
    said, counted = forwarded(cluster, tmp_path / "without")
    assert (SETTING in said, counted, setting(cluster)) == (False, 0, "0")

    said, counted = forwarded(cluster, tmp_path / "with", "--enable-accounting")
    assert f"{SETTING} was 0 and is 1 now, in the node's network namespace" in said
    assert counted > 5 * SENDS
    assert setting(cluster) == "1", "it stays"

    said, counted = forwarded(cluster, tmp_path / "again", "--enable-accounting")
    assert (SETTING in said, counted > 5 * SENDS) == (False, True)
    assert Path("/proc/sys", *SETTING.split(".")).read_text() == here, "another namespace's is not touched"


def test_doctor_says_what_is_missing_without_it_and_what_it_costs(cluster: Cluster) -> None:
    for expected in ("off", SETTING + " = 1"):
        done = run("doctor", "--netns", cluster.node.path)
        line = next(line for line in done.stdout.splitlines() if "conntrack accounting" in line)
        assert expected in line
        assert ("--enable-accounting" in done.stdout) == (expected == "off")
        assert ("32 bytes an entry" in done.stdout) == (expected == "off")
        cluster.node.sysctl({SETTING: 1})


def test_a_setting_that_may_not_be_written_is_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    """As in a container whose /proc/sys is read-only."""
    command = ["agent", "--output", tmp_path / "data", "--netns", cluster.node.path, "--enable-accounting"]
    script = 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = run(*command, prefix=prefix)
    assert done.returncode == 1
    assert f"{SETTING} cannot be set (Read-only file system)" in done.stderr
    assert "leave it out" in done.stderr
    assert "Traceback" not in done.stderr
    assert setting(cluster) == "0"
