"""The node's part of a dataset: open files, their rotation, their publication, and what a bad disk costs.

Synchronous; knows no threads. Every row given to `write` ends in a published file or in `lost`, and until then it
is in `unpublished`. A disk that fails is not an error of the agent: rows are counted, said once, and tried again.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from tracer import schema
from tracer.clock import WallClock
from tracer.store import endpoints, layout
from tracer.store.columns import starts, table
from tracer.store.coverage import CoverageLog, Run
from tracer.store.inventory import Inventory
from tracer.store.names import RowNames
from tracer.store.parquet import UnpublishedFile
from tracer.store.retention import expire

_log = logging.getLogger(__name__)

#: Hours that are written at once. Rows made from conntrack end before they are reported, so two are usual.
MAX_OPEN = 4
#: Seconds from a failed write to the next attempt, if no rotation comes before.
RETRY_S = 30.0

Totals = Callable[[], Mapping[str, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """What has been published so far: files and bytes by table, and how it stands with publishing.

    A publication is one call of `publish`; it failed if any of its files did. `seconds` is what all of them took, `at`
    (monotonic seconds) when the last whole one was over, before the first one when the run began. `error` is what
    stands in the way now; empty: nothing.
    """

    at: float
    files: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(schema.TABLES, 0))
    bytes: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(schema.TABLES, 0))
    publications: int = 0
    failures: int = 0
    seconds: float = 0.0
    error: str = ""


class _HourFile:
    """An unpublished file of one hour, and the range of its rows' `ts`."""

    def __init__(self, root: Path, hour: int, run: Run, number: int) -> None:
        self.number = number
        self.start = self.end = 0
        name = layout.unpublished_name(run.node, run.run_id, number)
        directory = layout.partition(root, "connections", hour)
        self.file = UnpublishedFile(directory, name, schema.arrow("connections"))

    def write(self, rows: pa.Table, start: int, end: int) -> None:
        self.start = min(self.start, start) if self.file.rows else start
        self.end = max(self.end, end)
        self.file.write(rows)


class Dataset:
    """Writes one run's rows under `root`, which must be locked by the caller."""

    def __init__(
        self,
        root: Path,
        run: Run,
        clock: WallClock,
        *,
        rotate_s: float = 300.0,
        rotate_bytes: int = 64 << 20,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        names: RowNames | None = None,
        disk_budget: int | None = None,
    ) -> None:
        """`names` names the rows, and makes the endpoints table; without, there are none of either.

        `disk_budget` is how many bytes of disk this node's published files may take; None: any.
        """
        self.written = self.lost = self.unpublished = 0
        self._root, self._run, self._clock = root, run, clock
        self._rotate_s, self._rotate_bytes = rotate_s, rotate_bytes
        self._monotonic, self._wall_ns = monotonic, wall_ns
        self._open: dict[int, _HourFile] = {}
        self._number = 0
        self._rotated = monotonic()
        self._published = Published(monotonic())
        self._retry_at = 0.0
        self._lost_when_it_failed = 0
        self._coverage = CoverageLog(run, wall_ns())
        self._names, self._disk_budget = names, disk_budget
        self._endpoints_until = wall_ns()

    @property
    def published(self) -> Published:
        """The account of what was published; each is a snapshot."""
        return self._published

    @property
    def seconds_until_due(self) -> float:
        """How long nothing needs to be published yet; not above 0 if a publication is due."""
        if len(self._open) > MAX_OPEN or any(hour.file.size >= self._rotate_bytes for hour in self._open.values()):
            return 0.0
        return self._rotated + self._rotate_s - self._monotonic()

    def write(self, records: np.ndarray) -> None:
        """Adds records to the files of their hours, a row group each. Never raises for a bad disk."""
        if not len(records):
            return
        ts = self._clock.wall(records["ts"])
        hours = ts // layout.HOUR_NS
        if hours.min() == hours.max():
            self._write_hour(int(hours[0]), records, ts)
            return
        for hour in np.unique(hours).tolist():
            rows = hours == hour
            self._write_hour(hour, records[rows], ts[rows])

    def publish(self, totals: Mapping[str, int], *, last: bool = False) -> None:
        """Publishes all open files and then a coverage row. Never raises for a bad disk.

        `totals` are the agent's running totals by column of the coverage table; those of the dataset itself
        (`written`, and its share of `lost_writer`) are added here.
        """
        self._rotated = began = self._monotonic()
        whole = True
        for hour in sorted(self._open):
            whole &= self._publish_hour(hour, totals)
        if self._names is not None:
            whole &= self._publish_endpoints(self._names, totals, last)
        whole &= self._publish_coverage(totals, last)
        if self._disk_budget is not None:
            self._keep_within(self._disk_budget)
        if whole and self._published.error:
            lost = self.lost - self._lost_when_it_failed
            _log.warning("writing to %s works again; %d rows were lost meanwhile, see coverage/", self._root, lost)
            self._clear()
        self._took(began, whole)

    def _clear(self) -> None:
        """Removes files that were given up while they could not even be removed. Call with none open."""
        try:
            layout.remove_stale(self._root, self._run.node)
        except OSError as error:
            _log.error("cannot clear %s: %s; the next run will try again", self._root, error)

    def _keep_within(self, budget: int) -> None:
        """Deletes this node's oldest files, however full the disk is, and counts their rows as lost_expired."""
        node = layout.safe_node(self._run.node)
        try:
            mine = [entry for entry in Inventory(self._root).entries() if entry.node == node]
            expire(self._root, mine, lambda entry: False, None, budget, self._wall_ns())
        except OSError as error:
            _log.error("cannot keep %s within its disk budget: %s; make the directory readable", self._root, error)

    def _took(self, began: float, whole: bool) -> None:
        before, now = self._published, self._monotonic()
        self._published = dataclasses.replace(
            before,
            publications=before.publications + 1,
            failures=before.failures + (not whole),
            seconds=before.seconds + now - began,
            at=now if whole else before.at,
            error="" if whole else before.error,
        )

    def _count(self, table: str, size: int) -> None:
        before = self._published
        self._published = dataclasses.replace(
            before,
            files={**before.files, table: before.files[table] + 1},
            bytes={**before.bytes, table: before.bytes[table] + size},
        )

    def _write_hour(self, hour: int, records: np.ndarray, ts: np.ndarray) -> None:
        count = len(records)
        self.unpublished += count
        if self._published.error and self._monotonic() < self._retry_at:
            self._lose(count)
            return
        try:
            if hour not in self._open:
                self._open[hour] = _HourFile(self._root, hour, self._run, self._next_number())
            names = self._names.name(records, starts(records, self._clock)) if self._names else None
            rows = table(records, self._run.node, self._clock, names)
            self._open[hour].write(rows, int(ts.min()), int(ts.max()))
        except (OSError, pa.ArrowException) as error:
            self._fail(error)
            self._lose(count)
            self._discard(hour)

    def _publish_hour(self, hour: int, totals: Mapping[str, int]) -> bool:
        item = self._open[hour]
        rows = item.file.rows
        name = layout.published_name(self._run.node, item.start, self._run.run_id, item.number)
        about = {"start": str(item.start), "end": str(item.end), "rows": str(rows)}
        try:
            item.file.publish(name, self._metadata("connections", totals) | about)
        except (OSError, pa.ArrowException) as error:
            self._fail(error)
            self._discard(hour)
            return False
        del self._open[hour]
        self.unpublished -= rows
        self.written += rows
        self._count("connections", item.file.size)
        return True

    def _publish_endpoints(self, names: RowNames, totals: Mapping[str, int], last: bool) -> bool:
        """The endpoints since the last time, hour by hour; up to now less what may yet be heard of the past."""
        until = self._wall_ns() - (0 if last else round(names.hold_s() * 1e9))
        while self._endpoints_until < until:
            hour = self._endpoints_until // layout.HOUR_NS
            end = min(until, (hour + 1) * layout.HOUR_NS)
            parts = names.endpoints(self._endpoints_until, end)
            tables = (endpoints.table(columns, self._run.node, self._run.run_id) for columns in parts)
            # A row that ends with the hour belongs to it: the next one begins there.
            if not self._publish_whole("endpoints", hour, self._endpoints_until, tables, totals):
                return False
            self._endpoints_until = end
        return True

    def _publish_coverage(self, totals: Mapping[str, int], last: bool) -> bool:
        now = self._wall_ns()
        totals = dict(totals) | self._own_totals(totals)
        naming = self._names.state() if self._names else "off"
        if self._names:
            totals |= self._names.totals()
        rows = self._coverage.row(now, totals, naming=naming, last=last)
        if not self._publish_whole("coverage", now // layout.HOUR_NS, now, [rows], totals):
            return False
        self._coverage.commit(now, totals)
        return True

    def _publish_whole(
        self, kind: str, hour: int, start: int, parts: Iterable[pa.Table], totals: Mapping[str, int]
    ) -> bool:
        """Publishes a file of these row groups, if there are any; false if that failed, which is then said."""
        file, number = None, self._next_number()
        try:
            directory = layout.partition(self._root, kind, hour)
            for part in parts:
                if file is None:
                    name = layout.unpublished_name(self._run.node, self._run.run_id, number)
                    file = UnpublishedFile(directory, name, part.schema)
                file.write(part)
            if file is not None:
                name = layout.published_name(self._run.node, start, self._run.run_id, number)
                file.publish(name, self._metadata(kind, totals))
                self._count(kind, file.size)
        except (OSError, pa.ArrowException) as error:
            self._fail(error)
            if file:
                file.discard()
            return False
        return True

    def _metadata(self, kind: str, totals: Mapping[str, int]) -> dict[str, str]:
        """The file's key-value metadata; losses are totals of the run so far."""
        losses = {name: count for name, count in (dict(totals) | self._own_totals(totals)).items() if "lost_" in name}
        return {
            "schema_version": str(schema.SCHEMA_VERSION),
            "table": kind,
            "node": self._run.node,
            "boot_id": self._run.boot_id,
            "kernel": self._run.kernel,
            "run_id": self._run.run_id,
            "version": self._run.version,
            "losses": json.dumps(losses),
        }

    def _own_totals(self, totals: Mapping[str, int]) -> dict[str, int]:
        emitted = totals.get("emitted", self.written + self.lost + self.unpublished)
        return {"emitted": emitted, "written": self.written, "lost_writer": totals.get("lost_writer", 0) + self.lost}

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _discard(self, hour: int) -> None:
        item = self._open.pop(hour, None)
        if item:
            self._lose(item.file.rows)
            item.file.discard()

    def _lose(self, count: int) -> None:
        self.unpublished -= count
        self.lost += count

    def _fail(self, error: Exception) -> None:
        self._retry_at = self._monotonic() + RETRY_S
        if not self._published.error:
            self._lost_when_it_failed = self.lost
            _log.error(
                "cannot write to %s: %s; rows are lost, and counted, until it works again: free space or mend the "
                "directory, the agent keeps trying",
                self._root,
                error,
            )
        self._published = dataclasses.replace(self._published, error=str(error) or type(error).__name__)
