"""Figures of inequality, against their definitions, and loads per backend, client, node and zone."""

import numpy as np
import pytest
from analysis.situation_world import situation
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tracer.analysis import balance


def test_the_figures_of_an_even_load_and_of_one_that_is_all_on_one() -> None:
    even = balance.inequality(np.array([5.0, 5.0, 5.0, 5.0]))
    assert (even.ratio, even.variation, even.gini, even.jain) == (1, 0, 0, 1)
    one = balance.inequality(np.array([0.0, 0.0, 0.0, 8.0]))
    assert (one.ratio, one.gini, one.jain) == (4, 0.75, 0.25)
    assert one.variation == pytest.approx(np.sqrt(3))
    assert np.isnan(balance.inequality(np.zeros(3)).gini)


@given(arrays.arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 10**9).map(float)))
def test_gini_is_half_the_mean_difference_over_the_mean(loads: np.ndarray) -> None:
    found = balance.inequality(loads)
    if loads.sum() == 0:
        return
    differences = np.abs(loads[:, None] - loads[None, :]).mean()
    assert found.gini == pytest.approx(differences / (2 * loads.mean()), abs=1e-9)
    assert 1 / len(loads) - 1e-9 <= found.jain <= 1 + 1e-9


def test_a_row_per_backend_the_busiest_first() -> None:
    known = situation([
        {"backend": 0, "opened": 10, "duration_us": 6_000_000, "bytes": 100, "latency_us": 3000, "latencies": 10},
        {"backend": 2, "opened": 30, "duration_us": 600_000_000, "bytes": 300, "refused": 4, "bin": 1},
        {"backend": -1, "opened": 99},
    ])  # fmt: skip
    found = balance.per_backend(known)
    assert found["backend"].tolist() == ["pod-2", "pod-0", "pod-1"]
    assert found["connections"].tolist() == [30, 10, 0]
    assert found["connections_share"].tolist() == [0.75, 0.25, 0]
    assert found["open"].tolist() == [1.0, 0.01, 0.0]
    assert found["failures"].tolist() == [4, 0, 0]
    assert found["connect_ms"].iloc[1] == pytest.approx(0.3)
    assert np.isnan(found["connect_ms"].iloc[0])


def test_fair_shares_follow_who_was_ready_when() -> None:
    cells = [{"bin": b, "backend": 0, "opened": 10} for b in range(10)]
    ready = np.ones((10, 3))
    ready[:5, 2] = 0
    found = balance.per_backend(situation(cells, ready=ready)).set_index("backend")["fair_share"]
    assert found.to_dict() == pytest.approx({"pod-0": 5 / 12, "pod-1": 5 / 12, "pod-2": 1 / 6})


def test_loads_by_client_node_and_zone() -> None:
    known = situation([
        {"client": 0, "node": 0, "backend": 0, "opened": 10, "bytes": 5},
        {"client": 1, "node": 0, "backend": 1, "opened": 30, "bytes": 5},
        {"client": 1, "node": 1, "backend": 0, "opened": 5, "bytes": 5},
    ])  # fmt: skip
    known.backends["zone"] = ["a", "b", None]
    clients = balance.grouped(known, "client")
    assert clients[["client", "connections", "backends"]].to_numpy().tolist() == [
        ["client-1", 35, 2],
        ["client-0", 10, 1],
    ]
    assert balance.grouped(known, "node")["connections"].tolist() == [40, 5]
    assert balance.grouped(known, "zone")["connections"].tolist() == [30, 15]
    assert balance.depth(known).over_time["bytes"].sum() == 15
