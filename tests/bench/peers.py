"""The tracer beside what an operator could run instead: what each costs, what it tells, and what of it is true.

How: short connections through virtual IPs at the machine's full rate (rig.py); for each tool, pairs of windows without
and with it, in changing order, each window with one tool alone. What it printed is held against what the servers
accepted (said.py). One more window with kernel.bpf_stats_enabled prices its BPF programs.

    python -m tests.bench.peers [--pairs N] [--seconds S] [--tool NAME ...] [--json FILE]

bcc's tools want kernel headers: a tree of empty ones around BTF's types does (bpftool). Needs bpfcc-tools, bpftool,
conntrack, gcc: make bench installs them.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.bench import paired, said
from tests.bench.agent import Agent, cpu_seconds, status
from tests.bench.kernel_cost import empty_program, runs, stats
from tests.bench.rate import per_second, window
from tests.bench.rig import PORTS, Rig, Worker

_ROOT = Path(__file__).resolve().parents[2]
_SERVICES = frozenset(PORTS["tcp"])
#: What is on its way when the clients stop; how long a tool may go on printing after that.
_SETTLES_S, _BACKLOG_S = 1.5, 60
#: Headers that bcc's tools ask for: empty, as vmlinux.h has all types. Their macros are in the last.
_EMPTY = (
    "linux/types.h", "linux/log2.h", "linux/tcp.h", "net/sock.h", "asm/page.h",
    *(f"uapi/linux/{name}.h" for name in ("bpf", "if_packet", "if_ether", "ptrace", "in", "in6", "ip", "ipv6", "udp",
                                          "tcp", "icmp")),
)  # fmt: skip
_MACROS = """#define _UAPI__LINUX_BPF_H__
#define CONFIG_BPF_SYSCALL 1
#define PAGE_SIZE 4096
#pragma clang diagnostic ignored "-Weverything"
#include "../vmlinux.h"
#define IPPROTO_TCP 6
#define AF_INET 2
#define AF_INET6 10
#define ntohs __builtin_bswap16
#define ntohl __builtin_bswap32
"""


def header_tree(where: Path) -> Path:
    """What bcc's tools take for kernel headers; made once."""
    include = where / "include"
    if (include / "linux/version.h").exists():
        return where
    for name in _EMPTY:
        (include / name).parent.mkdir(parents=True, exist_ok=True)
        (include / name).touch()
    dumped = subprocess.run(
        ["bpftool", "btf", "dump", "file", "/sys/kernel/btf/vmlinux", "format", "c"], check=True, capture_output=True,
        text=True,
    ).stdout  # fmt: skip
    types = "\n".join(line for line in dumped.splitlines() if "clang attribute" not in line)
    (include / "vmlinux.h").write_text(types)
    (include / "linux/kconfig.h").write_text(_MACROS)
    (include / "linux/version.h").write_text(
        "#define LINUX_VERSION_CODE 398336\n#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
    )
    return where


@dataclass
class Told:
    """What a tool told, and what it took: seconds of CPU since it was ready, peak memory, bytes written."""

    rows: list[said.Row]
    user: float
    system: float
    resident: int
    bytes: int
    remarks: set[str] = field(default_factory=set)


class Ours:
    """The agent."""

    def __init__(self, rig: Rig) -> None:
        self._agent = Agent(rig)

    def __enter__(self) -> Self:
        self._agent.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._agent.__exit__(*exc)

    @property
    def pids(self) -> list[int]:
        """Its process."""
        return [self._agent.process.pid]

    def stop(self) -> Told:
        """Ends it."""
        self._agent.settle()
        user, system = self._agent.cpu()
        written = self._agent.stop()
        rows = [
            said.Row(one["src_ip"], one["src_port"], one["dst_port"], one["backend_ip"] or "", one["pid"] is not None)
            for table in written.tables
            for one in table.to_pylist()
            if one["role"] == "client" and one["closed"] and one["dst_port"] in _SERVICES
        ]
        remarks = {f"counts {count} {name}" for name, count in written.lost.items()}
        return Told(rows, user, system, self._agent.peak, written.bytes, remarks)


class Tools:
    """Commands that print what they see, run together; ready when the block begins."""

    def __init__(self, rig: Rig, commands: Sequence["Command"], read: Callable[..., Iterator[said.Row]]) -> None:
        self._rig, self._commands, self._read = rig, commands, read

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._outputs, self._processes = [], []
            for number, command in enumerate(self._commands):
                output, errors = (self._rig.directory / f"said-{number}.{kind}" for kind in ("out", "err"))
                with output.open("wb") as out, errors.open("wb") as err:
                    process = command.start(self._rig, out, err)
                stack.callback(process.wait)
                stack.callback(process.kill)
                self._outputs.append((output, errors))
                self._processes.append(process)
            for command, process, (_, errors) in zip(self._commands, self._processes, self._outputs, strict=True):
                _wait(lambda process=process, command=command: command.is_ready(process), process, command.name, errors)
            self._began = [cpu_seconds(pid) for pid in self.pids]
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [process.pid for process in self._processes]

    def stop(self) -> Told:
        """Ends them by SIGINT, which all of them take as the end, and reads what they printed."""
        self._finish()
        used = [cpu_seconds(pid) for pid in self.pids]
        resident = sum(status(pid, "VmHWM") for pid in self.pids)
        for process in self._processes:
            process.send_signal(signal.SIGINT)
        for process in self._processes:
            process.wait(60)
        before = time.process_time()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(output.open()) for output, _ in self._outputs]
            rows = list(self._read(*files, _SERVICES))
        joins = time.process_time() - before if len(files) > 1 else 0.0  # the script is a part of that tool
        user, system = (
            sum(now[part] - began[part] for now, began in zip(used, self._began, strict=True)) for part in (0, 1)
        )
        remarks = {
            line.strip()
            for _, errors in self._outputs
            for line in errors.read_text().splitlines()
            if "ossibly lost" in line or "ENOBUFS" in line
        }
        return Told(rows, user + joins, system, resident, self._size(), remarks)

    def _finish(self) -> None:
        """Until nothing more is printed: what a tool is behind with is cost, not loss."""
        end, size = time.monotonic() + _BACKLOG_S, -1
        while size != (size := self._size()) and time.monotonic() < end:
            time.sleep(_SETTLES_S)

    def _size(self) -> int:
        return sum(output.stat().st_size for output, _ in self._outputs)


def _wait(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", name: str, errors: Path) -> None:
    end = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{name} did not get ready (exit code {process.poll()}): {''.join(last)}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Command:
    """A tool's command line; `listens`: on conntrack's events, in the node's namespace; else it has perf buffers."""

    name: str
    arguments: tuple[str, ...]
    listens: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    def start(self, rig: Rig, out: Any, err: Any) -> "subprocess.Popen[bytes]":
        """Starts it."""
        given = {"stdout": out, "stderr": err, "env": os.environ | dict(self.environment), "cwd": _ROOT}
        return rig.node.popen(self.arguments, **given) if self.listens else subprocess.Popen(self.arguments, **given)

    def is_ready(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether it sees what happens from now on."""
        if self.listens:
            lines = Path(f"/proc/{process.pid}/net/netlink").read_text().splitlines()[1:]
            return any(line.split()[1] == "12" and int(line.split()[3], 16) for line in lines)
        found = 0
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += os.readlink(descriptor) == "anon_inode:[perf_event]"
        return found > (os.cpu_count() or 1)


Made = Callable[[Rig], Ours | Tools]


def tools() -> dict[str, Made]:
    """All of them, in the order of the table; those that cannot run here say why when they are started."""

    def bcc(rig: Rig, name: str, *options: str) -> Command:
        found = shutil.which(f"{name}-bpfcc") or shutil.which(name) or name
        source = (("BCC_KERNEL_SOURCE", str(header_tree(rig.directory / "headers"))),)
        return Command(name, ("/usr/bin/python3", found, *options), environment=source)

    stamped = Command("conntrack -E", ("conntrack", "-E", "-e", "NEW,DESTROY", "-o", "timestamp,id"), listens=True)
    reader = Command("reader", (sys.executable, "-m", "tests.bench.ctnetlink"), listens=True)
    return {
        "vip-tracer": Ours,
        "tcplife": lambda rig: Tools(rig, [bcc(rig, "tcplife", "-s")], said.tcplife),
        "tcpstates": lambda rig: Tools(rig, [bcc(rig, "tcpstates", "-s")], said.tcpstates),
        "conntrack -E": lambda rig: Tools(rig, [stamped], said.conntrack),
        "tcplife + conntrack -E": lambda rig: Tools(rig, [bcc(rig, "tcplife", "-t", "-s"), stamped], said.joined),
        "ctnetlink in Python": lambda rig: Tools(rig, [reader], said.conntrack),
    }


def programs(pids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """(nanoseconds, runs) of the BPF programs that these processes hold, by id."""
    found = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                fields = dict(line.split(":\t", 1) for line in descriptor.read_text().splitlines() if ":\t" in line)
                if "run_time_ns" in fields:
                    found[int(fields["prog_id"])] = (int(fields["run_time_ns"]), int(fields["run_cnt"]))
    return found


def accepted(rig: Rig) -> list[said.Accepted]:
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


def measure(rig: Rig, workers: Sequence[Worker], name: str, make: Made, pairs: int, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    results, sums = [], dict.fromkeys(said.Score.__dataclass_fields__, 0)
    user = system = 0.0
    resident = size = rows = 0
    remarks: set[str] = set()
    for turn in paired.order(pairs):
        rates = {}
        for with_tool in turn:
            rig.ledger()
            if not with_tool:
                rates[False] = per_second(window(workers, seconds))
                continue
            with make(rig) as tool:
                rates[True] = per_second(window(workers, seconds))
                told = tool.stop()
            for key, value in asdict(said.score(told.rows, accepted(rig))).items():
                sums[key] += value
            user, system = user + told.user, system + told.system
            resident, size, rows = max(resident, told.resident), size + told.bytes, rows + len(told.rows)
            remarks |= told.remarks
        results.append((rates[False], rates[True]))
    found, connections = paired.ratio(results), sums["connections"]
    return {
        "tool": name, "ratio": found.median, "low": found.low, "high": found.high, "pairs": found.pairs,
        "user_us": user / connections * 1e6, "system_us": system / connections * 1e6,
        "kernel_us": kernel_us(rig, workers, make, seconds), "resident": resident, "bytes_per_row": size / max(1, rows),
        **sums, "remarks": sorted(remarks),
    }  # fmt: skip


def kernel_us(rig: Rig, workers: Sequence[Worker], make: Made, seconds: float) -> float:
    """Microseconds of its BPF programs per connection, less what measuring costs; entries' ends come late and are in
    here only as far as earlier windows' make up for them."""
    with make(rig) as tool, stats():
        empty = empty_program()
        try:
            before, nothing = programs(tool.pids), runs(empty)
            work = window(workers, seconds)
            after, idle = programs(tool.pids), runs(empty)
        finally:
            os.close(empty)
        tool.stop()
    overhead = (idle[0] - nothing[0]) / max(1, idle[1] - nothing[1])
    spent = sum(
        now[0] - then[0] - (now[1] - then[1]) * overhead
        for number, now in after.items()
        if (then := before.get(number)) is not None
    )
    return spent / max(1, sum(done.operations for done in work)) / 1000


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, as docs/overhead.md has it."""
    out = [
        "| | connection rate (95 % interval) | CPU: user, system | BPF | memory | bytes a row | missing, too many "
        "| backend wrong, not told | process not told |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "cannot_run" in line:
            out.append(f"| {line['tool']} | cannot run here: {line['cannot_run']} |" + " |" * 7)
            continue
        of = line["connections"]
        told = max(1, of - line["missing"])
        out.append(
            f"| {line['tool']} | {line['ratio']:.3f} ({line['low']:.3f} to {line['high']:.3f}) "
            f"| {line['user_us']:.1f}, {line['system_us']:.1f} µs | {line['kernel_us']:.1f} µs "
            f"| {line['resident'] / 1e6:.0f} MB | {line['bytes_per_row']:.0f} "
            f"| {line['missing'] / of:.2%}, {line['extra']} | {line['wrong']}, {line['unresolved'] / told:.1%} "
            f"| {line['anonymous'] / told:.1%} |"
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--tool", action="append", help="one of them; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, too")
    given = parser.parse_args()
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs; short TCP connections, windows of {given.seconds:g} s")
    lines = []
    with Rig() as rig:
        workers = rig.workers("short", *rig.targets(), count=4)
        window(workers, 0.5)  # warms up
        for name, make in tools().items():
            if given.tool and name not in given.tool:
                continue
            try:
                lines.append(measure(rig, workers, name, make, given.pairs, given.seconds))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                lines.append({"tool": name, "cannot_run": str(error), "remarks": []})
    print(table(lines))
    for line in lines:
        for remark in line["remarks"]:
            print(f"{line['tool']}: {remark}")
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
