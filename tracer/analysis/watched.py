"""What coverage/ says of each node: what it lost, and when nobody watched."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tracer.analysis.endpoints import union
from tracer.analysis.frames import frame

_NS = 10**9
#: Columns that count rows that are in no file.
LOSSES = ("lost_ring", "lost_connection_map", "lost_end", "lost_flow_ring", "lost_writer", "lost_expired")
#: Columns to read.
COLUMNS = ("node", "started", "ts", "interval_s", "emitted", *LOSSES)


class Losses(NamedTuple):
    """Of one node: rows lost and rows emitted; seconds not watched between its first and its last row of coverage,
    seconds watched; and when the last row ended, ns since the epoch."""

    lost: int
    emitted: int
    gap_s: float
    watched_s: float
    end_ns: int


def losses(coverage: pa.Table) -> dict[str, Losses]:
    """What each node lost, and when it was not watched."""
    told = frame(coverage.select(["node", "started", "ts", "emitted", *LOSSES]))
    told["lost"] = told[list(LOSSES)].fillna(0).sum(axis=1)
    found = {}
    for node, group in told.groupby("node"):
        began, ended, _ = union(
            group["started"].to_numpy(np.int64), group["ts"].to_numpy(np.int64), np.zeros(len(group), np.int64)
        )
        gap, watched = int((began[1:] - ended[:-1]).sum()), int((ended - began).sum())
        found[str(node)] = Losses(
            int(group["lost"].sum()), int(group["emitted"].sum()), gap / _NS, watched / _NS, int(ended[-1])
        )
    return found
