"""Rows as lines for people: what `observe` prints.

Knows how a connection is written on one line. Names come from processes, from a cluster, or from whoever wrote the
dataset: nothing of them that drives a terminal, or breaks a line, is let through in any format.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from tracer.words import bytes_text, printable, time_text

Row = dict[str, Any]

#: Columns of the csv and json formats: all; of the others, what the line shows.
FORMATS = ("table", "wide", "json", "csv")


def rows_of(batch: Any) -> list[Row]:
    """The rows of a record batch or table, times to the microsecond: Arrow wants pandas for Python's nanoseconds."""
    import pyarrow as pa

    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type):
            column = batch.column(index).cast(pa.timestamp("us", field.type.tz), safe=False)
            batch = batch.set_column(index, field.name, column)
    rows: list[Row] = batch.to_pylist()
    return rows


def endpoint_text(address: str | None, port: int | None) -> str:
    """10.0.0.1:80, [fd00::1]:80, or ? for unknown."""
    if address is None:
        return "?"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _client(row: Row, wide: bool) -> str:
    """namespace/pod, where that is known, otherwise the address; `wide`: both."""
    address = endpoint_text(row["src_ip"], row["src_port"])
    if not row["src_pod"]:
        return address
    pod = f"{row['src_namespace']}/{row['src_pod']}"
    return f"{pod} ({address})" if wide else pod


def _dialled(row: Row) -> str:
    """namespace/service (address:port), or the address."""
    address = endpoint_text(row["dst_ip"], row["dst_port"])
    return f"{row['dst_namespace']}/{row['dst_service']} ({address})" if row["dst_service"] else address


def _backend(row: Row) -> str:
    """namespace/pod address, with the port where it is another than the one dialled; or address:port.

    A service's endpoints are in its own namespace, which is the only one a row tells of its backend.
    """
    if not row["backend_pod"] or row["backend_ip"] is None:
        return endpoint_text(row["backend_ip"], row["backend_port"])
    same = row["backend_port"] == row["dst_port"]
    address = row["backend_ip"] if same else endpoint_text(row["backend_ip"], row["backend_port"])
    pod = f"{row['dst_namespace']}/{row['backend_pod']}" if row["dst_namespace"] else row["backend_pod"]
    return f"{pod} {address}"


def line(row: Row, wide: bool = False) -> str:
    """One row on one line: time, event, client → virtual address ⇒ backend, how it went.

    The event is + for a connection's beginning, - for its end, = for both, ~ for an interval in between. `wide`: with
    the date, a client's address beside its name, and more of the row.
    """
    event = {(True, True): "=", (True, False): "+", (False, True): "-", (False, False): "~"}[
        row["opened"], row["closed"]
    ]
    path = f"{_client(row, wide)} → {_dialled(row)}"
    if row["nat"] != "none":
        path += f" ⇒ {_backend(row)}"
    elif row["backend_pod"]:  # dialled itself: there is no service between
        path += f" ({row['backend_pod']})"
    if row["snat_ip"] is not None:
        path += f" as {endpoint_text(row['snat_ip'], row['snat_port'])}"
    process = f"{row['comm']}[{row['pid']}]" if row["pid"] is not None else "-"
    parts = [
        f"{row['ts']:{'%Y-%m-%dT%H:%M:%S' if wide else '%H:%M:%S'}}.{row['ts'].microsecond // 1000:03d}",
        event,
        row["protocol"],
        path,
        row["nat"],
        row["result"] or "open",
        f"connect {time_text(row['connect_latency_us'])}",
        f"for {time_text(row['duration_us'])}",
        f"↑{bytes_text(row['bytes_sent'])} ↓{bytes_text(row['bytes_received'])}",
        process,
    ]
    if wide:
        parts += [
            f"rtt {time_text(row['rtt_us'])}",
            f"retransmits {row['retransmits'] if row['retransmits'] is not None else '-'}",
            f"netns {row['netns'] or '-'}",
            f"conn {row['conn_id']:x}",
            f"ct {row['ct_id'] if row['ct_id'] is not None else '-'}",
        ]
    return printable("  ".join(parts))


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _cell(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else _plain(value)


def render(rows: Iterable[Row], form: str, header: bool = True) -> Iterator[str]:
    """Rows as lines in one of FORMATS; csv begins with a header line unless told otherwise."""
    for number, row in enumerate(rows):
        if form == "json":
            yield json.dumps(
                {name: _plain(value) for name, value in row.items()}
            )  # pure ASCII: exact for a program, harmless to a terminal
        elif form == "csv":
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="")
            if header and number == 0:
                writer.writerow(row)
                out.write("\n")
            writer.writerow([_cell(value) for value in row.values()])
            yield out.getvalue()
        else:
            yield line(row, form == "wide")
