"""One kernel time is one wall time, whatever the wall clock does afterwards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer import clock as clocks
from tracer.clock import MAX_PIECES, TOLERANCE_NS, WallClock

SECOND = 10**9
EPOCH = 1_700_000_000 * SECOND


def wall(clock: WallClock, *boot_ns: int) -> list[int]:
    return clock.wall(np.array(boot_ns, dtype=np.uint64)).tolist()


def test_offset_is_added() -> None:
    assert wall(WallClock(5, EPOCH + 5), 0, 7 * SECOND) == [EPOCH, EPOCH + 7 * SECOND]


def test_drift_within_tolerance_changes_nothing() -> None:
    clock = WallClock(0, EPOCH)
    clock.observe(SECOND, EPOCH + SECOND + TOLERANCE_NS)
    clock.observe(2 * SECOND, EPOCH + 2 * SECOND - TOLERANCE_NS)
    assert wall(clock, 3 * SECOND) == [EPOCH + 3 * SECOND]


def test_a_step_begins_a_piece_and_leaves_the_past() -> None:
    clock = WallClock(0, EPOCH)
    clock.observe(10 * SECOND, EPOCH + 70 * SECOND)
    assert wall(clock, 10 * SECOND - 1, 10 * SECOND) == [EPOCH + 10 * SECOND - 1, EPOCH + 70 * SECOND]


def test_slow_drift_is_followed_once_it_adds_up() -> None:
    clock = WallClock(0, EPOCH)
    for second in range(1, 11):
        clock.observe(second * SECOND, EPOCH + second * (SECOND + TOLERANCE_NS // 4))
    error = wall(clock, 10 * SECOND)[0] - (EPOCH + 10 * (SECOND + TOLERANCE_NS // 4))
    assert abs(error) <= TOLERANCE_NS


def test_pieces_are_bounded_and_old_times_still_convert() -> None:
    clock = WallClock(0, EPOCH)
    for number in range(1, MAX_PIECES + 10):
        clock.observe(number * SECOND, EPOCH + 2 * number * SECOND)
    assert len(clock._starts) <= MAX_PIECES
    assert wall(clock, (MAX_PIECES + 9) * SECOND) == [EPOCH + 2 * (MAX_PIECES + 9) * SECOND]
    assert wall(clock, 0)[0] >= EPOCH


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(-(10**9), 10**9)), max_size=30), st.data())
def test_what_was_converted_never_changes(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    clock, boot = WallClock(0, EPOCH), 1
    asked: dict[int, int] = {}
    for forward, shift in steps:
        time = data.draw(st.integers(0, boot - 1))
        asked.setdefault(time, wall(clock, time)[0])
        boot += forward
        clock.observe(boot, EPOCH + boot + shift)
        boot += 1
    for time, was in asked.items():
        assert wall(clock, time) == [was]


def test_real_clocks() -> None:
    boot, known, _ = clocks._now()
    [now] = wall(WallClock(), boot)
    assert abs(now - known) < SECOND


class Preempted:
    """A machine on which this process loses the CPU now and then, between its first reading and its second."""

    CLOCK_BOOTTIME = 7

    def __init__(self, *lost_ns: int) -> None:
        self.lost, self.boot = list(lost_ns), 0

    def clock_gettime_ns(self, _: int) -> int:
        self.boot += 100
        return self.boot

    def time_ns(self) -> int:
        self.boot += self.lost.pop(0) if self.lost else 0
        return EPOCH + self.boot


def test_a_process_that_loses_the_cpu_sees_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Preempted(SECOND, SECOND)
    monkeypatch.setattr(clocks, "time", machine)
    clock = WallClock()
    assert machine.lost == []
    machine.lost = [10**7, 2 * 10**7]
    clock.observe()
    machine.lost = [10**8 + number for number in range(100)]  # always: what it reads says nothing
    clock.observe()
    assert len(clock._starts) == 1
    assert abs(wall(clock, SECOND)[0] - EPOCH - SECOND) < 1000


def test_a_step_is_seen_by_one_who_loses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Preempted()
    monkeypatch.setattr(clocks, "time", machine)
    clock = WallClock()
    monkeypatch.setattr(machine, "time_ns", lambda: EPOCH + machine.boot + 60 * SECOND)
    clock.observe()
    assert abs(wall(clock, machine.boot + SECOND)[0] - EPOCH - machine.boot - 61 * SECOND) < 1000
