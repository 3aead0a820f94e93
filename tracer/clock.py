"""From the kernel's clock to the wall clock.

The programs stamp records with CLOCK_BOOTTIME, which never steps. A row says UTC. The offset between the
two is piecewise constant here: a new piece begins only when the wall clock has moved by more than
`TOLERANCE_NS` against it, so that one kernel time always converts to one wall time (all rows of one
connection say the same `started`), and a stepped clock changes nothing that was converted before.
"""

import time

import numpy as np
import numpy.typing as npt

#: How far the wall clock may drift before a new piece begins: NTP slews by at most 500 µs a second.
TOLERANCE_NS = 1_000_000
#: Pieces kept. The oldest are merged away: only a connection older than all of them would notice.
MAX_PIECES = 4096

#: How often both clocks are read to find them read at once, and what counts as at once.
_TRIES, _AT_ONCE_NS = 5, 50_000


class WallClock:
    """Converts CLOCK_BOOTTIME to CLOCK_REALTIME; call `observe` now and then (the agent does each second)."""

    def __init__(self, boot_ns: int | None = None, wall_ns: int | None = None) -> None:
        boot, wall, _ = _now() if boot_ns is None or wall_ns is None else (boot_ns, wall_ns, 0)
        self._starts = np.array([0], dtype=np.int64)
        self._offsets = np.array([wall - boot], dtype=np.int64)

    def observe(self, boot_ns: int | None = None, wall_ns: int | None = None) -> None:
        """Compares the clocks (now, or as given) and begins a new piece if they have moved apart."""
        boot, wall, doubt = _now() if boot_ns is None or wall_ns is None else (boot_ns, wall_ns, 0)
        if abs(wall - boot - int(self._offsets[-1])) <= TOLERANCE_NS + doubt:
            return
        self._starts = np.append(self._starts[-MAX_PIECES + 1 :], boot)
        self._offsets = np.append(self._offsets[-MAX_PIECES + 1 :], wall - boot)

    def wall(self, boot_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """UTC nanoseconds since the epoch, int64 of the same shape, for CLOCK_BOOTTIME nanoseconds."""
        boot = boot_ns.astype(np.int64)
        piece = np.searchsorted(self._starts, boot, side="right") - 1
        return boot + self._offsets[np.maximum(piece, 0)]


def _now() -> tuple[int, int, int]:
    """Both clocks, boot and wall, and by how much they may miss each other.

    Whoever loses the CPU between the two readings would see a step of the clock that was none.
    """
    best = None
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        wall = time.time_ns()
        width = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - before
        if best is None or width < best[2]:
            best = before + width // 2, wall, width
        if width <= _AT_ONCE_NS:
            break
    assert best is not None
    boot, wall, width = best
    return boot, wall, width // 2
