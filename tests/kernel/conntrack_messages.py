"""ctnetlink's messages for tests: made from what an entry is, in any order and damaged, and read again the slow way.

`reference` is what tracer.kernel.conntrack.decode must agree with: one message, one attribute, one `if` at a time.
"""

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import numpy as np

from tracer.record import Nat, NatSource

TCP, UDP, SCTP, ICMP, GRE = 6, 17, 132, 1, 47
WANTED = (TCP, UDP, SCTP)
BOOT_NS = 123_456_789
NO_TIMEOUT = 0xFFFFFFFF
NEW, DESTROY = 0x100, 0x102
DONE = struct.pack("<IHHIIi", 20, 3, 2, 1, 0, 0)
HEADERS = 20


class Row(NamedTuple):
    """What an entry of a dump comes out as."""

    src: bytes
    dst: bytes
    backend: bytes
    snat: bytes
    src_port: int
    dst_port: int
    backend_port: int
    snat_port: int
    protocol: int
    zone: int
    ct_id: int
    nat: int
    source: int = NatSource.DUMP
    created: int = BOOT_NS
    bytes_sent: int = 0
    packets_sent: int = 0
    bytes_received: int = 0
    packets_received: int = 0
    counted: int = 0
    timeout_s: int = NO_TIMEOUT
    state: int = 0
    status: int = 0
    started: int = 0


MEASURES = Row._fields[Row._fields.index("bytes_sent") :]


def translation_rows(keys: np.ndarray, values: np.ndarray) -> list[Row]:
    """Keys and values of the translations map; what no message sets must be zero."""
    found = []
    for key, value in zip(keys, values, strict=True):
        assert value["zone"] == key["zone"]
        untold = set(value.dtype.names) - set(Row._fields) - {"zone"}
        assert not any(np.any(value[name]) for name in untold), f"one of {untold} was set"
        addresses = (bytes(raw) for raw in (key["src"], key["dst"], value["backend"], value["snat"]))
        ports = (int(n) for n in (key["src_port"], key["dst_port"], value["backend_port"], value["snat_port"]))
        rest = (int(n) for n in (key["protocol"], key["zone"], value["ct_id"], value["nat"], value["source"]))
        found.append(Row(*addresses, *ports, *rest, int(value["created"])))
    return found


def rows(entries: np.ndarray) -> list[Row]:
    """What `decode` found."""
    return [
        row._replace(**{name: int(entry[name]) for name in MEASURES})
        for row, entry in zip(translation_rows(entries["key"], entries["value"]), entries, strict=True)
    ]


def mapped(address: str) -> bytes:
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


# -- making ---------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """An attribute: its type, and its payload or what is nested in it."""

    kind: int
    content: "bytes | list[Node]"


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(parts))


def encode(nodes: Iterable[Node]) -> bytes:
    return b"".join(
        attribute(kind, content) if isinstance(content, bytes) else nest(kind, encode(content))
        for kind, content in nodes
    )


def shuffled(random: Random, nodes: list[Node]) -> list[Node]:
    """The same in another order on every level, with attributes among them that nobody knows."""
    mixed = [
        Node(kind, content if isinstance(content, bytes) else shuffled(random, content)) for kind, content in nodes
    ]
    for _ in range(random.choice((0, 0, 1, 3))):
        payload = random.randbytes(random.randrange(9))
        inner: bytes | list[Node] = payload if random.random() < 0.7 else [Node(1, payload)]
        mixed.append(Node(random.choice((27, 99, 0x3FFF)), inner))
    random.shuffle(mixed)
    return mixed


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
    status: int | None = 0x1AE
    timeout: int | None = 431_999
    state: int | None = 3
    #: bytes and packets sent, bytes and packets received
    counters: tuple[int, int, int, int] | None = (4_000, 40, 1 << 40, 1 << 33)
    #: Whether the counters are in the 32-bit attributes of old.
    narrow: bool = False
    started: int | None = 1_785_499_140_000_000_001
    #: CTA_TUPLE_ORIG or _REPLY, if the zone is that direction's alone
    direction: int | None = None

    def half(self, kind: int) -> Node:
        original = kind == 1
        ends = (self.src, self.dst) if original else (self.back_src, self.back_dst)
        ports = (self.sport, self.dport) if original else (self.back_sport, self.back_dport)
        addresses = [ipaddress.ip_address(address) for address in ends]
        first = 1 if addresses[0].version == 4 else 3
        proto = [Node(1, bytes([self.protocol]))]
        if self.protocol == ICMP:
            proto += [Node(4, b"\0\1"), Node(5, b"\x08"), Node(6, b"\0")]
        elif self.protocol != GRE:
            proto += [Node(2 + i, struct.pack(">H", port)) for i, port in enumerate(ports)]
        found = [Node(1, [Node(first + i, address.packed) for i, address in enumerate(addresses)]), Node(2, proto)]
        if self.direction == kind:
            found.append(Node(3, struct.pack(">H", self.zone)))
        return Node(kind, found)

    def measure(self, kind: int, count: int, octets: int) -> Node:
        if self.narrow:
            return Node(kind, [Node(3, struct.pack(">I", count)), Node(4, struct.pack(">I", octets))])
        return Node(kind, [Node(1, struct.pack(">Q", count)), Node(2, struct.pack(">Q", octets))])

    def nodes(self) -> list[Node]:
        found = [self.half(1), self.half(2)]
        if self.zone and self.direction is None:
            found.append(Node(18, struct.pack(">H", self.zone)))
        found.append(Node(12, struct.pack(">I", self.id)))
        if self.status is not None:
            found.append(Node(3, struct.pack(">I", self.status)))
        if self.timeout is not None:
            found.append(Node(7, struct.pack(">I", self.timeout)))
        if self.counters:
            octets_sent, sent, octets_received, received = self.counters
            found += [self.measure(9, sent, octets_sent), self.measure(10, received, octets_received)]
        if self.started is not None:
            found.append(Node(20, [Node(1, struct.pack(">Q", self.started))]))
        if self.state is not None and self.protocol in (TCP, SCTP):
            which = 1 if self.protocol == TCP else 3
            found.append(Node(4, [Node(which, [Node(1, bytes([self.state])), Node(2, b"\7")])]))
        return [*found, Node(8, bytes(4)), Node(11, struct.pack(">I", 1))]  # CTA_MARK, CTA_USE

    def attributes(self) -> list[bytes]:
        return [encode([node]) for node in self.nodes()]

    def message(self, attributes: Iterable[bytes] | None = None, kind: int = NEW) -> bytes:
        body = b"".join(self.attributes() if attributes is None else attributes)
        family = 2 if "." in self.src else 10
        return struct.pack("<IHHIIBBH", HEADERS + len(body), kind, 2, 1, 0, family, 0, 0) + body

    def row(self) -> Row:
        """As `decode` must give it."""
        nat = Nat.DNAT if (self.dst, self.dport) != (self.back_src, self.back_sport) else Nat.UNKNOWN
        nat |= Nat.SNAT if (self.src, self.sport) != (self.back_dst, self.back_dport) else Nat.UNKNOWN
        return Row(
            *(mapped(address) for address in (self.src, self.dst, self.back_src, self.back_dst)),
            *(self.sport, self.dport, self.back_sport, self.back_dport),
            *(self.protocol, self.zone, self.id, nat or Nat.NONE, NatSource.DUMP, BOOT_NS),
            *(self.counters or (0, 0, 0, 0)),
            int(self.counters is not None),
            NO_TIMEOUT if self.timeout is None else self.timeout,
            (self.state or 0) if self.protocol in (TCP, SCTP) else 0,
            self.status or 0,
            self.started or 0,
        )


V4 = Entry()
V6 = Entry("fd00::1", "fd00:96::1", back_src="fd00::9", back_dst="fd00::1")


def any_entry(random: Random) -> Entry:
    """One of either family and any protocol, rewritten or not, with or without what may be missing."""

    def maybe(bits: int) -> int | None:
        return random.getrandbits(bits) if random.random() < 0.8 else None

    def address() -> str:
        return str(ipaddress.ip_address(random.randbytes(size)))

    size = random.choice((4, 16))
    src, dst, sport, dport = address(), address(), random.getrandbits(16), random.getrandbits(16)
    narrow = random.random() < 0.2
    width = 32 if narrow else 64
    entry = Entry(
        src,
        dst,
        sport,
        dport,
        *random.choice(((dst, src, dport, sport), (address(), src, random.getrandbits(16), sport))),
        protocol=random.choice((TCP, TCP, UDP, UDP, SCTP, ICMP, GRE, 33, 0)),
        zone=random.choice((0, 0, random.getrandbits(16))),
        id=random.getrandbits(32),
        status=maybe(32),
        timeout=maybe(32),
        state=maybe(8),
        counters=tuple(random.getrandbits(width) for _ in range(4)) if random.random() < 0.8 else None,  # type: ignore[arg-type]
        narrow=narrow,
        started=maybe(64),
    )
    if random.random() < 0.2:
        entry = replace(entry, back_dst=address(), back_dport=random.getrandbits(16))
    return entry


# -- damaging -------------------------------------------------------------------------------------------------------


def damaged(random: Random, data: bytes, other: bytes, first: int = 0) -> bytes:
    """A message with a few bits, bytes, lengths or types changed, a piece cut out, or one of another put in.

    Args:
        random: what decides.
        data: the message.
        other: where pieces come from.
        first: bytes at the beginning that are left alone.
    """
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if len(raw) < first + 4:
            break
        at = random.randrange(first, len(raw))
        header = at & ~3  # attributes begin at multiples of four
        match random.randrange(6):
            case 0:
                raw[at] ^= 1 << random.randrange(8)
            case 1:
                raw[at] = random.getrandbits(8)
            case 2 if header >= first:
                length = raw[header] | raw[header + 1] << 8 if header + 1 < len(raw) else 0
                length = random.choice((0, 1, 3, 4, 5, 8, length - 4, length + 4, length + 1, len(raw), 0xFFFF))
                raw[header : header + 2] = struct.pack("<H", length & 0xFFFF)
            case 3 if header >= first:
                raw[header + 2 : header + 4] = struct.pack("<H", random.choice((*range(24), 0x8001, 0x8002, 0x4003)))
            case 4:
                del raw[at : at + random.choice((1, 4, 8, len(raw)))]
            case 5:
                start, size = random.randrange(len(other)) & ~3, random.choice((4, 8, 20, 52))
                raw[header:header] = other[start : start + size]
    if random.random() < 0.5:  # or else the message is longer, or shorter, than it says
        raw[:4] = struct.pack("<I", len(raw))
    return bytes(raw)


# -- reading, slowly ------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    """Attributes that do not fill what holds them, or a protocol that is not known."""


class UnsoundError(Exception):
    """An attribute that is missing, or of another size than it must have."""


def parse(data: bytes) -> dict[int, bytes]:
    """Type → payload; of two the last counts."""
    found, at = {}, 0
    while at < len(data):
        if at + 4 > len(data):
            raise BrokenError
        length, kind = struct.unpack_from("<HH", data, at)
        if length < 4 or at + length > len(data):
            raise BrokenError
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) // 4 * 4
    return found


def within(attributes: dict[int, bytes], kind: int) -> dict[int, bytes]:
    return parse(attributes.get(kind, b""))


def number(attributes: dict[int, bytes], kind: int, size: int, default: int | None = None) -> int:
    if kind not in attributes and default is not None:
        return default
    if len(attributes.get(kind, b"")) != size:
        raise UnsoundError
    return int.from_bytes(attributes[kind], "big")


def addresses(ip: dict[int, bytes]) -> tuple[int, bytes, bytes]:
    """(family, source, destination)."""
    kinds = {kind for kind in ip if kind in (1, 2, 3, 4)}
    if kinds == {1, 2} and len(ip[1]) == len(ip[2]) == 4:
        return 4, bytes(10) + b"\xff\xff" + ip[1], bytes(10) + b"\xff\xff" + ip[2]
    if kinds == {3, 4} and len(ip[3]) == len(ip[4]) == 16:
        return 6, ip[3], ip[4]
    raise UnsoundError


def counters(nested: dict[int, bytes]) -> tuple[int, int] | None:
    """(bytes, packets), or None if one of them is not there."""
    values = []
    for wide, narrow in ((2, 4), (1, 3)):
        old = number(nested, narrow, 4, default=-1)
        values.append(number(nested, wide, 8, default=old))
    octets, count = values
    return None if octets < 0 or count < 0 else (octets, count)


def reference_entry(message: bytes, wanted: tuple[int, ...], compare: bool = True) -> Row | str:
    """A row, or what the entry is counted as: malformed, directional, or other (a protocol not asked for).

    `compare`: whether the reply must be of the same protocol.
    """
    try:
        top = parse(message[HEADERS:])
        original, reply = within(top, 1), within(top, 2)
        proto, back_proto = within(original, 2), within(reply, 2)
        ip, back_ip = within(original, 1), within(reply, 1)
        sent, received, times, info = within(top, 9), within(top, 10), within(top, 20), within(top, 4)
        states = {TCP: within(info, 1), SCTP: within(info, 3)}
        protocol = number(proto, 1, 1)
        if protocol != number(back_proto, 1, 1) and compare:
            return "malformed"
    except (BrokenError, UnsoundError):
        return "malformed"
    if protocol not in wanted:
        return "other"
    try:
        family, src, dst = addresses(ip)
        back_family, back_src, back_dst = addresses(back_ip)
        if family != back_family:
            return "malformed"
        sport, dport = number(proto, 2, 2), number(proto, 3, 2)
        back_sport, back_dport = number(back_proto, 2, 2), number(back_proto, 3, 2)
        state = {which: number(nested, 1, 1, default=0) for which, nested in states.items()}
        counted = (counters(sent), counters(received))
        nat = Nat.DNAT if (dst, dport) != (back_src, back_sport) else Nat.UNKNOWN
        nat |= Nat.SNAT if (src, sport) != (back_dst, back_dport) else Nat.UNKNOWN
        zones = [number(half, 3, 2, default=0) for half in (original, reply)]
        row = Row(
            *(src, dst, back_src, back_dst, sport, dport, back_sport, back_dport),
            protocol=protocol,
            zone=number(top, 18, 2, default=0),
            ct_id=number(top, 12, 4),
            nat=nat or Nat.NONE,
            timeout_s=number(top, 7, 4, default=NO_TIMEOUT),
            state=state.get(protocol, 0),
            status=number(top, 3, 4, default=0),
            started=number(times, 1, 8, default=0),
        )
    except UnsoundError:
        return "malformed"
    if 3 in original or 3 in reply:
        assert len(zones) == 2
        return "directional"
    if counted[0] and counted[1]:
        (octets_sent, count_sent), (octets_received, count_received) = counted
        row = row._replace(
            bytes_sent=octets_sent,
            packets_sent=count_sent,
            bytes_received=octets_received,
            packets_received=count_received,
            counted=1,
        )
    return row


def reference(data: bytes, wanted: tuple[int, ...] = WANTED) -> tuple[list[Row], int, int]:
    """(rows, malformed, directional) of a datagram."""
    found: list[Row | str] = []
    at = 0
    while at < len(data):
        if at + 16 > len(data):
            found.append("malformed")
            break
        length, kind = struct.unpack_from("<IH", data, at)
        if kind in (2, 3):  # NLMSG_ERROR, NLMSG_DONE
            break
        if length < HEADERS or at + length > len(data):
            found.append("malformed")
            break
        found.append(reference_entry(data[at : at + length], wanted) if kind == NEW else "malformed")
        at += (length + 3) // 4 * 4
    made = [one for one in found if isinstance(one, Row)]
    return made, found.count("malformed"), found.count("directional")
