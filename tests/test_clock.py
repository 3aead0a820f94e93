"""One kernel time is one wall time, whatever the wall clock does afterwards."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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
    before = WallClock._now()
    [now] = wall(WallClock(), before[0])
    assert abs(now - before[1]) < SECOND
