"""Attaching a BPF program to a classic tracepoint, through perf_event_open(2): what libbpf does, for one case.

Knows struct perf_event_attr and the ids in tracefs, which it reads without a mount.
"""

import ctypes
import fcntl
import functools
import os
import platform
import struct

from tracer.errors import TracerError
from tracer.kernel import mounts

_SYSCALL = {"x86_64": 298, "AMD64": 298, "aarch64": 241}
_PERF_TYPE_TRACEPOINT = 2
_ATTRIBUTES = struct.Struct("<IIQQQQQIIQ")  # PERF_ATTR_SIZE_VER0: 64 bytes
_FLAG_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _identify(tracepoint: str) -> int:
    root = mounts.detached("tracefs")
    try:
        fd = os.open(f"events/{tracepoint}/id", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        with open(fd, encoding="ascii") as number:
            return int(number.read())
    finally:
        os.close(root)


def attach_tracepoint(program: int, tracepoint: str) -> int:
    """Attaches a program (BPF_PROG_TYPE_TRACEPOINT) to, say, "syscalls/sys_enter_connect"; its end is the descriptor's.

    Raises:
        TracerError: the kernel has no such tracepoint, or refuses.
    """
    try:
        number = _SYSCALL[platform.machine()]
        identity = _identify(tracepoint)
        attributes = _ATTRIBUTES.pack(_PERF_TYPE_TRACEPOINT, _ATTRIBUTES.size, identity, 1, 0, 0, 0, 0, 0, 0)
        event = int(
            _libc().syscall(number, attributes, -1, 0, -1, _FLAG_CLOEXEC)
        )  # all processes; BPF runs on all CPUs
        if event < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        try:
            fcntl.ioctl(event, _IOC_SET_BPF, program)
            fcntl.ioctl(event, _IOC_ENABLE, 0)
        except OSError:
            os.close(event)
            raise
    except (OSError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not known for {platform.machine()}"
        raise TracerError(
            f"The connect probe cannot be attached to the tracepoint {tracepoint} ({reason}): the kernel needs "
            "CONFIG_FTRACE_SYSCALLS=y; without the probe (--connect-probe off), addresses that a balancer rewrites at "
            "the socket are unknown."
        ) from error
    return event
