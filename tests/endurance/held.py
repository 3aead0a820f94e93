"""What a process holds, from one moment to the next: memory, descriptors, threads, entries of maps."""

import ctypes
import dataclasses
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Sample:
    """What this process holds after so many turns; memory in MB (10^6 bytes)."""

    turns: int
    resident: float
    anonymous: float
    allocated: float
    descriptors: int
    threads: int
    objects: int
    entries: Mapping[str, int]

    def __str__(self) -> str:
        entries = "".join(f", {count} {name}" for name, count in self.entries.items())
        return (
            f"{self.turns:>9,} turns: {self.resident:.1f} MB resident, {self.anonymous:.1f} MB of it anonymous, "
            f"{self.allocated:.2f} MB allocated, "
            f"{self.descriptors} descriptors, {self.threads} threads, {self.objects:,} objects{entries}"
        )


_MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 (malloc.h, glibc 2.33 and newer)."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def _allocated() -> float:
    """What malloc has given out and not got back, of NumPy, Arrow and the interpreter's larger objects; in MB.

    Resident memory also has what malloc cannot give back to the kernel, which creeps for an hour without any leak.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return float(found.uordblks + found.hblkhd) / 1e6


def sample(turns: int, entries: Mapping[str, int] | None = None) -> Sample:
    """Looks at this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon", "Threads"))
    }
    resident, anonymous = (found[name] * 1024 / 1e6 for name in ("VmRSS:", "RssAnon:"))
    descriptors = len(os.listdir("/proc/self/fd"))
    objects = len(gc.get_objects())
    return Sample(turns, resident, anonymous, _allocated(), descriptors, found["Threads:"], objects, entries or {})


def grown(samples: Sequence[Sample], megabytes: float, allocated: float = 0.5) -> list[str]:
    """What grew from the first quarter of the samples to the last: memory by more than so much, others at all."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[:quarter], samples[-quarter:]
    said = []
    rooms = {"resident": megabytes, "anonymous": megabytes, "allocated": allocated, "descriptors": 0, "threads": 0}
    for name, room in rooms.items():
        before, after = (max(getattr(one, name) for one in part) for part in (early, late))
        if after > before + room:
            said.append(f"{name}: {before:,} at first, {after:,} at last")
    for name in samples[0].entries:
        before, after = (max(one.entries[name] for one in part) for part in (early, late))
        if after > before:
            said.append(f"{name}: {before:,} entries at first, {after:,} at last")
    return said
