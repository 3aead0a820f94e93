"""One TCP connection that a client makes: its attempt, its exchanges, its end, and its ledger row.

Knows sockets, and two ways to dial: blocking, and within a time. Stranger ways are in `connects`; which connections
are made, and when, is the business of `client`. Standard library only.
"""

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

from tracer.lab import wire

Address = tuple[str, int]

#: Connects a socket to an address, or raises OSError.
Dial = Callable[[socket.socket, Address], None]

CHUNK = 1 << 18
_ZEROS = memoryview(bytes(CHUNK))
_ABORT = struct.pack("ii", 1, 0)


class UnableError(Exception):
    """What was asked for cannot be done here; the text, which goes on from "could not", says why and what to do."""


def family_of(address: str) -> socket.AddressFamily:
    """The family of an address in text."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def request(sends: int, receives: int) -> Iterator[bytes | memoryview]:
    """What a client sends for one exchange, header included, in parts of at most about `CHUNK` bytes."""
    rest = sends - wire.HEADER.size
    first = min(rest, CHUNK)
    yield wire.HEADER.pack(rest, receives) + _ZEROS[:first]
    rest -= first
    while rest:
        part = min(rest, CHUNK)
        yield _ZEROS[:part]
        rest -= part


def blocking(sock: socket.socket, peer: Address) -> None:
    """connect() as everybody calls it."""
    sock.connect(peer)


def within(seconds: float | None) -> Dial:
    """connect() that does not block, poll(), SO_ERROR. Raises ECANCELED after so many seconds (None: waits)."""

    def dial(sock: socket.socket, peer: Address) -> None:
        sock.setblocking(False)
        error = sock.connect_ex(peer)
        if error == errno.EINPROGRESS:
            await_connected(sock, seconds)
        elif error:
            raise OSError(error, os.strerror(error))
        sock.setblocking(True)

    return dial


def await_connected(sock: socket.socket, seconds: float | None = None) -> None:
    """Returns when the handshake is done. Raises OSError: why it failed, or ECANCELED after so many seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(None if seconds is None else seconds * 1000):
        raise OSError(errno.ECANCELED, "given up")
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


class Connection:
    """One attempt to connect, and what became of it."""

    __slots__ = ("ended", "error", "established", "local", "number", "peer", "received", "sent", "socket", "started")

    protocol = socket.IPPROTO_TCP

    def __init__(self, number: int, peer: Address, sock: socket.socket) -> None:
        """Owns `sock` from now on."""
        self.number = number
        self.peer = peer
        self.socket = sock
        self.local: Address = ("::" if ":" in peer[0] else "0.0.0.0", 0)
        self.started = wire.now()
        self.established = self.ended = self.sent = self.received = self.error = 0

    def connect(self, dial: Dial) -> bool:
        """Connects; true if it stands. Else the socket stays as the kernel left it: call `close`."""
        try:
            dial(self.socket, self.peer)
        except OSError as error:
            self.fail(error)
            return False
        self.stand()
        return True

    def stand(self) -> None:
        """Notes that the handshake is done, and from where it was made."""
        self.established = wire.now()
        self.local = self.socket.getsockname()[:2]

    def fail(self, error: OSError) -> None:
        """Notes an error; if it never stood, its port too, which the kernel forgets with the next connect()."""
        self.error = error.errno or errno.EIO
        if not self.established:
            self.local = self.socket.getsockname()[:2]

    def exchange(self, sends: int, receives: int, buffer: memoryview) -> bool:
        """Sends so many bytes (the header included) and takes so many; true if both were done."""
        try:
            if sends:
                for part in request(sends, receives):
                    self.send(part)
            self.take(receives, buffer)
        except OSError as error:
            self.fail(error)
            return False
        return True

    def send(self, data: bytes | memoryview) -> None:
        """Sends all of it. Raises OSError."""
        while data:
            count = self.socket.send(data)
            self.sent += count
            data = data[count:]

    def take(self, receives: int, buffer: memoryview) -> None:
        """Receives so many bytes. Raises OSError; ENODATA if the server closes before."""
        while receives:
            count = self.socket.recv_into(buffer, min(receives, len(buffer)))
            if count == 0:
                raise OSError(errno.ENODATA, "closed by the server")
            receives -= count
            self.received += count

    def close(self, reset: bool = False) -> None:
        """Closes, with a RST if so wished."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.socket.close()
        self.ended = wire.now()

    def close_half(self, buffer: memoryview) -> None:
        """Ends its own direction (FIN), takes what still comes until the server has ended its own, and closes.

        Afterwards the server has seen the end, and the time-wait is on this side.
        """
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while count := self.socket.recv_into(buffer):
                self.received += count
        except OSError as error:
            self.fail(error)
        self.close()

    def row(self) -> bytes:
        """Its ledger row as it is now."""
        return wire.ROW.pack(
            self.started, self.established, self.ended, self.sent, self.received, wire.packed(self.local[0]),
            wire.packed(self.peer[0]), self.local[1], self.peer[1], self.error, os.getpid(), self.number,
            self.protocol, 0, 0,
        )  # fmt: skip
