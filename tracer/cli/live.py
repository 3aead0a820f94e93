"""This node's connections as they happen, for the commands that show them: captured, named, as tables."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tracer.cli import logs, options
from tracer.cli.signals import hold

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tracer.clock import WallClock
    from tracer.store.names import RowNames

#: Rows that wait for names at the most; beyond, the oldest go out as they are.
HELD_ROWS = 65_536


def watch(
    values: dict[str, Any],
    show: Callable[["pa.Table", "RowNames | None"], object],
    finished: Callable[[], bool],
    seconds: float | None,
    said: str,
) -> None:
    """Captures until a stop signal comes, `seconds` are over or `finished` says so; then tells what was lost.

    Args:
        values: of `options.capture_options`, `names_options` and `node_option`; they are taken out.
        show: is given tables of the connections schema, in the order of their records; and who names them.
        finished: asked about ten times a second.
        seconds: for how long; None: no end.
        said: goes to stderr when it has begun.
    """
    hold()
    from tracer.agent import follow, names_of
    from tracer.clock import WallClock
    from tracer.kernel import checks
    from tracer.kernel.capture import Capture

    captured = options.capture_from(values)
    checks.demand(captured)
    clock = WallClock()
    names = names_of(values["node"], values["kubeconfig"], values["name_wait"], captured.interval_s)
    with Capture(captured) as capture, contextlib.closing(names) if names else contextlib.nullcontext():
        if names:
            names.start()
        named = _Named(show, values["node"], clock, names)
        logs.say(said)
        follow(capture, named.take, clock, seconds, finished=lambda: named.due() or finished())
        named.rest()
        losses = {name: count for name, count in capture.counters().items() if name.startswith("lost_") and count}
        if losses:
            logs.say("lost: " + ", ".join(f"{name} {count}" for name, count in losses.items()), logging.WARNING)


class _Named:
    """Makes tables of records, in their order, once they have waited for their names."""

    def __init__(
        self,
        show: Callable[["pa.Table", "RowNames | None"], object],
        node: str,
        clock: "WallClock",
        names: "RowNames | None",
    ) -> None:
        self._show, self._node, self._clock, self._names = show, node, clock, names
        self._held: deque[tuple[float, np.ndarray]] = deque()
        self._count = 0

    def take(self, records: "np.ndarray") -> None:
        """Takes records; without names they are shown at once."""
        if self._names is None:
            self._pass_on(records)
            return
        self._names.meet(records)
        self._held.append((time.monotonic(), records.copy()))
        self._count += len(records)

    def due(self) -> bool:
        """Shows what has waited long enough; false."""
        if self._names is not None:
            self._names.hear()
            hold_s = self._names.hold_s()
            while self._held and (self._count > HELD_ROWS or time.monotonic() >= self._held[0][0] + hold_s):
                self._next()
        return False

    def rest(self) -> None:
        """Shows what is still held, with the names that are known by now."""
        while self._held:
            self._next()

    def _next(self) -> None:
        _, records = self._held.popleft()
        self._count -= len(records)
        self._pass_on(records)

    def _pass_on(self, records: "np.ndarray") -> None:
        from tracer.store.columns import starts, table

        names = self._names.name(records, starts(records, self._clock)) if self._names else None
        self._show(table(records, self._node, self._clock, names), self._names)
