"""Everything a book knows as one JSON file, so that a dataset can be named later and elsewhere.

Versioned; written whole or not at all. How values are written and checked is `typed`'s. Of the endpoint history only
the state at the time of the snapshot is kept: the dataset has its past in its own table.
"""

import json
from pathlib import Path
from typing import Any

from tracer.errors import TracerError
from tracer.files import write_whole
from tracer.naming.book import Book
from tracer.naming.holders import Address, NodePort, ServiceName, Virtual
from tracer.naming.intervals import Intervals
from tracer.naming.objects import KINDS, Node, Pod, Service, Slice
from tracer.naming.typed import decode, encode

#: Version of the file; another one is refused.
VERSION = 1

_OBJECTS: dict[str, type] = {"services": Service, "endpointslices": Slice, "pods": Pod, "nodes": Node}
#: The intervals of a book: the types of their keys and values.
_INTERVALS: dict[str, tuple[Any, Any]] = {
    "addresses": (bytes, Address),
    "virtual": (Virtual, ServiceName),
    "node_ports": (NodePort, ServiceName),
    "identities": (str, Pod),
}


def save(book: Book, path: Path, now_ns: int) -> None:
    """Writes the book as it is at `now_ns` to a file, over one that may be there.

    Raises TracerError if it cannot be written; what was there before is then untouched.
    """
    content: dict[str, Any] = {
        "vip_tracer_names": VERSION,
        "saved_ns": now_ns,
        "keep_ns": book.keep_ns,
        "synced": sorted(book.synced),
    }
    for kind in KINDS:
        content[kind] = [encode(_OBJECTS[kind], item) for item in book.living(kind).values()]
    for name, (key_type, value_type) in _INTERVALS.items():
        content[name] = [
            [encode(key_type, key), max(held.begin, 0), held.end, encode(value_type, held.value)]
            for key, held in getattr(book, name)
        ]
    write_whole(path, lambda file: json.dump(content, file, separators=(",", ":")), "ascii")


def load(path: Path) -> Book:
    """The book of a file. Raises TracerError if it cannot be read, or is not what `save` writes."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise TracerError(f"cannot read {path}: {error.strerror}; check its name and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise TracerError(f"{path} is not JSON ({error}); it is no snapshot of names, or not whole") from error
    if not isinstance(content, dict) or "vip_tracer_names" not in content:
        raise TracerError(f"{path} is no snapshot of names; give a file that the tracer saved")
    if content["vip_tracer_names"] != VERSION:
        theirs = str(content["vip_tracer_names"])[:20]
        raise TracerError(f"{path} has version {theirs}, this vip-tracer reads {VERSION}; use the one that saved it")
    try:
        return _book(content)
    except (ValueError, KeyError, TypeError) as error:
        raise TracerError(f"{path} is damaged ({str(error)[:200]}); save the snapshot again") from error


def _book(content: dict[str, Any]) -> Book:
    book = Book(decode(int, content["keep_ns"]))
    saved_ns = decode(int, content["saved_ns"])
    book.synced |= set(decode(tuple[str, ...], content["synced"]))
    for kind in KINDS:
        book.restore(kind, [decode(_OBJECTS[kind], item) for item in content[kind]], saved_ns)
    for name, (key_type, value_type) in _INTERVALS.items():
        intervals: Intervals[Any, Any] = getattr(book, name)
        rows = [(decode(int, end), decode(int, begin), key, value) for key, begin, end, value in content[name]]
        for end, begin, key, value in sorted(rows, key=lambda row: row[0]):  # what is gone is forgotten in this order
            intervals.add(decode(key_type, key), decode(value_type, value), begin, end)
    return book
