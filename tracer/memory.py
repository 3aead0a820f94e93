"""What keeps the node process small: settings of the allocators, and imports that it can do without.

To be called before the process has a second thread and before pyarrow is imported; what each is worth stands in
docs/decisions/024-memory.md.
"""

import ctypes
import os
import sys

# malloc.h
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
#: Blocks from this size on are given back to the kernel as soon as they are freed. Set, it no longer grows by itself.
_LARGE = 256 << 10
#: What pyarrow.fs brings for object stores, with TLS and all: it does without what cannot be imported.
_STORES = ("pyarrow._s3fs", "pyarrow._gcsfs", "pyarrow._azurefs", "pyarrow._hdfs")


def save() -> None:
    """One arena for all threads, large blocks by themselves, Arrow's among them, and no object stores here."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's; other C libraries go without
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    for name in _STORES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: an import of it fails
