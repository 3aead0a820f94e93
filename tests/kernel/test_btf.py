"""Kernel offsets from BTF: this kernel's against a second reader, and type information that is wrong or broken."""

import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracer.errors import TracerError
from tracer.kernel import btf, compiler

pytestmark = pytest.mark.needs("bpf")

INT, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, ENUM64 = 1, 3, 4, 5, 6, 8, 19
#: Bytes behind the common twelve of a type: fixed, and for each of its `vlen` members (Documentation/bpf/btf.rst).
_EXTRA = {INT: (4, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), 13: (0, 8), 14: (4, 0)} | {
    15: (0, 12),
    17: (4, 0),
    ENUM64: (0, 12),
}


class Reader:
    """All types of a BTF blob in plain Python: another way to the same numbers."""

    def __init__(self, raw: bytes) -> None:
        _, _, _, head, types, types_size, strings, strings_size = struct.unpack_from("<HBBIIIII", raw)
        self.strings = raw[head + strings : head + strings + strings_size]
        self.raw, self.at, self.named = raw, [0], {}  # type: ignore[var-annotated]
        at, end = head + types, head + types + types_size
        while at < end:
            name, info = struct.unpack_from("<II", raw, at)
            kind = info >> 24 & 0x1F
            if kind in (STRUCT, ENUM):
                self.named.setdefault((kind, self.text(name)), len(self.at))
            self.at.append(at)
            fixed, each = _EXTRA.get(kind, (0, 0))
            at += 12 + fixed + each * (info & 0xFFFF)

    def text(self, offset: int) -> str:
        return self.strings[offset : self.strings.index(b"\0", offset)].decode()

    def members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        """(name, type, offset in bits)"""
        (info,) = struct.unpack_from("<I", self.raw, self.at[type_id] + 4)
        for i in range(info & 0xFFFF):
            name, member, offset = struct.unpack_from("<III", self.raw, self.at[type_id] + 12 + 12 * i)
            yield self.text(name), member, offset & 0xFFFFFF if info >> 31 else offset

    def flat(self, type_id: int, base: int = 0) -> Iterator[tuple[str, int]]:
        """(name, offset in bits) of every field that C lets one write after the dot."""
        for name, member, offset in self.members(type_id):
            if name:
                yield name, base + offset
                continue
            (info,) = struct.unpack_from("<I", self.raw, self.at[member] + 4)
            if info >> 24 & 0x1F in (STRUCT, UNION):
                yield from self.flat(member, base + offset)

    def enum(self, name: str) -> dict[str, int]:
        at = self.at[self.named[ENUM, name]]
        (info,) = struct.unpack_from("<I", self.raw, at + 4)
        pairs = (struct.unpack_from("<Ii", self.raw, at + 12 + 8 * i) for i in range(info & 0xFFFF))
        return {self.text(label): value for label, value in pairs}


def test_this_kernels_offsets_are_what_another_reader_finds() -> None:
    constants = btf.defines()
    reader = Reader(btf.VMLINUX.read_bytes())
    expected = {}
    for name, field in btf.FIELDS:
        bits = dict(reader.flat(reader.named[STRUCT, name]))[field]
        assert bits % 8 == 0
        expected[f"OFFSET_{name}__{field}"] = bits // 8
    expected["SOCK_DONE"] = reader.enum("sock_flags")["SOCK_DONE"]
    expected["HAS_TASK_BTF"] = int("BPF_FUNC_get_current_task_btf" in reader.enum("bpf_func_id"))
    assert constants == expected


def test_every_offset_that_the_programs_use_is_looked_up_and_no_other() -> None:
    sources = "".join(path.read_text() for path in compiler.source_directory().glob("*.[ch]"))
    used = set(re.findall(r"OFFSET_(\w+?__\w+)", sources))
    assert used == {f"{name}__{field}" for name, field in btf.FIELDS}


# -- type information made by hand ----------------------------------------------------------------------------------


class Writer:
    """A small BTF blob, type by type; the first has number 1."""

    def __init__(self) -> None:
        self.strings, self.types, self.count = b"\0", b"", 0

    def _string(self, text: str) -> int:
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(
        self, kind: int, name: str, size: int, members: tuple[tuple[object, ...], ...] = (), tail: bytes = b""
    ) -> int:
        head = struct.pack("<III", self._string(name), kind << 24 | len(members), size)
        self.types += head + tail
        for label, *numbers in members:
            self.types += struct.pack("<I" + "I" * len(numbers), self._string(str(label)), *numbers)
        self.count += 1
        return self.count

    def bytes(self) -> bytes:
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return head + self.types + self.strings


def kernel(*, leave_out: tuple[str, str] = ("", ""), flag: str = "SOCK_DONE") -> Writer:
    """The types of a kernel in which the fields of FIELDS lie one behind the other, four bytes apart."""
    made = Writer()
    integer = made.add(INT, "int", 4, tail=struct.pack("<I", 32))
    structs: dict[str, list[str]] = {}
    for name, field in btf.FIELDS:
        structs.setdefault(name, [])
        if (name, field) != leave_out:
            structs[name].append(field)
    for name, names in structs.items():
        fields = tuple((field, integer, 32 * i) for i, field in enumerate(names))
        made.add(STRUCT, name, 4 * len(fields) or 4, fields)
    made.add(ENUM, "sock_flags", 4, (("SOCK_DEAD", 0), (flag, 1)))
    return made


def test_a_kernel_made_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "btf"
    path.write_bytes(kernel().bytes())
    constants = btf.defines(path)
    assert constants["SOCK_DONE"] == 1
    assert [constants[f"OFFSET_tcp_sock__{field}"] for name, field in btf.FIELDS if name == "tcp_sock"] == list(
        range(0, 28, 4)
    )


@pytest.mark.parametrize(("name", "field"), btf.FIELDS)
def test_a_field_that_is_not_there_is_named(name: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "btf"
    path.write_bytes(kernel(leave_out=(name, field)).bytes())
    with pytest.raises(TracerError, match=f"no field '{field}' in 'struct {name}' .*which the tracer reads"):
        btf.defines(path)


def test_a_field_and_a_struct_that_this_kernel_never_had(monkeypatch: pytest.MonkeyPatch) -> None:
    real = btf.FIELDS
    for made_up in (("sock", "sk_made_up"), ("made_up", "sk_err")):
        monkeypatch.setattr(btf, "FIELDS", (*real, made_up))
        with pytest.raises(TracerError, match=f"no field '{made_up[1]}' in 'struct {made_up[0]}'"):
            btf.defines()


def test_a_flag_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "btf"
    path.write_bytes(kernel(flag="SOCK_GONE").bytes())
    with pytest.raises(TracerError, match="no flag SOCK_DONE"):
        btf.defines(path)


@pytest.fixture
def nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """struct outer { int; struct { int; typedef_of_union { int x; int wanted; }; }; int after; }"""
    made = kernel()
    union = made.add(UNION, "", 4, (("x", 1, 0), ("wanted", 1, 0)))
    named = made.add(TYPEDEF, "union_t", union)
    inner = made.add(STRUCT, "", 8, (("first", 1, 0), ("", named, 32)))
    made.add(STRUCT, "outer", 16, (("begin", 1, 0), ("", inner, 32), ("after", 1, 96)))
    path = tmp_path / "btf"
    path.write_bytes(made.bytes())
    monkeypatch.setattr(btf, "FIELDS", (*btf.FIELDS, ("outer", "wanted"), ("outer", "after")))
    return path


def test_fields_of_anonymous_members_are_found(nested: Path) -> None:
    constants = btf.defines(nested)
    assert (constants["OFFSET_outer__wanted"], constants["OFFSET_outer__after"]) == (8, 12)


# -- and broken: in a child, because what may crash is libbpf ------------------------------------------------------

_TRY = """
import json, pathlib, sys
from tracer.errors import TracerError
from tracer.kernel import btf
if len(sys.argv) > 2:
    btf.FIELDS += (("outer", "wanted"),)
answers = []
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        btf.defines(path)
        answers.append("")
    except TracerError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def answers(directory: Path, blobs: list[bytes], *more: str) -> list[str]:
    """What `defines` says to each blob; fails if anything else than a TracerError comes of one."""
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    for i, blob in enumerate(blobs):
        (directory / f"{i:04}").write_bytes(blob)
    done = subprocess.run(
        [sys.executable, "-c", _TRY, str(directory), *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    assert done.stderr == ""
    found: list[str] = json.loads(done.stdout)
    return found


def test_what_is_no_type_information_is_a_sentence(tmp_path: Path) -> None:
    whole = btf.VMLINUX.read_bytes()
    small = kernel().bytes()
    blobs = [b"", b"\0", small[:2], small[:23], small[:24], small[:-1], whole[:1_000_000], whole[:-1], whole[1:]]
    blobs += [b"\x7fELF" + bytes(100), Path(sys.executable).resolve().read_bytes()[:4096]]
    said = answers(tmp_path / "blobs", blobs)
    assert len(said) == len(blobs)
    assert all("is not there or cannot be parsed: the tracer needs a kernel built with" in text for text in said)


def test_no_file_is_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TracerError, match=r"is not there or cannot be parsed: .* CONFIG_DEBUG_INFO_BTF=y"):
            btf.defines(path)


def test_types_that_go_round_in_circles_or_nowhere(tmp_path: Path) -> None:
    blobs = []
    for circle in ("typedef", "struct", "nowhere"):
        made = kernel()
        following = made.count + 1
        if circle == "typedef":
            made.add(TYPEDEF, "again", following)
        elif circle == "struct":
            made.add(STRUCT, "", 4, (("", following, 0),))
        made.add(STRUCT, "outer", 4, (("", 9999 if circle == "nowhere" else following, 0),))
        blobs.append(made.bytes())
    said = answers(tmp_path / "blobs", blobs, "outer")
    # libbpf itself refuses such types since 1.4
    assert all("contradicts itself" in text or "cannot be parsed" in text for text in said)


def test_damaged_type_information_never_crashes(tmp_path: Path) -> None:
    """Some hundred at once, each in the same child: drawn by Hypothesis they would take a child each."""
    dice = random.Random(20)
    garbage = [dice.randbytes(dice.randrange(200)) for _ in range(50)]
    blobs = [blob for raw in garbage for blob in (raw, b"\x9f\xeb\1\0" + raw)]
    whole = kernel().bytes()
    for _ in range(600):
        blob = bytearray(whole)
        for _ in range(dice.randint(1, 5)):
            blob[dice.randrange(len(blob))] = dice.randrange(256)
        blobs.append(bytes(blob))
    said = answers(tmp_path / "blobs", blobs)
    assert all(said[: 2 * len(garbage)])
    assert {bool(text) for text in said[2 * len(garbage) :]} == {True, False}  # some damage does not matter
