"""The node process: wires capture, writer and clock together, and decides when things happen.

Knows the rhythm (drain, interim rows, reconciliation, stop) and nothing of kernels or files, which it is given.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tracer.clock import WallClock
from tracer.errors import TracerError
from tracer.files import write_whole
from tracer.kernel import accounting, checks
from tracer.kernel.capture import Capture, Options
from tracer.kernel.mounts import host_cgroups
from tracer.naming import IN_CLUSTER
from tracer.operations import server, talk

if TYPE_CHECKING:
    from tracer.naming.live import LiveNames
    from tracer.store.writer import DatasetWriter

_log = logging.getLogger(__name__)

#: How long the loop sleeps between two drains; much less once a drain finds the ring as full as `_HURRY`.
DRAIN_S, HURRIED_DRAIN_S = 0.1, 0.02
_HURRY = 0.05
#: Reconciliation with conntrack's table: while entries are left whose end nobody will tell, and otherwise.
RECONCILE_S, RECONCILE_IDLE_S = 60.0, 600.0
#: While there are flows (forwarded, UDP), conntrack's table is read four times an interval, at the most every
#: FLOWS_S, and so that reading takes no more than a fiftieth of the time.
FLOWS_S, FLOWS_SHARE = 15.0, 50.0
#: How often a balancer at the socket is looked for, which may be installed at any time.
BALANCERS_S = 60.0
#: What looking for interim rows may take: a twentieth of the time.
WALK_SHARE = 20.0
#: How often connections are looked for whose end nobody saw: without a row for so many intervals.
SWEEP_S, OVERDUE = 60.0, 1.5
#: How often what is held is compared with the kernel's own tables, and at most so much of the time.
CHECK_S, CHECK_SHARE = 60.0, 50.0
#: The signals that end the agent in good order.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})

Records = npt.NDArray[Any]


@dataclass(frozen=True)
class AgentOptions:
    """What the agent does, beside what it captures. `listen`: address and port for metrics and health."""

    output: Path
    node: str
    capture: Options = field(default_factory=Options)
    kubeconfig: Path | None = None
    name_wait_s: float = 2.0
    enable_accounting: bool = False
    rotate_s: float = 300
    rotate_bytes: int = 64 << 20
    disk_budget: int | None = None
    ready_file: Path | None = None
    duration_s: float | None = None
    listen: tuple[str, int] | None = None


class Rhythm:
    """Calls each task when it is due. A task's period may be a function, asked anew each time."""

    def __init__(self, now: float) -> None:
        self._tasks: list[tuple[Callable[[], object], Callable[[], float]]] = []
        self._due: list[float] = []
        self._now = now

    def every(self, period: Callable[[], float], task: Callable[[], object]) -> None:
        """Adds a task; its first call comes one period from the start."""
        self._tasks.append((task, period))
        self._due.append(self._now + period())

    def run(self, now: float) -> None:
        """Calls what is due, each at most once."""
        for number, (task, period) in enumerate(self._tasks):
            if now >= self._due[number]:
                try:
                    task()
                except BrokenPipeError:  # nobody reads what is printed any more
                    raise
                except (TracerError, OSError) as error:  # a passing want of memory or descriptors: next time, then
                    _log.warning("a periodic task failed and will be tried again: %s", error)
                self._due[number] = now + period()


def interim_period(interval_s: float, walked_s: float) -> float:
    """How often it is looked whose interval is over: a twelfth, so that a row spans at most 8 % more.

    At least a quarter of a second and at most ten seconds; less often where walking takes more than its share.
    """
    return max(min(max(interval_s / 12, 0.25), 10.0), WALK_SHARE * walked_s)


def flows_period(interval_s: float, dumped_s: float) -> float:
    """How often conntrack's table is read while there are flows; `dumped_s` is what the last time took."""
    return max(min(max(interval_s / 4, 0.25), FLOWS_S), FLOWS_SHARE * dumped_s)


def follow(
    capture: Capture,
    take: Callable[[Records], object],
    clock: WallClock,
    duration_s: float | None = None,
    finished: Callable[[], bool] = lambda: False,
) -> str:
    """Drains until a stop signal comes or the time is over; then stops the capture and drains what is left.

    The caller has blocked STOP_SIGNALS before the process had a second thread (`tracer.cli.signals`).

    Args:
        capture: what is running.
        take: is given each batch of records.
        clock: is compared with the wall clock about once a second.
        duration_s: for how long; None: until a signal.
        finished: asked after each drain; true ends it.

    Returns:
        Why it ended: the signal's name, "duration" or "finished".
    """
    began, reason, sleep = time.monotonic(), "", DRAIN_S
    reconciled = began
    rhythm = Rhythm(began)

    def hand_over() -> None:
        records = capture.drain()
        if len(records):
            take(records)

    def reconcile() -> None:
        nonlocal reconciled
        since = time.monotonic() - reconciled
        wanted = since >= RECONCILE_IDLE_S or (since >= RECONCILE_S and capture.needs_reconciliation)
        if wanted or capture.has_flows:
            capture.reconcile(hand_over)
            reconciled = time.monotonic()

    interval = capture.options.interval_s
    rhythm.every(lambda: interim_period(interval, capture.walked_s), lambda: capture.interim(hand_over))
    rhythm.every(lambda: 1.0, clock.observe)
    rhythm.every(lambda: flows_period(interval, capture.dumped_s), reconcile)
    rhythm.every(lambda: BALANCERS_S, capture.watch_balancers)
    rhythm.every(lambda: SWEEP_S, lambda: capture.sweep(OVERDUE * interval))
    rhythm.every(lambda: max(CHECK_S, CHECK_SHARE * capture.checked_s), lambda: capture.check(hand_over))
    while True:
        # Asked without waiting: CPython's sigtimedwait, interrupted (as by SIGSTOP and SIGCONT) until its time is over,
        # returns whatever is on its stack.
        time.sleep(sleep)
        received = signal.sigtimedwait(STOP_SIGNALS, 0)
        sleep = HURRIED_DRAIN_S if capture.fill() > _HURRY else DRAIN_S
        hand_over()
        now = time.monotonic()
        if received is not None:
            reason = signal.Signals(received.si_signo).name
        elif duration_s is not None and now - began >= duration_s:
            reason = "duration"
        elif finished():
            reason = "finished"
        if reason:
            break
        rhythm.run(now)
    capture.stop(hand_over)
    return reason


def names_of(node: str, kubeconfig: Path | None, wait_s: float, keep_s: float) -> "LiveNames | None":
    """Names of the cluster that the kubeconfig, or without one the container's environment, leads to.

    Nothing is asked before its `start`. None: there is no cluster.

    Args:
        node: as the cluster calls it: its pods are watched.
        kubeconfig: a file.
        wait_s: how long rows wait for their names.
        keep_s: from a row's beginning to its naming at the most.

    Raises:
        UsageError: the kubeconfig does not say where the API server is.
    """
    if kubeconfig is None and IN_CLUSTER not in os.environ:
        return None
    # Imported here: an agent without a cluster does without the client.
    from tracer.naming.book import KEEP_NS
    from tracer.naming.cgroups import Cgroups
    from tracer.naming.live import LiveNames
    from tracer.naming.watch import Watches

    watches = Watches(kubeconfig, node)
    try:
        root = host_cgroups()
    except TracerError as error:
        _log.warning("pods of host-network processes stay unnamed where cgroup v1 does not tell them: %s", error)
        cgroups = Cgroups(None)
    else:
        cgroups = Cgroups(root)
        os.close(root)
    return LiveNames(watches, cgroups, wait_s=wait_s, keep_ns=max(KEEP_NS, round(keep_s * 1e9)))


def run(options: AgentOptions) -> None:
    """The agent, from its checks to the last published file.

    Raises:
        TracerError: the node cannot be traced, or the output cannot be written.
    """
    # Imported here: the loader child, the checks and --help do without pyarrow.
    import pyarrow

    from tracer.operations.vitals import Vitals
    from tracer.store import layout
    from tracer.store.coverage import Run
    from tracer.store.writer import DatasetWriter

    checks.demand(options.capture)
    if options.enable_accounting:
        accounting.enable(options.capture.node_netns)
    # Gives memory back between row groups: 95 MB resident at 6,000 connections a second, 106 MB with the default pool.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    began = time.monotonic()
    clock = WallClock()
    kept_s = options.capture.interval_s + options.rotate_s + 300
    names = names_of(options.node, options.kubeconfig, options.name_wait_s, kept_s)
    with contextlib.ExitStack() as stack:
        # Before the rest, so that an address that is not to be had is said at once.
        listener = stack.enter_context(server.bind(*options.listen)) if options.listen else None
        lock = layout.Lock(options.output, options.node)
        stack.callback(lock.release)
        # An earlier run's, if that was killed; not that of an agent that is at work.
        _untell_ready(options.ready_file)
        stack.callback(_untell_ready, options.ready_file)
        capture = stack.enter_context(Capture(options.capture))
        if names:
            stack.enter_context(contextlib.closing(names)).start()
        identity = Run.here(
            options.node,
            programs=",".join(capture.programs),
            roles=",".join(options.capture.roles),
            interval_s=round(options.capture.interval_s),
        )
        writer = DatasetWriter(
            options.output,
            identity,
            clock,
            capture.totals,
            rotate_s=options.rotate_s,
            rotate_bytes=options.rotate_bytes,
            names=names,
            disk_budget=options.disk_budget,
            lock=lock,
        )
        try:
            if listener is not None:
                vitals = Vitals(capture, capture.totals, writer, names, options.rotate_s)
                stack.enter_context(contextlib.closing(server.Server(listener, vitals.pages())))
            naming = names.state() if names else "off"
            address = server.address_of(listener) if listener is not None else None
            talk.begun(capture, node=options.node, output=options.output, rotate_s=options.rotate_s, naming=naming,
                       listen=address, seconds=time.monotonic() - began)  # fmt: skip
            _tell_ready(options.ready_file)
            reason = follow(capture, writer.put, clock, options.duration_s, lambda: _attend(writer))
        finally:
            writer.close()
        talk.ended(reason, writer.snapshot().written, capture.counters(), writer.snapshot().lost)


def _attend(writer: "DatasetWriter") -> bool:
    """Has everything published if SIGHUP came; whether the writer has died."""
    if signal.sigtimedwait({signal.SIGHUP}, 0) is not None:
        _log.info("SIGHUP: publishing what there is; options are read at the start only")
        writer.ask_flush()
    return writer.failed


def _untell_ready(path: Path | None) -> None:
    with contextlib.suppress(OSError):  # where it cannot be removed it cannot be written, which is said
        if path is not None and path.is_file():  # no device
            path.unlink()


def _tell_ready(path: Path | None) -> None:
    if path is not None:
        write_whole(path, lambda file: file.write(f"{os.getpid()}\n"))
