"""Files are whole, within their hour, and every row is accounted for."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_world import EPOCH, RUN, Clocks, coverage_rows

from tracer import schema
from tracer.clock import WallClock
from tracer.store import dataset as module
from tracer.store.coverage import Run
from tracer.store.dataset import Dataset

Make = Callable[..., np.ndarray]


@pytest.fixture
def dataset(tmp_path: Path, wall: WallClock, clocks: Clocks) -> Dataset:
    return Dataset(
        tmp_path, RUN, wall, rotate_s=300, rotate_bytes=20_000, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns
    )


def test_nothing_is_visible_before_publication(tmp_path, dataset, records, visible, conn_ids) -> None:
    dataset.write(records(100))
    assert visible(tmp_path) == []
    assert (dataset.unpublished, dataset.written) == (100, 0)
    dataset.publish({})
    assert conn_ids(tmp_path) == list(range(1, 101))
    assert (dataset.unpublished, dataset.written, dataset.lost) == (0, 100, 0)
    assert not list(tmp_path.rglob(".*"))


def test_a_disk_budget_is_kept_by_this_nodes_oldest_files_and_their_rows_are_counted(
    tmp_path, wall, clocks, records, visible, conn_ids, caplog
) -> None:
    def of(run: Run, budget: int | None) -> Dataset:
        return Dataset(
            tmp_path, run, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns, disk_budget=budget
        )  # fmt: skip

    another = of(dataclasses.replace(RUN, node="node-2"), None)
    another.write(records(100, first=90_001))
    another.publish({})
    budget = 400_000
    made = of(RUN, budget)
    for number in range(10):
        clocks.seconds += 10
        made.write(records(2000, first=1 + 2000 * number, at_s=clocks.seconds))
        made.publish({}, last=number == 9)
    mine = list(tmp_path.rglob("node-1-*.parquet"))
    told = sum(row["lost_expired"] or 0 for row in coverage_rows(tmp_path))
    assert sum(path.stat().st_blocks * 512 for path in mine) <= budget
    assert (made.written, made.lost) == (20_000, 0)
    assert 0 < told < 20_000
    kept = conn_ids(tmp_path)
    assert len(kept) + told == 20_000 + 100
    assert set(range(18_001, 20_001)) <= set(kept)
    assert set(range(90_001, 90_101)) <= set(kept)
    assert "--disk-budget" in caplog.text


def test_a_published_file_is_whole(tmp_path, dataset, records, visible) -> None:
    dataset.write(records(100, at_s=1))
    dataset.write(records(50, first=101, at_s=0.5))
    dataset.write(records(10, first=151, at_s=0.7))
    dataset.publish({"lost_ring": 3})
    [path] = visible(tmp_path)
    assert path.relative_to(tmp_path).as_posix() == (
        "connections/v1/date=2026-07-31/hour=11/node-1-20260731T115900.500000Z-0123456789ab.1.parquet"
    )
    file = pq.ParquetFile(path)
    assert file.schema_arrow.equals(schema.arrow("connections"), check_metadata=True)
    metadata = {key.decode(): value.decode() for key, value in file.metadata.metadata.items()}
    del metadata["ARROW:schema"]
    assert metadata == {
        "schema_version": "1", "table": "connections", "node": "node-1", "boot_id": "boot", "kernel": "6.18.0",
        "run_id": "0123456789ab", "version": "1.2.3", "start": str(EPOCH + 500_000_000),
        "end": str(EPOCH + 10**9 + 99), "rows": "160", "losses": '{"lost_ring": 3, "lost_writer": 0}',
    }  # fmt: skip


def test_encodings_are_as_chosen(tmp_path, dataset, records, visible) -> None:
    dataset.write(records(5000))
    dataset.publish({})
    group = pq.ParquetFile(visible(tmp_path)[0]).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert "DELTA_BINARY_PACKED" in columns["ts"].encodings
    assert "DELTA_BINARY_PACKED" in columns["bytes_sent"].encodings
    assert columns["src_ip"].has_dictionary_page
    assert columns["ts"].compression == "ZSTD"
    assert columns["ts"].statistics.has_min_max
    assert columns["pid"].statistics is None


def test_no_file_crosses_an_hour(tmp_path, dataset, records, visible, conn_ids) -> None:
    dataset.write(records(120, step_ns=10**9))  # 11:59:00 to 12:00:59
    dataset.write(records(5, first=121, at_s=59))  # late rows of the old hour join its file
    dataset.publish({})
    assert [path.parts[-2] for path in visible(tmp_path)] == ["hour=11", "hour=12"]
    for path in visible(tmp_path):
        hours = {ts.hour for ts in pq.read_table(path)["ts"].to_pylist()}
        assert [f"hour={hour:02}" for hour in hours] == [path.parts[-2]]
    assert conn_ids(tmp_path) == list(range(1, 126))


def test_rotation_is_due_by_time_and_by_size(dataset, records, clocks) -> None:
    assert dataset.seconds_until_due == 300
    clocks.seconds = 299
    assert dataset.seconds_until_due == 1
    clocks.seconds = 300
    assert dataset.seconds_until_due <= 0
    dataset.publish({})
    assert dataset.seconds_until_due == 300
    for _ in range(20):
        dataset.write(records(1000))
    assert dataset.seconds_until_due == 0
    dataset.publish({})
    assert dataset.seconds_until_due == 300


def test_too_many_hours_are_published(dataset, records) -> None:
    dataset.write(records(module.MAX_OPEN, step_ns=3600 * 10**9))
    assert dataset.seconds_until_due > 0
    dataset.write(records(1, at_s=-3600 + 86400))
    assert dataset.seconds_until_due == 0


def test_coverage_counts_increments_and_joins_its_intervals(tmp_path, dataset, records, clocks, coverage) -> None:
    dataset.write(records(7))
    for seconds, opened, last in ((10, 5, False), (20, 12, False), (30, 2, True)):
        clocks.seconds = seconds
        dataset.publish({"opened": opened, "open_connections": seconds, "nonsense": 1}, last=last)
    rows = coverage(tmp_path)
    assert [row["opened"] for row in rows] == [5, 7, 2]  # the last total was started anew
    assert [row["open_connections"] for row in rows] == [10, 20, 30]
    assert [row["written"] for row in rows] == [7, 0, 0]
    assert [row["closed"] for row in rows] == [None] * 3
    assert [(row["first"], row["last"]) for row in rows] == [(True, False), (False, False), (False, True)]
    assert [row["started"] for row in rows][1:] == [row["ts"] for row in rows][:-1]


class TestBadDisk:
    """The directory is replaced by a file, in which nothing can be made: root has no other obstacle."""

    def break_disk(self, root: Path) -> None:
        shutil.rmtree(root)
        root.touch()

    def mend_disk(self, root: Path) -> None:
        root.unlink()
        root.mkdir()

    def test_rows_are_lost_by_count_and_writing_recovers(
        self, tmp_path, records, wall, clocks, coverage, conn_ids, caplog
    ) -> None:
        root = tmp_path / "data"
        root.mkdir()
        dataset = Dataset(root, RUN, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
        dataset.write(records(10))
        self.break_disk(root)
        dataset.publish({"opened": 10})  # the open file cannot be renamed
        assert (dataset.lost, dataset.unpublished) == (10, 0)
        dataset.write(records(5, first=11))  # not even tried
        clocks.seconds = 31
        dataset.write(records(3, first=16))  # tried, in vain
        assert (dataset.lost, dataset.unpublished, dataset.written) == (18, 0, 0)
        self.mend_disk(root)
        clocks.seconds = 62
        dataset.write(records(4, first=19))
        dataset.publish({"opened": 22})
        assert conn_ids(root) == [19, 20, 21, 22]
        [row] = coverage(root)  # the interval that could not be published is in it
        assert (row["opened"], row["emitted"], row["written"], row["lost_writer"]) == (22, 22, 4, 18)
        assert row["first"]
        assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.WARNING]
        assert "18 rows were lost" in caplog.messages[1]

    def test_an_idle_writer_notices_that_the_disk_works_again(self, tmp_path, wall, clocks, records, caplog) -> None:
        root = tmp_path / "data"
        root.touch()
        dataset = Dataset(root, RUN, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
        dataset.publish({})
        dataset.publish({})
        self.mend_disk(root)
        dataset.publish({})
        assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.WARNING]
        dataset.write(records(2))
        assert (dataset.lost, dataset.unpublished) == (0, 2)

    def test_the_account_of_publications(self, tmp_path, records, wall, clocks, visible) -> None:
        root = tmp_path / "data"
        dataset = Dataset(root, RUN, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
        dataset.write(records(10))
        clocks.seconds = 5
        dataset.publish({})
        account = dataset.published
        assert (account.publications, account.failures, account.at, account.error) == (1, 0, 5, "")
        assert account.files == {"connections": 1, "coverage": 1, "endpoints": 0}
        for table, size in account.bytes.items():
            assert size == sum(path.stat().st_size for path in visible(root, table))
        dataset.write(records(10))
        self.break_disk(root)
        clocks.seconds = 10
        dataset.publish({})
        failed = dataset.published
        assert (failed.publications, failed.failures, failed.at) == (2, 1, 5)
        assert "directory" in failed.error
        assert (failed.files, failed.bytes) == (account.files, account.bytes)
        self.mend_disk(root)
        clocks.seconds = 20
        dataset.publish({})
        assert (dataset.published.failures, dataset.published.at, dataset.published.error) == (1, 20, "")
