"""``vip-tracer report``: which services are unevenly loaded, why, and what to do."""

import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.cli import options
from tracer.cli.lines import bytes_text, printable
from tracer.errors import UsageError

if TYPE_CHECKING:
    from tracer.analysis.diagnose import Diagnosis, Finding

FORMATS = ("table", "json", "csv")
#: Services whose backends are shown without being asked for; the others have a line in the table.
SHOWN = 3
_SERVICES = (
    f"{'SERVICE':<34}{'VERDICT':<14}{'BACKENDS':>8}{'CONNECTIONS':>13}{'MAX/FAIR':>10}{'BYTES':>8}{'MAX/FAIR':>10}"
)
_BACKENDS = (
    f"  {'BACKEND':<38}{'CONNECTIONS':>12}{'SHARE':>8}{'FAIR':>8}{'OPEN':>8}{'BYTES':>8}{'SHARE':>8}{'FAILED':>8}"
    f"{'CONNECT':>9}"
)


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--service", metavar="NAMESPACE/NAME", help="Only this one, in depth. Or its virtual address.")
@click.option("--since", type=options.duration, help="Only so long before the dataset's end.")
@click.option("--from", "begin", type=options.moment, metavar="TIME", help="Only from this time on (ISO 8601, UTC).")
@click.option("--to", "end", type=options.moment, metavar="TIME", help="Only up to this time.")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("--strict", is_flag=True, help="A file that cannot be read is an error, not a warning.")
def report(
    dataset: Path,
    service: str | None,
    since: float | None,
    begin: int | None,
    end: int | None,
    output_format: str,
    strict: bool,
) -> None:
    """Say which services of a DATASET are unevenly loaded beyond chance, why, and what to do about it.

    Of every service port: new connections, connection time and bytes per backend, against an even split; a verdict
    (balanced, uneven, inconclusive); and its causes, the most likely first.
    """
    if since is not None and (begin is not None or end is not None):
        raise UsageError("Give --since, or --from and --to.")
    from tracer.analysis import diagnose

    if since is not None:
        begin = diagnose.last_moment(dataset) - round(since * 1e9)
    with _progress() as progress:
        found = diagnose.diagnose(dataset, begin, end, service, strict=strict, progress=progress)
    for sentence in found.warnings:
        click.echo(f"vip-tracer: {printable(sentence)}", err=True)
    lines = {"json": _json, "csv": _csv, "table": _text}[output_format](found, service is not None)
    for text in lines:
        click.echo(text)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Something to tell how many of how many files are done: a bar, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, files: None
        return
    with click.progressbar(length=1, label="reading", file=sys.stderr) as bar:

        def tell(done: int, files: int) -> None:
            bar.length = files
            bar.update(done - bar.pos)

        yield tell


def _text(found: "Diagnosis", deep: bool) -> Iterator[str]:
    span = f"{_when(found.bins.begin_ns)} to {_when(found.bins.end_ns)}"
    yield f"{found.rows:,} rows of {len(found.nodes)} node{'s' * (len(found.nodes) != 1)}, {span}"
    yield ""
    for finding in found.findings:
        if deep or finding.verdict.word != "balanced":
            yield printable(_answer(finding))
    if not any(finding.verdict.word != "balanced" for finding in found.findings) and not deep:
        yield "Every service is balanced, as far as chance allows to tell."
    yield ""
    yield _SERVICES
    for finding in found.findings:
        yield printable(_line(finding))
    shown = found.findings if deep else [each for each in found.findings if each.verdict.word == "uneven"][:SHOWN]
    for finding in shown:
        yield ""
        yield from map(printable, _depth(finding))


def _answer(finding: "Finding") -> str:
    """The answer, in one sentence."""
    word = finding.verdict.word
    if finding.causes:
        return f"{finding.service} is {word}: {finding.causes[0].name}. {finding.causes[0].sentence}"
    if word == "uneven":
        return f"{finding.service} is uneven, and no cause was found. {finding.verdict.reasons[0]}"
    return f"{finding.service} is {word}. {finding.verdict.reasons[0]}"


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
        yield f"  {number}. {cause.name} (explains {cause.score:.0%}). {cause.sentence}"
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


def _json(found: "Diagnosis", _: bool) -> Iterator[str]:
    content = {
        "begin": _when(found.bins.begin_ns),
        "end": _when(found.bins.end_ns),
        "rows": found.rows,
        "nodes": found.nodes,
        "warnings": found.warnings,
        "services": [
            {
                "service": finding.service,
                "namespace": finding.port.namespace,
                "name": finding.port.name,
                "verdict": finding.verdict.word,
                "reasons": finding.verdict.reasons,
                "tests": [
                    {name: getattr(test, name) for name in ("measure", "effect", "ratio", "least", "p", "q", "picks")}
                    for test in finding.verdict.tests
                ],
                "causes": [
                    {
                        "name": cause.name, "score": cause.score, "sentence": cause.sentence, "remedy": cause.remedy,
                        "numbers": cause.numbers, "rows": cause.rows,
                    }
                    for cause in finding.causes
                ],
                "backends": json.loads(finding.backends.to_json(orient="records")),
            }
            for finding in found.findings
        ],
    }  # fmt: skip
    yield json.dumps(content, indent=1, default=str)


def _csv(found: "Diagnosis", _: bool) -> Iterator[str]:
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


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return ", ".join(map(str, value[:3])) + more
    return str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _when(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
