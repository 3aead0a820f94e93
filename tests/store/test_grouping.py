"""Groups are those of a plain dictionary, even where every hash collides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.store import grouping

words = st.integers(0, 5) | st.integers(0, 2**64 - 1)


def check(high: np.ndarray, low: np.ndarray) -> None:
    codes, rows = grouping.group(high, low)
    assert (high[rows][codes] == high).all()
    assert (low[rows][codes] == low).all()
    assert len(rows) == len(set(zip(high.tolist(), low.tolist(), strict=True)))


@given(st.lists(st.tuples(words, words), max_size=300))
def test_equal_rows_share_a_code(pairs: list[tuple[int, int]]) -> None:
    array = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    check(array[:, 0], array[:, 1])


@pytest.mark.parametrize("distinct", [1, 300, 20_000])
def test_many_rows(distinct: int) -> None:
    random = np.random.default_rng(distinct)
    pool = random.integers(0, 2**64, (distinct, 2), dtype=np.uint64)
    array = pool[random.integers(0, distinct, 20_000)]
    check(array[:, 0], array[:, 1])


def test_sorting_takes_over_when_all_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "_SPREAD", np.uint64(0))
    array = np.random.default_rng(0).integers(0, 40, (1000, 2), dtype=np.uint64)
    check(array[:, 0], array[:, 1])
