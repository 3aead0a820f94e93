"""``vip-tracer schema``: what the columns mean."""

import click


@click.command()
@click.option(
    "-o", "--output-format", type=click.Choice(["table", "json", "markdown"]), default="table", show_default=True
)
@click.option("--of", "of", type=click.Choice(["connections", "coverage", "endpoints"]),
              default="connections", show_default=True,
              help="Which table (the table format only).")  # fmt: skip
def schema(output_format: str, of: str) -> None:
    """Print the columns of the dataset: type, unit, meaning, and their names elsewhere (ECS, OpenTelemetry, IPFIX)."""
    from tracer import schema as library

    if output_format == "json":
        click.echo(library.as_json())
    elif output_format == "markdown":
        click.echo(library.as_markdown(), nl=False)
    else:
        click.echo(library.as_table(of))
