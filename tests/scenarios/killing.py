"""Kills an agent at chosen moments, time after time on one dataset, and says what each time left behind."""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from agent_world import published, until
from command_world import command, environment, namespaces
from kernel_objects import Object, orphans, processes
from scenarios.faults import again_and_again, never_wrong
from scenarios.truth import ends

from tracer.kernel import libbpf, loader
from tracer.lab.cluster import Cluster

SENDS, RECEIVES = 100, 300
#: Of the agent's processes, in their environment: to find those that outlive it.
MARK = "VIP_TRACER_TEST"
#: What the two clocks of `_holes` may drift apart, and how late a deferred packet may tell a kernel of an end.
SLACK_NS = 100_000_000
#: The names of the tracer's programs, as far as a kernel keeps them (BPF_OBJ_NAME_LEN, with its zero); its maps' begin.
PROGRAMS = {name.removesuffix("_program")[:15] for name in (*loader.DESCRIPTORS, *loader.OPTIONAL)}
PROGRAMS |= {"bpf_iter__tcp", "bpf_iter__udp"}
MAPS = "vt_"
#: Where struct bpf_prog_info and struct bpf_map_info (include/uapi/linux/bpf.h) have the name, of 16 bytes.
_NAME = {"prog": 64, "map": 24}


@dataclass
class Run:
    """One agent, with its output in files."""

    output: Path
    mark: str
    process: "subprocess.Popen[bytes]" = field(init=False)

    @classmethod
    def start(cls, cluster: Cluster, output: Path, *options: str, number: int = 0, prefix: Sequence[str] = ()) -> "Run":
        """`number` tells it from others on the same output; `prefix` is a command that executes the agent."""
        run = cls(output, f"{MARK}={output}:{number}")
        run.said.parent.mkdir(exist_ok=True)
        arguments = ["agent", "--output", output, "--node", "node-1", "--ready-file", run.ready, *namespaces(cluster)]
        with run.said.open("wb") as said:
            run.process = subprocess.Popen(
                [*prefix, *command(*arguments, *options)], stderr=said,
                env=environment(**{MARK: run.mark.partition("=")[2]}),
            )  # fmt: skip
        return run

    @property
    def ready(self) -> Path:
        return self.output.parent / "ready"

    @property
    def said(self) -> Path:
        return self.output.parent / "stderr"

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.said.read_text()
        # The file may be that of the run before, which this one removes, perhaps just now.
        with contextlib.suppress(FileNotFoundError):
            return self.ready.read_text().strip() == str(self.process.pid)
        return False

    def wait_until_ready(self) -> None:
        until(self.is_ready, "the agent to be ready", 300)

    def kill(self) -> int:
        self.process.kill()
        return self.process.wait(30)


def unpublished(output: Path) -> set[Path]:
    return set(output.glob("connections/v1/*/*/.*.tmp"))


def own(objects: Iterable[Object]) -> set[Object]:
    """Those that are programs and maps of the tracer: others on the machine may come and go.

    Links have no names; one that is left behind holds its program.
    """
    names = {one: _name(one) for one in objects if one[0] in _NAME}
    return {one for one, name in names.items() if name in PROGRAMS or (one[0] == "map" and name.startswith(MAPS))}


def _name(one: Object) -> str:
    """Its name; empty if it has been freed meanwhile."""
    kind, number = one
    fd = getattr(libbpf.library(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd < 0:
        return ""
    try:
        info = ctypes.create_string_buffer(_NAME[kind] + 16)
        length = ctypes.c_uint32(len(info))
        assert libbpf.library().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(length)) == 0
        return info.raw[_NAME[kind] :].split(b"\0")[0].decode(errors="replace")
    finally:
        os.close(fd)


# -- moments ------------------------------------------------------------------------------------------------------


def while_it_starts(run: Run, chance: random.Random) -> None:
    """From exec to a little after it is ready: compiling, attaching, taking in, locking, clearing."""
    time.sleep(chance.uniform(0, 1.5))


def while_it_writes(run: Run, chance: random.Random) -> None:
    """There is a file that is not published yet. It may be one for milliseconds, so the agent is held there."""
    run.wait_until_ready()
    end = time.monotonic() + 30
    while True:
        assert run.process.poll() is None, run.said.read_text()
        assert time.monotonic() < end, "waited 30 s for an unpublished file"
        if not unpublished(run.output):
            continue
        run.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, run.process.pid, os.WSTOPPED)  # all of its threads
        if unpublished(run.output):
            return
        run.process.send_signal(signal.SIGCONT)


def while_it_publishes(run: Run, chance: random.Random) -> None:
    """Around a publication, of rows and then of coverage."""
    run.wait_until_ready()
    before = published(run.output)
    until(lambda: published(run.output) - before, "a publication")
    time.sleep(chance.uniform(0, 0.15))


def while_it_stops(run: Run, chance: random.Random) -> None:
    """Between SIGTERM and the last file."""
    run.wait_until_ready()
    time.sleep(chance.uniform(0, 0.3))
    run.process.send_signal(signal.SIGTERM)
    time.sleep(chance.uniform(0, 0.4))


MOMENTS: tuple[Callable[[Run, random.Random], None], ...] = (
    while_it_starts, while_it_writes, while_it_publishes, while_it_stops,
)  # fmt: skip


@dataclass
class Tally:
    """What many kills came to."""

    kills: int = 0
    too_late: int = 0  # it had ended in good order by then
    stale_files: int = 0
    lost: int = 0  # connections that ended before the kill and are in no row


def kill_again_and_again(cluster: Cluster, output: Path, rounds: int, seed: int) -> Tally:
    """`rounds` times each of the MOMENTS, with connections being made all along.

    Raises:
        AssertionError: a published file that cannot be read, a hole in the rows, something left in the kernel, a
            process that outlives its agent, an agent that does not start after the one before was killed.
    """
    chance, tally = random.Random(seed), Tally()
    client, left_before = cluster.clients[0], own(orphans())
    with again_and_again(lambda: client.connect_many(20, cluster.vip(), SENDS, RECEIVES, rate=300)):
        for number, moment in enumerate(MOMENTS * rounds):
            run = Run.start(cluster, output, "--rotate", "100ms", number=number)
            moment(run, chance)
            tally.kills += 1
            tally.too_late += run.kill() == 0
            tally.stale_files += len(unpublished(output))
            for path in output.glob("*/v1/*/*/[!.]*.parquet"):
                pq.read_table(path)
            until(lambda run=run: not processes(run.mark), "the agent's children to end")
    until(lambda: not own(orphans()) - left_before, "the kernel to free what killed agents had loaded")
    tally.lost = _holes(cluster, output)
    last = Run.start(cluster, output, number=-1)
    last.wait_until_ready()
    cluster.clients[1].connect_many(10, cluster.vip(), SENDS, RECEIVES)
    cluster.settle()
    last.process.send_signal(signal.SIGTERM)
    assert last.process.wait(60) == 0, last.said.read_text()
    assert "10 rows written, nothing lost" in last.said.read_text()
    assert not unpublished(output), "stale files are removed"
    table = never_wrong(output, cluster)
    # Of a hundred kills' worth of connections, a port is used for several: not within a second, though.
    since = table[table.closed].sort_values("ts").groupby(["src_ip", "src_port"]).ts.diff()
    assert not (since < pd.Timedelta(seconds=1)).any(), "nothing is told twice"
    assert not _closed(output).duplicated(["run_id", "conn_id"]).any()
    return tally


def _closed(output: Path) -> pd.DataFrame:
    """The rows of connections that ended, with the run of their file: of its id a conn_id has 16 bits, which repeat."""
    columns = ["conn_id", "ts", "closed", "src_ip", "src_port"]
    parts = []
    for path in sorted(published(output)):
        with pq.ParquetFile(path) as file:
            run_id = file.metadata.metadata[b"run_id"].decode()
            parts.append(file.read(columns).to_pandas().assign(run_id=run_id))
    table = pd.concat(parts, ignore_index=True)
    return table[table.closed]


def _holes(cluster: Cluster, output: Path) -> int:
    """Checks that what a killed agent lost is what came after its last publication; how much that was, of all runs.

    A run's rows are published in the order in which their connections ended, so one that began and ended between two
    rows of a run (by its server's account: accepted before its client closed it, ended after) must be there too.
    """
    boot = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    closed = _closed(output)
    told = set(zip(closed.src_ip, closed.src_port, strict=True))
    ledgers = [server.ledger() for server in cluster.servers]
    lived = {
        peer: (int(row["started"]), int(row["ended"]))
        for ledger in ledgers
        for (_, peer), row in zip(ends(ledger), ledger, strict=True)
        if row["ended"]
    }
    untold = [life for peer, life in lived.items() if peer not in told]
    for _, rows_of_run in closed.groupby("run_id"):
        times = rows_of_run.ts.astype("int64") - boot
        first, last = int(times.min()) + SLACK_NS, int(times.max()) - SLACK_NS
        holes = [life for life in untold if first < life[0] and life[1] < last]
        assert not holes, "a hole before the last publication"
    assert not closed.duplicated(["run_id", "conn_id"]).any()
    return len(untold)
