"""``vip-tracer schema``: what the columns mean."""

import click

from tracer.errors import UsageError


@click.command()
@click.option(
    "-o", "--output-format", type=click.Choice(["table", "json", "markdown"]), default="table", show_default=True
)
@click.option("--of", "of", type=click.Choice(["connections", "coverage", "endpoints"]),
              default="connections", show_default=True,
              help="Which table (the table format only).")  # fmt: skip
@click.option("--metrics", is_flag=True, help="The metrics of 'agent --listen' instead (table or markdown).")
def schema(output_format: str, of: str, metrics: bool) -> None:
    """Print the columns of the dataset: type, unit, meaning, and their names elsewhere (ECS, OpenTelemetry, IPFIX)."""
    if metrics:
        _metrics(output_format)
        return
    from tracer import schema as library

    if output_format == "json":
        click.echo(library.as_json())
    elif output_format == "markdown":
        click.echo(library.as_markdown(), nl=False)
    else:
        click.echo(library.as_table(of))


def _metrics(output_format: str) -> None:
    from tracer.operations import metrics

    if output_format == "json":
        raise UsageError("The metrics are listed as a table or as markdown: leave out -o json.")
    click.echo(metrics.as_markdown() if output_format == "markdown" else metrics.as_table() + "\n", nl=False)
