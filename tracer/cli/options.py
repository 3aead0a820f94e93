"""Options that several commands share."""

import os
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from tracer.cli import logs
from tracer.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_SIZE, _LARGEST_RING = 1 << 50, 1 << 30


# Functions rather than subclasses of click.ParamType: that is generic in click 8.4 and not before.
def duration(text: str) -> float:
    """Seconds, from 500ms, 30s, 5m or 1h; a tenth of a second to 2777 hours."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)", str(text).strip())
    if not match:
        raise click.BadParameter(f"{text!r} is no duration: write it as 500ms, 30s, 5m or 1h.")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 0.1 <= seconds <= 1e7:
        raise click.BadParameter(f"{text!r} is out of range: from 100ms to 2777h.")
    return seconds


def age(text: str) -> float:
    """Seconds, from 30m, 12h or 7d; up to ten years."""
    match = re.fullmatch(r"([0-9]{1,9})(s|m|h|d)", str(text).strip())
    seconds = float(match[1]) * (86_400.0 if match[2] == "d" else _UNITS[match[2]]) if match else 0.0
    if not 1 <= seconds <= 3660 * 86_400:
        raise click.BadParameter(f"{text!r} is no age: write it as 30m, 12h or 7d; up to ten years.")
    return seconds


def moment(text: str) -> int:
    """Nanoseconds since the epoch, from an ISO 8601 time; without a zone it is UTC."""
    try:
        when = datetime.fromisoformat(str(text).strip())
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no time: write it as 2026-07-31T11:59:00Z, in UTC.") from error
    if not 1970 <= when.year < 2262:
        raise click.BadParameter(f"{text!r} is out of range: from 1970 to 2261.")
    whole = when if when.tzinfo else when.replace(tzinfo=UTC)
    return (whole - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def size(text: str) -> int:
    """Bytes, from 64MiB, 1GiB or a plain number; 1 to 2^50."""
    match = re.fullmatch(r"([0-9]{1,16})([A-Za-z]*)", str(text).strip())
    if not match or match[2] not in _SIZES:
        raise click.BadParameter(f"{text!r} is no size: write it as 65536, 512KiB, 64MiB or 1GiB.")
    count = int(match[1]) * _SIZES[match[2]]
    if not 1 <= count <= _LARGEST_SIZE:
        raise click.BadParameter(f"{text!r} is out of range: from 1 to {_LARGEST_SIZE >> 30}GiB.")
    return count


def ring_size(text: str) -> int:
    """Bytes of a ring buffer: a power of two, from one page to a gibibyte."""
    count, page = size(text), os.sysconf("SC_PAGESIZE")
    if count & (count - 1) or not page <= count <= _LARGEST_RING:
        raise click.BadParameter(
            f"{text!r} is no ring size: it is a power of two from {page >> 10}KiB to {_LARGEST_RING >> 30}GiB."
        )
    return count


def node_name(text: str) -> str:
    """A node's name: printable, so that it can stand in rows, file names and messages."""
    if not text.strip() or not text.isprintable():
        raise click.BadParameter(f"{text!r} is no node name: it must be printable text, such as the host's name.")
    return text


def roles(text: str) -> tuple[str, ...]:
    """Roles, comma separated."""
    chosen = tuple(part.strip() for part in text.split(","))
    unknown = [part for part in chosen if part not in ("client", "forwarded", "server")]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no role: choose among client, forwarded and server.")
    return chosen


def cidr(text: str) -> str:
    """A network, such as 10.0.0.0/8 or fd00::/8."""
    import ipaddress  # not for --help

    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no network ({error}): write it as in 10.0.0.0/8.") from error


class _Path(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":  # which pathlib takes for the current directory
            self.fail("it is empty: is a variable not set?", param, ctx)
        if isinstance(value, str) and "://" in value:
            self.fail(f"{value} is an address; this takes a path (report, compact and export take both).", param, ctx)
        return super().convert(value, param, ctx)


def path(*, exists: bool = False, directory: bool = False) -> click.Path:
    """A file's path, or a directory's; `pathlib.Path`."""
    return _Path(path_type=Path, exists=exists, file_okay=not directory, dir_okay=directory)


def place(text: str) -> str:
    """A path or an address; not an empty one."""
    if not str(text).strip():
        raise click.BadParameter("it is empty: is a variable not set?")
    return text


def capture_options(command: F) -> F:
    """What is captured: for every command that attaches to the node."""
    for option in reversed(
        (
            click.option("--netns", metavar="PATH", help="The node's network namespace. Default: the own one."),
            click.option("--only-netns", metavar="PATH", multiple=True, help="Trace only these namespaces' sockets."),
            click.option("--ignore-netns", metavar="PATH", multiple=True, help="Leave out these namespaces' sockets."),
            click.option("--roles", type=roles, default="client,forwarded", show_default=True,
                         help="Whose connections get rows: client, forwarded, server."),
            click.option("--exclude-cidr", type=cidr, metavar="CIDR", multiple=True,
                         help="Leave out connections to this network."),
            click.option("--only-virtual", is_flag=True,
                         help="Rows only for connections whose destination was rewritten, or may have been."),
            click.option("--connect-probe", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                         help="Note what connect() is told: auto, where a program rewrites it."),
            click.option("--loopback/--no-loopback", default=False, help="Also connections from loopback to loopback."),
            click.option(
                "--interval", type=duration, default="60s", show_default=True, help="A row per connection this often."
            ),
            click.option("--max-connections", type=click.IntRange(1, 1 << 24), default=65_536, show_default=True,
                         help="Room for open connections (272 bytes of kernel memory each)."),
            click.option("--max-translations", type=click.IntRange(1, 1 << 24), default=131_072, show_default=True,
                         help="Room for conntrack entries (176 bytes of kernel memory each)."),
            click.option("--ring-bytes", type=ring_size, metavar="SIZE", default="2MiB", show_default=True,
                         help="The ring buffer: a power of two; 208 bytes a record."),
            click.option("--cache", metavar="DIR", envvar="VIP_TRACER_CACHE",
                         help="Keep compiled programs in this directory of yours, for a quicker and smaller start."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def node_option(command: F) -> F:
    """What the node is called."""
    return click.option("--node", type=node_name, metavar="NAME", default=socket.gethostname, show_default="host name",
                        help="What the cluster calls this node.")(command)  # fmt: skip


def log_option(default: str = "auto") -> Callable[[F], F]:
    """How a command that runs for long says what it says; takes effect at once, the command hears nothing of it."""
    return click.option("--log-format", type=click.Choice(logs.FORMATS), default=default, show_default=True,
                        callback=_configure_logs, expose_value=False,
                        help="Records on stderr: text, json, or auto: json where it is no terminal.")  # fmt: skip


def _configure_logs(context: click.Context, _: click.Parameter, form: str) -> None:
    if not context.resilient_parsing:
        logs.configure(form)


def names_options(command: F) -> F:
    """The options of how rows get the names of Kubernetes' objects."""
    for option in reversed(
        (
            click.option("--kubeconfig", type=path(exists=True),
                         help="Name rows by the API server of this file's current context; in a pod: by its cluster."),
            click.option("--name-wait", type=duration, default="2s", show_default=True,
                         help="How long a row waits for its names at the most."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def live_only(context: click.Context, dataset: Path) -> None:
    """Raises UsageError if an option of live tracing was given beside a dataset, where it would do nothing."""

    @node_option
    @names_options
    @capture_options
    def live() -> None: ...

    shared = {option.name for option in live.__click_params__}  # type: ignore[attr-defined]
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in shared:
            raise UsageError(f"{option.opts[0]} is for live tracing and does nothing to {dataset}: leave it out.")


def capture_from(values: dict[str, Any]) -> Any:
    """Takes the options of `capture_options` out of a command's parameters: `tracer.kernel.capture.Options`.

    Raises:
        UsageError: they contradict each other.
    """
    if values["only_netns"] and values["ignore_netns"]:
        raise UsageError("Namespaces can be chosen (--only-netns) or left out (--ignore-netns), not both at once.")
    from tracer.kernel.capture import Options
    from tracer.kernel.maps import Sizes
    from tracer.kernel.netns import OWN

    sizes = Sizes(
        connections=values.pop("max_connections"),
        translations=values.pop("max_translations"),
        ring_bytes=values.pop("ring_bytes"),
    )
    return Options(
        node_netns=values.pop("netns") or OWN,
        interval_s=values.pop("interval"),
        only_netns=values.pop("only_netns"),
        ignore_netns=values.pop("ignore_netns"),
        loopback=values.pop("loopback"),
        roles=values.pop("roles"),
        connect_probe=values.pop("connect_probe"),
        exclude_cidrs=values.pop("exclude_cidr"),
        only_virtual=values.pop("only_virtual"),
        cache=values.pop("cache"),
        sizes=sizes,
    )
