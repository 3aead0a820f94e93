"""How long `vip-tracer report` takes on a large dataset, in how much memory, and what DuckDB takes for its group-by.

    python -m tests.bench.report [--files 400] [--rows 250000] [--keep DIR]

Makes a cluster's dataset (20 nodes, 500 client pods each asking 20 of 200 services with 10 backends; a file per node
and five minutes) once in DIR, then runs each contender as a process of its own and prints wall time and peak memory,
and the ratio. DuckDB is asked for the same cells (route, source, bin) and the same sums. Not a test: figures depend on
the machine.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.analysis import by_duckdb
from tracer import schema
from tracer.analysis import gather
from tracer.store import layout, reader

SERVICES, BACKENDS, CLIENTS, NODES, ASKED = 200, 10, 500, 20, 20
BEGIN_NS, FILE_NS = 1_785_456_000 * 10**9, 300 * 10**9
ROOT = Path(__file__).resolve().parents[2]
#: A contender as a process: what it took goes to stderr.
_CHILD = """
import resource, runpy, sys, time
begun = time.monotonic()
code = 0
try:
    {what}
except SystemExit as end:
    code = end.code or 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{{time.monotonic() - begun:.1f}} {{peak:.0f}}", file=sys.stderr)
sys.exit(code)
"""
_DUCKDB = "import duckdb; duckdb.execute('SET threads TO 2'); duckdb.execute({query!r}).fetchnumpy()"


def _coded(codes: np.ndarray, texts: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(texts)).cast(schema.DICT)


def connections(node: int, begin_ns: int, rows: int, seed: int) -> pa.Table:
    """What one node saw in five minutes: one in ten rows is of a long connection."""
    rng = np.random.default_rng(seed)
    client = rng.integers(0, CLIENTS // NODES, rows) * NODES + node
    service = (client * 7 + rng.integers(0, ASKED, rows) * 13) % SERVICES
    backend = service * BACKENDS + rng.integers(0, BACKENDS, rows)
    ts = begin_ns + 1 + np.sort(rng.integers(0, FILE_NS - 1, rows))
    duration = rng.lognormal(8, 1.5, rows).astype(np.int64)
    opened = rng.random(rows) < 0.9
    zero = np.zeros(rows, np.int64)
    columns = {
        "node": _coded(zero, [f"node-{node}"]),
        "ts": pa.array(ts),
        "started": pa.array(ts - duration * 1000),
        "conn_id": pa.array(np.arange(rows) + seed * rows),
        "opened": pa.array(opened),
        "closed": pa.array(np.ones(rows, bool)),
        "role": _coded(zero, ["client"]),
        "protocol": _coded(zero, ["tcp"]),
        "src_ip": _coded(client, [f"10.{150 + i % NODES}.{i // 250}.{i % 250 + 2}" for i in range(CLIENTS)]),
        "src_port": pa.array(rng.integers(30000, 60000, rows)),
        "dst_ip": _coded(service, [_virtual(i) for i in range(SERVICES)]),
        "dst_port": pa.array(zero + 80),
        "backend_ip": _coded(backend, [_backend(i) for i in range(SERVICES * BACKENDS)]),
        "backend_port": pa.array(zero + 8080),
        "nat": _coded(zero, ["dnat"]),
        "nat_source": _coded(zero, ["conntrack"]),
        "src_namespace": _coded(zero, ["shop"]),
        "src_pod": _coded(client, [f"client-{i}-7d9f8c6b5-abcde" for i in range(CLIENTS)]),
        "src_workload": _coded(zero, ["deployment/client"]),
        "dst_namespace": _coded(zero, ["shop"]),
        "dst_service": _coded(service, [f"service-{i}" for i in range(SERVICES)]),
        "dst_service_port": _coded(zero, ["http"]),
        "backend_pod": _coded(backend, [_pod(i) for i in range(SERVICES * BACKENDS)]),
        "backend_workload": _coded(zero, ["deployment/web"]),
        "backend_node": _coded(backend % NODES, [f"node-{i}" for i in range(NODES)]),
        "backend_zone": _coded(backend % 3, ["a", "b", "c"]),
        "result": _coded(zero, ["ok"]),
        "connect_latency_us": pa.array(rng.integers(50, 500, rows), mask=~opened),
        "duration_us": pa.array(duration),
        "bytes_sent": pa.array(rng.lognormal(6, 1, rows).astype(np.int64)),
        "bytes_received": pa.array(rng.lognormal(8, 1, rows).astype(np.int64)),
        "packets_sent": pa.array(zero + 5),
        "packets_received": pa.array(zero + 5),
    }
    return _table("connections", columns, rows)


def endpoints(node: int, begin_ns: int) -> pa.Table:
    """All backends, ready for the five minutes."""
    every = np.arange(SERVICES * BACKENDS)
    zero = np.zeros(len(every), np.int64)
    columns = {
        "node": _coded(zero, [f"node-{node}"]),
        "run_id": _coded(zero, [f"run-{node}"]),
        "started": pa.array(zero + begin_ns),
        "ts": pa.array(zero + begin_ns + FILE_NS),
        "dst_namespace": _coded(zero, ["shop"]),
        "dst_service": _coded(every // BACKENDS, [f"service-{i}" for i in range(SERVICES)]),
        "dst_service_port": _coded(zero, ["http"]),
        "dst_port": pa.array(zero + 80),
        "protocol": _coded(zero, ["tcp"]),
        "virtual_ips": _coded(every // BACKENDS, [_virtual(i) for i in range(SERVICES)]),
        "backend_ip": _coded(every, [_backend(i) for i in every]),
        "backend_port": pa.array(zero + 8080),
        "backend_pod": _coded(every, [_pod(i) for i in every]),
        "backend_workload": _coded(zero, ["deployment/web"]),
        "backend_node": _coded(every % NODES, [f"node-{i}" for i in range(NODES)]),
        "backend_zone": _coded(every % 3, ["a", "b", "c"]),
        "ready": pa.array(zero == 0),
        "serving": pa.array(zero == 0),
        "terminating": pa.array(zero == 1),
        "session_affinity": _coded(zero, ["None"]),
        "internal_policy": _coded(zero, ["Cluster"]),
        "external_policy": _coded(zero, ["Cluster"]),
    }
    return _table("endpoints", columns, len(every))


def coverage(node: int, begin_ns: int, rows: int) -> pa.Table:
    """Nothing was lost."""
    columns: dict[str, object] = {
        "node": _coded(np.zeros(1, int), [f"node-{node}"]),
        "started": pa.array([begin_ns]),
        "ts": pa.array([begin_ns + FILE_NS]),
        "interval_s": pa.array([60.0]),
        "emitted": pa.array([rows]),
        "written": pa.array([rows]),
    }
    return _table("coverage", columns, 1)


def _virtual(i: int) -> str:
    return f"10.96.{i // 250}.{i % 250 + 1}"


def _backend(i: int) -> str:
    return f"10.{100 + i % NODES}.{i // 250}.{i % 250 + 2}"


def _pod(i: int) -> str:
    return f"web-{i}-7d9f8c6b5-abcde"


def _table(name: str, columns: dict[str, object], rows: int) -> pa.Table:
    """A table of the schema; numbers and truths that are left out are 0, texts null, or empty where never null."""
    arrays = []
    for field in schema.arrow(name):
        given = columns.get(field.name)
        if given is not None:
            arrays.append(given.cast(field.type))  # type: ignore[attr-defined]
        elif field.nullable:
            arrays.append(pa.nulls(rows, field.type))
        elif field.type == schema.DICT:
            arrays.append(_coded(np.zeros(rows, int), ["-"]))
        else:
            arrays.append(pa.array(np.zeros(rows, int)).cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema.arrow(name))


def write(root: Path, number: int, rows: int) -> None:
    """The three tables' files number `number`."""
    node, begin_ns = number % NODES, BEGIN_NS + number // NODES * FILE_NS
    made = {
        "connections": connections(node, begin_ns, rows, number),
        "endpoints": endpoints(node, begin_ns),
        "coverage": coverage(node, begin_ns, rows),
    }
    for name, content in made.items():
        where = layout.partition(root, name, begin_ns // layout.HOUR_NS)
        where.mkdir(parents=True, exist_ok=True)
        path = where / layout.published_name(f"node-{node}", begin_ns, f"{number:012x}", 0)
        pq.write_table(content, path, compression="zstd", row_group_size=16_384)


def timed(what: str, *arguments: str) -> tuple[float, float]:
    """Seconds and MB of some Python as a process."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(what=what.strip().replace("\n", "\n    ")), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    wall, peak = done.stderr.split()[-2:]
    return float(wall), float(peak)


def main() -> None:
    """Makes the dataset, runs both, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--rows", type=int, default=250_000, help="in each file")
    parser.add_argument("--keep", type=Path, help="a directory in which the dataset is made once and stays")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary)
        if not (root / "connections").exists():
            begun = time.monotonic()
            with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(write, [root] * given.files, range(given.files), [given.rows] * given.files))
            print(f"dataset made in {time.monotonic() - begun:.0f} s")
        size = sum(path.stat().st_size for path in root.rglob("*.parquet"))
        print(f"{given.files} files, {given.files * given.rows:,} rows, {size / 1e9:.2f} GB, {os.cpu_count()} CPUs")
        bins = gather.bins_for(BEGIN_NS, BEGIN_NS + max(1, given.files // NODES) * FILE_NS)
        report = "sys.argv[0] = 'vip-tracer'; runpy.run_module('tracer', run_name='__main__', alter_sys=False)"
        ours = timed(report, "report", str(root), "-o", "json")
        print(f"report, whole        {ours[0]:>7.1f} s {ours[1]:>7,.0f} MB")
        count = (
            "from pathlib import Path; from tracer.analysis import gather; from tracer.store import reader\n"
            f"bins = gather.bins_for({bins.begin_ns}, {bins.end_ns})\n"
            f"gather.together(gather.local(reader.files(Path({str(root)!r})), bins), bins)"
        )
        counted = timed(count)
        print(f"its counting alone   {counted[0]:>7.1f} s {counted[1]:>7,.0f} MB")
        duck = timed(_DUCKDB.format(query=by_duckdb.query(reader.files(root), bins)))
        print(f"DuckDB's group-by    {duck[0]:>7.1f} s {duck[1]:>7,.0f} MB")
        print(f"DuckDB's time over that of our counting: {duck[0] / counted[0]:.2f}")


if __name__ == "__main__":
    main()
