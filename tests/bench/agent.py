"""The real agent as a benchmark runs it: a process of its own on a rig's node, and what it cost and wrote."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bench.proc import cpu_seconds, memory
from tests.bench.rig import Rig
from tracer import schema

_ROTATE_S, _STARTS_S = 2.0, 60
_COLUMNS = ["role", "closed", "src_ip", "src_port", "dst_port", "backend_ip", "pid"]


@dataclass(frozen=True)
class Written:
    """What the agent left: the rows of its connections, of some columns; bytes of all its files; what it says it lost,
    by stage."""

    rows: pa.Table
    bytes: int
    lost: dict[str, int]


class Agent:
    """`with Agent(rig) as agent:` is ready when the block begins. It traces as by default: all namespaces."""

    def __init__(self, rig: Rig, *options: str) -> None:
        """`options` are the agent's, beside those that every benchmark gives. Raises RuntimeError if it does not
        start."""
        self._directory = tempfile.TemporaryDirectory(dir=rig.directory)
        here = Path(self._directory.name)
        self._data, self._errors, ready = here / "data", here / "errors", here / "ready"
        command = [sys.executable, "-m", "tracer", "agent", "--output", str(self._data), "--node", "node-1"]
        command += ["--netns", rig.node.path, "--ready-file", str(ready), "--rotate", f"{_ROTATE_S:g}s"]
        cache = rig.directory / "programs"
        cache.mkdir(mode=0o700, exist_ok=True)
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *options], stderr=errors, env=os.environ | {"VIP_TRACER_CACHE": str(cache)}
            )
        end = time.monotonic() + _STARTS_S
        while not ready.exists():
            self.check()
            if time.monotonic() > end:
                raise RuntimeError(f"the agent is not ready after {_STARTS_S} s: {self._last_words()}")
            time.sleep(0.005)
        self.idle = memory(self.process.pid, "VmRSS")
        self._began = cpu_seconds(self.process.pid)
        self._ended: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._directory.cleanup()

    def _last_words(self) -> str:
        return "".join(self._errors.read_text(errors="replace").strip().splitlines()[-1:])

    def check(self) -> None:
        """Raises RuntimeError if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the agent ended (exit code {self.process.returncode}): {self._last_words()}")

    def cpu(self) -> tuple[float, float]:
        """User and system seconds since it was ready, until now or its end."""
        user, system = self._ended or cpu_seconds(self.process.pid)
        return user - self._began[0], system - self._began[1]

    def settle(self) -> None:
        """Waits until what was drained so far is published."""
        time.sleep(_ROTATE_S + 0.5)

    def stop(self) -> Written:
        """Ends it in good order, and reads what it wrote."""
        self.process.send_signal(signal.SIGTERM)
        _, code, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(code)
        if self.process.returncode:
            self.check()
        self._ended = used.ru_utime, used.ru_stime
        tables = [schema.arrow().empty_table().select(_COLUMNS)]
        tables += [pq.ParquetFile(path).read(columns=_COLUMNS) for path in self._data.glob("connections/**/*.parquet")]
        rows = pa.concat_tables(tables)
        lost = Counter[str]()
        for path in self._data.glob("coverage/**/*.parquet"):
            coverage = pq.ParquetFile(path).read()
            for name in coverage.column_names:
                if name.startswith("lost_"):
                    lost[name] += sum(filter(None, coverage[name].to_pylist()))
        size = sum(path.stat().st_size for path in self._data.rglob("*.parquet"))
        return Written(rows, size, {name: count for name, count in lost.items() if count})
