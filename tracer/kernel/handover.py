"""Starts the loader child, gives it its job, and receives the descriptors that it hands over.

Knows the protocol of ``python -m tracer.kernel.loader`` and what can go wrong with a child; leaves to the loader what
is compiled and attached, and to `capture` what becomes of the descriptors.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from tracer.errors import TracerError
from tracer.kernel.loader import DESCRIPTORS, OPTIONAL, Job

#: How long the loader may take: it needs about a second here, and ten to twenty times that on an emulated machine.
TIMEOUT_S = 120
#: How long it may take to end once it has answered.
_FAREWELL_S = 10
#: Lines of what it said that go into an error message.
_LINES = 60


def load(job: Job) -> dict[str, int]:
    """Runs the loader child to its end; the descriptors by name: all `DESCRIPTORS`, and `OPTIONAL` ones.

    Raises:
        TracerError: the loader's own sentence, or that it died or did not answer; with the last of what it said.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # A file for what it says, not a pipe: a verifier's log may be larger than a pipe holds.
    with ours, theirs, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tracer.kernel.loader", str(theirs.fileno())],
            pass_fds=[theirs.fileno(), *job.maps.values(), *([] if job.cgroups is None else [job.cgroups])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())},
        )
        theirs.close()
        try:
            message, descriptors = _answer(ours, job)
        except TimeoutError as error:
            child.kill()
            raise TracerError(
                f"The loader did not answer within {TIMEOUT_S} s: is the machine overloaded? Try again.{_talk(said)}"
            ) from error
        finally:
            _farewell(child)
        names = message[1:].decode(errors="replace").split(",") if message.startswith(b".") else []
        if len(names) == len(descriptors) and set(DESCRIPTORS) <= set(names):
            return dict(zip(names, descriptors, strict=True))
        for descriptor in descriptors:
            os.close(descriptor)
        if message.startswith(b"!"):
            raise TracerError(message[1:].decode(errors="replace") + _talk(said))
        raise TracerError(f"The loader ended without an answer (exit code {child.returncode}).{_talk(said)}")


def _answer(channel: socket.socket, job: Job) -> tuple[bytes, list[int]]:
    """The loader's message and descriptors; nothing if it died first."""
    channel.settimeout(TIMEOUT_S)
    try:
        channel.send(job.encode())
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, len(DESCRIPTORS) + len(OPTIONAL))
    except TimeoutError:
        raise
    except OSError:  # it died with the job unread
        return b"", []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return message, descriptors


def _farewell(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _talk(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - (1 << 16)))
    lines = said.read().decode(errors="replace").strip().splitlines()[-_LINES:]
    return "\nThe loader said:\n  " + "\n  ".join(lines) if lines else ""


def _search_path() -> list[str]:
    """Where the child finds this very package, and what the parent was told."""
    own = str(Path(__file__).resolve().parent.parent.parent)
    return [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
