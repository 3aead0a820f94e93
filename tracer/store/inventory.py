"""Which published files a local dataset holds, hour by hour, and what lies among them that is not of it.

What is hidden (a dot or an underscore before its name) is neither: unpublished files, locks, markers.
"""

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tracer import schema
from tracer.store import layout

#: Tables in the order in which their files are best shown elsewhere: coverage never speaks of rows that are not there.
ORDER = ("connections", "endpoints", "coverage")
#: Depth of directories below a table, and how their names begin.
_LEVELS = (f"v{schema.SCHEMA_VERSION}", "date=", "hour=")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A published file; ordered by hour and start. `stamp` tells it from another of its name; `disk` is in bytes."""

    hour: int
    start: str
    table: str
    path: Path
    node: str
    disk: int
    stamp: str

    def name(self, root: Path) -> str:
        """Its name below the root, with slashes."""
        return self.path.relative_to(root).as_posix()


def stamp_of(found: os.stat_result) -> str:
    """What changes whenever a file is replaced."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


def entry_of(path: Path) -> Entry | None:
    """The published file at a path; None if it is not one, or gone."""
    start = layout.start_of(path.name)
    try:
        found = path.lstat()
        hour = layout.hour_of(path.parts)
    except (OSError, ValueError):
        return None
    if not start or not stat.S_ISREG(found.st_mode):
        return None
    node = layout.node_of(path.name)
    return Entry(hour, start, path.parts[-5], path, node, found.st_blocks * 512, stamp_of(found))


class Inventory:
    """What is below a root, as it was when asked. Raises OSError where a directory cannot be listed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directories(self) -> list[Path]:
        """The hours' directories, ordered by hour, then as `ORDER` says."""
        found = [hour for table in ORDER for hour in self._hours(self.root / table)]
        return sorted(found, key=lambda path: (path.parts[-2:], ORDER.index(path.parts[-4])))

    def entries(self) -> list[Entry]:
        """All published files, oldest first."""
        return sorted(entry for hour in self.directories() for entry in self.within(hour))

    def within(self, directory: Path) -> list[Entry]:
        """The published files of one hour's directory, by start; none if it is gone."""
        return sorted(entry for path in _listed(directory) if (entry := entry_of(path)) is not None)

    def strangers(self) -> Iterator[Path]:
        """What is not of the dataset, though not hidden."""
        for path in _listed(self.root):
            if path.name not in ORDER or path.is_symlink():
                yield path
        for table in ORDER:
            level = [self.root / table]
            for begins in _LEVELS:
                below = [path for directory in level for path in _listed(directory)]
                level = [path for path in below if _is_level(path, begins)]
                yield from sorted(set(below) - set(level))
            yield from (path for hour in level for path in _listed(hour) if entry_of(path) is None and path.exists())

    def _hours(self, table: Path) -> list[Path]:
        level = [table] if not table.is_symlink() else []
        for begins in _LEVELS:
            level = [path for directory in level for path in _listed(directory) if _is_level(path, begins)]
        return level


def _is_level(path: Path, begins: str) -> bool:
    if not path.name.startswith(begins) or path.is_symlink() or not path.is_dir():
        return False
    if begins != "hour=":
        return True
    try:
        layout.hour_of((*path.parts, ""))
    except ValueError:
        return False
    return True


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory / name for name in os.listdir(directory) if not name.startswith((".", "_")))
    except (FileNotFoundError, NotADirectoryError):
        return []
