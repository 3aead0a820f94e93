"""Options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Duration(click.ParamType[float]):
    """Seconds, written as 500ms, 30s, 5m or 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds as a float, at least a tenth of one."""
        if isinstance(value, float | int):
            return float(value)
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)", str(value).strip())
        if not match:
            self.fail(f"{value!r} is no duration: write it as 500ms, 30s, 5m or 1h.", param, ctx)
        seconds = float(match[1]) * _UNITS[match[2]]
        if not 0.1 <= seconds <= 1e7:
            self.fail(f"{value!r} is out of range: from 100ms to 2777h.", param, ctx)
        return seconds


class Size(click.ParamType[int]):
    """Bytes, written as 64MiB, 1GiB or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes as an int, at least 1."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15})([A-Za-z]*)", str(value).strip())
        if not match or match[2] not in _SIZES or not int(match[1]):
            self.fail(f"{value!r} is no size: write it as 65536, 512KiB, 64MiB or 1GiB.", param, ctx)
        return int(match[1]) * _SIZES[match[2]]


DURATION, SIZE = Duration(), Size()


def capture_options(command: F) -> F:
    """What is captured: for every command that attaches to the node."""
    for option in reversed(
        (
            click.option("--netns", metavar="PATH", help="The node's network namespace. Default: the own one."),
            click.option("--only-netns", metavar="PATH", multiple=True, help="Trace only these namespaces' sockets."),
            click.option("--ignore-netns", metavar="PATH", multiple=True, help="Leave out these namespaces' sockets."),
            click.option("--loopback/--no-loopback", default=False, help="Also connections from loopback to loopback."),
            click.option(
                "--interval", type=DURATION, default="60s", show_default=True, help="A row per connection this often."
            ),
            click.option("--max-connections", type=click.IntRange(1, 1 << 24), default=65_536, show_default=True,
                         help="Room for open connections (312 bytes of kernel memory each)."),
            click.option("--max-translations", type=click.IntRange(1, 1 << 24), default=131_072, show_default=True,
                         help="Room for conntrack entries (176 bytes of kernel memory each)."),
            click.option("--ring-bytes", type=SIZE, default="4MiB", show_default=True,
                         help="The ring buffer: a power of two; 208 bytes a record."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def capture_from(values: dict[str, Any]) -> Any:
    """Takes the options of `capture_options` out of a command's parameters: `tracer.kernel.capture.Options`."""
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
        sizes=sizes,
    )


def directory(value: str) -> Path:
    """A path given by the user, with ~ expanded."""
    return Path(value).expanduser()
