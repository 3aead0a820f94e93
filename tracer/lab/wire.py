"""What the lab's workers and their parent say to each other, and what the ledger row of a connection or flow holds.

Knows bytes only. Standard library only: the workers import it.
"""

import ipaddress
import json
import os
import socket
import struct
import time
from typing import Any

#: Every message, both ways: length of the JSON, length of the bytes that follow it.
_FRAME = struct.Struct("<IQ")

#: What a client sends before each exchange: bytes that follow, bytes it wants back. A datagram begins with it too.
HEADER = struct.Struct("<II")

#: One connection or flow, as one end saw it; `traffic.LEDGER` is the same in NumPy. CLOCK_BOOTTIME nanoseconds
#: (started, established, ended), application bytes (sent, received), v4-mapped addresses (local, peer), their
#: ports, errno, pid, number, IP protocol, datagrams (sent, received).
ROW = struct.Struct("<qqqQQ16s16sHHIIIIII")

_MAPPED = b"\0" * 10 + b"\xff\xff"


def packed(address: str) -> bytes:
    """The 16 bytes of an address; IPv4 is v4-mapped (RFC 4291, 2.5.5.2)."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return _MAPPED + socket.inet_aton(address)


def unpacked(address: bytes) -> str:
    """The text of such 16 bytes."""
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed)


def now() -> int:
    """CLOCK_BOOTTIME in nanoseconds: the clock of the kernel's records."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _read(descriptor: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def receive(descriptor: int) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError when the other side is gone."""
    length, size = _FRAME.unpack(_read(descriptor, _FRAME.size))
    return json.loads(_read(descriptor, length)), _read(descriptor, size)


def send(descriptor: int, message: dict[str, Any], data: bytes = b"") -> None:
    """Sends one message. Raises BrokenPipeError when the other side is gone."""
    text = json.dumps(message).encode()
    rest = memoryview(_FRAME.pack(len(text), len(data)) + text + data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
