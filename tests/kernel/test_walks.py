"""Which namespaces are walked, and how often."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tracer.agent import Rhythm, interim_period
from tracer.kernel import capture as module
from tracer.kernel import netns
from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.record import Role


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=1, clients=1) as made:
        yield made


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The namespaces that have been walked, by inode, as the test goes on."""
    noted: list[int] = []
    entered = netns.entered

    def note(path: str, *inode: int) -> AbstractContextManager[None]:
        noted.extend(inode)
        return entered(path, *inode)

    monkeypatch.setattr(netns, "entered", note)
    return noted


def options(cluster: Cluster, **more: object) -> Options:
    pod = cluster.client_pods[0].netns
    given = {"node_netns": cluster.node.path, "only_netns": (cluster.node.path, pod.path)}
    return Options(**(given | more))  # type: ignore[arg-type]


@pytest.mark.needs("bpf", "netns", "conntrack", "iptables")
def test_a_connection_without_rows_is_not_asked_for_again_and_again(cluster: Cluster, walked: list[int]) -> None:
    client, pod = cluster.clients[0], cluster.client_pods[0].netns.inode
    with Capture(options(cluster, interval_s=2, only_virtual=True)) as capture:
        walked.clear()
        held = client.hold(1, (cluster.backend_pods[0].ips[4], 8080))["number"]
        time.sleep(2.1)
        capture.interim(capture.drain)
        assert walked == [pod]
        capture.interim(capture.drain)
        assert walked == [pod], "its interval began with the first walk"
        client.release(held)


@pytest.mark.needs("bpf", "netns", "conntrack", "iptables")
def test_a_connect_that_hangs_claims_its_translation_before_its_interval_is_over(
    cluster: Cluster, walked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, pod = cluster.clients[0], cluster.client_pods[0].netns.inode
    cluster.backend_pods[0].netns.run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "8080", "-j", "DROP"])
    with Capture(options(cluster, interval_s=600)) as capture:
        walked.clear()
        client.begin_connects(1, cluster.vip(), 0, 0, timeout=60)
        wait_until(lambda: capture.totals()["open_connections"] == 1, "a connect")
        monkeypatch.setattr(module, "_HANGS_NS", 10**12)
        capture.interim(capture.drain)
        assert walked == [], "it may be answered yet"
        monkeypatch.setattr(module, "_HANGS_NS", 0)
        capture.interim(capture.drain)
        assert walked == [pod]
        capture.interim(capture.drain)
        assert walked == [pod], "once is enough"
        cluster.backend_pods[0].netns.run(["iptables", "-F", "INPUT"])  # its SYN is sent again soon
        client.finish_connects()
        rows = [capture.drain()]
        wait_until(lambda: bool(rows.append(capture.drain())) or sum(map(len, rows)) > 0, "its row")
        assert [row["role"] for taken in rows for row in taken] == [Role.CLIENT]


def test_walks_take_no_more_than_their_share_of_the_time() -> None:
    assert interim_period(60, 0.001) == 5
    assert interim_period(1, 0) == 0.25
    assert interim_period(3600, 0) == 10
    assert interim_period(60, 2) == 40, "a twentieth of the time"


def test_who_prints_for_nobody_ends() -> None:
    """`observe | head`: not a passing want of something, to be tried again."""

    def printed() -> None:
        raise BrokenPipeError

    rhythm = Rhythm(0.0)
    rhythm.every(lambda: 1.0, printed)
    with pytest.raises(BrokenPipeError):
        rhythm.run(2.0)
