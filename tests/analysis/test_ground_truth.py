"""The suite of `ground_truth` with few seeds, and what it must reach."""

from collections import Counter

import numpy as np
import pytest
from analysis import agents, cases, ground_truth, traffic
from analysis.world import World

from tracer import schema

#: All cases are judged in the fixture: two minutes on a slow machine that is busy.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def judged() -> list[ground_truth.Judged]:
    found = ground_truth.troubled(range(2), cases.STRENGTH)
    print(ground_truth.table(found), ground_truth.summary(found), sep="\n")  # noqa: T201  seen with -s
    return found


def test_the_right_cause_comes_first(judged: list[ground_truth.Judged]) -> None:
    clear = [j for j in judged if j.strength != "weak"]
    assert len(clear) >= 80
    assert sum(j.right for j in clear) >= 0.95 * len(clear), [j for j in clear if not j.right]


def test_a_weak_case_is_right_or_inconclusive(judged: list[ground_truth.Judged]) -> None:
    weak = [j for j in judged if j.strength == "weak"]
    assert len(weak) >= 40
    assert not [j for j in weak if not j.right and j.verdict != "inconclusive"]


def test_every_cause_is_found_at_least_once(judged: list[ground_truth.Judged]) -> None:
    assert {j.first for j in judged if j.right} == {*cases.CAUSES, ground_truth.ROUNDING}


@pytest.mark.parametrize("seed", range(20))
def test_a_balanced_service_is_not_called_uneven(seed: int) -> None:
    assert ground_truth.judge(cases.balanced_case(seed)).verdict != "uneven"


def test_hardly_any_of_many_small_balanced_services_is_called_uneven() -> None:
    said = Counter(ground_truth.small_services(7, 150))
    assert said["uneven"] <= 1, said
    assert said["balanced"] >= 30, said


def test_tables_are_of_the_schema_and_add_up() -> None:
    world = World(3)
    service = world.service("web", world.pods("web", 3))
    dials = traffic.joined(
        traffic.requests(world.rng, 200, traffic.shares(2, 0.0)), traffic.pools(world.rng, 2, 2, life_s=500.0)
    )
    world.dial(service, world.pods("client", 2), dials)
    tables = agents.tables(world)
    for name, table in tables.items():
        table.validate(full=True)
        assert table.schema.equals(schema.arrow(name))
        for field in schema.arrow(name):
            assert field.nullable or table[field.name].null_count == 0, field.name
    rows = tables["connections"].to_pandas()
    begins_in_range = (dials.at >= 0) & (dials.at < world.range_s)
    assert rows["opened"].sum() == begins_in_range.sum()
    ends = dials.at + dials.life
    assert rows["closed"].sum() == ((ends > 0) & (ends <= world.range_s)).sum()
    seen = np.clip(np.minimum(ends, world.range_s) - np.maximum(dials.at, 0), 0, None)[ends > 0].sum()
    assert rows["duration_us"].sum() / 1e6 == pytest.approx(seen, rel=1e-4)
    assert rows["duration_us"].max() <= 60e6
    assert rows.groupby("conn_id")["opened"].sum().max() == 1
    ready = tables["endpoints"].to_pandas()
    spans = (ready["ts"] - ready["started"]).dt.total_seconds().groupby([ready["node"], ready["backend_ip"]]).sum()
    assert (spans.round(6) == world.range_s).all()


def test_kube_proxy_deals_evenly_and_a_frozen_one_does_not_follow() -> None:
    world = World(5)
    service = world.service("web", world.pods("web", 4))
    service.backends[3].joined = 1000.0
    clients = world.pods("client", 4)
    world.frozen[0] = 500.0
    dials = traffic.requests(world.rng, 20_000, traffic.shares(4, 0.0))
    got = world.dial(service, clients, dials)
    assert not ((got == 3) & (dials.node == 0)).any()
    assert not ((got == 3) & (dials.at < 1000.0)).any()
    late = np.bincount(got[(dials.at > 1003) & (dials.node != 0)], minlength=4)
    assert np.abs(late / late.sum() - 0.25).max() < 0.02
