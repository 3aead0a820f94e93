"""``vip-tracer demo``: a miniature cluster on this machine, traced and reported."""

from pathlib import Path

import click

from tracer.cli.options import duration as length
from tracer.cli.options import path

#: Those of tracer/lab/scenario.py, written down here because --help shall not load NumPy; a test compares.
CAUSES = ("random", "long-lived", "second-service", "flapping", "none")


@click.command()
@click.option(
    "--output",
    type=path(directory=True),
    default="vip-tracer-demo",
    show_default=True,
    help="Where the dataset goes; a run adds to it.",
)
@click.option("--duration", type=length, default="8s", show_default=True, help="How long the traffic lasts.")
@click.option(
    "--cause",
    type=click.Choice(CAUSES),
    default="random",
    show_default=True,
    help="The hidden cause; random is any but none.",
)
@click.option("--seed", type=int, help="Make the random choices repeatable.")
def demo(output: Path, duration: float, cause: str, seed: int | None) -> None:
    """Build a miniature cluster, make one pod busier than its peers, and trace it.

    Everything happens in network namespaces of its own, with real rules and real connections, and is gone afterwards,
    but for the dataset.
    """
    from tracer.demo import play, progress_line, render

    with progress_line() as progress:
        result = play(output, seconds=duration, cause=cause, seed=seed, progress=progress)
    click.echo(render(result))
