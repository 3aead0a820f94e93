"""Many files of one table made into one, sorted by ``ts``, in memory that does not grow with them.

An external merge sort: runs of so many rows are sorted and written aside, then merged block by block. What a merged
file was made of stands in its metadata.
"""

import base64
import contextlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.errors import TracerError
from tracer.store import reader
from tracer.store.parquet import UnpublishedFile
from tracer.store.roots import File

#: Rows, and bytes, that are sorted at once.
RUN_ROWS, RUN_BYTES = 1 << 15, 32 << 20
#: Rows of a block, of which one of each run is in memory; and how many runs are merged at once.
BLOCK_ROWS, FAN_IN = 1 << 9, 32
#: Rows of the merged file's row groups.
GROUP_ROWS = 1 << 16
_ORIGINS = "merged_from"


def origins(path: File) -> set[str]:
    """Names of the files that a merged file was made of; none of a file that was not merged.

    Raises TracerError: it cannot be read, or does not say so in a way that can be understood.
    """
    packed = reader.metadata(path).get(_ORIGINS)
    try:
        return set(map(str, json.loads(zlib.decompress(base64.b64decode(packed))))) if packed else set()
    except (ValueError, TypeError, zlib.error) as error:
        raise TracerError(
            f"{path} does not tell what it was merged of ({error}); move the file out of the dataset"
        ) from error


def about(names: Iterable[str]) -> dict[str, str]:
    """The metadata from which `origins` reads."""
    packed = zlib.compress(json.dumps(sorted(names)).encode())
    return {_ORIGINS: base64.b64encode(packed).decode("ascii")}


def merge(
    sources: Sequence[Callable[[], contextlib.AbstractContextManager[File]]],
    table: str,
    target: UnpublishedFile,
    scratch: Path,
) -> tuple[int, int]:
    """Writes the rows of all sources to `target`, which is left for the caller to publish; returns the first and last
    ``ts`` in ns.

    Each source gives its file for as long as it is read. `scratch` is an empty directory for the runs.

    Raises:
        TracerError: a source cannot be read.
        OSError, ArrowException: the disk is full, say.
    """
    parts = enumerate(_runs(sources, table))
    runs = [_written(iter([part]), scratch / f"run-{number}") for number, part in parts]
    number = len(runs)
    while len(runs) > FAN_IN:  # the first of them into one, at the end of the line
        first, runs = runs[:FAN_IN], runs[FAN_IN:]
        runs.append(_written(_merged(first), scratch / f"run-{number}"))
        number += 1
        for path in first:
            path.unlink()
    fields = schema.arrow(table)
    first_ns = last_ns = None
    for part in _gathered(_merged(runs), GROUP_ROWS):
        coded = [
            column.dictionary_encode().cast(field.type) if field.type == schema.DICT else column
            for field, column in zip(fields, part.columns, strict=True)
        ]
        target.write(pa.Table.from_arrays(coded, schema=fields))
        first_ns = _ts(part.slice(0, 1)).item() if first_ns is None else first_ns
        last_ns = _ts(part.slice(len(part) - 1)).item()
        del part, coded  # before the next ones are gathered
    for path in runs:
        path.unlink()
    return first_ns or 0, last_ns or 0


def _plain(table: str) -> pa.Schema:
    """The table's schema with texts as such: dictionaries of many blocks cost more to unite than texts to keep."""
    return pa.schema([pa.field(f.name, pa.string() if f.type == schema.DICT else f.type) for f in schema.arrow(table)])


def _runs(sources: Sequence[Callable[[], contextlib.AbstractContextManager[File]]], table: str) -> Iterator[pa.Table]:
    """The rows of all sources in sorted parts, each as one table."""
    fields = _plain(table)
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for source in sources:
        with source() as path:
            for batch in reader.batches(path, table):
                for begin in range(0, batch.num_rows, RUN_ROWS):
                    part = batch.slice(begin, RUN_ROWS).cast(fields)
                    waiting.append(part)
                    rows, size = rows + part.num_rows, size + part.nbytes
                    if rows >= RUN_ROWS or size >= RUN_BYTES:
                        yield _sorted(pa.Table.from_batches(waiting))
                        waiting, rows, size = [], 0, 0
    if waiting:
        yield _sorted(pa.Table.from_batches(waiting))


def _written(parts: Iterator[pa.Table], path: Path) -> Path:
    """Writes a run aside."""
    first = next(parts)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, first.schema, options=options) as stream:
        for part in itertools.chain([first], parts):
            stream.write_table(part.combine_chunks(), max_chunksize=BLOCK_ROWS)
    return path


class _Run:
    """A run that is being read: its next rows."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "rb")
        self._stream = pa.ipc.open_stream(self._file)
        self.rows: pa.Table | None = None
        self.ts = np.empty(0, dtype=np.int64)
        self.load()

    def load(self) -> None:
        """Goes on to the next block; at the end there are no rows."""
        try:
            self.rows = pa.Table.from_batches([self._stream.read_next_batch()])
            self.ts = _ts(self.rows)
        except StopIteration:
            self.rows = None
            self._file.close()

    def take(self, until: int) -> pa.Table | None:
        """Removes and returns the rows of the block up to that time."""
        assert self.rows is not None
        count = int(np.searchsorted(self.ts, until, side="right"))
        if not count:
            return None
        part = self.rows.slice(0, count)
        if count == len(self.ts):
            self.load()
        else:
            self.rows, self.ts = self.rows.slice(count), self.ts[count:]
        return part


def _merged(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of sorted runs in order, in parts: what lies before the earliest end of any run's block is complete."""
    runs = [run for run in map(_Run, paths) if run.rows is not None]
    while runs:
        until = min(int(run.ts[-1]) for run in runs)
        parts = [part for run in runs if (part := run.take(until)) is not None]
        yield _sorted(pa.concat_tables(parts)) if len(parts) > 1 else parts[0]
        runs = [run for run in runs if run.rows is not None]


def _gathered(parts: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Consecutive parts as tables of so many rows, the last one of what is left."""
    waiting: list[pa.Table] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        del part
        if count >= rows:
            gathered, waiting, count = pa.concat_tables(waiting), [], 0
            yield gathered
            del gathered
    if waiting:
        yield pa.concat_tables(waiting)


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table, [("ts", "ascending")]))


def _ts(table: pa.Table) -> np.ndarray:
    return np.asarray(table["ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False))
