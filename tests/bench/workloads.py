"""What the benchmark's clients do, and how often they get it done."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.bench.rig import PORTS, REFUSED_PORT, Rig, Work, Worker

#: Connections that stay open in the workload `long`.
HELD = 10_000


@dataclass(frozen=True)
class Part:
    """Client processes that all do one thing, a word of traffic.c."""

    what: str
    arguments: tuple[object, ...]
    clients: int


@dataclass(frozen=True)
class Workload:
    """What a line of the table is about."""

    name: str
    unit: str
    parts: tuple[Part, ...]
    #: The services whose connections are operations, one each, so that rows can be held against them.
    ports: frozenset[int] = frozenset()
    #: The shortest window in which what it costs happens.
    seconds: float = 0.0
    #: The agent's options.
    options: tuple[str, ...] = ()


def workloads(rig: Rig) -> dict[str, Workload]:
    """All of them by name, in the order of the table."""
    tcp, udp, refusing = tuple(rig.targets()), tuple(rig.targets("udp")), (rig.refusing(),)
    held = (Part("long", (HELD // 4, *tcp), 4),)
    mixed = (Part("short", tcp, 2), Part("failed", refusing, 1), Part("udp", udp, 1), Part("long", (500, *tcp), 1))
    all_of_them = (
        Workload("short", "short TCP connections", (Part("short", tcp, 4),), frozenset(PORTS["tcp"])),
        Workload("failed", "refused connects", (Part("failed", refusing, 4),), frozenset({REFUSED_PORT})),
        Workload("udp", "UDP queries, a socket each", (Part("udp", udp, 4),)),
        # A row of each connection is due within the window: twelve times as often as by default.
        Workload("long", f"exchanges on {HELD:,} open connections", held, seconds=6.0, options=("--interval", "5s")),
        Workload("packets", "one byte there and back on one connection", (Part("packets", tcp[:1], 1),)),
        Workload("calls", "getppid(2)", (Part("calls", (), 1),)),
        Workload("mix", "the first four at once", mixed),
    )
    return {workload.name: workload for workload in all_of_them}


@dataclass(frozen=True)
class Done:
    """What the clients of one part did in a window; `per_second` is without what failed."""

    operations: int
    failures: int
    per_second: float


class Load:
    """`with Load(rig, workload) as load:` has its clients ready when the block begins."""

    def __init__(self, rig: Rig, workload: Workload) -> None:
        self._rig, self._workload = rig, workload
        self._workers: dict[str, list[Worker]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for part in self._workload.parts:
                self._workers[part.what] = self._rig.workers(part.what, *part.arguments, count=part.clients)
                for worker in self._workers[part.what]:
                    stack.callback(worker.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def begin(self, seconds: float) -> None:
        """Sets all clients to work for so long."""
        for workers in self._workers.values():
            for worker in workers:
                worker.begin(seconds)

    def finish(self) -> dict[str, Done]:
        """What they did, by part, when all are done."""
        return {what: _together([worker.finish() for worker in workers]) for what, workers in self._workers.items()}

    def window(self, seconds: float) -> dict[str, Done]:
        """Both."""
        self.begin(seconds)
        return self.finish()

    @property
    def processes(self) -> dict[str, set[int]]:
        """The clients' processes, by their pod's address."""
        found: dict[str, set[int]] = {}
        for workers in self._workers.values():
            for worker in workers:
                found.setdefault(worker.address, set()).add(worker.process.pid)
        return found


def _together(work: Sequence[Work]) -> Done:
    return Done(
        sum(each.operations for each in work),
        sum(each.failures for each in work),
        sum((each.operations - each.failures) / each.seconds for each in work),
    )
