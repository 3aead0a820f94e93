"""Network namespaces: entering one, and finding those that this node's processes use.

Knows paths under /proc and nsfs mounts; holds none of them open, so it keeps no namespace alive.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tracer.errors import TracerError

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # include/uapi/linux/nsfs.h, 4.11+
OWN = "/proc/thread-self/ns/net"


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _set(fd: int) -> None:
    if _libc().setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def entered(path: str, expected: int | None = None) -> Iterator[None]:
    """Runs the block with the calling thread in the network namespace at `path`.

    Args:
        path: by which it is opened.
        expected: its inode; a process's path leads elsewhere once its pid is another's.

    Raises:
        TracerError: there is no such namespace, or no privilege to enter it.
    """
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            advice = "run as root" if isinstance(error, PermissionError) else "check the path"
            raise TracerError(f"The network namespace {path} cannot be opened ({error.strerror}): {advice}.") from error
        if expected is not None and os.fstat(target).st_ino != expected:
            os.close(target)
            raise TracerError(f"The path {path} leads to another network namespace by now.")
        if os.path.sameopenfile(home, target):  # already there: that takes no privilege
            os.close(target)
            yield
            return
        try:
            _set(target)
        except OSError as error:
            advice = "check the path, it is no network namespace" if error.errno == errno.EINVAL else "run as root"
            raise TracerError(
                f"The network namespace {path} cannot be entered ({error.strerror}): {advice}."
            ) from error
        finally:
            os.close(target)
        try:
            yield
        finally:
            _set(home)
    finally:
        os.close(home)


def inode(path: str) -> int:
    """The number by which the kernel calls a namespace (`netns` in a row, `lsns` prints it).

    Raises:
        TracerError: there is no such namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
            number = os.fstat(fd).st_ino
        finally:
            os.close(fd)
    except OSError as error:
        reason = "it is no namespace" if error.errno in (errno.ENOTTY, errno.EINVAL) else error.strerror
        raise TracerError(f"The network namespace {path} cannot be read ({reason}): check the path.") from error
    if kind != _CLONE_NEWNET:
        raise TracerError(f"The namespace {path} is of another kind: check the path, which must end at a network's.")
    return number


def visible(proc: Path = Path("/proc")) -> dict[int, str]:
    """Every network namespace that a process or an nsfs mount visible here refers to: inode → a path to enter it by.

    Processes and mounts that vanish meanwhile are skipped: their sockets are closed, or closing.
    """
    found: dict[int, str] = {}
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            link = os.readlink(f"{proc}/{entry.name}/ns/net")  # net:[4026531840]
            found.setdefault(int(link[5:-1]), f"{proc}/{entry.name}/ns/net")
    with contextlib.suppress(OSError), open(proc / "self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = os.fsdecode(line).split(" ")
            if fields[3].startswith("net:["):  # the root of an nsfs mount names the namespace
                path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])  # \040 is a space
                found.setdefault(int(fields[3][5:-1]), path)
    return found
