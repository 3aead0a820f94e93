"""From the sources to instructions: where they are looked for, what is in them, and what is kept."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tracer.errors import TracerError
from tracer.kernel import compiler, symbols
from tracer.kernel.maps import Maps

ROOT = Path(__file__).parents[2]
SWITCHES = {"INCLUDE_LOOPBACK": 0, "NETNS_FILTER": 1, "ROLES": 3, "ONLY_VIRTUAL": 0, "EXCLUDE_CIDRS": 1}


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "tracer" / "kernel" / "compiler.py"))
    with pytest.raises(TracerError, match=r"sources were not found beside .*/tracer: install vip-tracer again"):
        compiler.source_directory()


def test_sources_inside_the_package_come_before_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "tracer" / "kernel" / "compiler.py"))
    for place in (tmp_path / "bpf", tmp_path / "tracer" / "bpf"):
        place.mkdir(parents=True)
        shutil.copy(Path(__file__).parents[2] / "bpf" / "tracer.c", place)
        assert compiler.source_directory() == place


def test_every_map_and_value_has_its_symbol() -> None:
    source = "".join(path.read_text() for path in compiler.source_directory().glob("*.h"))
    defined = symbols.defines()
    assert len(set(defined.values())) == len(defined)
    for field in fields(Maps):
        assert f"{field.name.upper()}_FD" in defined
        assert f"MAP({field.name.upper()}_FD)" in source
    for name in symbols.VALUES:
        assert f"VALUE({name}_SYMBOL)" in source


@pytest.mark.needs("bpf")
def test_programs_are_the_same_where_the_kernels_symbols_are_hidden() -> None:
    """As kptr_restrict=2 hides them from all, and the kernel from whoever lacks CAP_SYSLOG: bcc looks there."""
    code = (
        "import hashlib, json; from tracer.kernel import compiler; "
        f"made = compiler.programs({SWITCHES!r}, None); "
        "print(json.dumps({name: hashlib.sha256(code).hexdigest() for name, code in made.items()}))"
    )
    drop = ["setpriv", "--bounding-set=-syslog", "--inh-caps=-all"]
    shown, hidden = (
        json.loads(subprocess.check_output([*before, sys.executable, "-c", code], cwd=ROOT)) for before in ([], drop)
    )
    assert set(shown) == set(compiler.PROGRAMS)
    assert hidden == shown


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TracerError("the compiler is wanted")

    monkeypatch.setattr(compiler, "_import_bcc", fail)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one set of programs in it."""
    cache = tmp_path_factory.mktemp("compiled") / "cache"
    compiler.programs(SWITCHES, cache)
    return cache


@pytest.fixture
def cache(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "cache"))


@pytest.mark.needs("bpf")
def test_symbols_are_in_the_programs_and_all_of_them_are_resolved(cache: Path) -> None:
    places = {field.name: 1000 + place for place, field in enumerate(fields(Maps))}
    values = {name: (place + 1) << 33 | 5 for place, name in enumerate(symbols.VALUES)}
    seen_maps: set[int] = set()
    seen_values: set[int] = set()
    for text in compiler.programs(SWITCHES, cache).values():
        before, after = (np.frombuffer(t, symbols._INSTRUCTION) for t in (text, symbols.resolve(text, places, values)))
        assert len(before) == len(after)
        assert (before[["code", "registers", "offset"]] == after[["code", "registers", "offset"]]).all()
        changed = np.flatnonzero(before["immediate"] != after["immediate"])
        loads = np.flatnonzero(after["code"] == 0x18)
        assert set(changed) <= set(loads) | set(loads + 1)
        for load in loads:
            if after["registers"][load] >> 4 == 1:
                seen_maps.add(int(after["immediate"][load]))
            else:
                seen_values.add(int(after["immediate"][load]) | int(after["immediate"][load + 1]) << 32)
    assert seen_maps <= set(places.values())
    assert len(seen_maps) == len(places), "every map is used"
    assert set(values.values()) <= seen_values
    assert not any(value >> 16 == symbols._FIRST_VALUE >> 16 for value in seen_values), "a symbol was left"


@pytest.mark.needs("bpf")
def test_what_was_compiled_once_needs_no_compiler(cache: Path, no_compiler: None) -> None:
    assert set(compiler.programs(SWITCHES, cache)) == set(compiler.PROGRAMS)


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("harm", ["other options", "other sources", "cut short", "changed", "empty"])
def test_what_does_not_fit_is_compiled_anew(
    harm: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None
) -> None:
    (kept,) = cache.glob("*.programs")
    whole = kept.read_bytes()
    switches = SWITCHES
    if harm == "other options":
        switches = SWITCHES | {"ROLES": 7}
    elif harm == "other sources":
        shutil.copytree(compiler.source_directory(), tmp_path / "bpf")
        with (tmp_path / "bpf" / "flow.h").open("a") as source:
            source.write("/* changed */\n")
        monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path / "bpf")
    else:
        place = len(whole) // 2
        other = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        kept.write_bytes({"cut short": whole[:-1], "changed": other, "empty": b""}[harm])
    with pytest.raises(TracerError, match="the compiler is wanted"):
        compiler.programs(switches, cache)


@pytest.mark.needs("bpf")
def test_a_spoilt_file_is_replaced_by_a_good_one(cache: Path) -> None:
    (kept,) = cache.glob("*.programs")
    whole = kept.read_bytes()
    kept.write_bytes(b"spoilt")
    compiler.programs(SWITCHES, cache)
    assert kept.read_bytes() == whole
    assert [path.name for path in cache.iterdir()] == [kept.name], "nothing unfinished is left"


@pytest.mark.needs("bpf")
def test_a_directory_that_others_may_write_to_is_refused(cache: Path) -> None:
    cache.chmod(0o777)
    with pytest.raises(TracerError, match=rf"Others may write to {cache}, .*: choose a directory of your own"):
        compiler.programs(SWITCHES, cache)


@pytest.mark.needs("bpf")
def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TracerError, match=r"cannot be kept in .*: choose another directory, or none"):
        compiler.programs(SWITCHES, tmp_path / "file" / "cache")


def test_a_map_that_is_none_of_ours_is_refused() -> None:
    code = np.zeros(2, symbols._INSTRUCTION)
    code["code"][0], code["registers"][0], code["immediate"][0] = 0x18, 0x11, 7
    with pytest.raises(TracerError, match="names an unknown map"):
        symbols.resolve(code.tobytes(), {field.name: 0 for field in fields(Maps)}, dict.fromkeys(symbols.VALUES, 0))
