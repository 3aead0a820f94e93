"""Who may change a dataset's files at once, beside the one agent of a node (`layout.Lock`).

A lock goes with its process, however that ends.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tracer.errors import TracerError
from tracer.store import layout

#: How long a publication waits for another process to exchange a directory, which takes it milliseconds.
PUBLISH_WAIT_S = 5.0
#: How often a directory is made that others remove.
_ATTEMPTS = 10


@contextlib.contextmanager
def publishing(directory: Path) -> Iterator[None]:
    """As `steady`, of a directory that is made if need be. Raises OSError."""
    with contextlib.ExitStack() as stack:
        for attempt in reversed(range(_ATTEMPTS)):
            layout.make_directory(directory)
            try:
                stack.enter_context(steady(directory))
                break
            except FileNotFoundError:  # retention removes directories in which there is nothing any more
                if not attempt:
                    raise
        yield


@contextlib.contextmanager
def steady(directory: Path, *, alone: bool = False) -> Iterator[None]:
    """While a name appears in a directory: nobody exchanges it for another meanwhile, or deletes from it.

    `alone`: the one who does. The lock is on the directory itself: it takes no file, so no room and no leave to make
    one, and who writes one hour does not wait for whoever exchanges another.

    Raises OSError: there is no such directory; BlockingIOError if the lock is not to be had in `PUBLISH_WAIT_S`.
    """
    how, deadline = fcntl.LOCK_EX if alone else fcntl.LOCK_SH, time.monotonic() + PUBLISH_WAIT_S
    while True:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with _flocked(descriptor, directory, how, deadline - time.monotonic()):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                yield
                return
        if time.monotonic() >= deadline:  # exchanged again and again while this waited
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(directory))


@contextlib.contextmanager
def replacing(root: Path) -> Iterator[None]:
    """While published files are replaced by others, by one process at a time. Raises TracerError if one is at it."""
    with held(root / ".compact.lock", f"files in {root} are being compacted or named"):
        yield


@contextlib.contextmanager
def held(path: Path, taken: str) -> Iterator[None]:
    """Holds a lock file. Raises TracerError: it cannot be made; or another holds it, in the words of `taken`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise TracerError(
            f"cannot write to {path.parent}: {error.strerror}; make it writable for this process"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_flocked(descriptor, path, fcntl.LOCK_EX, 0.0))
        except BlockingIOError as error:
            raise TracerError(f"{taken} by another process; wait for it, or stop it") from error
        except OSError as error:
            raise TracerError(f"cannot lock {path}: {error.strerror}; use a file system with locks") from error
        yield


@contextlib.contextmanager
def _flocked(descriptor: int, path: Path, how: int, wait_s: float) -> Iterator[None]:
    """Holds a lock on an open file, which is then closed. A lock file stays: removing it would let two hold two files
    of one name.

    Raises OSError: BlockingIOError if another holds it longer than `wait_s`.
    """
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK or time.monotonic() >= deadline:
                    raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def is_written(root: Path) -> bool:
    """Whether an agent writes to this root now."""
    for path in root.glob(".lock-*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with _flocked(descriptor, path, fcntl.LOCK_SH, 0.0):
                pass
        except BlockingIOError:
            return True
        except OSError:  # not to be read, so not to be told
            continue
    return False
