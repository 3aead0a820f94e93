"""TCP sockets of a network namespace as the kernel lists them: a sock_diag dump as NumPy arrays.

Knows the messages of include/uapi/linux/{sock_diag,inet_diag}.h. A second witness of what the tracepoints tell: no BPF
program and no map of ours has a part in it.
"""

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError
from tracer.record import TUPLE

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states, and any sockid
_TCP = 6
_BUFFER = 1 << 16

# include/net/tcp_states.h
ESTABLISHED, SYN_SENT, LISTEN = 1, 2, 10
_FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 4, 5, 8, 9, 11
#: All but those that are over (TIME_WAIT, CLOSE) and those that are no full sockets yet.
_STATES = (ESTABLISHED, SYN_SENT, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, LISTEN, _CLOSING)

#: One socket. The tuple is its own view: `src` is itself, whoever dialled; zone and protocol as in the maps.
SOCKET = np.dtype([("tuple", TUPLE), ("netns", "<u4"), ("cookie", "<u8"), ("state", "u1")])

#: inet_diag_msg, the head of each message.
_MESSAGE = np.dtype(
    [
        ("family", "u1"),
        ("state", "u1"),
        ("timer", "u1"),
        ("retransmits", "u1"),
        ("src_port", ">u2"),
        ("dst_port", ">u2"),
        ("src", "V16"),
        ("dst", "V16"),
        ("interface", "<u4"),
        ("cookie", "<u8"),
        ("numbers", "<u4", (5,)),
    ]
)
_V4_MAPPED = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)


def decode(data: bytes) -> tuple[npt.NDArray[Any], bool]:
    """The sockets in one datagram of a dump (an array of SOCKET, netns 0), and whether it ends the dump.

    Raises:
        TracerError: the kernel refuses, or the datagram is not understood: what is half read proves nothing.
    """
    places, at, done = [], 0, False
    while at < len(data) and not done:
        if at + _HEADER.size > len(data):
            raise _malformed(data[at:])
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            raise _malformed(data[at:])
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            _refusal(kind, data[at + _HEADER.size : at + length])
            done = True
        elif kind == _BY_FAMILY:
            if length < _HEADER.size + _MESSAGE.itemsize:
                raise _malformed(data[at : at + length])
            places.append(at + _HEADER.size)
        at += (length + 3) & ~3
    raw = np.frombuffer(data, np.uint8)
    heads = raw[np.array(places, np.int64)[:, None] + np.arange(_MESSAGE.itemsize)].view(_MESSAGE)[:, 0]
    heads = heads[np.isin(heads["family"], (socket.AF_INET, socket.AF_INET6))]
    found = np.zeros(len(heads), SOCKET)
    v4 = heads["family"] == socket.AF_INET
    for name in ("src", "dst"):
        found["tuple"][name] = _address(heads[name], v4)
        found["tuple"][f"{name}_port"] = heads[f"{name}_port"]
    found["tuple"]["protocol"] = _TCP
    found["cookie"], found["state"] = heads["cookie"], heads["state"]
    return found, done


def _address(raw: npt.NDArray[Any], v4: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """v4-mapped, where the address is the first four bytes."""
    octets = np.ascontiguousarray(raw).view("u1").reshape(-1, 16).copy()
    octets[v4, 12:] = octets[v4, :4]
    octets[v4, :12] = _V4_MAPPED
    return octets.view("V16")[:, 0]


def _refusal(kind: int, body: bytes) -> None:
    """Raises TracerError if the last message of a dump carries an error: both kinds begin with its negative number."""
    code = -int.from_bytes(body[:4], "little", signed=True)
    if code or kind == _NLMSG_ERROR:
        reason = errno.errorcode.get(code, str(code))
        raise TracerError(
            f"The kernel does not list its TCP sockets ({reason}): it needs tcp_diag ('modprobe tcp_diag')."
        )


def _malformed(data: bytes) -> TracerError:
    return TracerError(
        f"The kernel's list of TCP sockets was not understood ({len(data)} bytes: {data[:24].hex()}): please report "
        "this with the output of 'uname -r'."
    )


def dump(between: Callable[[], object] = lambda: None) -> npt.NDArray[Any]:
    """The TCP sockets of the calling thread's network namespace that stand, listen, begin or end: an array of SOCKET.

    Args:
        between: called after each datagram, as a long list takes a while.

    Raises:
        TracerError: the kernel does not list them.
    """
    parts = [np.empty(0, SOCKET)]
    states = sum(1 << state for state in _STATES)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.bind((0, 0))
            netlink.settimeout(30)
            for family in (socket.AF_INET, socket.AF_INET6):
                body = _REQUEST.pack(family, _TCP, 0, states)
                netlink.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST_DUMP, family, 0) + body)
                done = False
                while not done:
                    found, done = decode(netlink.recv(_BUFFER))
                    parts.append(found)
                    between()
    except OSError as error:
        raise TracerError(f"The TCP sockets cannot be listed ({error}): try 'ss -t'.") from error
    return np.concatenate(parts, dtype=SOCKET)
