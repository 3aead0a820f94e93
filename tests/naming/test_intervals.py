import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.naming import intervals
from tracer.naming.intervals import FOREVER, Held, Intervals, timeline

HELD = st.builds(
    lambda begin, length, value: Held(begin, FOREVER if length is None else begin + length, value),
    st.integers(0, 50),
    st.none() | st.integers(1, 30),
    st.sampled_from("abc"),
)


@given(st.lists(HELD, max_size=8), st.integers(-5, 100))
def test_a_timeline_says_what_a_scan_of_the_intervals_says(held: list[Held[str]], moment: int) -> None:
    found = timeline(held, lambda values: ",".join(sorted(values)) or None)
    assert found.at(moment) == (",".join(sorted(h.value for h in held if h.begin <= moment < h.end)) or None)
    assert list(found.breaks) == sorted(set(found.breaks))
    assert all(a != b for a, b in zip(found.answers, found.answers[1:], strict=False))


def test_what_is_gone_is_kept_for_a_while_and_then_forgotten() -> None:
    kept: Intervals[str, str] = Intervals(keep_ns=100)
    kept.add("k", "a", 10)
    kept.end("k", "a", 20)
    kept.forget(120)
    assert [(h.begin, h.end) for h in kept.of("k")] == [(10, 20)]
    kept.forget(121)
    assert kept.of("k") == ()
    assert list(kept) == []
    assert kept.forgotten_early == 0


def test_what_lives_is_not_forgotten() -> None:
    kept: Intervals[str, str] = Intervals(keep_ns=100)
    kept.add("k", "a", 10)
    kept.forget(10**18)
    assert len(kept.living("k")) == 1


def test_what_ends_before_it_began_never_was() -> None:
    kept: Intervals[str, str] = Intervals(keep_ns=100)
    kept.add("k", "a", 10)
    kept.end("k", "a", 5)
    kept.add("k", "b", 10, 10)
    assert kept.of("k") == ()
    kept.forget(10**6)


def test_too_much_is_forgotten_before_its_time_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "MAX_ENDED", 5)
    kept: Intervals[int, str] = Intervals(keep_ns=10**9)
    for i in range(12):
        kept.add(i, "a", i, i + 1)
    kept.forget(12)
    assert [key for key, _ in kept] == [7, 8, 9, 10, 11]
    assert kept.forgotten_early == 7


def test_one_key_cannot_grow_without_bound() -> None:
    kept: Intervals[str, int] = Intervals(keep_ns=10**9)
    for i in range(10 * intervals.MAX_PER_KEY):
        kept.add("k", i, i)
        kept.end("k", i, i + 1)
    assert len(kept.of("k")) == intervals.MAX_PER_KEY
    assert kept.of("k")[-1].value == 10 * intervals.MAX_PER_KEY - 1
    assert kept.forgotten_early == 9 * intervals.MAX_PER_KEY
    kept.forget(2 * 10**9)
    assert kept.of("k") == ()
