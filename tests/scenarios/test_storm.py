"""A short storm at the machine's limit; `python -m tests.bench.storm` has the long one, with figures."""

import pytest

from tests.bench.storm import storm

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


def test_a_storm_breaks_no_connection_and_loses_none_uncounted() -> None:
    window = storm(3, True)
    assert window.dialled > 1000
    assert not window.failed
    assert window.uncounted == 0
