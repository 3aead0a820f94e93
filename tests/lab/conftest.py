"""Clusters for the lab's own tests."""

from collections.abc import Iterator

import pytest

from tracer.lab.cluster import Cluster


@pytest.fixture(scope="module", params=["nft", "legacy"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three backends, two clients, under each iptables backend."""
    with Cluster(backends=3, clients=2, iptables=request.param) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two backends, one client. Tests leave it as they found it: the service "web" on both, nothing held."""
    with Cluster(backends=2, clients=1) as made:
        yield made
