"""How long `vip-tracer compact` takes for a million rows in a thousand files, in how much memory.

    python -m tests.bench.compaction [--files 1000] [--rows 1000]

A cluster's hour (20 nodes, 500 client pods, 200 services) is made in a temporary directory, and compacted by the
command as a process of its own. Prints seconds, and the peak of resident memory. Not a test of time; it does fail if
the peak is 256 MB or more, or a row is not there once.
"""

import argparse
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

from tests.bench.report import BEGIN_NS, NODES, connections
from tracer.store import layout, reader

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 256


def make(root: Path, files: int, rows: int) -> None:
    directory = layout.partition(root, "connections", BEGIN_NS // layout.HOUR_NS)
    directory.mkdir(parents=True)
    for number in range(files):
        start = BEGIN_NS + (number // NODES) % 11 * 300 * 10**9
        table = connections(number % NODES, start, rows, number)
        ids = pa.array(np.arange(number * rows, (number + 1) * rows, dtype=np.uint64))
        table = table.set_column(table.schema.get_field_index("conn_id"), table.schema.field("conn_id"), ids)
        pq.write_table(table, directory / layout.published_name(f"node-{number % NODES}", start, "abc", number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        make(root, given.files, given.rows)
        before = sum(path.stat().st_size for path in reader.files(root))
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "tracer", "compact", made], env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        _, status, used = os.wait4(process.pid, 0)
        took, peak = time.monotonic() - begun, used.ru_maxrss / 1024
        (merged,) = reader.files(root)
        ids = np.sort(pq.read_table(merged, columns=["conn_id"])["conn_id"].to_numpy())
        whole = bool(np.array_equal(ids, np.arange(given.files * given.rows)))
        print(
            f"{given.files * given.rows:,} rows in {given.files:,} files: {took:.1f} s ({used.ru_utime:.1f} s of CPU), "
            f"peak {peak:.0f} MB resident, {before / 1e6:.1f} MB before and {merged.stat().st_size / 1e6:.1f} MB after"
        )
        if status or not whole or peak >= MOST_MB:
            sys.exit(f"status {status}, every row once: {whole}, most {MOST_MB} MB")


if __name__ == "__main__":
    main()
