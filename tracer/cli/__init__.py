"""The command line: thin commands over the library, one module each.

Knows options, exit codes and where output goes (stdout is data, stderr is talk). Heavy imports wait until a command
runs.
"""

import io
import logging
import os
import sys
from typing import Any

import click

from tracer.cli import logs
from tracer.cli.agent import agent
from tracer.cli.check import check
from tracer.cli.compact import compact
from tracer.cli.demo import demo
from tracer.cli.doctor import doctor
from tracer.cli.export import export
from tracer.cli.name import name
from tracer.cli.observe import observe
from tracer.cli.report import report
from tracer.cli.schema import schema
from tracer.cli.top import top
from tracer.errors import NoDataError, TracerError, UsageError
from tracer.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_NO_DATA, EXIT_INTERRUPTED = 1, 2, 3, 130
#: What a node does without: the project's extra "analysis".
_ANALYSIS = frozenset({"jinja2", "pandas", "rich"})


class _Commands(click.Group):
    """Turns the library's errors into sentences and exit codes, in this one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TracerError as error:
            code = EXIT_NO_DATA if isinstance(error, NoDataError) else EXIT_FAILED
            _end(ctx, str(error), EXIT_USAGE if isinstance(error, UsageError) else code)
        except ModuleNotFoundError as error:
            if error.name not in _ANALYSIS:
                raise
            needs = f"'vip-tracer {ctx.invoked_subcommand}' needs {error.name}, which this installation is without"
            _end(ctx, f"{needs}: pip install 'vip-tracer[analysis]'.", EXIT_FAILED)
        except BrokenPipeError:  # the reader of our output has seen enough (| head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:  # the machine's refusal where no module expected one: no space left for stdout, say
            where = f" ({error.filename})" if error.filename else ""
            _end(ctx, f"{error.strerror or error}{where}: the command could not go on.", EXIT_FAILED)
        except KeyboardInterrupt:
            _end(ctx, "Interrupted.", EXIT_INTERRUPTED)


def _end(ctx: click.Context, sentence: str, code: int) -> None:
    logs.say(sentence if logs.is_json() else f"vip-tracer: {sentence}", logging.ERROR)
    ctx.exit(code)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "VIP_TRACER"}
)
@click.version_option(__version__, prog_name="vip-tracer", allow_from_autoenv=False)
def main() -> None:
    """Which pod did each connection to a virtual IP really go to, and why is the load uneven?

    Options are also environment variables, such as VIP_TRACER_AGENT_OUTPUT. Exit codes: 0 done, 1 failed, 2 usage, 3
    no data.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without arrows gets them spelled out, not a traceback
            stream.reconfigure(errors="backslashreplace")
    logs.configure()


for command in (agent, observe, top, report, export, compact, name, doctor, check, schema, demo):
    main.add_command(command)
