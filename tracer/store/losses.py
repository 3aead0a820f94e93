"""A row of coverage for rows that were deleted before anybody had them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracer import schema
from tracer.store import layout
from tracer.store.arrays import booleans, constant, nulls, numbers
from tracer.store.inventory import Entry
from tracer.store.parquet import UnpublishedFile

#: What stands before a lost file's run and number in the name of the file that tells of it.
_PREFIX = "expired"


def publish(root: Path, entry: Entry, rows: int, about: dict[str, str]) -> None:
    """Publishes that the rows of `entry` are gone: beside the hour's coverage, of no length, at the end of its rows.

    Raises OSError or ArrowException; FileExistsError: it is said already.
    """
    end = int(about.get("end", (entry.hour + 1) * layout.HOUR_NS - 1))
    directory = layout.partition(root, "coverage", entry.hour)
    run = entry.path.name.rpartition("-")[2].removesuffix(".parquet")
    name = f"{entry.node}-{entry.start}-{_PREFIX}{run}.parquet"
    if (directory / name).exists():
        raise FileExistsError(name)
    known: dict[str, Any] = {
        "node": about.get("node", entry.node), "ts": end, "started": end, "run_id": about.get("run_id", ""),
        "boot_id": about.get("boot_id", ""), "version": about.get("version", ""), "kernel": about.get("kernel", ""),
        "lost_expired": rows,
    }  # fmt: skip
    fields = schema.arrow("coverage")
    table = pa.Table.from_arrays([_cell(field, known.get(field.name)) for field in fields], schema=fields)
    file = UnpublishedFile(directory, f".{name}.tmp", fields, root)
    try:
        file.write(table)
        file.publish(name, {"schema_version": str(schema.SCHEMA_VERSION), "table": "coverage", "node": known["node"]})
    except (OSError, pa.ArrowException):
        file.discard()
        raise


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
