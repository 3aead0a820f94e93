"""The process that serves in a pod: it answers, and keeps a ledger of every connection and UDP flow it served.

Knows its sockets and one epoll loop. What an exchange is is in `served`; which pod it is and who asks for the ledger
are the parent's business. Standard library only.
"""

import errno
import gc
import select
import socket
import struct
import sys
from typing import Any

from tracer.lab import child, wire
from tracer.lab.connection import UnableError, family_of
from tracer.lab.connects import FASTOPEN_SERVER, mptcp_socket, need_fastopen
from tracer.lab.served import CHUNK, Connection, Flow

_AT_ONCE = 64  # accepted connections, or datagrams, of one socket before it is another's turn
_BACKLOG = 4096
#: Room for some ten thousand datagrams that arrive at once: what the lab loses it shall not lose here.
_DATAGRAM_BUFFER = 16 << 20
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h: over net.core.rmem_max, for the privileged

Local = tuple[bytes, int]


class Server:
    """The loop: listeners, connections, and the parent's requests on standard input."""

    def __init__(self) -> None:
        self.poll = select.epoll()
        self.poll.register(0, select.EPOLLIN)
        self.listeners: dict[int, tuple[socket.socket, Local]] = {}
        self.datagram_sockets: dict[int, tuple[socket.socket, Local]] = {}
        self.connections: dict[int, Connection] = {}
        self.flows: dict[tuple[Local, tuple[str, int]], Flow] = {}
        self.rows = bytearray()
        self.buffer = memoryview(bytearray(CHUNK))
        self.resetting = self.closing_first = False
        self.accepted = self.sent = self.received = 0  # sent and received: of the closed connections

    def listen(self, request: dict[str, Any]) -> None:
        """Serves on these addresses too. Raises UnableError, or OSError if one of them is taken."""
        if request["fastopen"]:
            need_fastopen(FASTOPEN_SERVER)
        for address in request["addresses"]:
            for _ in range(request["reuse_port"] or 1):
                self.bind(address, request)

    def bind(self, address: str, request: dict[str, Any]) -> None:
        """Opens one socket on one address."""
        family, port, udp = family_of(address), request["port"], request["protocol"] == "udp"
        if request["mptcp"]:
            listener = mptcp_socket(family)
        else:
            listener = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        try:
            if request["reuse_port"]:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if udp:
                listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BUFFER)
            else:  # on a UDP socket it would let another server take the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            if not udp:
                if request["fastopen"]:
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, _BACKLOG)
                listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        known = self.datagram_sockets if udp else self.listeners
        known[listener.fileno()] = (listener, (wire.packed(address), port))
        self.poll.register(listener, select.EPOLLIN)

    def stop_listening(self) -> None:
        """Closes the listeners, those for UDP too; connections go on."""
        for known in (self.listeners, self.datagram_sockets):
            for listener, _ in known.values():
                listener.close()
            known.clear()

    def accept(self, listener: socket.socket, local: Local) -> None:
        """Accepts some of those that wait; epoll says if there are more."""
        for _ in range(_AT_ONCE):
            try:
                accepted, peer = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            accepted.setblocking(False)
            self.accepted += 1
            connection = Connection(accepted, local, (wire.packed(peer[0]), peer[1]), self.accepted)
            self.connections[accepted.fileno()] = connection
            self.poll.register(accepted, select.EPOLLIN)

    def take_datagrams(self, sock: socket.socket, local: Local) -> None:
        """Answers some of those that wait; epoll says if there are more."""
        for _ in range(_AT_ONCE):
            try:
                count, source = sock.recvfrom_into(self.buffer)
            except BlockingIOError:
                return
            peer = source[:2]
            flow = self.flows.get((local, peer))
            if flow is None:
                flow = Flow(local, (wire.packed(peer[0]), peer[1]), len(self.flows) + 1)
                self.flows[local, peer] = flow
            flow.answer(sock, self.buffer[:count], peer)

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
            given = not connection.owed or connection.give(self.closing_first)
            if self.closing_first and connection.answered():
                return self.end(descriptor, 0)
            if not given:
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
                self.listen(request)
            case "stop listening":
                self.stop_listening()
            case "reset":
                self.resetting = request["on"]
            case "close first":
                self.closing_first = request["on"]
            case "ledger":
                flows = b"".join(flow.row() for flow in self.flows.values())
                return {}, bytes(self.rows) + flows + b"".join(c.row(0, 0) for c in self.connections.values())
            case "totals":
                return self.totals(), b""
            case other:
                return {"error": f"no such request: {other}"}, b""
        return {}, b""

    def totals(self) -> dict[str, int]:
        """Connections (accepted, open) and flows; bytes and datagrams of them all."""
        connections, flows = self.connections.values(), self.flows.values()
        return {
            "accepted": self.accepted,
            "open": len(connections),
            "flows": len(flows),
            "sent": self.sent + sum(c.sent for c in connections) + sum(f.sent for f in flows),
            "received": self.received + sum(c.received for c in connections) + sum(f.received for f in flows),
            "datagrams_sent": sum(f.datagrams_sent for f in flows),
            "datagrams_received": sum(f.datagrams_received for f in flows),
        }

    def run(self) -> None:
        """Serves until the parent is gone (EOFError, BrokenPipeError)."""
        while True:
            for descriptor, events in self.poll.poll():
                if descriptor in self.connections:
                    self.serve(descriptor, events)
                elif descriptor in self.listeners:
                    self.accept(*self.listeners[descriptor])
                elif descriptor in self.datagram_sockets:
                    self.take_datagrams(*self.datagram_sockets[descriptor])
                elif descriptor == 0:
                    request, _ = wire.receive(0)
                    try:
                        reply, data = self.answer(request)
                    except UnableError as error:
                        reply, data = {"error": str(error)}, b""
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
