"""The real agent as a benchmark runs it: a process of its own on a rig's node, and what it cost and wrote."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq

from tests.bench.rig import Rig

_ROTATE_S = 2.0


def status(pid: int, field: str) -> int:
    """A memory field of /proc/PID/status in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    tick = os.sysconf("SC_CLK_TCK")
    user, system, user_below, system_below = (int(fields[place]) / tick for place in (11, 12, 13, 14))
    return user + user_below, system + system_below


@dataclass(frozen=True)
class Written:
    """What the agent left: rows of connections that ended, by role; bytes of its files; what it says that it lost."""

    rows: dict[str, int]
    bytes: int
    files: int
    lost: dict[str, int]
    tables: list[Any]

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(self.rows.values())


class Agent:
    """`with Agent(rig) as agent:` is ready when the block begins."""

    def __init__(self, rig: Rig, *options: str) -> None:
        """`options` are the agent's, beside those that every benchmark gives."""
        self._directory = tempfile.TemporaryDirectory(dir=rig.directory)
        self._data = Path(self._directory.name, "data")
        ready = Path(self._directory.name, "ready")
        command = [sys.executable, "-m", "tracer", "agent", "--output", str(self._data), "--node", "node-1"]
        command += ["--netns", rig.node.path, "--ready-file", str(ready), "--rotate", f"{_ROTATE_S:g}s"]
        command += [part for path in rig.namespaces for part in ("--only-netns", path)]
        cache = rig.directory / "programs"
        cache.mkdir(mode=0o700, exist_ok=True)
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.DEVNULL, env=os.environ | {"VIP_TRACER_CACHE": str(cache)}
        )
        while not ready.exists():
            assert self.process.poll() is None, "the agent did not start"
            time.sleep(0.005)
        self.idle = status(self.process.pid, "VmRSS")
        self._began = cpu_seconds(self.process.pid)
        self._ended: tuple[float, float] | None = None
        self.resident = self.peak = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._directory.cleanup()

    def look(self) -> int:
        """Its resident memory now; `resident` becomes the most that was seen."""
        now = status(self.process.pid, "VmRSS")
        self.resident = max(self.resident, now)
        return now

    def cpu(self) -> tuple[float, float]:
        """User and system seconds since it was ready, until now or its end."""
        user, system = self._ended or cpu_seconds(self.process.pid)
        return user - self._began[0], system - self._began[1]

    def settle(self) -> None:
        """Waits until what was drained so far is published."""
        time.sleep(_ROTATE_S + 0.5)

    def stop(self) -> Written:
        """Ends it in good order, and reads what it wrote."""
        self.peak = status(self.process.pid, "VmHWM")
        self.process.send_signal(signal.SIGTERM)
        _, code, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(code)
        assert self.process.returncode == 0, "the agent did not end well"
        self._ended = used.ru_utime, used.ru_stime
        files = sorted(Path(self._data, "connections").rglob("*.parquet"))
        names = ("role", "protocol", "closed", "src_ip", "src_port", "dst_port", "backend_ip", "nat", "pid")
        tables = [pq.read_table(path, columns=list(names)) for path in files]
        rows: dict[str, int] = {}
        for table in tables:
            for role, closed in zip(table["role"].to_pylist(), table["closed"].to_pylist(), strict=True):
                rows[role] = rows.get(role, 0) + bool(closed)
        lost: dict[str, int] = {}
        for path in sorted(Path(self._data, "coverage").rglob("*.parquet")):
            coverage = pq.read_table(path)
            for name in coverage.column_names:
                if name.startswith("lost_"):
                    lost[name] = lost.get(name, 0) + sum(filter(None, coverage[name].to_pylist()))
        size = sum(path.stat().st_size for path in files)
        return Written(rows, size, len(files), {name: count for name, count in lost.items() if count}, tables)
