"""The process that serves in a pod: it answers, and keeps a ledger of every connection it accepted.

Knows the exchange protocol (`wire.HEADER`, then so many bytes, then so many back, again until the client closes)
and one epoll loop. Which pod it is and who asks for the ledger are the parent's business. Standard library only.
"""

import errno
import gc
import os
import select
import socket
import struct
import sys
from typing import Any

from tracer.lab import child, wire

_CHUNK = 1 << 18
_ZEROS = memoryview(bytes(_CHUNK))
_ACCEPTS_AT_ONCE = 64
_BACKLOG = 4096


class Connection:
    """One accepted connection."""

    __slots__ = (
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
        self.expected = 0  # bytes of the exchange still to come
        self.wanted = 0  # bytes to return once they have come
        self.owed = 0  # bytes to return now
        self.sent = 0
        self.received = 0

    def row(self, ended: int, error: int) -> bytes:
        """Its ledger row as it is now."""
        return wire.ROW.pack(
            self.started, self.started, ended, self.sent, self.received, self.local[0], self.peer[0], self.local[1],
            self.peer[1], error, os.getpid(), self.number,
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
            if not self.expected:
                self.owed += self.wanted
                self.wanted = 0

    def give(self) -> bool:
        """Sends what is owed; false if the socket takes no more for now. Raises OSError."""
        while self.owed:
            try:
                count = self.socket.send(_ZEROS[: min(self.owed, _CHUNK)])
            except BlockingIOError:
                return False
            self.sent += count
            self.owed -= count
        return True


class Server:
    """The loop: listeners, connections, and the parent's requests on standard input."""

    def __init__(self) -> None:
        self.poll = select.epoll()
        self.poll.register(0, select.EPOLLIN)
        self.listeners: dict[int, tuple[socket.socket, tuple[bytes, int]]] = {}
        self.connections: dict[int, Connection] = {}
        self.rows = bytearray()
        self.buffer = memoryview(bytearray(_CHUNK))
        self.resetting = False
        self.accepted = self.sent = self.received = 0  # sent and received: of the closed connections

    def listen(self, addresses: list[str], port: int) -> None:
        """Serves on these addresses too."""
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            self.listeners[listener.fileno()] = (listener, (wire.packed(address), port))
            self.poll.register(listener, select.EPOLLIN)

    def stop_listening(self) -> None:
        """Closes the listeners; connections go on."""
        for listener, _ in self.listeners.values():
            listener.close()
        self.listeners.clear()

    def accept(self, listener: socket.socket, local: tuple[bytes, int]) -> None:
        """Accepts some of those that wait; epoll says if there are more."""
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                accepted, peer = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            accepted.setblocking(False)
            self.accepted += 1
            connection = Connection(accepted, local, (wire.packed(peer[0]), peer[1]), self.accepted)
            self.connections[accepted.fileno()] = connection
            self.poll.register(accepted, select.EPOLLIN)

    def serve(self, descriptor: int, events: int) -> None:
        """Reads, answers or ends one connection."""
        connection = self.connections[descriptor]
        try:
            if events & ~select.EPOLLOUT:
                count = connection.socket.recv_into(self.buffer)
                if count == 0:
                    return self.end(descriptor, 0)
                connection.take(self.buffer[:count])
                if self.resetting:
                    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return self.end(descriptor, errno.ECONNABORTED)
            waiting = events & select.EPOLLOUT
            if connection.owed and not connection.give():
                if not waiting:
                    self.poll.modify(descriptor, select.EPOLLIN | select.EPOLLOUT)
            elif waiting:
                self.poll.modify(descriptor, select.EPOLLIN)
        except BlockingIOError:
            return None
        except OSError as error:
            self.end(descriptor, error.errno or errno.EIO)
        return None

    def end(self, descriptor: int, error: int) -> None:
        """Closes one connection and writes its row."""
        connection = self.connections.pop(descriptor)
        connection.socket.close()  # and so leaves the epoll set
        self.rows += connection.row(wire.now(), error)
        self.sent += connection.sent
        self.received += connection.received

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What the parent gets for its request."""
        match request["do"]:
            case "listen":
                self.listen(request["addresses"], request["port"])
            case "stop listening":
                self.stop_listening()
            case "reset":
                self.resetting = request["on"]
            case "ledger":
                return {}, bytes(self.rows) + b"".join(c.row(0, 0) for c in self.connections.values())
            case "totals":
                return {
                    "accepted": self.accepted,
                    "open": len(self.connections),
                    "sent": self.sent + sum(c.sent for c in self.connections.values()),
                    "received": self.received + sum(c.received for c in self.connections.values()),
                }, b""
            case other:
                return {"error": f"no such request: {other}"}, b""
        return {}, b""

    def run(self) -> None:
        """Serves until the parent is gone (EOFError, BrokenPipeError)."""
        while True:
            for descriptor, events in self.poll.poll():
                if descriptor in self.connections:
                    self.serve(descriptor, events)
                elif descriptor in self.listeners:
                    self.accept(*self.listeners[descriptor])
                elif descriptor == 0:
                    request, _ = wire.receive(0)
                    try:
                        reply, data = self.answer(request)
                    except OSError as error:
                        reply, data = {"error": f"{request['do']}: {error.strerror}"}, b""
                    wire.send(1, reply, data)


def main(arguments: list[str]) -> None:
    """Runs until standard input ends. `arguments`: the name that the process shall have."""
    child.set_name(arguments[0])
    gc.disable()  # there are no cycles to collect
    try:
        Server().run()
    except (EOFError, BrokenPipeError):
        sys.exit(0)
