"""Fixtures of the store's tests; what they hand out stands in store_world.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_world import EPOCH, Clocks, coverage_rows, make_records, published_ids, visible_files

from tracer.clock import WallClock


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def wall() -> WallClock:
    return WallClock(0, EPOCH)


@pytest.fixture
def records() -> Callable[..., np.ndarray]:
    return make_records


@pytest.fixture
def visible() -> Callable[..., list[Path]]:
    return visible_files


@pytest.fixture
def conn_ids() -> Callable[[Path], list[int]]:
    return published_ids


@pytest.fixture
def coverage() -> Callable[[Path], list[dict[str, object]]]:
    return coverage_rows
