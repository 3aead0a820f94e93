"""A cluster for the commands that trace one."""

import signal
from collections.abc import Iterator

import pytest

from tracer.lab.cluster import Cluster


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Commands that hold the stop signals do so for their process; here that is the tests', whose children inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three backends and a client; tests leave no connection open."""
    with Cluster(backends=3, clients=1) as made:
        yield made
