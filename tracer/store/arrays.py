"""Arrow arrays over NumPy's own memory.

``pa.array`` would do, but it imports pandas where that is installed (50 MB), and conversions import Arrow's compute
module (14 MB); the agent can afford neither.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Valid = npt.NDArray[np.bool_]


def _bitmap(valid: Valid | None) -> pa.Buffer | None:
    return None if valid is None or valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


def numbers(kind: pa.DataType, values: np.ndarray, valid: Valid | None = None) -> pa.Array:
    """Fixed-width numbers, a copy of n `values`, whose width is that of `kind`; null where not `valid`."""
    return _over(kind, values.astype(values.dtype.newbyteorder("=")), valid)


def _over(kind: pa.DataType, data: np.ndarray, valid: Valid | None) -> pa.Array:
    return pa.Array.from_buffers(kind, len(data), [_bitmap(valid), pa.py_buffer(data)])


def booleans(values: Valid) -> pa.Array:
    """Booleans, never null."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])


def strings(texts: Sequence[str]) -> pa.Array:
    """Strings, never null."""
    encoded = [text.encode("utf-8", errors="replace") for text in texts]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int32)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def coded(codes: npt.NDArray[np.int32], names: Sequence[str], valid: Valid | None = None) -> pa.Array:
    """A dictionary array of strings, ``names[codes]``; null where not `valid`. Codes are taken as they are."""
    return pa.DictionaryArray.from_arrays(_over(pa.int32(), codes, valid), strings(names), safe=False)


def constant(name: str, n: int) -> pa.Array:
    """A dictionary array of n times the same string."""
    return coded(np.zeros(n, dtype=np.int32), [name])


def nulls(n: int) -> pa.Array:
    """A dictionary array of n nulls."""
    return coded(np.zeros(n, dtype=np.int32), [], np.zeros(n, dtype=bool))
