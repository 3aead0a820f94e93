"""Rows wait for their names, get them, and are in the account all the while; endpoints stand beside them."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from store_world import EPOCH, RUN, Clocks, make_records, visible_files

from tracer import schema
from tracer.naming.names import Coded
from tracer.record import RECORD
from tracer.store.dataset import Dataset
from tracer.store.names import COLUMNS
from tracer.store.writer import DatasetWriter

HOUR = 3600 * 10**9


class Names:
    """Names every second row's service after what has been heard by then."""

    def __init__(self, hold: float = 0.0) -> None:
        self.hold, self.word = hold, "first"
        self.met: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.calls = 0

    def hear(self) -> None:
        self.calls += 1

    def meet(self, records: np.ndarray) -> None:
        self.met += records["conn_id"].tolist()

    def hold_s(self) -> float:
        return self.hold

    def name(self, records: np.ndarray, wall_start_ns: np.ndarray) -> Mapping[str, Coded]:
        nothing = Coded(np.full(len(records), -1, dtype=np.int32), [])
        service = Coded((records["conn_id"] % 2).astype(np.int32) - 1, [self.word])
        return dict.fromkeys(COLUMNS, nothing) | {"dst_service": service}

    def endpoints(self, begin_ns: int, end_ns: int) -> list[Mapping[str, Sequence[Any]]]:
        self.asked.append((begin_ns, end_ns))
        row: dict[str, Any] = dict.fromkeys(schema.arrow("endpoints").names)
        row |= {"ts": end_ns, "started": begin_ns, "dst_namespace": "shop", "dst_service": "web", "dst_port": 80}
        row |= {"protocol": "tcp", "virtual_ips": "10.96.0.9", "backend_ip": "10.244.2.1", "backend_port": 8080}
        row |= {"ready": True, "serving": True, "terminating": False, "session_affinity": "None"}
        row |= {"internal_policy": "Cluster", "external_policy": "Cluster"}
        return [{name: [value] for name, value in row.items()}] * 2

    def totals(self) -> Mapping[str, int]:
        return {"unnamed": 7, "names_age_s": 3}

    def state(self) -> str:
        return "current"


def services(root: Path) -> dict[int, str | None]:
    tables = [pq.read_table(path, columns=["conn_id", "dst_service"]) for path in visible_files(root)]
    return {row["conn_id"]: row["dst_service"] for table in tables for row in table.to_pylist()}


def endpoint_rows(root: Path) -> list[dict[str, Any]]:
    rows = [row for path in visible_files(root, "endpoints") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["ts"])


def test_rows_get_their_names(tmp_path, wall) -> None:
    names = Names()
    writer = DatasetWriter(tmp_path, RUN, wall, names=names)
    writer.put(make_records(3))
    writer.close()
    assert services(tmp_path) == {1: "first", 2: None, 3: "first"}
    assert names.met in ([], [1, 2, 3])


def test_rows_wait_until_their_names_are_known(tmp_path, wall) -> None:
    """The name comes after the rows, while they are held."""
    names = Names(hold=3600.0)
    writer = DatasetWriter(tmp_path, RUN, wall, names=names, group_rows=2)
    writer.put(make_records(5))
    while not names.calls:
        time.sleep(0.01)
    names.word, names.hold = "later", 0.0
    writer.flush()
    assert set(services(tmp_path).values()) == {"later", None}
    assert sorted(names.met) == [1, 2, 3, 4, 5]
    assert writer.snapshot().unpublished == 0
    writer.close()


def test_what_comes_after_a_publication_was_asked_for_waits_for_the_next(tmp_path, wall) -> None:
    clocks, names = Clocks(), Names(hold=100.0)
    writer = DatasetWriter(
        tmp_path, RUN, wall, names=names, group_rows=2, rotate_s=50, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns
    )
    writer.put(make_records(3))
    clocks.seconds = 60  # the publication is due, the rows are not
    before = names.calls
    while names.calls < before + 3:
        time.sleep(0.05)
    clocks.seconds = 70
    writer.put(make_records(2, first=4))
    clocks.seconds = 161  # 100 s after the publication was due
    while writer.snapshot().written < 3:
        time.sleep(0.05)
    assert services(tmp_path).keys() == {1, 2, 3}
    writer.close()
    assert services(tmp_path).keys() == {1, 2, 3, 4, 5}


def test_rows_do_not_wait_where_there_is_no_room(tmp_path, wall) -> None:
    names = Names(hold=3600.0)
    writer = DatasetWriter(tmp_path, RUN, wall, names=names, group_rows=10, pending_bytes=100 * RECORD.itemsize)
    for first in range(1, 1001, 10):
        while not writer.put(make_records(10, first=first)):
            time.sleep(0.01)
            first += 1000  # what was refused is in no file
        if first > 900:
            break
    counts = writer.snapshot()
    assert counts.queued <= 100
    assert counts.emitted - counts.lost > 100
    writer.close()
    assert writer.snapshot().unpublished == 0


def test_endpoints_tile_time_hour_by_hour(tmp_path, wall) -> None:
    """Publications at 11:59:30 and 12:02: less what is held, and cut where the hour ends."""
    clocks, names = Clocks(), Names(hold=2.0)
    dataset = Dataset(tmp_path, RUN, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns, names=names)
    for clocks.seconds in (30.0, 180.0):
        dataset.publish({})
    clocks.seconds = 190.0
    dataset.publish({}, last=True)
    moments = [EPOCH, EPOCH + 28 * 10**9, EPOCH + 60 * 10**9, EPOCH + 178 * 10**9, EPOCH + 190 * 10**9]
    assert names.asked == list(itertools.pairwise(moments))
    found = visible_files(tmp_path, "endpoints")
    assert [path.parent.name for path in found] == ["hour=11", "hour=11", "hour=12", "hour=12"]
    rows = endpoint_rows(tmp_path)
    assert len(rows) == 8
    assert {(row["node"], row["run_id"], row["dst_service_port"]) for row in rows} == {(RUN.node, RUN.run_id, None)}
    assert pq.read_schema(found[0]).equals(schema.arrow("endpoints"))


def test_endpoints_that_could_not_be_written_come_with_the_next_publication(tmp_path, wall) -> None:
    clocks, names = Clocks(), Names()
    dataset = Dataset(tmp_path, RUN, wall, monotonic=clocks.monotonic, wall_ns=clocks.wall_ns, names=names)
    (tmp_path / "endpoints").write_text("in the way")
    clocks.seconds = 10.0
    dataset.publish({})
    (tmp_path / "endpoints").unlink()
    clocks.seconds = 20.0
    dataset.publish({})
    assert {(row["started"].value, row["ts"].value) for row in endpoint_rows(tmp_path)} == {(EPOCH, EPOCH + 20 * 10**9)}


def test_coverage_tells_what_the_names_are_worth(tmp_path, wall, coverage) -> None:
    DatasetWriter(tmp_path, RUN, wall, names=Names()).close()
    [row] = coverage(tmp_path)
    assert (row["naming"], row["unnamed"], row["names_age_s"], row["ambiguous_names"]) == ("current", 7, 3, None)


def test_without_names_coverage_says_so(tmp_path, wall, coverage) -> None:
    DatasetWriter(tmp_path, RUN, wall).close()
    [row] = coverage(tmp_path)
    assert (row["naming"], row["unnamed"], row["names_age_s"]) == ("off", None, None)
    assert not visible_files(tmp_path, "endpoints")
