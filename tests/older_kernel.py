"""A kernel that lacks a command of bpf(2), for subprocesses: `preexec_fn=lambda: lacks(Command.MAP_CREATE)`.

A seccomp filter answers as a kernel does that does not know the command, or the type that it is asked for: EINVAL.
"""

import ctypes
import enum
import errno
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_BPF = {"x86_64": 321, "aarch64": 280}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ERROR, _ALLOW = 0x00050000, 0x7FFF0000


class Command(enum.IntEnum):
    """enum bpf_cmd (include/uapi/linux/bpf.h)."""

    MAP_CREATE = 0
    RAW_TRACEPOINT_OPEN = 17
    LINK_CREATE = 28


def lacks(command: Command) -> None:
    """For this process and its children."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, 0),  # the number of the system call
            (_JUMP_IF_EQUAL, 0, 3, _BPF[platform.machine()]),
            (_LOAD, 0, 0, 16),  # its first argument
            (_JUMP_IF_EQUAL, 0, 1, command),
            (_RETURN, 0, 0, _ERROR | errno.EINVAL),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    instructions = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _FILTER, header) == 0, ctypes.get_errno()
