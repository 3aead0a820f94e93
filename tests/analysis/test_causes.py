"""Each family of causes by itself: what it says, how surely, of which rows; and that nothing makes a detector fail."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analysis import agents, cases, ground_truth, habits, traffic, troubles
from analysis.counted import of_tables
from analysis.situation_world import situation
from analysis.troubles import STRENGTH, Build
from analysis.world import World
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.analysis import cause
from tracer.analysis.causes import clients, explain, membership, missing, rounding
from tracer.analysis.causes.hypothesis import Hypothesis
from tracer.analysis.causes.situation import COUNTS, FAILURES, MEASURES


def found(build: Build, name: str, strength: str = "strong", seed: int = 11) -> tuple[Hypothesis, cases.Case]:
    """The hypothesis of that name about a troubled service; it must come first."""
    case = cases.troubled(build, name, strength, seed)
    known = of_tables(case.tables, "shop/web")
    first = cause.hypotheses(known, ground_truth.said_of(known).measures)[0]
    assert first.name == name
    return first, case


# -- the arithmetic --------------------------------------------------------------------------------------------------


def test_distance_is_the_part_that_would_have_to_move() -> None:
    assert explain.distance(np.array([3.0, 1.0]), np.array([1.0, 1.0])) == pytest.approx(0.25)
    assert explain.distance(np.zeros(2), np.ones(2)) == 0


@pytest.mark.parametrize(("backends", "picks"), [(2, 50), (5, 200), (8, 40)])
def test_distance_by_chance_is_what_simulation_gives(backends: int, picks: int) -> None:
    rng = np.random.default_rng(1)
    fair = np.arange(1.0, backends + 1)
    dealt = rng.multinomial(picks, fair / fair.sum(), 4000)
    simulated = np.mean([explain.distance(counts.astype(float), fair) for counts in dealt])
    assert explain.by_chance(fair, picks) == pytest.approx(simulated, rel=0.05)


def test_long_connections_are_one_pick_however_many_rows_they_have() -> None:
    rows = [{"bin": b, "long_rows": 1, "long_us": 60_000_000, "duration_us": 60_000_000} for b in range(10)]
    assert explain.units(situation(rows, range_s=600.0), "connection_time") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("after", "chance", "score"),
    [(0.0, 0.0, 1.0), (0.4, 0.01, 0.0), (0.1, 0.01, 0.75), (0.02, 0.02, 1.0), (0.4, 0.4, 0.0), (0.1, 0.3, 0.75)],
)
def test_what_chance_leaves_is_explained_unless_it_could_hide_everything(
    after: float, chance: float, score: float
) -> None:
    assert explain.Explained(0.4, after, chance).score == pytest.approx(score, abs=0.06)


# -- detectors -------------------------------------------------------------------------------------------------------


def test_stickiness_tells_habit_from_chance_and_from_a_whole_node() -> None:
    rng = np.random.default_rng(3)
    node = np.array([0, 0, 1, 1])
    free = rng.multinomial(500, [0.25] * 4, 4).astype(float)
    assert abs(clients.stickiness(free, node)[0]) < 0.02
    stuck = np.diag([500.0, 300.0, 200.0, 100.0])
    assert clients.stickiness(stuck, node)[0] == pytest.approx(1.0)
    one_backend_a_node = np.array([[500.0, 0], [300, 0], [0, 200], [0, 100]])
    assert clients.stickiness(one_backend_a_node, node)[0] == 0


def test_one_client_that_sticks_is_named() -> None:
    first, _ = found(habits.heavy_client, "few-clients")
    assert first.numbers["clients_that_stick"] == 1
    assert first.rows[0][0] == "src_pod"


@pytest.mark.parametrize(
    ("pod", "made_of"),
    [("web-7d9f8b6c5-x2x4z", "web-7d9f8b6c5"), ("db-0", "db-0"), ("a-b-c", "a-b-c"), (None, "None")],
)
def test_template_of_a_pod(pod: object, made_of: str) -> None:
    assert membership.template(pod) == made_of


def test_absence_is_only_claimed_where_chance_is_no_excuse() -> None:
    often = [{"bin": b, "backend": 0, "opened": 50} for b in range(10)]
    late = [{"bin": b, "backend": 1, "opened": 50} for b in range(4, 10)]
    rare = [{"bin": 5, "backend": 2, "opened": 1}]
    there = membership.presence(situation([*often, *late, *rare]))
    assert there[:, 0].all()
    assert not there[:4, 1].any()
    assert there[4:, 1].all()
    assert there[:, 2].all()


def test_missing_rows_go_where_they_are_lacking_and_no_further() -> None:
    fair = np.ones(3)
    assert missing.filled(np.array([10.0, 10.0, 0.0]), fair, 10.0).tolist() == [10, 10, 10]
    assert missing.filled(np.array([10.0, 10.0, 0.0]), fair, 0.0).tolist() == [10, 10, 0]
    half = missing.filled(np.array([10.0, 10.0, 0.0]), fair, 4.0)
    assert half.sum() == pytest.approx(24)
    assert half[2] == pytest.approx(4)


def test_rounding_to_five_decimals_matters_little_and_to_ten_never() -> None:
    for n in (2, 3, 100):
        assert rounding.rounded_shares(n, 5).sum() == pytest.approx(1.0)
    assert explain.distance(rounding.rounded_shares(319, 5), np.ones(319)) < 0.0003
    assert explain.distance(rounding.rounded_shares(5000, 5), np.ones(5000)) == pytest.approx(0.0031, abs=0.0002)
    assert explain.distance(rounding.rounded_shares(5000, 10), np.ones(5000)) < 1e-6


def test_rounding_is_blamed_for_no_more_than_it_can_do() -> None:
    n = 20_000
    shares = rounding.rounded_shares(n, 5)
    cells = [{"backend": i, "opened": round(1e9 * share)} for i, share in enumerate(shares)]
    (said,) = rounding.rounding(situation(cells, n_backends=n), "connections")
    assert said.score == pytest.approx(1.0, abs=0.01)
    skewed = [{"backend": i, "opened": 1000 if i < n / 2 else 10} for i in range(n)]
    (said,) = rounding.rounding(situation(skewed, n_backends=n), "connections")
    assert said.score < 0.05
    few = [{"backend": i, "opened": 10 * (i + 1)} for i in range(3)]
    assert not list(rounding.rounding(situation(few), "connections"))


def test_no_cause_is_an_answer() -> None:
    case = cases.troubled(troubles.unfair, cases.UNEXPLAINED, "strong", 4)
    known = of_tables(case.tables, "shop/web")
    said = ground_truth.said_of(known)
    assert said.word == "uneven"
    assert cause.hypotheses(known, said.measures) == []


def test_a_service_without_names_is_known_by_its_address() -> None:
    world = World(11)
    habits.heavy_client(world, STRENGTH["strong"])
    known = of_tables(agents.tables(world, named=False), world.services[0].virtual_ip)
    assert known.client_column == "src_ip"
    assert cause.hypotheses(known, ground_truth.said_of(known).measures)[0].name == "few-clients"


def test_a_backend_that_was_away_in_the_middle() -> None:
    ready = np.ones((10, 3))
    ready[3:8, 1] = 0
    cells = [
        {"bin": b, "backend": i, "opened": 60 // int(ready[b].sum())}
        for b in range(10)
        for i in range(3)
        if ready[b, i]
    ]
    known = situation(cells, ready=ready)
    said = ground_truth.said_of(known)
    (found,) = cause.hypotheses(known, said.measures)
    assert (said.word, found.name) == ("uneven", "unready-backend")
    assert found.sentence.startswith("pod-1 was not ready for 50% of the time")


# -- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "build"),
    [(truth, build) for truth, builds in cases.CAUSES.items() for build in builds if truth != "none"],
)
def test_evidence_selects_rows_of_the_service(truth: str, build: Build) -> None:
    first, case = found(build, truth)
    assert 0.4 <= first.score <= 1
    assert first.sentence.endswith(".")
    assert first.remedy.endswith((".", "?"))
    assert all(np.isfinite(value) for value in first.numbers.values())
    if truth == "loss" and not first.numbers["unresolved"]:
        return  # what was lost cannot be shown
    rows = case.tables["connections"]
    if first.rows:
        rows = rows.cast(_plain(rows)).filter(pq.filters_to_expression(list(first.rows)))
    assert len(rows) > 0


def _plain(table: pa.Table) -> pa.Schema:
    """The schema with plain strings: filters compare those."""
    return pa.schema([
        pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type, f.nullable)
        for f in table.schema
    ])  # fmt: skip


COUNT = st.integers(0, 2**40)
CELL = st.fixed_dictionaries(
    {"bin": st.integers(0, 9), "client": st.integers(0, 3), "node": st.integers(0, 2), "backend": st.integers(-1, 2),
     "direct": st.booleans(), "socket": st.booleans()} | dict.fromkeys(COUNTS, COUNT | st.integers(0, 3))
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    cells=st.lists(CELL, min_size=1, max_size=25),
    ready=st.none() | st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=30, max_size=30),
    flags=st.tuples(*[st.sampled_from([None, True, False])] * 3),
    protocol=st.sampled_from(["tcp", "udp"]),
    lost=st.floats(0, 1e9),
    name=st.text(min_size=1, max_size=30),
    zones=st.lists(st.sampled_from([None, "a", "b"]), min_size=6, max_size=6),
)
def test_nothing_makes_a_detector_fail(
    cells: list[dict[str, object]],
    ready: list[float] | None,
    flags: tuple[bool | None, ...],
    protocol: str,
    lost: float,
    name: str,
    zones: list[str | None],
) -> None:
    made = situation(cells)
    made.backends["pod"] = name
    made.backends["zone"] = zones[:3]
    more = {"ready": None if ready is None else np.array(ready).reshape(10, 3), "protocol": protocol,
            "lost": {"node-0": lost}, "gaps": {"node-0": lost / 2}, "clients": [name] * len(made.clients),
            "affinity": flags[0], "local": flags[1], "hinted": flags[2],
            "node_zones": zones[3 : 3 + len(made.nodes)]}  # fmt: skip
    whole = situation(cells, **more | {"backends": made.backends})
    for said in cause.hypotheses(whole, list(MEASURES)):
        assert 0 <= said.score <= 1
        assert all(np.isfinite(value) for value in said.numbers.values())
    assert set(ground_truth.said_of(whole).measures) <= set(MEASURES)


def test_cells_add_up_to_the_rows() -> None:
    world = World(8)
    service = world.service("web", world.pods("web", 3))
    dials = traffic.joined(
        traffic.requests(world.rng, 500, traffic.shares(3, 0.0)), traffic.pools(world.rng, 2, 2, life_s=400.0)
    )
    dials.fail(np.arange(20), "refused", 0.001)
    world.dial(service, world.pods("client", 3), dials)
    tables = agents.tables(world)
    known = of_tables(tables, "shop/web")
    rows = tables["connections"].to_pandas()
    assert known.load("connections").sum() == rows["opened"].sum()
    assert known.load("connection_time").sum() == rows["duration_us"].sum()
    assert known.load("bytes").sum() == rows["bytes_sent"].sum() + rows["bytes_received"].sum()
    assert {kind: known.cells[kind].sum() for kind in FAILURES} == {"refused": 20, "timeout": 0, "unreachable": 0}
    assert known.range_s == pytest.approx(3600)
    assert known.ready is not None
    assert known.ready.shape == (60, 3)
    assert (known.ready == 1).all()
    assert not known.direct.any()
