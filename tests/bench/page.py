"""The figures of side_by_side as tables of docs/overhead.md. Pure, but for `write`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench import paired
from tests.bench.tools import NOTHING

_BEGIN, _END = "<!-- made by tests/bench/side_by_side.py -->", "<!-- end -->"
Figures = dict[str, Any]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _best(cells: Sequence[tuple[float, str] | None], highest: bool = False) -> list[str]:
    """Cells of (value, text), the best of them bold; of None "-"."""
    values = [cell[0] for cell in cells if cell]
    best = (max if highest else min)(values) if values else None
    return [("-" if cell is None else f"**{cell[1]}**" if cell[0] == best else cell[1]) for cell in cells]


def rates(workloads: Figures) -> str:
    """How much of what the clients do without a tool they do with it."""
    names = list(next(iter(workloads.values()))["tools"])
    lines = []
    for workload in workloads.values():
        known = [workload["tools"][name] for name in names]
        without = next((f"{tool['without']:,.0f}" for tool in known if "without" in tool), "-")
        cells = [
            (tool["ratio"], f"{tool['ratio']:.3f} ({tool['low']:.3f} to {tool['high']:.3f}; {len(tool['ratios'])})")
            if "ratio" in tool
            else None
            for tool in known
        ]
        shown = _best([None if name == NOTHING else cell for name, cell in zip(names, cells, strict=True)], True)
        for place, name in enumerate(names):
            if name == NOTHING and (cell := cells[place]):
                shown[place] = cell[1]
        lines.append([workload["unit"], without, *shown])
    return _table(["workload", "a second, without", *names], lines)


def _per_connection(figure: str) -> Callable[[Figures], tuple[float, str]]:
    def cell(tool: Figures) -> tuple[float, str]:
        value = tool[f"{figure}_ns"] / tool["operations"] / 1000
        return value, f"{value:.2f} µs"

    return cell


def _megabytes(figure: str) -> Callable[[Figures], tuple[float, str]]:
    return lambda tool: (tool[figure], f"{tool[figure] / 1e6:.0f} MB")


def _count(figure: str) -> Callable[[Figures], tuple[float, str] | None]:
    return lambda tool: (tool[figure], f"{tool[figure]:,}") if figure in tool else None


def _kernel(tool: Figures) -> tuple[float, str] | None:
    if "kernel_ns" not in tool:
        return None
    values = sorted(tool["kernel_ns"])
    value = values[len(values) // 2] / 1000
    return value, f"{value:.2f} µs ({values[0] / 1000:.2f} to {values[-1] / 1000:.2f})"


def _bytes_a_row(tool: Figures) -> tuple[float, str] | None:
    if not tool["rows"]:
        return None
    value = tool["bytes"] / tool["rows"]
    return value, f"{value:.1f}"


def _losses(tool: Figures) -> tuple[float, str]:
    total = sum(tool["lost"].values())
    return total, ", ".join(f"{count:,} {name}" for name, count in sorted(tool["lost"].items())) or "0"


_COSTS: tuple[tuple[str, Callable[[Figures], tuple[float, str] | None]], ...] = (
    ("user CPU a connection", _per_connection("user")),
    ("system CPU a connection", _per_connection("system")),
    ("its BPF programs, a connection", _kernel),
    ("resident memory", _megabytes("resident")),
    ("resident at the most, of what runs until the end", _megabytes("most")),
    ("kernel memory of its maps", _megabytes("maps")),
    ("bytes written a row", _bytes_a_row),
    ("connections", _count("connections")),
    ("... whose beginning is in no row", _count("missing")),
    ("... whose end is in no row", _count("ends_missing")),
    ("rows of no connection, or twice", _count("extra")),
    ("rows with another backend", _count("backend_wrong")),
    ("rows without a backend", _count("backend_untold")),
    ("rows with another process", _count("process_wrong")),
    ("rows without a process", _count("process_untold")),
    ("losses, as the tool itself counts them", _losses),
)


def costs(workload: Figures) -> str:
    """What each tool takes, and how true it is, on one workload; connections that failed are not the tools'."""
    tools = {name: tool for name, tool in workload["tools"].items() if name != NOTHING and "ratio" in tool}
    lines = []
    for label, cell in _COSTS:
        cells = [cell(tool) for tool in tools.values()]
        if not any(cells):
            continue
        shown = [c[1] if c else "-" for c in cells] if label == "connections" else _best(cells)
        lines.append([label, *shown])
    return _table(["", *tools], lines)


def sustained(result: Figures) -> str:
    """The long run with the agent."""
    lost = ", ".join(f"{name} {count}" for name, count in result["lost"].items()) or "0"
    seconds, rate = result["seconds"], result["per_second"]
    lines = (
        ("short connections", f"{result['connections']:,} in {seconds:.0f} s ({rate:,.0f} a second)"),
        ("rows missing; counted as lost", f"{result['connections'] - result['rows']}; {lost}"),
        ("user CPU a connection, ring to published Parquet", f"{result['user_us']:.2f} µs"),
        ("system CPU a connection", f"{result['system_us']:.2f} µs"),
        ("resident when ready", f"{result['resident_ready'] / 1e6:.1f} MB"),
        ("resident while writing, median", f"{result['resident'] / 1e6:.1f} MB"),
        ("resident while writing, most", f"{result['peak'] / 1e6:.1f} MB"),
        ("bytes a row on disk, all files", f"{result['bytes_per_row']:.1f}"),
    )
    return _table(["", ""], lines)


def kernel(result: Figures) -> str:
    """What the agent's programs take of a connection, by program and by what it runs on."""
    lines = [[f"`{name}`", f"{each['ns']:,.0f}", f"{each['runs']:.2f}"] for name, each in result["programs"].items()]
    low, high = min(result["totals"]), max(result["totals"])
    lines.append(["**all**", f"**{result['total']:,.0f}** ({low:,.0f} to {high:,.0f})", ""])
    return _table(["program: on", "ns a connection", "runs"], lines)


def render(found: Figures) -> str:
    """All tables there are figures for."""
    out = [
        f"{found['date']}, Linux {found['linux']}, {found['cpus']} CPUs ({found['processor']}); ten million additions "
        f"in Python take {found['additions_s']:.2f} s here."
    ]
    workloads = found["workloads"]
    if workloads:
        few = any(len(t["ratios"]) < paired.ENOUGH for w in workloads.values() for t in w["tools"].values())
        interval = "least and greatest" if few else "95 % interval"
        out += [f"What is left of the rate with each tool ({interval}; pairs):", rates(workloads)]
    for workload in workloads.values():
        if any("connections" in tool for tool in workload["tools"].values()):
            out += [f"What each takes and tells of {workload['unit']}:", costs(workload)]
        errors = [f"- {tool}: {line['error']}" for tool, line in workload["tools"].items() if line["error"]]
        failed = [
            f"- {tool}: {line['failures']:,} operations failed, with the tool or without"
            for tool, line in workload["tools"].items()
            if line.get("failures")
        ]
        if errors or failed:
            out += [f"Of {workload['unit']}:", "\n".join(errors + failed)]
    if "sustained" in found:
        out += ["One agent for a longer time:", sustained(found["sustained"])]
    if "kernel" in found:
        out += ["Its programs, by what they run on:", kernel(found["kernel"])]
    if found["errors"]:
        out += ["Not measured:", "\n".join(f"- {error}" for error in found["errors"])]
    return "\n\n".join(out)


def write(found: Figures, path: Path) -> None:
    """Puts the tables between the page's marks."""
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{path} has no marks {_BEGIN} and {_END}: put them where the tables are to go.")
    path.write_text(f"{before}{_BEGIN}\n\n{render(found)}\n\n{_END}{after}")
