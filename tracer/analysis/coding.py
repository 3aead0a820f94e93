"""Rows of tables as small integers: the codes of a column, and the number of each distinct row of several."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

Ints = npt.NDArray[np.int64]
#: Codes (n,) and what they stand for.
Coded = tuple[Ints, list[object]]

#: Up to so many possible numbers are told apart by a table of all, beyond by hashing.
_DENSE = 1 << 22


def coded(table: pa.Table, name: str) -> Coded:
    """A column's codes; null, where there are any, has one of its own, the last."""
    column = table[name]
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no rows, no chunks
        return np.zeros(0, dtype=np.int64), []
    texts = whole.dictionary.to_pylist()
    if not whole.indices.null_count:
        return np.asarray(whole.indices.to_numpy(), dtype=np.int64), texts
    return np.asarray(whole.indices.fill_null(len(texts)).to_numpy(), dtype=np.int64), [*texts, None]


def numbered(columns: Sequence[tuple[Ints, int]]) -> tuple[Ints, Ints]:
    """Numbers the distinct rows of some columns of codes (n,), each below its size, in ascending order.

    Returns each row's number (n,), and for each number a row that has it.
    """
    number, size = np.zeros(len(columns[0][0]), dtype=np.int64), 1
    for codes, different in columns:
        if size * different > _DENSE:
            number, size = _dense(number, size)
        number, size = number * different + codes, size * different
    number, size = _dense(number, size)
    example = np.zeros(size, dtype=np.int64)
    example[number] = np.arange(len(number))
    return number, example


def summed(number: Ints, amounts: Ints, size: int) -> Ints:
    """The sum of the amounts (n,) that have each number below `size`."""
    added = np.zeros(size, dtype=np.int64)
    np.add.at(added, number, amounts)
    return added


def _dense(number: Ints, size: int) -> tuple[Ints, int]:
    """Numbers below `size` as numbers without holes, in the same order; and how many there are of them."""
    if size > _DENSE:
        found, different = pd.factorize(number)
        order = np.argsort(different)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return place[found], len(order)
    there = np.zeros(size, dtype=bool)
    there[number] = True
    place_of = np.cumsum(there, dtype=np.int32)
    return place_of[number].astype(np.int64) - 1, int(np.count_nonzero(there))
