"""The report as one page of HTML that needs nothing else: no network, no script, light and dark, phone and keyboard.

Names in it come from a cluster: Jinja escapes every one, and what is not printable is spelled out before. The page's
own policy forbids scripts and whatever would have to be fetched.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from tracer.analysis.balance import Depth
from tracer.analysis.causes.hypothesis import CALLED
from tracer.analysis.causes.situation import MEASURES, Floats
from tracer.analysis.diagnose import Diagnosis, Finding
from tracer.analysis.partial import Bins
from tracer.words import bytes_text, printable

#: Services that are shown in depth, backends and clients of one, services in the table. The rest is counted.
SHOWN, BACKENDS, SERVICES = 25, 40, 2000

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(found: Diagnosis, title: str) -> str:
    """The page. `title` says what it is of: the dataset's place."""
    troubled = [each for each in found.findings if each.note or each.verdict.word != "balanced"]
    deep = [each for each in found.findings if each.depth is not None][:SHOWN]
    anchors = {each.port: f"s{number}" for number, each in enumerate(deep)}
    template = _TEMPLATES.get_template("page.html")
    return template.render(
        title=title,
        begin=_when(found.bins.begin_ns),
        end=_when(found.bins.end_ns),
        found=found,
        nodes=len(found.nodes),
        uneven=sum(each.verdict.word == "uneven" for each in found.findings),
        elsewhere=sum(bool(each.note) for each in found.findings),
        inconclusive=sum(each.verdict.word == "inconclusive" for each in found.findings),
        answers=troubled[:SHOWN],
        more_answers=max(0, len(troubled) - SHOWN),
        services=[_service(each, anchors.get(each.port)) for each in found.findings[:SERVICES]],
        more_services=max(0, len(found.findings) - SERVICES),
        sections=[_section(each, each.depth, found.bins) | {"id": anchors[each.port]} for each in deep if each.depth],
        called=CALLED,
        marks={"uneven": "▲", "inconclusive": "?", "balanced": "✓"},
    )


def _service(finding: Finding, anchor: str | None) -> dict[str, Any]:
    ratios = {test.measure: f"{test.ratio:.2f}" for test in finding.verdict.tests}
    return {
        "finding": finding,
        "anchor": anchor,
        "backends": len(finding.backends),
        "connections": f"{int(finding.backends['connections'].sum()):,}",
        "bytes": bytes_text(int(finding.backends["bytes"].sum())),
        "ratios": [ratios.get(measure, "-") for measure in MEASURES],
        "cause": finding.causes[0].name if finding.causes else "-",
    }


def _section(finding: Finding, depth: Depth, bins: Bins) -> dict[str, Any]:
    """Everything about one service port that the template lays out."""
    backends = finding.backends
    names = [str(name) for name in backends["backend"][:BACKENDS]]
    measure = finding.verdict.measures[0] if finding.verdict.measures else "connections"
    return {
        "finding": finding,
        "backends": list(_backends(finding)),
        "more": max(0, len(backends) - BACKENDS),
        "tests": [(test, finding.inequality[test.measure]) for test in finding.verdict.tests],
        "measure": measure,
        "times": _times(bins),
        "heat": _heat(depth, measure, names, bins),
        "matrix": _matrix(depth, names),
        "names": names,
        "other_clients": depth.others,
        "groups": {by: frame.head(10).to_dict("records") for by, frame in depth.groups.items() if len(frame) > 1},
        "moved": bytes_text,
    }


def _backends(finding: Finding) -> Iterator[dict[str, Any]]:
    """A row per backend: shares as widths in percent of the widest bar, and where the fair share stands on it."""
    frame = finding.backends.head(BACKENDS)
    connect = frame["connect_ms"].dropna()
    slowest = max(float(connect.max()), 2 * float(connect.median())) if len(connect) else 0.0  # alike are half a bar
    most_failed = int(frame["failures"].max()) if len(frame) else 0
    shares = ["fair_share", *(f"{measure}_share" for measure in MEASURES)]
    widest = float(frame[shares].to_numpy().max(initial=0.0))
    for row in frame.to_dict("records"):
        amounts = {
            "connections": f"{row['connections']:,}",
            "connection_time": f"{row['open']:,.1f} open",
            "bytes": bytes_text(row["bytes"]),
        }
        known = not math.isnan(row["connect_ms"])
        yield {
            "name": str(row["backend"]),
            "where": " · ".join(_where(row)),
            "endpoint": row["endpoint"],
            "fair": 100 * row["fair_share"],
            "fair_at": _part(row["fair_share"], widest),
            "bars": [
                (measure, amounts[measure], 100 * row[f"{measure}_share"], _part(row[f"{measure}_share"], widest))
                for measure in MEASURES
            ],
            "failures": (f"{row['failures']:,}", _part(row["failures"], most_failed)),
            "connect": (f"{row['connect_ms']:.2f} ms", _part(row["connect_ms"], slowest)) if known else ("-", 0.0),
        }


def _where(row: Mapping[Any, Any]) -> Iterator[str]:
    """What is known of where a backend is, and not its name already."""
    for key in ("ip", "node", "zone"):
        if isinstance(row[key], str) and (key != "ip" or row[key] not in str(row["backend"])):
            yield row[key]


def _part(value: float, whole: float) -> float:
    """Percent, for a width."""
    return round(100 * value / whole, 1) if whole > 0 else 0.0


def _heat(depth: Depth, measure: str, names: Sequence[str], bins: Bins) -> list[tuple[str, list[tuple[float, str]]]]:
    """A row per backend: of every bin its load against the largest of all, and what to say of it."""
    table = depth.over_time[measure][:, : len(names)]
    of_bin = depth.over_time[measure].sum(axis=1)
    times = _times(bins)
    rows = []
    for place, name in enumerate(names):
        cells = []
        for number, amount in enumerate(table[:, place]):
            share = amount / of_bin[number] if of_bin[number] else 0.0
            said = f"{name}, from {times[number]}: {_amount(measure, amount)}, {share:.0%}"
            cells.append((_shade(amount, table), said))
        rows.append((name, cells))
    return rows


def _matrix(depth: Depth, names: Sequence[str]) -> list[tuple[str, list[tuple[float, str, str]]]]:
    """A row per client: of every backend the connections, as a shade and as a text."""
    table = depth.by_client[:, : len(names)]
    return [
        (client, [(_shade(n, table), f"{client} → {name}: {int(n):,}", f"{int(n):,}" if n else "")
                  for name, n in zip(names, row, strict=True)])
        for client, row in zip(depth.clients, table, strict=True)
    ]  # fmt: skip


def _shade(amount: float, table: Floats) -> float:
    most = float(table.max(initial=0.0))
    return round(float(amount) / most, 3) if most else 0.0


def _amount(measure: str, amount: float) -> str:
    if measure == "bytes":
        return bytes_text(int(amount))
    return f"{amount / 1e6:,.0f} s" if measure == "connection_time" else f"{int(amount):,} connections"


def _times(bins: Bins) -> list[str]:
    """When each bin begins, UTC; with the day where the range has several."""
    form = "%H:%M:%S" if bins.width_ns < 60 * 10**9 else "%H:%M"
    if (bins.end_ns - bins.begin_ns) > 86_400 * 10**9:
        form = f"%m-%d {form}"
    begins = (bins.begin_ns + number * bins.width_ns for number in range(bins.count))
    return [f"{datetime.fromtimestamp(begin / 1e9, UTC):{form}}" for begin in begins]


def _when(at_ns: int) -> str:
    return f"{datetime.fromtimestamp(at_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC"
