"""The command line: thin commands over the library, one module each.

Knows options, exit codes and where output goes (stdout is data, stderr is talk). Heavy imports wait until a command
runs.
"""

import logging
import os
import sys
from typing import Any

import click

from tracer import __version__
from tracer.cli.agent import agent
from tracer.cli.demo import demo
from tracer.cli.doctor import doctor
from tracer.cli.observe import observe
from tracer.cli.schema import schema
from tracer.errors import NoDataError, TracerError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_NO_DATA = 1, 2, 3


class _Commands(click.Group):
    """Turns the library's errors into sentences and exit codes, in this one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TracerError as error:
            code = EXIT_NO_DATA if isinstance(error, NoDataError) else EXIT_FAILED
            code = EXIT_USAGE if isinstance(error, UsageError) else code
            click.echo(f"vip-tracer: {error}", err=True)
            ctx.exit(code)
        except BrokenPipeError:  # the reader of our output has seen enough (| head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "VIP_TRACER"}
)
@click.version_option(__version__, prog_name="vip-tracer")
def main() -> None:
    """Which pod did each connection to a virtual IP really go to, and why is the load uneven?

    Options are also environment variables, such as VIP_TRACER_AGENT_OUTPUT. Exit codes: 0 done, 1 failed, 2 usage, 3
    no data.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


for command in (agent, observe, doctor, demo, schema):
    main.add_command(command)
