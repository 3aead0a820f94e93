"""Rows of the coverage table: what one run of the agent saw, wrote and lost, interval by interval.

Takes running totals and makes increments of them. An interval that could not be published is not lost: the next
row reaches back to the end of the last published one.
"""

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from tracer import schema
from tracer.store.arrays import booleans, constant, nulls, numbers
from tracer.version import __version__

#: Columns that are levels, not increments.
GAUGES = ("open_connections", "translations", "directional", "unentered_namespaces", "names_age_s")
#: Columns that are words.
WORDS = ("naming",)
#: Columns that retention fills, in rows of its own (tracer/store/losses.py).
RETENTION = ("lost_expired",)
#: Columns that the agent's totals may fill; those it leaves out are null.
COUNTED = tuple(
    column.name for column in schema.COVERAGE if column.nullable and column.name not in GAUGES + WORDS + RETENTION
)
#: Columns that the writer counts itself.
WRITER = ("emitted", "written", "lost_writer")


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of the agent: what stays the same from its first row to its last."""

    node: str
    run_id: str
    boot_id: str
    kernel: str
    version: str = __version__
    programs: str = ""
    roles: str = "client,forwarded"
    interval_s: int = 60

    @classmethod
    def here(cls, node: str, programs: str = "", roles: str = "client,forwarded", interval_s: int = 60) -> "Run":
        """A new run on this machine, with an id of its own."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        release = os.uname().release
        return cls(node, secrets.token_hex(6), boot_id, release, programs=programs, roles=roles, interval_s=interval_s)


class CoverageLog:
    """Makes the rows of one run. `row` proposes, `commit` says that the proposed row has been published."""

    def __init__(self, run: Run, started_ns: int) -> None:
        self._run = run
        self._started_ns = started_ns
        self._first = True
        self._base: dict[str, int] = {}

    def row(self, ts_ns: int, totals: Mapping[str, int], *, naming: str | None = None, last: bool = False) -> pa.Table:
        """The row from the end of the last committed one to `ts_ns`: a table of one row.

        `totals` are running totals by column name, and levels for `GAUGES`; other names are ignored. A total that
        is smaller than before was started anew, and all of it is the increment.
        """
        values: dict[str, object] = dataclasses.asdict(self._run)
        values |= {"ts": ts_ns, "started": min(self._started_ns, ts_ns), "first": self._first, "last": last}
        values["naming"] = naming
        for name in (*COUNTED, *WRITER):
            if name in totals:
                before = self._base.get(name, 0)
                values[name] = totals[name] - before if totals[name] >= before else totals[name]
        values |= {name: totals[name] for name in GAUGES if name in totals}
        fields = schema.arrow("coverage")
        return pa.Table.from_arrays([_cell(field.type, values.get(field.name)) for field in fields], schema=fields)

    def commit(self, ts_ns: int, totals: Mapping[str, int]) -> None:
        """The row made with these arguments is published: the next one begins where it ended."""
        self._started_ns = ts_ns
        self._first = False
        self._base |= totals


def _cell(kind: pa.DataType, value: object) -> pa.Array:
    """An array of one value, or of one null."""
    if kind == schema.DICT:
        return nulls(1) if value is None else constant(str(value), 1)
    if kind == pa.bool_():
        return booleans(np.array([value], dtype=bool))
    width = f"u{kind.bit_width // 8}"
    return numbers(kind, np.array([0 if value is None else value], dtype=width), np.array([value is not None]))
