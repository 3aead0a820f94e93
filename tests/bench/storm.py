"""A storm of connections at the machine's limit, without and with the agent: does it break any, does it lose any?

How: a cluster of namespaces, so many clients as the machine has ephemeral ports for, each connecting as fast as it can
for so long; windows without and with the real agent by turns, each with a cluster of its own. A connection fails if its
client says so. Rows and counted losses are compared with the clients' ledgers.
Run it as root: python -m tests.bench.storm [--seconds N] [--rounds N]. It fails if a connection failed with the agent
and none without, or if rows and losses are not what was dialled.
"""

import argparse
import errno
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests import agent_world
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Client

SENDS, RECEIVES, BATCH = 100, 300, 250
#: A client has 28,232 ports, and they rest for a minute: what one may dial in a window without searching for one.
PORTS = 24_000
#: What one core can dial a second at the most, by far.
FASTEST = 12_000


@dataclass
class Window:
    """What came of one storm."""

    seconds: float = 0.0
    dialled: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    lost: int = 0  # counted
    losses: dict[str, int] = field(default_factory=dict)
    resident: int = 0  # MB, at the end

    @property
    def uncounted(self) -> int:
        """Connections that are neither a row nor counted."""
        return self.dialled - self.rows - self.lost

    def __str__(self) -> str:
        rate = self.dialled / self.seconds
        return (
            f"{self.dialled:9,} dialled in {self.seconds:5.1f} s ({rate:6,.0f} a second), {self.failed.total()} failed"
        )


def rage(cluster: Cluster, seconds: float, window: Window) -> None:
    """All clients connect until the time is over or their ports are used up."""
    until = time.monotonic() + seconds

    def work(client: Client) -> tuple[int, Counter[str]]:
        dialled, failed = 0, Counter[str]()
        while time.monotonic() < until and dialled < PORTS:
            ledger = client.connect_many(BATCH, cluster.vip(), SENDS, RECEIVES)
            dialled += len(ledger)
            failed.update(errno.errorcode[int(code)] for code in ledger["errno"] if code)
        return dialled, failed

    began = time.monotonic()
    with ThreadPoolExecutor(len(cluster.clients)) as pool:
        for dialled, failed in pool.map(work, cluster.clients):
            window.dialled += dialled
            window.failed += failed
    window.seconds = time.monotonic() - began


def storm(seconds: float, traced: bool, *options: str) -> Window:
    """One window."""
    window = Window()
    clients = max(2, min(40, int(seconds * FASTEST / PORTS) + 1))
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(backends=6, clients=clients, conntrack=Conntrack(timeouts=Conntrack.SHORT)) as cluster,
    ):
        if not traced:
            rage(cluster, seconds, window)
            return window
        output = Path(directory, "data")
        with agent_world.agent(cluster, output, "--rotate", "10s", *options) as running:
            rage(cluster, seconds, window)
            cluster.settle()
            window.resident = running.resident()
            running.stop()
        table, report = agent_world.rows(output), agent_world.coverage(output)
        clients_rows = table[table.role == "client"]
        window.rows, window.lost = len(clients_rows), agent_world.losses(output)
        sums = report.filter(regex="^lost_").sum()
        window.losses = {str(name): int(count) for name, count in sums.items() if count}
        assert not clients_rows.conn_id.duplicated().any()
    return window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs; load before {os.getloadavg()[0]:.1f}")
    without, traced = [], []
    for _ in range(arguments.rounds):
        without.append(storm(arguments.seconds, traced=False))
        print(f"  without the agent  {without[-1]}", flush=True)
        traced.append(storm(arguments.seconds, traced=True))
        print(f"  with the agent     {traced[-1]}")
        said = ", ".join(f"{name} {count}" for name, count in traced[-1].losses.items()) or "nothing lost"
        print(f"                     {traced[-1].rows:9,} rows, {said}; {traced[-1].resident} MB resident", flush=True)
    broken = sum(w.failed.total() for w in traced) if not sum(w.failed.total() for w in without) else 0
    uncounted = sum(abs(w.uncounted) for w in traced)
    print(f"  connections that failed with the agent alone: {broken}; neither a row nor counted: {uncounted}")
    sys.exit(bool(broken or uncounted))


if __name__ == "__main__":
    main()
