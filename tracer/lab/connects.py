"""The many ways in which programs connect by TCP, each as one function.

Knows what sets a way apart from connect() on a blocking socket. A way leaves its attempts in its task: the failed
and aborted ones closed, the others standing, their exchange done. A way that this kernel cannot go raises
UnableError, and leads nowhere else instead. Standard library only: the parent imports it too, for the names.
"""

import errno
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tracer.lab.connection import (
    Address,
    Connection,
    Dial,
    UnableError,
    await_connected,
    blocking,
    family_of,
    request,
    within,
)
from tracer.lab.io_uring import ring

#: include/uapi/linux/in.h, tcp.h and socket.h: not all in Python 3.11.
IPPROTO_MPTCP = 262
TCP_FASTOPEN_CONNECT = 30
MSG_FASTOPEN = 0x20000000

#: The bits of the setting: client, server (Documentation/networking/ip-sysctl.rst).
FASTOPEN_CLIENT, FASTOPEN_SERVER = 1, 2


class Task:
    """What is to be done once. `number` makes the numbers of connections."""

    def __init__(
        self, number: Callable[[], int], peer: Address, sends: int, receives: int, buffer: memoryview,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.number = number
        self.peer = peer
        self.sends = sends
        self.receives = receives
        self.buffer = buffer
        self.options = options
        self.attempts: list[Connection] = []

    def open(self, peer: Address, sock: socket.socket) -> Connection:
        """One attempt to be, noted."""
        connection = Connection(self.number(), peer, sock)
        self.attempts.append(connection)
        return connection

    def go(self, dial: Dial, sock: socket.socket, peer: Address | None = None) -> Connection:
        """Connects and exchanges; a connection that never stood is closed."""
        connection = self.open(peer or self.peer, sock)
        if connection.connect(dial):
            connection.exchange(self.sends, self.receives, self.buffer)
        else:
            connection.close()
        return connection


def tcp_socket(peer: Address, bind: Address | None = None) -> socket.socket:
    """A socket for a peer. With `bind` its address and port are taken even from a time-wait.

    Raises UnableError if they cannot be had.
    """
    sock = socket.socket(family_of(peer[0]), socket.SOCK_STREAM)
    if bind is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(bind)
        except OSError as error:
            sock.close()
            raise UnableError(f"bind to {bind[0]}, port {bind[1]}: {error.strerror}") from error
    return sock


def need_fastopen(bit: int) -> None:
    """Raises UnableError unless this namespace's setting allows this side of TCP Fast Open."""
    allowed = int(Path("/proc/sys/net/ipv4/tcp_fastopen").read_text(encoding="ascii"))
    if not allowed & bit:
        raise UnableError(f"use TCP Fast Open: net.ipv4.tcp_fastopen is {allowed} in this pod: set it to 3 there")


def mptcp_socket(family: socket.AddressFamily) -> socket.socket:
    """An MPTCP socket. Raises UnableError where there are none."""
    try:
        return socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError as error:
        raise UnableError(
            f"make an MPTCP socket ({error.strerror}): the kernel lacks CONFIG_MPTCP or net.mptcp.enabled is 0 here"
        ) from error


def nonblocking(task: Task) -> None:
    """EINPROGRESS, poll, SO_ERROR. Option `timeout`: gives up after so many seconds, with ECANCELED."""
    task.go(within(task.options.get("timeout")), tcp_socket(task.peer))


def retry(task: Task) -> None:
    """First to the closed port of option `first`, then on the same socket to the peer: two attempts, two rows."""
    peer = tuple(task.options["first"])
    sock = tcp_socket(task.peer)
    first = task.open(peer, sock)
    if first.connect(blocking):
        first.close()
        raise UnableError(f"be refused by {peer[0]}, port {peer[1]}, before trying again: give `first` a closed port")
    second = task.go(blocking, sock)
    first.ended = second.started  # its socket lives on


def fixed_port(task: Task) -> None:
    """From the address and port of option `bind`; the client closes first, or (option `reset`) by RST.

    Repeated, a connection takes the tuple of its predecessor, over the latter's time-wait. It has seen the
    server's FIN by then: else the new SYN would meet a socket in CLOSE-WAIT, and wait a second to be repeated.
    """
    connection = task.go(blocking, tcp_socket(task.peer, tuple(task.options["bind"])))
    if not connection.ended:
        if task.options.get("reset"):
            connection.close(reset=True)
        else:
            connection.close_half(task.buffer)


def fastopen(task: Task) -> None:
    """TCP_FASTOPEN_CONNECT: connect() returns at once, and the first send() makes the SYN."""
    need_fastopen(FASTOPEN_CLIENT)
    sock = tcp_socket(task.peer)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)

    def dial(data: bytes | memoryview) -> int:
        sock.connect(task.peer)
        return sock.send(data)

    _with_data(task, sock, dial)


def sendto_fastopen(task: Task) -> None:
    """sendto() with MSG_FASTOPEN: no connect() at all."""
    need_fastopen(FASTOPEN_CLIENT)
    sock = tcp_socket(task.peer)
    _with_data(task, sock, lambda data: sock.sendto(data, MSG_FASTOPEN, task.peer))


def _with_data(task: Task, sock: socket.socket, dial: Callable[[bytes | memoryview], int]) -> None:
    """The first data goes with the SYN if the kernel holds a cookie of the server's, else after the handshake."""
    connection = task.open(task.peer, sock)
    first, *rest = request(task.sends, task.receives)
    try:
        count = dial(first)
        await_connected(sock)
    except OSError as error:
        connection.fail(error)
        connection.close()
        return
    connection.stand()
    connection.sent = count
    try:
        for part in (first[count:], *rest):
            connection.send(part)
        connection.take(task.receives, task.buffer)
    except OSError as error:
        connection.fail(error)


def io_uring(task: Task) -> None:
    """IORING_OP_CONNECT. Option `in_worker`: in a thread of the kernel's making."""
    dial = partial(ring().connect, in_worker=task.options.get("in_worker", False))
    task.go(dial, tcp_socket(task.peer))


def mptcp(task: Task) -> None:
    """An MPTCP socket; if the server has none, the kernel falls back to TCP."""
    task.go(blocking, mptcp_socket(family_of(task.peer[0])))


def mapped(task: Task) -> None:
    """An AF_INET6 socket to the v4-mapped address: IPv4 on the wire, and the same 16 bytes in the ledger."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError as error:
        raise UnableError(f"make an IPv6 socket ({error.strerror}): the kernel has no IPv6") from error
    task.go(blocking, sock, (f"::ffff:{task.peer[0]}", task.peer[1]))


def abort(task: Task) -> None:
    """Closes right after connect() has said EINPROGRESS. Its errno is ECANCELED, unless it had failed by then.

    Inside one machine the handshake is often done by then: `established` says so. With an address where nobody
    answers it never is.
    """
    connection = task.open(task.peer, tcp_socket(task.peer))
    if connection.connect(within(0)):
        connection.error = errno.ECANCELED
    connection.close()


#: Every way by its name, with the options that it takes; `keep` is for the client, which then does not close.
WAYS: dict[str, tuple[Callable[[Task], None], frozenset[str]]] = {
    "nonblocking": (nonblocking, frozenset({"keep", "timeout"})),
    "retry": (retry, frozenset({"keep", "first"})),
    "fixed-port": (fixed_port, frozenset({"bind", "reset"})),
    "fastopen": (fastopen, frozenset({"keep"})),
    "sendto-fastopen": (sendto_fastopen, frozenset({"keep"})),
    "io_uring": (io_uring, frozenset({"keep", "in_worker"})),
    "mptcp": (mptcp, frozenset({"keep"})),
    "mapped": (mapped, frozenset({"keep"})),
    "abort": (abort, frozenset()),
}

#: Options without which a way cannot be gone.
REQUIRED = {"retry": "first", "fixed-port": "bind"}
