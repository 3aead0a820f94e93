"""A process in a pod as its parent sees it, and the ledgers that such processes keep, as NumPy arrays.

Knows how to start a worker, ask it for things and reap it. What servers and clients can be asked for is in `traffic`.
Workers die with the thread that started them (see `netns`).
"""

import os
import subprocess
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError, UsageError
from tracer.lab import child, wire
from tracer.lab.netns import Namespace

#: One connection or UDP flow as one end of it saw it, the same bytes as `wire.ROW`. Times are CLOCK_BOOTTIME
#: nanoseconds, 0 for "not yet" or "never". Bytes are the application's. `peer` is whom this end believes to talk to:
#: for a client the address it dialled. `errno` is 0 for ok; ECANCELED means that the client gave up. `protocol` is
#: 6 or 17 (IANA); datagrams are counted for 17 only. A flow is established when its socket is ready (client) or its
#: first datagram has come (server, whose `ended` is the time of its last); the local address of an unconnected
#: client is unspecified, as its kernel shows it.
LEDGER = np.dtype(
    [
        ("started", "<i8"),
        ("established", "<i8"),
        ("ended", "<i8"),
        ("sent", "<u8"),
        ("received", "<u8"),
        ("local", "V16"),
        ("peer", "V16"),
        ("local_port", "<u2"),
        ("peer_port", "<u2"),
        ("errno", "<u4"),
        ("pid", "<u4"),
        ("number", "<u4"),
        ("protocol", "<u4"),
        ("datagrams_sent", "<u4"),
        ("datagrams_received", "<u4"),
    ]
)
assert LEDGER.itemsize == wire.ROW.size

Ledger = npt.NDArray[np.void]


def addresses(column: npt.NDArray[Any]) -> list[str]:
    """The text of a ledger's column of addresses."""
    known: dict[bytes, str] = {}
    return [known.get(raw) or known.setdefault(raw, wire.unpacked(raw)) for raw in map(bytes, column)]


class Worker:
    """A process in a pod that answers requests; one request at a time."""

    kind = ""

    def __init__(self, namespace: Namespace) -> None:
        self.name = namespace.name
        self._asked = False
        self._process = subprocess.Popen(
            child.command(os.getpid(), namespace.path, f"worker:{self.kind}", f"lab-{self.kind}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the process at once, with whatever connections it has, and reaps it. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def begin(self, **request: Any) -> None:
        """Sends a request; `finish` has its answer. Work for several workers runs at once this way."""
        if self._asked:
            raise UsageError(f"The {self.kind} in {self.name} has not answered its last request: call finish() first")
        assert self._process.stdin is not None
        try:
            wire.send(self._process.stdin.fileno(), request)
        except (OSError, ValueError) as error:
            raise self._gone() from error
        self._asked = True

    def finish(self) -> tuple[dict[str, Any], bytes]:
        """The answer to `begin`. Raises TracerError if the worker could not do it or is gone."""
        assert self._process.stdout is not None
        try:
            reply, data = wire.receive(self._process.stdout.fileno())
        except (EOFError, OSError, ValueError) as error:
            raise self._gone() from error
        self._asked = False
        if "error" in reply:
            raise TracerError(f"The {self.kind} in {self.name} (process {self.pid}) could not {reply['error']}")
        return reply, data

    def ask(self, **request: Any) -> tuple[dict[str, Any], bytes]:
        """Both: request and answer."""
        self.begin(**request)
        return self.finish()

    def rows(self, **request: Any) -> Ledger:
        """A request whose answer is ledger rows."""
        return np.frombuffer(self.ask(**request)[1], dtype=LEDGER)

    def ledger(self) -> Ledger:
        """Every connection and flow so far, those still open last (their `ended` is 0)."""
        return self.rows(do="ledger")

    def totals(self) -> dict[str, int]:
        """Counts over every connection and flow so far, the open ones included."""
        return self.ask(do="totals")[0]

    def _gone(self) -> TracerError:
        if self._process.stderr is None or self._process.stderr.closed:
            return TracerError(f"The {self.kind} in {self.name} has been closed: keep its cluster open while using it")
        self._process.kill()
        said = self._process.stderr.read().decode(errors="replace").strip() or "it was killed"
        return TracerError(f"The {self.kind} in {self.name} (process {self.pid}) is gone: {said}")
