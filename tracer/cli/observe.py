"""``vip-tracer observe``: connections as they end (and, the long ones, as they last), a line each."""

import contextlib
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.cli import options
from tracer.cli.lines import FORMATS, Row, render, rows_of
from tracer.cli.signals import hold
from tracer.errors import NoDataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from tracer.clock import WallClock
    from tracer.store.names import RowNames

#: Rows that become Python objects at once.
_SLICE = 1024
#: Rows that wait for names at the most; beyond, the oldest go out as they are.
HELD_ROWS = 65_536


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("-f", "--follow", is_flag=True, help="Of a dataset: go on with the files that are published meanwhile.")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Stop after so many rows.")
@click.option("--duration", type=options.duration, help="Stop after so long.")
@click.option(
    "--node",
    type=options.node_name,
    metavar="NAME",
    default=socket.gethostname,
    show_default="host name",
    help="What the cluster calls this node.",
)
@options.names_options
@options.capture_options
def observe(
    dataset: Path | None, follow: bool, output_format: str, limit: int | None, duration: float | None, **values: Any
) -> None:
    """Print connections, a line each: live from this node, or those of a DATASET.

    The line says: time, event (+ began, - ended, = both, ~ an interval of a long one), client → address dialled ⇒
    backend, translation, result, connect latency, duration, bytes sent and received, process.
    """
    printer = _Printer(output_format, limit)
    if dataset is not None:
        _from_dataset(printer, dataset, follow, duration)
    elif follow:
        raise UsageError("--follow goes with a dataset's directory; without one, observe is live already.")
    else:
        _live(printer, duration, values)


class _Printer:
    def __init__(self, form: str, limit: int | None) -> None:
        self._form, self._left, self._header = form, limit, True

    def show(self, rows: list[Row]) -> None:
        """Prints rows, up to the limit."""
        chosen = rows if self._left is None else rows[: self._left]
        for text in render(chosen, self._form, self._header):
            click.echo(text)
        self._header &= not chosen
        if self._left is not None:
            self._left -= len(chosen)

    def finished(self) -> bool:
        """Whether nothing more is wanted: the limit is reached, or nobody reads our output any more (| head)."""
        return self._left == 0 or _nobody_reads()


def _nobody_reads() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file at all
        return False


def _from_dataset(printer: _Printer, root: Path, follow: bool, seconds: float | None) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    seen: set[Path] = set()
    try:
        while True:
            for rows in _unseen(root, seen, follow):
                printer.show(rows)
                if printer.finished() or (deadline is not None and time.monotonic() >= deadline):
                    return
            if not follow or printer.finished() or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        if not follow:  # which has no other end
            raise


def _unseen(root: Path, seen: set[Path], patient: bool) -> Iterator[list[Row]]:
    """Rows of the files that are not among `seen`, which grows. Without any file: an error, unless `patient`."""
    from tracer.store import reader

    try:
        files = [path for path in reader.files(root) if path not in seen]
    except NoDataError:
        if not patient:
            raise
        files = []
    for path in files:
        seen.add(path)
        if not path.exists():  # compacted or expired since it was listed
            continue
        for batch in reader.batches(path):
            for start in range(0, batch.num_rows, _SLICE):
                yield rows_of(batch.slice(start, _SLICE))


def _live(printer: _Printer, seconds: float | None, values: dict[str, Any]) -> None:
    hold()
    from tracer.agent import follow, names_of
    from tracer.clock import WallClock
    from tracer.kernel import checks
    from tracer.kernel.capture import Capture

    captured = options.capture_from(values)
    checks.demand(captured)
    clock = WallClock()
    names = names_of(values["node"], values["kubeconfig"], values["name_wait"], captured.interval_s)
    with Capture(captured) as capture, contextlib.closing(names) if names else contextlib.nullcontext():
        if names:
            names.start()
        lines = _Lines(printer, values["node"], clock, names)
        click.echo("observing: a line per connection when it ends; Ctrl-C stops", err=True)
        follow(capture, lines.take, clock, seconds, finished=lines.finished)
        lines.rest()
        losses = {name: count for name, count in capture.counters().items() if name.startswith("lost_") and count}
        if losses:
            click.echo("lost: " + ", ".join(f"{name} {count}" for name, count in losses.items()), err=True)


class _Lines:
    """Makes lines of records, in their order, once they have waited for their names."""

    def __init__(self, printer: _Printer, node: str, clock: "WallClock", names: "RowNames | None") -> None:
        self._printer, self._node, self._clock, self._names = printer, node, clock, names
        self._held: deque[tuple[float, np.ndarray]] = deque()
        self._count = 0

    def take(self, records: "np.ndarray") -> None:
        """Takes records; without names they are printed at once."""
        if self._names is None:
            self._print(records)
            return
        self._names.meet(records)
        self._held.append((time.monotonic(), records.copy()))
        self._count += len(records)

    def finished(self) -> bool:
        """Prints what is due; true if nothing more is wanted. Called about ten times a second."""
        if self._names is not None:
            self._names.hear()
            hold = self._names.hold_s()
            while self._held and (self._count > HELD_ROWS or time.monotonic() >= self._held[0][0] + hold):
                self._next()
        return self._printer.finished()

    def rest(self) -> None:
        """Prints what is still held, with the names that are known by now."""
        while self._held:
            self._next()

    def _next(self) -> None:
        _, records = self._held.popleft()
        self._count -= len(records)
        self._print(records)

    def _print(self, records: "np.ndarray") -> None:
        from tracer.store.columns import starts, table

        names = self._names.name(records, starts(records, self._clock)) if self._names else None
        self._printer.show(rows_of(table(records, self._node, self._clock, names)))
