"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tracer.errors import TracerError


def write_whole(path: Path, write: Callable[[IO[str]], object], encoding: str = "utf-8") -> None:
    """Has a text file written beside `path`, synced and renamed to it, over one that may be there.

    A symbolic link stays, and leads to the file; a device or a pipe is written to. Raises TracerError if it cannot be
    written; what was there before is then untouched.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        _write_into(path, write, encoding)
        return
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with hidden.open("w", encoding=encoding) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise TracerError(f"cannot write {path}: {error.strerror}; choose a directory that can be written") from error


def _write_into(path: Path, write: Callable[[IO[str]], object], encoding: str) -> None:
    try:
        with path.open("w", encoding=encoding) as file:
            write(file)
    except OSError as error:
        raise TracerError(f"cannot write to {path}: {error.strerror}; choose another file") from error
