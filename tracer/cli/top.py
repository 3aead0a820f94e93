"""``vip-tracer top``: services and backends as they are loaded now, in a table that keeps itself up to date."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.cli import options
from tracer.errors import NoDataError, TracerError, UsageError
from tracer.words import bytes_text, printable

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Group

    from tracer.analysis.moving import Load
    from tracer.store.names import RowNames

#: Backends of a service that are shown; services, where the output is no terminal.
BACKENDS, SERVICES = 12, 20
#: Columns where the output is no terminal.
WIDTH = 120
#: A share this many times the fair one stands out.
STANDS_OUT = 1.5


@click.command(context_settings={"default_map": {"interval": "2s"}})
@click.argument("dataset", type=options.path(exists=True, directory=True), required=False)
@click.option("--window", type=options.duration, help="Rates over so long. Default: 10s live, 5m of a dataset.")
@click.option("--refresh", type=options.duration, default="1s", show_default=True, help="A new table this often.")
@click.option("-n", "--tables", type=click.IntRange(min=1), help="Stop after so many tables; without, at Ctrl-C.")
@click.option("--service", metavar="NAMESPACE/NAME", help="Only services whose name begins like this.")
@options.node_option
@options.names_options
@options.capture_options
def top(
    dataset: Path | None, window: float | None, refresh: float, tables: int | None, service: str | None, **values: Any
) -> None:
    """Show services and backends by their load now: live from this node, or by the newest files of a DATASET.

    Of every backend: new connections and bytes a second, connections open at once, failures, and its share of the new
    connections beside the fair one. Live, the probes are this command's own, and go with it.
    """
    if window is not None and window < refresh:
        raise UsageError("--window is at least as long as --refresh.")
    screen = _Screen(tables, service or "")
    if dataset is not None:
        options.live_only(click.get_current_context(), dataset)
        _from_dataset(screen, dataset, window or 300.0, refresh)
    else:
        _live(screen, window or 10.0, refresh, values)


class _Screen:
    """Shows one table over the other on a terminal, one after the other elsewhere."""

    def __init__(self, tables: int | None, service: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False, markup=False)
        if not self._console.is_terminal:
            self._console.width = WIDTH
        # Where it ends by itself, what was shown last stays on the terminal.
        self._live = (
            Live(console=self._console, auto_refresh=False, screen=tables is None)
            if self._console.is_terminal
            else None
        )
        self._left, self._service = tables, service

    def __enter__(self) -> "_Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    @property
    def finished(self) -> bool:
        """Whether enough tables were shown."""
        return self._left == 0

    def show(self, loads: "Sequence[Load]", head: str, left_out: Sequence[str] = ()) -> None:
        """Shows loads; below the head, the first of what could not be read."""
        more = f"; and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warning = f"Left out: {left_out[0]}{more}" if left_out else ""
        chosen = [load for load in loads if load.service.startswith(self._service)]
        lines = -(-len(warning) // self._console.width)
        table = _table(chosen, head, warning, self._console.height - 4 - lines if self._live else None)
        if self._live:
            self._live.update(table, refresh=True)
        else:
            self._console.print(table)
        if self._left is not None:
            self._left -= 1


def _live(screen: _Screen, window_s: float, refresh_s: float, values: dict[str, Any]) -> None:
    from tracer.cli.live import watch

    state: dict[str, Any] = {"due": time.monotonic() + refresh_s}

    def show(rows: "pa.Table", names: "RowNames | None") -> None:
        _window(state, window_s).add(rows)
        state["names"] = names

    def finished() -> bool:
        if time.monotonic() >= state["due"] and not screen.finished:
            state["due"] = max(state["due"] + refresh_s, time.monotonic())
            now = time.time_ns()
            loads = _window(state, window_s).loads(now, _endpoints(state.get("names"), now, window_s))
            screen.show(loads, f"this node, the last {window_s:g} s")
        return screen.finished

    with screen:
        watch(values, show, finished, None, "watching this node; Ctrl-C stops")


def _window(state: dict[str, Any], seconds: float) -> Any:
    """The window, made when it is first wanted: stop signals are held back before anything heavy is imported."""
    if "window" not in state:
        from tracer.analysis.moving import Window

        state["window"] = Window(seconds)
    return state["window"]


def _endpoints(names: "RowNames | None", now_ns: int, window_s: float) -> "Iterator[pa.Table]":
    if names is not None:
        from tracer.store import endpoints

        for columns in names.endpoints(now_ns - round(window_s * 1e9), now_ns):
            yield endpoints.table(columns, "-", "-")


def _from_dataset(screen: _Screen, root: Path, window_s: float, refresh_s: float) -> None:
    from tracer.analysis import diagnose, moving
    from tracer.store import reader

    # Ctrl-C is how it ends.
    with screen, contextlib.suppress(KeyboardInterrupt):
        known: list[Path] = []
        while not screen.finished:
            doubts = _Doubts()
            end = diagnose.last_moment(root, doubts.note)
            begin = diagnose.first_moment(root, end - round(window_s * 1e9), end, doubts.note)
            seconds = max(0.1, (end - begin) / 1e9)  # rates are over what was watched
            paths = reader.files(root, "connections", begin, end + 1)
            if paths != known:
                known = paths
                window, unread, gone = moving.Window(seconds), _Doubts(), False
                for path in paths:
                    try:
                        parts = list(reader.tables(path, columns=_columns()))  # all of it, or nothing
                    except TracerError as error:
                        unread.note(error)
                        gone |= not path.exists()
                    else:
                        for rows in parts:
                            window.add(rows)
                if gone:  # compacted since they were listed
                    known = []
                    continue
                if len(unread.sentences) == len(paths):
                    raise TracerError(unread.sentences[0])
                loads = window.loads(end, _published_endpoints(root, begin, end, unread.note))
            left_out = dict.fromkeys(doubts.sentences + unread.sentences)  # once each
            screen.show(loads, f"{root}, {seconds:.3g} s up to {_when(end)}", list(left_out))
            if not screen.finished:
                time.sleep(refresh_s)


class _Doubts:
    """What cannot be read. Sentences, not errors, which would keep what their tracebacks hold."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def note(self, error: TracerError) -> None:
        self.sentences.append(str(error))


def _columns() -> Sequence[str]:
    from tracer.analysis import partial

    return partial.COLUMNS


def _published_endpoints(
    root: Path, begin_ns: int, end_ns: int, failed: Callable[[TracerError], object]
) -> "Iterator[pa.Table]":
    from tracer.analysis import endpoints
    from tracer.store import reader

    try:
        paths = reader.files(root, "endpoints", begin_ns, end_ns + 1)
    except NoDataError:
        return
    for path in paths:
        try:
            yield from reader.tables(path, "endpoints", endpoints.COLUMNS)
        except TracerError as error:
            failed(error)


def _when(at_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_ns / 1e9))


def _table(loads: "Sequence[Load]", head: str, warning: str, most_lines: int | None) -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    table.add_column("SERVICE / BACKEND", overflow="ellipsis", no_wrap=True, max_width=60)
    for name in ("NEW/S", "SHARE", "FAIR", "OPEN", "BYTES/S", "FAILED/S", "CONNECT"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(6, len(name)))
    lines = 0
    shown = 0
    for load in loads[:SERVICES]:
        backends = load.backends.head(BACKENDS).to_dict("records")
        if most_lines is not None and shown and lines + len(backends) + 2 > most_lines:
            break
        shown += 1
        table.add_row(*_service(load))
        for row in backends:
            table.add_row(*_backend(row))
        rest = len(load.backends) - len(backends)
        if rest:
            table.add_row(f"  and {rest} more")
        lines += len(backends) + 1 + bool(rest)
    if len(loads) > shown:
        table.add_row(f"and {len(loads) - shown} more services")
    if not loads:
        table.add_row("no connections through a virtual address in this time")
    heads = [Text(printable(head), no_wrap=True, overflow="ellipsis")]
    if warning:
        heads.append(Text(printable(warning), style="red"))
    return Group(*heads, table)


def _service(load: "Load") -> Iterator[Any]:
    from rich.text import Text

    yield Text(printable(load.service), style="bold")
    yield _rate(load.connections_s)
    yield ""
    yield "" if load.fair else "of seen"
    yield f"{load.open:.1f}"
    yield bytes_text(round(load.bytes_s))
    yield Text(_rate(load.failures_s), style="red" if load.failures_s else "")


def _backend(row: Mapping[Any, Any]) -> Iterator[Any]:
    from rich.text import Text

    share, fair = row["connections_share"], row["fair_share"]
    style = "red" if fair and share > STANDS_OUT * fair and row["connections"] >= 10 else ""
    yield Text(f"  {printable(str(row['backend']))}")
    yield _rate(row["connections_s"])
    yield Text(f"{share:.1%}", style=style)
    yield f"{fair:.1%}"
    yield f"{row['open']:.1f}"
    yield bytes_text(round(row["bytes_s"]))
    yield Text(_rate(row["failures_s"]), style="red" if row["failures"] else "")
    yield "-" if row["connect_ms"] != row["connect_ms"] else f"{row['connect_ms']:.2f}ms"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 99.5 else f"{per_second:.1f}"
