"""A cluster for the commands that trace one."""

from collections.abc import Iterator

import pytest

from tracer.lab.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three backends and a client; tests leave no connection open."""
    with Cluster(backends=3, clients=1) as made:
        yield made
