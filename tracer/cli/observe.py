"""``vip-tracer observe``: connections as they end (and, the long ones, as they last), a line each."""

import logging
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tracer.cli import logs, options
from tracer.cli.lines import FORMATS, Row, render, rows_of
from tracer.errors import NoDataError, TracerError, UsageError

#: Rows that become Python objects at once.
_SLICE = 1024


@click.command()
@click.argument("dataset", type=options.path(exists=True, directory=True), required=False)
@click.option("-f", "--follow", is_flag=True, help="Of a dataset: go on with the files that are published meanwhile.")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Stop after so many rows.")
@click.option("--duration", type=options.duration, help="Stop after so long.")
@options.log_option("text")
@options.node_option
@options.names_options
@options.capture_options
def observe(
    dataset: Path | None, follow: bool, output_format: str, limit: int | None, duration: float | None, **values: Any
) -> None:
    """Print connections, a line each: live from this node, or those of a DATASET.

    The line says: time, event (+ began, - ended, = both, ~ an interval of a long one), client → address dialled ⇒
    backend, translation, result, connect latency, duration, bytes sent and received, process. Times are UTC; "wide"
    has the date too.
    """
    printer = _Printer(output_format, limit)
    if dataset is not None:
        options.live_only(click.get_current_context(), dataset)
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
    failures: list[TracerError] = []

    def failed(error: TracerError) -> None:
        failures.append(error)
        logs.say(f"Left out: {error}.", logging.WARNING)

    try:
        while True:
            for rows in _unseen(root, seen, follow, failed):
                printer.show(rows)
                if printer.finished() or (deadline is not None and time.monotonic() >= deadline):
                    return
            if not follow and failures:
                raise TracerError(
                    f"{len(failures)} of {len(seen)} files were left out: these are not all rows of {root}"
                )
            if not follow or printer.finished() or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        if not follow:  # which has no other end
            raise


def _unseen(root: Path, seen: set[Path], patient: bool, failed: Callable[[TracerError], object]) -> Iterator[list[Row]]:
    """Rows of the files that are not among `seen`, which grows. Without any file: an error, unless `patient`."""
    from tracer.store import layout, reader

    try:
        files = [path for path in reader.files(root) if path not in seen]
    except NoDataError:
        if not patient:
            raise
        files = []
    began = bool(seen)
    for path in files:
        seen.add(path)
        # What is merged while we follow was shown before it was; and it is gone then, under its own name.
        if patient and ((began and layout.is_merged(path.name)) or not path.exists()):
            continue
        try:
            for batch in reader.batches(path):
                for start in range(0, batch.num_rows, _SLICE):
                    yield rows_of(batch.slice(start, _SLICE))
        except TracerError as error:
            failed(error)


def _live(printer: _Printer, seconds: float | None, values: dict[str, Any]) -> None:
    from tracer.cli.live import watch

    watch(
        values,
        lambda table, _: printer.show(rows_of(table)),
        printer.finished,
        seconds,
        "observing: a line per connection when it ends, and per interval of a long one; Ctrl-C stops",
    )
