"""The layout contract: the compiler that the product uses says what the C side is, and the Python side must agree."""

import errno
import re
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from tracer import schema
from tracer.kernel import compiler, maps
from tracer.record import (
    NAT_NAMES,
    NAT_SOURCE_NAMES,
    RECORD,
    RESULT_ABORTED,
    RESULT_OPEN,
    ROLE_NAMES,
    TUPLE,
    Counter,
    Flag,
    Nat,
    NatSource,
    Role,
    result_name,
)

HEADERS = compiler.source_directory()

#: C name of a struct → what Python believes of it, and how a field is called in C where the names differ.
STRUCTS: dict[str, tuple[np.dtype, dict[str, str]]] = {
    "tuple": (TUPLE, {}),
    "record": (RECORD, {}),
    "translation": (maps.TRANSLATION, {}),
    "owner": (maps.OWNER, {}),
    "row": (maps.ROW, {}),
    "network": (maps.NETWORK, {}),
    "young": (maps.YOUNG, {}),
    "connection": (
        maps.CONNECTION,
        {
            name: f"reported.{name}"
            for name in (
                "bytes_sent",
                "bytes_received",
                "packets_sent",
                "packets_received",
                "retransmits",
                "spot",
            )
        },
    ),
}

#: C name of an enum → header, and name → value as Python has it.
ENUMS: dict[str, tuple[str, dict[str, int]]] = {
    "counter": ("counters.h", {f"COUNT_{c.name}": c.value for c in Counter} | {"COUNTERS": len(Counter)}),
    "record_flag": ("record.h", {f"FLAG_{f.name}": f.value for f in Flag}),
    "nat": ("record.h", {f"NAT_{n}": int(v) for n, v in Nat.__members__.items()}),
    "role": ("record.h", {f"ROLE_{r.name}": r.value for r in Role}),
    "nat_source": ("record.h", {f"SOURCE_{s.name}": s.value for s in NatSource}),
    "result": ("record.h", {"RESULT_OPEN": RESULT_OPEN, "RESULT_ABORTED": RESULT_ABORTED}),
    "mode": ("maps.h", {name: value for name, value in vars(maps).items() if name.startswith("MODE_")}),
    "control": (
        "maps.h",
        {name: value for name, value in vars(maps).items() if name.startswith("CONTROL_")}
        | {"CONTROL_CROWDED": maps.CONTROLS - 1, "CONTROLS": maps.CONTROLS},
    ),
    "ended": ("maps.h", {"ENDED": 1, "ENDED_UNTOLD": maps.ENDED_UNTOLD}),
    "claim": ("maps.h", {name: value for name, value in vars(maps).items() if name.startswith("CLAIM_")}),
    "dials": ("maps.h", {name: value for name, value in vars(maps).items() if name.startswith("DIALS_")}),
}

_COMPILE = """
import os, sys
os.environ["BCC_KERNEL_SOURCE"] = sys.argv[1]
import bcc
bcc.BPF(src_file=sys.argv[2], cflags=sys.argv[3:])
"""


def assertions() -> list[str]:
    lines = []
    for struct, (dtype, renamed) in STRUCTS.items():
        lines.append(f"sizeof(struct {struct}) == {dtype.itemsize}")
        for field, (kind, offset, *_) in (dtype.fields or {}).items():
            c_name = renamed.get(field, field)
            lines.append(f"offsetof(struct {struct}, {c_name}) == {offset}")
            lines.append(f"sizeof(((struct {struct} *)0)->{c_name}) == {kind.itemsize}")
    lines.append(f"sizeof(struct dial) == {maps.DIAL_BYTES}")
    lines.append(f"1 << SPOT_BITS == {maps.SPOTS}")
    for _, values in ENUMS.values():
        lines += [f"{name} == {value}" for name, value in values.items()]
    return lines


def compile_with(conditions: list[str], tmp_path: Path) -> str:
    """What the compiler says against these conditions; empty if they all hold."""
    source = tmp_path / "layout.c"
    asserted = (f'_Static_assert({condition}, "layout");\n' for condition in conditions)
    source.write_text('#include "maps.h"\n' + "".join(asserted))
    flags = compiler.flags({})
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(HEADERS), str(source), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        assert "error: " in done.stderr, f"that was not the compiler's answer: {done.stderr}"
        return done.stderr
    return ""


@pytest.mark.needs("bpf")
def test_both_sides_have_the_same_bytes(tmp_path: Path) -> None:
    conditions = assertions()
    assert len(conditions) > 150
    assert compile_with(conditions, tmp_path) == ""


@pytest.mark.needs("bpf")
def test_the_compiler_would_have_told(tmp_path: Path) -> None:
    wrong = [
        f"offsetof(struct record, result) == {(RECORD.fields or {})['result'][1] + 2}",
        f"COUNT_CLOSED == {Counter.CLOSED + 1}",
        "sizeof(struct connection) == 1",
    ]
    said = compile_with(["sizeof(struct tuple) == 40", *wrong], tmp_path)
    assert said.count("error: static") + said.count("error: _Static") == len(wrong)


@pytest.mark.parametrize("dtype", [TUPLE, RECORD, maps.TRANSLATION, maps.CONNECTION, maps.YOUNG, maps.ROW, maps.OWNER])
def test_no_byte_is_left_undescribed(dtype: np.dtype) -> None:
    assert sum(kind.itemsize for kind, *_ in (dtype.fields or {}).values()) == dtype.itemsize
    assert dtype.itemsize % 8 == 0  # records lie one behind the other in the ring, at multiples of eight


def declared(enum: str, header: str) -> list[str]:
    """Names of an enum's members in a header, comments left out."""
    text = re.sub(r"/\*.*?\*/", "", (HEADERS / header).read_text(), flags=re.DOTALL)
    body = re.search(rf"\benum {enum} {{(.*?)}}", text, flags=re.DOTALL)
    assert body, f"enum {enum} is not in {header}"
    return re.findall(r"\b([A-Z][A-Z0-9_]*)\b(?=\s*(?:,|=|$))", body[1].strip())


@pytest.mark.parametrize("enum", ENUMS)
def test_neither_side_has_a_name_that_the_other_lacks(enum: str) -> None:
    header, values = ENUMS[enum]
    assert sorted(declared(enum, header)) == sorted(values)


def test_every_enum_value_has_a_word() -> None:
    for words, members in ((ROLE_NAMES, Role), (NAT_SOURCE_NAMES, NatSource)):
        assert issubclass(members, IntEnum)
        assert sorted(words) == sorted(members)
    assert sorted(NAT_NAMES) == sorted({0, Nat.NONE, Nat.DNAT, Nat.SNAT, Nat.DNAT | Nat.SNAT})


def test_every_counter_has_a_column_in_coverage() -> None:
    columns = {column.name for column in schema.COVERAGE}
    assert {counter.name.lower() for counter in Counter} <= columns


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (RESULT_OPEN, None),
        (RESULT_ABORTED, "aborted"),
        (0, "ok"),
        (errno.ECONNREFUSED, "refused"),
        (errno.ETIMEDOUT, "timeout"),
        (errno.ECONNRESET, "reset"),
        (errno.EPIPE, "reset"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.ENETUNREACH, "unreachable"),
        (errno.EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (4095, "errno-4095"),
    ],
)
def test_result_names(code: int, word: str | None) -> None:
    assert result_name(code) == word


def test_no_errno_is_mistaken_for_a_result_of_ours() -> None:
    assert max(errno.errorcode) < RESULT_ABORTED  # the kernel's own go to 4095 (MAX_ERRNO)
