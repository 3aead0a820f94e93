"""One row on one line, in every format, whatever stands in it."""

import csv
import io
import json

import pytest
from command_world import EPOCH, HOSTILE, named, rows
from hypothesis import given
from hypothesis import strategies as st

from tracer.cli.lines import FORMATS, endpoint_text, line, render
from tracer.record import Flag, Nat
from tracer.words import bytes_text, printable, time_text

TEXTS = ("comm", "src_pod", "src_namespace", "dst_service", "dst_namespace", "backend_pod", "result", "node", "dst_ip")


def test_a_line_says_it_all() -> None:
    (row,) = rows(1).to_pylist()
    assert line(row).split("  ") == [
        "11:59:00.000", "=", "tcp", "10.244.1.150:0 → 10.244.1.10:80 ⇒ 10.244.1.11:8080", "dnat", "ok",
        "connect 0µs", "for 0µs", "↑0B ↓0B", "curl[0]",
    ]  # fmt: skip
    assert line(row, wide=True).startswith("2026-07-31T11:59:00.000  =  tcp")


def test_names_stand_before_addresses_and_no_arrow_where_nothing_was_rewritten() -> None:
    content = named(rows(1), src_namespace="shop", src_pod="till", dst_namespace="shop", dst_service="web")
    (row,) = named(content, nat="none").to_pylist()
    text = line(row)
    assert "shop/till → shop/web (10.244.1.10:80)  none" in text
    assert "⇒" not in text


def test_unknown_is_not_none() -> None:
    (row,) = rows(1, lambda records: records.__setitem__("nat", Nat.UNKNOWN)).to_pylist()
    assert "10.244.1.10:80 ⇒ ?  unknown" in line(row)


@pytest.mark.parametrize(
    ("flags", "sign"), [(0, "~"), (Flag.OPENED, "+"), (Flag.CLOSED, "-"), (Flag.OPENED | Flag.CLOSED, "=")]
)
def test_signs_of_events(flags: int, sign: str) -> None:
    (row,) = rows(1, lambda records: records.__setitem__("flags", flags)).to_pylist()
    text = line(row, wide=True)
    assert text.split("  ")[1] == sign
    assert "↑- ↓-  -  rtt -  retransmits -" in text  # nothing counted, no process: not zero


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_hostile_is_printed(form: str) -> None:
    content = named(rows(3), **dict.fromkeys(TEXTS, HOSTILE))
    lines = list(render(content.to_pylist(), form))
    assert len(lines) == 3
    for text in "".join(lines[1:]), lines[0].replace("\n", "", 1 if form == "csv" else 0):
        assert text.isprintable(), [c for c in text if not c.isprintable()]
    assert "\\x1b[31mred" in lines[0] or "\\u001b[31mred" in lines[0]


@given(st.text(st.characters(exclude_categories=())))
def test_printable_is_printable_and_leaves_printable_text_alone(text: str) -> None:
    assert printable(text).isprintable()
    assert not text.isprintable() or printable(text) == text


def test_json_is_exact() -> None:
    (text,) = render(named(rows(1), comm=HOSTILE).to_pylist(), "json")
    row = json.loads(text)
    assert row["comm"] == HOSTILE
    assert list(row) == rows(1).column_names
    assert row["ts"].startswith("2026-07-31T11:59:00")
    assert (row["backend_ip"], row["snat_ip"], row["opened"]) == ("10.244.1.11", None, True)
    assert EPOCH % 10**9 == 0


def test_csv_is_csv() -> None:
    content = named(rows(2), src_pod='a "quoted", pod', comm="=1+1;x")
    text = "\n".join(render(content.to_pylist(), "csv"))
    first, second = csv.DictReader(io.StringIO(text))
    assert list(first) == content.column_names
    assert (first["src_pod"], first["conn_id"], second["conn_id"]) == ('a "quoted", pod', "1", "2")
    assert first["snat_ip"] == ""
    assert "node" not in "\n".join(render(content.to_pylist(), "csv", header=False)).split(",")


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0B"), (999, "999B"), (1000, "1.0kB"), (9_949, "9.9kB"), (9_950, "10kB"),
                        (999_499, "999kB"), (999_500, "1.0MB"), ((1 << 64) - 1, "18EB")],
)  # fmt: skip
def test_bytes(count: int | None, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("microseconds", "text"), [(None, "-"), (0, "0µs"), (999, "999µs"), (1000, "1.0ms"), (59_900_000, "60s"),
                               (60_000_000, "1.0m"), (3_600_000_000, "1.0h"), (3_600_000_000_000, "1000h")],
)  # fmt: skip
def test_times(microseconds: int | None, text: str) -> None:
    assert time_text(microseconds) == text


@given(st.integers(0, (1 << 64) - 1))
def test_measures_are_short(value: int) -> None:
    assert len(bytes_text(value)) <= 6
    assert len(time_text(value)) <= 6 or value > 3.6e9 * 99_999


def test_endpoints() -> None:
    assert endpoint_text("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint_text("fd00::1", 80) == "[fd00::1]:80"
    assert endpoint_text(None, None) == "?"
