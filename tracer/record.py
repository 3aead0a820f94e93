"""The layout that the kernel and user space share: the record, the tuple, and the counters.

Knows the bytes of ``bpf/record.h`` and ``bpf/counters.h`` as NumPy and Python see them, and nothing of
how they are produced or stored. ``tests/test_record.py`` compiles the headers and compares every offset.
"""

import enum
import errno

import numpy as np

#: `struct tuple`: 40 bytes, ports in network order, IPv4 addresses v4-mapped (RFC 4291, 2.5.5.2).
TUPLE = np.dtype(
    [
        ("src", "V16"),
        ("dst", "V16"),
        ("src_port", ">u2"),
        ("dst_port", ">u2"),
        ("zone", "<u2"),
        ("protocol", "u1"),
        ("reserved", "u1"),
    ]
)

#: `struct record`: 200 bytes, times in nanoseconds of CLOCK_BOOTTIME.
RECORD = np.dtype(
    [
        ("tuple", TUPLE),
        ("backend", "V16"),
        ("snat", "V16"),
        ("conn_id", "<u8"),
        ("ts", "<u8"),
        ("started", "<u8"),
        ("duration_ns", "<u8"),
        ("bytes_sent", "<u8"),
        ("bytes_received", "<u8"),
        ("packets_sent", "<u8"),
        ("packets_received", "<u8"),
        ("cgroup_id", "<u8"),
        ("comm", "S16"),
        ("retransmits", "<u4"),
        ("connect_latency_us", "<u4"),
        ("rtt_us", "<u4"),
        ("pid", "<u4"),
        ("netns", "<u4"),
        ("ct_id", "<u4"),
        ("backend_port", ">u2"),
        ("snat_port", ">u2"),
        ("ct_zone", "<u2"),
        ("result", "<u2"),
        ("flags", "u1"),
        ("role", "u1"),
        ("nat", "u1"),
        ("nat_source", "u1"),
        ("ct_state", "u1"),
        ("ct_status", "u1"),
        ("ct_left", "<u2"),
    ]
)


class Flag(enum.IntFlag):
    """`enum record_flag`: what a record holds and what of it is known."""

    OPENED = 1 << 0
    CLOSED = 1 << 1
    ESTABLISHED = 1 << 2
    COUNTED = 1 << 3
    LATENCY = 1 << 4
    PROCESS = 1 << 5
    IPV4 = 1 << 6
    PROVISIONAL = 1 << 7


class Nat(enum.IntFlag):
    """`enum nat`: bits, so that dnat+snat is their sum; 0 is unknown."""

    UNKNOWN = 0
    NONE = 1
    DNAT = 2
    SNAT = 4


class Role(enum.IntEnum):
    """`enum role`."""

    CLIENT = 0
    FORWARDED = 1
    SERVER = 2


class NatSource(enum.IntEnum):
    """`enum nat_source`: where a translation was learnt."""

    NULL = 0
    CONNTRACK = 1
    SOCKET = 2
    DUMP = 3


#: Values of `record.result` that are not an errno.
RESULT_OPEN = 0xFFFF
RESULT_ABORTED = 0xFFFE

#: Names of Nat values, by value; what is not listed cannot be written by the kernel side.
NAT_NAMES = {0: "unknown", 1: "none", 2: "dnat", 4: "snat", 6: "dnat+snat"}
#: Names of roles, by value.
ROLE_NAMES = {0: "client", 1: "forwarded", 2: "server"}
#: Names of translation sources, by value.
NAT_SOURCE_NAMES = {0: None, 1: "conntrack", 2: "socket", 3: "dump"}
#: Names of the protocols that are traced (IANA protocol numbers).
PROTOCOL_NAMES = {6: "tcp", 17: "udp", 132: "sctp"}


def result_name(code: int) -> str | None:
    """The `result` of a row: null while open, ``ok``, a plain word, or the errno's own name.

    EPIPE is what tcp_reset() reports for a reset that comes in CLOSE_WAIT (net/ipv4/tcp_input.c).
    """
    words = {
        RESULT_OPEN: None,
        RESULT_ABORTED: "aborted",
        0: "ok",
        errno.ECONNREFUSED: "refused",
        errno.ETIMEDOUT: "timeout",
        errno.ECONNRESET: "reset",
        errno.EPIPE: "reset",
        errno.EHOSTUNREACH: "unreachable",
        errno.ENETUNREACH: "unreachable",
    }
    return words[code] if code in words else errno.errorcode.get(code, f"errno-{code}")


class Counter(enum.IntEnum):
    """`enum counter` of bpf/counters.h: what each counts is said there. In lower case, a column of coverage/."""

    OPENED = 0
    CLOSED = 1
    CONNTRACK_NEW = 2
    CONNTRACK_DESTROY = 3
    ADOPTED = 4
    INTERIM = 5
    EXCLUDED = 6
    LOST_RING = 7
    LOST_CONNECTION_MAP = 8
    LOST_TRANSLATION_MAP = 9
    DEFERRED = 10
    LOST_END = 11
    LATE_BEGIN = 12
    LATE_END = 13
    UNRESOLVED = 14
    AMBIGUOUS = 15
    AFTER_PAUSE = 16
    IGNORED_PROTOCOL = 17
    MALFORMED_EVENTS = 18
    STALE_DESTROY = 19
    KEPT = 20
    ACCEPTED = 21
    FAILED = 22
    FLOWS = 23
    LOST_FLOW_RING = 24
    TRANSIT = 25
    LOST_OWNER_MAP = 26
    LOST_DIAL_MAP = 27
    LOST_LISTENER_MAP = 28
    UNDIALLED = 29
