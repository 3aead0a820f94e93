"""What a diagnosis says of what it did not see: clocks, nodes, gaps, the range."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from analysis import agents, cases, habits, traffic
from datasets import publish

from tracer.analysis import diagnose

MINUTE = 60 * 10**9


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    world = cases.World(4)
    habits.heavy_client(world, 1.0)
    return agents.tables(world)


def shifted(table: pa.Table, node: str, ns: int) -> pa.Table:
    """The table with the clock of one node ahead."""
    mine = pc.equal(table["node"].cast(pa.string()), node)
    for name in {"ts", "started"} & set(table.column_names):
        field = table.schema.field(name)
        moved = pc.add(table[name].cast(pa.int64()), ns).cast(field.type)
        table = table.set_column(table.schema.get_field_index(name), field, pc.if_else(mine, moved, table[name]))
    return table


def test_a_dataset_that_has_everything_has_no_warnings(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    publish(tmp_path, tables)
    found = diagnose.diagnose(tmp_path)
    assert found.warnings == ()
    assert found.findings[0].causes[0].name == "few-clients"


@pytest.mark.parametrize(
    ("minutes", "said"),
    [(40, "node-1 has rows more than 10 min after"), (-40, "node-1 has no rows in the last 40 min")],
)
def test_a_clock_that_differs_is_said_and_changes_no_verdict(
    minutes: int, said: str, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    publish(tmp_path, {name: shifted(table, "node-1", minutes * MINUTE) for name, table in tables.items()})
    found = diagnose.diagnose(tmp_path)
    assert any(said in sentence for sentence in found.warnings), found.warnings
    assert (found.findings[0].verdict.word, found.findings[0].causes[0].name) == ("uneven", "few-clients")


def test_a_clock_in_the_future_is_said(
    tables: dict[str, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, tables)
    end = diagnose.last_moment(tmp_path, pytest.fail)
    monkeypatch.setattr(diagnose.time, "time_ns", lambda: end - 90 * MINUTE)
    assert any("Rows end 90 min from now" in sentence for sentence in diagnose.diagnose(tmp_path).warnings)


def test_nodes_that_were_not_traced_are_said(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    some = {
        name: table.filter(pc.not_equal(table["node"].cast(pa.string()), "node-2")) for name, table in tables.items()
    }
    publish(tmp_path, some)
    found = diagnose.diagnose(tmp_path)
    assert any("1 node with endpoints was not traced (node-2)" in sentence for sentence in found.warnings)
    assert "node-2" not in found.nodes


def test_a_gap_is_said(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    covered = tables["coverage"]
    ts, started = (covered[name].cast(pa.int64()) for name in ("ts", "started"))
    middle = (pc.min(started).as_py() + pc.max(ts).as_py()) // 2
    then = pc.and_(pc.less(started, middle), pc.greater(ts, middle))
    away = pc.and_(pc.equal(covered["node"].cast(pa.string()), "node-0"), then)
    publish(tmp_path, tables | {"coverage": covered.filter(pc.invert(away))})
    assert any("Node node-0 was not watched for 300 s in between" in s for s in diagnose.diagnose(tmp_path).warnings)


def test_the_range_is_exact(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    publish(tmp_path, tables)
    ts = tables["connections"]["ts"].cast(pa.int64()).to_numpy()
    begin, end = sorted(ts)[1000], sorted(ts)[3000]
    found = diagnose.diagnose(tmp_path, int(begin), int(end))
    assert found.rows == int(((ts > begin) & (ts <= end)).sum())
    opened = sum(int(each.backends["connections"].sum()) for each in found.findings)
    assert 0 < opened <= found.rows


@pytest.mark.parametrize("backends", [2, 6, 20, 100])
@pytest.mark.parametrize("seed", range(3))
def test_load_through_a_second_service_is_said_however_many_pods_share_the_first(
    backends: int, seed: int, tmp_path: Path
) -> None:
    world = cases.World(seed)
    pods = world.pods("web", backends)
    clients = world.pods("client", 5)
    each = 400
    for service, size in ((world.service("web", pods), each * backends), (world.service("admin", pods[:1]), each)):
        world.dial(service, clients, traffic.requests(world.rng, size, traffic.shares(5, 0.5)))
    publish(tmp_path, agents.tables(world))
    (note,) = (f.note for f in diagnose.diagnose(tmp_path).findings if f.service == "shop/web:80/tcp")
    assert f"But its backend {pods[0].name} gets " in note
    assert "of them come through other addresses (shop/admin:80/tcp)." in note
    assert 1.25 < float(note.partition(" times its even share")[0].split()[-1]) < 2.4


@pytest.mark.parametrize("seed", range(3))
def test_load_through_a_second_service_is_not_said_where_it_is_not_why(seed: int, tmp_path: Path) -> None:
    world = cases.World(seed)
    habits.heavy_client(world, 1.0)
    web = world.services[0]
    pods = [backend.pod for backend in web.backends]
    even = world.service("even", pods)
    clients = world.pods("other", 5)
    world.dial(even, clients, traffic.requests(world.rng, 20_000, traffic.shares(5, 0.5)))
    few = world.service("few", pods[:1])
    world.dial(few, clients, traffic.requests(world.rng, 200, traffic.shares(5, 0.5)))
    publish(tmp_path, agents.tables(world))
    notes = {f.service: f.note for f in diagnose.diagnose(tmp_path).findings}
    assert notes["shop/web:80/tcp"] == notes["shop/few:80/tcp"] == ""
