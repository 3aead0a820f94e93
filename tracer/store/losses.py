"""A row of coverage for rows that were deleted before anybody had them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracer import schema
from tracer.errors import TracerError
from tracer.store import layout, reader
from tracer.store.arrays import booleans, constant, nulls, numbers
from tracer.store.inventory import Entry
from tracer.store.parquet import UnpublishedFile

#: What stands before a lost file's run and number in the name of the file that tells of it.
_PREFIX = "expired"
#: Its metadata: which files are lost, their rows, and the last end of them in ns.
_TOLD = "lost"


def publish(
    root: Path, entry: Entry, rows: int, about: dict[str, str], may_replace: Callable[[Path], bool] = lambda path: False
) -> None:
    """Publishes that the rows of `entry` are gone: beside the hour's coverage, of no length, at the end of its rows.

    Added to what tells of the same run's losses in that hour, if that file may be replaced: one a file would take the
    room that was made. Nothing if it is told already.

    Raises OSError or ArrowException.
    """
    said, last = about.get("end", ""), (entry.hour + 1) * layout.HOUR_NS - 1
    end = min(int(said), last) if said.isdecimal() and len(said) < 20 else last
    directory = layout.partition(root, "coverage", entry.hour)
    run = entry.path.name.rpartition("-")[2].removesuffix(".parquet")
    name, files = f"{entry.node}-{entry.start}-{_PREFIX}{run}.parquet", [entry.path.name]
    for path in sorted(directory.glob(f"*-{_PREFIX}{run.partition('.')[0]}.*.parquet")):
        told = _told(path) if layout.node_of(path.name) == entry.node else {}
        if entry.path.name in told.get("files", ()):
            return
        if told and may_replace(path):
            name, files, rows, end = path.name, files + told["files"], rows + told["rows"], max(end, told["end"])
    known: dict[str, Any] = {
        "node": about.get("node", entry.node), "ts": end, "started": end, "run_id": about.get("run_id", ""),
        "boot_id": about.get("boot_id", ""), "version": about.get("version", ""), "kernel": about.get("kernel", ""),
        "lost_expired": rows,
    }  # fmt: skip
    fields = schema.arrow("coverage")
    table = pa.Table.from_arrays([_cell(field, known.get(field.name)) for field in fields], schema=fields)
    (directory / f".{name}.tmp").unlink(missing_ok=True)  # of a process that was ended at it
    file = UnpublishedFile(directory, f".{name}.tmp", fields)
    try:
        file.write(table)
        told = {"files": files, "rows": rows, "end": end}
        of_file = {"schema_version": str(schema.SCHEMA_VERSION), "table": "coverage", "node": known["node"]}
        file.publish(name, of_file | {_TOLD: json.dumps(told)})
    except (OSError, pa.ArrowException):
        file.discard()
        raise


def _told(path: Path) -> dict[str, Any]:
    """What a file tells of losses; nothing if it cannot be read."""
    try:
        return dict(json.loads(reader.metadata(path).get(_TOLD, "{}")))
    except (TracerError, ValueError):
        return {}


def is_loss(name: str) -> bool:
    """Whether a published file tells of a loss."""
    return name.rpartition("-")[2].startswith(_PREFIX)


def _cell(field: pa.Field, value: object) -> pa.Array:
    """One value; what is not known is null, or where that may not be, nothing: an empty text, no, zero."""
    if field.type == schema.DICT:
        return nulls(1) if value is None and field.nullable else constant("" if value is None else str(value), 1)
    if field.type == pa.bool_():
        return booleans(np.array([bool(value)]))
    kind = f"u{field.type.bit_width // 8}"
    return numbers(field.type, np.array([value or 0], dtype=kind), np.array([value is not None or not field.nullable]))
