"""conntrack's table, read whole: a ctnetlink dump as NumPy arrays.

Knows ctnetlink's messages (include/uapi/linux/netfilter/nfnetlink_conntrack.h) and nothing of what is done with the
entries. The attributes are walked for all messages at once, so an entry costs no Python beyond finding where its
message begins.
"""

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError
from tracer.kernel.maps import TRANSLATION
from tracer.record import TUPLE, Nat, NatSource

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_CT_NEW, _CT_GET = _SUBSYSTEM | 0, _SUBSYSTEM | 1
_REQUEST, _DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADERS = 20  # nlmsghdr and nfgenmsg
_BUFFER = 1 << 18
#: Datagrams that are decoded together (each of up to 32 KiB, some 140 entries): a step of the walk costs the same for
#: one entry as for many. Measured on 50,000: 170,000 entries a second one by one, 760,000 so.
_TOGETHER = 16

_TYPE = 0x3FFF  # NLA_TYPE_MASK
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_PROTOINFO, _CTA_TIMEOUT = 1, 2, 3, 4, 7
_CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY, _CTA_ID, _CTA_ZONE, _CTA_TIMESTAMP = 9, 10, 12, 18, 20
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_COUNTERS_PACKETS, _CTA_COUNTERS_BYTES, _CTA_COUNTERS32_PACKETS, _CTA_COUNTERS32_BYTES = 1, 2, 3, 4
_CTA_PROTOINFO_TCP, _CTA_PROTOINFO_SCTP, _CTA_PROTOINFO_STATE = 1, 3, 1  # the state is 1 in both nests
_CTA_TIMESTAMP_START = 1

_TCP, _UDP, _SCTP = 6, 17, 132  # IANA's numbers
#: The protocols with ports that a Service can have.
PROTOCOLS = (_TCP, _UDP, _SCTP)
#: `timeout_s` where the message has none.
NO_TIMEOUT = 0xFFFF_FFFF

#: One dumped entry. `key` and `value` are those of the translations map. Sent is what the original direction carried,
#: received what the reply did, IP headers included; both are 0 unless `counted` (net.netfilter.nf_conntrack_acct).
#: `timeout_s`: seconds until the entry expires, or NO_TIMEOUT. `state`: enum tcp_conntrack or sctp_conntrack, 0 where
#: there is none. `status`: enum ip_conntrack_status. `started`: nanoseconds of the wall clock, 0 without
#: net.netfilter.nf_conntrack_timestamp.
ENTRY = np.dtype(
    [
        ("key", TUPLE),
        ("value", TRANSLATION),
        ("bytes_sent", "<u8"),
        ("packets_sent", "<u8"),
        ("bytes_received", "<u8"),
        ("packets_received", "<u8"),
        ("counted", "u1"),
        ("timeout_s", "<u4"),
        ("state", "u1"),
        ("status", "<u4"),
        ("started", "<u8"),
    ]
)

_Numbers: TypeAlias = npt.NDArray[np.uint64]
_Offsets: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint32]
_Which: TypeAlias = npt.NDArray[np.bool_]


class Decoded(NamedTuple):
    """What a dump said."""

    #: An array of ENTRY.
    entries: npt.NDArray[Any]
    #: How many messages were not understood: there may be entries that are not among `entries`.
    malformed: int
    #: How many entries have a zone in one direction only (CTA_TUPLE_ZONE): understood, but no tuple says all of them.
    directional: int


def _request() -> bytes:
    # nlmsghdr (length, type, flags, sequence, port id), nfgenmsg (family: all, version, resource)
    return struct.pack("<IHHIIBBH", _HEADERS, _CT_GET, _REQUEST | _DUMP, 1, 0, 0, 0, 0)


def messages() -> Iterator[bytes]:
    """The datagrams of a dump of the calling thread's network namespace.

    Raises:
        TracerError: conntrack does not answer.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(30)
        netlink.send(_request())
        while True:
            try:
                data = netlink.recv(_BUFFER)
            except OSError as error:
                raise TracerError(f"Conntrack's table cannot be read ({error}): see 'vip-tracer doctor'.") from error
            yield data
            if _last(data):
                return


def _last(data: bytes) -> bool:
    """Whether a datagram ends the dump.

    Raises:
        TracerError: it carries the kernel's refusal, or is no netlink datagram.
    """
    if len(data) < 16:
        raise TracerError(f"Conntrack's table cannot be read (an answer of {len(data)} bytes): try again.")
    end = _split(data).end
    if end is None:
        return False
    code = -struct.unpack_from("<i", data, end + 16)[0] if end + 20 <= len(data) else 0
    if struct.unpack_from("<H", data, end + 4)[0] == _NLMSG_ERROR:
        code = code or errno.EPROTO
    if code:  # a dump that fails half way says so in NLMSG_DONE
        raise TracerError(
            f"Conntrack's table cannot be read ({errno.errorcode.get(code, code)}): the kernel needs "
            "nf_conntrack_netlink ('modprobe nf_conntrack_netlink')."
        )
    return True


class _Split(NamedTuple):
    """A datagram taken apart."""

    spans: list[tuple[int, int]]  # where the messages of entries begin and end
    end: int | None  # where NLMSG_DONE or NLMSG_ERROR is, if it is there
    misfits: int  # messages that belong in no dump, and one for what is cut off at the end


def _split(data: bytes) -> _Split:
    spans: list[tuple[int, int]] = []
    offset, size, misfits = 0, len(data), 0
    while offset + 16 <= size:
        length, kind = struct.unpack_from("<IH", data, offset)
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            return _Split(spans, offset, misfits)
        if length < _HEADERS or offset + length > size:
            break
        if kind == _CT_NEW:
            spans.append((offset, offset + length))
        else:
            misfits += 1
        offset += (length + 3) & ~3
    return _Split(spans, None, misfits + (offset < size))


class _Attributes:
    """The attributes of many messages, or of one nest in each: found together, a column for each message.

    As nla_parse() does it (lib/nlattr.c): they come in any order, types that nobody asked for are passed over, and of
    two of one type the last counts. All begin at a multiple of four bytes.
    """

    def __init__(self, words: _Words, start: _Offsets, end: _Offsets, last: int) -> None:
        """Walks from `start` to `end` (byte offsets), for types up to `last`."""
        self._words = words
        # One row more than there are types, for all those beyond `last`.
        self._place = np.zeros((last + 2, len(start)), np.int64)
        self._size = np.full((last + 2, len(start)), -1, np.int64)  # of the payload; -1: not there
        #: Which were understood to their end.
        self.intact: _Which = np.ones(len(start), np.bool_)
        rows = np.flatnonzero(start < end)
        at, end = start[rows], end[rows]
        while len(rows):
            header = words[at >> 2].astype(np.int64)
            length = header & 0xFFFF
            fits = (length >= 4) & (at + length <= end)
            if not fits.all():
                # Nothing behind this can be found.
                self.intact[rows[~fits]] = False
                rows, at, end, header, length = rows[fits], at[fits], end[fits], header[fits], length[fits]
            kind = np.minimum(header >> 16 & _TYPE, last + 1)
            self._place[kind, rows], self._size[kind, rows] = at + 4, length - 4
            at = at + ((length + 3) & ~3)
            more = at < end
            if not more.all():
                rows, at, end = rows[more], at[more], end[more]

    def nest(self, kind: int, last: int) -> "_Attributes":
        """The attributes within those of this type; none where it is not there."""
        start = self._place[kind]
        return _Attributes(self._words, start, start + np.maximum(self._size[kind], 0), last)

    def has(self, kind: int, size: int) -> _Which:
        """Which have this type, with a payload of `size` bytes."""
        found: _Which = self._size[kind] == size
        return found

    def lacks(self, kind: int) -> _Which:
        """Which do not have this type."""
        found: _Which = self._size[kind] < 0
        return found

    def sound(self, kind: int, size: int) -> _Which:
        """Which have it with `size` bytes, or not at all."""
        return self.has(kind, size) | self.lacks(kind)

    def number(self, kind: int, size: int) -> _Numbers:
        """The big-endian number of 1, 2, 4 or 8 bytes; 0 where it is not there, or of another size."""
        has = self.has(kind, size)
        at = np.where(has, self._place[kind] >> 2, 0)
        value = self._words[at].byteswap().astype(np.uint64)
        if size == 8:
            value = value << np.uint64(32) | self._words[at + 1].byteswap()
        else:
            value >>= np.uint64(32 - 8 * size)
        return np.where(has, value, np.uint64(0))

    def address(self, v4: int, v6: int) -> _Words:
        """The address, v4-mapped if it is IPv4's: shape (messages, 4), network order; anything where there is none."""
        at = self._place[v6] >> 2
        words = self._words[np.where(self.has(v6, 16), at, 0)[:, None] + np.arange(4)]
        short = self.has(v4, 4)
        words[short, :2], words[short, 2] = 0, 0xFFFF_0000
        words[short, 3] = self._words[self._place[v4][short] >> 2]
        return words


class _Tuple:
    """CTA_TUPLE_ORIG or CTA_TUPLE_REPLY of many messages."""

    def __init__(self, attributes: _Attributes) -> None:
        ip = attributes.nest(_CTA_TUPLE_IP, _CTA_IP_V6_DST)
        proto = attributes.nest(_CTA_TUPLE_PROTO, _CTA_PROTO_DST_PORT)
        self.intact = attributes.intact & ip.intact & proto.intact
        self.src = ip.address(_CTA_IP_V4_SRC, _CTA_IP_V6_SRC)
        self.dst = ip.address(_CTA_IP_V4_DST, _CTA_IP_V6_DST)
        self.protocol = proto.number(_CTA_PROTO_NUM, 1)
        self.src_port = proto.number(_CTA_PROTO_SRC_PORT, 2)
        self.dst_port = proto.number(_CTA_PROTO_DST_PORT, 2)
        self.has_protocol = proto.has(_CTA_PROTO_NUM, 1)
        self.directional = ~attributes.lacks(_CTA_TUPLE_ZONE)
        #: Which are of which family, by all that they have.
        has_v4 = ip.has(_CTA_IP_V4_SRC, 4) & ip.has(_CTA_IP_V4_DST, 4)
        has_v6 = ip.has(_CTA_IP_V6_SRC, 16) & ip.has(_CTA_IP_V6_DST, 16)
        self.v4 = has_v4 & ip.lacks(_CTA_IP_V6_SRC) & ip.lacks(_CTA_IP_V6_DST)
        self.v6 = has_v6 & ip.lacks(_CTA_IP_V4_SRC) & ip.lacks(_CTA_IP_V4_DST)
        self.sound = (
            (self.v4 | self.v6)
            & proto.has(_CTA_PROTO_SRC_PORT, 2)
            & proto.has(_CTA_PROTO_DST_PORT, 2)
            & attributes.sound(_CTA_TUPLE_ZONE, 2)
        )


class _Counters:
    """CTA_COUNTERS_ORIG or CTA_COUNTERS_REPLY of many messages: the 64-bit counters, or else the old ones."""

    def __init__(self, attributes: _Attributes) -> None:
        self.intact, self.sound, self.counted = attributes.intact, attributes.intact, attributes.intact
        values = []
        for wide, narrow in (
            (_CTA_COUNTERS_BYTES, _CTA_COUNTERS32_BYTES),
            (_CTA_COUNTERS_PACKETS, _CTA_COUNTERS32_PACKETS),
        ):
            self.sound = self.sound & attributes.sound(wide, 8) & attributes.sound(narrow, 4)
            self.counted = self.counted & (attributes.has(wide, 8) | attributes.has(narrow, 4))
            values.append(np.where(attributes.lacks(wide), attributes.number(narrow, 4), attributes.number(wide, 8)))
        self.bytes, self.packets = values


def decode(data: bytes, boot_ns: int, protocols: tuple[int, ...] = PROTOCOLS) -> Decoded:
    """The entries of the wanted protocols in one datagram of a dump, or in several one after another.

    Args:
        data: what `messages` gives; entries of other protocols are neither returned nor counted.
        boot_ns: when it was read, CLOCK_BOOTTIME ns: becomes `created`.
        protocols: IANA's numbers, of protocols that have ports.
    """
    return _decode([data], boot_ns, protocols)


def _decode(datagrams: Sequence[bytes], boot_ns: int, protocols: tuple[int, ...]) -> Decoded:
    # Each is split by itself: what one lacks at its end must not be taken from the next.
    spans: list[tuple[int, int]] = []
    parts: list[bytes] = []
    misfits = offset = 0
    for data in datagrams:
        split = _split(data)
        misfits += split.misfits
        spans += [(offset + start, offset + end) for start, end in split.spans]
        parts += (data, bytes(-len(data) % 4))
        offset += (len(data) + 3) & ~3
    if not spans:
        return Decoded(np.empty(0, ENTRY), misfits, 0)
    bounds = np.array(spans, np.int64)
    # A word is read before it is known whether it is wanted, an IPv6 address of four at most: hence the zeros behind.
    words = np.frombuffer(b"".join((*parts, bytes(16))), "<u4")

    message = _Attributes(words, bounds[:, 0] + _HEADERS, bounds[:, 1], _CTA_TIMESTAMP)
    original, reply = (_Tuple(message.nest(kind, _CTA_TUPLE_ZONE)) for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY))
    sent, received = (
        _Counters(message.nest(kind, _CTA_COUNTERS32_BYTES)) for kind in (_CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY)
    )
    info = message.nest(_CTA_PROTOINFO, _CTA_PROTOINFO_SCTP)
    tcp, sctp = (info.nest(kind, _CTA_PROTOINFO_STATE) for kind in (_CTA_PROTOINFO_TCP, _CTA_PROTOINFO_SCTP))
    timestamp = message.nest(_CTA_TIMESTAMP, _CTA_TIMESTAMP_START)

    protocol = original.protocol
    legible = original.has_protocol & reply.has_protocol & (protocol == reply.protocol)
    for walked in (message, original, reply, sent, received, info, tcp, sctp, timestamp):
        legible &= walked.intact
    wanted = legible & np.isin(protocol, protocols)
    # Without an id it could not be told from the next entry with its tuple.
    whole = wanted & message.has(_CTA_ID, 4) & (original.v4 == reply.v4)
    for kind, size in ((_CTA_STATUS, 4), (_CTA_TIMEOUT, 4), (_CTA_ZONE, 2)):
        whole &= message.sound(kind, size)
    for part in (original, reply, sent, received):
        whole &= part.sound
    whole &= timestamp.sound(_CTA_TIMESTAMP_START, 8)
    whole &= tcp.sound(_CTA_PROTOINFO_STATE, 1) & sctp.sound(_CTA_PROTOINFO_STATE, 1)
    directional = whole & (original.directional | reply.directional)

    entries = np.zeros(len(bounds), ENTRY)
    key, value = entries["key"], entries["value"]
    zone = message.number(_CTA_ZONE, 2)
    key["src"], key["dst"] = _bytes(original.src), _bytes(original.dst)
    key["src_port"], key["dst_port"] = original.src_port, original.dst_port
    key["zone"], key["protocol"] = zone, protocol
    value["backend"], value["snat"] = _bytes(reply.src), _bytes(reply.dst)
    value["backend_port"], value["snat_port"] = reply.src_port, reply.dst_port
    value["ct_id"], value["zone"] = message.number(_CTA_ID, 4), zone
    value["created"], value["source"] = boot_ns, NatSource.DUMP
    dnat = (original.dst != reply.src).any(axis=1) | (original.dst_port != reply.src_port)
    snat = (original.src != reply.dst).any(axis=1) | (original.src_port != reply.dst_port)
    nat = np.where(dnat, int(Nat.DNAT), 0) | np.where(snat, int(Nat.SNAT), 0)
    value["nat"] = np.where(nat, nat, int(Nat.NONE))
    counted = sent.counted & received.counted
    entries["counted"] = counted
    entries["bytes_sent"], entries["packets_sent"] = sent.bytes * counted, sent.packets * counted
    entries["bytes_received"], entries["packets_received"] = received.bytes * counted, received.packets * counted
    entries["timeout_s"] = np.where(message.lacks(_CTA_TIMEOUT), NO_TIMEOUT, message.number(_CTA_TIMEOUT, 4))
    states = (tcp.number(_CTA_PROTOINFO_STATE, 1), sctp.number(_CTA_PROTOINFO_STATE, 1))
    entries["state"] = np.select([protocol == _TCP, protocol == _SCTP], states)
    entries["status"] = message.number(_CTA_STATUS, 4)
    entries["started"] = timestamp.number(_CTA_TIMESTAMP_START, 8)
    return Decoded(
        entries[whole & ~directional],
        int(np.count_nonzero(~legible | wanted & ~whole)) + misfits,
        int(np.count_nonzero(directional)),
    )


def _bytes(words: _Words) -> npt.NDArray[np.void]:
    """Addresses of shape (messages, 4) as bytes of shape (messages,)."""
    return np.ascontiguousarray(words).view("V16")[:, 0]


def dump(boot_ns: int, between: Callable[[], object] = lambda: None, protocols: tuple[int, ...] = PROTOCOLS) -> Decoded:
    """The entries of the wanted protocols in the table of the calling thread's network namespace.

    Args:
        boot_ns: becomes `created`, CLOCK_BOOTTIME ns.
        between: called after each datagram, as a large table takes a while.
        protocols: IANA's numbers, of protocols that have ports.

    Raises:
        TracerError: conntrack does not answer.
    """
    parts: list[Decoded] = []
    waiting: list[bytes] = []
    for data in messages():
        waiting.append(data)
        if len(waiting) == _TOGETHER:
            parts.append(_decode(waiting, boot_ns, protocols))
            waiting.clear()
        between()
    parts.append(_decode(waiting, boot_ns, protocols))
    return Decoded(
        np.concatenate([part.entries for part in parts], dtype=ENTRY),
        sum(part.malformed for part in parts),
        sum(part.directional for part in parts),
    )
