"""Names for published files, beside others who delete or replace them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from command_world import dataset, rows

from tracer.errors import TracerError
from tracer.naming.fields import address_bytes
from tracer.store import layout, locks
from tracer.store.fill import Filled, fill
from tracer.store.inventory import Inventory
from tracer.store.names import COLUMNS, Coded
from tracer.store.parquet import UnpublishedFile
from tracer.store.retention import expire


@dataclass
class Names:
    """The same text in every row."""

    codes: npt.NDArray[np.int32]
    texts: list[str]


def shop(
    before: Callable[[], object] = lambda: None,
) -> Callable[[np.ndarray, npt.NDArray[np.int64]], Mapping[str, Coded]]:
    def name(records: np.ndarray, starts: npt.NDArray[np.int64]) -> Mapping[str, Coded]:
        before()
        return {each: Names(np.zeros(len(records), np.int32), ["shop"]) for each in COLUMNS}

    return name


def services(path: Path) -> set[str]:
    return set(pq.read_table(path, columns=["dst_service"])["dst_service"].to_pylist())


def test_an_agent_that_starts_meanwhile_does_not_take_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = dataset(tmp_path, rows(5))
    write = UnpublishedFile.write

    def and_an_agent_starts(self: UnpublishedFile, table: object) -> None:
        layout.remove_stale(tmp_path, layout.node_of(path.name))
        write(self, table)

    monkeypatch.setattr(UnpublishedFile, "write", and_an_agent_starts)
    assert fill(path, shop(), address_bytes).rows == 5
    assert services(path) == {"shop"}


def test_what_one_that_was_ended_left_goes(tmp_path: Path) -> None:
    (path,) = dataset(tmp_path, rows(5))
    left, other = path.with_name(".named-0123456789ab.tmp"), path.with_name(".node-1-0123456789ab-1.tmp")
    left.touch()
    other.touch()
    layout.remove_half_named(tmp_path)
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([path.name, other.name])


def test_a_file_that_expires_while_it_is_named_stays_gone(tmp_path: Path) -> None:
    first, second = dataset(tmp_path, rows(5), rows(7))
    assert fill(first, shop(first.unlink), address_bytes) == Filled()
    assert fill(first, shop(), address_bytes) == Filled()
    assert list(first.parent.iterdir()) == [second]


def test_a_file_that_expires_at_the_last_moment_stays_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = dataset(tmp_path, rows(5))
    sync = os.fsync

    def and_expire(descriptor: int) -> None:
        sync(descriptor)
        path.unlink(missing_ok=True)

    monkeypatch.setattr(os, "fsync", and_expire)
    assert fill(path, shop(), address_bytes) == Filled()
    assert list(path.parent.iterdir()) == []


def test_a_file_that_was_replaced_while_it_is_named_is_left_alone(tmp_path: Path) -> None:
    (path,) = dataset(tmp_path, rows(5))

    def another() -> None:
        pq.write_table(rows(9), path.with_name("new"))
        path.with_name("new").rename(path)

    with pytest.raises(TracerError, match="was replaced while its rows were named"):
        fill(path, shop(another), address_bytes)
    assert len(pq.read_table(path)) == 9
    assert list(path.parent.iterdir()) == [path]


def test_nothing_expires_while_a_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PUBLISH_WAIT_S", 0.05)
    (path,) = dataset(tmp_path, rows(5))
    entries = Inventory(tmp_path).entries()
    with locks.steady(path.parent):
        expire(tmp_path, entries, lambda entry: True, None, 0, entries[0].hour * layout.HOUR_NS)
        assert path.exists()
    expire(tmp_path, entries, lambda entry: True, None, 0, entries[0].hour * layout.HOUR_NS)
    assert not path.exists()
