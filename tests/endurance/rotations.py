"""A day of rotations in little time: the node process without its kernel side, its clocks accelerated.

    python -m tests.endurance.rotations [--rotations N] [--hours H] [--root DIRECTORY]

The real writer, dataset, coverage, names, flows and wall clock take `--rotations` publications in `--hours` of their
time. What is remembered changes CHANGES times as often: pods come and go, slices change, flows begin and end, the wall
clock drifts and steps. What was published is deleted after a while. Prints memory, descriptors and threads as it goes;
exit code 1 if they grew.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "naming"))

import numpy as np
import pyarrow
from bench.ring_to_parquet import records
from endurance.held import Sample, grown, sample
from naming_world import NOON, SECOND, Heard, endpoint, node, pod, service, slice_

from tracer.clock import WallClock
from tracer.kernel.conntrack import ENTRY
from tracer.kernel.flows import Flows
from tracer.kernel.maps import OWNER, TRANSLATION
from tracer.naming.live import LiveNames
from tracer.naming.watch import KindState
from tracer.record import RECORD, TUPLE, Flag, Nat, NatSource, Role
from tracer.store.coverage import Run
from tracer.store.writer import DatasetWriter

#: Rows of a rotation: few, what grows grows by the rotation. Changes of each kind of state in it: publishing takes
#: nearly all the time, so a million changes come with 50,000 publications.
ROWS, CHANGES = 8, 20
#: Rotations after which what was published is deleted.
KEPT = 500
PODS = 64


class Script:
    """An API server's source of changes that tells what it is given."""

    def __init__(self) -> None:
        self.next: list[Heard] = []

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def changes(self) -> list[Heard]:
        told, self.next = self.next, []
        return told

    def state(self) -> dict[str, KindState]:
        return {}


class Clocks:
    """Boot time, monotonic time and wall time, which go when told to; the wall clock drifts, and steps."""

    def __init__(self) -> None:
        self.boot_ns, self.offset_ns = 3600 * SECOND, NOON

    def monotonic(self) -> float:
        return self.boot_ns / 1e9

    def wall_ns(self) -> int:
        return self.boot_ns + self.offset_ns

    def go(self, ns: int, number: int) -> None:
        self.boot_ns += ns
        self.offset_ns += (2_000_000, -1_500_000)[number % 2] if number % 10 == 0 else 0
        if number % 1000 == 0:
            self.offset_ns += (1, -1)[number % 2000 == 0] * 1_500_000_000


class Day:
    """The node process of one day. `rotate` is what happens from one publication to the next."""

    def __init__(self, root: Path, rotations: int, hours: float = 24.0, changes: int = CHANGES) -> None:
        self.root, self.clocks = root, Clocks()
        self.number = self.changes = 0
        self.in_each = changes
        self.step_ns = round(hours * 3600 * SECOND / rotations)
        self.wall = WallClock(self.clocks.boot_ns, self.clocks.wall_ns())
        self.source, self.put = Script(), 0
        names = LiveNames(self.source, wait_s=0.0, monotonic=self.clocks.monotonic, wall_ns=self.clocks.wall_ns)
        names.start()
        self.names = names
        self.flows = Flows(1, 60 * SECOND)
        self.writer = DatasetWriter(
            root,
            Run("node-1", "0123456789ab", "boot", "6.18.0"),
            self.wall,
            lambda: {"opened": self.put, "closed": self.put, "open_connections": 0},
            rotate_s=1e9,
            monotonic=self.clocks.monotonic,
            wall_ns=self.clocks.wall_ns,
            names=names,
        )
        self._sync()

    def _address(self, number: int) -> str:
        return f"10.{244 + number // 65_000 % 8}.{number // 250 % 256}.{number % 250 + 1}"

    def _sync(self) -> None:
        at = self.clocks.wall_ns()
        pods = [pod(f"here-{n}", self._address(n), started_ns=at) for n in range(PODS)]
        self.source.next += [
            Heard("nodes", "all", [node("node1", "172.30.0.11", zone="a"), node("node2", "172.30.0.12")], at),
            Heard("pods", "all", pods, at),
            Heard("services", "all", [service(f"web-{n}", f"10.96.{n}.0") for n in range(50)], at),
            Heard("endpointslices", "all", [], at),
        ]

    def _move(self) -> None:
        """A pod goes and another comes; a slice changes its endpoints."""
        at, n = self.clocks.wall_ns(), self.changes
        moved = [endpoint(self._address(n + place), f"web-{n + place}") for place in range(4)]
        self.source.next += [
            Heard("pods", "delete", pod(f"here-{n}", self._address(n)), at),
            Heard("pods", "set", pod(f"here-{n + PODS}", self._address(n + PODS), started_ns=at), at),
            Heard("endpointslices", "set", slice_("web-1", *moved, service=f"web-{n % 50}"), at),
        ]

    def _flow(self) -> np.ndarray:
        """Four flows are in the table, each for two looks; then one of two ends with a record, the other untold."""
        entries, values = np.zeros(4, ENTRY), np.zeros(4, TRANSLATION)
        ids = self.changes * 2 + np.arange(4)
        entries["key"]["protocol"], entries["key"]["src_port"] = 17, 1000 + ids % 60_000
        entries["timeout_s"], entries["counted"], entries["packets_sent"] = 30, 1, 5
        values["ct_id"], values["created"] = ids, 1 + ids
        values["nat"], values["source"] = Nat.DNAT, NatSource.CONNTRACK
        rows = self.flows.look(entries, values, np.zeros(4, OWNER), self.clocks.boot_ns)
        over = np.zeros(1, RECORD)
        over["ts"] = self.clocks.boot_ns
        over["duration_ns"], over["ct_id"] = self.clocks.boot_ns - values["created"][:1], values["ct_id"][:1]
        over["tuple"] = entries["key"][:1].astype(TUPLE)
        over["role"], over["nat"] = Role.FORWARDED, Nat.DNAT
        over["nat_source"], over["flags"] = NatSource.CONNTRACK, Flag.CLOSED | Flag.COUNTED
        return np.concatenate((rows, self.flows.settle(over)), dtype=RECORD)

    def rotate(self) -> None:
        made = []
        for _ in range(self.in_each):
            self.clocks.go(self.step_ns // self.in_each, self.changes)
            self.wall.observe(self.clocks.boot_ns, self.clocks.wall_ns())
            self._move()
            made.append(self._flow())
            self.changes += 1
        made.append(records(ROWS, 1 + self.put, seed=self.number % 50, boot_ns=self.clocks.boot_ns))
        batch = np.concatenate(made, dtype=RECORD)
        self.put += len(batch)
        assert self.writer.put(batch)
        self.writer.flush()
        self.number += 1
        if self.number % KEPT == 0:
            self.delete()

    def delete(self) -> None:
        """What was published by now, as retention does it."""
        for table in ("connections", "coverage", "endpoints"):
            shutil.rmtree(self.root / table, ignore_errors=True)

    def close(self) -> None:
        self.writer.close()
        self.names.close()

    def account(self) -> None:
        """Every row that was put is in a published file."""
        counts = self.writer.snapshot()
        assert (counts.emitted, counts.written, counts.lost) == (self.put, self.put, 0), counts


def run(day: Day, rotations: int, samples: int = 20) -> list[Sample]:
    """That many rotations; a sample at so many places, the first when what is bounded by time has filled up."""
    places = {round(rotations * (n + 1) / samples) for n in range(samples)}
    taken = []
    for number in range(1, rotations + 1):
        day.rotate()
        if number in places:
            taken.append(sample(number))
            print(taken[-1], flush=True)
    return taken


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rotations", type=int, default=50_000)
    options.add_argument("--hours", type=float, default=24.0, help="of the accelerated clock")
    options.add_argument("--root", type=Path, default=Path("/dev/shm"), help="where the files come and go")
    given = options.parse_args()
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # as the agent does
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vip-tracer-endurance-", dir=given.root) as root:
        day = Day(Path(root), given.rotations, given.hours)
        taken = run(day, given.rotations)
        day.close()
        day.account()
    print(f"{day.changes:,} changes of state; {day.put:,} rows, all published, in {time.monotonic() - began:,.0f} s")
    said = grown(taken, 8.0)
    if said:
        sys.exit("grew: " + "; ".join(said))


if __name__ == "__main__":
    main()
