"""Published files of a dataset, in the order of time, as record batches of the schema this version knows.

Hidden names (unpublished files, locks) are not seen. Columns go by name: what a newer version added is left out,
what an older one lacked is null.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from tracer import schema
from tracer.errors import NoDataError, TracerError
from tracer.store import layout
from tracer.store.roots import File, Remote, RemoteFile, Root

#: Directories below a table's, and published files: how their names begin, and end.
_LEVELS, _ENDING = ("v", "date=", "hour="), ".parquet"
_BELOW = f"{'/'.join(f'{level}*' for level in _LEVELS)}/*{_ENDING}"
#: How often a directory is listed anew that others exchange meanwhile, before that is a fault of its own.
_PATIENCE = 100


@overload
def files(root: Path, table: str = ..., start_ns: int | None = ..., end_ns: int | None = ...) -> list[Path]: ...
@overload
def files(root: Root, table: str = ..., start_ns: int | None = ..., end_ns: int | None = ...) -> list[File]: ...
def files(
    root: Root, table: str = "connections", start_ns: int | None = None, end_ns: int | None = None
) -> list[Path] | list[File]:
    """Published files of a table, ordered by hour, then by start; only hours that touch [start_ns, end_ns).

    Raises NoDataError if there are none, TracerError if they cannot be listed.
    """
    first = None if start_ns is None else layout.hour_parts(start_ns // layout.HOUR_NS)
    last = None if end_ns is None else layout.hour_parts((end_ns - 1) // layout.HOUR_NS)

    def within(hour: tuple[str, ...]) -> bool:
        return (first is None or hour >= first) and (last is None or hour <= last)

    every: Iterable[File] = _local(root, table, within) if isinstance(root, Path) else _remote(root, table, within)
    shown = (path for path in every if not path.name.startswith((".", "_")))
    found = sorted(shown, key=lambda path: (path.parts[-3:-1], layout.start_of(path.name), path.name))
    if not found:
        if isinstance(root, Path) and root.name in schema.TABLES:
            raise NoDataError(f"{root} is a table of a dataset: give the directory above it, {root.absolute().parent}")
        where = "directory" if isinstance(root, Path) else "address, and that there is such a bucket"
        raise NoDataError(
            f"no {table} in {root}; check the {where}, or wait for the agent's first publication (--rotate)"
        )
    return found


def _local(root: Path, table: str, within: Callable[[tuple[str, ...]], bool]) -> Iterator[Path]:
    directories = [root / table]
    for level in _LEVELS:
        directories = [each / name for each in directories for name in _names(each) if name.startswith(level)]
    for hour in directories:
        if within(hour.parts[-2:]):
            yield from (hour / name for name in _names(hour) if name.endswith(_ENDING))


def _names(directory: Path) -> list[str]:
    """What is in a directory, as it was at one moment; nothing if it is none, or gone.

    Compaction exchanges the directory for another and empties the one that it took: whoever listed that one would see
    a part of the hour, or nothing. So what was listed must still be the hour afterwards. (An open directory keeps its
    inode's number from being used again.)
    """
    for _ in range(_PATIENCE):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                names = os.listdir(descriptor)
                if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                    return names
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):  # what retention has just ended; what only has such a name
            return []
        except OSError as error:
            todo = "check its permissions" if isinstance(error, PermissionError) else "try again"
            raise TracerError(f"cannot list {directory}: {error.strerror}; rows would be missing: {todo}") from error
    raise TracerError(f"{directory} is exchanged faster than it can be listed; who compacts it again and again?")


def _remote(root: Remote, table: str, within: Callable[[tuple[str, ...]], bool]) -> Iterator[RemoteFile]:
    # All at once: not every store lists directories that are no objects of their own (Google's does not).
    for path in root.listed(table, recursive=True):
        below = path.relative_to(root.base / table)
        if len(below.parts) == 4 and below.match(_BELOW) and within(below.parts[-3:-1]):
            yield RemoteFile(root.filesystem, path)


def batches(path: File, table: str = "connections", columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of one file as batches with the given columns (default all), in the schema's order.

    Raises TracerError if the file cannot be read, or lacks a column that is never null, or a value in it.
    """
    wanted = _wanted(table, columns)
    with _opened(path, table, wanted) as (file, present):
        for batch in file.iter_batches(columns=present):
            yield _shaped(batch, wanted, path)


def tables(
    path: File, table: str = "connections", columns: Sequence[str] | None = None, most_rows: int = 1 << 19
) -> Iterator[pa.Table]:
    """As `batches`, in large parts: row groups together that have up to so many rows, and one dictionary a column."""
    wanted = _wanted(table, columns)
    with _opened(path, table, wanted) as (file, present):
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        for groups in _runs(sizes, most_rows):
            read = file.read_row_groups(groups, columns=present, use_threads=False).unify_dictionaries()
            parts = [_shaped(batch, wanted, path) for batch in read.combine_chunks().to_batches()]
            yield pa.Table.from_batches(parts, schema=pa.schema(wanted))


def span(root: Root, table: str = "connections") -> tuple[int, int]:
    """Begin and end of the hours that a table has files of, in ns since the epoch. Raises NoDataError."""
    hours = [layout.hour_of(path.parts) for path in files(root, table)]
    return min(hours) * layout.HOUR_NS, (max(hours) + 1) * layout.HOUR_NS


def _wanted(table: str, columns: Sequence[str] | None) -> list[pa.Field]:
    return [field for field in schema.arrow(table) if columns is None or field.name in columns]


def _runs(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of consecutive groups whose sizes add up to `most` at the most, or of one that is larger."""
    run: list[int] = []
    total = 0
    for number, size in enumerate(sizes):
        if run and total + size > most:
            yield run
            run, total = [], 0
        run.append(number)
        total += size
    if run:
        yield run


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    """What pyarrow makes of a damaged footer, as its other errors: names that are no text, or no columns."""
    try:
        yield
    except (KeyError, UnicodeDecodeError) as error:
        raise pa.ArrowInvalid(f"its footer is damaged ({error})") from error


@contextlib.contextmanager
def _open(path: File) -> Iterator[pa.NativeFile]:
    """The file, opened once for all that is read of it: another may take its name meanwhile.

    Raises TracerError if it cannot be read, then or while it is open.
    """
    try:
        opened = pa.OSFile(str(path)) if isinstance(path, Path) else path.filesystem.open_input_file(str(path.path))
        with opened as file:
            yield file
    except FileNotFoundError as error:
        raise TracerError(
            f"{path} is gone since it was listed: its hour was compacted, or it has expired; try again"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise TracerError(f"cannot read {path}: {error}; move the file out of the dataset and try again") from error


def extent(path: File) -> tuple[int, set[str]]:
    """How many rows a file has, and the names of its columns. Raises TracerError if it cannot be read."""
    with _open(path) as opened:
        file, names = _parquet(opened, [])
        return file.metadata.num_rows, names


def _parquet(opened: pa.NativeFile, coded: list[str]) -> tuple[pq.ParquetFile, set[str]]:
    """The file, of which the `coded` columns are read as dictionaries if it has them; and the names of its columns.

    Those are known from what opening makes of the footer. Not from the metadata of a row group's columns, where
    Arrow ends the process if they are damaged; nor from the footer's `schema`: the two hold each other, and so their
    memory (30 kB a file).
    """
    with _sound():
        footer = pq.read_metadata(opened)
        try:
            file = pq.ParquetFile(opened, metadata=footer, read_dictionary=coded)
        except KeyError:  # an older version's file, which lacks one
            names = pq.ParquetFile(opened, metadata=footer).schema_arrow.names
            there = [name for name in coded if name in names]
            file = pq.ParquetFile(opened, metadata=footer, read_dictionary=there)
        return file, set(file.schema_arrow.names)


@contextlib.contextmanager
def _opened(path: File, table: str, wanted: list[pa.Field]) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
    """The file, and which of the wanted columns it has."""
    with _open(path) as opened:
        file, present = _parquet(opened, [field.name for field in wanted if field.type == schema.DICT])
        missing = [field.name for field in wanted if field.name not in present and not field.nullable]
        if missing:
            raise TracerError(
                f"{path} lacks the columns {', '.join(missing)}; it is not a {table} file of this version or a "
                "later one: move it out of the dataset"
            )
        yield file, [field.name for field in wanted if field.name in present]


def rows(root: Path, table: str = "connections", columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All batches of a table, file by file in the order of `files`, with its errors and those of `batches`."""
    for path in files(root, table):
        yield from batches(path, table, columns)


def metadata(path: File) -> dict[str, str]:
    """A file's own metadata: schema_version, node, run_id, start, end, rows, losses and so on.

    Raises TracerError if the file cannot be read.
    """
    with _open(path) as opened, _sound():
        found = pq.read_metadata(opened).metadata or {}
    texts = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}
    texts.pop("ARROW:schema", None)
    return texts


def _shaped(batch: pa.RecordBatch, wanted: list[pa.Field], path: File) -> pa.RecordBatch:
    """The batch with exactly the wanted fields. Raises TracerError if one that is never null is."""
    arrays = []
    for field in wanted:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            arrays.append(pa.nulls(batch.num_rows, field.type))
        else:
            array = batch.column(index)
            if array.null_count and not field.nullable:
                raise TracerError(
                    f"{path} has rows without {field.name}; another program wrote it: move it out of the dataset"
                )
            arrays.append(array if array.type == field.type else array.cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(wanted))
