"""Who was an endpoint of which service when: what all nodes tell of it as one, and the shares of time that gives.

Every node writes of every service that its rows touch, publication after publication: of a thousand nodes' rows about
the same endpoint one interval remains.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.analysis.causes.situation import Floats
from tracer.analysis.coding import Ints, coded, numbered
from tracer.analysis.partial import Bins

#: What says who saw it, and when; the rest says what.
_SEEN = ("node", "run_id", "started", "ts")
_WHAT = [name for name in schema.arrow("endpoints").names if name not in _SEEN]
#: Columns of what `together` returns, and those to read.
COLUMNS = [*_WHAT, "started", "ts"]
#: Rows that wait to be put together.
_WAITING = 200_000


def together(tables: Iterable[pa.Table], bins: Bins) -> pa.Table:
    """Endpoints of many files, without who told, in intervals that touch the range and do not touch one another."""
    empty = schema.arrow("endpoints").empty_table().select(COLUMNS)
    whole, waiting = empty, list[pa.Table]()
    for table in tables:
        waiting.append(touching(table.select(COLUMNS), bins.begin_ns, bins.end_ns))
        if sum(map(len, waiting)) > _WAITING:
            whole, waiting = _united(pa.concat_tables([whole, *waiting])), []
    return _united(pa.concat_tables([whole, *waiting]))


def ready(ends: pd.DataFrame, place: dict[tuple[str, int], int], bins: Bins) -> Floats:
    """Bins by backends: the part of each bin covered by the intervals in which the backend was ready."""
    edges = bins.begin_ns + np.arange(bins.count + 1) * bins.width_ns
    found = np.zeros((bins.count, len(place)))
    taken = ends[ends["ready"].to_numpy(bool) & ~ends["terminating"].to_numpy(bool)]
    of = np.array([place[at] for at in zip(taken["backend_ip"], taken["backend_port"], strict=True)], dtype=np.int64)
    began, ended, of = union(taken["started"].to_numpy(np.int64), taken["ts"].to_numpy(np.int64), of)
    for at in np.unique(of):
        mine = of == at
        first, last = began[mine], ended[mine]
        # Covered time up to each edge: whole intervals before it, and what has passed of the one it is in.
        before = np.searchsorted(first, edges, side="right")
        lengths = np.concatenate(([0], np.cumsum(last - first)))
        over = np.where(before > 0, np.maximum(0, last[np.maximum(before - 1, 0)] - edges), 0)
        found[:, at] = np.diff(lengths[before] - over) / bins.width_ns
    return np.clip(found, 0.0, 1.0)


def union(began: Ints, ended: Ints, group: Ints) -> tuple[Ints, Ints, Ints]:
    """Intervals (n,) of groups as disjoint ones, in the order of groups and then of time."""
    order = np.lexsort((began, group))
    began, group = began[order], group[order]
    reach = pd.Series(ended[order]).groupby(group).cummax().to_numpy()
    first = np.ones(len(began), dtype=bool)
    first[1:] = (began[1:] > reach[:-1]) | (group[1:] != group[:-1])
    last = np.append(np.flatnonzero(first)[1:] - 1, len(began) - 1) if len(began) else np.zeros(0, np.int64)
    return began[first], reach[last], group[first]


def touching(table: pa.Table, begin_ns: int | None, end_ns: int | None) -> pa.Table:
    """Rows whose interval touches the range (None: no end to it)."""
    if begin_ns is not None:
        table = table.filter(pc.greater(table["ts"].cast(pa.int64()), begin_ns))
    if end_ns is not None:
        table = table.filter(pc.less(table["started"].cast(pa.int64()), end_ns))
    return table


def _united(table: pa.Table) -> pa.Table:
    table = table.unify_dictionaries().combine_chunks()
    columns = [coded(table, name) for name in _WHAT]
    which, example = numbered([(codes, max(1, len(texts))) for codes, texts in columns])
    times = {name: table[name].cast(pa.int64()).to_numpy() for name in ("started", "ts")}
    began, ended, which = union(times["started"], times["ts"], which)
    found = table.take(pa.array(example[which]))
    for name, values in (("started", began), ("ts", ended)):
        at = found.schema.get_field_index(name)
        found = found.set_column(at, found.schema.field(at), pa.array(values).cast(found.schema.field(at).type))
    return found
