"""What every process of the lab runs first: die with the parent, be in the right network namespace.

Knows the order in which that is safe. What is run afterwards (another program, or a worker of this package) is
the caller's business. Standard library only: it is started as `python -I -S`.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
CLONE_NEWNET = 0x40000000

_SOURCE = "import sys; sys.path.append({root!r}); from tracer.lab.child import main; main(sys.argv[1:])"


def command(parent: int, namespace: str, *what: str) -> list[str]:
    """The command line of a child of process `parent`.

    `namespace` is the path of a network namespace, or "new". `what` is a program with its arguments; a first
    word `worker:NAME` means the module `tracer.lab.NAME`, run in the same interpreter.
    """
    root = str(Path(__file__).resolve().parents[2])
    return [sys.executable, "-I", "-S", "-c", _SOURCE.format(root=root), str(parent), namespace, *what]


def libc() -> ctypes.CDLL:
    """The C library, for the three calls that Python 3.11 lacks."""
    return ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when the *thread* of `parent` that created it ends (prctl(2))."""
    libc().prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def set_name(name: str) -> None:
    """Sets this process's `comm`, of which the kernel keeps 15 bytes."""
    libc().prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def enter(path: str) -> None:
    """Moves the calling thread into the network namespace `path`. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc().setns(descriptor, CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(descriptor)


def leave() -> None:
    """Moves the calling thread into a new network namespace. Raises OSError."""
    if libc().unshare(CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "unshare(CLONE_NEWNET)")


def main(arguments: list[str]) -> None:
    """`PARENT NAMESPACE WHAT...`: never returns to its caller's business, only to the interpreter's end."""
    parent, namespace, *what = arguments
    die_with(int(parent))
    try:
        if namespace == "new":
            leave()
            os.write(1, b"ready\n")  # whoever waits for the namespace reads this line
        else:
            enter(namespace)
        if not what[0].startswith("worker:"):
            os.execvp(what[0], what)
    except OSError as error:
        os.write(2, f"{error.strerror}: {error.filename or what[0]}\n".encode())
        os._exit(126)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if what[0] == "worker:server":
        from tracer.lab import server as worker
    else:
        from tracer.lab import client as worker  # type: ignore[no-redef]
    worker.main(what[1:])
