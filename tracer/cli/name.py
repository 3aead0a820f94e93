"""``vip-tracer name``: names for the rows of a dataset afterwards, and snapshots of names."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli import options
from tracer.errors import NoDataError, TracerError, UsageError
from tracer.naming import IN_CLUSTER

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from tracer.naming.book import Book
    from tracer.naming.names import Coded


@click.command()
@click.argument("dataset", type=options.path(exists=True, directory=True), required=False)
@click.option(
    "--kubeconfig",
    type=options.path(exists=True),
    help="Ask the API server of this file's current context: services, endpoints, nodes and all pods.",
)
@click.option(
    "--snapshot",
    type=options.path(exists=True),
    help="Take the names that were saved in this file.",
)
@click.option(
    "--save",
    type=options.path(),
    help="Save the API server's names in this file, to name datasets with later.",
)
@click.option(
    "--timeout",
    type=options.duration,
    default="60s",
    show_default=True,
    help="How long the API server may take to answer.",
)
def name(
    dataset: Path | None, kubeconfig: Path | None, snapshot: Path | None, save: Path | None, timeout: float
) -> None:  # fmt: skip
    """Fill in the names of a DATASET's rows that have none, from the API server or from a saved snapshot.

    A row gets the names that were true when its connection was made, as far as the API server still knows them. Names
    that are there stay. Prints how many rows have a value in each of the columns of names, before and now.
    """
    if dataset is None and save is None:
        raise UsageError("Nothing to do: give a dataset's directory, or --save FILE, or both.")
    if snapshot is not None and (kubeconfig is not None or save is not None):
        raise UsageError("Names come from --snapshot or from the API server (--kubeconfig), not from both.")
    if snapshot is not None:
        from tracer.naming import snapshot as snapshots

        book = snapshots.load(snapshot)
    elif kubeconfig is None and IN_CLUSTER not in os.environ:
        raise UsageError("This is no pod, so names come from --kubeconfig FILE, or from a saved --snapshot FILE.")
    else:
        book = _listed(kubeconfig, timeout)
    if save is not None:
        from tracer.naming import snapshot as snapshots

        snapshots.save(book, save, time.time_ns())
        click.echo(f"saved the names of {len(book.services)} services and {len(book.pods)} pods in {save}", err=True)
    if dataset is not None:
        _fill(dataset, book)


def _listed(kubeconfig: Path | None, timeout: float) -> "Book":
    """What the API server says now."""
    from tracer.naming.book import Book
    from tracer.naming.objects import KINDS
    from tracer.naming.watch import Watches

    watches, book = Watches(kubeconfig, None), Book()
    deadline = time.monotonic() + timeout
    watches.start()
    try:
        while len(book.synced) < len(KINDS):
            if time.monotonic() > deadline:
                states = watches.state().values()
                why = next((state.last_error for state in states if state.last_error), "no answer in time")
                raise TracerError(f"The API server did not list everything in {timeout:.0f} s: {why}")
            book.apply(watches.changes())
            time.sleep(0.05)
    finally:
        watches.stop()
    return book


def _fill(dataset: Path, book: "Book") -> None:
    from tracer.naming.fields import address_bytes
    from tracer.naming.names import Namer
    from tracer.store import layout, locks, reader
    from tracer.store.fill import Filled, fill

    namer = Namer(book)
    total = Filled()

    def names(records: "np.ndarray", starts: "npt.NDArray[np.int64]") -> "Mapping[str, Coded]":
        return namer.name(records, starts).columns

    reader.files(dataset)  # without any, nothing is made there either
    with locks.replacing(dataset):
        layout.remove_half_named(dataset)
        files = reader.files(dataset)
        with click.progressbar(files, label="naming", file=sys.stderr) as progress:
            for path in progress:
                total.add(fill(path, names, address_bytes))
    if not total.rows:
        raise NoDataError(f"{dataset} has no rows to name.")
    click.echo(f"{'COLUMN':<17}{'BEFORE':>12}{'NOW':>12}{'OF ROWS':>12}")
    for column, before in total.before.items():
        click.echo(f"{column:<17}{before:>12,}{total.after[column]:>12,}{total.rows:>12,}")
