"""A peer of the benchmark: conntrack's events read in Python, one by one, as a first version of such a tool would.

Prints beginnings and ends of entries of TCP over IPv4 as `conntrack -E` does, as far as `tests.bench.said` reads it.
Runs in the namespace whose events it reads: python -m tests.bench.ctnetlink BUFFER_BYTES
"""

import signal
import socket
import struct
import sys
from collections.abc import Iterator

_NEW, _DESTROY, _DELETED = 1 << 0, 1 << 2, 2  # the groups as bits; the end's message
_TUPLE_ORIG, _TUPLE_REPLY, _IP, _PROTO = 1, 2, 1, 2
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type (without its flags) and content of each attribute."""
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def ends(data: bytes) -> tuple[int, str, str, int, int]:
    """Of CTA_TUPLE_*: protocol, source and destination address, source and destination port."""
    parts = dict(attributes(data))
    ip, protocol = dict(attributes(parts[_IP])), dict(attributes(parts[_PROTO]))
    ports = [int.from_bytes(protocol.get(number, b""), "big") for number in (2, 3)]
    return protocol[1][0], socket.inet_ntoa(ip[1]), socket.inet_ntoa(ip[2]), ports[0], ports[1]


def main() -> None:
    """Prints until SIGINT."""
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    listener.setsockopt(socket.SOL_SOCKET, 33, int(sys.argv[1]))  # SO_RCVBUFFORCE
    listener.bind((0, _NEW | _DESTROY))
    lost = 0
    signal.signal(signal.SIGINT, lambda *_: listener.close())
    while listener.fileno() >= 0:
        try:
            data = listener.recv(65536)
        except OSError as error:
            lost += error.errno == 105  # ENOBUFS: nobody knows how many
            continue
        kind, family = _HEADER.unpack_from(data)[1], data[16]
        if family != socket.AF_INET:
            continue
        event = "DESTROY" if kind & 0xFF == _DELETED else "NEW"
        found = dict(attributes(data[20:]))
        protocol, src, dst, src_port, dst_port = ends(found[_TUPLE_ORIG])
        if protocol == socket.IPPROTO_TCP:
            _, backend, to, port, to_port = ends(found[_TUPLE_REPLY])
            sys.stdout.write(
                f"[{event}] tcp 6 src={src} dst={dst} sport={src_port} dport={dst_port} src={backend} dst={to} "
                f"sport={port} dport={to_port}\n"
            )
    if lost:
        print("events were lost (ENOBUFS)\n" * lost, end="", file=sys.stderr)


if __name__ == "__main__":
    main()
