"""Ratios of paired measurements, and how sure they are. Pure functions."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: Fewer pairs bound the median in less than 95 of 100 cases, whatever their values.
ENOUGH = 6


@dataclass(frozen=True)
class Ratio:
    """The median of the pairs' ratios, and the interval that holds the true one in at least 95 of 100 cases."""

    median: float
    low: float
    high: float
    pairs: int


def ranks(pairs: int, confidence: float = 0.95) -> tuple[int, int]:
    """Which of so many sorted values bound the median, counted from 0.

    By the sign test: no assumption on how the values are distributed. Fewer than six cannot give 95 %: then the least
    and the greatest.
    """
    tail, below = (1 - confidence) / 2, 0.0
    for rank in range(pairs // 2):
        below += math.comb(pairs, rank) / 2**pairs
        if below > tail:
            return max(rank - 1, 0), pairs - 1 - max(rank - 1, 0)
    return max(pairs // 2 - 1, 0), pairs - 1 - max(pairs // 2 - 1, 0)


def ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Of (without, with) pairs: with as a part of without."""
    values = sorted(after / before for before, after in pairs)
    low, high = ranks(len(values))
    return Ratio(statistics.median(values), values[low], values[high], len(values))


def order(pairs: int) -> list[tuple[bool, bool]]:
    """In which order each pair is measured: A B, B A, A B, ...: what drifts is on neither side."""
    return [(False, True) if number % 2 == 0 else (True, False) for number in range(pairs)]
