"""What the programs cost in the kernel: nanoseconds per TCP connection, all programs together.

How: a cluster of namespaces, connections through a virtual IP as fast as two clients can, kernel.bpf_stats_enabled, and
the run counts and times of the programs before and after. The window is long enough for the same connections' DESTROY
events (conntrack's timeouts are short in the lab's namespaces). The kernel's own measuring is in those times: an empty
program attached to the same tracepoint tells how much, and that is subtracted from every run. Both ends are on this
machine, so the programs run for the server's side too, as on a node that holds both pods.

The programs' sizes are in the table because much of the time is fetching them into the cache (docs/decisions/023).

With --states the time is told by state change and by kind of event: the same instructions are loaded once for each,
behind some that return at once from what is another's, and attached in the place of the whole.

With --held N so many other connections are open meanwhile, from before the tracer came: they have no places among the
young, and what has none there may be in the connections map (docs/decisions/028).

Run it as root: python -m tests.bench.kernel_cost [--connections N] [--held N] [--rounds N] [--states] [--json FILE]. It
sets the sysctl while it runs and puts it back.
"""

import argparse
import ctypes
import json
import os
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tracer.kernel import compiler, libbpf, netns, symbols
from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_MEASURING = "(measuring itself, per run)"
# struct bpf_prog_info (uapi/linux/bpf.h): type, id, tag, bytes of machine code, bytes of instructions
_PROG_INFO = struct.Struct("=II8sII")


#: include/net/tcp_states.h
_ESTABLISHED, _SYN_SENT, _CLOSE, _LAST_ACK = 1, 2, 7, 9
# include/uapi/linux/netlink.h, asm-generic/socket.h; the groups as bits of the address
_NETLINK_NETFILTER, _SO_ATTACH_BPF = 12, 50
_GROUPS = {"conntrack_events: NEW": 1 << 0, "conntrack_events: DESTROY": 1 << 2}
# include/uapi/linux/bpf_common.h, bpf.h: r2 = *(u64 *)(r1 + off); if (w2 ==, != imm) goto; goto; r0 = imm; exit
_LOAD, _EQUAL, _UNEQUAL, _GOTO, _RETURN, _EXIT = 0x79, 0x16, 0x56, 0x05, 0xB7, 0x95


class Change(NamedTuple):
    """State changes of TCP sockets: to `after`, from `before` (0: from any) or from any but `not_before`."""

    name: str
    after: int
    before: int = 0
    not_before: int = 0

    def only(self, instructions: bytes) -> bytes:
        """The program of a tp_btf on (sk, before, after) that returns at once from all other changes."""
        asked = [(_UNEQUAL, 16, self.after)]
        if self.before or self.not_before:
            asked.append((_UNEQUAL, 8, self.before) if self.before else (_EQUAL, 8, self.not_before))
        code = []
        for place, (jump, offset, state) in enumerate(asked):
            to_the_end = 2 * (len(asked) - place - 1) + 1
            code += [(_LOAD, 2 | 1 << 4, offset, 0), (jump, 2, to_the_end, state)]
        code += [(_GOTO, 0, 2, 0), (_RETURN, 0, 0, 0), (_EXIT, 0, 0, 0)]
        return b"".join(struct.pack("<BBhi", *each) for each in code) + instructions


CHANGES = (
    Change("socket_state: to SYN_SENT", _SYN_SENT),
    Change("socket_state: SYN_SENT to ESTABLISHED", _ESTABLISHED, before=_SYN_SENT),
    Change("socket_state: to CLOSE, client's", _CLOSE, not_before=_LAST_ACK),
    Change("socket_state: LAST_ACK to CLOSE, server's", _CLOSE, before=_LAST_ACK),
)


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


@contextmanager
def empty_program() -> Iterator[int]:
    """An attached raw tracepoint program that does nothing: what the measuring itself costs. Yields its descriptor."""
    # mov r0, 0; exit
    instructions = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
    library = libbpf.library()
    prog = library.bpf_prog_load(17, b"vt_empty", b"GPL", instructions, ctypes.c_size_t(2), None)  # RAW_TRACEPOINT
    if prog < 0:
        raise OSError(-prog, os.strerror(-prog))
    try:
        link = library.bpf_raw_tracepoint_open(b"inet_sock_set_state", prog)
        if link < 0:
            raise OSError(-link, os.strerror(-link))
        try:
            yield int(prog)
        finally:
            os.close(link)
    finally:
        os.close(prog)


@contextmanager
def drained(capture: Capture) -> Iterator[None]:
    """Empties the ring meanwhile, as the agent does: what finds it full is cheaper than what does not."""
    over = threading.Event()

    def drain() -> None:
        while not over.wait(0.05):
            capture.drain()

    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(drain)
        try:
            yield
        finally:
            over.set()
        draining.result()


@contextmanager
def holding(cluster: Cluster, count: int) -> Iterator[None]:
    """So many connections are open meanwhile."""
    numbers = cluster.clients[0].hold(count, cluster.vip())["number"]
    yield
    cluster.clients[0].release(numbers)


def apart(capture: Capture) -> tuple[dict[str, int], list[int]]:
    """Puts programs in the place of the capture's that only look at one thing each: (by name, all descriptors)."""
    job = capture._job()
    assert job.cache
    compiled = compiler.programs(job.switches, Path(job.cache))
    code = {name: symbols.resolve(text, job.maps, job.values) for name, text in compiled.items()}
    progs = {change.name: libbpf.load_tracepoint("socket_state", change.only(code["socket_state"]),
                                                 "inet_sock_set_state") for change in CHANGES}  # fmt: skip
    others = [libbpf.attach_tracepoint(prog) for prog in progs.values()]
    for name, group in _GROUPS.items():
        heard = "conntrack_events"
        progs[name] = libbpf.load_program(libbpf.PROG_TYPE_SOCKET_FILTER, heard, code[heard])
        with netns.entered(job.node_netns):
            listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, progs[name])
        listener.bind((0, group))
        others.append(listener.detach())
    for name in ("socket_state", "conntrack_socket"):
        os.close(capture._descriptors.pop(name))
    capture._netlink.close()
    whole = capture.program_descriptors()
    return progs | {name: fd for name, fd in whole.items() if name not in ("socket_state", "conntrack_events")}, others


def measure(connections: int, states: bool, held: int = 0) -> dict[str, Cost]:
    """What each program costs, by its name."""
    with tempfile.TemporaryDirectory() as cache:
        return _measure(connections, states, held, cache)


def _measure(connections: int, states: bool, held: int, cache: str) -> dict[str, Cost]:
    # All namespaces, as by default: a list of some is looked at for each connection.
    with (
        Cluster(backends=6, clients=2, conntrack=Conntrack(timeouts=Conntrack.SHORT)) as cluster,
        holding(cluster, held),
        Capture(Options(node_netns=cluster.node.path, cache=cache)) as capture,
        stats(),
        drained(capture),
        empty_program() as empty,
    ):
        progs, others = apart(capture) if states else (capture.program_descriptors(), [])
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
        empty_ns, empty_runs = (after - b for after, b in zip(runs(empty), empty_before, strict=True))
        overhead = empty_ns / empty_runs
        cost = {}
        for name, fd in progs.items():
            ns, count = (after - b for after, b in zip(runs(fd), before[name], strict=True))
            cost[name] = Cost((ns - count * overhead) / connections, count / connections, *size(fd))
        counters = capture.counters()
        if not connections <= counters["opened"] <= 1.01 * connections:
            raise RuntimeError(f"other programs connected meanwhile: {counters['opened']} for {connections}; try again")
        if counters["lost_ring"]:
            raise RuntimeError(f"the ring was full {counters['lost_ring']} times, which is cheaper: try again")
        cost[_MEASURING] = Cost(overhead, 1, *size(empty))
        for descriptor in others:
            os.close(descriptor)
        return cost


def by_state(rounds: int, connections: int = 20_000) -> dict[str, Any]:
    """Medians of so many rounds, by program and by what it runs on: ns and runs a connection; all rounds' totals."""
    found = [measure(connections, states=True) for _ in range(rounds)]
    totals = [sum(cost.ns for name, cost in costs.items() if name != _MEASURING) for costs in found]
    programs = {
        name: {"ns": statistics.median(costs[name].ns for costs in found), "runs": first.runs}
        for name, first in found[0].items()
        if name != _MEASURING and first.runs
    }
    return {"programs": programs, "totals": totals, "total": statistics.median(totals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--held", type=int, default=0, help="connections that are open meanwhile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--states", action="store_true", help="tells state changes and events apart")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every round's figures there, too")
    arguments = parser.parse_args()
    rounds = [measure(arguments.connections, arguments.states, arguments.held) for _ in range(arguments.rounds)]
    held = f" beside {arguments.held} held" if arguments.held else ""
    print(
        f"{arguments.connections} connections a round{held}, median of {arguments.rounds}; Linux {os.uname().release}"
    )
    for name, first in rounds[0].items():
        ns = statistics.median(cost[name].ns for cost in rounds)
        sizes = f"{first.instructions:6} instructions {first.machine_bytes:6} bytes"
        print(f"  {name:42} {ns:8.0f} ns  {first.runs:6.2f} runs  {sizes}")
    totals = [sum(cost.ns for name, cost in costs.items() if name != _MEASURING) for costs in rounds]
    lowest, highest = min(totals), max(totals)
    print(f"  {'all programs, per connection':42} {statistics.median(totals):8.0f} ns  {lowest:.0f} to {highest:.0f}")
    if arguments.json:
        found = [{name: cost._asdict() for name, cost in costs.items()} for costs in rounds]
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
