"""What the programs cost in the kernel: nanoseconds per TCP connection, all programs together.

How: a cluster of namespaces, connections through a virtual IP as fast as two clients can, kernel.bpf_stats_enabled, and
the run counts and times of the programs before and after. The window is long enough for the same connections' DESTROY
events (conntrack's timeouts are short in the lab's namespaces). The kernel's own measuring is in those times: an empty
program attached to the same tracepoint tells how much, and that is subtracted from every run. Both ends are on this
machine, so the programs run for the server's side too, as on a node that holds both pods.

Run it as root: python -m tests.bench.kernel_cost [--connections N] [--rounds N]. It sets the sysctl while it runs and
puts it back.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


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


def measure(connections: int) -> dict[str, tuple[float, float]]:
    """Program → (nanoseconds net, runs), per connection."""
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
                cost[name] = ((ns - count * overhead) / connections, count / connections)
            counters = capture.counters()
            assert counters["opened"] == connections, counters
            cost["(measuring itself, per run)"] = (overhead, 1)
            os.close(empty)
            return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = [measure(arguments.connections) for _ in range(arguments.rounds)]
    print(f"{arguments.connections} connections a round, median of {arguments.rounds}; Linux {os.uname().release}")
    total = 0.0
    for name in rounds[0]:
        ns = statistics.median(cost[name][0] for cost in rounds)
        print(f"  {name:30} {ns:8.0f} ns  {rounds[0][name][1]:6.2f} runs")
        if not name.startswith("("):
            total += ns
    print(f"  {'all programs, per connection':30} {total:8.0f} ns")


if __name__ == "__main__":
    main()
