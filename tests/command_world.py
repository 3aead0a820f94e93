"""The command as a process, and datasets to show."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracer import schema
from tracer.clock import WallClock
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.record import RECORD, Flag, Nat, NatSource
from tracer.store import layout
from tracer.store.columns import table

ROOT = Path(__file__).resolve().parents[1]
#: 2026-07-31T11:59:00Z
EPOCH = 1_785_499_140 * 10**9
#: Escape sequences, a C1 control, line breaks, a bidi override, quotes, and what csv and shells treat specially.
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J\r\n\u2028\u202eevil\u200b \"quoted\", 'x' \\ \x00\x7f é"


def environment(**more: str) -> dict[str, str]:
    """Ours without the options of our own command; but with the programs that conftest.py has compiled once."""
    kept = "VIP_TRACER_CACHE"
    own = {name: value for name, value in os.environ.items() if not name.startswith("VIP_TRACER_") or name == kept}
    return own | {"PYTHONPATH": str(ROOT)} | more


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tracer", *map(str, arguments)]


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, by way of `prefix` where that is given. stdout and stderr as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | options
    return subprocess.run(
        [*prefix, *command(*arguments)], env=environment(**(env or {})), check=False, timeout=60, **options
    )


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What a refused command said: on stderr alone, and no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr


def namespaces(cluster: Cluster) -> list[str]:
    """The options that make a command trace this cluster only."""
    pods = [cluster.node, *(pod.netns for pod in cluster.client_pods + cluster.backend_pods)]
    return ["--netns", cluster.node.path, *(part for pod in pods for part in ("--only-netns", pod.path))]


class Talk:
    """What a running process has said on stderr so far. It goes to a file, so that nobody has to read along."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, text: str) -> bool:
        return text in self.path.read_text(errors="replace")

    def wait(self, text: str, process: subprocess.Popen[Any]) -> None:
        wait_until(lambda: text in self or process.poll() is not None, f"{text!r} on stderr")
        assert text in self, self.path.read_text()


def rows(n: int, change: Callable[[np.ndarray], None] = lambda records: None) -> pa.Table:
    """n rows of the connections table: one dnat connection of 10.244.1.150 each."""
    records = np.zeros(n, dtype=RECORD)
    records["conn_id"] = np.arange(1, n + 1)
    records["ts"] = np.arange(n) * 1000
    records["flags"] = Flag.OPENED | Flag.CLOSED | Flag.PROCESS | Flag.COUNTED | Flag.LATENCY
    records["nat"], records["nat_source"], records["comm"] = Nat.DNAT, NatSource.CONNTRACK, b"curl"
    records["tuple"]["protocol"] = 6
    for name, address in (("src", 150), ("dst", 10)):
        records["tuple"][name] = bytes(10) + b"\xff\xff\x0a\xf4\x01" + bytes([address])
    records["backend"] = bytes(10) + b"\xff\xff\x0a\xf4\x01\x0b"
    records["tuple"]["dst_port"], records["backend_port"] = 80, 8080
    change(records)
    return table(records, "node-1", WallClock(0, EPOCH))


def dataset(root: Path, *tables: pa.Table) -> list[Path]:
    """Publishes each table as a file."""
    made = []
    for number, content in enumerate(tables):
        where = layout.partition(root, "connections", EPOCH // layout.HOUR_NS)
        where.mkdir(parents=True, exist_ok=True)
        made.append(where / layout.published_name("node-1", EPOCH + number * 1000, "0123456789ab", number))
        pq.write_table(content, where / ".writing.tmp")
        (where / ".writing.tmp").rename(made[-1])  # whole or not at all, as the product's
    return made


def named(content: pa.Table, **texts: str) -> pa.Table:
    """The table with these columns set to one text in every row."""
    for name, text in texts.items():
        index = content.schema.get_field_index(name)
        content = content.set_column(index, content.schema.field(name), pa.array([text] * len(content), schema.DICT))
    return content
