"""bpf/conntrack.h fed with messages made by hand, whole and damaged, and its map compared with the slow reference.

A datagram socket of a pair runs the very program on whatever is sent through it: a socket filter sees the payload from
its first byte, as it does on a netlink socket, and drops it.
"""

import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from conntrack_messages import (
    DESTROY,
    GRE,
    HEADERS,
    ICMP,
    NEW,
    SCTP,
    TCP,
    UDP,
    V4,
    V6,
    WANTED,
    Entry,
    Node,
    Row,
    any_entry,
    attribute,
    damaged,
    encode,
    reference_entry,
    translation_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import ENDED_UNTOLD, TRANSLATION, Sizes
from tracer.lab.netns import Namespace
from tracer.record import TUPLE, Flag, Nat, NatSource

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack")

SO_ATTACH_BPF = 50  # include/uapi/asm-generic/socket.h; Python has no name for it
SIZES = Sizes(connections=256, translations=256, ring_bytes=1 << 16, listeners=64, namespaces=64)
#: Every message is counted as exactly one of these.
OUTCOMES = ("conntrack_new", "conntrack_destroy", "ignored_protocol", "malformed_events")
IPS_SEEN_REPLY, IPS_ASSURED, IPS_NAT_CLASH = 2, 4, 0x1000
#: Of a Row, what a NEW tells.
TOLD = Row._fields.index("created")
#: What damage leaves alone: subsystem and type, without which a NEW is another message.
SPARED = 16

seeds = st.integers(0, (1 << 64) - 1).map(random.Random)


class Outcome(NamedTuple):
    """What one message did."""

    counted: str  # of OUTCOMES
    keys: np.ndarray
    values: np.ndarray
    records: np.ndarray

    def rows(self) -> list[Row]:
        return translation_rows(self.keys, self.values)


class Filter:
    """The program by itself, in a namespace where nothing happens."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.receiver.setblocking(False)
        program = struct.pack("i", capture.program_descriptors()["conntrack_events"])
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()

    def translations(self) -> tuple[np.ndarray, np.ndarray]:
        return libbpf.map_items(self.capture.maps.translations, TUPLE, TRANSLATION)

    def forget(self) -> None:
        keys, _ = self.translations()
        for key in np.ascontiguousarray(keys, TUPLE):
            libbpf.map_delete(self.capture.maps.translations, key.tobytes())
        self.capture._ring.drain()

    def feed(self, message: bytes) -> Outcome:
        before = self.capture.maps.counters_now()
        self.sender.send(message)
        with pytest.raises(BlockingIOError):
            self.receiver.recv(1)  # nothing is ever queued
        after = self.capture.maps.counters_now()
        counted = [name for name in OUTCOMES for _ in range(after[name] - before[name])]
        assert len(counted) == 1, "every message is counted once"
        return Outcome(counted[0], *self.translations(), self.capture._ring.drain())


@pytest.fixture(scope="module")
def program() -> Iterator[Filter]:
    with (
        Namespace("idle") as namespace,
        Capture(Options(node_netns=namespace.path, only_netns=(namespace.path,), sizes=SIZES)) as capture,
    ):
        made = Filter(capture)
        yield made
        made.close()


def head(message: bytes) -> Row | str:
    """What the filter must make of a NEW: its first attributes are original, reply, a zone if there is one, and id."""
    at, kept, wanted = HEADERS, b"", [{1}, {2}, {12, 18}]
    while wanted and at + 4 <= len(message):
        length, kind = struct.unpack_from("<HH", message, at)
        if kind & 0x3FFF not in wanted.pop(0) or length < 4:
            return "malformed"
        if kind & 0x3FFF == 18:
            wanted.append({12})
        kept += attribute(kind, message[at + 4 : at + length])
        at += (length + 3) & ~3
    if wanted or at > len(message):
        return "malformed"
    # The filter takes the reply's protocol for granted.
    read = reference_entry(message[:HEADERS] + kept, WANTED, compare=False)
    return Row(*read[:TOLD]) if isinstance(read, Row) else read


def from_events(row: Row, created: int) -> Row:
    return Row(*row[:TOLD])._replace(source=NatSource.CONNTRACK, created=created)


def born(program: Filter, message: bytes) -> Outcome:
    program.forget()
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    outcome = program.feed(message)
    for created in outcome.values["created"]:
        assert before <= created <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert len(outcome.records) == 0
    return outcome


def ordinary(random: Random) -> Entry:
    """As events have them: the kernel writes a status into each."""
    return replace(any_entry(random), status=random.getrandbits(32))


@pytest.mark.parametrize("protocol", [TCP, UDP, SCTP, ICMP, GRE, 0, 33])
@pytest.mark.parametrize("entry", [V4, V6, replace(V4, zone=9), replace(V6, zone=65_535)])
def test_an_entry_is_born(program: Filter, entry: Entry, protocol: int) -> None:
    entry = replace(entry, protocol=protocol)
    outcome = born(program, entry.message())
    if protocol in WANTED:
        assert outcome.counted == "conntrack_new"
        assert outcome.rows() == [from_events(entry.row(), int(outcome.values["created"][0]))]
    else:
        assert (outcome.counted, len(outcome.keys)) == ("ignored_protocol", 0)


@pytest.mark.parametrize("direction", [1, 2])
def test_a_zone_of_one_direction_makes_no_translation(program: Filter, direction: int) -> None:
    outcome = born(program, replace(V4, zone=7, direction=direction).message())
    assert (outcome.counted, len(outcome.keys)) == ("malformed_events", 0)


@pytest.mark.parametrize("length", [1, 15, 16, 20, 52, 53, 80, 139])
def test_a_message_that_is_cut_off(program: Filter, length: int) -> None:
    outcome = born(program, V4.message()[:length])
    assert len(outcome.keys) == 0
    # Whose it would have been is byte 52.
    assert outcome.counted == "malformed_events" or (length <= 52 and outcome.counted == "ignored_protocol")


@settings(deadline=None, max_examples=300)
@given(seeds)
def test_whole_messages(program: Filter, random: Random) -> None:
    """Behind the id, whatever may come comes in any order."""
    entry = ordinary(random)
    attributes = entry.attributes()
    rest = attributes[3 if entry.zone == 0 else 4 :]
    random.shuffle(rest)
    message = entry.message(attributes[: len(attributes) - len(rest)] + rest)
    outcome = born(program, message)
    assert outcome.counted == ("conntrack_new" if entry.protocol in WANTED else "ignored_protocol")
    expected = [entry.row()] if entry.protocol in WANTED else []
    assert outcome.rows() == [from_events(row, int(outcome.values["created"][0])) for row in expected]
    if entry.protocol in WANTED:
        assert head(message) == Row(*entry.row()[:TOLD]), "the reference itself"


@settings(deadline=None, max_examples=1500)
@given(seeds)
def test_damaged_messages(program: Filter, random: Random) -> None:
    """A translation is made of what the reference reads there, or none is."""
    message = damaged(random, ordinary(random).message(), ordinary(random).message(), SPARED)
    outcome = born(program, message)
    if outcome.counted == "conntrack_new":
        expected = head(message)
        assert isinstance(expected, Row), expected
        assert outcome.rows() == [from_events(expected, int(outcome.values["created"][0]))]
    else:
        assert outcome.counted in ("ignored_protocol", "malformed_events")
        assert len(outcome.keys) == 0


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=1, max_size=400))
def test_random_bytes(program: Filter, data: bytes) -> None:
    assert len(born(program, data).keys) == 0


@settings(deadline=None, max_examples=300)
@given(seeds)
def test_the_end_of_an_entry(program: Filter, random: Random) -> None:
    """Its translation goes (or is marked, where a socket may still ask for it); a flow's record says how it was."""
    entry = replace(ordinary(random), protocol=random.choice(WANTED))
    created = int(born(program, entry.message()).values["created"][0])
    outcome = program.feed(entry.message(kind=DESTROY))
    assert outcome.counted == "conntrack_destroy"
    row, status = entry.row(), entry.status or 0
    young = entry.protocol == TCP and not status & IPS_ASSURED
    assert outcome.values["ended"].tolist() == ([1] if young else [])
    assert len(outcome.records) == (1 if row.nat & Nat.DNAT else 0)
    for record in outcome.records:
        assert bytes(record["tuple"]["src"]) + bytes(record["tuple"]["dst"]) == row.src + row.dst
        assert (bytes(record["backend"]), int(record["backend_port"])) == (row.backend, row.backend_port)
        assert (int(record["ct_id"]), int(record["ct_zone"])) == (row.ct_id, row.zone)
        assert int(record["started"]) == created
        assert bool(record["flags"] & Flag.PROVISIONAL) == young
        counted = entry.counters is not None and not entry.narrow  # events never had the old ones
        assert bool(record["flags"] & Flag.COUNTED) == counted
        measured = (row.bytes_sent, row.packets_sent, row.bytes_received, row.packets_received)
        names = ("bytes_sent", "packets_sent", "bytes_received", "packets_received")
        assert tuple(int(record[name]) for name in names) == (measured if counted else (0, 0, 0, 0))
        assert int(record["ct_state"]) == (row.state if entry.protocol == TCP else 0)
        assert int(record["ct_status"]) == status & 0xFF
        assert int(record["ct_left"]) == min(entry.timeout or 0, 0xFFFF)


@pytest.mark.parametrize("claimed", [False, True])
def test_a_refusal_without_room_is_a_loss_once_its_tuple_comes_again_unclaimed(program: Filter, claimed: bool) -> None:
    """Until then a socket may claim the entry, and tell of it."""
    program.forget()
    maps = program.capture.maps

    def feed(entry: Entry, *kinds: int) -> dict[str, int]:
        """Without draining: what the two counters say by now."""
        for kind in kinds:
            program.sender.send(entry.message(kind=kind))
        return {name: maps.counters_now()[name] for name in ("flows", "lost_flow_ring")}

    stood, before = replace(V4, protocol=TCP, status=IPS_SEEN_REPLY | IPS_ASSURED), feed(V4)
    while (counted := feed(stood, NEW, DESTROY))["lost_flow_ring"] == before["lost_flow_ring"]:
        assert counted["flows"] < before["flows"] + 1000, "the ring has room for 315"
    refused = replace(V4, protocol=TCP, status=IPS_SEEN_REPLY)
    assert feed(refused, NEW, DESTROY) == counted
    (key,), (value,) = program.translations()
    assert value["ended"] == ENDED_UNTOLD
    if claimed:
        value["conn_id"] = 1 << 50
        libbpf.map_update(maps.translations, key.tobytes(), value.tobytes())
    again = feed(replace(refused, id=V4.id + 1), NEW)
    assert again == {name: count + (not claimed) for name, count in counted.items()}
    program.forget()


@pytest.mark.parametrize("kinds", [(2, 1), (1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("which", [9, 10])
def test_counters_of_another_layout_are_none(program: Filter, which: int, kinds: tuple[int, int]) -> None:
    born(program, V4.message())
    odd = Node(which, [Node(kind, struct.pack(">Q", 77)) for kind in kinds])
    nodes = [odd if node.kind == which else node for node in V4.nodes()]
    outcome = program.feed(V4.message([encode(nodes)], kind=DESTROY))
    assert (outcome.counted, len(outcome.records)) == ("conntrack_destroy", 1)
    assert not outcome.records["flags"][0] & Flag.COUNTED
    assert outcome.records["bytes_sent"][0] == outcome.records["bytes_received"][0] == 0


@settings(deadline=None, max_examples=600)
@given(seeds)
def test_damaged_ends(program: Filter, random: Random) -> None:
    """No entry ends but the one that the message names; no number comes out that does not stand in it."""
    entry = replace(ordinary(random), protocol=random.choice(WANTED))
    other = replace(entry, sport=entry.sport ^ 1)
    message = damaged(random, entry.message(kind=DESTROY), ordinary(random).message(), SPARED)
    born(program, other.message())
    before = program.feed(entry.message())
    assert len(before.keys) == 2
    outcome = program.feed(message)
    assert outcome.counted != "conntrack_new"
    alive = {key.tobytes() for key, value in zip(outcome.keys, outcome.values, strict=True) if not value["ended"]}
    over = [row for key, row in zip(before.keys, before.rows(), strict=True) if key.tobytes() not in alive]
    assert len(over) <= 1
    assert len(outcome.records) <= (1 if says_clash(message) else len(over))
    for row in over:
        named = head(message[:4] + struct.pack("<H", NEW) + message[6:])
        assert isinstance(named, Row)
        assert identity(named) == identity(row)
    for record in outcome.records:
        if record["flags"] & Flag.COUNTED:
            for name in ("bytes_sent", "packets_sent", "bytes_received", "packets_received"):
                assert struct.pack(">Q", record[name]) in message
        else:
            assert record["bytes_sent"] == record["bytes_received"] == 0


def says_clash(message: bytes) -> bool:
    """Whether a status in it has the bit of entries that lost a race, of which only their end tells."""
    places = range(0, len(message) - 7, 4)
    return any(
        message[at : at + 4] == struct.pack("<HH", 8, 3) and message[at + 6] & IPS_NAT_CLASH >> 8 for at in places
    )


@pytest.mark.parametrize("known", [True, False])
def test_an_entry_that_lost_a_race_is_told_by_its_end(program: Filter, known: bool) -> None:
    """It has the tuple of one that is known, or was, and an id and a backend of its own."""
    loser = replace(V4, protocol=UDP, id=V4.id + 1, status=0x1AE | IPS_NAT_CLASH)
    program.forget()
    if known:
        created = int(born(program, replace(V4, protocol=UDP).message()).values["created"][0])
    outcome = program.feed(loser.message(kind=DESTROY))
    (record,) = outcome.records
    assert (int(record["ct_id"]), int(record["backend_port"])) == (loser.id, loser.row().backend_port)
    assert record["flags"] & Flag.OPENED
    assert int(record["started"]) == (created if known else 0)
    assert len(outcome.keys) == known
    assert not known or outcome.values["ct_id"][0] == V4.id
    for other in (replace(loser, status=0x1AE), replace(loser, protocol=TCP)):
        outcome = program.feed(other.message(kind=DESTROY))
        assert (outcome.counted, len(outcome.records)) == ("conntrack_destroy", 0)


def identity(row: Row) -> tuple[object, ...]:
    """What an entry is known by. What its reply says at the end is not looked at."""
    return row.src, row.dst, row.src_port, row.dst_port, row.protocol, row.zone, row.ct_id
