"""The last seconds of a stream of rows: rates and shares of services and backends, for a live table."""

import dataclasses
from collections import deque
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.analysis import balance, endpoints, partial, watched
from tracer.analysis.partial import Bins
from tracer.analysis.situations import Situations

_NS = 10**9


@dataclasses.dataclass(frozen=True)
class Load:
    """One service port in the window: per second new connections, bytes, failures; connections open at once.

    `backends`: as `balance.per_backend`, with the columns connections_s, bytes_s, failures_s; the busiest first.
    `fair` says whether fair shares come from endpoints, and not from the backends seen.
    """

    service: str
    connections_s: float
    bytes_s: float
    failures_s: float
    open: float
    fair: bool
    backends: pd.DataFrame


class Window:
    """Rows whose interval ended in the last `seconds`. Times are ns since the epoch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._parts: deque[pa.Table] = deque()

    def add(self, rows: pa.Table) -> None:
        """Takes rows of the connections schema."""
        if len(rows):
            self._parts.append(rows.select(partial.COLUMNS))

    def loads(self, now_ns: int, ends: Iterable[pa.Table] = ()) -> list[Load]:
        """All service ports up to now, the busiest first. `ends`: tables of endpoints, if anybody knows them."""
        bins = Bins(now_ns - round(self.seconds * _NS), now_ns, round(self.seconds * _NS))
        while self._parts and pc.max(self._parts[0]["ts"]).cast(pa.int64()).as_py() <= bins.begin_ns:
            self._parts.popleft()
        if not self._parts:
            return []
        part = partial.of_table(pa.concat_tables(self._parts).unify_dictionaries(), bins)
        known = endpoints.together(ends, bins)
        coverage = schema.arrow("coverage").empty_table().select(watched.COLUMNS)
        found = [
            _load(situation.service, balance.per_backend(situation), self.seconds, situation.ready is not None)
            for _, situation in Situations(part, known, coverage)
        ]
        return sorted(found, key=lambda load: (-load.connections_s, -load.open, -load.bytes_s, load.service))


def _load(service: str, backends: pd.DataFrame, seconds: float, fair: bool) -> Load:
    counted = ("connections", "bytes", "failures")
    rates = {f"{name}_s": backends[name].to_numpy(np.float64) / seconds for name in counted}
    return Load(
        service=service,
        open=float(backends["open"].sum()),
        fair=fair,
        backends=backends.assign(**rates),
        **{name: float(rate.sum()) for name, rate in rates.items()},
    )
