"""``vip-tracer observe``: connections as they end (and, the long ones, as they last), a line each."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tracer.cli.lines import FORMATS, Row, render
from tracer.cli.options import DURATION, capture_from, capture_options
from tracer.errors import NoDataError, UsageError


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("-f", "--follow", is_flag=True, help="Of a dataset: go on with the files that are published meanwhile.")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Stop after so many rows.")
@click.option("--duration", type=DURATION, help="Stop after so long.")
@capture_options
def observe(
    dataset: Path | None, follow: bool, output_format: str, limit: int | None, duration: float | None, **values: Any
) -> None:
    """Print connections, a line each: live from this node, or those of a DATASET.

    The line says: time, event (+ began, - ended, = both, ~ an interval of a long one), client → address dialled ⇒
    backend, translation, result, connect latency, duration, bytes sent and received, process.
    """
    printer = _Printer(output_format, limit)
    if dataset is not None:
        for rows in _from_dataset(dataset, follow, None if duration is None else time.monotonic() + duration):
            if printer.done(rows):
                return
        return
    if follow:
        raise UsageError("--follow goes with a dataset's directory; without one, observe is live already.")
    _live(printer, duration, values)


class _Printer:
    def __init__(self, form: str, limit: int | None) -> None:
        self._form, self._left, self._header = form, limit, True

    def done(self, rows: list[Row]) -> bool:
        """Prints rows; true once the limit is reached."""
        chosen = rows if self._left is None else rows[: self._left]
        for text in render(chosen, self._form, self._header):
            click.echo(text)
        self._header &= not chosen
        if self._left is not None:
            self._left -= len(chosen)
        return self._left == 0


def _from_dataset(root: Path, follow: bool, deadline: float | None) -> Iterator[list[Row]]:
    from tracer.store import reader

    seen: set[Path] = set()
    while True:
        try:
            files = [path for path in reader.files(root) if path not in seen]
        except NoDataError:
            if not follow:
                raise
            files = []
        for path in files:
            seen.add(path)
            for batch in reader.batches(path):
                yield batch.to_pylist()
        if not follow or (deadline is not None and time.monotonic() >= deadline):
            return
        time.sleep(0.5)


def _live(printer: _Printer, duration: float | None, values: dict[str, Any]) -> None:
    import socket

    from tracer.agent import follow, stop_signals_blocked
    from tracer.clock import WallClock
    from tracer.kernel import checks
    from tracer.kernel.capture import Capture
    from tracer.store.columns import table

    options = capture_from(values)
    checks.demand(options)
    stop_signals_blocked()
    clock, node = WallClock(), socket.gethostname()
    with Capture(options) as capture:
        click.echo("observing: a line per connection when it ends; Ctrl-C stops", err=True)
        follow(capture, lambda records: printer.done(table(records, node, clock).to_pylist()), clock, duration)
        losses = {name: count for name, count in capture.counters().items() if name.startswith("lost_") and count}
        if losses:
            click.echo("lost: " + ", ".join(f"{name} {count}" for name, count in losses.items()), err=True)
