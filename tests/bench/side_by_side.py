"""What the tracer costs, and what its peers do: every workload and every tool in one run, on one machine.

How: clients and servers in C keep the machine busy through virtual addresses (rig.py, traffic.c). For each workload and
each tool pairs of windows are measured, one without and one with that tool alone, in changing order and with the same
rest before each; the tools take turns, so that what drifts is on no side. One "tool" is nothing at all: what the pairs
show of themselves. What a tool tells of short connections is held against what the servers accepted (said.py). Then one
long run with the agent, and what its programs cost (kernel_cost.py).

    python -m tests.bench.side_by_side [--pairs N] [--seconds S] [--workload NAME ...] [--tool NAME ...]
                                       [--sustained SECONDS] [--rounds N] [--json FILE] [--page FILE]

Needs bpfcc-tools, bpftool, conntrack, gcc: make bench installs them. A tool that cannot run, or ends half way, has a
line that says so. FILE has the figures so far at any time. `--page` writes them between the marks of a page; with
`--from FILE` those of an earlier run, and nothing is measured.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench import kernel_cost, page, paired, said
from tests.bench.agent import Agent
from tests.bench.proc import memory
from tests.bench.rig import Rig
from tests.bench.tools import NOTHING, OURS, Make, Tool, resident, tools
from tests.bench.workloads import Done, Load, Workload, workloads
from tracer.errors import TracerError

#: Before each window, so that none begins in what another left.
_REST_S = 1.0
#: How often a tool's programs are priced; how many times as many pairs of short connections the agent has.
_PRICED = 3
_MORE_FOR_OURS = 3
#: What ends a measurement, and no other one.
_FAILURES = (OSError, RuntimeError, TracerError, subprocess.SubprocessError)


class Findings:
    """The figures so far; written to a file whenever there are more."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.all: dict[str, Any] = {
            "linux": os.uname().release, "cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
            "processor": _processor(), "additions_s": _additions(), "workloads": {},
            "errors": [],
        }  # fmt: skip

    def keep(self, **more: Any) -> None:
        """Adds figures, and writes all."""
        self.all |= more
        if self._path:
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self.all, indent=1) + "\n")
            part.replace(self._path)

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Keeps what `measure` finds, or why it did not."""
        try:
            self.keep(**{name: measure()})
        except _FAILURES as error:
            self.keep(errors=[*self.all["errors"], f"{name}: {error}"])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _additions() -> float:
    """Seconds for ten million additions in Python: how quick a machine this is, in a figure that anyone can compare."""
    began, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return time.perf_counter() - began


def ratio(without: dict[str, Done], with_tool: dict[str, Done]) -> float:
    """How much of what the clients did without they did with it; of several kinds the geometric mean."""
    return math.prod(with_tool[what].per_second / done.per_second for what, done in without.items()) ** (
        1 / len(without)
    )


def rest(seconds: float = _REST_S) -> None:
    """The same before each window."""
    time.sleep(seconds)


class Line:
    """One tool on one workload: what was measured so far."""

    def __init__(self, rig: Rig, load: Load, workload: Workload, make: Make) -> None:
        self._rig, self._load, self._workload, self._make = rig, load, workload, make
        self.error = ""
        self._pairs: list[tuple[float, float]] = []  # without, with: all clients' operations a second, of one kind
        self._ratios: list[float] = []
        self._sums = Counter[str]()
        self._spent = Counter[str]()
        self._lost = Counter[str]()
        self._resident: list[int] = []
        self._most = self._maps = 0
        self._kernel: list[float] = []

    def pair(self, turn: Sequence[bool], seconds: float) -> None:
        """One pair more; after an error nothing."""
        if self.error:
            return
        try:
            done = {with_tool: self._with(seconds) if with_tool else self._without(seconds) for with_tool in turn}
        except _FAILURES as error:
            self.error = str(error)
            return
        self._ratios.append(ratio(done[False], done[True]))
        self._pairs.append((_total(done[False]), _total(done[True])))
        self._sums["failures"] += sum(part.failures for both in done.values() for part in both.values())
        self._sums["operations"] += sum(part.operations for part in done[True].values())

    def _without(self, seconds: float) -> dict[str, Done]:
        rest()
        return self._load.window(seconds)

    def _with(self, seconds: float) -> dict[str, Done]:
        ports = self._workload.ports
        if ports:
            self._rig.ledger()  # forgets what was before
        with self._make(self._rig, self._workload.options) as tool:
            rest()
            done = self._load.window(seconds)
            tool.check()
            self._resident.append(resident(tool))
            if ports:
                self._rig.expire()
            self._most = max(self._most, resident(tool, most=True))
            self._maps = max(self._maps, map_bytes(tool))
            told = tool.stop(ports)
        self._spent["user"] += round(told.user * 1e9)
        self._spent["system"] += round(told.system * 1e9)
        self._lost += told.lost
        if ports:
            self._judge(told.rows, sum(part.operations for part in done.values()))
            self._sums["bytes"] += told.bytes
            self._sums["rows"] += len(told.rows)
        return done

    def _judge(self, rows: Sequence[said.Row], operations: int) -> None:
        accepted = accepted_by(self._rig)
        clients = self._load.processes
        scored = said.score(rows, accepted, clients) if accepted else said.counted(rows, operations, clients)
        self._sums.update({name: count for name, count in asdict(scored).items() if count is not None})

    def price(self, seconds: float) -> None:
        """What its BPF programs take of a connection, one window more; its end is waited for."""
        if self.error:
            return
        try:
            self._kernel.append(kernel_ns(self._rig, self._load, self._make, self._workload, seconds))
        except _FAILURES as error:
            self.error = str(error)

    def figures(self) -> dict[str, Any]:
        """What is known, for a file."""
        found: dict[str, Any] = {"error": self.error, "ratios": self._ratios, "pairs": self._pairs}
        if not self._ratios:
            return found
        measured = paired.ratio([(1.0, each) for each in self._ratios])
        found |= {"ratio": measured.median, "low": measured.low, "high": measured.high}
        found |= {"without": statistics.median(before for before, _ in self._pairs), **self._sums}
        found |= {"lost": dict(self._lost), "resident": statistics.median(self._resident), "most": self._most}
        found |= {"maps": self._maps} | {f"{name}_ns": spent for name, spent in self._spent.items()}
        if self._kernel:
            found["kernel_ns"] = self._kernel
        return found


def _total(done: dict[str, Done]) -> float:
    return sum(part.per_second for part in done.values())


def _fdinfo(tool: Tool) -> list[dict[str, str]]:
    """What the kernel says of its processes' descriptors."""
    found = []
    for pid in tool.pids:
        for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):
                lines = descriptor.read_text().splitlines()
                found.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
    return found


def map_bytes(tool: Tool) -> int:
    """What the maps of its BPF programs take of the kernel's memory."""
    return sum({fields["map_id"]: int(fields["memlock"]) for fields in _fdinfo(tool) if "map_id" in fields}.values())


def programs(tool: Tool) -> dict[str, tuple[int, int]]:
    """(nanoseconds, runs) of its BPF programs, by id."""
    return {
        fields["prog_id"]: (int(fields["run_time_ns"]), int(fields["run_cnt"]))
        for fields in _fdinfo(tool)
        if "run_time_ns" in fields
    }


def kernel_ns(rig: Rig, load: Load, make: Make, workload: Workload, seconds: float) -> float:
    """Nanoseconds of its BPF programs per connection, from its beginning until conntrack has forgotten it, less what
    measuring costs."""
    with make(rig, workload.options) as tool, kernel_cost.stats(), kernel_cost.empty_program() as empty:
        rest()
        before, nothing = programs(tool), kernel_cost.runs(empty)
        done = load.window(seconds)
        rig.expire()
        after, idle = programs(tool), kernel_cost.runs(empty)
        tool.stop(())
    overhead = (idle[0] - nothing[0]) / max(1, idle[1] - nothing[1])
    spent = sum(
        now[0] - then[0] - (now[1] - then[1]) * overhead
        for number, now in after.items()
        if (then := before.get(number)) is not None
    )
    return spent / max(1, sum(part.operations for part in done.values()))


def accepted_by(rig: Rig) -> list[said.Accepted]:
    """What the servers accepted since they were asked last."""
    ledger = rig.ledger()
    ledger = ledger[(ledger["protocol"] == 6) & (ledger["dialled"] > 0)]
    addresses = {number: _dotted(int(number)) for number in {*ledger["peer"].tolist(), *ledger["local"].tolist()}}
    return [
        said.Accepted(addresses[peer], port, dialled, addresses[local])
        for peer, local, port, dialled, _ in ledger.tolist()
    ]


def _dotted(number: int) -> str:
    return ".".join(map(str, number.to_bytes(4, "big")))


def compare(rig: Rig, workload: Workload, made: dict[str, Make], pairs: int, seconds: float,
            findings: Findings) -> None:  # fmt: skip
    """One line of the table, a column for each tool. The agent is measured more often where connections are made: how
    much less of those it leaves is what is asked first."""
    seconds = max(seconds, workload.seconds)
    with Load(rig, workload) as load:
        load.window(0.5)  # warms up
        lines = {name: Line(rig, load, workload, make) for name, make in made.items()}
        more = _MORE_FOR_OURS if workload.name == "short" else 1

        def keep() -> None:
            figures = {name: line.figures() for name, line in lines.items()}
            findings.all["workloads"][workload.name] = {"unit": workload.unit, "seconds": seconds, "tools": figures}
            findings.keep()

        for number, turn in enumerate(paired.order(more * pairs)):
            for name, line in lines.items():
                if number % more == 0 or name in (OURS, NOTHING):
                    line.pair(turn, seconds)
            keep()
        if workload.name == "short":
            for _ in range(_PRICED):
                for line in lines.values():
                    line.price(seconds)
            keep()


def sustained(rig: Rig, workload: Workload, seconds: float) -> dict[str, Any]:
    """Short connections for so long with one agent: rows, losses, CPU a connection, memory, bytes a row.

    It publishes as it does by default; its end is in what it spends.
    """
    with Load(rig, workload) as load, Agent(rig, "--rotate", "5m") as agent:
        load.begin(seconds)
        until, seen = time.monotonic() + seconds, []
        while time.monotonic() < until:
            seen.append(memory(agent.process.pid, "VmRSS"))
            time.sleep(0.05)
        done = load.finish()
        peak = memory(agent.process.pid, "VmHWM")
        written = agent.stop()
        user, system = agent.cpu()
    operations = sum(part.operations for part in done.values())
    closed = sum(
        closed and port in workload.ports and role == "client"
        for role, port, closed in zip(*(written.rows[name].to_pylist() for name in ("role", "dst_port", "closed")),
                                      strict=True)
    )  # fmt: skip
    return {
        "seconds": seconds,
        "connections": operations,
        "per_second": _total(done),
        "rows": closed,
        "lost": written.lost,
        "user_us": user / operations * 1e6,
        "system_us": system / operations * 1e6,
        "resident_ready": agent.idle,
        "resident": statistics.median(seen),
        "peak": peak,
        "bytes_per_row": written.bytes / max(1, len(written.rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="of each tool; of the agent on short connections thrice")
    parser.add_argument("--seconds", type=float, default=1.5, help="a window")
    parser.add_argument("--workload", action="append", help="one of them; may be repeated")
    parser.add_argument("--tool", action="append", choices=list(tools()), help="one of them; may be repeated")
    parser.add_argument("--sustained", type=float, default=60.0, help="how long the one long run takes; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="how often the programs are priced by state; 0: not")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, written there as they come")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page into which the tables go")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="earlier", help="an earlier run's figures")
    given = parser.parse_args()
    findings = Findings(given.json)
    if given.earlier:
        findings.all = json.loads(given.earlier.read_text())
    else:
        with Rig() as rig:
            known = workloads(rig)
            if unknown := set(given.workload or ()) - set(known):
                parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
            made = {name: make for name, make in tools().items() if not given.tool or name in given.tool}
            for name, workload in known.items():
                if not given.workload or name in given.workload:
                    compare(rig, workload, made, given.pairs, given.seconds, findings)
            if given.sustained:
                findings.attempt("sustained", lambda: sustained(rig, known["short"], given.sustained))
        if given.rounds:
            findings.attempt("kernel", lambda: kernel_cost.by_state(given.rounds))
    print(page.render(findings.all))
    if given.page:
        page.write(findings.all, given.page)


if __name__ == "__main__":
    main()
