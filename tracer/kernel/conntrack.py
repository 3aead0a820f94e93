"""conntrack's table, read whole: a ctnetlink dump as NumPy arrays.

Knows ctnetlink's messages (include/uapi/linux/netfilter/nfnetlink_conntrack.h) and nothing of what is done with the
entries. The attributes are walked for all messages at once, so an entry costs no Python beyond finding where its
message begins.
"""

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError
from tracer.kernel.maps import TRANSLATION
from tracer.record import TUPLE, Nat, NatSource

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_CT_GET = _SUBSYSTEM | 1
_REQUEST, _DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TYPE = 0x3FFF  # NLA_TYPE_MASK
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ID, _CTA_ZONE = 1, 2, 12, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
#: What a tuple holds, as bits: addresses by 1 << CTA_IP_*, the ports, and a zone of its own (which no tuple may have
#: that is joined by: see bpf/conntrack.h).
_SRC_PORT, _DST_PORT, _DIRECTIONAL = 1 << 5, 1 << 6, 1 << 7
_WHOLE = (1 << 1 | 1 << 2 | _SRC_PORT | _DST_PORT, 1 << 3 | 1 << 4 | _SRC_PORT | _DST_PORT)
_MAX_ATTRIBUTES = 24
_BUFFER = 1 << 18

#: One dumped entry: the key and value of the translations map.
ENTRY = np.dtype([("key", TUPLE), ("value", TRANSLATION)])


def _request() -> bytes:
    # nlmsghdr (length, type, flags, sequence, port id), nfgenmsg (family: all, version, resource)
    return struct.pack("<IHHIIBBH", 20, _CT_GET, _REQUEST | _DUMP, 1, 0, 0, 0, 0)


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

    spans: list[tuple[int, int]]  # where conntrack's messages begin and end
    end: int | None  # where NLMSG_DONE or NLMSG_ERROR is, if it is there
    truncated: bool  # something behind the last message is none


def _split(data: bytes) -> _Split:
    found: list[tuple[int, int]] = []
    offset, size = 0, len(data)
    while offset + 16 <= size:
        length, kind = struct.unpack_from("<IH", data, offset)
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            return _Split(found, offset, False)
        if length < 20 or offset + length > size:
            break
        if kind >> 8 == 1:
            found.append((offset, offset + length))
        offset += (length + 3) & ~3
    return _Split(found, None, offset < size)


class _Walk:
    """Attributes of many messages at once: a cursor for each, advanced together."""

    def __init__(self, data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> None:
        self.data, self.cursor, self.end = data, start.copy(), end

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(which messages have a further attribute, its type, its length with header), the payload at cursor + 4."""
        for _ in range(_MAX_ATTRIBUTES):
            active = self.cursor + 4 <= self.end
            at = np.where(active, self.cursor, 0)
            length = self.number(at, 2)
            active &= (length >= 4) & (at + length <= self.end)
            if not active.any():
                return
            yield active, self.number(at + 2, 2) & _TYPE, length
            # A message whose attributes make no sense stops here: its cursor is put at its end.
            self.cursor = np.where(active, self.cursor + ((length + 3) & ~3), self.end)

    def number(self, at: npt.NDArray[np.int64], size: int, big: bool = False) -> npt.NDArray[np.int64]:
        """The unsigned number of `size` bytes at each offset, which must lie within the data where it matters."""
        result = np.zeros(len(at), np.int64)
        for i in range(size):
            shift = 8 * (size - 1 - i if big else i)
            result |= self.data[np.minimum(at + i, len(self.data) - 1)].astype(np.int64) << shift
        return result

    def octets(self, at: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.uint8]:
        """The bytes at each offset, shape (messages, size)."""
        picked: npt.NDArray[np.uint8] = self.data[np.minimum(at[:, None] + np.arange(size), len(self.data) - 1)]
        return picked


def _read_tuple(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
) -> tuple[Any, ...]:
    """(source, destination as (n,16) bytes, ports, protocol, what was found as bits) of CTA_TUPLE_* payloads."""
    n = len(start)
    src, dst = np.zeros((n, 16), np.uint8), np.zeros((n, 16), np.uint8)
    src_port, dst_port, protocol, seen = (np.zeros(n, np.int64) for _ in range(4))
    src[:, 10:12] = dst[:, 10:12] = 0xFF  # v4-mapped, unless an IPv6 address overwrites it
    outer = _Walk(data, start, end)
    for active, kind, length in outer:
        at = outer.cursor
        seen[active & (kind == _CTA_TUPLE_ZONE)] |= _DIRECTIONAL
        for nest in (_CTA_TUPLE_IP, _CTA_TUPLE_PROTO):
            rows = np.flatnonzero(active & (kind == nest))
            if not len(rows):
                continue
            inner = _Walk(data, at[rows] + 4, at[rows] + length[rows])
            for has, what, size in inner:
                value = inner.cursor + 4
                if nest == _CTA_TUPLE_IP:
                    for number, target, width in ((1, src, 4), (2, dst, 4), (3, src, 16), (4, dst, 16)):
                        hit = has & (what == number) & (size == 4 + width)
                        target[rows[hit], 16 - width :] = inner.octets(value[hit], width)
                        seen[rows[hit]] |= 1 << number
                else:
                    hit = has & (what == 1) & (size == 5)
                    protocol[rows[hit]] = inner.number(value[hit], 1)
                    for number, port in ((2, src_port), (3, dst_port)):
                        hit = has & (what == number) & (size == 6)
                        port[rows[hit]] = inner.number(value[hit], 2, big=True)
                        seen[rows[hit]] |= _SRC_PORT if number == 2 else _DST_PORT
    return src, dst, src_port, dst_port, protocol, seen


def decode(data: bytes, boot_ns: int, protocols: tuple[int, ...] = (6,)) -> tuple[npt.NDArray[Any], int]:
    """Entries of the wanted protocols in a datagram, and how many messages were not understood.

    Args:
        data: one netlink datagram, or several one after another.
        boot_ns: when it was read, CLOCK_BOOTTIME ns: becomes `created`.

    Returns:
        An array of ENTRY, and the number of malformed messages (entries of other protocols are
        neither; what is cut off at the end counts as one).
    """
    spans, _, truncated = _split(data)
    if not spans:
        return np.empty(0, ENTRY), int(truncated)
    octets = np.frombuffer(data, np.uint8)
    bounds = np.array(spans, np.int64)
    n = len(bounds)
    tuples: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {
        kind: (np.zeros(n, np.int64), np.zeros(n, np.int64)) for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY)
    }
    identity, zone = np.zeros(n, np.int64), np.zeros(n, np.int64)
    identified = np.zeros(n, np.bool_)
    walk = _Walk(octets, bounds[:, 0] + 20, bounds[:, 1])
    for active, kind, length in walk:
        at = walk.cursor
        for which, (start, end) in tuples.items():
            hit = active & (kind == which)
            start[hit], end[hit] = at[hit] + 4, (at + length)[hit]
        hit = active & (kind == _CTA_ID) & (length == 8)
        identified |= hit
        identity[hit] = walk.number(at[hit] + 4, 4, big=True)
        hit = active & (kind == _CTA_ZONE) & (length == 6)
        zone[hit] = walk.number(at[hit] + 4, 2, big=True)
    src, dst, src_port, dst_port, protocol, seen = _read_tuple(octets, *tuples[_CTA_TUPLE_ORIG])
    back_src, back_dst, back_src_port, back_dst_port, _, back_seen = _read_tuple(octets, *tuples[_CTA_TUPLE_REPLY])
    whole = identified & np.isin(seen, _WHOLE) & (seen == back_seen)
    wanted = whole & np.isin(protocol, protocols)
    malformed = int(np.count_nonzero(~whole & (np.isin(protocol, protocols) | (protocol == 0)))) + truncated

    entries = np.zeros(n, ENTRY)
    key, value = entries["key"], entries["value"]
    for field, column in (("src", src), ("dst", dst)):
        key[field] = column.view("V16")[:, 0]
    for field, column in (("backend", back_src), ("snat", back_dst)):
        value[field] = np.ascontiguousarray(column).view("V16")[:, 0]
    key["src_port"], key["dst_port"], key["zone"], key["protocol"] = src_port, dst_port, zone, protocol
    value["backend_port"], value["snat_port"] = back_src_port, back_dst_port
    value["ct_id"], value["created"], value["zone"], value["source"] = identity, boot_ns, zone, NatSource.DUMP
    dnat = (dst != back_src).any(axis=1) | (dst_port != back_src_port)
    snat = (src != back_dst).any(axis=1) | (src_port != back_dst_port)
    nat = np.where(dnat, int(Nat.DNAT), 0) | np.where(snat, int(Nat.SNAT), 0)
    value["nat"] = np.where(nat, nat, int(Nat.NONE))
    return entries[wanted], malformed


def dump(boot_ns: int, between: Callable[[], object] = lambda: None) -> tuple[npt.NDArray[Any], int]:
    """The TCP entries of the calling thread's network namespace, and how many messages were not understood.

    Args:
        boot_ns: becomes `created`, CLOCK_BOOTTIME ns.
        between: called after each datagram, as a large table takes a while.

    Raises:
        TracerError: conntrack does not answer.
    """
    parts, malformed = [], 0
    for data in messages():
        entries, misfits = decode(data, boot_ns)
        parts.append(entries)
        malformed += misfits
        between()
    return np.concatenate(parts, dtype=ENTRY) if parts else np.empty(0, ENTRY), malformed
