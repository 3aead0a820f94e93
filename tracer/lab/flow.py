"""One UDP flow of a client: a socket of its own, the datagrams that it sent and got, and its ledger row.

Knows connected sockets and unconnected ones. How many there are, and when, is the business of `client`. Standard
library only.
"""

import errno
import os
import socket
import struct

from tracer.lab import wire
from tracer.lab.connection import Address, family_of, request

#: struct timeval, for SO_RCVTIMEO: a timeout in the kernel costs no system call of its own.
_TIMEVAL = struct.Struct("@ll")


class Flow:
    """One socket to one peer."""

    __slots__ = (
        "connected",
        "datagrams_received",
        "datagrams_sent",
        "ended",
        "error",
        "established",
        "local",
        "number",
        "peer",
        "received",
        "sent",
        "socket",
        "started",
    )

    protocol = socket.IPPROTO_UDP

    def __init__(self, number: int, peer: Address, connected: bool, source_port: int, timeout: float) -> None:
        """Opens the socket; `source_port` 0 leaves the port to the kernel. Raises OSError if the port is taken."""
        self.number = number
        self.peer = peer
        self.connected = connected
        self.started = wire.now()
        self.established = self.ended = self.error = 0
        self.sent = self.received = self.datagrams_sent = self.datagrams_received = 0
        family = family_of(peer[0])
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            seconds, fraction = divmod(timeout, 1)
            self.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(seconds), int(fraction * 1e6))
            )
            if source_port or not connected:
                # an unconnected socket gets its port here, and not with the first datagram, so that it is known
                self.socket.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", source_port))
            self.local: Address = self.socket.getsockname()[:2]
        except OSError:
            self.socket.close()
            raise
        if connected:
            self._connect()
        else:
            self.established = wire.now()

    def _connect(self) -> None:
        try:
            self.socket.connect(self.peer)
        except OSError as error:
            self.error = error.errno or errno.EIO
            return
        self.established = wire.now()
        self.local = self.socket.getsockname()[:2]

    def exchange(self, sends: int, receives: int, buffer: memoryview) -> bool:
        """Sends one datagram of so many bytes and takes one, if `receives` is not 0; true if both were done.

        Notes ETIMEDOUT when no answer comes, EREMOTEIO when an unconnected socket gets it from another address than
        the one it sent to, and EMSGSIZE for what no datagram can hold.
        """
        data = b"".join(request(sends, receives))
        try:
            self.sent += self.socket.send(data) if self.connected else self.socket.sendto(data, self.peer)
            self.datagrams_sent += 1
            if receives:
                self._take(buffer)
        except BlockingIOError:  # SO_RCVTIMEO has passed
            self.error = errno.ETIMEDOUT
        except OSError as error:
            self.error = error.errno or errno.EIO
        return not self.error

    def _take(self, buffer: memoryview) -> None:
        count, source = self.socket.recvfrom_into(buffer)
        if (wire.packed(source[0]), source[1]) != (wire.packed(self.peer[0]), self.peer[1]):
            raise OSError(errno.EREMOTEIO, f"answered by {source[0]}, port {source[1]}")
        self.received += count
        self.datagrams_received += 1

    def close(self) -> None:
        """Closes the socket; nothing goes over the wire."""
        self.socket.close()
        self.ended = wire.now()

    def row(self) -> bytes:
        """Its ledger row as it is now."""
        return wire.ROW.pack(
            self.started, self.established, self.ended, self.sent, self.received, wire.packed(self.local[0]),
            wire.packed(self.peer[0]), self.local[1], self.peer[1], self.error, os.getpid(), self.number,
            self.protocol, self.datagrams_sent, self.datagrams_received,
        )  # fmt: skip
