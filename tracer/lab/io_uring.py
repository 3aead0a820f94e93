"""connect() through io_uring: the way of event loops that make no connect() system call.

Knows one ring and one operation, over raw system calls. Kernel facts: include/uapi/linux/io_uring.h; the numbers of
the two calls are the same on all architectures. Standard library only.
"""

import ctypes
import errno
import functools
import mmap
import os
import socket
import struct

from tracer.lab import child
from tracer.lab.connection import Address, UnableError

_SETUP, _ENTER = 425, 426
_GETEVENTS = 1
_OP_CONNECT = 16
#: Features that came with kernel 5.5, as IORING_OP_CONNECT did (5.4 for the first).
_FEATURES = 1 << 0 | 1 << 2  # SINGLE_MMAP, SUBMIT_STABLE
_SQES = 0x10000000  # IORING_OFF_SQES
_FLAG_ASYNC = 1 << 4  # IOSQE_ASYNC

#: struct io_uring_params: ten words, then the offsets in the submission and in the completion ring.
_PARAMS = struct.Struct("=10I10I10I")
#: struct io_uring_sqe: opcode, flags, ioprio, fd, off (here the length of the address), addr; 64 bytes.
_SQE = struct.Struct("=BBHiQQ40x")
#: struct io_uring_cqe: user_data, res, flags.
_CQE = struct.Struct("=QiI")
_WORD = struct.Struct("=I")


class Ring:
    """A ring for one operation at a time."""

    def __init__(self) -> None:
        """Raises UnableError if the kernel has or allows no io_uring."""
        self._syscall = child.libc().syscall
        params = ctypes.create_string_buffer(_PARAMS.size)
        descriptor = self._syscall(_SETUP, 1, params)
        if descriptor < 0:
            raise UnableError(
                f"connect by io_uring: io_uring_setup failed ({os.strerror(ctypes.get_errno())}): the kernel lacks "
                "CONFIG_IO_URING, or kernel.io_uring_disabled or a seccomp filter forbids it"
            )
        self._descriptor = descriptor
        fields = _PARAMS.unpack(params.raw)
        if fields[5] & _FEATURES != _FEATURES:
            os.close(descriptor)
            raise UnableError("connect by io_uring: IORING_OP_CONNECT needs kernel 5.5 or later")
        submission, completion = fields[10:20], fields[20:30]
        self._tail, self._mask, self._array = submission[1], submission[2], submission[6]
        self._done, self._done_mask, self._results = completion[0], completion[2], completion[5]
        size = max(self._array + fields[0] * _WORD.size, self._results + fields[1] * _CQE.size)
        self._ring = mmap.mmap(descriptor, size, offset=0)
        self._entries = mmap.mmap(descriptor, fields[0] * _SQE.size, offset=_SQES)

    def connect(self, sock: socket.socket, peer: Address, in_worker: bool) -> None:
        """Connects, and waits until that is done. Raises OSError as connect() would.

        `in_worker`: the kernel does it in a thread of its own making (named iou-wrk-PID) instead of this one.
        """
        address = _sockaddr(sock.family, peer)
        held = ctypes.create_string_buffer(address, len(address))
        tail = self._word(self._tail)
        slot = tail & self._word(self._mask)
        flags = _FLAG_ASYNC if in_worker else 0
        _SQE.pack_into(
            self._entries, slot * _SQE.size,
            _OP_CONNECT, flags, 0, sock.fileno(), len(address), ctypes.addressof(held),
        )  # fmt: skip
        _WORD.pack_into(self._ring, self._array + slot * _WORD.size, slot)
        # the kernel reads these stores in the system call that this same thread makes: no barrier is needed
        _WORD.pack_into(self._ring, self._tail, (tail + 1) & 0xFFFFFFFF)
        if self._syscall(_ENTER, self._descriptor, 1, 1, _GETEVENTS, None, 0) != 1:
            error = ctypes.get_errno() or errno.EIO
            raise OSError(error, os.strerror(error))
        head = self._word(self._done)
        slot = head & self._word(self._done_mask)
        _, result, _ = _CQE.unpack_from(self._ring, self._results + slot * _CQE.size)
        _WORD.pack_into(self._ring, self._done, (head + 1) & 0xFFFFFFFF)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _word(self, offset: int) -> int:
        value: int = _WORD.unpack_from(self._ring, offset)[0]
        return value


@functools.cache
def ring() -> Ring:
    """The process's one ring, made when it is first asked for. Raises UnableError."""
    return Ring()


def _sockaddr(family: int, peer: Address) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    raw = socket.inet_pton(family, peer[0])
    if family == socket.AF_INET6:
        return struct.pack("=H", family) + struct.pack("!HI", peer[1], 0) + raw + bytes(4)
    return struct.pack("=H", family) + struct.pack("!H", peer[1]) + raw + bytes(8)
