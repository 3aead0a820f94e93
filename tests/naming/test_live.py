"""Rows are named late enough, and the account of what was not named is true."""

import dataclasses
from typing import Any

import numpy as np
from naming_world import NOON, SECOND, Heard, endpoint, node, pod, records, service, slice_

from tracer.naming.live import ENDPOINT_ROWS, PATIENCE_S, WAIT_S, LiveNames
from tracer.naming.objects import KINDS
from tracer.record import Nat


@dataclasses.dataclass
class State:
    synced: bool = True
    disconnected_ns: int | None = None
    heard_ns: int | None = NOON
    malformed: int = 0


class Script:
    """A source that tells what the test puts in."""

    def __init__(self) -> None:
        self.next: list[Heard] = []
        self.states = {kind: State() for kind in KINDS}
        self.running = False

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def changes(self) -> list[Heard]:
        told, self.next = self.next, []
        return told

    def state(self) -> dict[str, State]:
        return self.states


class World:
    """Live names whose clocks go when told to."""

    def __init__(self, **options: Any) -> None:
        self.source, self.seconds = Script(), 0.0
        self.live = LiveNames(
            self.source,
            monotonic=lambda: self.seconds,
            wall_ns=lambda: NOON + round(self.seconds * SECOND),
            **options,
        )
        self.live.start()

    def tell(self, *changes: Heard) -> None:
        self.source.next += changes
        self.live.hear()

    def sync(self) -> None:
        """The cluster: service web with two pods on another node; one pod here."""
        self.tell(
            Heard("nodes", "all", [node("node1", "172.30.0.11"), node("node2", "172.30.0.12", zone="b")]),
            Heard("pods", "all", [pod("client", "10.244.1.9", started_ns=NOON - 100 * SECOND)]),
            Heard("services", "all", [service("web", "10.96.0.9"), service("other", "10.96.0.10")]),
            Heard(
                "endpointslices",
                "all",
                [slice_("web-1", endpoint("10.244.2.1", "web-1"), endpoint("10.244.2.2", "web-2"))],
            ),
        )

    def name(self, *rows: dict[str, Any], at_ns: int = NOON) -> dict[str, list[str | None]]:
        batch = records(*rows)
        columns = self.live.name(batch, np.full(len(batch), at_ns, dtype=np.int64))
        return {
            key: [None if code < 0 else column.texts[code] for code in column.codes.tolist()]
            for key, column in columns.items()
        }

    def endpoints(self, begin: int, end: int) -> list[dict[str, Any]]:
        parts = list(self.live.endpoints(begin, end))
        return [dict(zip(part, row, strict=True)) for part in parts for row in zip(*part.values(), strict=True)]


def test_rows_wait_for_the_first_lists_but_not_for_ever() -> None:
    world = World()
    assert (world.live.hold_s(), world.live.state()) == (PATIENCE_S, "starting")
    world.seconds = PATIENCE_S - 5
    assert world.live.hold_s() == 5
    world.seconds = PATIENCE_S + 1
    assert (world.live.hold_s(), world.live.state()) == (WAIT_S, "starting")
    world.sync()
    assert (world.live.hold_s(), world.live.state()) == (WAIT_S, "current")


def test_rows_get_names_and_those_without_are_counted() -> None:
    world = World()
    world.sync()
    named = world.name({"backend": "10.244.2.1"}, {"backend": "10.244.2.77"}, {"dst": "192.0.2.1", "nat": Nat.NONE})
    assert named["src_pod"] == ["client"] * 3
    assert named["dst_service"] == ["web", "web", None]
    assert named["backend_pod"] == ["web-1", None, None]
    assert world.live.totals() == {
        "unnamed": 1, "ambiguous_names": 0, "names_malformed": 0, "names_forgotten": 0, "names_age_s": 0,
    }  # fmt: skip


def test_a_pod_that_is_heard_late_names_the_row_that_waited() -> None:
    world = World()
    world.sync()
    world.source.next = [Heard("pods", "set", pod("late", "10.244.1.30", started_ns=NOON), NOON + SECOND)]
    assert world.name({"src": "10.244.1.30"})["src_pod"] == ["late"]


def test_names_of_a_server_that_is_gone_are_stale_and_stay() -> None:
    world = World()
    world.sync()
    world.source.states["pods"] = State(disconnected_ns=NOON)
    world.seconds = 10
    assert world.live.state() == "current"
    world.seconds = 40
    assert (world.live.state(), world.live.totals()["names_age_s"]) == ("stale", 40)
    assert world.name({"backend": "10.244.2.1"})["dst_service"] == ["web"]


def test_endpoints_are_those_of_the_services_that_rows_were_about() -> None:
    world = World()
    world.sync()
    assert world.endpoints(NOON, NOON + SECOND) == []
    world.name({"backend": "10.244.2.1"})
    rows = world.endpoints(NOON, NOON + SECOND)
    assert {(row["dst_service"], row["backend_pod"]) for row in rows} == {("web", "web-1"), ("web", "web-2")}
    assert {(row["started"], row["ts"]) for row in rows} == {(NOON, NOON + SECOND)}
    world.seconds = 2 * 3600
    assert world.endpoints(NOON + SECOND, NOON + 2 * SECOND) == []


def test_endpoints_of_a_pod_that_is_dialled_itself() -> None:
    world = World()
    world.sync()
    world.name({"dst": "10.244.2.1", "dst_port": 8080, "nat": Nat.NONE})
    assert {row["dst_service"] for row in world.endpoints(NOON, NOON + SECOND)} == {"web"}


def test_many_endpoints_come_in_parts() -> None:
    world = World()
    world.sync()
    many = [endpoint(f"10.{100 + i // 65536}.{i // 256 % 256}.{i % 256}", f"p{i}") for i in range(ENDPOINT_ROWS)]
    world.tell(
        Heard("services", "set", service("big", "10.96.0.77")),
        Heard("endpointslices", "set", slice_("big-1", *many, service="big")),
    )
    world.name({"backend": "10.244.2.1"}, {"dst": "10.96.0.77", "backend": "10.100.0.1"})
    parts = [len(part["ts"]) for part in world.live.endpoints(NOON, NOON + SECOND)]
    assert parts == [ENDPOINT_ROWS, 2]


def test_close_ends_the_source() -> None:
    world = World()
    assert world.source.running
    world.live.close()
    assert not world.source.running
