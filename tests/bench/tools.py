"""The tools that are measured: the agent, what an operator could run instead of it, and none.

bcc's tools want kernel headers: a tree of empty ones around BTF's types does (bpftool).
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow.compute as pc

from tests.bench import said
from tests.bench.agent import Agent
from tests.bench.proc import cpu_seconds, memory
from tests.bench.rig import Rig

_ROOT = Path(__file__).resolve().parents[2]
#: How long a tool may take to get ready and to go on printing what it is behind with; between two looks at that.
_STARTS_S, _BACKLOG_S, _LOOK_S = 60, 60, 1.0
#: The peers' buffers for conntrack's events: what is usual (200 kB) overflows at once.
_BUFFER = 8 << 20
#: Exit codes of what ends by SIGINT, as its shell or itself tells.
_INTERRUPTED = (0, -signal.SIGINT, 128 + signal.SIGINT)
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
    """What a tool told, and what it took: seconds of CPU since it was ready, bytes written, its own word of losses."""

    rows: list[said.Row] = field(default_factory=list)
    user: float = 0.0
    system: float = 0.0
    bytes: int = 0
    lost: Counter[str] = field(default_factory=Counter)


class Tool(Protocol):
    """`with tool:` is ready when the block begins. Its methods raise RuntimeError if it has ended."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        ...

    def check(self) -> None:
        """Raises if one of them has ended."""
        ...

    def stop(self, ports: Collection[int]) -> Told:
        """Ends it when it has told what it knows; rows are of connections to these ports."""
        ...


class Nothing:
    """No tool, in the place of one: what the pairs show of themselves."""

    pids: list[int]

    def __init__(self, rig: Rig, options: Sequence[str] = ()) -> None:
        self.pids = []

    def __enter__(self) -> Self:
        time.sleep(1)  # about what a tool takes
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def check(self) -> None:
        """It never ends by itself."""

    def stop(self, ports: Collection[int]) -> Told:
        """It has told nothing."""
        return Told()


class Ours:
    """The agent."""

    def __init__(self, rig: Rig, options: Sequence[str] = ()) -> None:
        self._agent = Agent(rig, *options)

    def __enter__(self) -> Self:
        self._agent.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._agent.__exit__(*exc)

    @property
    def pids(self) -> list[int]:
        """Its process."""
        return [self._agent.process.pid]

    def check(self) -> None:
        """See Tool."""
        self._agent.check()

    def stop(self, ports: Collection[int]) -> Told:
        """See Tool. Every row of a connection that ended counts, whatever its role, but what only a server tells."""
        self._agent.settle()
        user, system = self._agent.cpu()
        written = self._agent.stop()
        rows = written.rows.filter(pc.field("closed") & (pc.field("role").cast("string") != "server"))
        columns = ("src_ip", "src_port", "dst_port", "backend_ip", "pid")
        told = [
            said.Row(src, src_port, dst_port, backend or "", pid or 0)
            for src, src_port, dst_port, backend, pid in zip(*(rows[name].to_pylist() for name in columns), strict=True)
            if dst_port in ports
        ]
        return Told(told, user, system, written.bytes, Counter(written.lost))


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


@dataclass
class _Running:
    command: Command
    process: "subprocess.Popen[bytes]"
    output: Path
    errors: Path
    began: tuple[float, float] = (0.0, 0.0)

    def check(self) -> None:
        if self.process.poll() is not None:
            last = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{self.command.name} ended (exit code {self.process.returncode}): {''.join(last)}")

    def wait_until_ready(self) -> None:
        end = time.monotonic() + _STARTS_S
        while True:
            self.check()
            if self.command.is_ready(self.process):
                break
            if time.monotonic() > end:
                raise RuntimeError(f"{self.command.name} is not ready after {_STARTS_S} s")
            time.sleep(0.02)
        self.began = cpu_seconds(self.process.pid)

    def used(self) -> tuple[float, float]:
        """User and system seconds since it was ready."""
        user, system = cpu_seconds(self.process.pid)
        return user - self.began[0], system - self.began[1]

    def interrupt(self) -> None:
        """Ends it by SIGINT, which all of them take as the end."""
        self.process.send_signal(signal.SIGINT)
        if self.process.wait(60) not in _INTERRUPTED:
            self.check()


class Tools:
    """Commands that print what they see, run together. `read` makes rows of their outputs: its work is the tool's."""

    def __init__(self, rig: Rig, commands: Sequence[Command], read: Callable[..., Iterator[said.Row]]) -> None:
        self._rig, self._commands, self._read = rig, commands, read
        self._running: list[_Running] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for number, command in enumerate(self._commands):
                output, errors = (self._rig.directory / f"said-{number}.{kind}" for kind in ("out", "err"))
                with output.open("wb") as out, errors.open("wb") as err:
                    process = command.start(self._rig, out, err)
                stack.callback(process.wait)
                stack.callback(process.kill)
                self._running.append(_Running(command, process, output, errors))
            for running in self._running:
                running.wait_until_ready()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [running.process.pid for running in self._running]

    def check(self) -> None:
        """See Tool."""
        for running in self._running:
            running.check()

    def stop(self, ports: Collection[int]) -> Told:
        """See Tool."""
        self._finish()
        told = Told()
        for running in self._running:
            user, system = running.used()
            told.user, told.system = told.user + user, told.system + system
        for running in self._running:
            running.interrupt()
            told.lost.update(losses(running.errors.read_text(errors="replace")))
        before = time.process_time()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(running.output.open(errors="replace")) for running in self._running]
            told.rows = list(self._read(*files, ports))
        if len(self._running) > 1:  # a script that joins is a part of that tool; a reader of rows is not
            told.user += time.process_time() - before
        told.bytes = self._size()
        return told

    def _finish(self) -> None:
        """Until nothing more is printed: what a tool is behind with is cost, not loss."""
        end, size = time.monotonic() + _BACKLOG_S, -1
        while size != (size := self._size()) and time.monotonic() < end:
            time.sleep(_LOOK_S)

    def _size(self) -> int:
        return sum(running.output.stat().st_size for running in self._running)


_SAMPLES = re.compile(r"ossibly lost (\d+) samples")


def losses(errors: str) -> Counter[str]:
    """What a tool says of its losses: how many samples, or how often events, of which nobody knows how many."""
    found = Counter[str]()
    for line in errors.splitlines():
        if samples := _SAMPLES.search(line):
            found["samples"] += int(samples[1])
        elif "ENOBUFS" in line:
            found["overflows (ENOBUFS)"] += 1
    return found


Make = Callable[[Rig, Sequence[str]], Tool]
NOTHING, OURS = "nothing", "vip-tracer"


def tools() -> dict[str, Make]:
    """All of them by name, in the order of the table; those that cannot run here say why when they are started."""

    def bcc(rig: Rig, name: str, *options: str) -> Command:
        found = shutil.which(f"{name}-bpfcc") or shutil.which(name) or name
        source = (("BCC_KERNEL_SOURCE", str(header_tree(rig.directory / "headers"))),)
        return Command(name, ("/usr/bin/python3", found, *options), environment=source)

    events = ("-e", "NEW,DESTROY", "-o", "timestamp,id", "-b", str(_BUFFER))
    stamped = Command("conntrack -E", ("conntrack", "-E", *events), listens=True)
    reader = Command("reader", (sys.executable, "-m", "tests.bench.ctnetlink", str(_BUFFER)), listens=True)
    return {
        NOTHING: Nothing,
        OURS: Ours,
        "tcplife": lambda rig, _: Tools(rig, [bcc(rig, "tcplife", "-s")], said.tcplife),
        "tcpstates": lambda rig, _: Tools(rig, [bcc(rig, "tcpstates", "-t", "-s")], said.tcpstates),
        "conntrack -E": lambda rig, _: Tools(rig, [stamped], said.conntrack),
        "tcplife + conntrack -E": lambda rig, _: Tools(rig, [bcc(rig, "tcplife", "-s"), stamped], said.joined),
        "ctnetlink in Python": lambda rig, _: Tools(rig, [reader], said.conntrack),
    }


def resident(tool: Tool, most: bool = False) -> int:
    """Bytes of memory that its processes hold now, or have held at the most, together."""
    try:
        return sum(memory(pid, "VmHWM" if most else "VmRSS") for pid in tool.pids)
    except RuntimeError:
        time.sleep(0.2)  # one is ending: how it did is known in a moment
        tool.check()
        raise
