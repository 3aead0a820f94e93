"""Durations, sizes and names as people write them: a number or a sentence, for any text whatever."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tracer.cli import options

PAGE = os.sysconf("SC_PAGESIZE")
KINDS: list[Callable[[str], Any]] = [options.duration, options.size, options.ring_size, options.node_name]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("30", 30), (" 5m ", 300), ("1h", 3600), ("1.5h", 5400), ("100ms", 0.1),
     ("10000000s", 1e7)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "5 m", "-1s", "+1s", "1e3s", "nan", "inf", "1d", "1M", "99ms", "0", "10000001s", "2778h",
             "\u0663s", "1\n2s", "9" * 400, "1." + "1" * 400 + "s"],
)  # fmt: skip
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no duration: write it as|is out of range"):
        options.duration(text)


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("65536", 65536), ("10B", 10), ("1K", 1024), ("512KiB", 1 << 19), ("64MiB", 1 << 26),
                        ("2G", 1 << 31), ("1125899906842624", 1 << 50)],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert options.size(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "0MiB", "-1", "1.5MiB", "1 MiB", "1mib", "1TiB", "1125899906842625", "9999999999999999G", "\u0663"],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no size: write it as|is out of range"):
        options.size(text)


def test_a_ring_is_a_power_of_two_of_whole_pages() -> None:
    assert options.ring_size("4MiB") == 4 << 20
    assert options.ring_size(str(PAGE)) == PAGE
    assert options.ring_size("1GiB") == 1 << 30
    for text in ("4097", "5000", "3MiB", str(PAGE // 2), "2GiB", "8GiB"):
        with pytest.raises(click.BadParameter, match="a power of two from"):
            options.ring_size(text)


@pytest.mark.parametrize("text", ["", " ", "a\nb", "\x1b[31m", "\udcff", "a\u202eb"])
def test_no_node_names(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no node name"):
        options.node_name(text)


@given(st.text())
def test_any_text_is_a_value_or_a_sentence(text: str) -> None:
    for kind in KINDS:
        with contextlib.suppress(click.BadParameter):
            value = kind(text)
            assert isinstance(value, str) or value > 0


@given(st.from_regex(r"\A[0-9]{1,20}(\.[0-9]{1,12})?(ms|s|m|h|)\Z"))
def test_what_a_duration_lets_through_is_within_bounds(text: str) -> None:
    with contextlib.suppress(click.BadParameter):
        assert 0.1 <= options.duration(text) <= 1e7


@pytest.mark.parametrize(
    ("option", "value"), [("--interval", "soon"), ("--interval", "0s"), ("--rotate-bytes", "0"),
                          ("--ring-bytes", "5000"),
                          ("--ring-bytes", "8GiB"), ("--max-connections", "0"), ("--max-translations", "99999999999"),
                          ("--node", "\udcff"), ("--rotate", "-1s")],
)  # fmt: skip
def test_the_command_refuses_with_the_options_name(option: str, value: str) -> None:
    from tracer.cli import main

    done = CliRunner().invoke(main, ["agent", "--output", "nowhere", option, value])
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"Invalid value for '{option}'" in done.stderr


def test_contradicting_namespaces_are_a_usage_error() -> None:
    from tracer.cli import main

    for command in (["agent", "--output", "nowhere"], ["observe"], ["doctor"]):
        done = CliRunner().invoke(main, [*command, "--only-netns", "/a", "--ignore-netns", "/b"])
        assert (done.exit_code, done.stdout) == (2, ""), command
        assert "--only-netns" in done.stderr
