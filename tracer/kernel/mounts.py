"""File systems without a mount: a kernel file system as a descriptor, which nobody else sees and which leaves nothing.

Knows fsopen(2) and fsmount(2), 5.2+. A node's container may have neither tracefs nor
the host's cgroup tree mounted, and a tracer changes no mount of the host.
"""

import contextlib
import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor

from tracer.errors import TracerError

# The same numbers on every architecture (include/uapi/asm-generic/unistd.h).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_CLONE_NEWCGROUP = 0x02000000


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def detached(kind: str) -> int:
    """The root of a file system of that kind ("tracefs", "cgroup2"): a directory's descriptor.

    Raises:
        TracerError: the kernel has no such file system, or no privilege.
    """
    try:
        context = _call(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
        try:
            _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
        finally:
            os.close(context)
    except OSError as error:
        raise TracerError(
            f"The file system {kind} cannot be had ({error.strerror}): it takes Linux 5.2 or newer, and root."
        ) from error


def host_cgroups() -> int:
    """The root of the host's cgroup v2 tree, or of what may be seen of it: a directory's descriptor.

    A cgroup tree begins at the cgroup namespace of whoever asks, so a thread asks from the first process's.

    Raises:
        TracerError: no cgroup v2, or no privilege.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_host_cgroups).result()


def _host_cgroups() -> int:
    # Where the first process is hidden or out of reach, the own namespace's tree is all there is to be had.
    with contextlib.suppress(OSError), open("/proc/1/ns/cgroup", "rb") as namespace:
        _libc().setns(namespace.fileno(), _CLONE_NEWCGROUP)
    return detached("cgroup2")
