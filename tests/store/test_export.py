"""Exporting to a directory: once each, whole, whatever happens in between; and what is deleted afterwards."""

import contextlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_world import command, dataset, environment, rows, run, sentence
from datasets import publish
from killing import kill_often, sums
from store_world import EPOCH

from tracer import schema
from tracer.errors import TracerError, UsageError
from tracer.lab.netns import wait_until
from tracer.store import layout, ledger, losses, places, reader
from tracer.store.compact import Chosen, compact
from tracer.store.cron import Schedule
from tracer.store.export import Exporter, Options, Passed
from tracer.store.inventory import Inventory, entry_of
from tracer.store.pace import Pace, retried
from tracer.store.renamed import names

HOUR = "connections/v1/date=2026-07-31/hour=11"
LATER = EPOCH + 30 * 86_400 * 10**9


def export(root: Path, to: Path, now_ns: int = LATER, **options: Any) -> Passed:
    with exporter(root, partial(places.reached, str(to)), now_ns, **options) as made:
        return made.run()


@contextlib.contextmanager
def exporter(root: Path, reach: Callable[[], places.Place], now_ns: int = LATER, **options: Any) -> Iterator[Exporter]:
    with ledger.opened(root, "there") as entries:
        yield Exporter(root, reach, entries, Options(**options), sleep=lambda seconds: None, wall_ns=lambda: now_ns)


def count(root: Path) -> int:
    return sum(batch.num_rows for batch in reader.rows(root))


def test_all_tables_go_with_markers_for_hours_that_are_over(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    dataset(here, rows(3), rows(4))
    publish(here, {"coverage": coverage()})
    closes = (EPOCH // layout.HOUR_NS + 1) * layout.HOUR_NS + 900 * 10**9
    assert export(here, there, closes - 1).markers == 0
    assert sums(there) == sums(here)
    assert export(here, there, closes).markers == 2
    marker = json.loads((there / HOUR / "_SUCCESS-node-1").read_text())
    assert sorted(marker["files"]) == sorted(path.name for path in (here / HOUR).iterdir())
    assert export(here, there, closes) == Passed()
    assert reader.files(there) == [there / path.relative_to(here) for path in reader.files(here)]


def coverage() -> Any:
    from store_world import RUN

    from tracer.store.coverage import CoverageLog

    return CoverageLog(RUN, EPOCH).row(EPOCH + 10**9, {"emitted": 7, "written": 7, "lost_writer": 0})


def test_a_late_file_renews_its_hours_marker(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first, _ = dataset(here, rows(3), rows(4))
    export(here, there)
    first.unlink()  # the marker goes on naming what was exported
    (here / HOUR / first.name.replace(".0.", ".9.")).write_bytes(next((here / HOUR).iterdir()).read_bytes())
    done = export(here, there)
    assert (done.exported, done.markers) == (1, 1)
    assert len(json.loads((there / HOUR / "_SUCCESS-node-1").read_text())["files"]) == 3


def test_a_file_that_was_named_afterwards_replaces_its_own(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    path, _ = dataset(here, rows(3), rows(4))
    export(here, there)
    pq.write_table(rows(3).slice(0, 3), path.with_name(".new"), compression="none")
    path.with_name(".new").rename(path)
    done = export(here, there)
    assert (done.exported, done.markers) == (1, 1)
    assert sums(there) == sums(here)


def test_what_is_not_of_the_dataset_is_left_alone_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (good,) = dataset(here, rows(3))
    strangers = [here / "notes.txt", here / HOUR / "mine.parquet", here / "connections" / "v1" / "readme"]
    for path in strangers:
        path.write_text("mine")
    link = good.with_name(good.name.replace("node-1", "node-9"))
    link.symlink_to("/etc/hostname")
    torn = good.with_name(good.name.replace("node-1", "node-2"))
    torn.write_bytes(good.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING), exporter(here, partial(places.reached, str(there)), keep_s=1) as made:
        first, second = made.run(), made.run()
    assert (first.exported, first.failed, second.exported, second.failed) == (1, 1, 0, 1)
    assert [sum(f"{path} is" in line for line in caplog.messages) for path in [*strangers, link, torn]] == [1] * 5
    assert all(path.exists() for path in strangers)
    assert link.is_symlink()
    assert not good.exists()  # by --keep
    assert [path.name for path in (there / HOUR).glob("*.parquet")] == [good.name]
    assert not (there / HOUR / "_SUCCESS-node-2").exists()


@pytest.mark.parametrize("standard", ["ecs", "otel", "ipfix"])
def test_renamed_columns_keep_their_data(tmp_path: Path, standard: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def mixed(records: Any) -> None:
        records["tuple"]["src"][1::2] = b"\xfd" + bytes(15)

    (path,) = dataset(here, rows(5, mixed))
    publish(here, {"coverage": coverage()})
    assert export(here, there, standard=standard).exported == 2
    assert export(here, there, standard=standard) == Passed()
    for one in [path, *reader.files(here, "coverage")]:
        before, after = pq.read_table(one), pq.read_table(there / one.relative_to(here))
        called = names(before.schema, standard)
        assert len(set(after.column_names)) == len(after.column_names)
        for column in before.column_names:
            found = [after[name].to_pylist() for name in called[column]]
            together = [next((v for v in each if v is not None), None) for each in zip(*found, strict=True)]
            assert together == before[column].to_pylist(), column
            assert all(after.schema.field(name).metadata[b"column"] == column.encode() for name in called[column])
    assert "renamed" not in os.listdir(here / ".export")


def test_names_that_fit_two_columns_are_given_to_none() -> None:
    called = names(schema.arrow(), "otel")
    assert called["src_ip"] == ("source.address",)
    assert called["src_pod"] == ("src_pod",)  # as backend_pod, a k8s.pod.name
    assert called["node"] == ("node",)  # as backend_node
    assert called["result"] == ("result",)
    assert names(schema.arrow(), "ipfix")["src_ip"] == ("sourceIPv4Address", "sourceIPv6Address")


def test_what_is_exported_is_deleted_by_age(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    dataset(here, rows(3), rows(4))
    ends = (EPOCH // layout.HOUR_NS + 1) * layout.HOUR_NS
    assert export(here, there, ends + 10**9, keep_s=2).expired.files == 0
    done = export(here, there, ends + 3 * 10**9, keep_s=2).expired
    assert (done.files, done.unexported, done.lost_rows) == (2, 0, 0)
    assert count(there) == 7


def test_the_budget_takes_the_unexported_last_and_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    old, new = dataset(here, rows(3), rows(4))
    export(here, there)
    for path in (old, new):  # two more, older than those, that will not be exported
        torn = path.read_bytes()
        path.with_name(path.name.replace("20260731T115900", "20260731T115800")).write_bytes(b"XXXX" + torn[4:])
    entries = Inventory(here).entries()
    room = sum(entry.disk for entry in entries[:2])
    done = export(here, there, disk_budget=room).expired
    assert (done.files, done.unexported) == (2, 0)
    assert not old.exists()
    with caplog.at_level(logging.ERROR):
        done = export(here, there, disk_budget=1).expired
    assert (done.files, done.unexported, done.lost_rows) == (2, 2, 7)
    assert "NOT exported, with 7 rows" in caplog.text
    told = [row for path in reader.files(here, "coverage") for row in pq.read_table(path).to_pylist()]
    assert [row["lost_expired"] for row in told] == [7]
    export(here, there)
    assert sums(there).items() >= sums(here).items()


def test_losses_of_an_hour_are_told_in_one_file_and_each_once(tmp_path: Path) -> None:
    entries = [Inventory(tmp_path).within(path.parent)[0] for path in dataset(tmp_path, rows(3))]
    entries += [entry_of(path) for path in dataset(tmp_path, rows(3), rows(4), rows(5))[1:]]  # type: ignore[misc]
    free = lambda path: True  # noqa: E731
    for entry, may in zip([*entries, entries[0]], [free, free, lambda path: False, free], strict=True):
        losses.publish(tmp_path, entry, int(entry.path.name.split(".")[-2]) + 3, {}, may)
    told = [row for path in reader.files(tmp_path, "coverage") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["lost_expired"] for row in told) == [5, 7]


def test_exported_and_then_compacted_there_is_not_put_again(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first, _ = dataset(here, rows(3), rows(4))
    export(here, there)
    assert [done.rows for done in compact(there, Chosen(), pytest.fail)] == [7]
    (here / ".export" / "ledger.db").unlink()  # as after a kill before anything was recorded
    assert export(here, there).exported == 0
    first.touch()
    assert export(here, there).exported == 0
    assert count(there) == 7


def test_a_dataset_that_is_exported_is_not_compacted(tmp_path: Path) -> None:
    dataset(tmp_path / "here", rows(3), rows(4))
    export(tmp_path / "here", tmp_path / "there")
    with pytest.raises(UsageError, match="compact what was exported, at the destination"):
        list(compact(tmp_path / "here", Chosen(), pytest.fail))


def test_two_exporters_of_one_dataset(tmp_path: Path) -> None:
    (path,) = dataset(tmp_path / "here", rows(3))
    with ledger.opened(tmp_path / "here", "elsewhere"):
        said = sentence(run("export", tmp_path / "here", tmp_path / "there"), 1)
    assert f"{tmp_path / 'here'} is being exported by another process" in said
    assert path.exists()


def test_what_cannot_be_done_is_a_sentence(tmp_path: Path) -> None:
    dataset(tmp_path / "here", rows(3))
    said = sentence(run("export", tmp_path / "here", tmp_path / "there", "--schedule", "every day"), 2)
    assert "the schedule 'every day' cannot be read" in said
    said = sentence(run("export", tmp_path / "here", tmp_path / "there", "--schedule", "0 0 30 2 *"), 2)
    assert "cannot be read" in said
    (tmp_path / "file").write_text("mine")
    assert "cannot make the directory" in sentence(run("export", tmp_path / "here", tmp_path / "file" / "x"), 1)
    assert "nonsense" in sentence(run("export", tmp_path / "here", "nonsense://x/y"), 2)
    assert "does not exist" in sentence(run("export", tmp_path / "nowhere", tmp_path / "there"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]


def test_sigterm_ends_a_scheduled_export_with_a_last_pass(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    dataset(here, rows(3))
    with layout_lock(here) as lock, (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command("export", here, there, "--schedule", "0 0 1 1 *"), env=environment(), stderr=said
        )
        try:
            wait_until(lambda: (there / HOUR).is_dir() and len(list((there / HOUR).glob("_SUC*"))) == 1, "an export")
            process.send_signal(signal.SIGTERM)
            # The agent ends at the same time, and publishes what it had before it lets go of its lock.
            dataset(here, rows(3), rows(4))
            lock.release()
            assert process.wait(30) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
    assert count(there) == 7


class layout_lock(layout.Lock):  # noqa: N801  a lock that is given up at the end, too
    def __init__(self, root: Path) -> None:
        super().__init__(root, "node-1")

    def __enter__(self) -> "layout_lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def test_killed_again_and_again_every_row_is_there_once(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    dataset(here, *(rows(2) for _ in range(300)))
    assert kill_often(here, there, 4) >= 1
    assert sums(there) == sums(here)
    assert [path for path in there.rglob(".*") if path.is_file()] == []


def test_the_pace_is_kept() -> None:
    now, slept = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    pace = Pace(1000, lambda: now, sleep)
    for _ in range(5):
        pace.spend(500)
    assert now == pytest.approx(2.5)
    assert pace.piece == 4096


def test_what_passes_is_tried_again_and_what_lasts_is_not() -> None:
    tried: list[int] = []

    def failing(times: int, error: OSError) -> Callable[[], str]:
        def action() -> str:
            tried.append(1)
            if len(tried) <= times:
                raise error
            return "done"

        return action

    def lasting(error: OSError) -> bool:
        return error.errno == 28

    assert retried(failing(2, OSError(5, "")), lasting, "it", (1, 1), lambda seconds: None) == "done"
    tried.clear()
    with pytest.raises(OSError, match="full"):
        retried(failing(9, OSError(28, "full")), lasting, "it", (1, 1), lambda seconds: None)
    assert len(tried) == 1


@pytest.mark.parametrize("bad", ["", "* * * *", "61 * * * *", "x"])
def test_schedules_that_cannot_be_read(bad: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Schedule(bad)


def test_a_damaged_or_unwritable_ledger(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    dataset(here, rows(3))
    (here / ".export").write_text("not a directory")
    with pytest.raises(TracerError, match="cannot keep what is exported"):
        export(here, there)


@pytest.mark.parametrize("where", ["itself", "below", "linked", "address"])
def test_a_dataset_is_not_exported_into_itself(where: str, tmp_path: Path) -> None:
    """What is there already would be found, and deleted here as exported."""
    here = tmp_path / "here"
    dataset(here, rows(10))
    before = sorted(path for path in here.rglob("*.parquet"))
    (tmp_path / "link").symlink_to(here)
    to = {"itself": here, "below": here / "some" / "where", "linked": tmp_path / "link", "address": f"file://{here}"}
    said = sentence(run("export", here, to[where], "--keep", "1s"), 2)
    assert "choose a directory elsewhere" in said
    assert sorted(path for path in here.rglob("*.parquet")) == before
    assert not (here / "some").exists()
