"""From a dataset to findings: which service ports are unevenly loaded, beyond chance, and why.

Reads the three tables, has the connections counted, and asks balance, verdict and cause of every service port.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.analysis import balance, cause, gather, situations
from tracer.analysis.causes.hypothesis import Hypothesis
from tracer.analysis.causes.situation import MEASURES, Situation
from tracer.analysis.gather import Counted
from tracer.analysis.partial import Bins
from tracer.analysis.situations import ServicePort, Situations
from tracer.analysis.verdict import BALANCED, INCONCLUSIVE, UNEVEN, Test, Verdict, discoveries, test_of, verdict
from tracer.errors import NoDataError, TracerError
from tracer.store import reader

#: Counts files: `gather.local`, or another engine's.
Engine = Callable[[Sequence[Path], Bins], Generator[Counted, None, None]]
_ORDER = (UNEVEN, INCONCLUSIVE, BALANCED)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is found of one service port. `causes`: the most likely first; empty is an answer too.

    `backends` as `balance.per_backend` makes it.
    """

    port: ServicePort
    situation: Situation
    verdict: Verdict
    causes: tuple[Hypothesis, ...]
    backends: pd.DataFrame

    @property
    def service(self) -> str:
        """namespace/name:port/protocol, or the address."""
        return self.situation.service

    @property
    def severity(self) -> float:
        """How much it matters: the part of the load that would have to go elsewhere, and of how much load."""
        effect = max((test.effect for test in self.verdict.tests), default=0.0)
        return effect * math.log10(1 + float(self.backends["connections"].sum()))


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Findings by severity, uneven ones first; `warnings` are sentences on what was not, or not fully, seen.

    The range is that of `bins`; times are ns since the epoch.
    """

    findings: tuple[Finding, ...]
    bins: Bins
    rows: int
    nodes: tuple[str, ...]
    warnings: tuple[str, ...]


def diagnose(
    root: Path,
    begin_ns: int | None = None,
    end_ns: int | None = None,
    service: str | None = None,
    *,
    strict: bool = False,
    engine: Engine = gather.local,
    progress: Callable[[int, int], None] = lambda done, files: None,
) -> Diagnosis:
    """What a dataset says of its services in a range (default: all that coverage spans).

    Args:
        root: the dataset.
        begin_ns: rows whose interval ended after this.
        end_ns: and not after this.
        service: ``namespace/name`` or a virtual address: findings of this one only (all are tested, for false
            discovery must be reckoned over all).
        strict: a file that cannot be read is an error.
        engine: counts the files.
        progress: is told how many of how many files are done.

    Raises:
        NoDataError: no rows in the range, or not of this service.
        TracerError: a table cannot be read.
    """
    warnings: list[str] = []
    coverage = _table(root, "coverage", begin_ns, end_ns, strict, warnings)
    bins = _range(root, coverage, begin_ns, end_ns)
    paths = reader.files(root, "connections", bins.begin_ns, bins.end_ns + 1)
    done = 0

    def failed(error: TracerError) -> None:
        if strict:
            raise error
        warnings.append(f"Left out: {error}.")

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, len(paths))

    with contextlib.closing(engine(paths, bins)) as counted:
        part = gather.together(counted, bins, failed, one_more)
    rows = int(part.sum("rows").sum())
    if not rows:
        raise NoDataError(f"no rows between {_text(bins.begin_ns)} and {_text(bins.end_ns)} in {root}; widen the range")
    endpoints = _table(root, "endpoints", bins.begin_ns, bins.end_ns, strict, warnings)
    if not len(endpoints):
        warnings.append("There is no endpoints table: shares are expected of the backends that were seen.")
    known = Situations(part, _clipped(endpoints, bins), coverage)
    warnings += _unseen(known, coverage, endpoints)
    chosen = known.ports() if service is None else situations.matching(known.ports(), service)
    if service is not None and not chosen:
        raise NoDataError(
            f"no connections to a service {service} in this range; `vip-tracer report` lists those there are"
        )
    findings = sorted(
        _findings(known, set(chosen)), key=lambda f: (_ORDER.index(f.verdict.word), -f.severity, f.service)
    )
    nodes = tuple(sorted({str(source[0]) for source in part.sources}))
    return Diagnosis(tuple(findings), part.bins, rows, nodes, tuple(warnings))


def last_moment(root: Path) -> int:
    """When a dataset ends, by its last coverage, or else its last file: ns since the epoch. Raises NoDataError."""
    try:
        last = reader.files(root, "coverage")[-1]
    except NoDataError:
        return reader.span(root)[1]
    end = max(pc.max(batch["ts"]).cast(pa.int64()).as_py() for batch in reader.batches(last, "coverage", ["ts"]))
    return int(end)


def _findings(known: Situations, chosen: set[ServicePort]) -> Iterator[Finding]:
    """Tests everything first; then the situations of what was chosen are made again: all at once are too large."""
    tested: list[tuple[ServicePort, int, int]] = []
    tests: list[Test] = []
    for port, situation in known:
        mine = [test for measure in MEASURES if (test := test_of(situation, measure)) is not None]
        tested.append((port, len(tests), len(tests) + len(mine)))
        tests += mine
    adjusted = discoveries(tests)
    for port, first, last in tested:
        if port not in chosen:
            continue
        situation = known.of(port)
        said = verdict(situation, adjusted[first:last])
        causes = cause.hypotheses(situation, said.measures) if said.measures else []
        yield Finding(port, situation, said, tuple(causes), balance.per_backend(situation))


def _table(
    root: Path, table: str, begin_ns: int | None, end_ns: int | None, strict: bool, warnings: list[str]
) -> pa.Table:
    """A small table, of the range; without rows if there are no files."""
    try:
        paths = reader.files(root, table, begin_ns, None if end_ns is None else end_ns + 1)
    except NoDataError:
        paths = []
    batches: list[pa.RecordBatch] = []
    for path in paths:
        try:
            batches += reader.batches(path, table)
        except TracerError as error:
            if strict:
                raise
            warnings.append(f"Left out: {error}.")
    return pa.Table.from_batches(batches, schema=schema.arrow(table))


def _range(root: Path, coverage: pa.Table, begin_ns: int | None, end_ns: int | None) -> Bins:
    """The range asked for, within what coverage spans; without coverage, the hours that there are files of."""
    if len(coverage):
        first = pc.min(coverage["started"]).cast(pa.int64()).as_py()
        last = pc.max(coverage["ts"]).cast(pa.int64()).as_py()
    else:
        first, last = reader.span(root)
    begin, end = max(first, begin_ns or first), min(last, end_ns or last)
    if begin >= end:
        raise NoDataError(
            f"nothing in {root} between these times: it spans {_text(first)} to {_text(last)}; widen the range"
        )
    return gather.bins_for(begin, end)


def _clipped(endpoints: pa.Table, bins: Bins) -> pa.Table:
    """Only intervals that touch the range: an endpoint of yesterday is none of today's."""
    time = endpoints["ts"].type
    end, begin = (pa.scalar(at, pa.int64()).cast(time) for at in (bins.end_ns, bins.begin_ns))
    return endpoints.filter(pc.and_(pc.less(endpoints["started"], end), pc.greater(endpoints["ts"], begin)))


def _unseen(known: Situations, coverage: pa.Table, endpoints: pa.Table) -> list[str]:
    """Sentences on what coverage says was not seen."""
    said = []
    if not len(coverage):
        said.append("There is no coverage table: what was lost is not known.")
    if known.lost:
        said.append(f"{known.lost:.2%} of the rows were lost; coverage/ says at which stage.")
    for node, seconds in sorted(known.gaps.items(), key=lambda each: -each[1])[:3]:
        said.append(f"Node {node} was not observed for {seconds:,.0f} s in between.")
    watched = set(coverage["node"].unique().to_pylist())
    others = set(endpoints["backend_node"].unique().to_pylist()) - watched - {None}
    if others and watched:
        some = ", ".join(sorted(map(str, others))[:3]) + (" and more" if len(others) > 3 else "")
        said.append(f"{len(others)} nodes with endpoints were not traced ({some}): their clients are not in this.")
    return said


def _text(at_ns: int) -> str:
    return f"{pd.Timestamp(at_ns, unit='ns', tz='UTC'):%Y-%m-%d %H:%M:%S}Z"
