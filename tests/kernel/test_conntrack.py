"""ctnetlink's dump: messages made by hand, damaged at random, and the kernel's own against conntrack(8)."""

import errno
import ipaddress
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.kernel import conntrack, netns
from tracer.lab.cluster import Cluster
from tracer.record import Nat, NatSource

TCP, UDP, ICMP, GRE = 6, 17, 1, 47
BOOT_NS = 123_456_789
DONE = struct.pack("<IHHIIi", 20, 3, 2, 1, 0, 0)


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(parts))


def error(code: int) -> bytes:
    return struct.pack("<IHHIIi", 36, 2, 0, 1, 0, -code) + bytes(16)


@dataclass(frozen=True)
class Entry:
    """One conntrack entry, and its message as ctnetlink_fill_info() writes it."""

    src: str = "10.0.0.1"
    dst: str = "10.96.0.1"
    sport: int = 40_000
    dport: int = 80
    back_src: str = "10.0.0.9"
    back_dst: str = "10.0.0.1"
    back_sport: int = 8080
    back_dport: int = 40_000
    protocol: int = TCP
    zone: int = 0
    id: int = 0xDEADBEEF

    def half(self, kind: int, src: str, dst: str, sport: int, dport: int) -> bytes:
        addresses = [ipaddress.ip_address(address) for address in (src, dst)]
        first = 1 if addresses[0].version == 4 else 3
        parts = [attribute(first + i, address.packed) for i, address in enumerate(addresses)]
        proto = [attribute(1, bytes([self.protocol]))]
        if self.protocol == ICMP:
            proto += [attribute(4, b"\0\1"), attribute(5, b"\x08"), attribute(6, b"\0")]
        elif self.protocol != GRE:
            proto += [attribute(2, struct.pack(">H", sport)), attribute(3, struct.pack(">H", dport))]
        return nest(kind, nest(1, *parts), nest(2, *proto))

    def original(self) -> bytes:
        return self.half(1, self.src, self.dst, self.sport, self.dport)

    def reply(self) -> bytes:
        return self.half(2, self.back_src, self.back_dst, self.back_sport, self.back_dport)

    def attributes(self) -> list[bytes]:
        return [
            self.original(),
            self.reply(),
            *([attribute(18, struct.pack(">H", self.zone))] if self.zone else []),
            attribute(3, struct.pack(">I", 0x1AE)),  # CTA_STATUS
            attribute(7, struct.pack(">I", 431_999)),  # CTA_TIMEOUT
            nest(9, attribute(1, bytes(8)), attribute(2, bytes(8))),  # CTA_COUNTERS_ORIG
            nest(4, nest(1, attribute(1, b"\3"))),  # CTA_PROTOINFO
            attribute(12, struct.pack(">I", self.id)),
            attribute(11, struct.pack(">I", 1)),  # CTA_USE
        ]

    def message(self, attributes: Iterable[bytes] | None = None) -> bytes:
        body = b"".join(self.attributes() if attributes is None else attributes)
        family = 2 if "." in self.src else 10
        return struct.pack("<IHHIIBBH", 20 + len(body), 0x100, 2, 1, 0, family, 0, 0) + body

    def seen(self) -> tuple[object, ...]:
        """As `rows` shows a decoded one."""
        nat = Nat.DNAT if (self.dst, self.dport) != (self.back_src, self.back_sport) else Nat.UNKNOWN
        nat |= Nat.SNAT if (self.src, self.sport) != (self.back_dst, self.back_dport) else Nat.UNKNOWN
        return (
            *(mapped(address) for address in (self.src, self.dst, self.back_src, self.back_dst)),
            *(self.sport, self.dport, self.back_sport, self.back_dport),
            *(self.protocol, self.zone, self.zone, self.id, nat or Nat.NONE, NatSource.DUMP, BOOT_NS),
        )


V4 = Entry()
V6 = Entry("fd00::1", "fd00:96::1", back_src="fd00::9", back_dst="fd00::1")


def mapped(address: str) -> bytes:
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def rows(entries: np.ndarray) -> list[tuple[object, ...]]:
    return [
        (
            *(bytes(raw) for raw in (key["src"], key["dst"], value["backend"], value["snat"])),
            *(int(n) for n in (key["src_port"], key["dst_port"], value["backend_port"], value["snat_port"])),
            *(int(n) for n in (key["protocol"], key["zone"], value["zone"], value["ct_id"])),
            *(int(n) for n in (value["nat"], value["source"], value["created"])),
        )
        for key, value in zip(entries["key"], entries["value"], strict=True)
    ]


def decoded(data: bytes, **options: tuple[int, ...]) -> tuple[list[tuple[object, ...]], int]:
    entries, malformed = conntrack.decode(data, BOOT_NS, **options)
    return rows(entries), malformed


@pytest.mark.parametrize(
    "entry",
    [
        V4,
        V6,
        replace(V4, zone=7),
        replace(V6, zone=65_535),
        replace(V4, back_src="10.96.0.1", back_sport=80),  # not rewritten
        replace(V4, back_sport=80),
        replace(V4, back_src="10.96.0.1"),  # only the port
        replace(V4, back_dst="172.30.0.2", back_dport=61_001),
        replace(V6, back_dport=61_001),
        replace(V4, back_src="10.96.0.1", back_sport=80, back_dst="172.30.0.2"),
        replace(V4, sport=1, dport=65_535, id=1),
    ],
)
def test_an_entry_and_its_rewrite(entry: Entry) -> None:
    assert decoded(entry.message()) == ([entry.seen()], 0)


def test_several_messages_and_several_datagrams() -> None:
    many = [replace(V4, sport=1 + i, id=i, zone=i % 3) if i % 2 else replace(V6, sport=1 + i, id=i) for i in range(500)]
    data = b"".join(entry.message() for entry in many) + DONE
    assert decoded(data) == ([entry.seen() for entry in many], 0)


def test_other_protocols_are_neither_entries_nor_malformed() -> None:
    others = [replace(V4, protocol=protocol) for protocol in (UDP, ICMP, GRE)]
    data = b"".join(entry.message() for entry in (*others, V4))
    assert decoded(data) == ([V4.seen()], 0)
    assert decoded(data, protocols=(TCP, UDP)) == ([others[0].seen(), V4.seen()], 0)


@given(st.permutations(replace(V4, zone=9).attributes()))
def test_attributes_in_any_order(attributes: list[bytes]) -> None:
    entry = replace(V4, zone=9)
    assert decoded(entry.message(attributes)) == ([entry.seen()], 0)


def test_attributes_nobody_knows_are_passed_over() -> None:
    unknown = [attribute(99, b"x" * n) for n in range(5)] + [nest(100, attribute(1, b"y"))]
    assert decoded(V4.message([*unknown, *V4.attributes(), *unknown])) == ([V4.seen()], 0)


def spoilt_tuple(*parts: bytes) -> list[bytes]:
    return [nest(1, *parts), *V4.attributes()[1:]]


IPV4 = nest(1, attribute(1, b"\1\2\3\4"), attribute(2, b"\5\6\7\x08"))
PORTS = nest(2, attribute(1, b"\6"), attribute(2, b"\0\1"), attribute(3, b"\0\2"))


@pytest.mark.parametrize(
    "attributes",
    [
        V4.attributes()[1:],  # no original tuple
        [V4.original(), *V4.attributes()[2:]],  # no reply
        [V4.original(), V4.reply()],  # no id: it could not be told from the next entry with this tuple
        [],
        [V4.original(), V4.reply(), attribute(12, bytes(4))[:4]],  # an id that would lie in the next message
        [b"\0\0\1\x80", *V4.attributes()],  # an attribute of length zero: nothing behind it can be found
        spoilt_tuple(IPV4),
        spoilt_tuple(PORTS),
        spoilt_tuple(IPV4, nest(2, attribute(1, b"\6"), attribute(2, b"\0\1"))),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3\4")), PORTS),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3"), attribute(2, b"\5\6\7\x08")), PORTS),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3\4"), attribute(4, bytes(16))), PORTS),  # two families
        spoilt_tuple(nest(1, attribute(3, b"\1" * 16), attribute(4, bytes(16)), attribute(1, b"\1\2\3\4")), PORTS),
        spoilt_tuple(IPV4[:-1] + b"\x99" + PORTS, attribute(3, b"\0\7")),  # a zone for one direction
        spoilt_tuple(struct.pack("<HH", 400, 0x8001) + IPV4[4:], PORTS),  # a nest longer than what holds it
        [V4.original(), V6.reply(), *V4.attributes()[2:]],
    ],
)
def test_what_is_not_understood_is_counted_and_its_neighbours_are_not_hurt(attributes: list[bytes]) -> None:
    first, last = replace(V4, sport=1), replace(V6, sport=2)
    data = first.message() + V4.message(attributes) + last.message()
    assert decoded(data) == ([first.seen(), last.seen()], 1)


def test_a_truncated_datagram_gives_what_is_whole_and_says_that_something_is_missing() -> None:
    first, second = replace(V4, sport=1).message(), replace(V4, sport=2).message()
    for length in range(1, len(second)):
        assert decoded(first + second[:length]) == ([replace(V4, sport=1).seen()], 1)
    assert decoded(b"") == ([], 0)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_entries(data: bytes) -> None:
    entries, malformed = conntrack.decode(data, BOOT_NS)
    assert len(entries) == 0
    assert malformed <= 1 + len(data) // 20


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_invents_nothing(data: st.DataObject) -> None:
    """Whatever address, port or id comes out of a damaged message stands in its bytes; whole ones are not touched."""
    damaged = bytearray(data.draw(st.sampled_from([V4, V6, replace(V4, zone=3)])).message())
    for at, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        damaged[at] = byte
    before = replace(V4, sport=7, id=7)
    length = struct.unpack_from("<I", damaged)[0]
    entries, malformed = conntrack.decode(before.message() + bytes(damaged), BOOT_NS)
    found = rows(entries)
    assert found[0] == before.seen()
    assert len(found) <= 2
    assert malformed <= 2
    raw = bytes(damaged)
    for entry in found[1:]:
        for address in entry[:4]:
            assert isinstance(address, bytes)
            assert (address[12:] if address.startswith(bytes(10) + b"\xff\xff") else address) in raw
        for port in entry[4:8]:
            assert struct.pack(">H", port) in raw
        assert struct.pack(">I", entry[11]) in raw
        assert entry[8] == TCP
    if length != len(damaged) and not found[1:]:
        assert malformed or raw[4:6] != b"\0\1"


def test_the_end_of_a_dump() -> None:
    assert conntrack._last(DONE)
    assert conntrack._last(V4.message() + DONE)
    assert not conntrack._last(V4.message())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (error(errno.EPERM), r"cannot be read \(EPERM\): the kernel needs nf_conntrack_netlink"),
        (V4.message() + error(errno.ENOMEM), r"\(ENOMEM\)"),
        (error(0)[:16], r"\(EPROTO\)"),
        (struct.pack("<IHHIIi", 20, 3, 2, 1, 0, -errno.ENOBUFS), r"\(ENOBUFS\)"),
        (b"", r"an answer of 0 bytes"),
        (b"\x14\0\0\0", r"an answer of 4 bytes"),
    ],
)
def test_a_refusal_is_a_sentence_and_never_the_end_of_a_short_table(data: bytes, said: str) -> None:
    with pytest.raises(TracerError, match=said):
        conntrack._last(data)


def listed_by_conntrack(cluster: Cluster, family: str) -> set[tuple[object, ...]]:
    """(source, destination, ports, reply's, id) of the node's TCP entries as conntrack(8) prints them."""
    listing = cluster.node.run(["conntrack", "-L", "-p", "tcp", "-f", family, "-o", "id,xml"])
    found = set()
    for flow in ElementTree.fromstring(listing):
        ends: list[object] = []
        for direction in ("original", "reply"):
            meta = flow.find(f"meta[@direction='{direction}']")
            assert meta is not None
            ends += [mapped(meta.findtext(f"layer3/{end}") or "") for end in ("src", "dst")]
            ends += [int(meta.findtext(f"layer4/{end}") or -1) for end in ("sport", "dport")]
        found.add((*ends, int(flow.findtext("meta[@direction='independent']/id") or -1)))
    return found


@pytest.mark.needs("netns", "conntrack", "iptables", "ipv6")
def test_the_kernels_table_is_what_conntrack_prints() -> None:
    with Cluster(backends=3, clients=1, families="dual") as cluster:
        for family in (4, 6):
            cluster.clients[0].connect_many(25, cluster.vip(family=family))
        cluster.settle()
        with netns.entered(cluster.node.path):
            entries, malformed = conntrack.dump(BOOT_NS)
        printed = {family: listed_by_conntrack(cluster, family) for family in ("ipv4", "ipv6")}
        pods = {mapped(ip) for pod in cluster.backend_pods for ip in pod.addresses}
    assert malformed == 0
    assert {family: len(found) for family, found in printed.items()} == {"ipv4": 25, "ipv6": 25}
    got = {
        (src, dst, sport, dport, backend, snat, backend_port, snat_port, ct_id)
        for src, dst, backend, snat, sport, dport, backend_port, snat_port, _, _, _, ct_id, *_ in rows(entries)
    }
    assert got == printed["ipv4"] | printed["ipv6"]
    assert len(entries) == 50
    assert np.all(entries["value"]["nat"] == Nat.DNAT)
    assert {bytes(backend) for backend in entries["value"]["backend"]} <= pods
