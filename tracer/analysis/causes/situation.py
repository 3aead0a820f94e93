"""What is known of one service port, as every detector takes it: small integer counts, and who was an endpoint when.

Detectors never see rows. Whatever made the counts (`of_tables`, or partial counts merged over many files) stays
outside; everything here is arrays over bins of time, clients, nodes and backends, each named by its place.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Measures of load, and the columns of `Situation.cells` that hold them.
MEASURES = {"connections": "opened", "connection_time": "duration_us", "bytes": "bytes"}
#: What counts as a failure to connect, by `result`; the others happen to connections that stood.
FAILURES = ("refused", "timeout", "unreachable")
#: Columns of `Situation.cells`: the keys (truths are 0 and 1), and the counts.
KEYS = ("bin", "client", "node", "backend", "direct", "socket")
COUNTS = ("opened", "long_rows", "duration_us", "long_us", "failed_us", "bytes", "long_bytes", "latency_us",
          "latencies", *FAILURES)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Situation:
    """One service port over a range of time.

    `cells`: columns of n cells, one cell per combination of `KEYS`, with the sums of `COUNTS`. `bin` is the place of
    the time bin, `client`, `node`, `backend` are places in `clients`, `nodes`, `backends` (-1: the backend is unknown);
    `direct`: the client dialled the backend's own address, not the virtual one; `socket`: rewritten at connect().
    `opened` counts connections that began, `long_*` what belongs to rows that do not hold a whole connection (those
    longer than the reporting interval), `failed_us` the time of rows that ended as one of `FAILURES` (which also are
    columns) or in which nothing came back (no handshake, no packet), `latency_us` and `latencies` the sum and number of
    known connect latencies.

    `backends`: a row per backend with ip, port, pod, workload, node, zone (None where unknown).
    `ready`: bins by backends, the part of the bin in which the backend was to get connections; None: nobody knows.
    `affinity`, `local`, `hinted`: whether the service has ClientIP affinity, a Local traffic policy, zone hints; None
    where nobody knows. `lost`: of each node that lost any, rows lost over rows seen; `gaps`: of each node that was not
    watched all the time, the time it was not over that it was. `bin_s`, `range_s`, `interval_s` (the agents' reporting
    interval) in seconds. `client_column` is the column of the connections table that names clients.
    """

    service: str
    protocol: str
    bin_s: float
    range_s: float
    cells: Mapping[str, npt.NDArray[np.int64]]
    clients: list[str]
    nodes: list[str]
    node_zones: list[str | None]
    backends: pd.DataFrame
    ready: Floats | None = None
    affinity: bool | None = None
    local: bool | None = None
    hinted: bool | None = None
    lost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gaps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval_s: float = 60.0
    client_column: str = "src_pod"

    def column(self, name: str) -> Floats:
        """A column of the cells as floats (n,)."""
        return np.asarray(self.cells[name], dtype=np.float64)

    def places(self, name: str) -> npt.NDArray[np.int64]:
        """A key of the cells (n,)."""
        return self.cells[name]

    @functools.cached_property
    def known(self) -> Mask:
        """Cells whose backend is known."""
        return np.asarray(self.places("backend") >= 0)

    @functools.cached_property
    def direct(self) -> Mask:
        """Cells of connections that bypassed the virtual address."""
        return np.asarray(self.cells["direct"], dtype=bool)

    @functools.cached_property
    def endpoint_then(self) -> Mask:
        """Cells whose backend was an endpoint in their bin or one next to it (rules lag a moment); all, if unknown."""
        if self.ready is None:
            return self.known.copy()
        near = self.ready > 0
        near[1:] |= self.ready[:-1] > 0
        return np.asarray(self.known & near[self.places("bin"), np.maximum(self.places("backend"), 0)])

    @functools.cached_property
    def entitled(self) -> Mask:
        """Backends that were to get connections at some time of the range: those that share the load."""
        if self.ready is None:
            return np.bincount(self.places("backend")[self.known], minlength=len(self.backends)) > 0
        return np.asarray(self.ready.sum(axis=0) > 0)

    def load(self, measure: str, among: Mask | None = None, values: Floats | None = None) -> Floats:
        """Load of each backend, of the cells `among` (default all with a known backend), in units of the measure.

        `values`, one per cell, stand in for the measure's own.
        """
        taken = self.known if among is None else self.known & among
        amounts = self.column(MEASURES[measure]) if values is None else values
        return np.asarray(np.bincount(self.places("backend")[taken], amounts[taken], len(self.backends)), np.float64)

    def by_bin(self, measure: str, among: Mask | None = None) -> Floats:
        """Load of each bin, as `load`."""
        taken = self.known if among is None else self.known & among
        bins = max(1, int(np.ceil(self.range_s / self.bin_s)))
        counted = np.bincount(self.places("bin")[taken], self.column(MEASURES[measure])[taken], bins)
        return np.asarray(counted, np.float64)

    def fair(self, measure: str, among: Mask | None = None, allowed: Mask | None = None) -> Floats:
        """What each backend would have got had every bin's load been dealt evenly among those ready in it.

        `allowed` narrows the backends. Sums to the load of the cells `among`, as far as anybody was ready.
        """
        load = self.by_bin(measure, among)
        if self.ready is None:
            ready = np.tile(self.entitled.astype(np.float64), (len(load), 1))
        else:
            ready = self.ready[: len(load)].copy()
        if allowed is not None:
            ready[:, ~allowed] = 0.0
        total = ready.sum(axis=1, keepdims=True)
        return np.asarray((load[:, None] * np.divide(ready, total, out=np.zeros_like(ready), where=total > 0)).sum(0))

    def even(self, measure: str) -> Floats:
        """An even split of the whole load over all entitled backends, whenever they were there."""
        return np.asarray(self.load(measure).sum() * self.entitled / max(1, int(self.entitled.sum())))

    def backend_name(self, place: int | np.integer[Any]) -> str:
        """The backend's pod, or its address and port."""
        row = self.backends.iloc[place]
        return str(row["pod"]) if isinstance(row["pod"], str) else f"{row['ip']}:{row['port']}"
