"""What the running agent tells of itself: the values of its metrics, whether it is alive, whether it is ready.

Called by the server's thread. Takes nothing from the agent's loop but what is there to be read: no step of the loop
waits for it.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping

from tracer.kernel import libbpf
from tracer.kernel.capture import PROGRAMS, Capture
from tracer.kernel.maps import FILLING
from tracer.kernel.ring import FILL_BOUNDS
from tracer.operations.metrics import COUNTERS, METRICS, NAMING_STATES, PREFIX, STAGES, gauge_name
from tracer.operations.pages import Histogram, Summary, Value, pages
from tracer.operations.server import Page
from tracer.store.coverage import GAUGES
from tracer.store.names import RowNames
from tracer.store.writer import Counts, DatasetWriter
from tracer.version import __version__

#: The loop drains ten times a second, and also within its longer steps. Silent for so long, it hangs.
ALIVE_S = 30.0
#: How long a publication may be overdue before the agent counts as not ready: names are waited for, disks are slow.
OVERDUE_S = 60.0


class Vitals:
    """Reads a running agent.

    `totals` are those that the writer is given for coverage/; `rotate_s` is how often it publishes.
    """

    def __init__(
        self,
        capture: Capture,
        totals: Callable[[], Mapping[str, int]],
        writer: DatasetWriter,
        names: RowNames | None,
        rotate_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capture, self._totals, self._writer, self._names = capture, totals, writer, names
        self._rotate_s, self._monotonic = rotate_s, monotonic

    def alive(self) -> str:
        """What only a new start can mend; empty: nothing."""
        silent = self._monotonic() - self._capture.drained_at
        if silent > ALIVE_S:
            return f"The ring buffer has not been drained for {silent:.0f} s: the agent hangs."
        return "The writer has died of a defect, see the log." if self._writer.failed else ""

    def ready(self) -> str:
        """Why connections are not traced, or not written; empty: they are."""
        published = self._writer.snapshot().published
        late = self._monotonic() - published.at - self._rotate_s
        if published.error:
            return f"The output cannot be written ({published.error}): rows are lost, and counted, until it can."
        if late > OVERDUE_S:
            return f"Nothing was published for {late + self._rotate_s:.0f} s, every {self._rotate_s:.0f} s is meant."
        return self.alive()

    def pages(self) -> dict[str, Callable[[], Page]]:
        """For the server."""
        return pages(METRICS, self.values, self.alive, self.ready)

    def values(self) -> dict[str, Value]:
        """The values of the metrics now, by name."""
        values: dict[str, Value] = {}
        for part in (self._about(), self._kernel_side(), self._coverage(), self._written(self._writer.snapshot())):
            values |= {PREFIX + name: value for name, value in part.items()}
        return values

    def _about(self) -> dict[str, Value]:
        options = self._capture.options
        about = {
            "version": __version__,
            "kernel": os.uname().release,
            "python": platform.python_version(),
            "libbpf": libbpf.version(),
            "roles": ",".join(options.roles),
            "interval": f"{options.interval_s:g}s",
            "connect_probe": options.connect_probe,
        }
        return {"build_info": about}

    def _kernel_side(self) -> dict[str, Value]:
        capture, sizes = self._capture, self._capture.options.sizes
        attached = capture.programs
        return {
            "program_attached": {name: float(name in attached) for name in PROGRAMS},
            "map_entries": {name: float(capture.maps.count(name)) for name in FILLING},
            "map_max_entries": {name: float(getattr(sizes, name)) for name in FILLING},
            "maps_memory_bytes": sizes.kernel_bytes(),
            "ring_size_bytes": sizes.ring_bytes,
            "ring_fill_ratio": Histogram(FILL_BOUNDS, *capture.ring_fills()),
            "drain_age_seconds": max(0.0, self._monotonic() - capture.drained_at),
            "conntrack_dump_duration_seconds": capture.dumped_s,
        }

    def _coverage(self) -> dict[str, Value]:
        counts = self._writer.snapshot()
        own = {"emitted": counts.emitted, "written": counts.written, "lost_writer": counts.lost}
        totals = dict(self._totals()) | own
        state = self._names.state() if self._names else "off"
        if self._names:
            totals |= self._names.totals()
        values: dict[str, Value] = {
            "lost_total": {stage: float(totals[f"lost_{stage}"]) for stage in STAGES if f"lost_{stage}" in totals},
            "naming_state": {name: float(name == state) for name in NAMING_STATES},
        }
        values |= {f"{name}_total": totals[name] for name in COUNTERS if name in totals}
        values |= {gauge_name(name).removeprefix(PREFIX): totals[name] for name in GAUGES if name in totals}
        return values

    def _written(self, counts: Counts) -> dict[str, Value]:
        now, published = self._monotonic(), counts.published
        return {
            "queued_rows": counts.queued,
            "queue_max_rows": self._writer.pending_rows,
            "unpublished_rows": counts.unpublished,
            "oldest_unpublished_row_age_seconds": 0.0 if counts.oldest_at is None else max(0.0, now - counts.oldest_at),
            "rotation_seconds": self._rotate_s,
            "publication_age_seconds": max(0.0, now - published.at),
            "publication_duration_seconds": Summary(published.publications, published.seconds),
            "publication_failures_total": published.failures,
            "published_files_total": {name: float(count) for name, count in published.files.items()},
            "published_bytes_total": {name: float(count) for name, count in published.bytes.items()},
            "output_failing": float(bool(published.error)),
        }
