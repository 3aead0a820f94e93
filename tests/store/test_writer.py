"""The account holds in every order of events, and the agent is never made to wait."""

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import EPOCH, RUN, make_records, published_ids

from tracer.clock import WallClock
from tracer.errors import TracerError
from tracer.record import RECORD
from tracer.store.dataset import Dataset
from tracer.store.writer import DatasetWriter


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk on which a write takes until the event is set."""
    go = threading.Event()
    write = Dataset.write

    def wait(self: Dataset, rows: object) -> None:
        go.wait()
        write(self, rows)

    monkeypatch.setattr(Dataset, "write", wait)
    return go


def test_close_publishes_everything(tmp_path, wall, records, conn_ids, coverage) -> None:
    writer = DatasetWriter(tmp_path, RUN, wall, lambda: {"opened": 25}, group_rows=10)
    assert writer.put(records(25))
    writer.close()
    assert conn_ids(tmp_path) == list(range(1, 26))
    counts = writer.snapshot()
    assert (counts.emitted, counts.written, counts.lost, counts.queued, counts.unpublished) == (25, 25, 0, 0, 0)
    [row] = coverage(tmp_path)
    assert (row["opened"], row["emitted"], row["written"], row["first"], row["last"]) == (25, 25, 25, True, True)
    assert not [path for path in tmp_path.rglob(".*") if path.suffix == ".tmp"]


def test_put_takes_a_copy(tmp_path, wall, records, conn_ids) -> None:
    writer = DatasetWriter(tmp_path, RUN, wall)
    ring = records(3)
    writer.put(ring)
    ring["conn_id"] = 99
    writer.close()
    assert conn_ids(tmp_path) == [1, 2, 3]


def test_flush_publishes_what_was_put(tmp_path, wall, records, conn_ids) -> None:
    writer = DatasetWriter(tmp_path, RUN, wall)
    writer.put(records(3))
    writer.flush()
    assert conn_ids(tmp_path) == [1, 2, 3]
    writer.put(records(2, first=4))
    assert writer.snapshot().unpublished == 2
    writer.close()
    writer.close()
    writer.flush()
    assert conn_ids(tmp_path) == [1, 2, 3, 4, 5]


def test_the_oldest_row_that_is_not_published(tmp_path, wall, records) -> None:
    now = [10.0]
    writer = DatasetWriter(tmp_path, RUN, wall, monotonic=lambda: now[0])
    assert writer.snapshot().oldest_at is None
    writer.put(records(0))
    assert writer.snapshot().oldest_at is None
    writer.put(records(3))
    now[0] = 12.0
    writer.put(records(3, first=4))
    assert writer.snapshot().oldest_at == 10.0
    writer.flush()
    assert writer.snapshot().oldest_at is None
    assert writer.snapshot().published.at == 12.0
    writer.put(records(1, first=7))
    assert writer.snapshot().oldest_at == 12.0
    writer.close()
    assert writer.snapshot().oldest_at is None


def test_rows_that_come_while_others_are_published_are_not_the_oldest(tmp_path, wall, records, stuck) -> None:
    now = [10.0]
    writer = DatasetWriter(tmp_path, RUN, wall, monotonic=lambda: now[0], group_rows=2)
    writer.put(records(2))  # which the disk holds up
    number = writer.ask_flush()
    assert writer.ask_flush() == number + 1
    now[0] = 20.0
    writer.put(records(1, first=3))
    assert writer.snapshot().oldest_at == 10.0
    stuck.set()
    writer.close()
    assert published_ids(tmp_path) == [1, 2, 3]


def test_a_full_queue_refuses_whole_chunks_and_counts_them(tmp_path, wall, records, stuck, conn_ids, coverage) -> None:
    writer = DatasetWriter(tmp_path, RUN, wall, group_rows=10, pending_bytes=30 * RECORD.itemsize)
    assert [writer.put(records(n, first=first)) for first, n in ((1, 10), (11, 15), (26, 6), (32, 5), (37, 1))] == [
        True, True, False, True, False,
    ]  # fmt: skip
    counts = writer.snapshot()
    assert (counts.emitted, counts.lost, counts.queued, counts.unpublished) == (37, 7, 30, 30)
    stuck.set()
    writer.close()
    assert conn_ids(tmp_path) == [*range(1, 26), *range(32, 37)]
    [row] = coverage(tmp_path)
    assert (row["emitted"], row["written"], row["lost_writer"]) == (37, 30, 7)


def test_put_after_close_is_lost_and_counted(tmp_path, wall, records) -> None:
    writer = DatasetWriter(tmp_path, RUN, wall)
    writer.close()
    assert not writer.put(records(4))
    assert (writer.snapshot().lost, writer.snapshot().unpublished) == (4, 0)


def test_the_timer_publishes(tmp_path, wall, records, conn_ids) -> None:
    """With a rotation of no length every wait ends at once: the second set of totals proves a publication."""
    published, asked = threading.Event(), []

    def counters() -> Mapping[str, int]:
        asked.append(1)
        if len(asked) > 1:
            published.set()
        return {}

    writer = DatasetWriter(tmp_path, RUN, wall, counters, rotate_s=0.01)
    assert published.wait(60)
    writer.close()


def test_counters_that_cannot_be_read_are_null(tmp_path, wall, records, coverage, conn_ids) -> None:
    def broken() -> Mapping[str, int]:
        raise OSError("no map")

    writer = DatasetWriter(tmp_path, RUN, wall, broken)
    writer.put(records(1))
    writer.close()
    [row] = coverage(tmp_path)
    assert (row["opened"], row["written"]) == (None, 1)


def test_a_defect_is_heard_of(tmp_path, wall, records, monkeypatch) -> None:
    monkeypatch.setattr(Dataset, "write", lambda self, rows: 1 // 0)
    writer = DatasetWriter(tmp_path, RUN, wall)
    writer.put(records(3))
    writer.flush()
    assert not writer.put(records(2))
    assert (writer.snapshot().lost, writer.snapshot().unpublished) == (5, 0)
    with pytest.raises(TracerError, match="the writer stopped: ZeroDivisionError"):
        writer.close()


def test_start_takes_the_lock_and_clears_what_is_stale(tmp_path, wall, caplog) -> None:
    stale = tmp_path / "connections/v1/date=2026-07-31/hour=11/.node-1-abcdef012345-1.tmp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    writer = DatasetWriter(tmp_path, RUN, wall)
    assert not stale.exists()
    with pytest.raises(TracerError, match="another agent"):
        DatasetWriter(tmp_path, RUN, wall)
    writer.close()
    DatasetWriter(tmp_path, RUN, wall).close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40) | st.just("flush"), max_size=12), st.integers(1, 16), st.integers(1, 60))
def test_the_account_holds(steps: list[int | str], group: int, bound: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root, kept, put = Path(directory), [], 0
        writer = DatasetWriter(root, RUN, WallClock(0, EPOCH), group_rows=group, pending_bytes=bound * RECORD.itemsize)
        for step in steps:
            if isinstance(step, str):
                writer.flush()
                assert writer.snapshot().queued == 0
                assert writer.snapshot().unpublished == 0
            else:
                kept += range(put + 1, put + step + 1) if writer.put(make_records(step, first=put + 1)) else []
                put += step
            counts = writer.snapshot()
            assert counts.emitted == put
            assert counts.written + counts.unpublished == len(kept)
        writer.close()
        counts = writer.snapshot()
        assert (counts.emitted, counts.written, counts.lost) == (put, len(kept), put - len(kept))
        assert published_ids(root) == kept
