"""The lab needs root and network namespaces. A skip is loud, and a failure where VIP_TRACER_REQUIRE=netns."""

import os
from collections.abc import Iterator

import pytest

from tracer.errors import TracerError
from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace


def _netns_works() -> str:
    """Why no namespace can be made here; empty if it can."""
    try:
        with Namespace("probe"):
            return ""
    except TracerError as error:
        return str(error)


@pytest.fixture(scope="session")
def netns() -> None:
    reason = _netns_works()
    if reason and "netns" in os.environ.get("VIP_TRACER_REQUIRE", ""):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=["nft", "legacy"])
def any_backend(request: pytest.FixtureRequest, netns: None) -> Iterator[Cluster]:
    """Three backends, two clients, under each iptables backend."""
    with Cluster(backends=3, clients=2, iptables=request.param) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(netns: None) -> Iterator[Cluster]:
    """Two backends, one client. Tests leave it as they found it: the service "web" on both, nothing held."""
    with Cluster(backends=2, clients=1) as made:
        yield made
