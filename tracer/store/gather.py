"""Gathers records into groups of one size, and holds groups back until they may be named.

Not safe for threads: `writer` guards it. Times are monotonic seconds.
"""

import dataclasses
from collections import deque

import numpy as np

from tracer.record import RECORD


@dataclasses.dataclass(slots=True)
class Group:
    """Records that came until `at`; the first `met` of them have been shown to whoever names them."""

    records: np.ndarray
    at: float
    met: int


class Gather:
    """Records in the order in which they came, in groups of `size`; the last one is being filled."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._full: deque[Group] = deque()
        self._filling = np.empty(size, dtype=RECORD)
        self._filled = self._met = 0

    def put(self, records: np.ndarray, now: float) -> None:
        """Takes a copy of the records."""
        while len(records):
            room = self._size - self._filled
            part, records = records[:room], records[room:]
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == self._size:
                self.seal(now)

    def seal(self, now: float) -> None:
        """Makes a group of what there is, if anything."""
        if not self._filled:
            return
        self._full.append(Group(self._filling[: self._filled], now, self._met))
        self._filling = np.empty(self._size, dtype=RECORD)  # its pages come as it fills
        self._filled = self._met = 0

    @property
    def oldest(self) -> float | None:
        """When the last record of the oldest group came; None: there is no group."""
        return self._full[0].at if self._full else None

    def take(self) -> np.ndarray:
        """The records of the oldest group, which is then no longer here."""
        return self._full.popleft().records

    def unmet(self) -> list[np.ndarray]:
        """Copies of the records that came since this was asked last."""
        parts = [group.records[group.met :].copy() for group in self._full if group.met < len(group.records)]
        for group in self._full:
            group.met = len(group.records)
        if self._met < self._filled:
            parts.append(self._filling[self._met : self._filled].copy())
            self._met = self._filled
        return parts
