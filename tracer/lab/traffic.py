"""Servers and clients inside the lab's pods, as their parent sees them, and their ledgers as NumPy arrays.

Knows how to start the two workers, ask them for things and reap them. What they do inside the pod is in `server`
and `client`; which pods there are is in `cluster`. Workers die with the thread that started them (see `netns`).
"""

import os
import subprocess
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError, UsageError
from tracer.lab import child, wire
from tracer.lab.netns import Namespace

#: One connection as one end of it saw it, the same bytes as `wire.ROW`. Times are CLOCK_BOOTTIME nanoseconds, 0
#: for "not yet" or "never". Bytes are the application's. `peer` is whom this end believes to talk to: for a client
#: the address it dialled. `errno` is 0 for ok; ECANCELED means that the client gave up.
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
        """Every connection so far, those still open last (their `ended` is 0)."""
        return self.rows(do="ledger")

    def totals(self) -> dict[str, int]:
        """Counts over every connection so far, the open ones included."""
        return self.ask(do="totals")[0]

    def _gone(self) -> TracerError:
        if self._process.stderr is None or self._process.stderr.closed:
            return TracerError(f"The {self.kind} in {self.name} has been closed: keep its cluster open while using it")
        self._process.kill()
        said = self._process.stderr.read().decode(errors="replace").strip() or "it was killed"
        return TracerError(f"The {self.kind} in {self.name} (process {self.pid}) is gone: {said}")


class Server(Worker):
    """A server in a backend pod."""

    kind = "server"

    def listen(self, where: Iterable[str], port: int) -> None:
        """Serves on these addresses of the pod, until `stop_listening`."""
        self.ask(do="listen", addresses=list(where), port=port)

    def stop_listening(self) -> None:
        """Refuses new connections from now on; those that stand go on."""
        self.ask(do="stop listening")

    def reset(self, on: bool = True) -> None:
        """From now on resets each connection when data arrives on it, or (False) no longer does."""
        self.ask(do="reset", on=on)


class Client(Worker):
    """A client in a pod. Every method returns the ledger rows of the connections it concerned.

    `sends` and `receives` are the application's bytes of one exchange, the 8-byte header included. Zero and zero
    means: connect and close. `timeout` is in seconds; None leaves it to the kernel (two minutes for a SYN).

    Ports stay in TIME_WAIT for a minute, as anywhere: a client makes some 27,000 quick connections a minute to one
    address and port. Beyond that the kernel searches long for a free port (a hundred times slower): use more clients.
    """

    kind = "client"

    def begin_connects(
        self, count: int, where: tuple[str, int], sends: int = 100, receives: int = 100,
        *, rate: float | None = None, timeout: float | None = None,
    ) -> None:  # fmt: skip
        """`connect_many` without waiting; `finish_connects` has the rows."""
        _check(sends, receives)
        self.begin(
            do="connect", count=count, address=where[0], port=where[1], sends=sends, receives=receives,
            rate=rate, timeout=timeout,
        )  # fmt: skip

    def finish_connects(self) -> Ledger:
        """The rows of `begin_connects`, when it is done."""
        return np.frombuffer(self.finish()[1], dtype=LEDGER)

    def connect_many(
        self, count: int, where: tuple[str, int], sends: int = 100, receives: int = 100,
        *, rate: float | None = None, timeout: float | None = None,
    ) -> Ledger:  # fmt: skip
        """Connects, exchanges and closes `count` times in a row, at `rate` a second or as fast as it can."""
        self.begin_connects(count, where, sends, receives, rate=rate, timeout=timeout)
        return self.finish_connects()

    def hold(self, count: int, where: tuple[str, int], *, timeout: float | None = None) -> Ledger:
        """Opens `count` connections and keeps them; `number` names each for `exchange` and `release`."""
        return self.rows(do="hold", count=count, address=where[0], port=where[1], timeout=timeout)

    def exchange(self, numbers: Iterable[int], sends: int, receives: int, times: int = 1) -> Ledger:
        """So many exchanges on each of these held connections, round robin."""
        _check(sends, receives)
        chosen = [int(number) for number in numbers]
        return self.rows(do="exchange", numbers=chosen, sends=sends, receives=receives, times=times)

    def release(self, numbers: Iterable[int], *, reset: bool = False) -> Ledger:
        """Closes these held connections, with a RST if so wished."""
        return self.rows(do="close", numbers=[int(number) for number in numbers], reset=reset)


def _check(sends: int, receives: int) -> None:
    least = wire.HEADER.size
    if (sends or receives) and not least <= sends < 1 << 32:
        raise UsageError(f"An exchange sends at least its header of {least} bytes, not {sends}: raise `sends`")
    if not 0 <= receives < 1 << 32:
        raise UsageError(f"An exchange returns 0 to 4 GiB, not {receives} bytes: change `receives`")
