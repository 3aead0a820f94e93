"""Endpoints of many nodes as one, the time each was ready, and what coverage says was not watched."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer import schema
from tracer.analysis import endpoints, watched
from tracer.analysis.frames import frame
from tracer.analysis.partial import Bins

S = 10**9
BINS = Bins(100 * S, 200 * S, 10 * S)


def told(*rows: dict[str, object]) -> pa.Table:
    usual = {"node": "n", "run_id": "r", "dst_namespace": "shop", "dst_service": "web", "dst_port": 80,
             "protocol": "tcp", "virtual_ips": "10.96.0.1", "backend_ip": "10.0.0.1", "backend_port": 8080,
             "ready": True, "serving": True, "terminating": False, "session_affinity": "None",
             "internal_policy": "Cluster", "external_policy": "Cluster"}  # fmt: skip
    return pa.Table.from_pylist([usual | row for row in rows], schema=schema.arrow("endpoints"))


INTERVALS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 120), st.sampled_from(["10.0.0.1", "10.0.0.2"]), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(INTERVALS, st.randoms(use_true_random=False))
def test_what_many_nodes_tell_is_the_union_in_any_order(
    intervals: list[tuple[int, int, str, bool]], random: np.random.Generator
) -> None:
    rows = [
        {"node": f"n{i}", "started": begin * S, "ts": (begin + length) * S, "backend_ip": ip, "ready": ready}
        for i, (begin, length, ip, ready) in enumerate(intervals)
    ]
    tables = [told(row) for row in rows]
    random.shuffle(tables)
    found = frame(endpoints.together(tables, BINS))
    place = {("10.0.0.1", 8080): 0, ("10.0.0.2", 8080): 1}
    share = endpoints.ready(found, place, BINS)
    second = np.arange(100, 200)
    for (ip, _), at in place.items():
        there = np.zeros(100, bool)
        for begin, length, which, ready in intervals:
            there |= ready & (which == ip) & (second >= begin) & (second < begin + length)
        assert np.allclose(share[:, at], there.reshape(10, 10).mean(axis=1))
    # One row for each interval that touches no other of the same endpoint.
    for key, group in found.groupby(["backend_ip", "ready"]):
        began, ended = np.sort(group["started"]), np.sort(group["ts"])
        assert (began[1:] > ended[:-1]).all(), key


def test_a_service_that_changed_is_not_the_same_row() -> None:
    rows = [{"started": 100 * S, "ts": 150 * S}, {"started": 150 * S, "ts": 200 * S, "session_affinity": "ClientIP"}]
    assert len(endpoints.together([told(*rows)], BINS)) == 2
    assert len(endpoints.together([told(rows[0], rows[0] | {"ts": 200 * S})], BINS)) == 1


def test_no_endpoints_at_all() -> None:
    found = endpoints.together([], BINS)
    assert len(found) == 0
    assert endpoints.ready(frame(found), {("10.0.0.1", 8080): 0}, BINS).sum() == 0


def test_losses_and_gaps_of_each_node() -> None:
    rows = [
        ("a", 0, 60, 100, 10), ("a", 90, 120, 100, 0), ("a", 60, 70, 100, 0), ("b", 0, 120, 50, None),
        ("c", 30, 60, 0, 5),
    ]  # fmt: skip
    content = {name: pa.nulls(len(rows), schema.arrow("coverage").field(name).type) for name in watched.COLUMNS}
    content |= {"node": pa.array([row[0] for row in rows]).dictionary_encode()}
    for place, name in ((1, "started"), (2, "ts")):
        times = pa.array([row[place] * S for row in rows])
        content[name] = times.cast(schema.arrow("coverage").field(name).type)
    content |= {"emitted": pa.array([row[3] for row in rows]), "lost_ring": pa.array([row[4] for row in rows])}
    assert watched.losses(pa.table(content)) == {
        "a": (10, 300, 20.0, 100.0, 120 * S),
        "b": (0, 50, 0.0, 120.0, 120 * S),
        "c": (5, 0, 0.0, 30.0, 60 * S),
    }
