"""What a command says on stderr while it runs: as text for people, as JSON for programs; a line per record.

Messages quote names that others chose: whatever is not printable is spelled out, and nothing is longer than a log
reader takes.
"""

import datetime
import json
import logging
import math
import sys
import traceback
from types import TracebackType
from typing import Any

import click

from tracer.words import printable

FORMATS = ("auto", "text", "json")
#: Characters of a message, and of a traceback; of a long one the end is left out, of a traceback the beginning.
MAX_MESSAGE, MAX_TRACEBACK = 4000, 8000
#: The attribute of a record that holds what it says as data: `extra={ABOUT: {...}}`. Only JSON shows it.
ABOUT = "about"

_log = logging.getLogger("tracer")


def bounded(text: str, most: int) -> str:
    """The text, or its beginning and how much is missing."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"


def _message(record: logging.LogRecord) -> str:
    try:
        return bounded(record.getMessage(), MAX_MESSAGE)
    except Exception as error:  # noqa: BLE001  a wrong placeholder must not cost the record
        return bounded(f"{record.msg} {record.args!r} ({error!r})", MAX_MESSAGE)


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    text = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    return text if len(text) <= MAX_TRACEBACK else f"({len(text) - MAX_TRACEBACK} characters)…{text[-MAX_TRACEBACK:]}"


class TextFormatter(logging.Formatter):
    """Time, level, message; a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        lines = [f"{self.formatTime(record)} {record.levelname} {printable(_message(record))}"]
        lines += map(printable, _traceback(record).splitlines())
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """An object in ASCII: time (RFC 3339, UTC), level, logger, message; exception and about where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        found: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _sound(_message(record)),
        }
        about = getattr(record, ABOUT, None)
        if isinstance(about, dict):
            found[ABOUT] = {_sound(key): _value(value) for key, value in about.items()}
        failed = _traceback(record)
        if failed:
            found["exception"] = _sound(failed)
        return json.dumps(found)


def _value(value: object) -> object:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    return _sound(bounded(str(value), MAX_MESSAGE))


def _sound(text: object) -> str:
    """The text without lone surrogates, which strict readers of JSON refuse."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def configure(form: str = "text") -> None:
    """Sets what all records become from here on: text, json, or auto (json where stderr is no terminal)."""
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [each for each in root.handlers if getattr(each, "is_vip_tracers", False)]:
        root.removeHandler(old)
    handler.is_vip_tracers = True  # type: ignore[attr-defined]  # others, such as a test's, stay
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    sys.excepthook = _uncaught if form == "json" else sys.__excepthook__


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("a defect ended the command, please report it: %r", error, exc_info=(kind, error, trace))


def is_json() -> bool:
    """Whether records are JSON now."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def say(text: str, level: int = logging.INFO) -> None:
    """A line for whoever looks on: as it is, or as a record where records are JSON."""
    if is_json():
        _log.log(level, "%s", text)
        return
    click.echo("\n".join(map(printable, text.split("\n"))), err=True)
