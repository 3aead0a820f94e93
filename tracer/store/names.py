"""What the store asks of whoever names its rows, and the columns that come of it.

Knows no Kubernetes: `tracer.naming` does, and the agent brings the two together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer.store.arrays import coded

#: The columns of connections that hold names.
COLUMNS = (
    "src_namespace",
    "src_pod",
    "src_workload",
    "dst_namespace",
    "dst_service",
    "dst_service_port",
    "backend_pod",
    "backend_workload",
    "backend_node",
    "backend_zone",
)


class Coded(Protocol):
    """A column of n strings: ``texts[codes[i]]``, null where the code is -1."""

    @property
    def codes(self) -> npt.NDArray[np.int32]:
        """(n,) places in `texts`."""

    @property
    def texts(self) -> list[str]:
        """The different strings."""


class RowNames(Protocol):
    """Names rows, and tells the endpoints of services. Used by one thread."""

    def hear(self) -> None:
        """Takes over what was heard since; called at least twice a second."""

    def meet(self, records: np.ndarray) -> None:
        """Is shown records soon after they came, and before `name`: what can be known of a process only while it
        lives."""

    def hold_s(self) -> float:
        """How long records are to be held before they are named, in seconds: by then what they need was heard."""

    def name(self, records: np.ndarray, wall_start_ns: npt.NDArray[np.int64]) -> Mapping[str, Coded]:
        """The name columns of n records, each as of its start: ns since the epoch (n,)."""

    def endpoints(self, begin_ns: int, end_ns: int) -> Iterable[Mapping[str, Sequence[Any]]]:
        """The endpoints table for [begin_ns, end_ns) in parts: columns, but the node and the run."""

    def totals(self) -> Mapping[str, int]:
        """Running totals and levels by column of the coverage table."""

    def state(self) -> str:
        """What `naming` of the coverage table says."""


def column(names: Coded) -> pa.Array:
    """The dictionary array of a column of names."""
    valid = names.codes >= 0
    return coded(np.where(valid, names.codes, np.int32(0)), names.texts, valid)
