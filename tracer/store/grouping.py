"""Equal 16-byte values, found without sorting and without a Python loop.

Addresses and names come as 16 bytes in every record and take few values, and only those few are worth a Python
string. Arrow's ``dictionary_encode`` does the same, but importing Arrow's compute module costs 14 MB of memory.
"""

import secrets

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.int32]

#: Rounds of hashing before sorting takes over: with honest data two or three are enough.
ROUNDS = 8
# Random per process, so that nobody can choose addresses that collide.
_MIX, _SPREAD = (np.uint64(secrets.randbits(64) | 1) for _ in range(2))


def group(high: Words, low: Words) -> tuple[Codes, Codes]:
    """Which rows of two parallel arrays of n words are equal.

    Returns `codes` (n,), numbers of the k distinct values, and `rows` (k,), one row of each value:
    ``high[rows][codes] == high`` and the same for `low`.

    Every row writes its own number to the slot its hash selects; whatever stands there afterwards is the
    representative of all rows equal to it. The rows that read somebody else's number go through another round.
    """
    n = len(low)
    representative = np.empty(n, dtype=np.int32)
    rest = np.arange(n, dtype=np.int32)
    bits = max(8, (2 * n).bit_length())
    table = np.empty(1 << bits, dtype=np.int32)
    value = low + high * _MIX
    for _ in range(ROUNDS):
        value = (value ^ (value >> np.uint64(32))) * _SPREAD
        slot = value >> np.uint64(64 - bits)
        table[slot] = rest
        found = table[slot]
        same = (low[found] == low[rest]) & (high[found] == high[rest])
        if same.all():
            representative[rest] = found
            break
        representative[rest[same]] = found[same]
        rest, value = rest[~same], value[~same]
    else:
        representative[rest] = _sorted_representatives(high[rest], low[rest], rest)
    rows = np.flatnonzero(representative == np.arange(n, dtype=np.int32)).astype(np.int32)
    number = np.empty(n, dtype=np.int32)
    number[rows] = np.arange(len(rows), dtype=np.int32)
    return number[representative], rows


def _sorted_representatives(high: Words, low: Words, rows: Codes) -> Codes:
    """For each of the given rows the first one with the same value, by sorting: slow, whatever the values are."""
    order = np.lexsort((low, high))
    sorted_high, sorted_low = high[order], low[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (sorted_high[1:] != sorted_high[:-1]) | (sorted_low[1:] != sorted_low[:-1])
    firsts = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    result = np.empty(len(order), dtype=np.int32)
    result[order] = rows[firsts]
    return result
