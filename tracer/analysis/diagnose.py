"""From a dataset to findings: which service ports are unevenly loaded, beyond chance, and why.

Reads the three tables, has the connections counted, and asks balance, verdict and cause of every service port.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.analysis import balance, cause, endpoints, gather, situations
from tracer.analysis.balance import Depth, Inequality
from tracer.analysis.causes.hypothesis import CALLED, Hypothesis, Rows, some
from tracer.analysis.causes.situation import MEASURES, Situation
from tracer.analysis.gather import Engine
from tracer.analysis.partial import Bins, Partial
from tracer.analysis.shared import Elsewhere
from tracer.analysis.situations import ServicePort, Situations
from tracer.analysis.verdict import (
    ALONE,
    BALANCED,
    INCONCLUSIVE,
    RATIO,
    UNEVEN,
    Test,
    Verdict,
    discoveries,
    test_of,
    verdict,
)
from tracer.analysis.watched import COLUMNS
from tracer.errors import NoDataError, TracerError, UsageError
from tracer.store import reader
from tracer.store.layout import HOUR_NS
from tracer.store.roots import Root

_ORDER = (UNEVEN, INCONCLUSIVE, BALANCED)
#: Cells of situations that are kept between testing and looking for causes, some 200 bytes each.
KEPT_CELLS = 1_000_000
#: The cause whose rows are not the service's: their clients dialled backends themselves.
PAST_THE_SERVICE = "bypass"
#: Nodes publish every few minutes. Rows that end this much before or after the others' are said.
SKEW_NS = 600 * 10**9


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is found of one service port. `causes`: the most likely first; empty is an answer too.

    `service`: namespace/name:port/protocol, or the address; `backends` as `balance.per_backend` makes it; `inequality`
    of each measure, over the backends that were to share it; `depth` is there if the load is uneven, or if the service
    was asked for; `note`: a sentence on the backends' load through other services, or empty.
    """

    port: ServicePort
    service: str
    verdict: Verdict
    causes: tuple[Hypothesis, ...]
    backends: pd.DataFrame
    inequality: Mapping[str, Inequality]
    depth: Depth | None
    note: str

    @property
    def headline(self) -> str:
        """Which backend stands out, of the measure that is most uneven; empty if none is uneven."""
        tests = [test for test in self.verdict.tests if test.measure in self.verdict.measures]
        if not tests:
            return ""
        # Where all measures are about as uneven, connections say it best: the others follow from them.
        most = max(test.effect for test in tests)
        worst = next(test for test in tests if test.effect > 0.8 * most)
        mine = self.backends[self.backends["endpoint"]]
        share = mine[f"{worst.measure}_share"] * len(mine)
        least = share.max() < RATIO
        name = mine["backend"].iloc[int(share.argmin() if least else share.argmax())]
        times = f"only {share.min():.2g}" if least else f"{share.max():.1f}"
        return f"{name} has {times} times its even share of the {CALLED[worst.measure]}"

    @property
    def answer(self) -> str:
        """The answer, in a sentence or two: verdict, who stands out, and why."""
        word, reason = self.verdict.word, self.verdict.reasons[0]
        first = self.causes[0] if self.causes else None
        if word == UNEVEN:
            why = f"Cause: {first.name}. {first.sentence}" if first else f"No cause found. {reason}"
            said = f"{self.headline}. {why}"
        else:
            said = reason
            if first and first.sentence not in reason:
                said += f" It may be {first.name}: {first.sentence}"
        mark = ":" if word == UNEVEN else "."
        return f"{self.service} is {word}{mark} {said} {self.note}".rstrip()

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
    root: Root,
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
        engine: counts the files: `gather.local`, or another.
        progress: is told how many of how many files are done.

    Raises:
        NoDataError: no rows in the range, or not of this service.
        TracerError: a table cannot be read.
    """
    warnings: list[str] = []

    def failed(error: TracerError) -> None:
        if strict:
            raise error
        warnings.append(f"Left out: {error}.")

    watched = _tables(root, "coverage", begin_ns, end_ns, failed, COLUMNS)
    coverage = pa.concat_tables([schema.arrow("coverage").empty_table().select(COLUMNS), *watched])
    coverage = endpoints.touching(coverage, begin_ns, end_ns)
    bins = _range(root, coverage, begin_ns, end_ns)
    paths = reader.files(root, "connections", bins.begin_ns, bins.end_ns + 1)
    with contextlib.closing(engine(paths, bins)) as counted:
        all_of_it = gather.together(counted, bins, lambda done: progress(done, len(paths)))
    for error in sorted(all_of_it.failures, key=str):
        failed(error)
    part = all_of_it.part
    rows = int(part.sum("rows").sum())
    if not rows and len(all_of_it.failures) == len(paths):
        raise all_of_it.failures[0]
    if not rows:
        raise NoDataError(f"no rows between {_text(bins.begin_ns)} and {_text(bins.end_ns)} in {root}; widen the range")
    told = _tables(root, "endpoints", bins.begin_ns, bins.end_ns, failed, endpoints.COLUMNS)
    ends = endpoints.together(told, part.bins)
    if not len(ends):
        warnings.append(
            "There is no endpoints table, which agents write that know the cluster (--kubeconfig, or in a pod): shares "
            "are expected of the backends that were seen."
        )
    known = Situations(part, ends, coverage)
    warnings += _unseen(known, coverage, ends, time.time_ns())
    chosen = known.ports() if service is None else situations.matching(known.ports(), service)
    if service is not None and not chosen:
        raise NoDataError(
            f"no connections to a service {service} in this range; `vip-tracer report` lists those there are"
        )
    findings = sorted(
        _findings(known, part, set(chosen), deep=service is not None),
        key=lambda f: (_ORDER.index(f.verdict.word), not f.note, -f.severity, f.service),
    )
    nodes = tuple(sorted({str(source[0]) for source in part.sources}))
    return Diagnosis(tuple(findings), part.bins, rows, nodes, tuple(warnings))


def last_moment(root: Root, failed: Callable[[TracerError], None]) -> int:
    """When a dataset ends, by its last coverage, or else its last file: ns since the epoch. Raises NoDataError.

    A file that cannot be read is told to `failed`, and the one before it asked.
    """
    try:
        paths = reader.files(root, "coverage")
    except NoDataError:
        return reader.span(root)[1]
    for path in reversed(paths):
        try:
            ends = [pc.max(batch["ts"]).cast(pa.int64()).as_py() for batch in reader.batches(path, "coverage", ["ts"])]
        except TracerError as error:
            failed(error)
        else:
            return int(max(ends))
    return reader.span(root)[1]


def first_moment(root: Root, begin_ns: int, end_ns: int, failed: Callable[[TracerError], None]) -> int:
    """When something was first watched at or after `begin_ns`, by coverage: ns since the epoch. `failed` as above."""
    starts = [
        pc.min(part["started"]).cast(pa.int64()).as_py()
        for part in _tables(root, "coverage", begin_ns, end_ns + 1, failed, ["started"])
        if len(part)
    ]
    return max(begin_ns, min(starts, default=begin_ns))


def _findings(known: Situations, part: Partial, chosen: set[ServicePort], deep: bool) -> Iterator[Finding]:
    """Tests everything first, for false discoveries are reckoned over all; then the causes of what was chosen.

    Situations are kept in between as far as `KEPT_CELLS` allows: all at once may be too large.
    """
    tested: list[tuple[ServicePort, int, int]] = []
    tests: list[Test] = []
    kept: dict[ServicePort, Situation] = {}
    room = KEPT_CELLS
    for port, situation in known:
        mine = [test for measure in MEASURES if (test := test_of(situation, measure)) is not None]
        tested.append((port, len(tests), len(tests) + len(mine)))
        tests += mine
        cells = len(situation.known)
        if port in chosen and cells <= room:
            kept[port] = situation
            room -= cells
    adjusted = discoveries(tests)
    elsewhere = Elsewhere(known, part)
    for port, first, last in tested:
        if port in chosen:
            situation = kept.pop(port) if port in kept else known.of(port)
            found = _finding(port, situation, adjusted[first:last], deep)
            yield dataclasses.replace(found, note=elsewhere.note(port, situation))


def _finding(port: ServicePort, situation: Situation, tests: Sequence[Test], deep: bool) -> Finding:
    said = verdict(tests) if tests or situation.entitled.sum() != 1 else ALONE
    said, found = cause.explained(situation, said)
    causes = [each if each.name == PAST_THE_SERVICE else _of_service(each, port) for each in found]
    entitled = situation.entitled
    return Finding(
        port=port,
        service=situation.service,
        verdict=said,
        causes=tuple(causes),
        backends=balance.per_backend(situation),
        inequality={measure: balance.inequality(situation.load(measure)[entitled]) for measure in MEASURES},
        depth=balance.depth(situation) if deep or said.word == UNEVEN else None,
        note="",
    )


def _of_service(hypothesis: Hypothesis, port: ServicePort) -> Hypothesis:
    """With a filter that selects its rows among those of all services."""
    of: Rows = (("dst_namespace", "==", port.namespace), ("dst_service", "==", port.name))
    if port.name is None:
        of = (("dst_ip", "==", port.address), ("dst_port", "==", port.port), ("protocol", "==", port.protocol))
    return dataclasses.replace(hypothesis, rows=(*of, *hypothesis.rows)) if hypothesis.rows else hypothesis


def _tables(
    root: Root,
    table: str,
    begin_ns: int | None,
    end_ns: int | None,
    failed: Callable[[TracerError], None],
    columns: Sequence[str],
) -> Iterator[pa.Table]:
    """The files of a small table that may tell of the range, each as a table; nothing if there are none.

    Their rows are intervals, and lie where those ended: what covers the range's end may be in the hour after it.
    """
    try:
        paths = reader.files(root, table, begin_ns, None if end_ns is None else end_ns + HOUR_NS)
    except NoDataError:
        return
    for path in paths:
        try:
            yield from [found.select(columns) for found in reader.tables(path, table, columns)]
        except TracerError as error:
            failed(error)


def _range(root: Root, coverage: pa.Table, begin_ns: int | None, end_ns: int | None) -> Bins:
    """The range asked for, within what coverage spans; without coverage, the hours that there are files of."""
    if len(coverage):
        first = pc.min(coverage["started"]).cast(pa.int64()).as_py()
        last = pc.max(coverage["ts"]).cast(pa.int64()).as_py()
    else:
        first, last = reader.span(root)
    begin, end = max(first, begin_ns or first), min(last, end_ns or last)
    if begin_ns is not None and end_ns is not None and begin_ns >= end_ns:
        raise UsageError(f"the range begins at {_text(begin_ns)}, which is not before its end, {_text(end_ns)}")
    if begin >= end:
        first, last = _span(root)
        raise NoDataError(
            f"nothing in {root} between these times: it spans {_text(first)} to {_text(last)}; widen the range"
        )
    interval = float(pc.max(coverage["interval_s"]).as_py() or 0.0) if len(coverage) else 0.0
    return gather.bins_for(begin, end, interval)


def _span(root: Root) -> tuple[int, int]:
    """What coverage spans in all; without it, the hours that there are files of."""
    spans = [
        (pc.min(part["started"]).cast(pa.int64()).as_py(), pc.max(part["ts"]).cast(pa.int64()).as_py())
        for part in _tables(root, "coverage", None, None, lambda _: None, ["started", "ts"])
        if len(part)
    ]
    return (min(first for first, _ in spans), max(last for _, last in spans)) if spans else reader.span(root)


def _unseen(known: Situations, coverage: pa.Table, ends: pa.Table, now_ns: int) -> list[str]:
    """Sentences on what coverage says was not seen."""
    said = []
    if not len(coverage):
        said.append("There is no coverage table: what was lost is not known.")
    gone = sum(each.lost for each in known.losses.values())
    if gone:
        part = gone / (gone + sum(each.emitted for each in known.losses.values()))
        said.append(f"{gone:,} rows ({part:.2%}) were lost; coverage/ says at which stage.")
    for node, each in sorted(known.losses.items(), key=lambda each: -each[1].gap_s)[:3]:
        if each.gap_s:
            said.append(f"Node {node} was not watched for {each.gap_s:,.0f} s in between.")
    spans = known.losses
    last = max((each.end_ns for each in spans.values()), default=0)
    usual = sorted(each.end_ns for each in spans.values())[(len(spans) - 1) // 2] if spans else 0
    ahead = sorted(node for node, each in spans.items() if each.end_ns - usual > SKEW_NS)
    behind = sorted(node for node, each in spans.items() if usual - each.end_ns > SKEW_NS)
    if last > now_ns + SKEW_NS:
        said.append(f"Rows end {(last - now_ns) / 60e9:,.0f} min from now: the clock of {_some(ahead)} may be ahead.")
    elif ahead:
        said.append(f"{_some(ahead)} {_has(ahead)} rows more than 10 min after most nodes: is the clock ahead?")
    if behind:
        said.append(
            f"{_some(behind)} {_has(behind)} no rows in the last {(usual - spans[behind[0]].end_ns) / 60e9:,.0f} min: "
            "stopped, or the clock behind?"
        )
    others = set(ends["backend_node"].unique().to_pylist()) - set(spans) - {None}
    if others and spans:
        said.append(
            f"{len(others)} node{'s' * (len(others) != 1)} with endpoints {'were' if len(others) != 1 else 'was'} not "
            f"traced ({_some(sorted(map(str, others)))}): their clients are not in this."
        )
    return said


def _some(names: Sequence[str]) -> str:
    return some(list(names)) or "some node"


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _text(at_ns: int) -> str:
    return f"{pd.Timestamp(at_ns, unit='ns', tz='UTC'):%Y-%m-%d %H:%M:%S}Z"
