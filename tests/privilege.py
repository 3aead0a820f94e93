"""Somebody without privilege, for subprocesses: `preexec_fn=nobody`."""

import ctypes
import os
import struct

_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 47, 2
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522


def nobody() -> None:
    """User 65534 with one capability, to read files: the sources may lie in a directory that only root may enter."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    bits = 1 << _CAP_DAC_READ_SEARCH
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    assert libc.capset(header, struct.pack("<6I", bits, bits, bits, 0, 0, 0)) == 0
    assert libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0) == 0
