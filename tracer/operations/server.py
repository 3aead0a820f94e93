"""A small HTTP server for metrics and health: a few fixed pages, in a thread of its own.

It may listen on a node's own addresses, where anybody can reach it. So everything is bounded: the size of a request,
how long a connection may take, how many there are at once. Where there are too many, the one that is oldest goes, so
that clients who only hold connections do not keep a health check out. Nothing of a request appears in an answer.
"""

import ipaddress
import logging
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tracer.errors import TracerError, UsageError

_log = logging.getLogger(__name__)

#: Bytes of a request, with its headers; Prometheus and kubelets send a few hundred.
MAX_REQUEST = 4096
#: Seconds from a connection's acceptance to its end, whatever it does.
MAX_SECONDS = 5.0
#: Connections at once.
MAX_CONNECTIONS = 32
#: Bytes that are discarded of a client that goes on sending after its answer, before it is cut off.
_MAX_DISCARDED = 1 << 16
_PIECE = 1 << 16
#: After a refusal of the machine (no descriptors left), how long no connection is accepted.
_PAUSE_S = 0.5

_REQUEST = re.compile(rb"(GET|HEAD) (/[!-~]*) HTTP/1\.[01]\r?\n")
_OTHER_METHOD = re.compile(rb"[A-Z]{1,20} [!-~]+ HTTP/1\.[01]\r?\n")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Page:
    """What is answered: a status of `_REASONS`, a body, and what kind of text it is."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"


def sentence(status: int, text: str) -> Page:
    """A page of one line."""
    return Page(status, text.encode("utf-8", "backslashreplace") + b"\n")


def parse_address(text: str) -> tuple[str, int]:
    """Address and port, of 127.0.0.1:9464, [::1]:9464 or 0.0.0.0:9464.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]{2,60})\]|(?P<four>[0-9.]{7,15})):(?P<port>[0-9]{1,5})", text.strip())
    try:
        if match is None or int(match["port"]) > 65535:
            raise ValueError(text)
        address = ipaddress.IPv6Address(match["six"]) if match["six"] else ipaddress.IPv4Address(match["four"])
    except ValueError as error:
        raise UsageError(
            f"{text!r} is no address to listen on: write it as 127.0.0.1:9464, as [::1]:9464, or as 0.0.0.0:9464 for "
            "all addresses of this machine."
        ) from error
    return str(address), int(match["port"])


def bind(address: str, port: int) -> socket.socket:
    """A listening socket. Port 0: one that is free.

    Raises:
        TracerError: the machine refuses.
    """
    six = ":" in address
    try:
        made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            [(*_, where)] = socket.getaddrinfo(
                address, port, made.family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
            made.bind(where)
            made.listen(MAX_CONNECTIONS)
            made.setblocking(False)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise TracerError(
            f"Cannot listen on {_text(address, port)} ({error.strerror}): choose an address of this machine and a port "
            "that is free with --listen."
        ) from error
    return made


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as `parse_address` reads it."""
    return _text(*listener.getsockname()[:2])


def _text(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass
class _Connection:
    """A client: what it has sent, what it is still to get.

    Once all is sent it is read until it ends: closing with unread bytes makes the kernel reset the connection, and the
    answer may be lost with it.
    """

    client: socket.socket
    since: float
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview = field(default_factory=lambda: memoryview(b""))
    answered: bool = False
    discarded: int = 0


class Server:
    """Serves pages until `close`. A page is a function that is called for each request, in the server's thread."""

    def __init__(self, listener: socket.socket, pages: Mapping[str, Callable[[], Page]]) -> None:
        """Takes the socket, of `bind`, over. `pages`: by path."""
        self._listener, self._pages = listener, {path.encode("ascii"): page for path, page in pages.items()}
        self.address = address_of(listener)
        self._connections: dict[int, _Connection] = {}
        self._paused_until = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="vip-tracer-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and all connections. Idempotent."""
        self._wake.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception:  # a defect; whoever asks for health finds nobody, and starts the process anew
            _log.exception("the HTTP server on %s stopped", self.address)
            raise
        finally:
            for connection in list(self._connections.values()):
                self._end(connection)
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _step(self) -> bool:
        """Serves whoever is ready; false once the server is to close."""
        now = time.monotonic()
        waits = [connection.since + MAX_SECONDS - now for connection in self._connections.values()]
        waits += [self._paused_until - now] if self._paused_until else []
        for key, _ in self._selector.select(max(0.0, min(waits)) if waits else None):
            if key.fileobj is self._woken:
                return False
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._connections:  # it may have had to go for one that was just accepted
                self._serve(self._connections[key.fd])
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if now >= connection.since + MAX_SECONDS:
                self._end(connection)
        if self._paused_until and now >= self._paused_until:
            self._paused_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)
        return True

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:  # no descriptors, no memory: the connection stays in the queue, and would spin here
            _log.warning("cannot accept a connection on %s (%s); trying again", self.address, error.strerror)
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + _PAUSE_S
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._end(min(self._connections.values(), key=lambda connection: connection.since))
        client.setblocking(False)
        self._connections[client.fileno()] = _Connection(client, time.monotonic())
        self._selector.register(client, selectors.EVENT_READ)

    def _serve(self, connection: _Connection) -> None:
        try:
            if not connection.answered:
                self._read(connection)
            elif connection.answer:
                self._write(connection)
            else:
                self._discard(connection)
        except BlockingIOError:
            return
        except OSError:  # the client is gone: nothing is lost
            self._end(connection)

    def _read(self, connection: _Connection) -> None:
        data = connection.client.recv(MAX_REQUEST + 1 - len(connection.request))
        if not data:
            self._end(connection)
            return
        connection.request += data
        ended = re.search(rb"\r?\n\r?\n", connection.request) is not None
        if not ended and len(connection.request) <= MAX_REQUEST:
            return
        head = connection.request.startswith(b"HEAD ")
        page = self._answer(bytes(connection.request)) if ended else sentence(431, "The request is too large.")
        connection.request.clear()
        header = (
            f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\nContent-Type: {page.kind}\r\n"
            f"Content-Length: {len(page.body)}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
            "Connection: close\r\n\r\n"
        )
        connection.answer = memoryview(header.encode("ascii") + (b"" if head else page.body))
        connection.answered = True
        self._selector.modify(connection.client, selectors.EVENT_WRITE)
        self._write(connection)

    def _answer(self, request: bytes) -> Page:
        match = _REQUEST.match(request)
        if match is None:
            known = _OTHER_METHOD.match(request)
            return sentence(405, "Only GET and HEAD.") if known else sentence(400, "This is no request.")
        page = self._pages.get(match[2].partition(b"?")[0])
        if page is None:
            return sentence(404, "There is no such page.")
        try:
            return page()
        except Exception:  # noqa: BLE001  a defect of one page must not end the others
            _log.exception("a page could not be made")
            return sentence(500, "The page could not be made; see the log.")

    def _write(self, connection: _Connection) -> None:
        sent = connection.client.send(connection.answer[:_PIECE])
        connection.answer = connection.answer[sent:]
        if not connection.answer:
            connection.client.shutdown(socket.SHUT_WR)
            self._selector.modify(connection.client, selectors.EVENT_READ)

    def _discard(self, connection: _Connection) -> None:
        data = connection.client.recv(_PIECE)
        connection.discarded += len(data)
        if not data or connection.discarded > _MAX_DISCARDED:
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        del self._connections[connection.client.fileno()]
        self._selector.unregister(connection.client)
        connection.client.close()
