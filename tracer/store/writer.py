"""The writer thread: takes chunks of records from the agent's loop and never makes it wait.

Gathers rows into groups, hands full groups to a `Dataset`, and publishes by the dataset's timer. What it cannot
take it counts: rows put = written + lost + unpublished, at any moment.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tracer.clock import WallClock
from tracer.errors import TracerError
from tracer.record import RECORD
from tracer.store import layout
from tracer.store.coverage import Run
from tracer.store.dataset import Dataset, Published
from tracer.store.gather import Gather
from tracer.store.names import RowNames

_log = logging.getLogger(__name__)

#: Rows of a row group. Twice as many take 3 MB more at the peak, and make files 3 % smaller (decisions/024-memory.md).
GROUP_ROWS = 8_192
#: Bound of what waits for the thread, in bytes of raw records: four seconds at 20,000 rows a second.
PENDING_BYTES = 16 << 20
#: Share of that bound that may be held back for names; beyond, the oldest goes out as it is.
HELD = 0.6
#: The longest that rows are held back for names once the writer is closing.
CLOSING_S = 2.0
#: How often whoever names the rows is called, at least.
HEAR_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """The writer's account at one moment, in rows.

    `oldest_at` (monotonic seconds) is when the oldest row was put that is neither published nor lost; None: there is
    none.
    """

    published: Published
    emitted: int = 0
    written: int = 0
    lost: int = 0
    queued: int = 0
    oldest_at: float | None = None

    @property
    def unpublished(self) -> int:
        """Rows that are neither in a published file nor lost: those queued and those in unpublished files."""
        return self.emitted - self.written - self.lost


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A publication that is to be made of all that was put until `at` (monotonic seconds)."""

    at: float
    closing: bool
    flushes: int


def _nothing() -> Mapping[str, int]:
    return {}


class DatasetWriter:
    """Writes one run's rows under `root`. Start it after any fork; stop it with `close`.

    `counters` is called by the thread at each publication for running totals (and gauges) by column name of the
    coverage table, as `tracer.kernel.capture.Capture.totals` names them.
    """

    def __init__(
        self,
        root: Path,
        run: Run,
        clock: WallClock,
        counters: Callable[[], Mapping[str, int]] = _nothing,
        *,
        rotate_s: float = 300.0,
        rotate_bytes: int = 64 << 20,
        group_rows: int = GROUP_ROWS,
        pending_bytes: int = PENDING_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        names: RowNames | None = None,
        disk_budget: int | None = None,
        lock: layout.Lock | None = None,
    ) -> None:
        """Locks the directory, unless the caller has its `lock`; removes this node's unpublished files.

        Raises TracerError if it cannot.
        """
        self.pending_rows = max(1, pending_bytes // RECORD.itemsize)
        self._counters, self._monotonic, self._names = counters, monotonic, names
        self._lock = layout.Lock(root, run.node) if lock is None else None
        try:
            stale = layout.remove_stale(root, run.node)
        except OSError as error:
            self._unlock()
            raise TracerError(f"cannot clear {root}: {error}; make the directory writable") from error
        if stale:
            _log.warning("removed %d unpublished files of an earlier run that did not end well", len(stale))
        self._dataset = Dataset(
            root,
            run,
            clock,
            rotate_s=rotate_s,
            rotate_bytes=rotate_bytes,
            monotonic=monotonic,
            wall_ns=wall_ns,
            names=names,
            disk_budget=disk_budget,
        )
        self._changed = threading.Condition()
        # Everything below is guarded by `_changed`; the dataset belongs to the thread alone.
        self._gather = Gather(group_rows)
        self._counts = Counts(self._dataset.published)
        self._refused = 0
        # When the first row was put that the publication asked for shall take, and the first after that.
        self._asked_since: float | None = None
        self._since: float | None = None
        self._flushes = self._flushed = 0
        self._asked: _Asked | None = None
        self._closing = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vip-tracer-writer", daemon=True)
        self._thread.start()

    def put(self, records: np.ndarray) -> bool:
        """Takes a copy of the records; False, and all counted as lost, if too many wait. Never waits for a disk."""
        count = len(records)
        with self._changed:
            before = self._counts
            taken = not self._closing and self._error is None and before.queued + count <= self.pending_rows
            self._refused += 0 if taken else count
            self._counts = dataclasses.replace(
                before,
                emitted=before.emitted + count,
                lost=before.lost + (0 if taken else count),
                queued=before.queued + (count if taken else 0),
            )
            if taken and count:
                now = self._monotonic()
                self._since = now if self._since is None else self._since
                self._gather.put(records, now)
                if self._gather.oldest is not None:
                    self._changed.notify_all()
            return taken

    def snapshot(self) -> Counts:
        """The account now."""
        with self._changed:
            oldest = self._since if self._asked_since is None else self._asked_since
            return dataclasses.replace(self._counts, oldest_at=oldest)

    @property
    def failed(self) -> bool:
        """Whether the thread has died of a defect; `close` then says so."""
        return self._error is not None

    def ask_flush(self) -> int:
        """Has everything put so far published, and a coverage row, without waiting; returns the request's number."""
        with self._changed:
            self._flushes += 1
            self._changed.notify_all()
            return self._flushes

    def flush(self) -> None:
        """As `ask_flush`; returns when that is done or has failed."""
        mine = self.ask_flush()
        with self._changed:
            self._changed.wait_for(lambda: self._flushed >= mine or self._done or self._error is not None)

    def close(self) -> None:
        """Publishes everything, the run's last coverage row too, and releases the directory. Idempotent.

        Raises TracerError if the thread had died of a defect.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._unlock()
        if self._error is not None:
            raise TracerError(f"the writer stopped: {self._error!r}; this is a defect, please report it")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # noqa: BLE001  a defect: the agent must hear of it, and the account must stay true
            _log.exception("the writer stopped")
            with self._changed:
                self._error = error
                self._asked_since = self._since = None
                counts = self._counts
                self._counts = dataclasses.replace(counts, lost=counts.emitted - counts.written, queued=0)
                self._changed.notify_all()

    def _step(self) -> bool:
        """Waits for something to do, and does it; False once everything is done and the writer is closing."""
        hold = self._hear()
        with self._changed:
            self._changed.wait_for(lambda: self._is_work(hold), timeout=self._pause(hold))
            self._ask()
            group = self._gather.take() if self._is_due(hold) else None
            asked = self._asked
            publish = asked is not None and group is None and not self._is_waited_for(asked)
        if group is not None:
            self._dataset.write(group)
            self._account(len(group))
        if publish and asked is not None:
            self._dataset.publish(self._totals(), last=asked.closing)
            self._account(0)
            with self._changed:
                self._asked = self._asked_since = None
                self._flushed = max(self._flushed, asked.flushes)
                self._done = asked.closing
                self._changed.notify_all()
        return not self._done

    def _hear(self) -> float:
        """Lets whoever names the rows take over what is new; returns for how long rows are held back."""
        if self._names is None:
            return 0.0
        with self._changed:
            fresh = self._gather.unmet()
        for records in fresh:
            self._names.meet(records)
        self._names.hear()
        hold = self._names.hold_s()
        return min(hold, CLOSING_S) if self._closing else hold

    def _ask(self) -> None:
        """Notes that everything put so far is to be published, if it is time."""
        due = self._closing or self._flushes > self._flushed or self._dataset.seconds_until_due <= 0
        if due and self._asked is None:
            now = self._monotonic()
            self._gather.seal(now)
            self._asked_since, self._since = self._since, None
            self._asked = _Asked(now, self._closing, self._flushes)

    def _is_due(self, hold: float) -> bool:
        """Whether the oldest group may be written: it was held long enough, or there is no room to hold it."""
        oldest = self._gather.oldest
        crowded = self._counts.queued > HELD * self.pending_rows
        return oldest is not None and (crowded or self._monotonic() >= oldest + hold)

    def _is_waited_for(self, asked: _Asked) -> bool:
        return self._gather.oldest is not None and self._gather.oldest <= asked.at

    def _is_work(self, hold: float) -> bool:
        if self._asked is None and (self._closing or self._flushes > self._flushed):
            return True
        return self._is_due(hold) or (self._asked is not None and not self._is_waited_for(self._asked))

    def _pause(self, hold: float) -> float:
        """How long nothing will be to do, if nobody calls."""
        pauses = [HEAR_S] if self._names is not None else []
        if self._gather.oldest is not None:
            pauses.append(self._gather.oldest + hold - self._monotonic())
        if self._asked is None:
            pauses.append(self._dataset.seconds_until_due)
        return max(0.0, min(pauses, default=0.0))

    def _totals(self) -> dict[str, int]:
        try:
            totals = dict(self._counters())
        except OSError as error:
            _log.warning("cannot read the agent's counters: %s; they are null in this coverage row", error)
            totals = {}
        with self._changed:
            return totals | {"emitted": self._counts.emitted, "lost_writer": self._refused}

    def _account(self, taken: int) -> None:
        with self._changed:
            self._counts = dataclasses.replace(
                self._counts,
                written=self._dataset.written,
                lost=self._refused + self._dataset.lost,
                queued=self._counts.queued - taken,
                published=self._dataset.published,
            )
