"""A writer's world with injected clocks, and records that are easy to tell apart."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tracer.record import RECORD, Flag, Nat, NatSource
from tracer.store.coverage import Run

#: 2026-07-31T11:59:00Z
EPOCH = 1_785_499_140 * 10**9
RUN = Run("node-1", "0123456789ab", "boot", "6.18.0", version="1.2.3", programs="tracepoint")


class Clocks:
    """Time that passes only when told to: monotonic seconds and wall nanoseconds go together."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def wall_ns(self) -> int:
        return EPOCH + int(self.seconds * 10**9)


def make_records(n: int, first: int = 1, at_s: float = 0.0, step_ns: int = 1) -> np.ndarray:
    """Makes n records with conn_id from `first`, `step_ns` apart, the first at `at_s` seconds."""
    rows = np.zeros(n, dtype=RECORD)
    rows["conn_id"] = np.arange(first, first + n)
    rows["ts"] = int(at_s * 10**9) + np.arange(n) * step_ns
    rows["flags"], rows["nat"], rows["nat_source"] = Flag.OPENED, Nat.NONE, NatSource.CONNTRACK
    rows["tuple"]["protocol"] = 6
    return rows


def visible_files(root: Path, table: str = "connections") -> list[Path]:
    """Whatever a reader that ignores hidden names finds, in order."""
    return sorted(p for p in (root / table).rglob("*") if p.is_file() and not p.name.startswith("."))


def published_ids(root: Path) -> list[int]:
    """The conn_ids of all published rows, sorted."""
    return sorted(i for path in visible_files(root) for i in pq.read_table(path, columns=["conn_id"])[0].to_pylist())


def coverage_rows(root: Path) -> list[dict[str, object]]:
    """All coverage rows by time."""
    rows = [row for path in visible_files(root, "coverage") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["ts"])
