import dataclasses
import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from naming_world import NOON, SECOND, Heard, book, endpoint, pod, service, slice_

from tracer import schema
from tracer.naming import endpoints
from tracer.naming.book import Book
from tracer.naming.endpoints import COLUMNS, EndpointHistory
from tracer.naming.objects import ServicePort, SlicePort

WEB = ("shop", "web")
A, B = "10.244.1.5", "10.244.2.5"


def rows(known: Book, begin_s: float = 0, end_s: float = 100, *services: tuple[str, str]) -> list[dict[str, Any]]:
    columns = known.endpoints.rows(NOON + int(begin_s * SECOND), NOON + int(end_s * SECOND), services or [WEB])
    assert tuple(columns) == COLUMNS
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def spans(known: Book, begin_s: float = 0, end_s: float = 100, *more: str) -> list[tuple[Any, ...]]:
    """(pod, from, to, ...) of the rows, in seconds after noon."""
    return [
        (
            row["backend_pod"],
            (row["started"] - NOON) / SECOND,
            (row["ts"] - NOON) / SECOND,
            *(row[name] for name in more),
        )
        for row in rows(known, begin_s, end_s)
    ]


def at(seconds: float, *items: Any, what: str = "set") -> Heard:
    return Heard("endpointslices", what, slice_("s", *items), NOON + int(seconds * SECOND))


def web(**fields: Any) -> Heard:
    return Heard("services", "set", service("web", "10.96.0.9", **fields))


def test_the_columns_are_the_tables() -> None:
    assert [column.name for column in schema.ENDPOINTS if column.name not in ("node", "run_id")] == list(COLUMNS)


def test_a_row_says_all_there_is() -> None:
    known = book(
        web(
            ports=(ServicePort("http", 80, 6, 30080),),
            affinity="ClientIP",
            affinity_s=60,
            internal_policy="Local",
            external_policy="Local",
        ),
        Heard("pods", "set", pod("web-0", A, workload="statefulset/web")),
        at(
            0,
            endpoint(A, "web-0", ready=False, serving=True, terminating=True, hint_zones=("a", "b"), hint_nodes=("n",)),
        ),
    )
    (row,) = rows(known)
    assert row == {
        "ts": NOON + 100 * SECOND,
        "started": NOON,
        "dst_namespace": "shop",
        "dst_service": "web",
        "dst_service_port": "http",
        "dst_port": 80,
        "protocol": "tcp",
        "virtual_ips": "10.96.0.9",
        "node_port": 30080,
        "backend_ip": A,
        "backend_port": 8080,
        "backend_pod": "web-0",
        "backend_workload": "statefulset/web",
        "backend_node": "node2",
        "backend_zone": "b",
        "ready": False,
        "serving": True,
        "terminating": True,
        "hint_zones": "a,b",
        "hint_nodes": "n",
        "session_affinity": "ClientIP",
        "affinity_s": 60,
        "internal_policy": "Local",
        "external_policy": "Local",
    }


def test_only_the_services_asked_for() -> None:
    known = book(web(), at(0, endpoint(A, "a")))
    assert rows(known, 0, 100, ("shop", "other")) == []
    assert len(rows(known, 0, 100, ("shop", "other"), WEB)) == 1


def test_ports_are_matched_by_name_and_protocol() -> None:
    ports = (ServicePort("http", 80, 6), ServicePort("dns", 53, 17), ServicePort("none", 1, 6))
    targets = [SlicePort("http", 8080, 6), SlicePort("dns", 5353, 17), SlicePort("none", 1, 17), SlicePort(None, 9, 6)]
    known = book(web(ports=ports), Heard("endpointslices", "set", slice_("s", endpoint(A, "a"), ports=targets)))
    found = [(row["dst_port"], row["protocol"], row["backend_port"]) for row in rows(known)]
    assert found == [(53, "udp", 5353), (80, "tcp", 8080)]


def test_a_change_ends_a_row_and_begins_one_and_nothing_else_does() -> None:
    known = book(web(), at(0, endpoint(A, "a"), endpoint(B, "b")))
    known.apply([at(10, endpoint(A, "a", ready=False), endpoint(B, "b")), at(20, endpoint(A, "a", ready=False))])
    assert spans(known, 0, 100, "ready") == [
        ("a", 0, 10, True),
        ("a", 10, 100, False),
        ("b", 0, 20, True),
    ]


def test_a_changed_service_changes_the_rows_of_all_its_backends() -> None:
    known = book(web(), at(0, endpoint(A, "a"), endpoint(B, "b")))
    known.apply([dataclasses.replace(web(affinity="ClientIP", affinity_s=5), at_ns=NOON + 10 * SECOND)])
    assert spans(known, 0, 50, "session_affinity") == [
        ("a", 0, 10, "None"),
        ("a", 10, 50, "ClientIP"),
        ("b", 0, 10, "None"),
        ("b", 10, 50, "ClientIP"),
    ]


def test_an_endpoint_that_comes_back_was_away_in_between() -> None:
    known = book(web(), at(0, endpoint(A, "a")), at(10), at(20, endpoint(A, "a")))
    assert spans(known) == [("a", 0, 10), ("a", 20, 100)]


def test_a_move_to_another_slice_at_once_is_no_change() -> None:
    known = book(web(), at(0, endpoint(A, "a")))
    known.apply([at(10), Heard("endpointslices", "set", slice_("t", endpoint(A, "a")), NOON + 10 * SECOND)])
    assert spans(known) == [("a", 0, 100)]


def test_of_one_backend_in_two_slices_the_ready_one_counts() -> None:
    known = book(web(), at(0, endpoint(A, "a", ready=False)))
    known.apply([Heard("endpointslices", "set", slice_("t", endpoint(A, "a")), NOON + 10 * SECOND)])
    assert spans(known, 0, 100, "ready") == [("a", 0, 10, False), ("a", 10, 100, True)]


def test_a_service_that_is_gone_has_no_backends_and_leaves_nothing_behind() -> None:
    known = book(web(), at(0, endpoint(A, "a")))
    known.apply([at(10, what="delete"), Heard("services", "delete", service("web"), NOON + 20 * SECOND)])
    assert spans(known) == [("a", 0, 10)]
    known.forget(NOON + 30 * SECOND + known.keep_ns)
    assert spans(known) == []
    assert (known.endpoints._states, known.endpoints._weight) == ({}, 0)


def test_slices_may_come_before_their_service() -> None:
    known = book(at(0, endpoint(A, "a")), dataclasses.replace(web(), at_ns=NOON + 5 * SECOND))
    assert spans(known) == [("a", 5, 100)]


def test_too_many_past_states_are_forgotten_oldest_first_and_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(endpoints, "MAX_WEIGHT", 20)
    known = book(web())
    known.apply(at(seconds, endpoint(A, "a", ready=seconds % 2 == 0)) for seconds in range(50))
    assert known.endpoints._weight <= 20
    assert known.forgotten_early > 30
    assert spans(known, 0, 50)[-1] == ("a", 49, 50)


def test_an_unchanged_list_changes_nothing() -> None:
    known = book(web(), at(0, endpoint(A, "a")))
    known.apply([Heard("endpointslices", "all", [slice_("s", endpoint(A, "a"))], NOON + 10 * SECOND)])
    assert len(known.endpoints._states[WEB]) == 1


STATES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("st"), st.dictionaries(st.sampled_from([A, B]), st.booleans())),
    max_size=12,
)


@given(STATES, st.lists(st.integers(0, 40), max_size=4))
def test_consecutive_calls_tile_time_and_say_at_each_moment_what_was(
    changes: list[tuple[int, str, dict[str, bool]]], cuts: list[int]
) -> None:
    """Against a naive oracle: the state of both slices at each second."""
    known = book(web())
    current: dict[str, dict[str, bool]] = {"s": {}, "t": {}}
    truth: dict[int, dict[str, bool]] = {}
    now = 0
    for gap, name, state in changes:
        for second in range(now, now + gap):
            truth[second] = _merged(current)
        now += gap
        current[name] = state
        made = slice_(name, *(endpoint(ip, ip, ready=ready) for ip, ready in state.items()))
        known.apply([Heard("endpointslices", "set", made, NOON + now * SECOND)])
    for second in range(now, 41):
        truth[second] = _merged(current)
    edges = sorted({0, 41, *cuts})
    found = [row for begin, end in itertools.pairwise(edges) for row in rows(known, begin, end)]
    for second in range(41):
        moment = NOON + second * SECOND
        there = [row for row in found if row["started"] <= moment < row["ts"]]
        assert len({row["backend_ip"] for row in there}) == len(there)
        assert {row["backend_ip"]: row["ready"] for row in there} == truth[second]
    whole = rows(known, 0, 41)
    assert sum(row["ts"] - row["started"] for row in found) == sum(row["ts"] - row["started"] for row in whole)
    together = {}
    for row in whole:  # no two rows of one call that follow each other are the same
        before = together.get(row["backend_ip"])
        assert before is None or before["ts"] < row["started"] or before["ready"] != row["ready"]
        together[row["backend_ip"]] = row


def _merged(current: dict[str, dict[str, bool]]) -> dict[str, bool]:
    keys = current["s"].keys() | current["t"].keys()
    return {ip: any(state.get(ip, False) for state in current.values()) for ip in keys}


def test_time_that_goes_back_makes_no_overlap() -> None:
    history = EndpointHistory(10**12, lambda uid: None)
    for moment in (100, 50, 120):
        history.changed(WEB, moment, service("web"), (slice_("s", endpoint(A, "a", ready=moment == 50)),))
    found = history.rows(0, 200, [WEB])
    assert list(zip(found["started"], found["ts"], found["ready"], strict=True)) == [
        (100, 120, True),
        (120, 200, False),
    ]
