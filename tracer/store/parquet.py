"""One Parquet file from its first row to its publication, and how the columns are encoded.

A file is written under a hidden name in its final directory and appears, whole and durable, by a rename.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.schema import DICT
from tracer.store import layout, locks

_log = logging.getLogger(__name__)

#: Numbers with few values: a dictionary is smaller than any delta (measured: 1.2 bytes a row in all).
FEW_VALUES = frozenset({"dst_port", "backend_port", "cgroup_id", "netns", "pid", "ct_zone", "retransmits"})
#: Numbers without any pattern, where a delta would be longer than the number.
RANDOM = frozenset({"ct_id"})
#: Columns whose range helps a reader to skip row groups; statistics of all would cost a fifth of the writing.
STATISTICS = ("ts", "started", "src_ip", "dst_ip", "dst_port", "backend_ip")


def _options(schema: pa.Schema) -> dict[str, object]:
    coded = [field.name for field in schema if field.type == DICT or field.name in FEW_VALUES]
    plain = [field.name for field in schema if pa.types.is_boolean(field.type) or field.name in RANDOM]
    delta = [name for name in schema.names if name not in coded and name not in plain]
    return {
        "compression": "zstd",
        "use_dictionary": coded,
        "column_encoding": dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
        "write_statistics": [name for name in STATISTICS if name in schema.names],
    }


class UnpublishedFile:
    """A file that nobody sees yet. Every method but `discard` may raise OSError or ArrowException."""

    def __init__(self, directory: Path, name: str, schema: pa.Schema) -> None:
        """Makes the directory if need be."""
        self.rows = self._published_bytes = 0
        self._path = directory / name
        with locks.publishing(directory):
            # This descriptor is open before anything is written, so its fsync reports every failed write-back.
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                self._sink = pa.OSFile(str(self._path), "wb")
            except (OSError, pa.ArrowException):
                self._unlink()
                raise
        try:
            self._writer = pq.ParquetWriter(self._sink, schema, **_options(schema))
        except (OSError, pa.ArrowException):
            self._unlink()
            raise

    @property
    def size(self) -> int:
        """Bytes written so far, the footer not included; of a published file all of them."""
        return self._published_bytes or int(self._sink.tell())

    def write(self, table: pa.Table) -> None:
        """Adds the table as one row group."""
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.rows += len(table)

    def publish(self, name: str, metadata: Mapping[str, str], may: Callable[[], object] = lambda: None) -> Path:
        """Completes the file and renames it to `name`; returns where it now is.

        `may` raises what forbids it: asked at the last moment, while nobody deletes from the directory.
        """
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()
        self._sink.close()
        os.fsync(self._descriptor)
        self._published_bytes = os.fstat(self._descriptor).st_size
        target = self._path.with_name(name)
        with locks.steady(target.parent):
            may()
            self._path.rename(target)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        try:
            layout.sync_directory(target.parent)
        except OSError as error:  # the file is there and whole: only a power cut could still take its name away
            _log.warning("cannot make the name of %s durable: %s; check the disk", target, error)
        return target

    def discard(self) -> None:
        """Gives the file up, whatever state it is in. Never raises."""
        with contextlib.suppress(OSError, pa.ArrowException, ValueError):
            self._writer.close()
        with contextlib.suppress(OSError, pa.ArrowException):
            self._sink.close()
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self._path.unlink()
