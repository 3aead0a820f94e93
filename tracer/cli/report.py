"""``vip-tracer report``: which services are unevenly loaded, why, and what to do."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tracer.cli import findings, options
from tracer.errors import TracerError, UsageError
from tracer.files import write_whole
from tracer.words import printable


@click.command()
@click.argument("dataset", metavar="DATASET", type=options.place)
@click.option("--service", metavar="NAMESPACE/NAME", help="Only this one, in depth. Or its virtual address.")
@click.option("--since", type=options.duration, help="Only so long before the dataset's end.")
@click.option("--from", "begin", type=options.moment, metavar="TIME", help="Only from this time on (ISO 8601, UTC).")
@click.option("--to", "end", type=options.moment, metavar="TIME", help="Only up to this time.")
@click.option("-o", "--output-format", type=click.Choice(list(findings.FORMATS)), default="table", show_default=True)
@click.option(
    "--html",
    type=options.path(),
    metavar="FILE",
    help="Write it as one page, too, that opens without a network.",
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Count on the workers of this Dask scheduler: tcp://10.0.0.5:8786."
)
@click.option("--engine", type=click.Choice(["local", "dask"]), help="Default: dask if a scheduler is given.")
@click.option("--strict", is_flag=True, help="A file that cannot be read is an error, not a warning.")
def report(
    dataset: str, service: str | None, since: float | None, begin: int | None, end: int | None, output_format: str,
    html: Path | None, scheduler: str | None, engine: str | None, strict: bool,
) -> None:  # fmt: skip
    """Say which services of a DATASET (a directory, or s3://bucket/prefix) are unevenly loaded, why, and what to do.

    Of every service port: new connections, connection time and bytes per backend, against an even split; a verdict
    (balanced, uneven, inconclusive); and its causes, the most likely first.
    """
    if since is not None and (begin is not None or end is not None):
        raise UsageError("Give --since, or --from and --to.")
    if (engine == "dask") != (scheduler is not None) and engine is not None:
        raise UsageError("--engine dask goes with --scheduler ADDRESS, and local without.")
    from tracer.analysis import diagnose, gather
    from tracer.store.roots import root_of

    root = root_of(dataset)
    counts: gather.Engine = gather.local
    if scheduler is not None:
        from tracer.analysis import cluster

        counts = cluster.engine(scheduler)

    def failed(error: TracerError) -> None:  # which `diagnose` tells, with what else is left out
        if strict:
            raise error

    if since is not None:
        begin = diagnose.last_moment(root, failed) - round(since * 1e9)
    with _progress() as progress:
        found = diagnose.diagnose(root, begin, end, service, strict=strict, engine=counts, progress=progress)
    for sentence in found.warnings:
        click.echo(f"vip-tracer: {printable(sentence)}", err=True)
    if html is not None:
        from tracer.analysis import page

        write_whole(html, lambda file: file.write(page.render(found, str(root))))
    for text in findings.FORMATS[output_format](found, service is not None):
        click.echo(text)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Something to tell how many of how many files are done: a bar, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, files: None
        return
    with click.progressbar(length=1, label="reading", file=sys.stderr) as bar:

        def tell(done: int, files: int) -> None:
            bar.length = files
            bar.update(done - bar.pos)

        yield tell
