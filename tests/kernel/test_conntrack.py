"""ctnetlink's dump: messages made by hand, damaged at random, and the kernel's own against conntrack(8)."""

import errno
import socket
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conntrack_messages import (
    BOOT_NS,
    DESTROY,
    DONE,
    GRE,
    ICMP,
    NO_TIMEOUT,
    SCTP,
    TCP,
    UDP,
    V4,
    V6,
    Entry,
    Node,
    Row,
    attribute,
    encode,
    mapped,
    nest,
    rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.kernel import conntrack, netns
from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace
from tracer.record import Nat


def error(code: int) -> bytes:
    return struct.pack("<IHHIIi", 36, 2, 0, 1, 0, -code) + bytes(16)


def decoded(data: bytes, **options: tuple[int, ...]) -> tuple[list[Row], int]:
    found = conntrack.decode(data, BOOT_NS, **options)
    assert found.directional == 0
    return rows(found.entries), found.malformed


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
        replace(V4, protocol=UDP),
        replace(V6, protocol=SCTP, state=4),
        replace(V4, counters=None),
        replace(V4, counters=(0, 0, 0, 0)),  # counted, and nothing was
        replace(V4, counters=((1 << 64) - 1, 1 << 63, 1, 1 << 32)),
        replace(V4, counters=(1, 2, 3, (1 << 32) - 1), narrow=True),
        replace(V4, timeout=None),
        replace(V4, timeout=0),
        replace(V4, state=None, status=None, started=None),
        replace(V4, state=255, status=(1 << 32) - 1, started=(1 << 64) - 1),
    ],
)
def test_an_entry_and_its_rewrite(entry: Entry) -> None:
    assert decoded(entry.message()) == ([entry.row()], 0)


def test_several_messages_and_several_datagrams() -> None:
    many = [replace(V4, sport=1 + i, id=i, zone=i % 3) if i % 2 else replace(V6, sport=1 + i, id=i) for i in range(500)]
    data = b"".join(entry.message() for entry in many) + DONE
    assert decoded(data) == ([entry.row() for entry in many], 0)


def test_other_protocols_are_neither_entries_nor_malformed() -> None:
    by_protocol = {protocol: replace(V4, protocol=protocol) for protocol in (UDP, ICMP, GRE, SCTP, 0, TCP)}
    data = b"".join(entry.message() for entry in by_protocol.values())
    assert decoded(data) == ([by_protocol[protocol].row() for protocol in (UDP, SCTP, TCP)], 0)
    assert decoded(data, protocols=(TCP,)) == ([by_protocol[TCP].row()], 0)
    assert decoded(data, protocols=()) == ([], 0)


@pytest.mark.parametrize("direction", [1, 2])
@pytest.mark.parametrize("entry", [V4, V6, replace(V4, protocol=UDP)])
def test_a_zone_of_one_direction_is_understood_and_not_usable(entry: Entry, direction: int) -> None:
    data = V4.message() + replace(entry, zone=7, direction=direction).message() + V6.message()
    found = conntrack.decode(data, BOOT_NS)
    assert (rows(found.entries), found.malformed, found.directional) == ([V4.row(), V6.row()], 0, 1)
    other = conntrack.decode(replace(V4, protocol=ICMP, zone=7, direction=direction).message(), BOOT_NS)
    assert (len(other.entries), other.malformed, other.directional) == (0, 0, 0)


@pytest.mark.parametrize(
    "nodes",
    [
        [Node(9, [Node(1, bytes(8)), Node(2, bytes(8))])],  # one direction
        [Node(9, [Node(1, bytes(8)), Node(2, bytes(8))]), Node(10, [Node(1, bytes(8))])],  # no bytes
        [Node(9, []), Node(10, [])],
    ],
)
def test_counters_that_are_not_all_there_are_none(nodes: list[Node]) -> None:
    entry = replace(V4, counters=None)
    assert decoded(entry.message([*entry.attributes(), encode(nodes)])) == ([entry.row()], 0)


def test_a_state_is_that_of_its_own_protocol() -> None:
    both = encode([Node(4, [Node(1, [Node(1, b"\5")]), Node(3, [Node(1, b"\6")])])])
    for protocol, state in ((TCP, 5), (SCTP, 6), (UDP, 0)):
        entry = replace(V4, protocol=protocol, state=None)
        assert decoded(entry.message([both, *entry.attributes()])) == ([entry.row()._replace(state=state)], 0)


def test_of_two_attributes_the_last_counts() -> None:
    """As nla_parse() has it; nothing of the first is mixed in."""
    first, last = replace(V4, dst="9.9.9.9", back_src="8.8.8.8", id=1, state=9), replace(V6, counters=(1, 2, 3, 4))
    assert decoded(last.message(first.attributes() + last.attributes())) == ([last.row()], 0)


@given(st.permutations(replace(V4, zone=9).attributes()))
def test_attributes_in_any_order(attributes: list[bytes]) -> None:
    entry = replace(V4, zone=9)
    assert decoded(entry.message(attributes)) == ([entry.row()], 0)


def test_attributes_nobody_knows_are_passed_over() -> None:
    unknown = [attribute(99, b"x" * n) for n in range(5)] + [nest(100, attribute(1, b"y"))]
    assert decoded(V4.message([*unknown, *V4.attributes(), *unknown])) == ([V4.row()], 0)


ORIGINAL, REPLY = V4.attributes()[:2]


def spoilt_tuple(*parts: bytes) -> list[bytes]:
    return [nest(1, *parts), *V4.attributes()[1:]]


IPV4 = nest(1, attribute(1, b"\1\2\3\4"), attribute(2, b"\5\6\7\x08"))
PORTS = nest(2, attribute(1, b"\6"), attribute(2, b"\0\1"), attribute(3, b"\0\2"))


@pytest.mark.parametrize(
    "attributes",
    [
        V4.attributes()[1:],  # no original tuple
        [ORIGINAL, *V4.attributes()[2:]],  # no reply
        [ORIGINAL, REPLY],  # no id: it could not be told from the next entry with this tuple
        [],
        [ORIGINAL, REPLY, attribute(12, bytes(4))[:4]],  # an id that would lie in the next message
        [b"\0\0\1\x80", *V4.attributes()],  # an attribute of length zero: nothing behind it can be found
        spoilt_tuple(IPV4),
        spoilt_tuple(PORTS),
        spoilt_tuple(IPV4, nest(2, attribute(1, b"\6"), attribute(2, b"\0\1"))),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3\4")), PORTS),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3"), attribute(2, b"\5\6\7\x08")), PORTS),
        spoilt_tuple(nest(1, attribute(1, b"\1\2\3\4"), attribute(4, bytes(16))), PORTS),  # two families
        spoilt_tuple(nest(1, attribute(3, b"\1" * 16), attribute(4, bytes(16)), attribute(1, b"\1\2\3\4")), PORTS),
        spoilt_tuple(IPV4, PORTS, attribute(3, b"\7")),  # a zone of one direction, of one byte
        spoilt_tuple(IPV4, nest(2, attribute(1, b"\x11"), attribute(2, b"\0\1"), attribute(3, b"\0\2"))),  # UDP there
        [*V4.attributes(), attribute(7, bytes(2))],  # what need not be there, but cannot be so
        [*V4.attributes(), attribute(3, bytes(8))],
        [*V4.attributes(), attribute(18, bytes(4))],
        [*V4.attributes(), nest(20, attribute(1, bytes(4)))],
        [*V4.attributes(), nest(9, attribute(1, bytes(4)))],
        [*V4.attributes(), nest(4, nest(1, attribute(1, bytes(2))))],
        [*V4.attributes(), nest(9, b"\x40\0\1\0")],  # a counter longer than its nest
        [*V4.attributes(), b"\x08\0\x63\0"],  # an unknown attribute longer than the message
        [*V4.attributes(), b"\0\0\0\0"],
        spoilt_tuple(struct.pack("<HH", 400, 0x8001) + IPV4[4:], PORTS),  # a nest longer than what holds it
        [ORIGINAL, V6.attributes()[1], *V4.attributes()[2:]],
    ],
)
def test_what_is_not_understood_is_counted_and_its_neighbours_are_not_hurt(attributes: list[bytes]) -> None:
    first, last = replace(V4, sport=1), replace(V6, sport=2)
    data = first.message() + V4.message(attributes) + last.message()
    assert decoded(data) == ([first.row(), last.row()], 1)


def test_what_belongs_in_no_dump_is_counted() -> None:
    data = V4.message() + V4.message(kind=DESTROY) + V4.message(kind=0x200) + V6.message()
    assert decoded(data) == ([V4.row(), V6.row()], 2)


def test_a_truncated_datagram_gives_what_is_whole_and_says_that_something_is_missing() -> None:
    first, second = replace(V4, sport=1).message(), replace(V4, sport=2).message()
    for length in range(1, len(second)):
        assert decoded(first + second[:length]) == ([replace(V4, sport=1).row()], 1)
    assert decoded(b"") == ([], 0)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_entries(data: bytes) -> None:
    entries, malformed, directional = conntrack.decode(data, BOOT_NS)
    assert len(entries) == directional == 0
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
    entries, malformed, _ = conntrack.decode(before.message() + bytes(damaged), BOOT_NS)
    found = rows(entries)
    assert found[0] == before.row()
    assert len(found) <= 2
    assert malformed <= 2
    raw = bytes(damaged)
    for entry in found[1:]:
        for address in entry[:4]:
            assert isinstance(address, bytes)
            assert (address[12:] if address.startswith(bytes(10) + b"\xff\xff") else address) in raw
        for port in entry[4:8]:
            assert struct.pack(">H", port) in raw
        assert struct.pack(">I", entry.ct_id) in raw
        assert entry[8] in (TCP, UDP, SCTP)
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
            entries, malformed, directional = conntrack.dump(BOOT_NS, protocols=(TCP,))
        printed = {family: listed_by_conntrack(cluster, family) for family in ("ipv4", "ipv6")}
        pods = {mapped(ip) for pod in cluster.backend_pods for ip in pod.addresses}
    assert malformed == directional == 0
    assert {family: len(found) for family, found in printed.items()} == {"ipv4": 25, "ipv6": 25}
    got = {
        (src, dst, sport, dport, backend, snat, backend_port, snat_port, ct_id)
        for src, dst, backend, snat, sport, dport, backend_port, snat_port, _, _, ct_id, *_ in rows(entries)
    }
    assert got == printed["ipv4"] | printed["ipv6"]
    assert len(entries) == 50
    assert np.all(entries["value"]["nat"] == Nat.DNAT)
    assert {bytes(backend) for backend in entries["value"]["backend"]} <= pods


@pytest.fixture
def tracked() -> Any:
    """A namespace whose conntrack holds TCP and UDP, in zones, rewritten or not; nothing of it moves any more."""
    with Namespace("tracked") as namespace:
        namespace.run(["ip", "link", "set", "lo", "up"])
        namespace.sysctl({"net.netfilter.nf_conntrack_acct": 1, "net.netfilter.nf_conntrack_timestamp": 1})
        udp = ["-A", "OUTPUT", "-p", "udp"]
        to = ["-d", "127.0.0.9", "-j", "DNAT", "--to-destination", "127.0.0.1:9"]
        namespace.run(["iptables", "-w", "-t", "nat", *udp, *to])
        for port, zone in (("54", "--zone-orig"), ("55", "--zone")):
            namespace.run(["iptables", "-w", "-t", "raw", *udp, "--dport", port, "-j", "CT", zone, "7"])

        def talk() -> None:
            for port in (53, 54, 55):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"x" * port, ("127.0.0.9", port))
            with (
                socket.create_server(("127.0.0.1", 0)) as server,
                socket.create_connection(server.getsockname()) as client,
            ):
                accepted, _ = server.accept()
                client.sendall(b"x" * 1000)
                client.shutdown(socket.SHUT_WR)
                while accepted.recv(4096):
                    pass
                accepted.close()
                assert client.recv(1) == b""

        namespace.call(talk)
        yield namespace


@pytest.mark.needs("netns", "conntrack", "iptables")
def test_measures_are_what_conntrack_prints(tracked: Namespace) -> None:
    with netns.entered(tracked.path):
        found = conntrack.dump(BOOT_NS)
    listing = tracked.run(["conntrack", "-L", "-f", "ipv4", "-o", "id,xml,ktimestamp"])
    assert (found.malformed, found.directional) == (0, 1)
    entries = {row.ct_id: row for row in rows(found.entries)}
    assert sorted((row.protocol, row.dst_port if row.protocol == UDP else 0) for row in entries.values()) == [
        (TCP, 0),
        (UDP, 53),
        (UDP, 55),
    ]
    printed = 0
    for flow in ElementTree.fromstring(listing):
        if flow.find("meta[@direction='original']/zone") is not None:
            continue  # one direction's
        own = flow.find("meta[@direction='independent']")
        assert own is not None
        row = entries[int(own.findtext("id") or -1)]
        printed += 1
        for direction, count, octets in (
            ("original", row.packets_sent, row.bytes_sent),
            ("reply", row.packets_received, row.bytes_received),
        ):
            measured = flow.find(f"meta[@direction='{direction}']/counters")
            assert measured is not None
            assert (int(measured.findtext("packets") or -1), int(measured.findtext("bytes") or -1)) == (count, octets)
        assert row.counted == 1
        assert row.zone == int(own.findtext("zone") or 0)
        assert row.started == int(own.findtext("timestamp/start") or -1)
        # It was printed after it was dumped.
        assert int(own.findtext("timeout") or -1) <= row.timeout_s < NO_TIMEOUT
        assert (row.state == 7) == (own.findtext("state") == "TIME_WAIT") == (row.protocol == TCP)
        assert bool(row.status & 4) == (own.find("assured") is not None)  # IPS_ASSURED
        assert bool(row.status & 2) == (own.find("unreplied") is None)  # IPS_SEEN_REPLY
    assert printed == 3
