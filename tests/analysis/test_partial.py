"""Partial counts: against DuckDB's, and the same to the last digit in whatever order and on whatever machine."""

import itertools
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analysis import agents, by_duckdb, cases, habits
from analysis.counted import bins_of
from analysis.situation_world import as_dict
from datasets import publish
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer import schema
from tracer.analysis import diagnose, gather, page, partial
from tracer.analysis.gather import Counted
from tracer.analysis.partial import Bins, Partial
from tracer.cli import findings
from tracer.errors import NoDataError

BEGIN = 1_785_456_000 * 10**9
BINS = Bins(BEGIN, BEGIN + 600 * 10**9, 60 * 10**9)


def _some(*values: object) -> st.SearchStrategy[object]:
    return st.sampled_from(values)


#: A row's values: few different ones, nulls wherever the schema lets them be, times on both sides of the range's ends.
ROW = st.fixed_dictionaries({
    "node": _some("n1", "n2"),
    "ts": _some(0, 1, 2, 600, 601).flatmap(lambda s: st.integers(-2, 2).map(lambda ns: BEGIN + s * 10**9 + ns)),
    "opened": st.booleans(),
    "closed": st.booleans(),
    "role": _some("client", "forwarded", "server"),
    "protocol": _some("tcp", "udp"),
    "src_ip": _some("10.0.0.1", "10.0.0.2"),
    "dst_ip": _some("10.96.0.1", "10.0.1.1"),
    "dst_port": _some(80, 443),
    "backend_ip": _some("10.0.1.1", "10.0.1.2", None),
    "backend_port": _some(8080, None),
    "nat": _some("none", "dnat", "unknown"),
    "nat_source": _some("conntrack", "socket", None),
    "src_pod": _some("a", None),
    "src_namespace": _some("shop", None),
    "dst_namespace": _some("shop", None),
    "dst_service": _some("web", None),
    "dst_service_port": _some("http", None),
    "backend_pod": _some("web-0", "web-1", None),
    "result": _some("ok", "refused", "timeout", "unreachable", "reset", None),
    "connect_latency_us": _some(5, 0, None),
    "duration_us": _some(0, 7, 1_500_000, 2**40),
    "bytes_sent": _some(0, 3, 2**48, None),
    "bytes_received": _some(0, 9, None),
    "packets_received": _some(0, 2, None),
})  # fmt: skip


def table(rows: list[dict[str, object]]) -> pa.Table:
    arrays = []
    for field in schema.arrow("connections"):
        # What the counts do not read and must not be null: anything.
        anything = None if field.nullable else "" if field.type == schema.DICT else 0
        values = [row.get(field.name, anything) for row in rows]
        plain = pa.string() if field.type == schema.DICT else pa.int64() if field.type == schema.TIME else field.type
        arrays.append(pa.array(values, plain).cast(field.type))
    return pa.table(arrays, schema=schema.arrow("connections"))


def counted(rows: list[dict[str, object]]) -> Partial:
    return partial.of_table(table(rows).select(partial.COLUMNS).unify_dictionaries(), BINS)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=60))
def test_cells_are_those_of_another_program(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "rows.parquet"
        pq.write_table(table(rows), path)
        theirs = duckdb.execute(by_duckdb.query([path], BINS)).fetchall()
    assert as_dict(counted(rows)) == {row[:16]: dict(zip(partial.SUMS, row[16:], strict=True)) for row in theirs}


def test_a_whole_dataset_is_that_of_another_program(tmp_path: Path) -> None:
    world = cases.World(4)
    habits.heavy_client(world, 1.0)
    tables = agents.tables(world)
    bins = bins_of(tables)
    parts, paths = [], []
    for number, begin in enumerate(range(0, len(tables["connections"]), 1000)):
        paths.append(tmp_path / f"{number}.parquet")
        pq.write_table(tables["connections"].slice(begin, 1000), paths[-1], row_group_size=700)
        parts.append(gather.count(paths[-1], bins))
    assert len(parts) > 3
    theirs = duckdb.execute(by_duckdb.query(paths, bins)).fetchall()
    assert as_dict(gather.together(parts, bins).part) == {
        row[:16]: dict(zip(partial.SUMS, row[16:], strict=True)) for row in theirs
    }


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=4), data=st.data())
def test_the_order_of_merging_does_not_matter(groups: list[list[dict[str, object]]], data: st.DataObject) -> None:
    parts = [counted(group) for group in groups]
    whole = partial.merged([counted(list(itertools.chain(*groups)))])
    shuffled = data.draw(st.permutations(parts))
    cut = data.draw(st.integers(0, len(parts)))
    nothing = partial.nothing(BINS)
    halves = [partial.merged([nothing, *shuffled[:cut]]), partial.merged([nothing, *shuffled[cut:]])]
    for other in (partial.merged(shuffled), partial.merged(halves)):
        assert other.routes == whole.routes
        assert other.sources == whole.sources
        assert np.array_equal(other.keys, whole.keys)
        assert other.sums.keys() == whole.sums.keys()
        assert all(np.array_equal(other.sums[name], whole.sums[name]) for name in whole.sums)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=40))
def test_coarser_is_what_wider_bins_would_have_counted(rows: list[dict[str, object]]) -> None:
    wide = partial.of_table(table(rows).select(partial.COLUMNS).unify_dictionaries(), BINS.twice())
    assert as_dict(partial.coarser(counted(rows))) == as_dict(wide)


def test_more_cells_than_allowed_are_put_into_wider_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"node": "n1", "ts": BEGIN + (i % 10) * 60 * 10**9 + 2, "opened": False, "closed": False, "role": "client",
         "protocol": "tcp", "src_ip": f"10.0.0.{i % 7}", "dst_ip": "10.96.0.1", "dst_port": 80, "nat": "dnat",
         "duration_us": 1, "bytes_sent": i}
        for i in range(700)
    ]  # fmt: skip
    fine = counted(rows)
    assert len(fine) == 70
    monkeypatch.setattr(gather, "MOST_CELLS", 40)
    monkeypatch.setattr(gather, "WAITING_CELLS", 20)
    found = [gather.together(order, BINS).part for order in _orders([Counted(counted(rows[i::5])) for i in range(5)])]
    for each in found:
        assert each.bins.width_ns == 2 * BINS.width_ns
        assert as_dict(each) == as_dict(partial.coarser(fine))


def _orders(parts: list[Counted]) -> list[list[Counted]]:
    return [parts, parts[::-1], [*parts[2:], *parts[:2]]]


def test_null_bytes_are_unknown_and_not_zero() -> None:
    row = {"node": "n1", "ts": BEGIN + 5, "opened": True, "closed": True, "role": "client", "protocol": "tcp",
           "src_ip": "10.0.0.1", "dst_ip": "10.96.0.1", "dst_port": 80, "nat": "dnat", "duration_us": 1}  # fmt: skip
    found = counted([row, row | {"bytes_sent": 4, "bytes_received": 0}, row | {"bytes_sent": 4}])
    assert [int(found.sum(name).sum()) for name in ("rows", "bytes", "uncounted")] == [3, 8, 2]


def test_what_no_interval_can_have_is_cut() -> None:
    row = {"node": "n1", "ts": BEGIN + 5, "opened": True, "closed": True, "role": "client", "protocol": "tcp",
           "src_ip": "10.0.0.1", "dst_ip": "10.96.0.1", "dst_port": 80, "nat": "dnat", "duration_us": 2**64 - 1,
           "bytes_sent": 2**63, "bytes_received": 2**60}  # fmt: skip
    found = counted([row] * 100)
    assert int(found.sum("bytes").sum()) == 200 * partial.MOST
    assert int(found.sum("duration_us").sum()) == 100 * partial.MOST


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=60))
def test_whatever_the_rows_say_there_is_a_verdict_and_a_page(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as where:
        publish(Path(where), {"connections": table(rows)})
        try:
            found = diagnose.diagnose(Path(where))
        except NoDataError:
            return
        for form in findings.FORMATS.values():
            text = "\n".join(form(found, True))
            assert "nan" not in text.lower() or form is not findings.as_json
        assert page.render(found, where).endswith("</html>")
