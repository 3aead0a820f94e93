"""What the agents of all nodes publish of a `World`: rows of connections, coverage, endpoints."""

import numpy as np
import pyarrow as pa

from tracer import schema

from .traffic import Dials
from .world import EPOCH_NS, INTERVAL_S, Backend, Pod, Service, World

PUBLISH_S = 300
#: An agent's moments of publication are its own: nobody rotates on the full minute.
JITTER_S = 37.0


def tables(world: World, named: bool = True, with_endpoints: bool = True) -> dict[str, pa.Table]:
    """The tables connections, coverage and endpoints; `named=False` is a cluster whose API server nobody asked."""
    parts = [rows(world, *traffic, named) for traffic in world.traffic]
    connections = pa.concat_tables(parts).unify_dictionaries()
    kept = np.ones(len(connections), bool)
    node = np.asarray(connections["node"].combine_chunks().dictionary_decode())
    lost = {}
    for place, loses in world.lost.items():
        lost[place] = loses(connections) & (node == world.nodes[place])
        kept &= ~lost[place]
    ends = endpoints(world) if with_endpoints and named else schema.arrow("endpoints").empty_table()
    return {
        "connections": connections.filter(pa.array(kept)),
        "coverage": coverage(world, connections, lost),
        "endpoints": ends,
    }


def rows(world: World, service: Service, clients: list[Pod], dials: Dials, got: np.ndarray, named: bool) -> pa.Table:
    end = np.minimum(dials.at + dials.life, world.range_s)
    seen = (end > 0) & (dials.at < world.range_s)
    d, got, end = dials.take(seen), got[seen], end[seen]
    found = d.at < 0
    start = np.maximum(d.at, 0.0)
    n_rows = np.maximum(1, np.ceil((end - start) / INTERVAL_S - 1e-9)).astype(np.int64)
    i = np.repeat(np.arange(len(d)), n_rows)
    k = np.arange(n_rows.sum()) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    row_from = start[i] + k * INTERVAL_S
    row_end = np.minimum(row_from + INTERVAL_S, end[i])
    first, over = k == 0, d.at + d.life <= world.range_s
    last = k == n_rows[i] - 1

    def spread(total: np.ndarray) -> np.ndarray:
        """Increments of a counter that rises evenly over the whole life."""
        life = np.maximum(d.life, 1e-9)[i]
        upto = np.where(last & over[i], 1.0, (row_end - d.at[i]) / life)
        return (np.floor(total[i] * upto) - np.floor(total[i] * ((row_from - d.at[i]) / life))).astype(np.uint64)

    back = service.backends
    ip, port = np.array([b.pod.ip for b in back], object), np.array([b.port for b in back])
    index, client = got[i], d.client[i]
    known = d.resolved[i]
    direct = d.direct[i]
    node = np.array(world.nodes, object)[d.node[i]]
    names: dict[str, object] = {}
    if named:
        names = {
            "src_namespace": np.array([c.namespace for c in clients], object)[client],
            "src_pod": np.array([c.name for c in clients], object)[client],
            "src_workload": np.array([c.workload for c in clients], object)[client],
            "dst_namespace": np.where(direct, None, service.namespace),
            "dst_service": np.where(direct, None, service.name),
            "dst_service_port": np.where(direct, None, "main"),
            "backend_pod": np.where(known, np.array([b.pod.name for b in back], object)[index], None),
            "backend_workload": np.where(known, np.array([b.pod.workload for b in back], object)[index], None),
            "backend_node": np.where(known, np.array([world.nodes[b.pod.node] for b in back], object)[index], None),
            "backend_zone": np.where(known, np.array([world.zones[b.pod.node] for b in back], object)[index], None),
        }
    counted = d.counted[i]
    stood = d.result == "ok"
    source = np.where(d.socket[i], "socket", "conntrack")
    shaken = first & ~found[i] & stood[i] & (service.protocol == "tcp")
    columns = names | {
        "node": node,
        "ts": EPOCH_NS + (row_end * 1e9).astype(np.int64),
        "conn_id": world.rng.integers(1, 2**63, len(d), dtype=np.uint64)[i],
        "opened": first & ~found[i],
        "closed": last & over[i],
        "started": (EPOCH_NS + (d.at[i] * 1e9).astype(np.int64), ~found[i]),
        "role": np.full(len(i), "client", object),
        "protocol": np.full(len(i), service.protocol, object),
        "src_ip": np.array([c.ip for c in clients], object)[client],
        "src_port": d.src_port[i],
        "dst_ip": np.where(direct, ip[index], service.virtual_ip),
        "dst_port": np.where(direct, port[index], service.port),
        "backend_ip": np.where(known, ip[index], None),
        "backend_port": (port[index], known),
        "nat": np.where(known, np.where(direct, "none", "dnat"), "unknown"),
        "nat_source": np.where(known, source, None),
        "pid": 1000 + client,
        "comm": np.full(len(i), "app", object),
        "result": np.where(last & over[i], d.result[i], None),
        "connect_latency_us": ((d.latency * 1e6).astype(np.uint32)[i], shaken),
        "duration_us": ((row_end * 1e6).astype(np.int64) - (row_from * 1e6).astype(np.int64)),
        "bytes_sent": (spread(d.sent), counted),
        "bytes_received": (spread(d.received), counted),
        "packets_sent": (spread(np.ceil(d.sent / d.packet)), counted),
        "packets_received": (spread(np.ceil(d.received / d.packet)), counted),
    }  # fmt: skip
    return _table("connections", columns, len(i))


def _publications(world: World, place: int) -> np.ndarray:
    inner = np.arange(JITTER_S + 11.0 * place, world.range_s, PUBLISH_S)
    return np.concatenate(([0.0], inner[inner > 0], [float(world.range_s)]))


def coverage(world: World, connections: pa.Table, lost: dict[int, np.ndarray]) -> pa.Table:
    ts = (np.asarray(connections["ts"].cast(pa.int64())) - EPOCH_NS) / 1e9
    node = np.asarray(connections["node"].combine_chunks().dictionary_decode())
    opened = np.asarray(connections["opened"].combine_chunks())
    closed = np.asarray(connections["closed"].combine_chunks())
    unknown = np.asarray(connections["nat"].combine_chunks().dictionary_decode()) == "unknown"
    parts = []
    for place, name in enumerate(world.nodes):
        mine = node == name
        edges = _publications(world, place)
        gone = lost.get(place, np.zeros(len(ts), bool))

        def sums(what: np.ndarray, edges: np.ndarray = edges) -> np.ndarray:
            return np.histogram(ts[what], edges)[0]

        n = len(edges) - 1
        zero = np.zeros(n, np.int64)
        columns: dict[str, object] = {
            "node": np.full(n, name, object),
            "ts": EPOCH_NS + (edges[1:] * 1e9).astype(np.int64),
            "started": EPOCH_NS + (edges[:-1] * 1e9).astype(np.int64),
            "boot_id": np.full(n, f"boot-{place}", object),
            "run_id": np.full(n, f"run{place}", object),
            "version": np.full(n, "0.1.0", object),
            "kernel": np.full(n, "6.1.0", object),
            "programs": np.full(n, "tracepoint,ctnetlink", object),
            "roles": np.full(n, "client,forwarded", object),
            "interval_s": np.full(n, INTERVAL_S),
            "first": np.arange(n) == 0,
            "last": np.zeros(n, bool),
            "opened": sums(mine & opened),
            "closed": sums(mine & closed & ~gone),
            "emitted": sums(mine & ~gone),
            "written": sums(mine & ~gone),
            "lost_ring": sums(mine & gone),
            "lost_connection_map": zero,
            "lost_end": zero,
            "lost_writer": zero,
            "lost_translation_map": sums(mine & closed & unknown),
            "unresolved": sums(mine & closed & unknown & ~gone),
        }
        parts.append(_table("coverage", columns, n))
    return pa.concat_tables(parts).unify_dictionaries()


def endpoints(world: World) -> pa.Table:
    rows: dict[str, list[object]] = {name: [] for name in schema.arrow("endpoints").names}
    for place, node in enumerate(world.nodes):
        edges = _publications(world, place)
        for service in world.services:
            for backend in service.backends:
                states = (
                    (backend.joined, backend.left, {"ready": True, "serving": True, "terminating": False}),
                    (backend.left, backend.gone, {"ready": False, "serving": True, "terminating": True}),
                )
                for state_from, state_to, state in states:
                    begin, end = np.maximum(edges[:-1], state_from), np.minimum(edges[1:], state_to)
                    for b, e in zip(begin[begin < end], end[begin < end], strict=True):
                        row = _endpoint(world, service, backend) | state
                        row |= {"node": node, "run_id": f"run{place}"}
                        row |= {"started": EPOCH_NS + int(b * 1e9), "ts": EPOCH_NS + int(e * 1e9)}
                        for name, values in rows.items():
                            values.append(row.get(name))
    return pa.table(rows, schema=schema.arrow("endpoints"))


def _endpoint(world: World, service: Service, backend: Backend) -> dict[str, object]:
    pod = backend.pod
    return {
        "dst_namespace": service.namespace,
        "dst_service": service.name,
        "dst_service_port": "main",
        "dst_port": service.port,
        "protocol": service.protocol,
        "virtual_ips": service.virtual_ip,
        "backend_ip": pod.ip,
        "backend_port": backend.port,
        "backend_pod": pod.name,
        "backend_workload": pod.workload,
        "backend_node": world.nodes[pod.node],
        "backend_zone": world.zones[pod.node],
        "hint_zones": world.zones[pod.node] if service.hinted else None,
        "session_affinity": "None" if service.affinity_s is None else "ClientIP",
        "affinity_s": service.affinity_s,
        "internal_policy": service.internal_policy,
        "external_policy": "Cluster",
    }


def _table(name: str, columns: dict[str, object], n: int) -> pa.Table:
    """A table of the schema from arrays of n values, (values, valid) pairs, and objects with None for null."""
    arrays = []
    for field in schema.arrow(name):
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(n, field.type))
        elif isinstance(values, tuple):
            arrays.append(pa.array(values[0], mask=~np.broadcast_to(values[1], n)).cast(field.type))
        elif field.type == schema.DICT:
            arrays.append(pa.array(values, pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.table(arrays, schema=schema.arrow(name))
