"""``vip-tracer compact``: hours that are over, each as one file."""

import click

from tracer.cli import options
from tracer.errors import TracerError


@click.command()
@click.argument("root", metavar="ROOT", type=options.place)
@click.option("--hour", type=options.moment, metavar="TIME", help="Only this hour: 2026-07-31T11:00 (UTC).")
@click.option("--node", metavar="NAME", help="Only this node's files, in a directory. Default: those of all nodes.")
@click.option("--close-after", type=options.duration, default="15m", show_default=True,
              help="How long after its end an hour is compacted.")  # fmt: skip
def compact(root: str, hour: int | None, node: str | None, close_after: float) -> None:
    """Merge each hour that is over of the dataset at ROOT into one large file, sorted by time.

    In a directory that file takes the place of the others in one step. In an object store (s3://bucket/prefix) merged
    hours stand below ROOT/compacted, and the others stay. Rows that come later are merged in the next time.
    """
    import pyarrow

    from tracer.store.compact import Chosen
    from tracer.store.compact import compact as compacted
    from tracer.store.layout import HOUR_NS, hour_parts
    from tracer.store.roots import root_of

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    failed: list[TracerError] = []
    merged = 0
    chosen = Chosen(close_after, None if hour is None else hour // HOUR_NS, node)
    for done in compacted(root_of(root), chosen, failed.append):
        merged += 1
        when = "/".join(hour_parts(done.hour))
        click.echo(f"{done.table}/{when}: {done.files} files, {done.rows} rows, now 1 file of {done.size} bytes")
    for error in failed:
        click.echo(f"vip-tracer: {error}", err=True)
    if not merged and not failed:
        click.echo("vip-tracer: nothing to merge: no hour is over that is not one file already", err=True)
    if failed:
        raise TracerError(f"{len(failed)} hours were not compacted, as said above; they are as they were")
