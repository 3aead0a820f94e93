"""What a command says while it runs: a line per record, whatever is in it."""

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_world import HOSTILE, command, environment, run
from hypothesis import given
from hypothesis import strategies as st

from tracer.cli import logs


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines on stderr; logging is as before afterwards."""
    root = logging.getLogger()
    before, level, hook = list(root.handlers), root.level, sys.excepthook
    yield lambda: capsys.readouterr().err.split("\n")[:-1]
    root.handlers[:], sys.excepthook = before, hook
    root.setLevel(level)


def record(message: object, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("tracer.x", logging.WARNING, "x.py", 1, message, arguments or None, None)
    made.__dict__.update(more)
    return made


def test_a_record_is_an_object(said: Callable[[], list[str]]) -> None:
    logs.configure("json")
    logging.getLogger("tracer.x").warning("cannot write to %s", HOSTILE, extra={"about": {"rows": 3, "why": HOSTILE}})
    [line] = said()
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning", "logger": "tracer.x", "message": f"cannot write to {HOSTILE}",
        "about": {"rows": 3, "why": HOSTILE},
    }  # fmt: skip


def test_text_is_a_line_too_and_leaves_a_terminal_alone(said: Callable[[], list[str]]) -> None:
    logs.configure("text")
    logging.getLogger("tracer.x").warning("cannot write to %s", HOSTILE)
    [line] = said()
    assert line.isprintable()
    assert " WARNING cannot write to \\x1b[31mred" in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_defect_is_told_with_its_traceback(form: str, said: Callable[[], list[str]]) -> None:
    logs.configure(form)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("tracer.x").exception("a step failed")
    lines = said()
    assert all(line.isprintable() for line in lines)
    if form == "json":
        [line] = lines
        assert HOSTILE in json.loads(line)["exception"]
    else:
        assert "Traceback" in lines[1]
        assert any(line.startswith("ValueError: \\x1b[31mred") for line in lines)


def test_configuring_again_replaces_and_does_not_double(said: Callable[[], list[str]]) -> None:
    for form in ("text", "json", "auto", "text"):
        logs.configure(form)
    logging.getLogger("tracer.x").info("once")
    assert len(said()) == 1
    assert not logs.is_json()


@given(
    st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Cc", "Zl", "Cf"])), st.binary(), st.integers()),
    st.lists(st.one_of(st.text(), st.integers(), st.floats()), max_size=2),
    st.dictionaries(st.text(), st.one_of(st.text(), st.floats(), st.none(), st.binary(), st.lists(st.text()))),
)
def test_whatever_is_said_is_one_line_of_json(message: object, arguments: list[object], about: object) -> None:
    line = logs.JsonFormatter().format(record(message, *arguments, about=about))
    assert line.isascii()
    assert line.isprintable()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    # A strict reader wants characters, not halves of them.
    json.loads(line)["message"].encode("utf-8")


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_it_is_bounded(formatter: logging.Formatter) -> None:
    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        raise ValueError("x" * 100_000 + "the end")

    try:
        deep(50)
    except ValueError:
        failed = sys.exc_info()
    line = formatter.format(record("%s", "y" * 100_000, exc_info=failed, about={"z": "z" * 100_000}))
    assert len(line) < 4 * logs.MAX_MESSAGE + logs.MAX_TRACEBACK
    assert "(96000 more characters)" in line.replace("\\u2026", "…")
    assert "the end" in line


def test_a_wrong_placeholder_costs_no_record() -> None:
    assert "%d rows" in json.loads(logs.JsonFormatter().format(record("%d rows", "many")))["message"]


def test_an_agents_refusal_is_a_record_where_stderr_is_no_terminal(tmp_path: Path) -> None:
    done = run("agent", "--output", tmp_path / "data", "--netns", "/nowhere\n\x1b")
    [line] = done.stderr.splitlines()
    found = json.loads(line)
    assert (done.returncode, found["level"]) == (1, "error")
    assert "/nowhere\n\x1b" in found["message"]
    done = run("agent", "--output", tmp_path / "data", "--netns", "/nowhere", "--log-format", "text")
    assert done.stderr.startswith("vip-tracer: ")
    done = run("agent", "--output", tmp_path / "data", "--netns", "/nowhere",
               env={"VIP_TRACER_AGENT_LOG_FORMAT": "text"})  # fmt: skip
    assert done.stderr.startswith("vip-tracer: ")


def test_on_a_terminal_it_is_text(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(
            command("agent", "--output", tmp_path / "data", "--netns", "/nowhere"),
            stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, env=environment(), check=False, timeout=60,
        )  # fmt: skip
        os.close(theirs)
        assert terminal.read(4096).startswith(b"vip-tracer: ")
    assert done.returncode == 1


def test_an_uncaught_defect_is_a_record(tmp_path: Path) -> None:
    program = "from tracer.cli import logs; logs.configure('json'); raise ValueError('a\\nb')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False, timeout=60
    )
    [line] = done.stderr.splitlines()
    assert (done.returncode, json.loads(line)["level"]) == (1, "critical")
    assert "ValueError: a\nb" in json.loads(line)["exception"]
