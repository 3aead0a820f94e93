"""Byte offsets of the kernel fields that the programs read, from the kernel's own type information (BTF).

Knows which fields those are and what they become in C (`-D OFFSET_<struct>__<field>`). libbpf parses BTF.
"""

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path

from tracer.errors import TracerError
from tracer.kernel import libbpf

VMLINUX = Path("/sys/kernel/btf/vmlinux")

#: Every kernel field that bpf/ reads. A kernel without one of them is refused by name.
FIELDS: tuple[tuple[str, str], ...] = (
    ("sock_common", "skc_daddr"),
    ("sock_common", "skc_rcv_saddr"),
    ("sock_common", "skc_dport"),
    ("sock_common", "skc_num"),
    ("sock_common", "skc_family"),
    ("sock_common", "skc_state"),
    ("sock_common", "skc_net"),
    ("sock_common", "skc_v6_daddr"),
    ("sock_common", "skc_v6_rcv_saddr"),
    ("sock", "sk_err"),
    ("sock", "sk_protocol"),
    ("sock_common", "skc_flags"),
    ("sock", "sk_wmem_alloc"),
    ("inet_sock", "inet_sport"),
    ("tcp_sock", "bytes_sent"),
    ("tcp_sock", "bytes_retrans"),
    ("tcp_sock", "bytes_received"),
    ("tcp_sock", "segs_out"),
    ("tcp_sock", "segs_in"),
    ("tcp_sock", "total_retrans"),
    ("tcp_sock", "srtt_us"),
    ("net", "ns"),
    ("net", "nf"),
    ("netns_nf", "hooks_ipv4"),
    ("netns_nf", "hooks_ipv6"),
    ("ns_common", "inum"),
    ("task_struct", "comm"),
    ("task_struct", "tgid"),
    ("task_struct", "cgroups"),
    ("css_set", "dfl_cgrp"),
    ("cgroup", "kn"),
    ("kernfs_node", "id"),
    ("task_struct", "files"),
    ("files_struct", "fdt"),
    ("fdtable", "max_fds"),
    ("fdtable", "fd"),
    ("file", "private_data"),
    ("socket", "sk"),
    ("socket", "state"),
)
_KIND_STRUCT, _KIND_UNION, _KIND_ENUM, _KIND_VARIABLE = 4, 5, 6, 14
_KINDS_NAMED = {8, 9, 10, 11}  # typedef, volatile, const, restrict
#: Types nest less deeply than this in any kernel; broken ones may go round in a circle.
_DEEPEST = 32


def _broken(path: Path) -> TracerError:
    return TracerError(f"The kernel's type information {path} contradicts itself: see 'vip-tracer doctor'.")


class _Btf:
    """One parsed BTF blob."""

    def __init__(self, path: Path) -> None:
        lib = libbpf.library()
        lib.btf__parse.restype = ctypes.c_void_p
        lib.btf__type_by_id.restype = ctypes.c_void_p
        lib.btf__name_by_offset.restype = ctypes.c_char_p
        lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        lib.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        lib.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
        lib.btf__free.argtypes = [ctypes.c_void_p]
        lib.libbpf_get_error.argtypes = [ctypes.c_void_p]
        lib.libbpf_get_error.restype = ctypes.c_long
        self._lib = lib
        self._path = path
        self._btf = lib.btf__parse(str(path).encode(), None)
        if not self._btf or lib.libbpf_get_error(self._btf):
            self._btf = None
            raise TracerError(
                f"The kernel's type information {path} is not there or cannot be parsed: the tracer needs a kernel "
                "built with CONFIG_DEBUG_INFO_BTF=y (every current distribution's is)."
            )

    def close(self) -> None:
        if self._btf:
            self._lib.btf__free(self._btf)
            self._btf = None

    def _type(self, type_id: int) -> tuple[int, int, int, int]:
        """(address, kind, number of members, size or referenced type)"""
        address = self._lib.btf__type_by_id(self._btf, type_id)
        if not address:
            raise _broken(self._path)
        _, info, size = struct.unpack("<III", ctypes.string_at(address, 12))
        return address, info >> 24 & 0x1F, info & 0xFFFF, size

    def _behind_typedefs(self, type_id: int) -> tuple[int, int]:
        """(type, kind) behind typedefs and qualifiers."""
        for _ in range(_DEEPEST):
            _, kind, _, inner = self._type(type_id)
            if kind not in _KINDS_NAMED:
                return type_id, kind
            type_id = inner
        raise _broken(self._path)

    def find(self, name: str, kind: int) -> int | None:
        type_id = self._lib.btf__find_by_name_kind(self._btf, name.encode(), kind)
        return type_id if type_id > 0 else None

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        """(name, type, offset in bytes) of a struct's or union's members; a bit field's byte is where it begins."""
        address, _, count, _ = self._type(type_id)
        raw = ctypes.string_at(address + 12, 12 * count)
        for name, member, offset in struct.iter_unpack("<III", raw):
            text = (self._lib.btf__name_by_offset(self._btf, name) or b"").decode(errors="replace")
            yield text, member, (offset & 0xFFFFFF) // 8

    def offset(self, type_id: int, field: str, depth: int = 0) -> int | None:
        """Byte offset of a field, also inside anonymous structs and unions; None if there is none."""
        if depth > _DEEPEST:
            raise _broken(self._path)
        for name, member, offset in self._members(type_id):
            if name == field:
                return offset
            if name:
                continue
            inner, kind = self._behind_typedefs(member)
            if kind in (_KIND_STRUCT, _KIND_UNION):
                found = self.offset(inner, field, depth + 1)
                if found is not None:
                    return offset + found
        return None

    def constant(self, enum: str, name: str) -> int | None:
        """The value of an enum's constant; None if there is none."""
        type_id = self.find(enum, _KIND_ENUM)
        if type_id is None:
            return None
        address, _, count, _ = self._type(type_id)
        for label, value in struct.iter_unpack("<Ii", ctypes.string_at(address + 12, 8 * count)):
            if self._lib.btf__name_by_offset(self._btf, label) == name.encode():
                return int(value)
        return None


def defines(path: Path = VMLINUX) -> dict[str, int]:
    """The C constants that describe this kernel: OFFSET_*, SOCK_DONE, and HAS_TASK_BTF, whether it has that helper.

    Raises:
        TracerError: no BTF, or a field that the programs read is not in this kernel.
    """
    btf = _Btf(path)
    try:
        constants: dict[str, int] = {}
        for struct_name, field in FIELDS:
            type_id = btf.find(struct_name, _KIND_STRUCT)
            offset = None if type_id is None else btf.offset(type_id, field)
            if offset is None:
                raise TracerError(
                    f"This kernel has no field '{field}' in 'struct {struct_name}' (looked up in {path}), which the "
                    "tracer reads: the kernel is too old or too new for this version; see docs/compatibility.md."
                )
            constants[f"OFFSET_{struct_name}__{field}"] = offset
        done = btf.constant("sock_flags", "SOCK_DONE")
        if done is None:
            raise TracerError(f"This kernel has no flag SOCK_DONE (looked up in {path}), which the tracer reads.")
        constants["SOCK_DONE"] = done
        # 5.11 (3ca1032ab7ab); until then the helpers that tell of the process are called.
        constants["HAS_TASK_BTF"] = int(btf.constant("bpf_func_id", "BPF_FUNC_get_current_task_btf") is not None)
    finally:
        btf.close()
    return constants


def are_tracepoints_preemptible(path: Path = VMLINUX) -> bool:
    """Whether another task may take the CPU while a program runs on a tracepoint (7.0, a46023d5616e).

    Since then a fast SRCU domain of their own protects them: types tell of its variable, per CPU, and of the counters
    of fast domains. 6.1 and 6.12 have a variable of that name without those, 6.18 the counters without the variable.

    Raises:
        TracerError: no BTF.
    """
    btf = _Btf(path)
    try:
        domain = btf.find("tracepoint_srcu_srcu_data", _KIND_VARIABLE)
        return domain is not None and btf.find("srcu_ctr", _KIND_STRUCT) is not None
    finally:
        btf.close()
