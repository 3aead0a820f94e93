"""Every metric of the agent: its name, kind, label and meaning; the one list from which the page is made.

Counters and gauges that stand in coverage/ come from its schema, so that a new column is a metric by itself. Where
the values come from is `vitals`' business. Labels have few values, all known beforehand: no address, no pod.
"""

from dataclasses import dataclass

from tracer import schema
from tracer.store.coverage import COUNTED, GAUGES, WRITER

PREFIX = "vip_tracer_"
#: The states of naming, as in the column of coverage/.
NAMING_STATES = ("off", "starting", "current", "stale")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name as it is scraped, less `_bucket`, `_sum` and `_count`; `label` is None where it has none.

    `kind` is counter, gauge, histogram, summary, or info (a gauge of 1 whose labels tell).
    """

    name: str
    kind: str
    help: str
    label: str | None = None


_COLUMNS = {column.name: column for column in schema.COVERAGE}
_LOST = "lost_"
#: Columns of coverage/ that are counted, but for the losses.
COUNTERS = tuple(dict.fromkeys(name for name in (*WRITER, *COUNTED) if not name.startswith(_LOST)))
#: Where something can be lost, as in the columns lost_* of coverage/.
STAGES = tuple(dict.fromkeys(name.removeprefix(_LOST) for name in (*COUNTED, *WRITER) if name.startswith(_LOST)))


def gauge_name(column: str) -> str:
    """The metric of one of coverage's `GAUGES`."""
    return PREFIX + (f"{column.removesuffix('_s')}_seconds" if column.endswith("_s") else column)


def _text(column: str) -> str:
    description = _COLUMNS[column].description.removeprefix("LOST: ").replace("at ts (a gauge)", "now")
    return description.replace(" (a gauge)", "").replace("before ts", "ago")


def _lost() -> Metric:
    parts = "; ".join(f"{stage}: {_text(_LOST + stage)}" for stage in STAGES)
    return Metric(f"{PREFIX}lost_total", "counter", f"Lost, by stage. {parts}", "stage")


def _from_coverage() -> tuple[Metric, ...]:
    counters = [Metric(f"{PREFIX}{name}_total", "counter", _text(name)) for name in COUNTERS]
    gauges = [Metric(gauge_name(name), "gauge", _text(name)) for name in GAUGES]
    return (_lost(), *counters, *gauges)


METRICS: tuple[Metric, ...] = (
    Metric(f"{PREFIX}build_info", "info", "1; the labels say what runs: versions, kernel, modes"),
    *_from_coverage(),
    Metric(f"{PREFIX}program_attached", "gauge", "1 where the program is attached; the sys_*_connect ones are not, "
           "unless the connect probe is on", "program"),
    Metric(f"{PREFIX}map_entries", "gauge", "elements of a map of the kernel side", "map"),
    Metric(f"{PREFIX}map_max_entries", "gauge", "elements that the map has room for", "map"),
    Metric(f"{PREFIX}maps_memory_bytes", "gauge", "kernel memory of all maps, preallocated"),
    Metric(f"{PREFIX}ring_size_bytes", "gauge", "size of the ring buffer"),
    Metric(f"{PREFIX}ring_fill_ratio", "histogram", "how full each drain found the ring buffer, 0 to 1"),
    Metric(f"{PREFIX}drain_age_seconds", "gauge", "since the ring buffer was last drained"),
    Metric(f"{PREFIX}conntrack_dump_duration_seconds", "gauge", "what the last look at conntrack's table took"),
    Metric(f"{PREFIX}queued_rows", "gauge", "rows that wait for the writer"),
    Metric(f"{PREFIX}queue_max_rows", "gauge", "rows that may wait for the writer; beyond, they are lost"),
    Metric(f"{PREFIX}unpublished_rows", "gauge", "rows that are neither in a published file nor lost"),
    Metric(f"{PREFIX}oldest_unpublished_row_age_seconds", "gauge", "age of the oldest such row; 0 where there is none"),
    Metric(f"{PREFIX}rotation_seconds", "gauge", "how often files are published at the least (--rotate)"),
    Metric(f"{PREFIX}publication_age_seconds", "gauge", "since all files were last published, or since the start"),
    Metric(f"{PREFIX}publication_duration_seconds", "summary", "what publications took, those that failed too"),
    Metric(f"{PREFIX}publication_failures_total", "counter", "publications of which not every file was published"),
    Metric(f"{PREFIX}published_files_total", "counter", "published files", "table"),
    Metric(f"{PREFIX}published_bytes_total", "counter", "size of the published files", "table"),
    Metric(f"{PREFIX}output_failing", "gauge", "1 while the output directory cannot be written"),
    Metric(f"{PREFIX}naming_state", "gauge", "1 for the state that holds: off (not asked for), starting (no complete "
           "list yet), current, stale (the API server is not heard)", "state"),
)  # fmt: skip


def as_markdown() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "<!-- Generated from tracer/operations/metrics.py; do not edit. -->",
        "",
        "What `vip-tracer agent --listen` serves at `/metrics`, in Prometheus' text format. What they are good for:",
        "[operations](operations.md). Beside them stand Prometheus' own `process_*`: resident memory, CPU,",
        "descriptors, start. Where a metric is named as a column of [coverage/](schema.md#coverage), it is the run's",
        "total of that column. A counter that this agent does not count is not there.",
        "",
        "| metric | kind | label | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| {metric.name} | {metric.kind} | {metric.label or ''} | {metric.help} |" for metric in METRICS]
    return "\n".join(lines) + "\n"


def as_table() -> str:
    """The same as aligned text: name, kind, label, meaning."""
    rows = [("METRIC", "KIND", "LABEL", "MEANING")]
    rows += [(metric.name, metric.kind, metric.label or "", metric.help) for metric in METRICS]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows)
