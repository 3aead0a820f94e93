"""What the tracer costs the traffic: operations a second with the agent and without it, in interleaved pairs.

How: a rig of namespaces and clients in C that keep two cores busy (rig.py, traffic.c); for each pair of windows once
without an agent and once with it, in changing order. Reported is the median of the pairs' ratios with its 95 %
interval, what the agent spent, and whether a row is missing.

    python -m tests.bench.rate [--pairs N] [--seconds S] [--workload NAME ...] [--sustained SECONDS]
                                   [--json FILE]
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import paired
from tests.bench.agent import Agent
from tests.bench.rig import Rig, Work, Worker

#: Connections that stay open in the workload `long`.
HELD = 10_000


@dataclass(frozen=True)
class Workload:
    """What the clients do: (what, arguments, number of client processes) for each kind."""

    name: str
    unit: str
    parts: tuple[tuple[str, tuple[object, ...], int], ...]
    #: Whether each operation is a connection of its own, so that rows can be counted.
    rows: bool = False


def workloads(rig: Rig) -> list[Workload]:
    """All of them, in the order of the table."""
    tcp, udp = tuple(rig.targets()), tuple(rig.targets("udp"))
    return [
        Workload("short", "short TCP connections", (("short", tcp, 4),), rows=True),
        Workload("failed", "refused connects", (("failed", (rig.refusing(),), 4),), rows=True),
        Workload("udp", "UDP queries, a socket each", (("udp", udp, 4),)),
        Workload("long", f"exchanges on {HELD:,} open connections", (("long", (HELD // 4, *tcp), 4),)),
        Workload("packets", "one byte there and back on one connection", (("packets", (tcp[0],), 1),)),
        Workload("calls", "getppid(2)", (("calls", (), 1),)),
        Workload(
            "mix",
            "a mix of the first four",
            (("short", tcp, 2), ("failed", (rig.refusing(),), 1), ("udp", udp, 1), ("long", (500, *tcp), 1)),
        ),
    ]


def window(workers: Sequence[Worker], seconds: float) -> list[Work]:
    """What all of them did in so many seconds."""
    for worker in workers:
        worker.begin(seconds)
    return [worker.finish() for worker in workers]


def per_second(work: Sequence[Work]) -> float:
    """Operations a second, all clients together."""
    return sum(done.operations / done.seconds for done in work)


def measure(rig: Rig, workload: Workload, pairs: int, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    workers = [
        worker for what, arguments, count in workload.parts for worker in rig.workers(what, *arguments, count=count)
    ]
    window(workers, 0.5)  # warms up
    results, user, system, traced, rows, lost, failures = [], 0.0, 0.0, 0, 0, 0, 0
    for turn in paired.order(pairs):
        rates = {}
        for with_agent in turn:
            if not with_agent:
                rates[False] = per_second(work := window(workers, seconds))
            else:
                with Agent(rig) as agent:
                    work = window(workers, seconds)
                    rates[True] = per_second(work)
                    if workload.rows:
                        agent.settle()
                    used = agent.cpu()
                    written = agent.stop()
                user, system = user + used[0], system + used[1]
                traced += sum(done.operations for done in work)
                rows += written.rows.get("client", 0)
                lost += sum(written.lost.values())
            failures += sum(done.failures for done in work)
        results.append((rates[False], rates[True]))
    for worker in workers:
        worker.close()
    found = paired.ratio(results)
    line = {
        "workload": workload.name,
        "unit": workload.unit,
        "without": sorted(before for before, _ in results)[len(results) // 2],
        "ratio": found.median,
        "low": found.low,
        "high": found.high,
        "pairs": found.pairs,
        "failures": failures,
        "lost": lost,
    }
    if workload.rows:
        line |= {"traced": traced, "rows": rows, "user_us": user / traced * 1e6, "system_us": system / traced * 1e6}
    return line


def sustained(rig: Rig, seconds: float) -> dict[str, Any]:
    """Short connections for so long with one agent: rows, losses, CPU a row, memory, bytes a row.

    It publishes as it does by default; its end is in what it spends.
    """
    workers = rig.workers("short", *rig.targets(), count=4)
    with Agent(rig, "--rotate", "5m") as agent:
        for worker in workers:
            worker.begin(seconds)
        until, seen = time.monotonic() + seconds, []
        while time.monotonic() < until:
            seen.append(agent.look())
            time.sleep(0.05)
        work = [worker.finish() for worker in workers]
        written = agent.stop()
        user, system = agent.cpu()
        connections = sum(done.operations for done in work)
        result = {
            "seconds": seconds,
            "connections": connections,
            "per_second": per_second(work),
            "rows": written.rows.get("client", 0),
            "lost": written.lost,
            "user_us": user / connections * 1e6,
            "system_us": system / connections * 1e6,
            "resident_ready": agent.idle,
            "resident": sorted(seen)[len(seen) // 2],
            "resident_most": agent.resident,
            "peak": agent.peak,
            "bytes_per_row": written.bytes / max(1, written.total),
        }
    for worker in workers:
        worker.close()
    return result


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, as docs/overhead.md has it."""
    out = [
        "| workload | a second, without | with the agent (95 % interval) | pairs | rows missing |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        missing = f"{line['traced'] - line['rows']} of {line['traced']:,}" if "rows" in line else ""
        found = f"{line['ratio']:.3f} ({line['low']:.3f} to {line['high']:.3f})"
        out.append(f"| {line['unit']} | {line['without']:,.0f} | {found} | {line['pairs']} | {missing} |")
    return "\n".join(out)


def sustained_table(result: dict[str, Any]) -> str:
    """Markdown, as docs/overhead.md has it."""
    lost = ", ".join(f"{name} {count}" for name, count in result["lost"].items()) or "0"
    rows = [
        (
            "short connections",
            f"{result['connections']:,} in {result['seconds']:.0f} s ({result['per_second']:,.0f} a second)",
        ),
        ("rows missing; counted as lost", f"{result['connections'] - result['rows']}; {lost}"),
        ("user CPU per row, ring to published Parquet", f"{result['user_us']:.2f} µs"),
        ("system CPU per row", f"{result['system_us']:.2f} µs"),
        ("resident when ready", f"{result['resident_ready'] / 1e6:.1f} MB"),
        ("resident while writing, median", f"{result['resident'] / 1e6:.1f} MB"),
        ("resident while writing, most", f"{result['peak'] / 1e6:.1f} MB"),
        ("bytes per row on disk", f"{result['bytes_per_row']:.1f}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--workload", action="append", help="one of them; may be repeated")
    parser.add_argument("--sustained", type=float, default=60.0, help="how long the one long run takes; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, too")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs")
    with Rig() as rig:
        chosen = [w for w in workloads(rig) if not arguments.workload or w.name in arguments.workload]
        found["workloads"] = [measure(rig, workload, arguments.pairs, arguments.seconds) for workload in chosen]
        print(table(found["workloads"]))
        if arguments.sustained:
            found["sustained"] = sustained(rig, arguments.sustained)
            print(sustained_table(found["sustained"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
