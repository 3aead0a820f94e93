"""What a server knows of one connection that it accepted, and of one UDP flow that reached it.

Knows the exchange protocol (`wire.HEADER`, then so many bytes, then so many back, again until the client closes; a
datagram holds one exchange) and the ledger rows. Which sockets there are is the business of `server`. Standard
library only.
"""

import errno
import os
import socket
import struct

from tracer.lab import wire

CHUNK = 1 << 18
ZEROS = memoryview(bytes(CHUNK))


class Connection:
    """One accepted connection."""

    __slots__ = (
        "begun",
        "expected",
        "head",
        "local",
        "number",
        "owed",
        "peer",
        "received",
        "sent",
        "socket",
        "started",
        "wanted",
    )

    def __init__(self, accepted: socket.socket, local: tuple[bytes, int], peer: tuple[bytes, int], number: int) -> None:
        self.socket = accepted
        self.local = local
        self.peer = peer
        self.number = number
        self.started = wire.now()
        self.head = b""  # of an exchange that has not arrived entirely
        self.begun = False  # once an exchange's header has arrived
        self.expected = 0  # bytes of the exchange still to come
        self.wanted = 0  # bytes to return once they have come
        self.owed = 0  # bytes to return now
        self.sent = 0
        self.received = 0

    def row(self, ended: int, error: int) -> bytes:
        """Its ledger row as it is now."""
        return wire.ROW.pack(
            self.started, self.started, ended, self.sent, self.received, self.local[0], self.peer[0], self.local[1],
            self.peer[1], error, os.getpid(), self.number, socket.IPPROTO_TCP, 0, 0,
        )  # fmt: skip

    def take(self, data: memoryview) -> None:
        """Counts what has arrived and notes what is owed for it."""
        self.received += len(data)
        while data:
            if self.expected:
                skipped = min(self.expected, len(data))
                self.expected -= skipped
                data = data[skipped:]
            else:
                missing = wire.HEADER.size - len(self.head)
                self.head += data[:missing]
                data = data[missing:]
                if len(self.head) < wire.HEADER.size:
                    return
                self.expected, self.wanted = wire.HEADER.unpack(self.head)
                self.head = b""
                self.begun = True
            if not self.expected:
                self.owed += self.wanted
                self.wanted = 0

    def give(self, closing: bool = False) -> bool:
        """Sends what is owed; false if the socket takes no more for now. Raises OSError.

        `closing`: the last byte waits for the FIN (MSG_MORE), lest the client has all it wants and closes first.
        """
        while self.owed:
            last = closing and self.owed == 1
            size = min(self.owed - (closing and not last), CHUNK)
            try:
                count = self.socket.send(ZEROS[:size], socket.MSG_MORE if last else 0)
            except BlockingIOError:
                return False
            self.sent += count
            self.owed -= count
        return True

    def answered(self) -> bool:
        """Whether an exchange is over: all of it has come, and the answer has gone."""
        return self.begun and not (self.head or self.expected or self.owed)


class Flow:
    """All datagrams between one of the server's addresses and one peer."""

    __slots__ = (
        "datagrams_received",
        "datagrams_sent",
        "error",
        "last",
        "local",
        "number",
        "peer",
        "received",
        "sent",
        "started",
    )

    def __init__(self, local: tuple[bytes, int], peer: tuple[bytes, int], number: int) -> None:
        self.local = local
        self.peer = peer
        self.number = number
        self.started = self.last = wire.now()
        self.sent = self.received = self.datagrams_sent = self.datagrams_received = self.error = 0

    def answer(self, sock: socket.socket, data: memoryview, peer: tuple[str, int]) -> None:
        """Counts a datagram, and sends what it asks for as one datagram. What goes wrong is noted in the row."""
        self.received += len(data)
        self.datagrams_received += 1
        try:
            _, wanted = wire.HEADER.unpack_from(data)
            if wanted:
                self.sent += sock.sendto(ZEROS[:wanted], peer)
                self.datagrams_sent += 1
        except struct.error:
            self.error = errno.EPROTO
        except OSError as error:
            self.error = error.errno or errno.EIO
        self.last = wire.now()

    def row(self) -> bytes:
        """Its ledger row as it is now; nothing ends a flow, so its last datagram stands for the end."""
        return wire.ROW.pack(
            self.started, self.started, self.last, self.sent, self.received, self.local[0], self.peer[0],
            self.local[1], self.peer[1], self.error, os.getpid(), self.number, socket.IPPROTO_UDP,
            self.datagrams_sent, self.datagrams_received,
        )  # fmt: skip
