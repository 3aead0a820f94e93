"""What is deleted when, and how that is counted: by age, and where a disk budget demands it; the oldest first.

What has not been exported is deleted only for the budget, and then loudly: its rows stand in coverage/ as
``lost_expired``, in the hour they were of.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from tracer.errors import TracerError
from tracer.store import layout, locks, losses, reader
from tracer.store.inventory import Entry, stamp_of

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Expired:
    """What was deleted: files in all; those that had not been exported, and their rows of connections."""

    files: int = 0
    disk: int = 0
    unexported: int = 0
    lost_rows: int = 0

    def add(self, more: "Expired") -> None:
        """Counts what was deleted then, too."""
        self.files += more.files
        self.disk += more.disk
        self.unexported += more.unexported
        self.lost_rows += more.lost_rows


def expire(
    root: Path,
    entries: Sequence[Entry],
    exported: Callable[[Entry], bool],
    keep_s: float | None,
    budget: int | None,
    now_ns: int,
    *,
    unexported: bool = True,
) -> Expired:
    """Deletes files of a dataset whose hour ended longer than `keep_s` ago and that are exported, and then the oldest
    until the rest takes no more than `budget` bytes of disk: exported ones first, others only if `unexported`.

    An agent, which knows of no export, has nothing exported.
    """
    done = Expired()
    left: list[Entry] = []
    known = {entry.path: exported(entry) for entry in entries}
    for entry in sorted(entries):
        old = keep_s is not None and (entry.hour + 1) * layout.HOUR_NS + keep_s * 1e9 <= now_ns
        if not (old and known[entry.path] and _delete(entry, done)):
            left.append(entry)
    if budget is not None:
        left = _shrink(left, budget, lambda entry: known[entry.path], done)
    if budget is not None and unexported:
        lost = _shrink(left, budget, _is_no_loss, done, lambda entry: _note_loss(root, entry, done, known))
        gone = len(left) - len(lost)
        if gone:
            _log.error(
                "deleted %d files that were NOT exported, with %d rows of connections, because the dataset in %s had "
                "to stay within %d bytes: see to the export, or give it a larger --disk-budget; the rows are counted "
                "in coverage/ as lost_expired",
                gone, done.lost_rows, root, budget,
            )  # fmt: skip
    _remove_empty(entries, now_ns)
    return done


def _shrink(
    entries: list[Entry],
    budget: int,
    may: Callable[[Entry], bool],
    done: Expired,
    before: Callable[[Entry], object] = lambda entry: None,
) -> list[Entry]:
    """Deletes of ordered entries those it may until the budget is kept; returns what is left."""
    total = sum(entry.disk for entry in entries)
    left: list[Entry] = []
    for entry in entries:
        if total > budget and may(entry):
            before(entry)
            if _delete(entry, done):
                total -= entry.disk
                continue
        left.append(entry)
    return left


def _is_no_loss(entry: Entry) -> bool:
    return not losses.is_loss(entry.path.name)


def _delete(entry: Entry, done: Expired) -> bool:
    """Deletes a file, unless it has been replaced meanwhile; false if it is still there."""
    try:
        with locks.steady(entry.path.parent, alone=True):
            if stamp_of(entry.path.lstat()) != entry.stamp:
                return False
            entry.path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        _log.info("%s is not deleted yet: its directory is in use", entry.path)
        return False
    except OSError as error:
        _log.warning("cannot delete %s: %s; make its directory writable for this process", entry.path, error.strerror)
        return False
    done.files += 1
    done.disk += entry.disk
    return True


def rows_of(entry: Entry) -> tuple[int, dict[str, str]]:
    """How many rows a file has, and its metadata; none where it cannot be read."""
    try:
        return reader.extent(entry.path)[0], reader.metadata(entry.path)
    except TracerError:
        return 0, {}


def _note_loss(root: Path, entry: Entry, done: Expired, known: Mapping[Path, bool]) -> None:
    """Counts a file that is going to be deleted though nobody has it, in coverage of its hour."""
    done.unexported += 1
    if entry.table != "connections":
        return
    rows, about = rows_of(entry)
    done.lost_rows += rows
    try:
        losses.publish(root, entry, rows, about, lambda path: not known.get(path))
    except (OSError, pa.ArrowException, TracerError) as error:
        _log.error("cannot count %d rows of %s in coverage/: %s", rows, entry.path, error)


def _remove_empty(entries: Sequence[Entry], now_ns: int) -> None:
    """Removes the directories of hours and days that have nothing in them, if they have been over for a day."""
    for directory in sorted({entry.path.parent for entry in entries}):
        if (layout.hour_of((*directory.parts, "")) + 25) * layout.HOUR_NS <= now_ns:
            for path in (directory, directory.parent):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
