"""When an agent counts as alive, and when as ready; a real writer, and clocks that go as they are told."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tracer.clock import WallClock
from tracer.operations import vitals as module
from tracer.operations.vitals import Vitals
from tracer.record import RECORD
from tracer.store.coverage import Run
from tracer.store.dataset import Dataset
from tracer.store.writer import DatasetWriter

RUN = Run("node-1", "0123456789ab", "boot", "6.18.0")


class World:
    """A writer, and a loop that last drained when the test says."""

    def __init__(self, root: Path) -> None:
        self.now = 100.0
        self.root = root
        self.writer = DatasetWriter(root, RUN, WallClock(), rotate_s=300, monotonic=lambda: self.now)
        self.loop: Any = SimpleNamespace(drained_at=100.0)
        self.vitals = Vitals(self.loop, dict, self.writer, None, 300, monotonic=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "data")
    yield made
    made.writer.close()


def test_a_loop_that_drains_is_alive(world: World) -> None:
    assert (world.vitals.alive(), world.vitals.ready()) == ("", "")
    world.now += module.ALIVE_S
    assert world.vitals.alive() == ""
    world.now += 1
    assert world.vitals.alive() == "The ring buffer has not been drained for 31 s: the agent hangs."
    assert world.vitals.ready() == world.vitals.alive()
    world.loop.drained_at = world.now
    assert world.vitals.alive() == ""


def test_what_is_not_published_in_time_is_not_ready_but_alive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "seconds_until_due", 1000.0)  # the timer that fails to come
    world.now = world.loop.drained_at = 100.0 + 300 + module.OVERDUE_S
    assert world.vitals.ready() == ""
    world.now = world.loop.drained_at = world.now + 1
    assert world.vitals.ready() == "Nothing was published for 361 s, every 300 s is meant."
    assert world.vitals.alive() == ""
    world.writer.flush()
    assert world.vitals.ready() == ""


def test_a_writer_that_died_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "data")

    def broken(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(Dataset, "write", broken)
    world.writer.put(np.zeros(3, RECORD))
    world.writer.flush()
    assert world.writer.failed
    assert world.vitals.alive() == world.vitals.ready() == "The writer has died of a defect, see the log."
    assert world.writer.snapshot().oldest_at is None
