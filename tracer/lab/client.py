"""The process that dials from a pod, and keeps a ledger of every connection it attempted.

Knows blocking connections, one after the other, and connections held open. Whom it dials and when are the
parent's business. Standard library only.
"""

import errno
import gc
import os
import select
import socket
import struct
import sys
import time
from typing import Any

from tracer.lab import child, wire

_CHUNK = 1 << 18
_ZEROS = memoryview(bytes(_CHUNK))
_ABORT = struct.pack("ii", 1, 0)


class Connection:
    """One attempt to connect, and what became of it."""

    __slots__ = ("ended", "error", "established", "local", "number", "peer", "received", "sent", "socket", "started")

    def __init__(self, number: int, peer: tuple[str, int]) -> None:
        self.number = number
        self.peer = peer
        self.local: tuple[str, int] = ("::" if ":" in peer[0] else "0.0.0.0", 0)
        self.started = wire.now()
        self.established = self.ended = self.sent = self.received = self.error = 0
        self.socket = socket.socket(socket.AF_INET6 if ":" in peer[0] else socket.AF_INET, socket.SOCK_STREAM)

    def connect(self, timeout: float | None) -> bool:
        """Connects; true if it stands. With a timeout (seconds) it gives up then, noting ECANCELED."""
        try:
            if timeout is None:
                self.socket.connect(self.peer)
            else:
                self._connect_within(timeout)
        except OSError as error:
            self.error = error.errno or errno.EIO
            self.close()
            return False
        self.established = wire.now()
        self.local = self.socket.getsockname()[:2]
        return True

    def _connect_within(self, timeout: float) -> None:
        self.socket.setblocking(False)
        error = self.socket.connect_ex(self.peer)
        self.local = self.socket.getsockname()[:2]
        if error == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(self.socket, select.POLLOUT)
            if not poll.poll(timeout * 1000):
                raise OSError(errno.ECANCELED, "given up")
            error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.socket.setblocking(True)

    def exchange(self, sends: int, receives: int, buffer: memoryview) -> bool:
        """Sends so many bytes (the header included) and takes so many; true if both were done."""
        try:
            if sends:
                rest = sends - wire.HEADER.size
                first = min(rest, _CHUNK)
                self._send(wire.HEADER.pack(rest, receives) + _ZEROS[:first])
                rest -= first
                while rest:
                    part = min(rest, _CHUNK)
                    self._send(_ZEROS[:part])
                    rest -= part
            while receives:
                count = self.socket.recv_into(buffer, min(receives, _CHUNK))
                if count == 0:
                    raise OSError(errno.ENODATA, "closed by the server")
                receives -= count
                self.received += count
        except OSError as error:
            self.error = error.errno or errno.EIO
            return False
        return True

    def _send(self, data: bytes | memoryview) -> None:
        while data:
            count = self.socket.send(data)
            self.sent += count
            data = data[count:]

    def close(self, reset: bool = False) -> None:
        """Closes, with a RST if so wished."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.socket.close()
        self.ended = wire.now()

    def row(self) -> bytes:
        """Its ledger row as it is now."""
        return wire.ROW.pack(
            self.started, self.established, self.ended, self.sent, self.received, wire.packed(self.local[0]),
            wire.packed(self.peer[0]), self.local[1], self.peer[1], self.error, os.getpid(), self.number,
        )  # fmt: skip


class Client:
    """Carries out the parent's requests, one after the other."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_CHUNK))
        self.rows = bytearray()
        self.held: dict[int, Connection] = {}
        self.attempted = self.established = 0

    def attempt(self, peer: tuple[str, int], timeout: float | None) -> tuple[Connection, bool]:
        """One connection, and whether it stands."""
        connection = Connection(self.attempted, peer)
        self.attempted += 1
        stands = connection.connect(timeout)
        self.established += stands
        return connection, stands

    def connect_many(self, request: dict[str, Any]) -> bytes:
        """Connects, exchanges and closes, time after time."""
        peer = (request["address"], request["port"])
        sends, receives, timeout = request["sends"], request["receives"], request["timeout"]
        pause = 1 / request["rate"] if request["rate"] else 0.0
        due = time.monotonic()
        begin = len(self.rows)
        for _ in range(request["count"]):
            if pause:
                time.sleep(max(0.0, due - time.monotonic()))
                due += pause
            connection, stands = self.attempt(peer, timeout)
            if stands:
                connection.exchange(sends, receives, self.buffer)
                connection.close()
            self.rows += connection.row()
        return bytes(self.rows[begin:])

    def hold(self, request: dict[str, Any]) -> bytes:
        """Opens connections and keeps those that stand."""
        rows = bytearray()
        for _ in range(request["count"]):
            connection, stands = self.attempt((request["address"], request["port"]), request["timeout"])
            if stands:
                self.held[connection.number] = connection
            else:
                self.rows += connection.row()
            rows += connection.row()
        return bytes(rows)

    def exchange(self, request: dict[str, Any]) -> bytes:
        """Exchanges on held connections, round robin; a failed one is left alone."""
        chosen = [self.held[number] for number in request["numbers"]]
        for connection in chosen * request["times"]:
            if not connection.error:
                connection.exchange(request["sends"], request["receives"], self.buffer)
        return b"".join(connection.row() for connection in chosen)

    def close(self, request: dict[str, Any]) -> bytes:
        """Closes held connections."""
        rows = bytearray()
        for number in request["numbers"]:
            connection = self.held.pop(number)
            connection.close(request["reset"])
            rows += connection.row()
        self.rows += rows
        return bytes(rows)

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What the parent gets for its request."""
        match request["do"]:
            case "connect":
                return {}, self.connect_many(request)
            case "hold":
                return {}, self.hold(request)
            case "exchange":
                return {}, self.exchange(request)
            case "close":
                return {}, self.close(request)
            case "ledger":
                return {}, bytes(self.rows) + b"".join(c.row() for c in self.held.values())
            case "totals":
                totals = {"attempted": self.attempted, "established": self.established, "held": len(self.held)}
                return totals, b""
            case other:
                return {"error": f"no such request: {other}"}, b""


def main(arguments: list[str]) -> None:
    """Runs until standard input ends. `arguments`: the name that the process shall have."""
    child.set_name(arguments[0])
    gc.disable()  # there are no cycles to collect
    client = Client()
    try:
        while True:
            request, _ = wire.receive(0)
            try:
                reply, data = client.answer(request)
            except KeyError as error:
                reply, data = {"error": f"{request['do']}: connection {error} is not open"}, b""
            except OSError as error:  # no more descriptors, say
                reply, data = {"error": f"{request['do']}: {error.strerror}"}, b""
            wire.send(1, reply, data)
    except (EOFError, BrokenPipeError):
        sys.exit(0)
