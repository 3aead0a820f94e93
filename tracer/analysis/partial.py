"""Partial counts of connections: what is added up per file, and merged in any order and on any machine.

Only integers are summed, so the result does not depend on who summed what first. A cell is a bin of time, a route (a
service port and a backend of it) and a source (a client on a node); its sums are those of `situation.COUNTS`, which
are all sums over rows. Rows of role server are the other side of rows that are counted already, and left out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tracer.analysis.causes.situation import FAILURES
from tracer.analysis.coding import Coded, Ints, coded, numbered, summed

#: What tells routes apart. `plain`: dialled itself, nothing was rewritten; `socket`: rewritten at connect().
ROUTE = ("dst_namespace", "dst_service", "dst_service_port", "dst_ip", "dst_port", "protocol", "backend_ip",
         "backend_port", "backend_pod", "plain", "socket")  # fmt: skip
#: What tells sources apart.
SOURCE = ("node", "src_namespace", "src_pod", "src_ip")
#: Columns of connections that are read.
COLUMNS = (*ROUTE[:-2], *SOURCE, "ts", "role", "nat", "nat_source", "opened", "closed", "duration_us", "result",
           "bytes_sent", "bytes_received", "packets_received", "connect_latency_us")  # fmt: skip
#: What is summed for each cell: `situation.COUNTS`, rows, and rows whose bytes nobody counted, or whose backend is
#: not known.
SUMS = ("rows", "opened", "long_rows", "duration_us", "long_us", "failed_us", "bytes", "long_bytes", "uncounted",
        "unresolved", "latency_us", "latencies", *FAILURES)  # fmt: skip

#: Bits of a cell's key: the bin below, the source above it, the route on top. 2**21 routes, 2**28 sources.
_BIN_BITS, _SOURCE_BITS, _ROUTE_BITS = 14, 28, 21
MAX_BINS = 1 << _BIN_BITS
#: Bytes or microseconds of one row at the most: 281 TB, 9 years.
MOST = 1 << 48

Key = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Bins:
    """Time in bins of `width_ns` from `begin_ns` on; what is outside counts to the first or last of the `count`."""

    begin_ns: int
    end_ns: int
    width_ns: int

    @property
    def count(self) -> int:
        """How many there are."""
        return max(1, -(-(self.end_ns - self.begin_ns) // self.width_ns))

    def of(self, times_ns: Ints) -> Ints:
        """The bin of each time (n,)."""
        return np.asarray(np.clip((times_ns - self.begin_ns) // self.width_ns, 0, self.count - 1), dtype=np.int64)

    def twice(self) -> "Bins":
        """Bins twice as wide, each of two of these."""
        return Bins(self.begin_ns, self.end_ns, 2 * self.width_ns)


@dataclasses.dataclass(frozen=True)
class Partial:
    """Cells with distinct keys in ascending order: n keys, and n of each sum; one that is zero everywhere is left out.

    A key is made of the places in `routes` and `sources`, and the bin: `route`, `source` and `bin` take it apart.
    """

    bins: Bins
    routes: list[Key]
    sources: list[Key]
    keys: Ints
    sums: Mapping[str, Ints]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def route(self) -> Ints:
        """Place of each cell's route (n,)."""
        return self.keys >> (_BIN_BITS + _SOURCE_BITS)

    @property
    def source(self) -> Ints:
        """Place of each cell's source (n,)."""
        return (self.keys >> _BIN_BITS) & ((1 << _SOURCE_BITS) - 1)

    @property
    def bin(self) -> Ints:
        """Each cell's bin (n,)."""
        return self.keys & (MAX_BINS - 1)

    def sum(self, name: str) -> Ints:
        """A sum of each cell (n,)."""
        found = self.sums.get(name)
        return np.zeros(len(self.keys), dtype=np.int64) if found is None else found


def of_table(table: pa.Table, bins: Bins) -> Partial:
    """Counts rows: a table of `COLUMNS` whose dictionary columns have one dictionary each (`unify_dictionaries`).

    Only rows whose interval ends in (begin, end] of the bins count. A row with its connection's beginning is in the
    bin in which that began, any other in the bin in which its interval ended.
    """
    table = table.filter(_wanted(table, bins)).combine_chunks()
    codes = {name: coded(table, name) for name in ("nat", "nat_source", "result")}
    plain = _is(codes["nat"], "none")
    socket = _is(codes["nat_source"], "socket")
    columns = [coded(table, name) for name in ROUTE[:-2]]
    columns += [(flag.astype(np.int64), [False, True]) for flag in (plain, socket)]
    route, routes = _distinct(columns)
    source, sources = _distinct([coded(table, name) for name in SOURCE])
    opened = _plain(table, "opened").astype(bool)
    duration = _amount(table, "duration_us")
    times = _plain(table, "ts") - np.where(opened, duration * 1000, 1)
    bin_ = bins.of(times)
    cell, example = numbered([(route, len(routes)), (source, len(sources)), (bin_, bins.count)])
    keys = _packed(route[example], source[example], bin_[example])
    counts = _counts(table, codes["result"], opened, ~(opened & _plain(table, "closed").astype(bool)), duration)
    sums = {}
    for name, column in counts.items():
        added = summed(cell, column(), len(keys))
        if added.any():
            sums[name] = added
    return Partial(bins, routes, sources, keys, sums)


def nothing(bins: Bins) -> Partial:
    """No cells."""
    return Partial(bins, [], [], np.zeros(0, dtype=np.int64), {})


def merged(parts: Sequence[Partial]) -> Partial:
    """One of several with the same bins; the same, to the last digit, in whatever order they come."""
    if not parts:
        raise ValueError("nothing to merge")
    bins = parts[0].bins
    if any(part.bins != bins for part in parts):
        raise ValueError("partial counts of other bins cannot be merged")
    routes, route_codes = _united([part.routes for part in parts])
    sources, source_codes = _united([part.sources for part in parts])
    keys = np.concatenate(
        [
            _packed(new_route[part.route], new_source[part.source], part.bin)
            for part, new_route, new_source in zip(parts, route_codes, source_codes, strict=True)
        ]
    )
    names = [name for name in SUMS if any(name in part.sums for part in parts)]

    def joined(name: str) -> Ints:
        return np.concatenate([part.sum(name) for part in parts])

    return _reduced(bins, routes, sources, keys, names, joined)


def coarser(part: Partial) -> Partial:
    """The same with bins twice as wide."""
    keys = _packed(part.route, part.source, part.bin >> 1)
    return _reduced(part.bins.twice(), part.routes, part.sources, keys, part.sums, part.sum)


def _reduced(
    bins: Bins,
    routes: list[Key],
    sources: list[Key],
    keys: Ints,
    names: Iterable[str],
    column_of: Callable[[str], Ints],
) -> Partial:
    """Sums what has the same key. Columns are made one at a time: the peak is that of one.

    Sorting is quick here: keys are runs of sorted ones.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    first = np.flatnonzero(begins)
    sums = {}
    for name in names:
        column = column_of(name)
        if len(first) and column.any():
            sums[name] = np.add.reduceat(column[order], first)
    return Partial(bins, routes, sources, ordered[first], sums)


def _packed(route: Ints, source: Ints, bin_: Ints) -> Ints:
    return np.asarray((((route << _SOURCE_BITS) | source) << _BIN_BITS) | bin_, dtype=np.int64)


def _wanted(table: pa.Table, bins: Bins) -> pa.ChunkedArray:
    time = table["ts"].type
    inside = pc.and_(
        pc.greater(table["ts"], pa.scalar(bins.begin_ns, pa.int64()).cast(time)),
        pc.less_equal(table["ts"], pa.scalar(bins.end_ns, pa.int64()).cast(time)),
    )
    dialled = pc.is_in(table["role"].cast(pa.string()), pa.array(["client", "forwarded"]))
    return pc.and_(inside, dialled)


def _plain(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """A column of numbers, times or truths as integers; null is 0."""
    column = table[name].cast(pa.int64(), safe=False)
    return np.asarray(pc.fill_null(column, 0).to_numpy())


def _amount(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """A column of amounts; what no interval can have is cut, so that no sum runs over."""
    found = _plain(table, name)
    return np.where((found < 0) | (found > MOST), MOST, found)


def _is(column: Coded, text: str) -> npt.NDArray[np.bool_]:
    codes, texts = column
    return np.asarray(np.isin(codes, [code for code, known in enumerate(texts) if known == text]))


def _distinct(columns: Sequence[Coded]) -> tuple[Ints, list[Key]]:
    """Codes of the distinct rows of some columns of codes (n,), and those rows."""
    code, example = numbered([(codes, max(1, len(texts))) for codes, texts in columns])
    taken = [[texts[place] for place in codes[example].tolist()] for codes, texts in columns]
    return code, list(zip(*taken, strict=True))


def _united(tables: Sequence[list[Key]]) -> tuple[list[Key], list[Ints]]:
    """All distinct keys in a fixed order, and for each of the tables the new place of each old one."""
    known = sorted(set().union(*tables), key=_order)
    place = {key: number for number, key in enumerate(known)}
    return known, [np.fromiter((place[key] for key in table), dtype=np.int64, count=len(table)) for table in tables]


def _order(key: Key) -> tuple[tuple[bool, str, object], ...]:
    return tuple((each is not None, type(each).__name__, each if each is not None else 0) for each in key)


def _counts(
    table: pa.Table,
    result: Coded,
    opened: npt.NDArray[np.bool_],
    long: npt.NDArray[np.bool_],
    duration: Ints,
) -> dict[str, Callable[[], Ints]]:
    def null(name: str) -> npt.NDArray[np.bool_]:
        return np.asarray(pc.is_null(table[name]).to_numpy())

    def failed() -> Ints:
        # A row without an answer: no handshake, or (of a later row) no packet.
        tcp = _is(coded(table, "protocol"), "tcp")
        packets = (_plain(table, "packets_received") == 0) & ~null("packets_received")
        silent = np.where(opened, tcp & null("connect_latency_us"), packets)
        ended = np.isin(result[0], [code for code, text in enumerate(result[1]) if text in FAILURES])
        return np.where(ended | (silent & ~_is(result, "ok")), duration, 0)

    def moved() -> Ints:
        return np.asarray(_amount(table, "bytes_sent") + _amount(table, "bytes_received"), dtype=np.int64)

    def of(kind: str) -> Callable[[], Ints]:
        return lambda: _is(result, kind).astype(np.int64)

    return {
        "rows": lambda: np.ones(len(opened), dtype=np.int64),
        "opened": lambda: opened.astype(np.int64),
        "long_rows": lambda: long.astype(np.int64),
        "duration_us": lambda: duration,
        "long_us": lambda: np.where(long, duration, 0),
        "failed_us": failed,
        "bytes": moved,
        "long_bytes": lambda: np.where(long, moved(), 0),
        "uncounted": lambda: (null("bytes_sent") | null("bytes_received")).astype(np.int64),
        "unresolved": lambda: null("backend_ip").astype(np.int64),
        "latency_us": lambda: _plain(table, "connect_latency_us"),
        "latencies": lambda: (~null("connect_latency_us")).astype(np.int64),
    } | {kind: of(kind) for kind in FAILURES}
