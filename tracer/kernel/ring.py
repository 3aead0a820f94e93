"""The ring buffer of finished records, mapped into NumPy: a batch is a view, a record costs no Python.

The layout is the kernel's user-space API (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the
producer's, then the data, which follows itself so that a record never wraps. Of the second copy one page is mapped, as
each page of it counts as memory of this process. Every record has a header of eight bytes: the length with two flag
bits, and a page offset.
"""

import bisect
import ctypes
import mmap
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError

BUSY = 1 << 31
DISCARD = 1 << 30
#: Upper bounds of the classes in which `Ring.fills` counts drains by how full they found the ring.
FILL_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def _fence() -> Callable[[], None]:
    """Orders loads and stores around the shared positions.

    x86 keeps loads in order, and stores after loads, by itself (Intel SDM vol. 3, 9.2.2). Elsewhere membarrier(2),
    private expedited, which begins and ends with a full barrier on the caller; untested, for want of such a machine.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"aarch64": 283}.get(platform.machine())
    private_expedited, register = 1 << 3, 1 << 4
    if number is None or libc.syscall(number, register, 0, 0) != 0:
        raise TracerError(f"The ring buffer cannot be read safely on this machine ({platform.machine()}).")
    return lambda: libc.syscall(number, private_expedited, 0, 0)


class Ring:
    """A consumer of fixed-size records.

    `fills` counts drains by how full they found the ring, in the classes of `FILL_BOUNDS`; `fill_sum` adds up what they
    found, each 0 to 1.

    Args:
        fd: descriptor of the ring buffer map.
        size: its size in bytes, a power of two and a multiple of the page size.
        record: the records' type; its size must be a multiple of eight.
    """

    def __init__(self, fd: int, size: int, record: np.dtype[Any]) -> None:
        page = mmap.PAGESIZE
        self._size = size
        self._prepare(record)
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._producer_map = mmap.mmap(fd, 2 * page + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, np.uint64, 1)
        self._producer = np.frombuffer(self._producer_map, np.uint64, 1)
        self._data = np.frombuffer(self._producer_map, np.uint8, size + page, offset=page)
        assert self._step.itemsize <= page, "a record that begins before the end ends within the page behind it"

    @classmethod
    def over(cls, consumer: npt.NDArray[np.uint64], producer: npt.NDArray[np.uint64], data: npt.NDArray[np.uint8],
             record: np.dtype[Any], page: int) -> "Ring":  # fmt: skip
        """A ring over plain arrays, for tests: `data` holds the data area and, behind it, its first `page` bytes."""
        ring = cls.__new__(cls)
        ring._size = len(data) - page
        ring._prepare(record)
        ring._consumer, ring._producer, ring._data = consumer, producer, data
        return ring

    def _prepare(self, record: np.dtype[Any]) -> None:
        self._step = np.dtype([("length", "<u4"), ("page", "<u4"), ("record", record)])
        self._record = record
        self._fence = _fence()
        self.fills, self.fill_sum = [0] * len(FILL_BOUNDS), 0.0

    def fill(self) -> float:
        """How full the ring is, 0 to 1."""
        return float(int(self._producer[0]) - int(self._consumer[0])) / self._size

    def drain(self) -> npt.NDArray[Any]:
        """All finished records, in order, copied out of the ring, whose room is free afterwards.

        Stops at the first record that is still being written; leaves out discarded ones. An array of shape (n,), n
        may be 0.

        Raises:
            TracerError: the ring holds something else than records of the expected size.
        """
        records, all_of_it = self._batch()
        return records if all_of_it else np.concatenate((records, self._batch()[0]), dtype=self._record)

    def _batch(self) -> tuple[npt.NDArray[Any], bool]:
        """The same, as far as the mapping goes; and whether it ended for another reason than that the mapping did."""
        step = self._step
        consumer = int(self._consumer[0])
        available = int(self._producer[0]) - consumer
        found = min(available / self._size, 1.0)
        self.fills[bisect.bisect_left(FILL_BOUNDS, found)] += 1
        self.fill_sum += found
        self._fence()
        start = consumer & (self._size - 1)
        mapped = min(available, len(self._data) - start)
        view = self._data[start : start + mapped // step.itemsize * step.itemsize].view(step)
        lengths = view["length"].copy()
        busy = np.flatnonzero(lengths & BUSY)
        if len(busy):
            view, lengths = view[: busy[0]], lengths[: busy[0]]
        self._fence()
        # The producer's position moves by whole records when room is reserved, so a remainder is one of another size.
        if available % step.itemsize or np.any(lengths & ~np.uint32(DISCARD) != self._record.itemsize):
            del view  # the error's traceback would keep it, and `close` could not unmap what it shows
            raise TracerError(
                "The ring buffer holds records of another size: the BPF programs and this process are of different "
                "versions; stop the agent and start it again."
            )
        kept = lengths & DISCARD == 0
        records: npt.NDArray[Any] = view["record"][kept] if not kept.all() else view["record"].copy()
        self._fence()
        self._consumer[0] = consumer + len(view) * step.itemsize
        return records, mapped == available or len(busy) > 0

    def close(self) -> None:
        """Unmaps the ring; it must not be drained afterwards."""
        del self._consumer, self._producer, self._data
        self._consumer_map.close()
        self._producer_map.close()
