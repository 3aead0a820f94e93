"""Hours made into one file: every row once, sorted; old or new for whoever looks, at any moment."""

import contextlib
import os
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_world import command, dataset, environment, rows, run, sentence
from datasets import publish
from store_world import EPOCH, RUN, Clocks, make_records

from tracer import schema
from tracer.clock import WallClock
from tracer.errors import TracerError, UsageError
from tracer.lab.netns import wait_until
from tracer.store import compact as compaction
from tracer.store import layout, ledger, locks, merge, reader
from tracer.store.compact import Chosen, compact
from tracer.store.dataset import Dataset

HOUR = "connections/v1/date=2026-07-31/hour=11"


def ids(path: Path) -> list[int]:
    """Of all rows of a root, as pandas reads it: a directory."""
    return sorted(pd.read_parquet(path / "connections", columns=["conn_id"])["conn_id"].tolist())


def numbered(first: int, n: int) -> pa.Table:
    """n rows with ids of their own, at times that lie between those of other files."""

    def change(records: Any) -> None:
        records["conn_id"] += first
        records["ts"] = (records["conn_id"] * 7919) % 1_000_003 * 1000

    return rows(n, change)


def done(root: Path, **chosen: Any) -> list[compaction.Compacted]:
    return list(compact(root, Chosen(**chosen), pytest.fail))


def test_an_hour_becomes_one_sorted_file_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUN_ROWS": 100, "BLOCK_ROWS": 16, "FAN_IN": 3, "GROUP_ROWS": 150}.items():
        monkeypatch.setattr(merge, name, value)
    files = dataset(tmp_path, *(numbered(1000 * number, 30 + number) for number in range(40)))
    before = pa.concat_tables([pq.read_table(path) for path in files]).unify_dictionaries()
    (made,) = done(tmp_path)
    (path,) = reader.files(tmp_path)
    after = pq.read_table(path)
    assert (made.files, made.rows, made.size) == (40, len(before), path.stat().st_size)
    assert after.schema == before.schema
    assert after["ts"].to_pylist() == sorted(before["ts"].to_pylist())
    by_id = [("conn_id", "ascending")]
    assert after.sort_by(by_id).to_pylist() == before.sort_by(by_id).to_pylist()
    about = reader.metadata(path)
    assert merge.origins(path) == {path.name for path in files}
    assert about["rows"] == str(len(before))
    assert [each.name for each in (tmp_path / HOUR).iterdir()] == [path.name]
    assert sorted(each.name for each in tmp_path.iterdir()) == [".compact.lock", "connections"]
    assert done(tmp_path) == []


def test_late_files_are_merged_in_the_next_time(tmp_path: Path) -> None:
    names = {path.name for path in dataset(tmp_path, numbered(0, 5), numbered(10, 5))}
    done(tmp_path)
    (late,) = [path for path in dataset(tmp_path, numbered(20, 5)) if path.exists()]
    late = late.rename(late.with_name(late.name.replace(".0.", ".7.")))
    assert [each.rows for each in done(tmp_path)] == [15]
    (path,) = reader.files(tmp_path)
    assert merge.origins(path) >= names | {late.name}
    assert len(set(ids(tmp_path))) == 15


def test_nodes_hours_and_tables_are_chosen(tmp_path: Path) -> None:
    dataset(tmp_path, numbered(0, 5), numbered(10, 5))
    other = rows(4)
    at = other.schema.get_field_index("node")
    other = other.set_column(at, other.schema.field("node"), pa.array(["node-2"] * 4).dictionary_encode())
    publish(tmp_path, {"connections": other.cast(schema.arrow())})
    assert done(tmp_path, hour=EPOCH // layout.HOUR_NS + 1) == []
    assert [each.files for each in done(tmp_path, node="node-1")] == [2]
    assert {layout.node_of(path.name) for path in reader.files(tmp_path)} == {"node-1", "node-2"}
    assert [each.files for each in done(tmp_path)] == [2]
    (path,) = reader.files(tmp_path)
    assert Counter(pq.read_table(path)["node"].to_pylist()) == {"node-1": 10, "node-2": 4}


def test_what_is_not_merged_stays_beside(tmp_path: Path) -> None:
    dataset(tmp_path, numbered(0, 5), numbered(10, 5))
    (tmp_path / HOUR / "notes.txt").write_text("mine")
    (tmp_path / HOUR / "_SUCCESS-node-1").write_text("{}")
    (tmp_path / HOUR).chmod(0o2775)
    done(tmp_path)
    assert sorted(each.name for each in (tmp_path / HOUR).iterdir() if each.suffix != ".parquet") == [
        "_SUCCESS-node-1", "notes.txt",
    ]  # fmt: skip
    assert (tmp_path / HOUR).stat().st_mode & 0o7777 == 0o2775


def test_an_agent_that_publishes_meanwhile_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were being written before the exchange, published during the merge, and begun in between."""
    dataset(tmp_path, numbered(1_000_000, 5), numbered(2_000_000, 5))
    clocks = Clocks()
    agent = Dataset(tmp_path, RUN, WallClock(0, EPOCH), monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
    agent.write(make_records(3, first=1))  # unpublished throughout
    second = Dataset(
        tmp_path, RUN.__class__("node-2", "ba9876543210", "boot", "6"), WallClock(0, EPOCH),
        monotonic=clocks.monotonic, wall_ns=clocks.wall_ns,
    )  # fmt: skip
    real = compaction.exchange

    def meanwhile(*arguments: Any) -> None:
        second.write(make_records(4, first=11))
        second.publish({})
        second.write(make_records(2, first=21))
        real(*arguments)

    monkeypatch.setattr(compaction, "exchange", meanwhile)
    done(tmp_path)
    agent.publish({})
    second.publish({})
    assert (agent.lost, second.lost) == (0, 0)
    found = ids(tmp_path)
    assert [each for each in found if each < 100] == [1, 2, 3, 11, 12, 13, 14, 21, 22]
    assert len(found) == 19
    monkeypatch.undo()
    assert [each.rows for each in done(tmp_path) if each.table == "connections"] == [19]
    assert ids(tmp_path) == found


def test_an_agent_does_not_publish_into_an_hour_that_is_being_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PUBLISH_WAIT_S", 0.05)
    agent = Dataset(tmp_path, RUN, WallClock(0, EPOCH))
    agent.write(make_records(3))
    with locks.steady(tmp_path / HOUR, alone=True):
        agent.publish({})
    assert (agent.written, agent.lost) == (0, 3)  # after five seconds, in earnest; and counted


def test_an_agent_does_not_wait_for_another_hour_that_is_being_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PUBLISH_WAIT_S", 0.05)
    dataset(tmp_path, numbered(1, 5))
    later = tmp_path / "connections" / "v1" / layout.hour_parts(EPOCH // layout.HOUR_NS + 1)[0]
    agent = Dataset(tmp_path, RUN, WallClock(0, EPOCH + layout.HOUR_NS))
    with locks.steady(tmp_path, alone=True), locks.steady(tmp_path / HOUR, alone=True):
        agent.write(make_records(3))
        agent.publish({})
    assert (agent.written, agent.lost) == (3, 0)
    assert len(list(later.glob("hour=*"))) == 2


def test_an_exporter_that_begins_during_the_merge_keeps_the_hour_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists what is there; if that were merged afterwards, the destination would have the rows twice."""
    files = dataset(tmp_path, numbered(1, 5), numbered(100, 5))
    merged, merges = compaction._merged, list[Any]()

    def meanwhile(*arguments: Any) -> Any:
        merges.append(arguments)
        with ledger.opened(tmp_path, "somewhere"):
            return merged(*arguments)

    monkeypatch.setattr(compaction, "_merged", meanwhile)
    with pytest.raises(UsageError, match="is being exported"):
        done(tmp_path)
    assert len(merges) == 1
    assert sorted(reader.files(tmp_path)) == sorted(files)


def test_an_exporter_does_not_begin_while_an_hour_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PUBLISH_WAIT_S", 0.05)
    dataset(tmp_path, numbered(1, 5), numbered(100, 5))
    renamed, refused = compaction._renameat2, list[str]()

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(TracerError) as error, ledger.opened(tmp_path, "somewhere"):
            pass
        refused.append(str(error.value))
        renamed(*arguments)

    monkeypatch.setattr(compaction, "_renameat2", meanwhile)
    assert [each.rows for each in done(tmp_path) if each.table == "connections"] == [10]
    assert "is being compacted by another process; try again" in refused[0]


def test_who_waits_for_a_directory_that_is_exchanged_gets_the_new_one(tmp_path: Path) -> None:
    old, new = tmp_path / "hour", tmp_path / "other"
    old.mkdir()
    new.mkdir()
    waits, found = threading.Event(), list[bool]()

    def wait() -> None:
        waits.set()
        with locks.steady(old):
            found.append((old / "is new").exists())

    thread = threading.Thread(target=wait)
    with locks.steady(old, alone=True):
        thread.start()
        assert waits.wait(10)
        time.sleep(0.1)  # in which it has opened the old one, as a rule
        (new / "is new").touch()
        compaction._renameat2(new, old)
        held = os.stat(new)
    thread.join(10)
    assert found == [True]
    assert not os.path.samestat(held, os.stat(old))


def test_readers_see_old_or_new(tmp_path: Path) -> None:
    """pandas, DuckDB and our own reader, while hours are compacted again and again: all rows, each once; or a file that
    is gone since it was listed, which all of them say. pandas and DuckDB may also see none, of a listing that the
    exchange has overtaken (docs/limitations.md); this hour is all there is, so that they say this too."""
    dataset(tmp_path, *(numbered(100 * number, 10) for number in range(30)))
    expected, ended, wrong, seen = ids(tmp_path), threading.Event(), list[str](), Counter[str]()
    glob = f"{tmp_path}/connections/v*/*/*/*.parquet"
    gone = "No such file", "is gone", "Cannot open"
    # The directory that was opened is empty by now; or none of the names that were listed is in the new one, and Arrow
    # and DuckDB leave out what they do not find.
    overtaken = "No match for FieldRef.Name(conn_id)", "No files found that match"

    def by_duckdb() -> list[int]:
        found = duckdb.connect().execute(f"SELECT conn_id FROM '{glob}' ORDER BY 1").fetchall()
        return [each for (each,) in found]

    def by_reader() -> list[int]:
        batches = list(reader.rows(tmp_path, columns=["conn_id"]))
        return sorted(each for batch in batches for each in batch.column(0).to_pylist())

    def look(name: str, read: Any) -> None:
        while not ended.is_set():
            try:
                found = read()
            except (OSError, TracerError, duckdb.Error, pa.ArrowInvalid) as error:
                if not any(word in str(error) for word in (gone if name == "reader" else (*gone, *overtaken))):
                    wrong.append(f"{name}: {error}")
                seen[f"{name} was told"] += 1
                continue
            seen[name] += 1
            if found != expected:
                wrong.append(f"{name}: {len(found)} rows")

    readers = {"pandas": lambda: ids(tmp_path), "duckdb": by_duckdb, "reader": by_reader}
    threads = [threading.Thread(target=look, args=each) for each in readers.items()]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):
            done(tmp_path)
            (path,) = (tmp_path / HOUR).iterdir()
            building = tmp_path / ".again"  # split again, by the same step, into names that never were before
            building.mkdir()
            whole = pq.read_table(path)
            for part in range(5):
                name = layout.published_name("node-1", EPOCH, f"{number}{part}abc", part)
                pq.write_table(whole.slice(part * 60, 60), building / name)
            with locks.steady(tmp_path / HOUR, alone=True):
                compaction._renameat2(building, tmp_path / HOUR)
            for old in building.iterdir():
                old.unlink()
            building.rmdir()
        wait_until(lambda: bool(wrong) or all(seen[name] for name in readers), "every reader to have read it whole")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert all(seen[name] for name in readers), seen


@pytest.mark.parametrize("turn", ["opened", "listed"])
def test_our_reader_never_lists_a_part_of_an_hour_that_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: str
) -> None:
    """Another hour is there too, so that a listing that the exchange has overtaken would look like a whole one."""
    *_, last = dataset(tmp_path, *(numbered(100 * number, 10) for number in range(30)))
    later = (tmp_path / HOUR).with_name("hour=12")
    later.mkdir()
    last.rename(later / last.name)
    expected, listdir, pending = ids(tmp_path), os.listdir, [True]

    def overtaken(where: Any) -> list[str]:
        names = listdir(where) if turn == "listed" else []
        if pending and isinstance(where, int) and os.readlink(f"/proc/self/fd/{where}").endswith(HOUR):
            pending.clear()
            assert done(tmp_path)
        return names or listdir(where)

    monkeypatch.setattr(os, "listdir", overtaken)
    paths = reader.files(tmp_path)
    assert not pending
    assert sorted(each for path in paths for batch in reader.batches(path, columns=["conn_id"])
                  for each in batch.column(0).to_pylist()) == expected  # fmt: skip


def test_killed_at_any_moment_every_row_is_there_once(tmp_path: Path) -> None:
    dataset(tmp_path, *(numbered(100 * number, 20) for number in range(60)))
    expected, met = ids(tmp_path), 0
    for moment in (0, 0.02, 0.05, 0.1, 0.2, 0.4):  # seconds after it began
        process = subprocess.Popen(command("compact", tmp_path), env=environment(), stdout=subprocess.DEVNULL)
        wait_until(lambda: process.poll() is not None or (tmp_path / ".compact").is_dir(), "it to begin")  # noqa: B023
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        met += process.poll() is None
        process.kill()
        process.wait()
        assert ids(tmp_path) == expected
        if len(list((tmp_path / HOUR).iterdir())) == 1:
            dataset(tmp_path, numbered(50_000, 3))
            expected = ids(tmp_path)
    assert met
    assert run("compact", tmp_path).returncode == 0
    assert ids(tmp_path) == expected
    assert not (tmp_path / ".compact").exists()


def test_what_cannot_be_merged_is_left_as_it_was(tmp_path: Path) -> None:
    first, second = dataset(tmp_path, numbered(0, 5), numbered(10, 5))
    whole = second.read_bytes()
    second.write_bytes(whole[:-9])
    said = sentence(run("compact", tmp_path), 1)
    assert str(second) in said
    assert "1 hours were not compacted" in said
    newer = pq.read_table(first)
    pq.write_table(newer.append_column("colour", pa.array(["red"] * 5)), second)
    assert "columns that this version does not know (colour)" in sentence(run("compact", tmp_path), 1)
    second.write_bytes(whole)
    (tmp_path / HOUR / "directory").mkdir()
    assert "is a directory" in sentence(run("compact", tmp_path), 1)
    (tmp_path / HOUR / "directory").rmdir()
    assert {first.name, second.name} == set(os.listdir(tmp_path / HOUR))
    with locks.replacing(tmp_path):
        assert "are being compacted or named" in sentence(run("compact", tmp_path), 1)
    assert run("compact", tmp_path).returncode == 0
    assert "no directory" in sentence(run("compact", tmp_path / "nowhere"), 2)
