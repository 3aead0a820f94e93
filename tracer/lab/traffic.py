"""Servers and clients inside the lab's pods: everything they can be asked for, and what the kernel says of it.

Knows requests and their limits. How a worker is run is in `worker`, what it does inside the pod in `server` and
`client`; which pods there are is in `cluster`.
"""

import ipaddress
from collections.abc import Iterable
from typing import Any

import numpy as np

from tracer.errors import UsageError
from tracer.lab import wire
from tracer.lab.connects import REQUIRED, WAYS
from tracer.lab.netns import Namespace
from tracer.lab.worker import LEDGER, Ledger, Worker, addresses

__all__ = ["LEDGER", "MOST_IN_DATAGRAM", "Client", "Ledger", "Server", "Worker", "addresses", "socket_statistics"]

#: What fits into one UDP datagram over IPv4: 65,535 bytes less both headers.
MOST_IN_DATAGRAM = 65_507

_COUNTS = ("bytes_sent", "bytes_acked", "bytes_received", "segs_out", "segs_in")


class Server(Worker):
    """A server in a backend pod."""

    kind = "server"

    def listen(
        self, where: Iterable[str], port: int, protocol: str = "tcp",
        *, fastopen: bool = False, mptcp: bool = False, reuse_port: int = 0,
    ) -> None:  # fmt: skip
        """Serves on these addresses of the pod, until `stop_listening`; `protocol` is "tcp" or "udp".

        `reuse_port` opens so many sockets on each address with SO_REUSEPORT. `fastopen` (which needs
        net.ipv4.tcp_fastopen=3 in the pod) and `mptcp` are for TCP. Raises TracerError if the pod or its kernel
        cannot do it, or the port is taken.
        """
        if protocol not in ("tcp", "udp"):
            raise UsageError(f"The lab's servers speak tcp and udp, not {protocol}: choose one of them")
        if protocol == "udp" and (fastopen or mptcp):
            raise UsageError("There is no fastopen or mptcp over udp: leave them out, or serve tcp")
        self.ask(
            do="listen", addresses=list(where), port=port, protocol=protocol, fastopen=fastopen, mptcp=mptcp,
            reuse_port=reuse_port,
        )  # fmt: skip

    def stop_listening(self) -> None:
        """Refuses new connections, and datagrams, from now on; connections that stand go on."""
        self.ask(do="stop listening")

    def reset(self, on: bool = True) -> None:
        """From now on resets each connection when data arrives on it, or (False) no longer does."""
        self.ask(do="reset", on=on)

    def close_first(self, on: bool = True) -> None:
        """From now on closes each connection with the last byte of its first answer, so that the time-wait is here."""
        self.ask(do="close first", on=on)


class Client(Worker):
    """A client in a pod. Every method returns the ledger rows of the connections and flows it concerned.

    `sends` and `receives` are the application's bytes of one exchange, the 8-byte header included. Zero and zero
    means: connect and close. `timeout` is in seconds; None leaves it to the kernel (two minutes for a SYN).

    Ports stay in TIME_WAIT for a minute, as anywhere: a client makes some 27,000 quick connections a minute to one
    address and port. Beyond that the kernel searches long for a free port (a hundred times slower): use more clients.
    """

    kind = "client"

    def begin_connects(
        self, count: int, where: tuple[str, int], sends: int = 100, receives: int = 100,
        *, rate: float | None = None, timeout: float | None = None,
    ) -> None:  # fmt: skip
        """`connect_many` without waiting; `finish_connects` has the rows."""
        _check(sends, receives)
        self.begin(
            do="connect", count=count, address=where[0], port=where[1], sends=sends, receives=receives,
            rate=rate, timeout=timeout,
        )  # fmt: skip

    def finish_connects(self) -> Ledger:
        """The rows of `begin_connects`, when it is done."""
        return np.frombuffer(self.finish()[1], dtype=LEDGER)

    def connect_many(
        self, count: int, where: tuple[str, int], sends: int = 100, receives: int = 100,
        *, rate: float | None = None, timeout: float | None = None,
    ) -> Ledger:  # fmt: skip
        """Connects, exchanges and closes `count` times in a row, at `rate` a second or as fast as it can."""
        self.begin_connects(count, where, sends, receives, rate=rate, timeout=timeout)
        return self.finish_connects()

    def connect_as(
        self, how: str, count: int, where: tuple[str, int], sends: int = 100, receives: int = 100, **options: Any
    ) -> Ledger:
        """Connects in one of the `connects.WAYS`, exchanges and closes `count` times in a row.

        "nonblocking" (option `timeout`, seconds); "retry" (`first`, a closed port: two rows each); "fixed-port"
        (`bind`, the source address and port, each time the same; `reset`, to close by RST); "fastopen" and
        "sendto-fastopen"; "io_uring" (`in_worker`); "mptcp"; "mapped"; "abort" (exchanges nothing). With `keep` all
        but "fixed-port" and "abort" leave their connections open, as `hold` does.
        Raises TracerError where the kernel of the pod cannot do it.
        """
        _check(sends, receives)
        if how not in WAYS:
            raise UsageError(f"There is no way to connect called {how!r}: choose one of {', '.join(WAYS)}")
        unknown = sorted(options.keys() - WAYS[how][1])
        if unknown:
            known = ", ".join(sorted(WAYS[how][1])) or "none"
            raise UsageError(f"To connect as {how} takes no option {', '.join(unknown)}: it knows {known}")
        if how in REQUIRED and REQUIRED[how] not in options:
            raise UsageError(f"To connect as {how} needs the option {REQUIRED[how]}, an (address, port)")
        if how == "mapped" and ":" in where[0]:
            raise UsageError(f"An IPv4 address can be mapped, not {where[0]}: give one, or connect as nonblocking")
        if "fastopen" in how and not sends:
            raise UsageError(f"To connect as {how} is to send data: raise `sends`")
        return self.rows(
            do="connect as", how=how, count=count, address=where[0], port=where[1], sends=sends, receives=receives,
            options=options,
        )  # fmt: skip

    def datagrams(
        self, flows: int, where: tuple[str, int], sends: int = 100, receives: int = 100,
        *, times: int = 1, connected: bool = True, source_port: int | None = None, timeout: float = 5.0,
        keep: bool = False,
    ) -> Ledger:  # fmt: skip
        """UDP: on each of `flows` sockets, one after the other, `times` datagrams of `sends` bytes.

        Each asks for one of `receives` bytes (0: none) and waits for it at most `timeout` seconds; a flow whose
        answer does not come ends there, with ETIMEDOUT. Sockets are connected, or use sendto and recvfrom; their
        ports are consecutive from `source_port`, or the kernel's choice. All differ: the sockets are closed together
        at the end, or with `keep` left open, as by `hold`. Another call may be given the same ports again.
        """
        _check_datagram(sends, receives)
        return self.rows(
            do="datagrams", flows=flows, address=where[0], port=where[1], sends=sends, receives=receives, times=times,
            connected=connected, source_port=source_port or 0, timeout=timeout, keep=keep,
        )  # fmt: skip

    def hold(
        self, count: int, where: tuple[str, int], *, timeout: float | None = None, bind: tuple[str, int] | None = None
    ) -> Ledger:
        """Opens `count` connections and keeps them; `number` names each for `exchange` and `release`.

        `bind` is the source address and port of the first; the others follow on the next ports.
        """
        return self.rows(do="hold", count=count, address=where[0], port=where[1], timeout=timeout, bind=bind)

    def exchange(self, numbers: Iterable[int], sends: int, receives: int, times: int = 1) -> Ledger:
        """So many exchanges on each of these held connections and flows, round robin."""
        _check(sends, receives)
        chosen = [int(number) for number in numbers]
        return self.rows(do="exchange", numbers=chosen, sends=sends, receives=receives, times=times)

    def release(self, numbers: Iterable[int], *, reset: bool = False, half: bool = False) -> Ledger:
        """Closes these held connections and flows.

        `reset`: with a RST. `half`: ends this direction, reads to the end of the other, and then closes.
        """
        if reset and half:
            raise UsageError("A connection ends by RST or by halves, not both: choose `reset` or `half`")
        return self.rows(do="close", numbers=[int(number) for number in numbers], reset=reset, half=half)


def _check(sends: int, receives: int) -> None:
    least = wire.HEADER.size
    if (sends or receives) and not least <= sends < 1 << 32:
        raise UsageError(f"An exchange sends at least its header of {least} bytes, not {sends}: raise `sends`")
    if not 0 <= receives < 1 << 32:
        raise UsageError(f"An exchange returns 0 to 4 GiB, not {receives} bytes: change `receives`")


def _check_datagram(sends: int, receives: int) -> None:
    if not (wire.HEADER.size <= sends <= MOST_IN_DATAGRAM and 0 <= receives <= MOST_IN_DATAGRAM):
        raise UsageError(
            f"A datagram holds its header of {wire.HEADER.size} to {MOST_IN_DATAGRAM} bytes, not {sends} (and "
            f"{receives} back): change `sends` or `receives`"
        )


def socket_statistics(namespace: Namespace, *which: str) -> dict[tuple[str, int, str, int], dict[str, int]]:
    """What the kernel's sock_diag knows of the open TCP connections of a namespace, as `ss -tin` prints it.

    An independent truth for connections that are held. The key is (local address, port, peer address, port); the
    values are counts from the connection's beginning, in the words of struct tcp_info: bytes_sent (retransmitted ones
    too), bytes_acked (one more, for the SYN, on the side that dialled), bytes_received, segs_out (on the side that
    accepted without its SYN-ACK, which another socket sent), segs_in, retrans, and rtt, smoothed, in microseconds.
    `which` is a filter of ss, as `"dport = :80"`.
    """
    found = {}
    for line in namespace.run(["ss", "-tinHO", *which]).splitlines():
        _, _, _, local, peer, *words = line.split()
        values = dict(word.split(":", 1) for word in words if ":" in word)
        numbers = {name: int(values.get(name, 0)) for name in _COUNTS}  # ss leaves out what is 0
        numbers["retrans"] = int(values.get("retrans", "0/0").partition("/")[2])  # "now/ever"
        numbers["rtt"] = round(float(values.get("rtt", "0/0").partition("/")[0]) * 1000)  # "mean/deviation" in ms
        found[*_endpoint(local), *_endpoint(peer)] = numbers
    return found


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    parsed = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed), int(port)
