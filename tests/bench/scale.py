"""What a node costs that is larger than this machine: maps and rows are made up, what works on them is the agent.

    python -m tests.bench.scale [--connections N] [--rate ROWS_PER_S] [--seconds S]

Prints the rig and a table. Maps of the size asked for are filled with open connections of 200 namespaces and with twice
as many translations, half of them of connections that are over; then what the agent does with whole maps is timed, one
after the other, in one thread: looking for interim rows, counting what is held (metrics), asking whether there are
flows, and reading all translations as the reconciliation with conntrack's table does. And the writer is given that many
rows a second, published as the agent does. Not a test: figures depend on the machine.
"""

import argparse
import ctypes
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.bench.ring_to_parquet import memory, records, steady
from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.kernel.identity import identity
from tracer.kernel.maps import CONNECTION, SOCKET_KEY, TRANSLATION, Sizes
from tracer.lab.netns import Namespace
from tracer.record import TUPLE, Flag, Nat, NatSource
from tracer.store.writer import GROUP_ROWS

NAMESPACES = 200
CHUNK = 65_536


def fill(fd: int, keys: np.ndarray, values: np.ndarray) -> None:
    """Puts elements into a map, many at a time."""
    count = ctypes.c_uint32(len(keys))
    error = libbpf.library().bpf_map_update_batch(
        fd, keys.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.byref(count), None
    )
    if error:
        raise OSError(-error, os.strerror(-error))


def populate(capture: Capture, connections: int) -> None:
    """That many open connections, and twice as many translations: theirs, and those of connections that are over."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for start in range(0, 2 * connections, CHUNK):
        number = np.arange(start, min(start + CHUNK, 2 * connections), dtype=np.uint64)
        rows = records(len(number), seed=start)
        keys, values = rows["tuple"].astype(TUPLE), np.zeros(len(number), TRANSLATION)
        keys["src"] = np.column_stack((number >> np.uint64(16), number)).view("V16")[:, 0]  # each another
        for name in ("backend", "backend_port", "ct_id"):
            values[name] = rows[name]
        values["nat"], values["source"] = Nat.DNAT, NatSource.CONNTRACK
        values["conn_id"], values["socket"] = 1 << 48 | number, 0xFFFF_8880_0000_0000 | number << np.uint64(11)
        values["created"] = now - 10**10
        fill(capture.maps.translations, keys, values)
        mine = number < connections
        sockets, open_ = values["socket"][mine].astype(SOCKET_KEY), np.zeros(mine.sum(), CONNECTION)
        if len(sockets):
            row = open_["row"]
            row["tuple"], row["backend"], row["conn_id"] = keys[mine], rows["backend"][mine], values["conn_id"][mine]
            row["ts"] = row["started"] = now
            row["flags"] = Flag.OPENED | Flag.COUNTED | Flag.ESTABLISHED
            row["netns"], row["visited"] = 4_026_540_000 + number[mine] % NAMESPACES, 1
            fill(capture.maps.connections, sockets, open_)


def timed(what: Callable[[], object]) -> float:
    """Seconds of CPU, the least of three."""
    taken = []
    for _ in range(3):
        before = time.thread_time()
        what()
        taken.append(time.thread_time() - before)
    return min(taken)


def charged(fd: int) -> float:
    """Kernel memory of a map in MB, as the kernel says (bpf_map_show_fdinfo)."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("memlock:")) / 1e6


def maps(connections: int) -> None:
    """Prints what whole maps cost."""
    sizes = Sizes(connections=connections, translations=2 * connections, ring_bytes=16 << 20)
    with (
        Namespace("scale") as node,
        Capture(Options(node_netns=node.path, only_netns=(node.path,), sizes=sizes)) as capture,
    ):
        before = memory()[0]
        populate(capture, connections)
        print(f"{connections:,} open connections, {2 * connections:,} translations, a ring of 16 MiB")
        total = sum(map(charged, (capture.maps.connections, capture.maps.translations, capture.maps.records)))
        print(f"  {'kernel memory':44} {total:8.0f} MB ({sizes.kernel_bytes() / 1e6:.0f} by arithmetic, all maps)")
        due = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - 60 * 10**9

        def read() -> None:
            keys, values = capture._translations()
            identity(keys, values["ct_id"])

        steps: dict[str, Callable[[], object]] = {
            "looking for interim rows, none due": lambda: capture._where_rows_wait(due),
            "counting what is held": capture.totals,
            "asking whether there are flows": lambda: capture.has_flows,
            "what is known, for a reconciliation": capture._known,
            "all translations, for a reconciliation": read,
        }
        for name, what in steps.items():
            print(f"  {name:44} {timed(what):8.3f} s of CPU")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(f"  {'resident before; at the most, while reading all':44} {before:8.0f} MB; {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=1_000_000)
    parser.add_argument("--rate", type=int, default=100_000, help="rows a second")
    parser.add_argument("--seconds", type=int, default=30)
    given = parser.parse_args()
    print(f"Linux {platform.release()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as directory:
        used, resident, _, peak = steady(Path(directory), given.rate, given.seconds, GROUP_ROWS)
    print(f"{given.rate:,} rows a second for {given.seconds} s, columns to published Parquet")
    print(f"  {'CPU':44} {used:8.1%} of a core; {1e6 * used / given.rate:.2f} µs a row")
    print(f"  {'resident, and at the most':44} {resident:8.0f} MB; {peak:.0f} MB")
    maps(given.connections)


if __name__ == "__main__":
    main()
