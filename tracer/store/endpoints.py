"""Tables of the endpoints schema, of the columns that naming gives: without pandas, and without Arrow's compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tracer import schema
from tracer.store.arrays import booleans, coded, constant, numbers


def table(columns: Mapping[str, Sequence[Any]], node: str, run_id: str) -> pa.Table:
    """n rows as a table of ``schema.arrow("endpoints")``: `columns` has n values each, None where null."""
    fields = schema.arrow("endpoints")
    n = len(columns["ts"])
    known = {"node": constant(node, n), "run_id": constant(run_id, n)}
    arrays = [known[field.name] if field.name in known else _array(field.type, columns[field.name]) for field in fields]
    return pa.Table.from_arrays(arrays, schema=fields)


def _array(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    valid = np.array([value is not None for value in values], dtype=bool)
    if kind == schema.DICT:
        places: dict[str, int] = {}
        codes = [0 if value is None else places.setdefault(value, len(places)) for value in values]
        return coded(np.array(codes, dtype=np.int32), list(places), valid)
    if kind == pa.bool_():
        return booleans(np.array(values, dtype=bool))
    width = "i8" if kind == schema.TIME else f"u{kind.bit_width // 8}"
    return numbers(kind, np.array([0 if value is None else value for value in values], dtype=width), valid)
