"""Files whose columns are called as another standard calls them: ECS, OpenTelemetry, IPFIX.

A column takes a name of the standard where that means this column alone. A name that fits several (both pods are a
``k8s.pod.name``), or that another column bears already, is given to none: they keep their own. IPFIX has one name for
IPv4 addresses and another for IPv6: such a column becomes two, each null where the address is of the other family.
"""

import collections
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracer.errors import TracerError
from tracer.schema import DICT
from tracer.store.parquet import STATISTICS

#: What --names takes.
STANDARDS = ("ecs", "otel", "ipfix")


def names(fields: pa.Schema, standard: str) -> dict[str, tuple[str, ...]]:
    """What each column is called: one name, or two, of its IPv4 and its IPv6 addresses."""
    found = {field.name: _names(field, standard) for field in fields}
    given = collections.Counter(name for each in found.values() for name in each)
    own = set(fields.names)
    return {
        column: each if all(given[name] == 1 and (name == column or name not in own) for name in each) else (column,)
        for column, each in found.items()
    }


def _names(field: pa.Field, standard: str) -> tuple[str, ...]:
    known = (field.metadata or {}).get(standard.encode())
    return tuple(known.decode().split("/")) if known else (field.name,)


def write(source: Path, target: Path, standard: str) -> None:
    """Writes a published file anew with renamed columns, a row group at a time.

    Raises OSError: the file cannot be written; TracerError: the source cannot be read.
    """
    try:
        file = pq.ParquetFile(source)
        fields = file.schema_arrow
        metadata = {k: v for k, v in (file.metadata.metadata or {}).items() if k != b"ARROW:schema"}
        called = names(fields, standard)
        renamed = pa.schema([part for field in fields for part in _fields(field, called)])
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise TracerError(f"cannot read {source}: {error}; move the file out of the dataset") from error
    with file, pa.OSFile(str(target), "wb") as sink:
        writer = pq.ParquetWriter(sink, renamed, compression="zstd", write_statistics=_statistics(called))
        try:
            for group in _groups(file, source):
                columns = [part for field in fields for part in _columns(group[field.name], called[field.name])]
                table = pa.Table.from_arrays(columns, schema=renamed)
                writer.write_table(table, row_group_size=max(1, len(table)))
        except BaseException:
            with contextlib.suppress(OSError, pa.ArrowException):  # here, where its file is still open
                writer.close()
            raise
        writer.add_key_value_metadata({**metadata, b"names": standard.encode()})
        writer.close()


def _statistics(called: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [name for column in STATISTICS if column in called for name in called[column]]


def _groups(file: pq.ParquetFile, source: Path) -> Iterator[pa.Table]:
    try:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise TracerError(f"cannot read {source}: {error}; move the file out of the dataset") from error


def _fields(field: pa.Field, called: Mapping[str, tuple[str, ...]]) -> list[pa.Field]:
    each = called[field.name]
    about = {**(field.metadata or {}), b"column": field.name.encode()}
    nullable = field.nullable or len(each) > 1
    return [pa.field(name, field.type, nullable=nullable, metadata=about) for name in each]


def _columns(column: pa.ChunkedArray, each: tuple[str, ...]) -> list[pa.ChunkedArray]:
    if len(each) == 1:
        return [column]
    texts = column.cast(pa.string())
    sixth = pc.match_substring(texts, ":")
    nothing = pa.scalar(None, pa.string())
    return [pc.if_else(chosen, texts, nothing).dictionary_encode().cast(DICT) for chosen in (pc.invert(sixth), sixth)]
