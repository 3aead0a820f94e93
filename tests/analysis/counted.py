"""Tables in memory as the situation of one service port, by the way that a dataset's files go."""

import pyarrow as pa
import pyarrow.compute as pc

from tracer.analysis import partial, situations
from tracer.analysis.causes.situation import Situation
from tracer.analysis.partial import Bins, Partial
from tracer.analysis.situations import Situations

MINUTE = 60 * 10**9


def bins_of(tables: dict[str, pa.Table], width_ns: int = MINUTE) -> Bins:
    """The range that coverage spans, in minutes."""
    covered = tables["coverage"]
    begin, end = pc.min(covered["started"]), pc.max(covered["ts"])
    return Bins(begin.cast(pa.int64()).as_py(), end.cast(pa.int64()).as_py(), width_ns)


def counted(connections: pa.Table, bins: Bins) -> Partial:
    return partial.of_table(connections.unify_dictionaries(), bins)


def all_of(tables: dict[str, pa.Table]) -> Situations:
    part = counted(tables["connections"], bins_of(tables))
    return Situations(part, tables["endpoints"], tables["coverage"])


def of_tables(tables: dict[str, pa.Table], service: str) -> Situation:
    """`service`: namespace/name, or the address that is dialled."""
    known = all_of(tables)
    (port,) = situations.matching(known.ports(), service)
    return known.of(port)
