"""``vip-tracer export``: the dataset, elsewhere."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from tracer.cli import options


@click.command()
@click.argument("root", type=options.path(exists=True, directory=True))
@click.argument("destination", type=options.place)
@click.option("--schedule", metavar="CRON", help="Again and again: '*/15 * * * *', in UTC. Default: once.")
@click.option("--names", type=click.Choice(["ecs", "otel", "ipfix"]), help="Call the columns as this standard does.")
@click.option("--bandwidth", type=options.size, metavar="SIZE", help="At most so many bytes a second, as in 20MiB.")
@click.option(
    "--keep", type=options.age, metavar="AGE", help="Delete here what is exported and this old: 7d. Default: nothing."
)
@click.option(
    "--disk-budget",
    type=options.size,
    metavar="SIZE",
    help="Delete the oldest files here to stay within this: exported ones first.",
)
@click.option(
    "--close-after",
    type=options.duration,
    default="15m",
    show_default=True,
    help="How long after its end an hour gets its marker.",
)
@click.option("--grace", type=options.duration, default="20s", show_default=True,
              help="How long a scheduled export may take to end.")  # fmt: skip
def export(root: Path, destination: str, schedule: str | None, **values: Any) -> None:
    """Put the files of the dataset at ROOT to DESTINATION: a directory, s3://, gs:// or abfs://.

    Each file is put once and verified, however often this is interrupted, under the name it has here. An hour that is
    over gets a marker, _SUCCESS-NODE, that names its files. Run one per dataset, beside the agent.
    """
    import pyarrow

    from tracer.store import ledger, places, rounds
    from tracer.store.cron import Schedule
    from tracer.store.export import Exporter, Options
    from tracer.store.pace import Pace

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    times = Schedule(schedule) if schedule else None
    chosen = Options(values["names"], values["close_after"], values["keep"], values["disk_budget"])
    stop = rounds.Stop(values["grace"] if times else 0.0)
    identity = " ".join(filter(None, [places.identity_of(destination), chosen.standard]))
    with ledger.opened(root, identity) as entries, rounds.signals(stop):
        reach = partial(places.reached, destination, root)
        exporter = Exporter(root, reach, entries, chosen, Pace(values["bandwidth"]), stopped=stop)
        if times:
            rounds.rounds(exporter, root, times, stop)
        else:
            done = exporter.run()
            click.echo(f"{done.exported} exported, {done.found} there already, {done.expired.files} deleted here")
            rounds.complain(done)
