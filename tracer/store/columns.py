"""From the kernel's records to a table of the connections schema.

A pure function of records, node and clock. Knows what each column means and when it is null; leaves files to the
others in this package. No row is touched by Python: arrays are handed to Arrow as they are, and only distinct
addresses, names and codes become strings.
"""

import socket
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer import schema
from tracer.clock import WallClock
from tracer.record import (
    NAT_NAMES,
    NAT_SOURCE_NAMES,
    PROTOCOL_NAMES,
    RECORD,
    ROLE_NAMES,
    Flag,
    Nat,
    NatSource,
    Role,
    result_name,
)
from tracer.store.arrays import Valid, booleans, coded, constant, nulls, numbers
from tracer.store.grouping import group
from tracer.store.names import Coded, column

_TCP, _UDP = 6, 17
_UDP_HEADER = 8
_V4_MAPPED = bytes(10) + b"\xff\xff"
_NAT_KNOWN = np.array([code in NAT_NAMES and code != Nat.UNKNOWN for code in range(256)])


def address_text(raw: bytes) -> str:
    """Text of 16 address bytes: dotted if v4-mapped, otherwise IPv6 as RFC 5952 writes it."""
    if raw[:12] == _V4_MAPPED:
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def comm_text(raw: bytes) -> str:
    """Text of a comm: up to its NUL. A program names itself, so nothing that drives a terminal is let through."""
    text = raw.split(b"\0", 1)[0].decode("utf-8", errors="replace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def starts(records: np.ndarray, clock: WallClock) -> npt.NDArray[np.int64]:
    """When each connection began, in ns since the epoch (n,); where that is not known, when its row begins."""
    began = records["started"]
    return clock.wall(np.where(began != 0, began, records["ts"] - records["duration_ns"]))


def table(records: np.ndarray, node: str, clock: WallClock, names: Mapping[str, Coded] | None = None) -> pa.Table:
    """The rows of n records of `RECORD`, in their order, as a table of ``schema.arrow("connections")``.

    `names` are the columns with names, n values each; null without.

    Never raises for any bytes: what the kernel side cannot have written becomes a number's text (role, protocol,
    result) or unknown (nat). `duration_us` is the difference of the interval's two ends in whole microseconds, so
    that the consecutive rows of one connection sum to its whole length without drift.
    """
    n = len(records)
    records = np.ascontiguousarray(records)
    words = records.view("<u8").reshape(n, RECORD.itemsize // 8)
    flags, nat, source = records["flags"], records["nat"], records["nat_source"]
    known = _NAT_KNOWN[nat]
    snat = known & ((nat & Nat.SNAT) != 0)
    counted, process = (flags & Flag.COUNTED) != 0, (flags & Flag.PROCESS) != 0
    protocol = records["tuple"]["protocol"]
    # What only conntrack counted: packets with their headers.
    by_conntrack = (records["role"] == Role.FORWARDED) | (protocol != _TCP)
    header = np.where((flags & Flag.IPV4) != 0, np.uint64(20 + _UDP_HEADER), np.uint64(40 + _UDP_HEADER))
    in_ip = counted & by_conntrack
    application = counted & (~by_conntrack | (protocol == _UDP))
    conntrack = known & (source != NatSource.NULL) & (records["ct_id"] != 0)
    destination = known | (records["role"] == Role.SERVER)
    ts, started, rtt, netns = records["ts"], records["started"], records["rtt_us"], records["netns"]
    thousand = np.uint64(1000)

    def address(offset: int, valid: Valid | None = None) -> pa.Array:
        return _grouped(words[:, offset // 8], words[:, offset // 8 + 1], address_text, valid)

    def number(name: str, valid: Valid | None = None) -> pa.Array:
        return numbers(schema_types[name], records[name], valid)

    def payload(direction: str) -> pa.Array:
        counted_bytes = records[f"bytes_{direction}"]
        if by_conntrack.any():
            headers = np.minimum(header * records[f"packets_{direction}"], counted_bytes)
            counted_bytes = np.where(by_conntrack, counted_bytes - headers, counted_bytes)
        return numbers(pa.uint64(), counted_bytes, application)

    schema_types = {field.name: field.type for field in schema.arrow("connections")}
    offsets = {name: RECORD.fields[name][1] for name in ("tuple", "backend", "snat", "comm")}  # type: ignore[index]
    key = records["tuple"]
    filled = {
        "node": constant(node, n),
        "ts": numbers(schema.TIME, clock.wall(ts)),
        "conn_id": number("conn_id"),
        "opened": booleans((flags & Flag.OPENED) != 0),
        "closed": booleans((flags & Flag.CLOSED) != 0),
        "started": numbers(schema.TIME, clock.wall(started), started != 0),
        "role": _named(records["role"], lambda code: ROLE_NAMES.get(code, str(code))),
        "protocol": _named(protocol, lambda code: PROTOCOL_NAMES.get(code, str(code))),
        "src_ip": address(offsets["tuple"]),
        "src_port": numbers(pa.uint16(), key["src_port"]),
        "dst_ip": address(offsets["tuple"] + 16),
        "dst_port": numbers(pa.uint16(), key["dst_port"]),
        "backend_ip": address(offsets["backend"], destination),
        "backend_port": number("backend_port", destination),
        "snat_ip": address(offsets["snat"], snat),
        "snat_port": number("snat_port", snat),
        "nat": _named(nat, lambda code: NAT_NAMES.get(code, NAT_NAMES[0])),
        "nat_source": _named(source, NAT_SOURCE_NAMES.get),
        "pid": number("pid", process),
        "comm": _grouped(words[:, offsets["comm"] // 8], words[:, offsets["comm"] // 8 + 1], comm_text, process),
        "cgroup_id": number("cgroup_id", process),
        "netns": number("netns", netns != 0),
        "result": _named(records["result"], result_name),
        "connect_latency_us": number("connect_latency_us", (flags & Flag.LATENCY) != 0),
        "duration_us": numbers(pa.uint64(), ts // thousand - (ts - records["duration_ns"]) // thousand),
        "bytes_sent": payload("sent"),
        "bytes_received": payload("received"),
        "packets_sent": number("packets_sent", counted),
        "packets_received": number("packets_received", counted),
        "ip_bytes_sent": numbers(pa.uint64(), records["bytes_sent"], in_ip),
        "ip_bytes_received": numbers(pa.uint64(), records["bytes_received"], in_ip),
        "retransmits": number("retransmits", counted & ~by_conntrack),
        "rtt_us": number("rtt_us", counted & (rtt != 0)),
        "ct_zone": number("ct_zone", conntrack),
        "ct_id": number("ct_id", conntrack),
    }
    filled |= {name: column(texts) for name, texts in (names or {}).items()}
    nothing = nulls(n)
    arrays = [filled.get(name, nothing) for name in schema_types]
    return pa.Table.from_arrays(arrays, schema=schema.arrow("connections"))


def _distinct(texts: Iterable[str]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The different texts, and for each text its place among them: two byte strings may read the same."""
    places: dict[str, int] = {}
    order = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int32)
    return list(places), order


def _grouped(high: np.ndarray, low: np.ndarray, text: Callable[[bytes], str], valid: Valid | None = None) -> pa.Array:
    """A dictionary array of 16-byte values, given as two columns of words; only what is valid is looked at."""
    rows = None if valid is None or valid.all() else np.flatnonzero(valid)
    if rows is not None:
        high, low = high[rows], low[rows]
    high, low = np.ascontiguousarray(high), np.ascontiguousarray(low)
    codes, distinct = group(high, low)
    raw = np.stack((high[distinct], low[distinct]), axis=1).tobytes()
    names, order = _distinct(text(raw[i : i + 16]) for i in range(0, len(raw), 16))
    codes = order[codes] if len(names) < len(order) else codes
    if rows is None:
        return coded(codes, names)
    spread = np.zeros(len(valid), dtype=np.int32)  # type: ignore[arg-type]  # rows are there, so valid is
    spread[rows] = codes
    return coded(spread, names, valid)


def _named(values: np.ndarray, name: Callable[[int], str | None]) -> pa.Array:
    """A dictionary array of small codes (one or two bytes); null where `name` says None."""
    present = np.flatnonzero(np.bincount(values, minlength=1))
    named = [(code, text) for code in present.tolist() if (text := name(code)) is not None]
    names, order = _distinct(text for _, text in named)
    code_of = np.zeros(int(present[-1]) + 1 if len(present) else 1, dtype=np.int32)
    code_of[[code for code, _ in named]] = order
    if len(named) == len(present):
        return coded(code_of[values], names)
    valid = np.zeros(len(code_of), dtype=bool)
    valid[[code for code, _ in named]] = True
    return coded(code_of[values], names, valid[values])
