"""A `Situation` from whole tables in memory."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer.analysis.causes.situation import COUNTS, FAILURES, KEYS, Floats, Situation
from tracer.errors import NoDataError

_NS = 10**9
#: Columns of coverage/ that count rows that are in no file.
LOSSES = ("lost_ring", "lost_connection_map", "lost_end", "lost_flow_ring", "lost_writer")


def of_tables(
    tables: dict[str, pa.Table],
    service: str,
    port: int,
    protocol: str = "tcp",
    namespace: str | None = None,
    bin_s: float = 60.0,
) -> Situation:
    """What the three tables say of one service port, over the range that coverage spans (or else the rows).

    `service` is a name in `namespace`, or, without one, the address that is dialled (a cluster without names). Rows
    that dialled one of its backends' own addresses count as direct. Raises NoDataError if there are no rows of it.
    """
    rows, ends = _frame(tables["connections"]), _frame(tables["endpoints"])
    zones = _zones(rows, ends)
    covered = tables["coverage"]
    start = min(pc.min(covered["started"]).cast(pa.int64()).as_py() if len(covered) else 2**63, _begin(rows))
    end = int(rows["ts"].max()) if len(rows) else 0
    rows = rows[rows["role"].isin(["client", "forwarded"]) & (rows["protocol"] == protocol)]
    if namespace is None:
        virtual, of_service = rows["dst_ip"] == service, ends["virtual_ips"].map(lambda ips: service in ips.split(","))
    else:
        virtual = (rows["dst_namespace"] == namespace) & (rows["dst_service"] == service)
        of_service = (ends["dst_namespace"] == namespace) & (ends["dst_service"] == service)
    virtual &= rows["dst_port"] == port
    ends = ends[of_service.astype(bool) & (ends["dst_port"] == port) & (ends["protocol"] == protocol)]
    found = _addresses(rows[virtual]) | _addresses(ends)
    dialled = pd.Series(list(zip(rows["dst_ip"], rows["dst_port"], strict=True)), rows.index, dtype=object)
    direct = ~virtual & (rows["nat"] == "none") & dialled.isin(found)
    rows, direct = rows[virtual | direct], direct[virtual | direct]
    if not len(rows):
        raise NoDataError(f"no connections to {service} port {port}/{protocol}; choose another service or time range")
    backends = _backends(rows, ends)
    place = {at: i for i, at in enumerate(zip(backends["ip"], backends["port"], strict=True))}
    client_column = "src_pod" if rows["src_pod"].notna().all() else "src_ip"
    clients = rows[client_column]
    client, client_names = pd.factorize(clients, sort=True)
    node, node_names = pd.factorize(rows["node"], sort=True)
    bins = max(1, int(np.ceil((end - start) / (bin_s * _NS))))
    opened = rows["opened"].to_numpy()
    duration = rows["duration_us"].to_numpy(np.int64)
    when = rows["ts"].to_numpy() - np.where(opened, duration * 1000, 1)
    total = rows["bytes_sent"].fillna(0).to_numpy(np.int64) + rows["bytes_received"].fillna(0).to_numpy(np.int64)
    result = rows["result"].to_numpy()
    backend = [place.get(at, -1) for at in zip(rows["backend_ip"], rows["backend_port"], strict=True)]
    latency = rows["connect_latency_us"]
    tcp = (rows["protocol"] == "tcp").to_numpy()
    silent = np.where(opened, tcp & latency.isna().to_numpy(), (rows["packets_received"] == 0).to_numpy())
    cells = pd.DataFrame({
        "bin": np.clip((when - start) // int(bin_s * _NS), 0, bins - 1),
        "client": client,
        "node": node,
        "backend": np.array(backend, np.int64),
        "direct": direct.to_numpy(),
        "socket": (rows["nat_source"] == "socket").to_numpy(),
        "opened": opened.astype(np.int64),
        "later_rows": (~opened).astype(np.int64),
        "duration_us": duration,
        "later_us": np.where(opened, 0, duration),
        "failed_us": np.where(np.isin(result, FAILURES) | (silent & (result != "ok")), duration, 0),
        "bytes": total,
        "later_bytes": np.where(opened, 0, total),
        "latency_us": latency.fillna(0).to_numpy(np.int64),
        "latencies": latency.notna().to_numpy(np.int64),
    } | {kind: (result == kind).astype(np.int64) for kind in FAILURES})  # fmt: skip
    cells = cells.groupby(list(KEYS), as_index=False)[list(COUNTS)].sum()
    known = len(ends) > 0
    return Situation(
        service=f"{service if namespace is None else f'{namespace}/{service}'}:{port}/{protocol}",
        protocol=protocol,
        bin_s=bin_s,
        range_s=(end - start) / _NS,
        cells=cells,
        clients=[str(name) for name in client_names],
        nodes=[str(name) for name in node_names],
        node_zones=[zones.get(str(name)) for name in node_names],
        backends=backends,
        ready=_ready(ends, place, start, bins, bin_s) if known else None,
        affinity=bool((ends["session_affinity"] == "ClientIP").any()) if known else None,
        local=bool((ends["internal_policy"] == "Local").any()) if known else None,
        hinted=bool(ends["hint_zones"].notna().any()) if known else None,
        lost=_lost(covered),
        client_column=client_column,
    )


def _frame(table: pa.Table) -> pd.DataFrame:
    """A frame with plain strings (objects, None for null), and times as nanoseconds."""
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_dictionary(field.type):
            columns[field.name] = pd.Series(column.cast(pa.string()).to_numpy(zero_copy_only=False), dtype=object)
        elif pa.types.is_timestamp(field.type):
            columns[field.name] = pd.Series(column.cast(pa.int64()).to_numpy())
        else:
            columns[field.name] = column.to_pandas()
    return pd.DataFrame(columns)


def _begin(rows: pd.DataFrame) -> int:
    return int((rows["ts"] - rows["duration_us"].astype("int64") * 1000).min()) if len(rows) else 0


def _addresses(frame: pd.DataFrame) -> set[tuple[str, int]]:
    some = frame[["backend_ip", "backend_port"]].dropna()
    return {(str(ip), int(port)) for ip, port in zip(some["backend_ip"], some["backend_port"], strict=True)}


def _backends(rows: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    names = {"backend_ip": "ip", "backend_port": "port", "backend_pod": "pod", "backend_workload": "workload",
             "backend_node": "node", "backend_zone": "zone"}  # fmt: skip
    both = pd.concat([frame[list(names)].astype(object) for frame in (ends, rows)]).rename(columns=names)
    both = both[both["ip"].notna()]
    known: pd.DataFrame = both.groupby(["ip", "port"], sort=True, as_index=False).first()
    return known


def _zones(rows: pd.DataFrame, ends: pd.DataFrame) -> dict[str, str]:
    """The zone of every node that any service has a backend on."""
    both = pd.concat([frame[["backend_node", "backend_zone"]].drop_duplicates() for frame in (ends, rows)]).dropna()
    return dict(zip(both["backend_node"], both["backend_zone"], strict=True))


def _ready(ends: pd.DataFrame, place: dict[tuple[str, int], int], start: int, bins: int, bin_s: float) -> Floats:
    """Bins by backends: the part of the bin covered by the union of the intervals in which the backend was ready."""
    width = int(bin_s * _NS)
    ready = np.zeros((bins, len(place)))
    taken = ends[ends["ready"] & ~ends["terminating"]]
    for at, column in place.items():
        group = taken[(taken["backend_ip"] == at[0]) & (taken["backend_port"] == at[1])]
        reach = start
        for began, ended in sorted(zip(group["started"], group["ts"], strict=True)):
            begin, finish = max(int(began), reach) - start, int(ended) - start
            reach = max(reach, int(ended))
            for bin_ in range(begin // width, min(bins, -(-finish // width))):
                ready[bin_, column] += max(0, min(finish, (bin_ + 1) * width) - max(begin, bin_ * width)) / width
    return np.clip(ready, 0.0, 1.0)


def _lost(coverage: pa.Table) -> float:
    """Rows lost on all nodes, as a part of rows lost and emitted."""
    lost = sum(pc.sum(coverage[name]).as_py() or 0 for name in LOSSES)
    emitted = pc.sum(coverage["emitted"]).as_py() or 0
    return float(lost / (lost + emitted)) if lost else 0.0
