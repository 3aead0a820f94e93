"""A diagnosis as text, JSON or CSV. Names come from a cluster: nothing of them drives a terminal."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tracer.words import bytes_text, printable

if TYPE_CHECKING:
    from tracer.analysis.balance import Depth
    from tracer.analysis.diagnose import Diagnosis, Finding

#: Services whose backends are shown without being asked for; the others have a line in the table.
SHOWN = 3
#: Clients, nodes and zones that are listed of one service.
LISTED = 8
_SERVICES = (
    f"{'SERVICE':<34}{'VERDICT':<14}{'BACKENDS':>8}{'CONNECTIONS':>13}{'MAX/EVEN':>10}{'BYTES':>8}{'MAX/EVEN':>10}"
)
_BACKENDS = (
    f"  {'BACKEND':<38}{'CONNECTIONS':>12}{'SHARE':>8}{'FAIR':>8}{'OPEN':>8}{'BYTES':>8}{'SHARE':>8}{'FAILED':>8}"
    f"{'CONNECT':>9}"
)
_FIGURES = f"  {'MEASURE':<20}{'MAX/MEAN':>9}{'VARIATION':>11}{'GINI':>7}{'JAIN':>7}{'PICKS':>12}{'P':>10}"


def text(found: "Diagnosis", deep: bool) -> Iterator[str]:
    """For people: the answers, the table by severity, and the worst services' depth; `deep`: that of all."""
    span = f"{_when(found.bins.begin_ns)} to {_when(found.bins.end_ns)}"
    yield f"{found.rows:,} rows of {len(found.nodes)} node{'s' * (len(found.nodes) != 1)}, {span}"
    yield ""
    troubled = [finding for finding in found.findings if deep or finding.note or finding.verdict.word != "balanced"]
    for finding in troubled:
        yield printable(finding.answer)
    if not found.findings:
        yield (
            "No service is judged: no connection is known to have gone through a virtual address. If there should be "
            "some, see what 'vip-tracer doctor' says on the node."
        )
        return
    if not troubled:
        yield "Every service is balanced, as far as chance allows to tell."
    yield ""
    yield _SERVICES
    for finding in found.findings:
        yield printable(_line(finding))
    shown = found.findings if deep else [each for each in found.findings if each.verdict.word == "uneven"][:SHOWN]
    for finding in shown:
        yield ""
        yield from map(printable, _depth(finding))
        if deep and finding.depth is not None:
            yield from map(printable, _figures(finding))
            yield from map(printable, _groups(finding.depth))


def wide(found: "Diagnosis", _: bool) -> Iterator[str]:
    """As `text`, with the backends of every service."""
    return text(found, True)


def as_json(found: "Diagnosis", _: bool) -> Iterator[str]:
    """Everything, as one object."""
    content = {
        "begin": _when(found.bins.begin_ns),
        "end": _when(found.bins.end_ns),
        "rows": found.rows,
        "nodes": found.nodes,
        "warnings": found.warnings,
        "services": [_object(finding) for finding in found.findings],
    }
    yield json.dumps(_plain(content), indent=1, default=str, allow_nan=False)


def as_csv(found: "Diagnosis", _: bool) -> Iterator[str]:
    """A row per backend of every service, with the service's verdict and first cause."""
    header = True
    for finding in found.findings:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if header:
            writer.writerow(["service", "verdict", "cause", *finding.backends.columns])
        header = False
        first = finding.causes[0].name if finding.causes else ""
        for row in finding.backends.itertuples(index=False):
            cells = [finding.service, finding.verdict.word, first, *row]
            writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
        yield out.getvalue().removesuffix("\n")


#: How a diagnosis can be shown.
FORMATS: Mapping[str, Callable[["Diagnosis", bool], Iterator[str]]] = {
    "table": text,
    "wide": wide,
    "json": as_json,
    "csv": as_csv,
}


def _line(finding: "Finding") -> str:
    backends = finding.backends
    total, moved = int(backends["connections"].sum()), bytes_text(int(backends["bytes"].sum()))
    return (
        f"{_cut(finding.service, 33):<34}{finding.verdict.word:<14}{len(backends):>8}{total:>13,}"
        f"{_ratio(finding, 'connections'):>10}{moved:>8}{_ratio(finding, 'bytes'):>10}"
    )


def _ratio(finding: "Finding", measure: str) -> str:
    found = [test.ratio for test in finding.verdict.tests if test.measure == measure]
    return f"{found[0]:.2f}" if found else "-"


def _depth(finding: "Finding") -> Iterator[str]:
    yield f"{finding.service}: {finding.verdict.word}"
    for sentence in finding.verdict.reasons:
        yield f"  {sentence}"
    for number, cause in enumerate(finding.causes, 1):
        explains = f" (explains {cause.score:.0%})" if cause.score else ""
        yield f"  {number}. {cause.name}{explains}. {cause.sentence}"
        yield f"     {cause.remedy}"
        if cause.rows:
            yield f"     rows: {' and '.join(f'{column} {op} {_value(value)}' for column, op, value in cause.rows)}"
    yield _BACKENDS
    for row in finding.backends.to_dict("records"):
        connect = "-" if math.isnan(row["connect_ms"]) else f"{row['connect_ms']:.2f}ms"
        yield (
            f"  {_cut(str(row['backend']), 37):<38}{row['connections']:>12,}{row['connections_share']:>8.1%}"
            f"{row['fair_share']:>8.1%}{row['open']:>8.1f}{bytes_text(row['bytes']):>8}{row['bytes_share']:>8.1%}"
            f"{row['failures']:>8,}{connect:>9}"
        )


def _figures(finding: "Finding") -> Iterator[str]:
    yield _FIGURES
    for test in finding.verdict.tests:
        unequal = finding.inequality[test.measure]
        yield (
            f"  {test.measure:<20}{unequal.ratio:>9.2f}{unequal.variation:>11.2f}{unequal.gini:>7.2f}"
            f"{unequal.jain:>7.2f}{test.picks:>12,.0f}{test.p:>10.2g}"
        )


def _groups(depth: "Depth") -> Iterator[str]:
    for by, frame in depth.groups.items():
        yield f"  {'BY ' + by.upper():<38}{'CONNECTIONS':>12}{'SHARE':>8}{'OPEN S':>12}{'BYTES':>8}{'BACKENDS':>10}"
        total = max(1, int(frame["connections"].sum()))
        for row in frame.head(LISTED).to_dict("records"):
            yield (
                f"  {_cut(row[by] if isinstance(row[by], str) else 'unknown', 37):<38}{row['connections']:>12,}"
                f"{row['connections'] / total:>8.1%}{row['connection_time_s']:>12,.1f}{bytes_text(row['bytes']):>8}"
                f"{row['backends']:>10}"
            )
        if len(frame) > LISTED:
            yield f"  and {len(frame) - LISTED} more"


def _object(finding: "Finding") -> dict[str, Any]:
    tests = ("measure", "effect", "ratio", "least", "p", "q", "picks", "clumped")
    causes = ("name", "score", "sentence", "remedy", "numbers", "rows")
    return {
        "service": finding.service,
        "namespace": finding.port.namespace,
        "name": finding.port.name,
        "verdict": finding.verdict.word,
        "answer": finding.answer,
        "note": finding.note,
        "reasons": finding.verdict.reasons,
        "tests": [
            vars(finding.inequality[test.measure]) | {name: getattr(test, name) for name in tests}
            for test in finding.verdict.tests
        ],
        "causes": [{name: getattr(cause, name) for name in causes} for cause in finding.causes],
        "backends": _records(finding.backends),
    } | ({f"by_{by}": _records(frame) for by, frame in finding.depth.groups.items()} if finding.depth else {})


def _plain(value: Any) -> Any:
    """The value without what JSON does not know: not a number, and infinite ones, are null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _records(frame: Any) -> Any:
    return json.loads(frame.to_json(orient="records"))


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return ", ".join(map(str, value[:3])) + more
    return str(value)


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _when(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
