"""How fast records become published Parquet, on one core, and what that costs in memory and bytes.

    python tests/bench/ring_to_parquet.py [--rows N] [--group N] [--pool NAME] [--rate ROWS_PER_S --seconds S]

Prints a small table. The records are such as a busy node makes: 200 client pods, 50 virtual IPs with six backends
each, random source ports, counters of small requests. Not a test: figures depend on the machine.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa

from tracer.clock import WallClock
from tracer.record import RECORD, RESULT_OPEN, Flag, Nat, NatSource
from tracer.store import columns, reader
from tracer.store.coverage import Run
from tracer.store.writer import GROUP_ROWS, DatasetWriter

PODS, SERVICES, BACKENDS = 200, 50, 6


def memory() -> tuple[float, float, float]:
    """Resident, anonymous and peak resident memory in MB, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}
    return found["VmRSS:"], found["RssAnon:"], found["VmHWM:"]


def _v4(random: np.random.Generator, network: int, count: int) -> np.ndarray:
    raw = np.zeros((count, 16), dtype=np.uint8)
    raw[:, 10:12] = 255
    raw[:, 12] = 10
    raw[:, 13] = network
    raw[:, 14:] = random.integers(0, 256, (count, 2))
    return raw.view("V16").reshape(count)


def records(n: int, first_id: int = 1, seed: int = 0, boot_ns: int | None = None) -> np.ndarray:
    """Closed client connections, n of them, 50 µs apart, ending at `boot_ns` (default now) of CLOCK_BOOTTIME."""
    random = np.random.default_rng(seed)
    pods, vips = _v4(random, 1, PODS), _v4(random, 96, SERVICES)
    backends = _v4(random, 2, SERVICES * BACKENDS)
    pod, vip = random.integers(0, PODS, n), random.integers(0, SERVICES, n)
    rows = np.zeros(n, dtype=RECORD)
    key = rows["tuple"]
    key["src"], key["dst"] = pods[pod], vips[vip]
    key["src_port"], key["dst_port"] = random.integers(32768, 61000, n), np.where(vip % 3, 80, 443)
    key["protocol"] = 6
    rows["backend"] = backends[vip * BACKENDS + random.integers(0, BACKENDS, n)]
    rows["backend_port"] = 8080
    rows["nat"], rows["nat_source"] = Nat.DNAT, NatSource.CONNTRACK
    rows["conn_id"] = first_id + np.arange(n)
    end = time.clock_gettime_ns(time.CLOCK_BOOTTIME) if boot_ns is None else boot_ns
    rows["ts"] = end - (n - 1 - np.arange(n)) * 50_000
    rows["duration_ns"] = random.exponential(3e6, n).astype("u8") + 200_000
    rows["started"] = rows["ts"] - rows["duration_ns"]
    rows["bytes_sent"], rows["bytes_received"] = random.integers(80, 2000, n), random.integers(200, 60000, n)
    rows["packets_sent"], rows["packets_received"] = random.integers(4, 12, n), random.integers(4, 50, n)
    rows["retransmits"] = random.random(n) < 0.002
    rows["connect_latency_us"], rows["rtt_us"] = random.integers(40, 900, n), random.integers(40, 900, n)
    rows["pid"] = 10_000 + pod * 7
    rows["cgroup_id"] = 5_000 + pod * 3
    rows["netns"] = 4026532000 + pod
    rows["comm"] = np.array([b"python3", b"envoy", b"java", b"nginx"])[pod % 4]
    rows["ct_id"] = random.integers(0, 2**32, n)
    rows["result"] = np.where(random.random(n) < 0.001, RESULT_OPEN, 0)
    rows["flags"] = sum(Flag)
    return rows


def columns_alone(rows: int, group: int) -> float:
    """Records per second of the columns step."""
    clock, source = WallClock(), records(group)
    columns.table(source, "node-1", clock)
    begin = time.perf_counter()
    for _ in range(rows // group):
        columns.table(source, "node-1", clock)
    return rows // group * group / (time.perf_counter() - begin)


def published(root: Path, rows: int, group: int, chunk: int = 4096) -> tuple[float, float]:
    """Records per second from chunks to published files, as fast as the writer takes them; bytes per row."""
    source = records(group * 4)
    writer = DatasetWriter(root, Run.here("node-1"), WallClock(), group_rows=group)
    begin = time.perf_counter()
    put = 0
    while put < rows:
        part = source[put % len(source) :][:chunk]
        while writer.snapshot().queued + len(part) > writer.pending_rows:
            time.sleep(0.001)
        assert writer.put(part)
        put += len(part)
    writer.close()
    seconds = time.perf_counter() - begin
    counts = writer.snapshot()
    assert counts.written == put
    assert counts.lost == 0
    size = sum(path.stat().st_size for path in reader.files(root))
    return put / seconds, size / put


def steady(root: Path, rate: int, seconds: int, group: int) -> tuple[float, float, float, float]:
    """CPU share and memory (resident, anonymous, peak) while `rate` rows come each second in ten drains."""
    source = records(rate // 10)
    writer = DatasetWriter(root, Run.here("node-1"), WallClock(), group_rows=group, rotate_s=10)
    cpu, begin = time.process_time(), time.monotonic()
    for tick in range(seconds * 10):
        assert writer.put(source)
        time.sleep(max(0.0, begin + (tick + 1) / 10 - time.monotonic()))
    used = (time.process_time() - cpu) / (time.monotonic() - begin)
    resident, anonymous, peak = memory()
    writer.close()
    assert writer.snapshot().lost == 0
    return used, resident, anonymous, peak


def main() -> None:
    """Measures what is asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--group", type=int, default=GROUP_ROWS, help="rows of a row group")
    parser.add_argument("--pool", choices=["mimalloc", "jemalloc", "system"], help="Arrow's memory pool")
    parser.add_argument("--rate", type=int, default=0, help="instead: so many rows a second")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.pool:
        pa.set_memory_pool(getattr(pa, f"{options.pool}_memory_pool")())
    print(f"group {options.group} rows, pool {pa.default_memory_pool().backend_name}, one core")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        if options.rate:
            used, resident, anonymous, peak = steady(root, options.rate, options.seconds, options.group)
            print(
                f"{options.rate:>12,} rows/s     {used:6.1%} of a core   resident {resident:.0f} MB "
                f"(anonymous {anonymous:.0f}, peak {peak:.0f})"
            )
            return
        print(f"{columns_alone(options.rows, options.group):>12,.0f} records/s  columns alone")
        speed, size = published(root, options.rows, options.group)
        resident, anonymous, peak = memory()
        print(f"{speed:>12,.0f} records/s  chunks to published Parquet")
        print(f"{size:>12.1f} bytes/row")
        print(f"{resident:>12.0f} MB resident (anonymous {anonymous:.0f}, peak {peak:.0f}), the records included")


if __name__ == "__main__":
    main()
