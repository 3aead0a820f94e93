"""Network namespaces: entering one, and finding those that this node's processes use.

Knows paths under /proc and nsfs mounts; holds none of them open, so it keeps no namespace alive.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from tracer.errors import TracerError

_CLONE_NEWNET = 0x40000000
OWN = "/proc/thread-self/ns/net"


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _set(fd: int) -> None:
    if _libc().setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def entered(path: str) -> Iterator[None]:
    """Runs the block with the calling thread in the network namespace at `path`.

    Raises:
        TracerError: there is no such namespace, or no privilege to enter it.
    """
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TracerError(
                f"The network namespace {path} cannot be opened ({error.strerror}): check the path."
            ) from error
        try:
            _set(target)
        except OSError as error:
            raise TracerError(
                f"The network namespace {path} cannot be entered ({error.strerror}): run as root."
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
        return os.stat(path).st_ino
    except OSError as error:
        raise TracerError(f"The network namespace {path} cannot be read ({error.strerror}): check the path.") from error


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
    with contextlib.suppress(OSError), open(proc / "self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if fields[3].startswith("net:["):  # the root of an nsfs mount names the namespace
                path = fields[4].encode().decode("unicode_escape") if "\\" in fields[4] else fields[4]
                found.setdefault(int(fields[3][5:-1]), path)
    return found
