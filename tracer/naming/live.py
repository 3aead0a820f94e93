"""Names rows while the cluster changes: what the API server says goes into the book, and the book's answers to rows.

Belongs to the thread that writes rows. Knows when it is too early to name a row, which services the rows were about,
and how fresh the names are; the requests are `watch`'s.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tracer.naming.book import KEEP_NS, Book, Change
from tracer.naming.cgroups import Cgroups
from tracer.naming.endpoints import COLUMNS
from tracer.naming.names import Coded, Namer
from tracer.naming.objects import KINDS, Key

#: How long rows wait for names: a pod's first packet may come before its address is in the API, and a watch lags.
WAIT_S = 2.0
#: How long rows wait for the first lists, which take 10 s in the largest clusters.
PATIENCE_S = 15.0
#: How long a watch may be gone before the names count as stale: servers end watches now and then, for the next one.
STALE_NS = 15 * 10**9
#: How long after its last row a service's endpoints are still told: what lasts has a row in each interval.
TOUCHED_NS = 3600 * 10**9
#: Rows of the endpoints table that are made at once.
ENDPOINT_ROWS = 8192


class KindState(Protocol):
    """How it stands with one kind of objects."""

    @property
    def synced(self) -> bool:
        """Whether the first list is complete."""

    @property
    def disconnected_ns(self) -> int | None:
        """Since when (wall clock) nothing can be heard; None: it is heard."""

    @property
    def heard_ns(self) -> int | None:
        """When (wall clock) the API server was last heard; None: never."""

    @property
    def malformed(self) -> int:
        """Objects and lines so far that could not be read."""


class Source(Protocol):
    """What tells of the cluster's changes: `tracer.naming.watch.Watches`."""

    def changes(self) -> Sequence[Change]:
        """What was heard since the last call."""

    def state(self) -> Mapping[str, KindState]:
        """How it stands, by kind."""

    def start(self) -> None:
        """Begins to ask."""

    def stop(self) -> None:
        """Ends it."""


class LiveNames:
    """Names rows from what a source tells. All calls between `start` and `close` come from one thread."""

    def __init__(
        self,
        source: Source,
        cgroups: Cgroups | None = None,
        *,
        wait_s: float = WAIT_S,
        keep_ns: int = KEEP_NS,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`keep_ns` is how long what is gone is remembered: longer than from a row's beginning to its naming, and
        than from one publication to the next."""
        self._source, self._cgroups, self._wait_s = source, cgroups, wait_s
        self._monotonic, self._wall_ns = monotonic, wall_ns
        self.book = Book(keep_ns)
        self._namer = Namer(self.book, cgroups)
        self._patient_until = float("inf")
        self._unnamed = self._ambiguous = 0
        # Services and pods of the rows so far, and when there was last one.
        self._services: dict[Key, int] = {}
        self._pods: dict[Key, int] = {}

    def start(self) -> None:
        """Begins to listen. Starts threads: call it after any fork."""
        self._patient_until = self._monotonic() + PATIENCE_S
        self._source.start()

    def close(self) -> None:
        """Ends the source, and gives descriptors back."""
        self._source.stop()
        if self._cgroups is not None:
            self._cgroups.close()

    def hear(self) -> None:
        """Takes over what was heard since."""
        self.book.apply(self._source.changes())

    def meet(self, records: np.ndarray) -> None:
        """Notes whose processes these are while they live."""
        self._namer.meet(records)

    def hold_s(self) -> float:
        """Seconds that rows are to wait for their names; longer until everything was listed once."""
        if len(self.book.synced) == len(KINDS):
            return self._wait_s
        return max(self._wait_s, self._patient_until - self._monotonic())

    def name(self, records: np.ndarray, wall_start_ns: npt.NDArray[np.int64]) -> Mapping[str, Coded]:
        """The name columns of n records, each as of its connection's start (n,), ns since the epoch."""
        self.hear()
        names = self._namer.name(records, wall_start_ns)
        self._unnamed += int(names.unnamed.sum())
        self._ambiguous += int(names.ambiguous.sum())
        now = self._wall_ns()
        self._services.update(dict.fromkeys(names.services, now))
        self._pods.update(dict.fromkeys(names.pods, now))
        return names.columns

    def endpoints(self, begin_ns: int, end_ns: int) -> Iterator[Mapping[str, Sequence[Any]]]:
        """The endpoints of the services that rows were about, in [begin_ns, end_ns): tables by column, each of some
        thousand rows."""
        self.hear()
        found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for service in sorted(self._touched()):
            for name, values in self.book.endpoints.rows(begin_ns, end_ns, [service]).items():
                found[name] += values
            if len(found["ts"]) >= ENDPOINT_ROWS:
                yield found
                found = {name: [] for name in COLUMNS}
        if found["ts"]:
            yield found

    def totals(self) -> Mapping[str, int]:
        """Counts so far, and how old the names are, by column of the coverage table."""
        states = self._source.state().values()
        heard = [state.heard_ns for state in states if state.heard_ns is not None]
        counts = {
            "unnamed": self._unnamed,
            "ambiguous_names": self._ambiguous,
            "names_malformed": sum(state.malformed for state in states),
            "names_forgotten": self.book.forgotten_early,
        }
        if heard:
            counts["names_age_s"] = max(0, self._wall_ns() - min(heard)) // 10**9
        return counts

    def state(self) -> str:
        """What the names are worth now: starting, current or stale."""
        if len(self.book.synced) < len(KINDS):
            return "starting"
        gone = [state.disconnected_ns for state in self._source.state().values() if state.disconnected_ns is not None]
        return "stale" if gone and self._wall_ns() - min(gone) > STALE_NS else "current"

    def _touched(self) -> set[Key]:
        """The services that rows dialled, and those whose pods rows went to: a client may dial a pod itself."""
        since = self._wall_ns() - TOUCHED_NS
        self._services = {key: at for key, at in self._services.items() if at >= since}
        self._pods = {key: at for key, at in self._pods.items() if at >= since}
        services = set(self._services)
        for item in self.book.slices.values():
            service = (item.namespace, item.service) if item.service is not None else None
            if service is None or service in services:
                continue
            if any((each.pod_namespace, each.pod) in self._pods for each in item.endpoints):
                services.add(service)
        return services
