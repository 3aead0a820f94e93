"""``vip-tracer doctor``: can this node be traced, what is missing, what to do."""

import json
from dataclasses import asdict
from typing import Any

import click

from tracer.cli.options import capture_from, capture_options
from tracer.errors import TracerError

_SIGNS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


@click.command()
@click.option("-o", "--output-format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@capture_options
def doctor(output_format: str, **values: Any) -> None:
    """Say whether this node can be traced, and what to do where not.

    Loads and attaches the programs for a moment; changes nothing. Exit code 1 if something is missing.
    """
    from tracer.kernel import checks

    found = checks.examine(capture_from(values))
    if output_format == "json":
        click.echo(json.dumps([asdict(check) for check in found], indent=2))
    else:
        width = max(len(check.name) for check in found)
        for check in found:
            click.echo(f"{_SIGNS[check.state]}  {check.name:<{width}}  {check.found}")
            if check.remedy:
                click.echo(f"{'':<{width + 11}}→ {check.remedy}")
    missing = checks.missing(found)
    if missing:
        raise TracerError(
            f"This node cannot be traced: {', '.join(check.name for check in missing)} missing (see above)."
        )
    click.echo("This node can be traced.", err=True)
