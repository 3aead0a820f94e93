"""The few bpf(2) calls that user space makes itself, through libbpf, which comes with bcc and maps 0.4 MB.

Knows descriptors, keys and values as bytes; what they mean is the callers' business.
"""

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError

BPF_ANY = 0
BPF_NOEXIST = 1

# enum bpf_map_type (include/uapi/linux/bpf.h)
MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_LPM_TRIE = 11
MAP_TYPE_RINGBUF = 27
BPF_F_MMAPABLE = 1 << 10

#: Elements asked for at once.
_BATCH = 4096
#: The beginning of struct bpf_map_info, which goes by its size: type, id, key size, value size, entries, flags, name.
_MAP_INFO = struct.Struct("=6I16s")
_SONAMES = ("libbpf.so.1", "libbpf.so.0")


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once.

    Raises:
        TracerError: it is not installed, or is older than 0.7 (bpf_map_create).
    """
    for soname in _SONAMES:
        try:
            loaded = ctypes.CDLL(soname, use_errno=True)
        except OSError:
            continue
        if hasattr(loaded, "bpf_map_create"):
            loaded.libbpf_set_print(None)  # what it would print, our errors say
            return loaded
    raise TracerError("libbpf 0.7 or newer was not found on this machine: install it with 'apt-get install libbpf1'.")


def version() -> str:
    """The library's version, as it says it (v1.1)."""
    said = library().libbpf_version_string
    said.restype = ctypes.c_char_p
    return str(said().decode("ascii", "replace"))


class _MapOptions(ctypes.Structure):
    """The beginning of `struct bpf_map_create_opts` (libbpf 0.7 and newer), which goes by its size."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )


def map_create(kind: int, name: str, key_size: int, value_size: int, max_entries: int, flags: int = 0) -> int:
    """Makes a map and returns its descriptor.

    Raises:
        OSError: the kernel's refusal (EPERM: no privilege; EINVAL: it does not know the type; ENOMEM: too large).
    """
    # A trie cannot be preallocated (BPF_F_NO_PREALLOC).
    options = _MapOptions(size=ctypes.sizeof(_MapOptions), map_flags=flags | (kind == MAP_TYPE_LPM_TRIE))
    fd = library().bpf_map_create(kind, name.encode(), key_size, value_size, max_entries, ctypes.byref(options))
    if fd < 0:
        code = ctypes.get_errno() or -fd
        raise OSError(code, f"{os.strerror(code)} when making the BPF map '{name}'")
    os.set_inheritable(fd, False)
    return int(fd)


def map_update(fd: int, key: bytes, value: bytes, flags: int = BPF_ANY) -> int:
    """Inserts or replaces an element; returns 0, or the errno (EEXIST and E2BIG are answers, not accidents)."""
    if library().bpf_map_update_elem(fd, key, value, ctypes.c_uint64(flags)) == 0:
        return 0
    return ctypes.get_errno()


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The element's value, or None; for a per-CPU map `value_size` counts all possible CPUs."""
    value = ctypes.create_string_buffer(value_size)
    if library().bpf_map_lookup_elem(fd, key, value) != 0:
        return None
    return value.raw


def map_delete(fd: int, key: bytes) -> bool:
    """Deletes an element; false if it was not there."""
    return bool(library().bpf_map_delete_elem(fd, key) == 0)


Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def map_batches(fd: int, key_type: np.dtype[Any], value_type: np.dtype[Any]) -> Iterator[Pair]:
    """All elements of a hash map, some thousand at a time, as two arrays of equal length: keys and values.

    The arrays are used again for the next batch. An element that comes or goes while this reads may or may not be among
    them (bpf_map_lookup_batch, 5.6+).

    Raises:
        OSError: the kernel's refusal.
    """
    lookup = library().bpf_map_lookup_batch
    keys, values = np.empty(_BATCH, key_type), np.empty(_BATCH, value_type)
    cursor = ctypes.c_uint64(0)  # holds a bucket index of 4 bytes
    first = True
    while True:
        count = ctypes.c_uint32(len(keys))
        failed = lookup(
            fd,
            None if first else ctypes.byref(cursor),
            ctypes.byref(cursor),
            keys.ctypes.data_as(ctypes.c_void_p),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.byref(count),
            None,
        )
        code = ctypes.get_errno() if failed else 0
        if code == errno.ENOSPC and count.value == 0:  # one bucket holds more than the arrays
            keys, values = np.empty(2 * len(keys), key_type), np.empty(2 * len(values), value_type)
            continue
        if failed and code not in (errno.ENOENT, errno.ENOSPC):  # ENOENT: that was the last batch
            raise OSError(code, f"{os.strerror(code)} when reading a BPF map")
        first = False
        yield keys[: count.value], values[: count.value]
        if code == errno.ENOENT:
            return


def map_items(fd: int, key_type: np.dtype[Any], value_type: np.dtype[Any]) -> Pair:
    """All elements of a hash map at once; see `map_batches`."""
    # Room for as many as the map may have: pages that nothing is written to cost nothing.
    room = map_info(fd).max_entries
    keys, values, count = np.empty(room, key_type), np.empty(room, value_type), 0
    for some_keys, some_values in map_batches(fd, key_type, value_type):
        end = count + len(some_keys)
        if end > len(keys):  # one that was deleted and inserted meanwhile may be there twice
            keys, values = np.resize(keys, 2 * end), np.resize(values, 2 * end)
        keys[count:end], values[count:end] = some_keys, some_values
        count = end
    return keys[:count], values[:count]


def map_count(fd: int, key_type: np.dtype[Any], value_type: np.dtype[Any]) -> int:
    """How many elements a hash map has now."""
    return sum(len(keys) for keys, _ in map_batches(fd, key_type, value_type))


class MapInfo(NamedTuple):
    """What the kernel says of a map."""

    name: str
    key_size: int
    value_size: int
    max_entries: int


def map_by_id(number: int) -> int:
    """A descriptor of the map with that id, which takes CAP_SYS_ADMIN.

    Raises:
        OSError: the kernel's refusal (ENOENT: there is no such map any more).
    """
    fd = library().bpf_map_get_fd_by_id(ctypes.c_uint32(number))
    if fd < 0:
        code = ctypes.get_errno() or -fd
        raise OSError(code, f"{os.strerror(code)} when opening the BPF map {number}")
    os.set_inheritable(fd, False)
    return int(fd)


def map_info(fd: int) -> MapInfo:
    """What the kernel says of a map.

    Raises:
        OSError: the kernel's refusal.
    """
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    length = ctypes.c_uint32(len(info))
    if library().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)} when asking about a BPF map")
    _, _, key_size, value_size, max_entries, _, name = _MAP_INFO.unpack(info.raw)
    return MapInfo(name.split(b"\0")[0].decode(errors="replace"), key_size, value_size, max_entries)


def iter_create(link: int) -> int:
    """A new walk of an iterator link, over the network namespace of the calling thread; read() it to its end.

    Raises:
        OSError: the kernel's refusal.
    """
    fd = library().bpf_iter_create(link)
    if fd < 0:
        code = ctypes.get_errno() or -fd
        raise OSError(code, f"{os.strerror(code)} when opening the socket iterator")
    return int(fd)


class _LoadOptions(ctypes.Structure):
    """The beginning of `struct bpf_prog_load_opts` (libbpf 0.7 and newer), which goes by its size."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


# enum bpf_prog_type and enum bpf_attach_type (include/uapi/linux/bpf.h)
PROG_TYPE_SOCKET_FILTER, PROG_TYPE_TRACEPOINT, PROG_TYPE_CGROUP_SOCK, _PROG_TYPE_TRACING = 1, 5, 9, 26
ATTACH_CONNECT4, ATTACH_CONNECT6, _ATTACH_TRACE_RAW, _ATTACH_TRACE_ITER, ATTACH_SOCK_RELEASE = 10, 11, 23, 28, 34


def load_program(kind: int, name: str, instructions: bytes, attach_type: int = 0, target: int = 0) -> int:
    """Loads a program; its descriptor.

    Args:
        kind: one of PROG_TYPE_*.
        name: for messages, and what `bpftool prog` shows.
        instructions: as the compiler made them.
        attach_type: one of ATTACH_*, where the type of program wants one.
        target: BTF id of what it attaches to, likewise.

    Raises:
        TracerError: the kernel refuses the program; with the end of what the verifier said.
    """
    log = ctypes.create_string_buffer(1 << 20)
    options = _LoadOptions(
        size=ctypes.sizeof(_LoadOptions),
        expected_attach_type=attach_type,
        attach_btf_id=target,
        log_size=len(log),
        log_buf=ctypes.cast(log, ctypes.c_char_p),
    )
    length = ctypes.c_size_t(len(instructions) // 8)
    fd = library().bpf_prog_load(kind, name.encode(), b"GPL", instructions, length, ctypes.byref(options))
    if fd < 0:
        code = ctypes.get_errno() or -fd
        said = log.value.decode(errors="replace").strip().splitlines()[-12:]
        raise TracerError(
            f"The kernel refused the BPF program {name} ({os.strerror(code)}): run as root; see 'vip-tracer doctor'."
            + "".join(f"\n  {line}" for line in said)
        )
    return int(fd)


def load_tracepoint(name: str, instructions: bytes, tracepoint: str) -> int:
    """Loads a program for a tracepoint whose arguments the verifier knows by type (tp_btf, 5.5+); its descriptor.

    Raises:
        TracerError: the kernel has no such tracepoint, or refuses the program.
    """
    target = library().libbpf_find_vmlinux_btf_id(tracepoint.encode(), _ATTACH_TRACE_RAW)
    if target <= 0:
        raise TracerError(f"This kernel has no tracepoint {tracepoint}: Linux 4.16 or newer has it.")
    return load_program(_PROG_TYPE_TRACING, name, instructions, _ATTACH_TRACE_RAW, target)


def load_iterator(name: str, instructions: bytes, kind: str) -> int:
    """Loads an iterator over the sockets of a kind, "tcp" or "udp"; a link's descriptor, to be walked by `iter_create`.

    Raises:
        TracerError: the kernel has no such iterator, or refuses the program.
    """
    target = library().libbpf_find_vmlinux_btf_id(kind.encode(), _ATTACH_TRACE_ITER)
    if target <= 0:
        raise TracerError(f"This kernel has no iterator over {kind} sockets: Linux 5.9 or newer has it.")
    program = load_program(_PROG_TYPE_TRACING, name, instructions, _ATTACH_TRACE_ITER, target)
    try:
        return _link(program, 0, _ATTACH_TRACE_ITER, f"the iterator over {kind} sockets")
    except OSError as error:
        raise TracerError(f"{error.strerror}: this kernel has no iterators. Linux 5.9 or newer has them.") from error
    finally:
        os.close(program)


def _link(prog: int, target: int, attach_type: int, what: str) -> int:
    link = library().bpf_link_create(prog, target, attach_type, None)
    if link < 0:
        code = ctypes.get_errno() or -link
        raise OSError(code, f"{os.strerror(code)} when attaching {what}")
    return int(link)


def attach_cgroup(prog: int, cgroup: int, attach_type: int) -> int:
    """Attaches a program to a cgroup (v2); the link's descriptor, with which the attachment ends.

    Raises:
        OSError: the kernel's refusal.
    """
    return _link(prog, cgroup, attach_type, "to a cgroup")


def attached_to_cgroup(cgroup: int, attach_type: int) -> int:
    """How many programs of that type are attached to a cgroup itself (BPF_PROG_QUERY, 4.15+).

    Raises:
        OSError: the kernel's refusal.
    """
    found = ctypes.c_uint32(0)
    if library().bpf_prog_query(cgroup, attach_type, 0, None, None, ctypes.byref(found)) < 0:
        code = ctypes.get_errno()
        if code != errno.ENOSPC:  # no room was given for their ids
            raise OSError(code, f"{os.strerror(code)} when asking a cgroup for its programs")
    return found.value


def attach_tracepoint(prog: int) -> int:
    """Attaches what `load_tracepoint` loaded; the link's descriptor, with which the attachment ends.

    Raises:
        OSError: the kernel's refusal.
    """
    link = library().bpf_raw_tracepoint_open(None, prog)
    if link < 0:
        code = ctypes.get_errno() or -link
        raise OSError(code, f"{os.strerror(code)} when attaching to a tracepoint")
    return int(link)


@functools.cache
def possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    return int(library().libbpf_num_possible_cpus())


def recursion_misses(prog: int) -> int:
    """How often a program was not run because it was running on that CPU already (0 where the kernel has no count).

    From /proc/self/fdinfo, which names the field since 5.12 (9ed9e9ba2337).
    """
    with open(f"/proc/self/fdinfo/{prog}", encoding="ascii") as info:
        for line in info:
            if line.startswith("recursion_misses:"):
                return int(line.split()[1])
    return 0
