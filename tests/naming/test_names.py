from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from naming_world import (
    NOON,
    SECOND,
    Heard,
    book,
    endpoint,
    name_of,
    node,
    pod,
    records,
    sample_book,
    service,
    service_of,
    slice_,
)

from tracer.naming.book import Book
from tracer.naming.cgroups import Cgroups, Identity
from tracer.naming.distinct import distinct
from tracer.naming.fields import address_text
from tracer.naming.names import Namer, Names
from tracer.naming.objects import ServicePort, SlicePort
from tracer.record import RECORD, Flag, Nat, Role
from tracer.store.names import COLUMNS

CLIENT, BACKEND, REMOTE, VIP = "10.244.1.9", "10.244.1.5", "10.244.2.5", "10.96.0.9"


def cluster() -> Book:
    return book(
        Heard("services", "set", service("web", VIP, ports=(ServicePort("http", 80, 6, 30080),))),
        Heard("pods", "set", pod("cart-1", CLIENT, workload="deployment/cart")),
        Heard("pods", "set", pod("web-0", BACKEND, workload="statefulset/web")),
        Heard(
            "endpointslices", "set", slice_("s", endpoint(REMOTE, "web-1"), endpoint(BACKEND, "web-0", node="node1"))
        ),
    )


def name(known: Book, *rows: dict[str, Any], at: Any = NOON + SECOND, cgroups: Any = None) -> Names:
    starts = np.broadcast_to(np.asarray(at, dtype=np.int64), (len(rows),))
    return Namer(known, cgroups).name(records(*rows), starts)


def column(found: Names, name: str) -> list[str | None]:
    coded = found.columns[name]
    assert coded.codes.dtype == np.int32
    assert len(set(coded.texts)) == len(coded.texts)
    return [None if code < 0 else coded.texts[code] for code in coded.codes]


def row(found: Names, i: int = 0) -> list[str | None]:
    return [column(found, name)[i] for name in COLUMNS]


def test_all_ten_columns() -> None:
    found = name(
        cluster(), {"src": CLIENT, "dst": VIP, "backend": BACKEND}, {"src": CLIENT, "dst": VIP, "backend": REMOTE}
    )
    client = ["shop", "cart-1", "deployment/cart", "shop", "web", "http"]
    assert tuple(found.columns) == COLUMNS
    assert row(found) == [*client, "web-0", "statefulset/web", "node1", "a"]
    assert row(found, 1) == [*client, "web-1", None, "node2", "b"]
    assert not found.unnamed.any()
    assert not found.ambiguous.any()


def test_a_pod_dialled_directly_has_no_service() -> None:
    found = name(cluster(), {"src": CLIENT, "dst": BACKEND, "dst_port": 8080, "nat": Nat.NONE})
    assert row(found)[3:7] == [None, None, None, "web-0"]
    assert not found.unnamed.any()


def test_without_a_translation_there_is_no_backend() -> None:
    found = name(cluster(), {"src": CLIENT, "dst": VIP, "backend": BACKEND, "nat": Nat.UNKNOWN})
    assert row(found)[3:] == ["shop", "web", "http", None, None, None, None]


def test_each_row_as_of_its_connections_start() -> None:
    known = cluster()
    known.apply(
        [
            Heard("pods", "delete", pod("web-0", BACKEND), NOON + 10 * SECOND),
            Heard("endpointslices", "set", slice_("s", endpoint(REMOTE, "web-1")), NOON + 10 * SECOND),
            Heard("pods", "set", pod("db-0", BACKEND, started_ns=NOON + 20 * SECOND), NOON + 21 * SECOND),
        ]
    )
    seconds = [1, 15, 30, 9, 20]
    rows = [{"src": CLIENT, "dst": VIP, "backend": BACKEND}] * 5
    found = name(known, *rows, at=[NOON + s * SECOND for s in seconds])
    assert column(found, "backend_pod") == ["web-0", None, "db-0", "web-0", "db-0"]
    assert found.unnamed.tolist() == [False, True, False, False, False]


def test_names_change_when_the_book_does() -> None:
    known = cluster()
    namer = Namer(known)
    batch, starts = records({"src": "10.244.1.77", "dst": VIP, "backend": BACKEND}), np.array([NOON + SECOND])
    assert column(namer.name(batch, starts), "src_pod") == [None]
    known.apply([Heard("pods", "set", pod("late", "10.244.1.77", started_ns=NOON), NOON + 2 * SECOND)])
    assert column(namer.name(batch, starts), "src_pod") == ["late"]


def test_rewritten_rows_without_service_or_backend_are_unnamed() -> None:
    found = name(
        cluster(),
        {"dst": "10.96.9.9", "backend": BACKEND},
        {"dst": VIP, "backend": "10.244.7.7"},
        {"dst": "8.8.8.8", "nat": Nat.NONE},
        {"dst": VIP, "backend": BACKEND, "nat": Nat.SNAT | Nat.DNAT},
    )
    assert found.unnamed.tolist() == [True, True, False, False]


def test_a_backend_that_is_no_pod_is_not_unnamed() -> None:
    known = book(
        Heard("services", "set", service("kubernetes", VIP)),
        Heard(
            "endpointslices", "set", slice_("k", endpoint("172.30.0.10", node=None, zone=None), service="kubernetes")
        ),
    )
    found = name(known, {"dst": VIP, "backend": "172.30.0.10"})
    assert row(found)[4:] == ["kubernetes", "http", None, None, None, None]
    assert not found.unnamed.any()


def test_ambiguous_rows_have_no_name_and_are_told() -> None:
    known = cluster()
    known.apply([Heard("pods", "set", pod("twin", BACKEND), NOON)])
    found = name(known, {"dst": VIP, "backend": BACKEND})
    assert column(found, "backend_pod") == [None]
    assert (found.ambiguous.tolist(), found.unnamed.tolist()) == ([True], [True])


def test_node_ports() -> None:
    rows = [
        {"dst": "172.30.0.12", "dst_port": 30080, "backend": BACKEND},
        {"dst": "172.30.9.9", "dst_port": 30080, "backend": BACKEND},
        {"dst": "172.30.9.9", "dst_port": 30080, "backend": BACKEND, "role": Role.FORWARDED},
        {"dst": "127.0.0.1", "dst_port": 30080, "backend": BACKEND},
        {"dst": "::1", "dst_port": 30080, "backend": BACKEND},
        {"dst": "127.0.0.1", "dst_port": 30080, "nat": Nat.NONE},
    ]
    assert column(name(cluster(), *rows), "dst_service") == ["web", None, "web", "web", "web", None]


def test_a_backend_on_a_nodes_address_is_told_by_its_port() -> None:
    api = slice_("api", endpoint("172.30.0.12", "apiserver"), ports=[SlicePort("https", 6443, 6)])
    known = book(Heard("endpointslices", "set", api))
    to = {"dst": "172.30.0.12", "nat": Nat.NONE}
    found = name(
        known, to | {"backend_port": 6443}, to | {"backend_port": 22}, {"src": "172.30.0.12", "dst": "8.8.8.8"}
    )
    assert column(found, "backend_pod") == ["apiserver", None, None]
    assert column(found, "backend_node") == ["node2", "node2", None]
    assert column(found, "src_pod") == [None, None, None]


class Told(Cgroups):
    """Cgroups as they might be: 7 is a host-network pod's, 8 one's nobody has heard of, 9 no pod's."""

    def __init__(self, v1: bool = False) -> None:
        super().__init__(None)
        self.v1 = v1

    def by_process(self, cgroup_id: int) -> bool:
        return self.v1

    def of_cgroup(self, cgroup_id: int) -> Identity | None:
        return {7: Identity("uid-proxy", None), 8: Identity("uid-unheard", None)}.get(cgroup_id)

    def of_process(self, pid: int, begun_ns: int) -> Identity | None:
        return Identity("uid-proxy", None) if pid == 70 and begun_ns == 500 else None


def test_the_clients_cgroup_is_believed_before_its_address() -> None:
    known = cluster()
    known.apply([Heard("pods", "set", pod("proxy", "172.30.0.11", host_network=True), NOON)])
    rows = [
        {"src": "172.30.0.11", "cgroup_id": 7},
        {"src": CLIENT, "cgroup_id": 8},
        {"src": CLIENT, "cgroup_id": 9},
        {"src": CLIENT, "cgroup_id": 7, "role": Role.SERVER},
        {"src": "172.30.0.11"},
    ]
    found = name(known, *[{"dst": VIP, "backend": BACKEND} | each for each in rows], cgroups=Told())
    assert column(found, "src_pod") == ["proxy", None, "cart-1", "cart-1", None]
    assert found.unnamed.tolist() == [False, True, False, False, False]


def test_without_v2_the_process_tells() -> None:
    known = cluster()
    known.apply([Heard("pods", "set", pod("proxy", host_network=True), NOON)])
    rows = [
        {"src": CLIENT, "cgroup_id": 1, "pid": 70, "started": 900, "ts": 1000},
        {"src": CLIENT, "cgroup_id": 1, "pid": 70, "ts": 1000, "duration_ns": 500},
        {"src": CLIENT, "cgroup_id": 1, "pid": 71, "started": 500},
    ]
    assert column(name(known, *rows, cgroups=Told(v1=True)), "src_pod") == ["proxy", "proxy", "cart-1"]


def test_no_rows() -> None:
    found = name(cluster(), cgroups=Told())
    assert [len(coded.codes) for coded in found.columns.values()] == [0] * 10
    assert found.unnamed.shape == (0,)


ADDRESSES = st.sampled_from([CLIENT, BACKEND, REMOTE, VIP, "172.30.0.12", "10.96.20.20", "10.244.1.100", "8.8.8.8"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "src": ADDRESSES,
            "dst": ADDRESSES,
            "backend": ADDRESSES,
            "dst_port": st.sampled_from([80, 8080, 30090]),
            "backend_port": st.sampled_from([8080, 6443]),
            "nat": st.sampled_from([0, 1, 2, 4, 6]),
        }
    ),
    min_size=1,
    max_size=30,
)


@given(ROWS, st.lists(st.integers(-100, 100), min_size=30, max_size=30))
def test_a_batch_says_what_the_book_says_row_by_row(rows: list[dict[str, Any]], seconds: list[int]) -> None:
    known = sample_book()
    known.apply(
        [
            Heard("services", "set", service("web", VIP), NOON),
            Heard("pods", "set", pod("a", BACKEND, started_ns=NOON - 50 * SECOND), NOON - 40 * SECOND),
            Heard("pods", "delete", pod("a", BACKEND), NOON + 20 * SECOND),
            Heard("pods", "set", pod("b", BACKEND, started_ns=NOON + 50 * SECOND), NOON + 60 * SECOND),
            Heard("nodes", "set", node("node2", "172.30.0.12"), NOON),
        ]
    )
    starts = np.array([NOON + s * SECOND for s in seconds[: len(rows)]])
    found = name(known, *rows, at=starts)
    for i, (each, at) in enumerate(zip(rows, starts.tolist(), strict=True)):
        src, backend = (
            name_of(known, each[end], at, port) for end, port in (("src", 0), ("backend", each["backend_port"]))
        )
        dst = service_of(known, each["dst"], each["dst_port"], at)
        expected = [src, dst, None if each["nat"] == 0 else backend]
        got = [column(found, of)[i] for of in ("src_pod", "dst_service", "backend_pod")]
        assert got == [None if text == "?" else text for text in expected]


@settings(max_examples=50)
@given(st.binary(min_size=200, max_size=1000), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5))
def test_no_bytes_make_it_raise(data: bytes, starts: list[int]) -> None:
    batch = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
    found = Namer(cluster(), Cgroups(None)).name(batch, np.array(starts[: len(batch)]))
    assert all(len(coded.codes) == len(batch) for coded in found.columns.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1) | st.integers(0, 3)), max_size=40))
def test_distinct_rows(rows: list[tuple[int, int]]) -> None:
    words = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    first, number = distinct(words)
    assert (words[first][number] == words).all()
    assert len(first) == len(set(rows))


def test_flags_of_the_helper() -> None:
    made = records({"cgroup_id": 7}, {})
    assert [bool(flags & Flag.PROCESS) for flags in made["flags"]] == [True, False]
    assert address_text(bytes(made["tuple"]["src"][0])) == CLIENT
