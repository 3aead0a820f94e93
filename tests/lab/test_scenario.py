"""The scenarios: whatever the cause, one pod gets about twice the bytes, and nothing but the cause makes it so."""

import pytest

from tracer.errors import UsageError
from tracer.lab import scenario
from tracer.lab.cluster import Cluster

pytestmark = pytest.mark.needs("netns", "iptables")


@pytest.mark.parametrize("cause", scenario.CAUSES)
def test_one_pod_of_six_gets_twice_the_traffic(cause: str) -> None:
    told: list[float] = []
    with Cluster(backends=6, clients=2) as cluster:
        truth = scenario.run(cluster, 1.0, 900, lambda share, what: told.append(share), cause=cause, seed=7)
        dialled = scenario.dialled(cluster)
        rows = [server.ledger() for server in cluster.servers]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert truth.bytes == [int(r["sent"].sum() + r["received"].sum()) for r in rows]
    assert truth.connections == [len(r) for r in rows]
    assert sum(truth.connections) == sum(dialled.values())
    if cause == "none":
        assert truth.culprit is None
        assert truth.ratio < 1.6
    else:
        assert truth.bytes.index(max(truth.bytes)) == truth.culprit
        assert 1.4 < truth.ratio < 2.9  # the kernel draws: 1.6 to 2.5 but for one time in 50,000


def test_the_long_lived_cause_shows_in_bytes_and_not_in_connections() -> None:
    with Cluster(backends=6, clients=2) as cluster:
        truth = scenario.run(cluster, 1.0, 900, cause="long-lived", seed=1)
        history = [change.backends for change in cluster.history]
    mean = sum(truth.connections) / 6
    assert max(truth.connections) < 1.5 * mean
    assert history == [tuple(range(6)), (truth.culprit,), tuple(range(6))]


def test_chance_can_be_repeated_and_nonsense_is_refused() -> None:
    with Cluster(backends=2, clients=2) as cluster:
        first, second = (scenario.run(cluster, 0.25, 100, cause="random", seed=3) for _ in range(2))
        assert (first.cause, first.culprit) == (second.cause, second.culprit)
        assert first.cause != "none"
        with pytest.raises(UsageError, match="choose among random, long-lived"):
            scenario.run(cluster, cause="gremlins")
    with Cluster(backends=1, clients=2) as small, pytest.raises(UsageError, match="two backends"):
        scenario.run(small)
