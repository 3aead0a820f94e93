"""``vip-tracer observe``: connections as they end (and, the long ones, as they last), a line each."""

import logging
import select
import sys
import time
from collections.abc import Iterator
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
    files = _Files(root, follow)

    def done() -> bool:
        return printer.finished() or (deadline is not None and time.monotonic() >= deadline)

    try:
        while not done():
            for rows in files.unseen():
                printer.show(rows)
                if done():
                    break
            if not follow:
                break
            time.sleep(0 if done() else 0.5)
    except KeyboardInterrupt:
        if not follow:  # which has no other end
            raise
    if files.lacking and not _nobody_reads():
        raise TracerError(files.lacking)


class _Files:
    """A dataset's files as they are found; with `follow` those too that are published later, or merged meanwhile."""

    def __init__(self, root: Path, follow: bool) -> None:
        self._root, self._follow = root, follow
        self._seen: set[Path] = set()
        self._shown: set[str] = set()  # names; those too that what was shown was merged from
        self._failed = self._gone = 0

    @property
    def lacking(self) -> str:
        """What was not shown, and what to do; empty if all was."""
        if self._gone:
            return (
                f"{self._gone} files of {self._root} are gone since they were listed (compacted, or expired): try again"
            )
        return f"not all rows of {self._root} were shown: {self._failed} of its files are named above" * bool(
            self._failed
        )

    def unseen(self) -> Iterator[list[Row]]:
        """Rows of the files that were not there before. Without any file: an error, unless it follows."""
        from tracer.store import reader

        try:
            files = [path for path in reader.files(self._root) if path not in self._seen]
        except NoDataError:
            if not self._follow:
                raise
            files = []
        for path in files:
            self._seen.add(path)
            try:
                if self._follow and self._is_known(path):
                    continue
                for batch in reader.batches(path):
                    for start in range(0, batch.num_rows, _SLICE):
                        yield rows_of(batch.slice(start, _SLICE))
                self._shown.add(path.name)
            except TracerError as error:
                if path.exists():
                    self._fail(str(error))
                else:  # what was merged comes again, in the merged file
                    self._gone += not self._follow

    def _is_known(self, path: Path) -> bool:
        """Whether a file has rows that were shown before it was merged. If it has others too, that is said."""
        from tracer.store import layout, merge

        if not layout.is_merged(path.name):
            return False
        origins = merge.origins(path)
        shown = origins & self._shown
        self._shown |= {path.name, *origins}
        if shown and shown != origins:
            self._fail(
                f"{path}: {len(shown)} of the {len(origins)} files that were merged into it had been shown before"
            )
        return bool(shown)

    def _fail(self, why: str) -> None:
        self._failed += 1
        logs.say(f"Left out: {why}.", logging.WARNING)


def _live(printer: _Printer, seconds: float | None, values: dict[str, Any]) -> None:
    from tracer.cli.live import watch

    watch(
        values,
        lambda table, _: printer.show(rows_of(table)),
        printer.finished,
        seconds,
        "observing: a line per connection when it ends, and per interval of a long one; Ctrl-C stops",
    )
