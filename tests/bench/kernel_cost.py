"""What the programs cost in the kernel: nanoseconds per TCP connection, all programs together.

How: a cluster of namespaces, connections through a virtual IP as fast as two clients can, kernel.bpf_stats_enabled, and
the run counts and times of the programs before and after. The window is long enough for the same connections' DESTROY
events (conntrack's timeouts are short in the lab's namespaces). The kernel's own measuring is in those times: an empty
program attached to the same tracepoint tells how much, and that is subtracted from every run. Both ends are on this
machine, so the programs run for the server's side too, as on a node that holds both pods.

The programs' sizes are in the table because much of the time is fetching them into the cache (docs/decisions/023).

Run it as root: python -m tests.bench.kernel_cost [--connections N] [--rounds N] [--json FILE]. It sets the sysctl while
it runs and puts it back.
"""

import argparse
import ctypes
import json
import os
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_MEASURING = "(measuring itself, per run)"
# struct bpf_prog_info (uapi/linux/bpf.h): type, id, tag, bytes of machine code, bytes of instructions
_PROG_INFO = struct.Struct("=II8sII")


class Cost(NamedTuple):
    """Of one program in one round."""

    ns: float  # net, per connection
    runs: float  # per connection
    instructions: int  # as the verifier left them
    machine_bytes: int


@contextmanager
def stats() -> Iterator[None]:
    before = STATS.read_text()
    STATS.write_text("1\n")
    try:
        yield
    finally:
        STATS.write_text(before)


def runs(prog: int) -> tuple[int, int]:
    """(nanoseconds, runs) of a program since it was loaded, from its fdinfo."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{prog}").read_text().splitlines() if ":\t" in line
    )
    return int(fields["run_time_ns"]), int(fields["run_cnt"])


def size(prog: int) -> tuple[int, int]:
    """(instructions, bytes of machine code) of a loaded program."""
    info = ctypes.create_string_buffer(_PROG_INFO.size)
    length = ctypes.c_uint32(_PROG_INFO.size)
    error = libbpf.library().bpf_obj_get_info_by_fd(prog, info, ctypes.byref(length))
    if error:
        raise OSError(-error, os.strerror(-error))
    _, _, _, machine_bytes, instruction_bytes = _PROG_INFO.unpack(info.raw)
    return instruction_bytes // 8, machine_bytes


def empty_program() -> int:
    """An attached raw tracepoint program that does nothing: what the measuring itself costs. Returns its descriptor."""
    # mov r0, 0; exit
    instructions = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
    library = libbpf.library()
    prog = library.bpf_prog_load(17, b"vt_empty", b"GPL", instructions, ctypes.c_size_t(2), None)  # RAW_TRACEPOINT
    if prog < 0:
        raise OSError(-prog, os.strerror(-prog))
    link = library.bpf_raw_tracepoint_open(b"inet_sock_set_state", prog)
    if link < 0:
        raise OSError(-link, os.strerror(-link))
    return int(prog)


def measure(connections: int) -> dict[str, Cost]:
    """What each program costs, by its name."""
    timeouts = dict(Conntrack.SHORT)
    with Cluster(backends=6, clients=2, conntrack=Conntrack(timeouts=timeouts)) as cluster:
        pods = [pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods)]
        options = Options(node_netns=cluster.node.path, only_netns=(cluster.node.path, *pods))
        with Capture(options) as capture, stats():
            empty = empty_program()
            progs = capture.program_descriptors()
            before = {name: runs(fd) for name, fd in progs.items()}
            empty_before = runs(empty)
            for client in cluster.clients:
                client.begin_connects(connections // 2, cluster.vip(), 100, 100)
            for client in cluster.clients:
                client.finish_connects()
            deadline = time.monotonic() + 60
            while capture.counters()["conntrack_destroy"] < connections:
                assert time.monotonic() < deadline, capture.counters()
                time.sleep(0.5)
                cluster.node.run(["conntrack", "-L"])  # a listing removes what has expired
                capture.drain()
            empty_ns, empty_runs = (after - b for after, b in zip(runs(empty), empty_before, strict=True))
            overhead = empty_ns / empty_runs
            cost = {}
            for name, fd in progs.items():
                ns, count = (after - b for after, b in zip(runs(fd), before[name], strict=True))
                cost[name] = Cost((ns - count * overhead) / connections, count / connections, *size(fd))
            counters = capture.counters()
            assert counters["opened"] == connections, counters
            cost[_MEASURING] = Cost(overhead, 1, *size(empty))
            os.close(empty)
            return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every round's figures there, too")
    arguments = parser.parse_args()
    rounds = [measure(arguments.connections) for _ in range(arguments.rounds)]
    print(f"{arguments.connections} connections a round, median of {arguments.rounds}; Linux {os.uname().release}")
    for name, first in rounds[0].items():
        ns = statistics.median(cost[name].ns for cost in rounds)
        sizes = f"{first.instructions:6} instructions {first.machine_bytes:6} bytes"
        print(f"  {name:30} {ns:8.0f} ns  {first.runs:6.2f} runs  {sizes}")
    totals = [sum(cost.ns for name, cost in costs.items() if name != _MEASURING) for costs in rounds]
    lowest, highest = min(totals), max(totals)
    print(f"  {'all programs, per connection':30} {statistics.median(totals):8.0f} ns  {lowest:.0f} to {highest:.0f}")
    if arguments.json:
        found = [{name: cost._asdict() for name, cost in costs.items()} for costs in rounds]
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
