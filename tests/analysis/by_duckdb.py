"""The same cells by DuckDB: another program's answer to the question that partial counts answer.

Written from the documentation of the columns alone: an independent truth for tests, and a measure for the benchmark.
"""

from collections.abc import Sequence
from pathlib import Path

from tracer.analysis.partial import SUMS, Bins

KEYS = """dst_namespace, dst_service, dst_service_port, dst_ip, dst_port, protocol,
    backend_ip, backend_port, backend_pod,
    coalesce(nat = 'none', false), coalesce(nat_source = 'socket', false), node, src_namespace, src_pod, src_ip"""
_WHOLE = "opened AND closed"
_BYTES = "coalesce(bytes_sent, 0) + coalesce(bytes_received, 0)"
_SILENT = """CASE WHEN opened THEN protocol = 'tcp' AND connect_latency_us IS NULL
             ELSE coalesce(packets_received = 0, false) END"""
_SUM_OF = {
    "rows": "count(*)",
    "opened": "sum(opened::INT)",
    "long_rows": f"sum((NOT ({_WHOLE}))::INT)",
    "duration_us": "sum(duration_us)",
    "long_us": f"sum(CASE WHEN {_WHOLE} THEN 0 ELSE duration_us END)",
    "failed_us": f"""sum(CASE WHEN coalesce(result IN ('refused', 'timeout', 'unreachable'), false)
                     OR (result IS DISTINCT FROM 'ok' AND {_SILENT}) THEN duration_us ELSE 0 END)""",
    "bytes": f"sum({_BYTES})",
    "long_bytes": f"sum(CASE WHEN {_WHOLE} THEN 0 ELSE {_BYTES} END)",
    "uncounted": "sum((bytes_sent IS NULL OR bytes_received IS NULL)::INT)",
    "unresolved": "sum((backend_ip IS NULL)::INT)",
    "latency_us": "coalesce(sum(connect_latency_us), 0)",
    "latencies": "count(connect_latency_us)",
} | {kind: f"coalesce(sum((result = '{kind}')::INT), 0)" for kind in ("refused", "timeout", "unreachable")}


def query(paths: Sequence[Path], bins: Bins) -> str:
    """SQL: a row per cell, its 15 texts and numbers of route and source, its bin, its sums in the order of `SUMS`."""
    files = ", ".join(f"'{path}'" for path in paths)
    time = f"epoch_ns(ts) - CASE WHEN opened THEN duration_us::BIGINT * 1000 ELSE 1 END - {bins.begin_ns}"
    sums = ", ".join(_SUM_OF[name] for name in SUMS)
    return f"""
        SELECT {KEYS}, greatest(0, least({bins.count - 1}, floor(({time}) / {bins.width_ns})::BIGINT)), {sums}
        FROM read_parquet([{files}], hive_partitioning = false)
        WHERE role IN ('client', 'forwarded') AND epoch_ns(ts) > {bins.begin_ns} AND epoch_ns(ts) <= {bins.end_ns}
        GROUP BY ALL"""
