"""Hours that are over, each made into one large sorted file.

In a directory the hour's directory is exchanged, in one step, for one that holds the merged file and all that was not
merged; whoever lists the hour and finds it the same directory afterwards saw the one or the other (`reader.files`).
An object store knows no such step: there merged hours are written below ``compacted/``, one object each, beside the
originals, which stay.
"""

import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa

from tracer import schema
from tracer.errors import TracerError, UsageError
from tracer.store import layout, ledger, locks, merge, reader
from tracer.store.inventory import Entry, Inventory, stamp_of
from tracer.store.pace import Pace, retried
from tracer.store.parquet import UnpublishedFile
from tracer.store.places import Store, content_of
from tracer.store.roots import File, Remote, RemoteFile, Root

_log = logging.getLogger(__name__)

#: Where hours are merged, below a local root; and where merged hours stand, below one in an object store.
SCRATCH, COMPACTED = ".compact", "compacted"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """Which hours: those that ended `close_after_s` ago; or this one (hours since the epoch). And of which node."""

    close_after_s: float = 900.0
    hour: int | None = None
    node: str | None = None

    def has(self, hour: int, now_ns: int) -> bool:
        """Whether an hour is to be compacted."""
        over = (hour + 1) * layout.HOUR_NS + self.close_after_s * 1e9 <= now_ns
        return over and self.hour in (None, hour)


@dataclasses.dataclass(frozen=True, slots=True)
class Compacted:
    """One hour of one table that was merged."""

    table: str
    hour: int
    files: int
    rows: int
    size: int


def compact(root: Root, chosen: Chosen, failed: Callable[[TracerError], object]) -> Iterator[Compacted]:
    """Merges what is chosen, hour by hour; an hour that cannot be is left as it was and told to `failed`.

    Raises TracerError: nothing can be done here at all.
    """
    if isinstance(root, Remote):
        yield from _in_store(root, chosen, failed)
        return
    _check_not_exported(root)
    with locks.replacing(root):
        shutil.rmtree(root / SCRATCH, ignore_errors=True)  # of one that was ended: merged, or not yet
        layout.remove_half_named(root)
        for directory in Inventory(root).directories():
            if chosen.has(layout.hour_of((*directory.parts, "")), time.time_ns()):
                try:
                    done = _hour(root, directory, chosen)
                except UsageError:  # an exporter has begun
                    raise
                except TracerError as error:
                    failed(error)
                    continue
                except (OSError, pa.ArrowException) as error:
                    why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                    failed(TracerError(f"cannot compact {directory}: {why}; it is as it was: make room, and try again"))
                    continue
                if done is not None:
                    yield done
        with contextlib.suppress(OSError):
            (root / SCRATCH).rmdir()


def _check_not_exported(root: Path) -> None:
    if ledger.is_exported(root):
        raise UsageError(
            f"{root} is being exported, and its files may not change their names: compact what was exported, at the "
            "destination"
        )


def _hour(root: Path, directory: Path, chosen: Chosen) -> Compacted | None:
    """Merges an hour's directory; None: there is nothing to merge."""
    entries = [each for each in Inventory(root).within(directory) if chosen.node is None or each.node == _safe(chosen)]
    if len(entries) < 2:
        return None
    table = entries[0].table
    scratch = root / SCRATCH / secrets.token_hex(6)
    building = scratch / "hour"
    try:
        layout.make_directory(building)
        name, rows = _merged([each.path for each in entries], table, building, scratch, _safe(chosen))
        size = (building / name).stat().st_size
        exchange(root, directory, building, entries)
        return Compacted(table, entries[0].hour, len(entries), rows, size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _safe(chosen: Chosen) -> str:
    return layout.safe_node(chosen.node) if chosen.node else "all"


def _merged(paths: list[Path], table: str, building: Path, scratch: Path, node: str) -> tuple[str, int]:
    """Publishes the merged file of these in `building`: its name, and its rows."""
    names: set[str] = set()
    expected = 0
    for path in paths:
        expected += _rows(path, table)
        names |= {path.name} | merge.origins(path)
    runs = scratch / "runs"
    runs.mkdir()
    file = UnpublishedFile(building, ".merged.tmp", schema.arrow(table))
    try:
        given = [partial(_as_it_is, path) for path in paths]
        start, end = merge.merge(given, table, file, runs)
        if file.rows != expected:
            raise TracerError(
                f"{expected} rows of {building} became {file.rows}; this is a defect, nothing was changed"
            )
        name = layout.published_name(node, start, f"{layout.MERGED}{secrets.token_hex(6)}", 1)
        file.publish(name, _about(table, start, end, file.rows) | merge.about(names))
    except BaseException:
        file.discard()
        raise
    return name, expected


def _as_it_is(path: Path) -> contextlib.AbstractContextManager[File]:
    return contextlib.nullcontext(path)


def _about(table: str, start: int, end: int, rows: int) -> dict[str, str]:
    return {
        "schema_version": str(schema.SCHEMA_VERSION), "table": table, "start": str(start), "end": str(end),
        "rows": str(rows),
    }  # fmt: skip


def _rows(path: File, table: str) -> int:
    """How many rows a file has, of which this version knows every column. Raises TracerError."""
    rows, columns = reader.extent(path)
    unknown = columns - set(schema.arrow(table).names)
    if unknown:
        raise TracerError(
            f"{path} has columns that this version does not know ({', '.join(sorted(unknown)[:5])}); its hour is left "
            "as it is: compact it with the version that wrote it"
        )
    return rows


def exchange(root: Path, directory: Path, building: Path, merged: list[Entry]) -> None:
    """Puts `building` in the place of an hour's directory, which takes its own; what was not merged is in both.

    Raises TracerError: a merged file was replaced meanwhile, an exporter has begun, or the file system cannot exchange
    directories.
    """
    stamps = {entry.path.name: entry.stamp for entry in merged}
    # On the root: an exporter's ledger is there before this looks for it, or after the exchange, which it then lists.
    with locks.steady(root, alone=True), locks.steady(directory, alone=True):
        _check_not_exported(root)
        for path in directory.iterdir():
            found = path.lstat()
            if path.name in stamps:
                if stamp_of(found) != stamps.pop(path.name):
                    raise TracerError(f"{path} was replaced while it was compacted; compact again")
            elif stat.S_ISDIR(found.st_mode):
                raise TracerError(f"{path} is a directory, which no hour has; move it out of the dataset")
            else:
                os.link(path, building / path.name, follow_symlinks=False)
        if stamps:
            raise TracerError(f"files of {directory} were deleted while it was compacted; compact again")
        known = directory.stat()
        with contextlib.suppress(PermissionError):
            os.chown(building, known.st_uid, known.st_gid)
        building.chmod(stat.S_IMODE(known.st_mode))
        layout.sync_directory(building)
        _renameat2(building, directory)
        layout.sync_directory(directory.parent)


def _renameat2(one: Path, other: Path) -> None:
    call = ctypes.CDLL(None, use_errno=True).renameat2
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV):
            raise TracerError(
                f"the file system of {other} cannot exchange directories ({os.strerror(code)}); copy the dataset to "
                "one that can (ext4, xfs, btrfs, tmpfs), on one volume"
            )
        raise OSError(code, os.strerror(code), str(other))


def _in_store(root: Remote, chosen: Chosen, failed: Callable[[TracerError], object]) -> Iterator[Compacted]:
    if chosen.node is not None:
        raise UsageError("in an object store an hour becomes one object of all nodes: leave out --node")
    for table in schema.TABLES:
        hours: dict[int, list[PurePosixPath]] = {}
        for path in root.listed(table, recursive=True):
            if path.relative_to(root.base / table).match("v*/date=*/hour=*/*.parquet") and layout.start_of(path.name):
                hours.setdefault(layout.hour_of(path.parts), []).append(path)
        for hour, paths in sorted(hours.items()):
            if chosen.has(hour, time.time_ns()):
                try:
                    done = _object(root, table, hour, sorted(paths))
                except TracerError as error:
                    failed(error)
                    continue
                if done is not None:
                    yield done


def _object(root: Remote, table: str, hour: int, paths: list[PurePosixPath]) -> Compacted | None:
    """Merges an hour's objects, with what was merged of them before, into the one that stands for the hour."""
    store = Store(root.below(COMPACTED))
    own = layout.published_name("all", hour * layout.HOUR_NS, layout.MERGED, 1)
    name = layout.partition(Path(), table, hour).joinpath(own).as_posix()
    before = RemoteFile(root.filesystem, store.root.base / name)
    try:
        done = merge.origins(before) if before.exists() else set()
        fresh = [RemoteFile(root.filesystem, path) for path in paths if path.name not in done]
        if not fresh:
            return None
        with tempfile.TemporaryDirectory(prefix="vip-tracer-compact-") as scratch:
            sources = [*fresh, before] if done else fresh
            made, rows = _merged_here(sources, table, Path(scratch), done | {each.name for each in fresh})
            with made.open("rb") as whole:
                content = content_of(whole)

                def put() -> bool:
                    whole.seek(0)
                    return store.put(name, whole, content, Pace())

                retried(put, store.lasting, f"putting {name} to {store}")
        return Compacted(table, hour, len(fresh), rows, content.size)
    except OSError as error:
        raise TracerError(
            f"cannot compact {' '.join(layout.hour_parts(hour))} of {table} in {root}: {root.said(error)}; nothing was "
            "changed: check the credentials and the network, leave room for temporary files, and try again"
        ) from error


def _merged_here(sources: list[RemoteFile], table: str, scratch: Path, names: set[str]) -> tuple[Path, int]:
    """The merged file of these objects, in a directory of this machine, and its rows."""
    runs, rows = scratch / "runs", 0
    runs.mkdir()

    @contextlib.contextmanager
    def fetched(remote: RemoteFile) -> Iterator[File]:
        nonlocal rows
        local = scratch / "fetched"
        with remote.filesystem.open_input_stream(str(remote.path)) as stream, local.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
        try:
            rows += _rows(local, table)
            yield local
        except TracerError as error:
            raise TracerError(str(error).replace(str(local), str(remote))) from error

    file = UnpublishedFile(scratch, ".merged.tmp", schema.arrow(table))
    try:
        start, end = merge.merge([partial(fetched, each) for each in sources], table, file, runs)
        if file.rows != rows:
            raise TracerError(f"{rows} rows of {sources[0]} and others became {file.rows}; this is a defect")
        return file.publish("merged", _about(table, start, end, rows) | merge.about(names)), rows
    except BaseException:
        file.discard()
        raise
