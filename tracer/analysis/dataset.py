"""A dataset for people who program: pandas frames, balance and diagnosis of a range of time.

Times are anything pandas.Timestamp takes, in UTC where they name no zone. A range holds the rows whose interval ended
after its begin and not after its end.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.analysis import diagnose as diagnoses
from tracer.analysis import gather
from tracer.analysis.diagnose import Diagnosis
from tracer.analysis.gather import Engine
from tracer.errors import NoDataError, UsageError
from tracer.store import reader
from tracer.store.roots import Root, root_of

Frame = pd.DataFrame
Time = str | datetime.datetime | pd.Timestamp


class Dataset:
    """A dataset at a local directory, or at an address such as ``s3://bucket/prefix``."""

    def __init__(self, place: str | Path) -> None:
        """Raises UsageError if there is no such place; files are looked for when they are asked for."""
        self.root: Root = root_of(place)

    def __repr__(self) -> str:
        return f"tracer.open({str(self.root)!r})"

    def frame(
        self,
        begin: Time | None = None,
        end: Time | None = None,
        service: str | None = None,
        columns: Sequence[str] | None = None,
        table: Literal["connections", "coverage", "endpoints"] = "connections",
    ) -> Frame:
        """Rows as a frame, in the order of their files; texts as categories.

        Args:
            begin: only rows whose interval ended after this.
            end: and not after this.
            service: only those of ``namespace/name``, or of a virtual address.
            columns: only these, in the schema's order; fewer are quicker. Default: all.
            table: which of the dataset's tables.

        Raises:
            NoDataError: there is no file in this range.
            UsageError: there is no such column.
            TracerError: a file cannot be read.
        """
        fields = schema.arrow(table)
        unknown = [name for name in columns or () if name not in fields.names]
        if unknown:
            raise UsageError(f"{table} has no column {unknown[0]}; `vip-tracer schema` lists them")
        wanted = list(fields.names if columns is None else columns)
        begin_ns, end_ns = _ns(begin), _ns(end)
        needed = {"ts", *wanted} | (set() if service is None else {"dst_namespace", "dst_service", *_address(table)})
        parts = [fields.empty_table().select([name for name in fields.names if name in wanted])]
        for path in reader.files(self.root, table, begin_ns, None if end_ns is None else end_ns + 1):
            for part in reader.tables(path, table, list(needed)):
                chosen = part.filter(_chosen(part, begin_ns, end_ns, service))
                parts.append(chosen.select(parts[0].column_names))
        found: Frame = pa.concat_tables(parts).unify_dictionaries().to_pandas()
        return found

    def diagnose(
        self,
        begin: Time | None = None,
        end: Time | None = None,
        service: str | None = None,
        strict: bool = False,
        scheduler: str | None = None,
    ) -> Diagnosis:
        """Verdicts, causes and shares, as `vip-tracer report` shows them.

        Args:
            begin: as in `frame`.
            end: as in `frame`.
            service: only this one, in depth; all are tested.
            strict: a file that cannot be read is an error, not a warning.
            scheduler: the address of a Dask scheduler whose workers count.

        Raises:
            NoDataError: no rows in the range, or not of this service.
            TracerError: a file cannot be read, or the scheduler not be used.
        """
        engine: Engine = gather.local
        if scheduler is not None:
            from tracer.analysis import cluster

            engine = cluster.engine(scheduler)
        return diagnoses.diagnose(self.root, _ns(begin), _ns(end), service, strict=strict, engine=engine)

    def balance(self, begin: Time | None = None, end: Time | None = None, service: str | None = None) -> Frame:
        """A row per backend of every service port: its loads, shares and fair share, and the service's verdict.

        Columns: service, verdict, and those of `tracer.analysis.balance.per_backend`. Errors as in `diagnose`.
        """
        found = self.diagnose(begin, end, service).findings
        frames = [each.backends.assign(service=each.service, verdict=each.verdict.word) for each in found]
        if not frames:
            raise NoDataError(f"no service has connections in {self.root} in this range; widen it")
        whole = pd.concat(frames, ignore_index=True)
        return whole[["service", "verdict", *whole.columns.drop(["service", "verdict"])]]


def _ns(time: Time | None) -> int | None:
    if time is None:
        return None
    try:
        when = pd.Timestamp(time)
    except ValueError as error:
        raise UsageError(f"{time!r} is no time: give it as 2026-07-31T11:59:00Z") from error
    return int((when if when.tzinfo else when.tz_localize("UTC")).as_unit("ns").value)


def _address(table: str) -> set[str]:
    return {"dst_ip"} & set(schema.arrow(table).names)


def _chosen(part: pa.Table, begin_ns: int | None, end_ns: int | None, service: str | None) -> pa.ChunkedArray:
    """Which rows: true or false of each."""
    ts = part["ts"].cast(pa.int64())
    chosen = pc.greater(ts, begin_ns if begin_ns is not None else -(1 << 63))
    if end_ns is not None:
        chosen = pc.and_(chosen, pc.less_equal(ts, end_ns))
    if service is not None:
        namespace, _, name = service.partition("/")
        of = pc.and_(_equals(part, "dst_namespace", namespace), _equals(part, "dst_service", name))
        if "dst_ip" in part.column_names:
            of = pc.or_(of, _equals(part, "dst_ip", service))
        chosen = pc.and_(chosen, of)
    return chosen


def _equals(part: pa.Table, column: str, text: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(part[column].cast(pa.string()), text), False)
