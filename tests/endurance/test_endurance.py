"""Both long runs in short: nothing grows. The long ones are `make endurance`."""

import gc
import tracemalloc
from pathlib import Path

import pytest
from endurance.connections import Rounds, cluster
from endurance.connections import run as run_rounds
from endurance.held import Sample, grown
from endurance.rotations import Day, run


def traced() -> int:
    """Bytes that Python and NumPy hold."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_a_day_of_rotations(tmp_path: Path) -> None:
    """After a third of it, the rest leaves behind less than a single rotation's rows, names and coverage take."""
    day = Day(tmp_path, 36, hours=24, changes=3)
    try:
        run(day, 10, samples=1)
        tracemalloc.start()
        run(day, 2, samples=1)
        before = traced()
        taken = run(day, 24, samples=4)
        after = traced()
    finally:
        tracemalloc.stop()
        day.close()
    day.account()
    assert after - before < 100_000  # bytes; what is remembered for a time varies by about half of that
    assert grown(taken, 20.0) == []


@pytest.mark.needs("bpf", "netns", "conntrack", "iptables")
def test_rounds_of_connections() -> None:
    with cluster() as made:
        rounds = Rounds(made)
        try:
            taken = run_rounds(rounds, 9, samples=3)
            totals = rounds.capture.totals()
        finally:
            rounds.capture.close()
    assert grown(taken, 20.0) == []
    assert set(taken[-1].entries.values()) == {0}
    assert totals["opened"] >= 9 * 28
    assert totals["wrong_translations"] == totals["wrong_backends"] == totals["lost_end"] == 0


def test_growth_is_seen() -> None:
    quiet = [Sample(n, 90.0 + n % 2, 40.0, 30.0, 7, 2, 1000, {"connections": 0}) for n in range(8)]
    assert grown(quiet, 2.0) == []
    loud = [*quiet[:4], *(Sample(n, 95.0, 40.0, 30.0 + n, 7 + n, 2, 1000, {"connections": n}) for n in range(4))]
    assert [one.split(":")[0] for one in grown(loud, 2.0)] == ["resident", "allocated", "descriptors", "connections"]
