"""An export whose destination is not to be had, or is full: a sentence, nothing lost, and on it goes afterwards."""

import itertools
import logging
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_world import Talk, command, dataset, environment, rows
from killing import sums
from private_mounts import in_namespace

from tracer.errors import UsageError
from tracer.store import ledger, places, reader, rounds
from tracer.store.export import Exporter, Options

PRELUDE = """
from command_world import dataset, rows
from killing import sums
from tracer.store import ledger, places
from tracer.store.export import Exporter, Options
here = root.parent / "here"
def export(**options):
    try:
        with ledger.opened(here, "there") as entries:
            exporter = Exporter(here, lambda: places.reached(str(root)), entries, Options(**options), sleep=print)
            return exporter.run().exported
    except TracerError as error:
        return str(error)
"""


class Ticks:
    """A schedule that is always due, and does something at each tick."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._actions = iter(actions)

    def seconds(self) -> float:
        next(self._actions)()
        return 0.0


def exporter(root: Path, reach: Callable[[], places.Place], entries: ledger.Ledger, **options: Any) -> Exporter:
    return Exporter(root, reach, entries, Options(**options), sleep=lambda seconds: None)


def lost(root: Path) -> int:
    return sum(
        row["lost_expired"] for path in reader.files(root, "coverage") for row in pq.read_table(path).to_pylist()
    )


def test_a_schedule_outlives_a_destination_that_is_not_there_and_keeps_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "in the way" / "there"
    there.parent.write_text("mine")
    first, second, third = dataset(here, rows(20_000), rows(4), rows(5))
    budget = sum(path.stat().st_blocks * 512 for path in (first, second, third)) - 1
    stop = rounds.Stop(5)
    left: list[list[bool]] = []
    ticks = Ticks(
        lambda: left.append([path.exists() for path in (first, second, third)]),
        there.parent.unlink,
        stop.tell,
    )
    with ledger.opened(here, "there") as entries, caplog.at_level(logging.ERROR):
        made = exporter(here, partial(places.reached, str(there)), entries, disk_budget=budget)
        rounds.rounds(made, here, ticks, stop)  # type: ignore[arg-type]
    assert left == [[False, True, True]]
    assert sum("cannot make the directory" in line for line in caplog.messages) == 1
    assert sum("NOT exported, with 20000 rows" in line for line in caplog.messages) == 1
    assert lost(there) == 20_000
    assert sums(there) == sums(here)


def test_a_signal_at_any_moment_of_a_wait_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = rounds.Stop(5)
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        sleep(seconds)

    monkeypatch.setattr(rounds.time, "sleep", interrupted)
    with rounds.signals(stop):
        assert stop.wait(20)


def test_what_is_exported_goes_before_the_destination_is_asked_for(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    old, new = dataset(here, rows(3), rows(4))
    with ledger.opened(here, "there") as entries:
        exporter(here, partial(places.reached, str(there)), entries).run()
        new.touch()  # is another one now

        def hangs() -> places.Place:
            assert not old.exists()
            assert new.exists()
            return places.reached(str(there))

        done = exporter(here, hangs, entries, disk_budget=1).run()
    assert (done.found, done.expired.files, done.expired.unexported) == (1, 2, 0)


def test_a_destination_that_cannot_be_deletes_nothing(tmp_path: Path) -> None:
    (path,) = dataset(tmp_path / "here", rows(3))
    with ledger.opened(tmp_path / "here", "there") as entries:
        made = exporter(tmp_path / "here", partial(places.reached, "nonsense://x"), entries, disk_budget=1)
        with pytest.raises(UsageError):
            rounds.rounds(made, tmp_path / "here", Ticks(), rounds.Stop(0))  # type: ignore[arg-type]
    assert path.exists()


def test_a_pass_that_takes_long_looks_at_the_budget_in_between(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (early,) = dataset(here, rows(3))
    late = early.parent.with_name("hour=12") / early.name
    late.parent.mkdir()
    late.write_bytes(early.read_bytes())
    found: list[bool] = []

    class Slow(places.Directory):
        def put(self, name: str, *rest: Any) -> bool:
            found.append(early.exists())
            return super().put(name, *rest)

    with ledger.opened(here, "there") as entries:
        hours = itertools.count(0.0, 3600.0)
        options = Options(disk_budget=early.stat().st_blocks * 512)
        made = Exporter(here, lambda: Slow(there), entries, options, monotonic=lambda: next(hours), wall_ns=lambda: 0)
        done = made.run()
    assert found == [True, False]
    assert (done.exported, done.expired.files, done.expired.unexported) == (2, 1, 0)


def test_a_scheduled_export_starts_without_its_destination(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "in the way" / "there"
    there.parent.write_text("mine")
    dataset(here, rows(3))
    talk = Talk(tmp_path / "said")
    with talk.path.open("w") as said:
        process = subprocess.Popen(
            command("export", here, there, "--schedule", "0 0 1 1 *"), env=environment(), stderr=said
        )
        try:
            talk.wait("cannot make the directory", process)
            there.parent.unlink()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, talk.path.read_text()
        finally:
            process.kill()
    assert sums(there) == sums(here)


@pytest.mark.needs("netns")
def test_a_destination_that_is_full(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    out = in_namespace(
        """
mount("-t", "tmpfs", "-o", "size=64k", "none")
dataset(here, *(rows(2) for _ in range(20)))
before = sums(here)
out["full"] = [export(), export()]
out["some"] = 0 < len(sums(root)) < 20 and sums(root).items() <= before.items()
out["hidden"] = [str(path) for path in root.rglob(".*")]
mount("-o", "remount,size=10m")
export()
out["after"] = before == sums(root) == sums(here)
""",
        there,
        PRELUDE,
    )
    for said in out["full"]:
        assert f"cannot export to {there}: No space left on device; check" in said
        assert "nothing is lost: the next export goes on here" in said
    assert (out["some"], out["hidden"], out["after"]) == (True, [], True)


@pytest.mark.needs("netns")
def test_a_destination_that_is_read_only_or_becomes_so(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    out = in_namespace(
        """
mount("-t", "tmpfs", "none")
dataset(here, rows(3), rows(4))
mount("-o", "remount,ro")
out["start"] = export(keep_s=0)
mount("-o", "remount,rw")
made = places.Directory(root)
class Closing(places.Directory):
    def put(self, *given):
        done = super().put(*given)
        mount("-o", "remount,ro")
        return done
with ledger.opened(here, "there") as entries:
    try:
        Exporter(here, lambda: Closing(root), entries, Options(), sleep=print).run()
    except TracerError as error:
        out["within"] = str(error)
out["one"] = len(sums(root))
mount("-o", "remount,rw")
out["exported"] = export()
out["after"] = sums(root) == sums(here)
""",
        there,
        PRELUDE,
    )
    assert out["start"] == f"cannot write to {there}: make it writable for this process, or choose another"
    assert f"cannot export to {there}: Read-only file system; check" in out["within"]
    assert (out["one"], out["exported"], out["after"]) == (1, 1, True)


@pytest.mark.needs("netns")
def test_a_dataset_on_a_full_volume_is_exported_once_there_is_room(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    out = in_namespace(
        """
here, root = root, root.parent / "elsewhere"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(here)], check=True)
dataset(here, *(rows(2) for _ in range(10)))
with open(here / ".ballast", "wb", buffering=0) as file:
    try:
        while True: file.write(bytes(4096))
    except OSError: pass
out["full"] = export()
(here / ".ballast").unlink()
export()
out["after"] = sums(root) == sums(here) and len(sums(here)) == 10
""",
        there,
        PRELUDE,
    )
    assert f"cannot keep what is exported in {there / '.export'}" in out["full"]
    assert out["after"] is True
