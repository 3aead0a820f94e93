"""Where files lie and what they are called, published and not; and who may write there.

::

    <root>/.lock-<node>                                              held while an agent of that node runs
    <root>/.compact.lock                                             held while files are replaced by others
    <root>/.compact/                                                 hours that are being merged, or were
    <root>/.export/                                                  what was exported, and the exporter's lock
    <root>/<table>/v1/date=YYYY-MM-DD/hour=HH/<node>-<start>-<run>.<n>.parquet
    <root>/<table>/v1/date=YYYY-MM-DD/hour=HH/.<node>-<run>-<n>.tmp  not published yet
    <root>/connections/v1/date=YYYY-MM-DD/hour=HH/.named-<random>.tmp  will replace a published one

`date` and `hour` are those of the rows' ``ts`` in UTC, `start` is the earliest ``ts`` of the file. Names that begin
with a dot or an underscore are invisible to readers. Agents of different nodes may share a root.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from tracer.errors import TracerError
from tracer.schema import SCHEMA_VERSION

HOUR_NS = 3600 * 10**9
#: Seconds that a lock may be held by one who only looks whether it is.
_LOOK_S = 1.0
#: Longest node name used as it is: with everything around it a file name stays below 255 bytes.
MAX_NODE = 120

_UNPUBLISHED = re.compile(r"\.(?P<node>.+)-[0-9a-f]+-[0-9]+\.tmp")
_PUBLISHED = re.compile(r"(?P<node>.+)-(?P<start>[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-(?P<run>[^-]+)\.parquet")
_HALF_NAMED = ".named-"
#: What the run in a merged file's name begins with; an agent's is hexadecimal.
MERGED = "merged"


def safe_node(node: str) -> str:
    """The node's name as part of a file name: only ``[A-Za-z0-9._-]``, bounded, never hidden.

    A name that has to be changed gets a digest of the original, so that two nodes never share one.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", node)[:MAX_NODE].lstrip("._")
    if safe == node and node:
        return node
    return f"{safe or 'node'}-{hashlib.sha256(node.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _utc(ns: int) -> datetime.datetime:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return epoch + datetime.timedelta(microseconds=ns // 1000)


def hour_parts(hour: int) -> tuple[str, str]:
    """The parts of a path that say the hour (whole hours since the epoch)."""
    when = _utc(hour * HOUR_NS)
    return f"date={when:%Y-%m-%d}", f"hour={when:%H}"


def hour_of(parts: tuple[str, ...]) -> int:
    """The hour, since the epoch, of a file's partition, from the parts of its path."""
    date, hour = (part.partition("=")[2] for part in parts[-3:-1])
    when = datetime.datetime.strptime(f"{date} {hour}", "%Y-%m-%d %H").replace(tzinfo=datetime.UTC)
    return int(when.timestamp()) // 3600


def partition(root: Path, table: str, hour: int) -> Path:
    """Directory of the rows whose `ts` lies in this hour (whole hours since the epoch)."""
    return root.joinpath(table, f"v{SCHEMA_VERSION}", *hour_parts(hour))


def published_name(node: str, start_ns: int, run_id: str, number: int) -> str:
    """Name of a published file: node, earliest `ts`, and what makes it unique."""
    return f"{safe_node(node)}-{_utc(start_ns):%Y%m%dT%H%M%S.%f}Z-{run_id}.{number}.parquet"


def unpublished_name(node: str, run_id: str, number: int) -> str:
    """Name of the same file while it is being written; `run_id` is hexadecimal."""
    return f".{safe_node(node)}-{run_id}-{number}.tmp"


def node_of(name: str) -> str:
    """The node in a published file's name, as `safe_node` wrote it; empty if the name is not one of ours."""
    match = _PUBLISHED.fullmatch(name)
    return match["node"] if match else ""


def is_merged(name: str) -> bool:
    """Whether a published file's name is that of several files merged into one."""
    match = _PUBLISHED.fullmatch(name)
    return bool(match and match["run"].startswith(MERGED))


def start_of(name: str) -> str:
    """The `start` in a published file's name, sortable; empty if the name is not one of ours."""
    match = _PUBLISHED.fullmatch(name)
    return match["start"] if match else ""


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, each of them safe from a power cut. Raises OSError.

    Where the group may write and hands itself down (set-group-ID), so it may below: the exporter, which is of another
    user, deletes there.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            mode = directory.parent.stat().st_mode
            if mode & stat.S_ISGID and mode & stat.S_IWGRP:
                directory.chmod(stat.S_IMODE(directory.stat().st_mode) | stat.S_IWGRP)
        sync_directory(directory.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(root: Path, node: str) -> list[Path]:
    """Removes what earlier runs of this node left unpublished, and returns it. Call with the lock held."""
    removed = []
    for path in root.glob("*/v*/date=*/hour=*/.*.tmp"):
        match = _UNPUBLISHED.fullmatch(path.name)
        if match and match["node"] == safe_node(node):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def half_named() -> str:
    """The name of a file that will replace a published one: none that an agent takes for its last run's."""
    return f"{_HALF_NAMED}{secrets.token_hex(6)}.tmp"


def remove_half_named(root: Path) -> None:
    """Removes what was to replace published files when that was ended. Call with `locks.replacing` held."""
    for path in root.glob(f"connections/v*/date=*/hour=*/{_HALF_NAMED}*.tmp"):
        with contextlib.suppress(OSError):  # said where the next one cannot be written
            path.unlink()


class Lock:
    """The right to write one node's files under a root, held until `release` or the end of the process."""

    def __init__(self, root: Path, node: str) -> None:
        """Makes the root if need be. Raises TracerError if it cannot be written, or if an agent holds the lock."""
        path = root / f".lock-{safe_node(node)}"
        try:
            make_directory(root)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise TracerError(
                f"cannot write to {root}: {error.strerror}; choose a directory this process may write to, "
                "with --output, or make this one writable"
            ) from error
        try:
            self._take()
        except OSError as error:
            os.close(self._descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise TracerError(
                    f"cannot lock {path}: {error.strerror}; choose a directory on a file system with locks, "
                    "with --output"
                ) from error
            raise TracerError(
                f"another agent is writing to {root} as node {node!r}; stop it, or give this one another name with "
                "--node or another directory with --output"
            ) from error

    def _take(self) -> None:
        """Raises OSError. An exporter that asks whether an agent writes holds the lock for a moment."""
        deadline = time.monotonic() + _LOOK_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.01)

    def release(self) -> None:
        """Gives the lock up. The file stays: removing it would let two agents lock two files of one name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
