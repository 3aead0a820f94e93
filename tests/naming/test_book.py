"""Whose an address was, and which service was meant: what must hold whatever is heard, and when."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from naming_world import (
    NOON,
    SECOND,
    Heard,
    book,
    endpoint,
    name_of,
    node,
    nodes,
    pod,
    sample_book,
    service,
    service_of,
    slice_,
)

from tracer.naming.book import EARLY_NS, LAG_NS, Book
from tracer.naming.objects import Pod, ServicePort, SlicePort

IP, OTHER_IP = "10.244.1.5", "10.244.2.5"
AFTER = NOON + SECOND


def gone(item: Pod, at_ns: int) -> Heard:
    return Heard("pods", "delete", item, at_ns)


def test_a_pod_has_its_address_from_its_start_until_it_is_deleted() -> None:
    web = pod("web-0", IP, started_ns=NOON - 10 * SECOND)
    known = book(Heard("pods", "set", web, NOON), gone(web, NOON + 20 * SECOND))
    assert name_of(known, IP, NOON - 10 * SECOND - 1) is None
    assert name_of(known, IP, NOON - 10 * SECOND) == "web-0"
    assert name_of(known, IP, NOON + 20 * SECOND - 1) == "web-0"
    assert name_of(known, IP, NOON + 20 * SECOND) is None


def test_an_answer_has_workload_node_and_zone() -> None:
    known = book(Heard("pods", "set", pod("web-0", IP, workload="statefulset/web")))
    assert tuple(known.whose(b"\0" * 10 + b"\xff\xff" + bytes([10, 244, 1, 5])).at(AFTER) or ()) == (
        ("shop", "web-0", "statefulset/web", "node1", "a", False)
    )


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_pod_has_no_address(phase: str) -> None:
    web = pod("web-0", IP)
    done = dataclasses.replace(web, phase=phase)
    known = book(Heard("pods", "set", web), Heard("pods", "set", done, NOON + 5 * SECOND))
    assert (name_of(known, IP, AFTER), name_of(known, IP, NOON + 5 * SECOND)) == ("web-0", None)


def test_a_host_network_pod_never_has_the_nodes_address() -> None:
    known = book(Heard("pods", "set", pod("proxy", "172.30.0.11", host_network=True, workload="daemonset/proxy")))
    assert name_of(known, "172.30.0.11", AFTER) is None
    found = known.pod("uid-proxy")
    assert found is not None
    assert known.describe(found)[:3] == ("shop", "proxy", "daemonset/proxy")


def test_a_reused_address_has_the_old_name_before_and_the_new_one_after() -> None:
    old, new = pod("old", IP), pod("new", IP, started_ns=NOON + 10 * SECOND)
    known = book(
        Heard("pods", "set", old), gone(old, NOON + 10 * SECOND), Heard("pods", "set", new, NOON + 12 * SECOND)
    )
    names = [name_of(known, IP, NOON + seconds * SECOND) for seconds in (0, 9, 10, 11, 12)]
    assert names == ["old", "old", "new", "new", "new"]


def test_while_both_may_have_it_neither_is_named() -> None:
    """The new pod's start, rounded down, is before the old one was heard to be deleted."""
    old, new = pod("old", IP), pod("new", IP, started_ns=NOON + 10 * SECOND)
    known = book(
        Heard("pods", "set", old), gone(old, NOON + 10 * SECOND + 700), Heard("pods", "set", new, NOON + 12 * SECOND)
    )
    at = [name_of(known, IP, NOON + 10 * SECOND + more) for more in (-1, 0, 699, 700)]
    assert at == ["old", "?", "?", "new"]


def test_a_pod_that_takes_a_leaving_pods_address_has_it() -> None:
    old, new = pod("old", IP), pod("new", IP, started_ns=NOON + 10 * SECOND)
    leaving = dataclasses.replace(old, deleted_ns=NOON + 5 * SECOND)
    known = book(
        Heard("pods", "set", old),
        Heard("pods", "set", leaving, NOON + 5 * SECOND),
        Heard("pods", "set", new, NOON + 12 * SECOND),
        gone(leaving, NOON + 20 * SECOND),
    )
    names = [name_of(known, IP, NOON + seconds * SECOND) for seconds in (9, 11, 12, 15, 25)]
    assert names == ["old", "?", "new", "new", "new"]


def test_two_living_pods_with_one_address_are_ambiguous_until_one_is_gone() -> None:
    known = book(Heard("pods", "set", pod("a", IP)), Heard("pods", "set", pod("b", IP), NOON + 5 * SECOND))
    assert (name_of(known, IP, AFTER), name_of(known, IP, NOON + 6 * SECOND)) == ("a", "?")
    known.apply([gone(pod("a", IP), NOON + 10 * SECOND)])
    assert [name_of(known, IP, NOON + s * SECOND) for s in (6, 11)] == ["?", "b"]


def test_a_pod_of_the_same_name_is_another_pod() -> None:
    first, second = pod("web-0", IP), pod("web-0", OTHER_IP, uid="another", started_ns=NOON + 9 * SECOND)
    known = book(Heard("pods", "set", first), Heard("pods", "set", second, NOON + 10 * SECOND))
    assert name_of(known, IP, NOON + 10 * SECOND) is None
    assert name_of(known, OTHER_IP, NOON + 9 * SECOND) == "web-0"
    assert known.pod("another") == second


def test_a_new_address_of_a_running_pod_is_its_own_from_when_it_is_heard() -> None:
    known = book(
        Heard("pods", "set", pod("web-0", IP, started_ns=NOON - 100 * SECOND)),
        Heard("pods", "set", pod("web-0", OTHER_IP, started_ns=NOON - 100 * SECOND), NOON + 5 * SECOND),
    )
    assert [name_of(known, OTHER_IP, NOON + s * SECOND) for s in (0, 5)] == [None, "web-0"]
    assert [name_of(known, IP, NOON + s * SECOND) for s in (0, 5)] == ["web-0", None]


def test_a_list_takes_away_what_it_does_not_name() -> None:
    known = book(
        Heard("pods", "all", [pod("a", IP), pod("b", OTHER_IP)]),
        Heard("pods", "all", [pod("b", OTHER_IP)], NOON + 9 * SECOND),
    )
    assert [name_of(known, IP, NOON + s * SECOND) for s in (8, 9)] == ["a", None]
    assert name_of(known, OTHER_IP, NOON + 9 * SECOND) == "b"
    assert known.synced == {"nodes", "pods"}


def test_pods_are_found_by_uid_static_uid_and_container_until_they_are_forgotten() -> None:
    web = pod("web-0", IP, static_uid="0a" * 16, containers=("c" * 64,))
    known = book(Heard("pods", "set", web), gone(web, NOON + SECOND))
    assert known.pod("uid-web-0") == known.pod("0a" * 16) == known.pod("?", "c" * 64) == web
    assert known.pod("?", "d" * 64) is None
    known.forget(NOON + 2 * SECOND + known.keep_ns)
    assert known.pod("uid-web-0") is None
    assert name_of(known, IP, NOON) is None
    assert [list(each) for each in (known.identities, known.virtual)] == [[], []]


def test_two_pods_that_claim_one_static_uid_are_nobody() -> None:
    known = book(*[Heard("pods", "set", pod(name, static_uid="0a" * 16)) for name in ("a", "b")])
    assert known.pod("0a" * 16) is None


def test_a_pod_of_another_node_is_told_by_its_slice() -> None:
    known = book(Heard("endpointslices", "set", slice_("web-x", endpoint(OTHER_IP, "web-1"))))
    who = known.whose(b"\0" * 10 + b"\xff\xff" + bytes([10, 244, 2, 5])).at(AFTER)
    assert who == ("shop", "web-1", None, "node2", "b", False)
    assert name_of(known, OTHER_IP, NOON - EARLY_NS) == "web-1"
    assert name_of(known, OTHER_IP, NOON - EARLY_NS - 1) is None


def test_a_local_pod_outranks_slices_once_it_is_heard() -> None:
    web = pod("web-0", IP, started_ns=NOON - 2 * SECOND)
    known = book(
        Heard("endpointslices", "set", slice_("s", endpoint(IP, "other")), NOON - 9 * SECOND), Heard("pods", "set", web)
    )
    names = [name_of(known, IP, NOON + s * SECOND) for s in (-3, -1, 0)]
    assert names == ["other", "?", "web-0"]


def test_a_slice_made_by_hand_without_a_uid_names_the_same_pod() -> None:
    web = pod("web-0", IP, started_ns=NOON - 2 * SECOND)
    known = book(
        Heard("endpointslices", "set", slice_("s", endpoint(IP, "web-0", uid=None))), Heard("pods", "set", web)
    )
    assert name_of(known, IP, NOON - SECOND) == "web-0"


def test_slices_that_agree_name_and_slices_that_differ_do_not() -> None:
    known = book(
        Heard("endpointslices", "set", slice_("s1", endpoint(OTHER_IP, "a"))),
        Heard("endpointslices", "set", slice_("s2", endpoint(OTHER_IP, "a", zone="c"), service="api")),
        Heard("endpointslices", "set", slice_("s3", endpoint(OTHER_IP), service="custom")),
    )
    assert name_of(known, OTHER_IP, AFTER) == "a"
    known.apply([Heard("endpointslices", "set", slice_("s4", endpoint(OTHER_IP, "b")), AFTER)])
    assert name_of(known, OTHER_IP, NOON + 2 * SECOND) == "?"


def test_an_endpoint_that_moves_to_another_slice_keeps_its_name() -> None:
    moving = endpoint(OTHER_IP, "a")
    known = book(
        Heard("endpointslices", "set", slice_("s1", moving)),
        Heard("endpointslices", "set", slice_("s1"), NOON + 100 * SECOND),
        Heard("endpointslices", "set", slice_("s2", moving), NOON + 101 * SECOND),
    )
    assert all(name_of(known, OTHER_IP, NOON + tenths * SECOND // 10) == "a" for tenths in range(980, 1030))


def test_an_address_that_went_to_another_pod_in_a_list_was_nobodys_since_the_last_news() -> None:
    known = book(
        Heard("endpointslices", "all", [slice_("s1", endpoint(OTHER_IP, "a"))]),
        Heard("endpointslices", "set", slice_("s2"), NOON + 10 * SECOND),
        Heard("endpointslices", "all", [slice_("s1", endpoint(OTHER_IP, "b"))], NOON + 50 * SECOND),
    )
    names = [name_of(known, OTHER_IP, NOON + s * SECOND) for s in (9, 10, 49, 50)]
    assert names == ["a", None, None, "b"]


def test_a_second_claim_takes_nothing_from_the_first_but_the_last_moment() -> None:
    known = book(
        Heard("endpointslices", "set", slice_("s1", endpoint(OTHER_IP, "a")), NOON - 90 * SECOND),
        Heard("endpointslices", "set", slice_("s2", endpoint(OTHER_IP, "b")), NOON),
    )
    assert [name_of(known, OTHER_IP, NOON - s * SECOND) for s in (30, 2, 1)] == ["a", "a", "?"]


def test_a_leaving_pods_address_may_be_another_nodes_pods() -> None:
    """As where a cloud hands out addresses: they are of no node in particular."""
    leaving = pod("old", IP, deleted_ns=NOON)
    known = book(
        Heard("pods", "set", leaving, NOON),
        Heard("endpointslices", "set", slice_("s", endpoint(IP, "new")), NOON + 5 * SECOND),
        gone(leaving, NOON + 9 * SECOND),
    )
    assert [name_of(known, IP, NOON + s * SECOND) for s in (4, 5, 10)] == ["old", "new", "new"]


def test_a_nodes_address_names_a_pod_only_by_port() -> None:
    api = slice_("api", endpoint("172.30.0.12", "apiserver"), ports=[SlicePort("https", 6443, 6)])
    known = book(Heard("endpointslices", "set", api))
    assert name_of(known, "172.30.0.12", AFTER, 6443) == "apiserver"
    assert name_of(known, "172.30.0.12", AFTER, 10250) is None
    assert name_of(known, "172.30.0.12", AFTER) is None
    who = known.whose(b"\0" * 10 + b"\xff\xff" + bytes([172, 30, 0, 12])).at(AFTER)
    assert who == (None, None, None, "node2", "b", False)


def test_until_the_nodes_are_known_any_address_may_be_a_nodes() -> None:
    known = Book()
    known.apply([Heard("endpointslices", "set", slice_("s", endpoint(OTHER_IP, "a")))])
    assert (name_of(known, OTHER_IP, AFTER), name_of(known, OTHER_IP, AFTER, 8080)) == (None, "a")
    known.apply([nodes(NOON)])
    assert name_of(known, OTHER_IP, AFTER) == "a"


def test_services_by_address_protocol_and_port() -> None:
    ports = (ServicePort("http", 80, 6, 30080), ServicePort(None, 53, 17))
    known = book(Heard("services", "set", service("web", "10.96.0.9", "fd00::9", "192.0.2.1", ports=ports)))
    assert {service_of(known, ip, 80, AFTER) for ip in ("10.96.0.9", "fd00::9", "192.0.2.1")} == {"web"}
    assert service_of(known, "10.96.0.9", 81, AFTER) is None
    assert service_of(known, "10.96.0.9", 53, AFTER) is None
    found = known.service(b"\0" * 10 + b"\xff\xff" + bytes([10, 96, 0, 9]), 17, 53).at(AFTER)
    assert found == ("shop", "web", None, False)


def test_a_node_port_is_the_services_on_nodes_and_where_this_node_rewrote_it() -> None:
    known = book(Heard("services", "set", service("web", "10.96.0.9", ports=(ServicePort("http", 80, 6, 30080),))))
    assert service_of(known, "172.30.0.12", 30080, AFTER) == "web"
    assert service_of(known, "8.8.8.8", 30080, AFTER) is None
    assert service_of(known, "127.0.0.1", 30080, AFTER, here=True) == "web"


def test_a_service_is_there_from_its_creation_and_a_new_one_with_its_address_is_another() -> None:
    old, new = service("old", "10.96.0.9"), service("new", "10.96.0.9", created_ns=NOON + 5 * SECOND)
    known = book(
        Heard("services", "set", dataclasses.replace(old, created_ns=NOON - 900 * SECOND)),
        Heard("services", "delete", old, NOON + 6 * SECOND),
        Heard("services", "set", new, NOON + 7 * SECOND),
    )
    names = [service_of(known, "10.96.0.9", 80, NOON + s * SECOND) for s in (-901, -900, 4, 5, 6)]
    assert names == [None, "old", "old", "?", "new"]


def test_a_renamed_port_and_an_added_address() -> None:
    before, after = (
        service("web", "10.96.0.9"),
        service("web", "10.96.0.9", "192.0.2.1", ports=(ServicePort("web", 80, 6),)),
    )
    known = book(Heard("services", "set", before), Heard("services", "set", after, NOON + 100 * SECOND))
    found = known.service(b"\0" * 10 + b"\xff\xff" + bytes([10, 96, 0, 9]), 6, 80)
    assert [(a.port if a else None) for a in found.answers] == [None, "http", "web"]
    assert found.breaks == (NOON, NOON + 100 * SECOND)
    assert service_of(known, "192.0.2.1", 80, NOON + 100 * SECOND - EARLY_NS) == "web"


def test_two_services_with_one_external_address_are_ambiguous() -> None:
    known = book(*[Heard("services", "set", service(name, "192.0.2.1")) for name in ("a", "b")])
    assert service_of(known, "192.0.2.1", 80, AFTER) == "?"


def test_what_is_remembered_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.naming.book.MAX_CACHED", 10)
    monkeypatch.setattr("tracer.naming.book.MAX_PORTS", 10)
    many = [endpoint(f"10.244.3.{i}", f"p{i}") for i in range(40)]
    known = book(Heard("endpointslices", "set", slice_("s", *many)))
    for i in range(40):
        name_of(known, f"10.244.3.{i}", AFTER)
        name_of(known, "10.244.3.0", AFTER, i)
        service_of(known, f"10.96.3.{i}", 80)
    assert max(len(known._whose), *map(len, known._whose.values()), len(known._services)) <= 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Heard("endpointslices", "set", slice_("s2", endpoint(OTHER_IP, "b"))), "?"),
        (Heard("endpointslices", "delete", slice_("s")), None),
        (Heard("endpointslices", "all", []), None),
        (Heard("pods", "set", pod("local", OTHER_IP)), "local"),
        (Heard("nodes", "set", node("node3", OTHER_IP)), None),
    ],
)
def test_an_answer_that_was_given_changes_with_what_it_depends_on(change: Heard, says: str | None) -> None:
    known = book(Heard("endpointslices", "set", slice_("s", endpoint(OTHER_IP, "a")), NOON - 9 * SECOND))
    assert name_of(known, OTHER_IP, NOON) == "a"
    known.apply([change])
    assert name_of(known, OTHER_IP, NOON) == says


def test_a_services_answer_changes_with_it() -> None:
    known = book()
    assert (service_of(known, "192.0.2.1", 80), service_of(known, "172.30.0.77", 30080)) == (None, None)
    known.apply([Heard("services", "set", service("web", "192.0.2.1", ports=(ServicePort("http", 80, 6, 30080),)))])
    assert (service_of(known, "192.0.2.1", 80), service_of(known, "172.30.0.77", 30080)) == ("web", None)
    known.apply([Heard("nodes", "set", node("node3", "172.30.0.77"))])
    assert service_of(known, "172.30.0.77", 30080) == "web"


def test_deleting_what_was_never_heard_of_is_nothing() -> None:
    items = {"pods": pod("x"), "services": service("x"), "endpointslices": slice_("x"), "nodes": node("x")}
    known = book(*[Heard(kind, "delete", item) for kind, item in items.items()])
    assert known.forgotten_early == 0


def test_a_real_cluster() -> None:
    known = sample_book()
    assert service_of(known, "10.96.20.20", 80) == "rweb-np"
    assert service_of(known, "172.30.0.11", 30090) == "rweb-np"
    assert name_of(known, "10.244.1.11", NOON) == "pod1"
    assert name_of(known, "10.244.2.101", NOON) == "rweb-64f565bf6d-twvx5"
    assert name_of(known, "172.30.0.11", NOON) is None


# One address after the other's: pods hold it in turn. Units are tenths of a second; everything is heard with a lag.
TURN = st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9))
TENTH = SECOND // 10


@given(st.lists(TURN, min_size=1, max_size=6), st.booleans())
def test_no_connection_to_a_local_pod_has_a_wrong_name(turns: list[tuple[int, ...]], graceful: bool) -> None:
    """Against the truth: who held the address when. Startup, lag and rounding may cost a name, not make one wrong."""
    heard: list[tuple[int, int, str, Pod]] = []
    truth: list[tuple[int, int, str]] = []
    now = NOON // TENTH
    for number, (gap, length, startup, set_lag, end_lag) in enumerate(turns):
        begin = now + gap
        now = end = begin + length
        started = (begin - startup) * TENTH // SECOND * SECOND
        mine = pod(f"p{number}", IP, started_ns=started)
        truth.append((begin * TENTH, end * TENTH, mine.name))
        heard.append((min(begin + set_lag, end), number, "set", mine))
        if graceful:
            leaving = dataclasses.replace(mine, deleted_ns=end * TENTH)
            heard.append((max(end - 5, min(begin + set_lag, end)), number, "set", leaving))
        heard.append((end + end_lag, number, "delete", mine))
    known = book(*[Heard("pods", what, item, at * TENTH) for at, _, what, item in sorted(heard, key=lambda h: h[0])])
    for begin, end, name in truth:
        for moment in range(begin, end, TENTH // 2):
            assert name_of(known, IP, moment) in (name, None, "?")
    if len(turns) == 1:
        assert all(name_of(known, IP, moment) == truth[0][2] for moment in range(*truth[0][:2], TENTH))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(12, 60), st.integers(0, 10), st.integers(0, 10)), max_size=6))
def test_no_connection_to_another_nodes_pod_has_a_wrong_name(turns: list[tuple[int, int, int, int]]) -> None:
    """The same for what only slices tell, heard with up to `LAG_NS`."""
    assert LAG_NS == 10 * TENTH
    heard: list[tuple[int, str]] = []
    truth: list[tuple[int, int, str]] = []
    now = NOON // TENTH
    for number, (gap, length, set_lag, end_lag) in enumerate(turns):
        begin = now + gap
        now = end = begin + length
        truth.append((begin * TENTH, end * TENTH, f"p{number}"))
        heard += [(begin + set_lag, f"+p{number}"), (end + end_lag, f"-p{number}")]
    living: list[str] = []
    changes = []
    for at, what in sorted(heard, key=lambda h: h[0]):
        living = [*living, what[1:]] if what[0] == "+" else [name for name in living if name != what[1:]]
        changes.append(
            Heard("endpointslices", "set", slice_("s", *(endpoint(OTHER_IP, name) for name in living)), at * TENTH)
        )
    known = book(*changes)
    for begin, end, name in truth:
        for moment in range(begin, end, TENTH // 2):
            assert name_of(known, OTHER_IP, moment) in (name, None, "?")
    if len(turns) == 1:
        assert name_of(known, OTHER_IP, truth[0][1] - 11 * TENTH) == "p0"


def test_between_two_endpoints_of_one_address_it_is_nobodys() -> None:
    """The rules of a node may lead to the first for a while after it was heard to be gone."""
    known = book(Heard("endpointslices", "set", slice_("s", endpoint(OTHER_IP, "web-1")), NOON))
    known.apply([Heard("endpointslices", "set", slice_("s"), NOON + 10 * SECOND)])
    known.apply([Heard("endpointslices", "set", slice_("s", endpoint(OTHER_IP, "web-2")), NOON + 12 * SECOND)])
    found = [name_of(known, OTHER_IP, NOON + s * SECOND) for s in (8, 10, 11, 12)]
    assert found == ["web-1", None, None, "web-2"]
