"""The real agent on a lab cluster, as its own process, and what it left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow.parquet as pq

from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until

#: How long an agent may take to start or stop on a machine that is very busy; a test's own timeout comes first.
PATIENCE_S = 300

TABLES = Path("connections"), Path("coverage")


def scaled(count: int) -> int:
    """So many connections, or $VIP_TRACER_SCALE times fewer: in a guest, which emulates each instruction."""
    return count // int(os.environ.get("VIP_TRACER_SCALE", "1"))


class Agent:
    """A running ``vip-tracer agent``; `stop` ends it and reads its dataset."""

    def __init__(self, output: Path, process: subprocess.Popen[bytes], node: str, talk: Path) -> None:
        self.output, self.process, self.node = output, process, node
        self._talk = talk

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        assert self.process.wait(PATIENCE_S) == 0, self.said

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._talk.read_text(errors="replace")

    def resident(self) -> int:
        """Resident memory in MB (10^6 bytes)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 // 1_000_000
        raise AssertionError("no VmRSS")


def started(arguments: Sequence[str], stderr: IO[bytes], prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """vip-tracer with these arguments, a process of its own."""
    command = [*prefix, sys.executable, "-m", "tracer", *arguments]
    return subprocess.Popen(command, stderr=stderr, cwd="/", env={**os.environ, "PYTHONPATH": _root()})


#: How an agent is started: where that is dear, tests/vm/forked.py puts another way in this one's place.
launch = started


@contextmanager
def agent(
    cluster: Cluster, output: Path, *options: str, node: str = "node-1", scope: bool = True, prefix: Sequence[str] = ()
) -> Iterator[Agent]:
    """Starts the agent of that node and waits until it is ready; kills it at the end if it still runs.

    With `scope` it traces the sockets of the node's own namespace and of its pods alone: other tests share the kernel.
    `prefix` is a command that executes the agent.
    """
    ready = output.parent / f"{output.name}.{node}.ready"
    ready.unlink(missing_ok=True)
    where = next(made for made in cluster.nodes if made.name == node)
    pods = [pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods) if pod.node is where]
    scoped = [part for path in (where.netns.path, *pods) for part in ("--only-netns", path)] if scope else []
    arguments = ["agent", "--output", str(output), "--node", node]
    arguments += ["--netns", where.netns.path, *scoped, "--ready-file", str(ready), *options]
    talk = output.parent / f"{output.name}.{node}.stderr"
    with talk.open("wb") as stderr:
        process = started(arguments, stderr, prefix) if prefix else launch(arguments, stderr)
    running = Agent(output, process, node, talk)
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, "the agent to be ready", PATIENCE_S)
        if process.poll() is not None:
            raise AssertionError(running.said)
        yield running
        if process.poll() is None:
            running.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _root() -> str:
    return str(Path(__file__).resolve().parent.parent)


def rows(output: Path) -> pd.DataFrame:
    """All published connection rows, as a user reads them; null words are None, whatever pandas makes of them."""
    frame = pd.read_parquet(output / "connections")
    for column in frame.columns:
        if isinstance(frame[column].dtype, pd.CategoricalDtype):
            frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def published(output: Path) -> set[Path]:
    """The published files of connections."""
    return set((output / "connections").rglob("[!.]*.parquet"))


def are_told(output: Path, ports: Iterable[int]) -> bool:
    """Whether there are published rows of all of these source ports."""
    return bool(published(output)) and set(ports) <= set(rows(output).src_port)


def coverage(output: Path) -> pd.DataFrame:
    """All coverage rows, in the order of time."""
    return pd.read_parquet(output / "coverage").sort_values("ts").reset_index(drop=True)


def losses(output: Path) -> int:
    """Everything that was counted as a lost connection or row."""
    table = coverage(output)
    names = [name for name in table.columns if name.startswith("lost_") and name != "lost_translation_map"]
    return int(table[names].fillna(0).sum().sum())


def file_metadata(output: Path) -> list[dict[str, Any]]:
    """The own metadata of each published connections file."""
    found = []
    for path in sorted((output / "connections").rglob("*.parquet")):
        raw = pq.read_metadata(path).metadata
        found.append({key.decode(): value.decode() for key, value in raw.items() if key != b"ARROW:schema"})
    return found


def losses_in_metadata(output: Path) -> int:
    return sum(sum(json.loads(meta["losses"]).values()) for meta in file_metadata(output))


def until(condition: Any, what: str, seconds: float = 30.0) -> None:
    """Waits for a condition with a bound, and says what it waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)
