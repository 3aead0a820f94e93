"""What was exported where: kept beside the dataset, and safe from whatever ends the process.

An entry says that a file, as its stamp tells it, is at a place, verified. If the ledger is lost nothing else is: files
are then compared with what is there.
"""

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from tracer.errors import TracerError
from tracer.store import locks
from tracer.store.places import Content

_log = logging.getLogger(__name__)

#: The directory below the dataset's root.
DIRECTORY = ".export"
#: How long an entry outlives its file, so that an hour's marker names all that the hour had.
KEPT_S = 30 * 86_400
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    place TEXT, directory TEXT, name TEXT, stamp TEXT, content TEXT, at INTEGER,
    PRIMARY KEY (place, directory, name)
) WITHOUT ROWID
"""


class Ledger:
    """The entries of one place. One process has it at a time (`opened`)."""

    def __init__(self, database: sqlite3.Connection, place: str) -> None:
        self._database, self._place = database, place

    def stamps(self, directory: str) -> dict[str, str]:
        """The stamps of a directory's files by name."""
        asked = "SELECT name, stamp FROM files WHERE place = ? AND directory = ?"
        return dict(self._database.execute(asked, (self._place, directory)))

    def contents(self, directory: str) -> dict[str, Content]:
        """What was put of a directory's files, by name, whether they are still here or not."""
        asked = "SELECT name, content FROM files WHERE place = ? AND directory = ? ORDER BY name"
        return {
            name: Content(*json.loads(held)) for name, held in self._database.execute(asked, (self._place, directory))
        }

    def record(self, name: str, stamp: str, content: Content) -> None:
        """Notes, durably, that a file is there."""
        directory, _, own = name.rpartition("/")
        held = json.dumps([content.size, content.digest])
        with self._database:
            self._database.execute(
                "REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                (self._place, directory, own, stamp, held, int(time.time())),
            )

    def forget(self, root: Path) -> None:
        """Removes old entries of what is no longer here."""
        asked = "SELECT directory, name FROM files WHERE place = ? AND at < ?"
        old = self._database.execute(asked, (self._place, int(time.time()) - KEPT_S)).fetchall()
        gone = [(self._place, *each) for each in old if not root.joinpath(*each).exists()]
        with self._database:
            self._database.executemany("DELETE FROM files WHERE place = ? AND directory = ? AND name = ?", gone)


@contextlib.contextmanager
def opened(root: Path, place: str) -> Iterator[Ledger]:
    """The ledger of a dataset for one place, for this process alone.

    Raises TracerError: another exporter has it; or the directory cannot be written.
    """
    directory = root / DIRECTORY
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise _refused(root, error.strerror or str(error)) from error
    with locks.held(directory / "lock", f"{root} is being exported"), contextlib.ExitStack() as stack:
        try:
            with locks.steady(root):  # not while compaction, which has found no ledger, exchanges an hour
                database = _database(directory / "ledger.db")
        except BlockingIOError as error:
            raise TracerError(f"an hour of {root} is being compacted by another process; try again") from error
        except (sqlite3.Error, OSError) as error:
            raise _refused(root, str(error)) from error
        stack.callback(database.close)
        try:
            yield Ledger(database, place)
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, OSError) and not str(error.filename or "").startswith(str(directory)):
                raise
            raise _refused(root, str(error)) from error


def _database(path: Path) -> sqlite3.Connection:
    try:
        return _connected(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        _log.warning("%s is damaged and begun anew: files are compared with what is at the destination", path)
        path.replace(path.with_name("ledger.db.damaged"))
        return _connected(path)


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level="DEFERRED")
    try:
        database.execute("PRAGMA synchronous = FULL")
        database.execute(_TABLES)
        database.execute("SELECT count(*) FROM files WHERE place = ''").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database


def _refused(root: Path, why: str) -> TracerError:
    return TracerError(
        f"cannot keep what is exported in {root / DIRECTORY}: {why}; make the volume writable for this process, and "
        "leave it some room"
    )


def is_exported(root: Path) -> bool:
    """Whether an exporter keeps a ledger of this dataset."""
    return (root / DIRECTORY / "ledger.db").exists()
