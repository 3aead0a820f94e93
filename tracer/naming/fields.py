"""Values out of JSON that nobody vouches for, each checked, bounded, or taken as not said.

Addresses are 16 bytes as in `tracer.record` (IPv4 v4-mapped), protocols IANA numbers, times ns since the epoch.
"""

import functools
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tracer.record import PROTOCOL_NAMES

#: The longest name Kubernetes allows (a DNS subdomain, RFC 1123); uids, labels and zones are shorter.
MAX_TEXT = 253
#: The most entries of a list that are looked at: an EndpointSlice may have 1,000 endpoints, no other list has as many.
MAX_ITEMS = 1000

NOTHING: Mapping[str, Any] = {}
_PROTOCOLS = {name.upper(): number for number, name in PROTOCOL_NAMES.items()}
_V4_MAPPED = bytes(10) + b"\xff\xff"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def address_bytes(said: object) -> bytes | None:
    """16 bytes of an address as the API writes it; None if it is none."""
    if not isinstance(said, str) or len(said) > 64:
        return None
    try:
        if ":" in said:
            return socket.inet_pton(socket.AF_INET6, said)
        return _V4_MAPPED + socket.inet_pton(socket.AF_INET, said)
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate in it
        return None


def address_text(raw: bytes) -> str:
    """Text of 16 address bytes: dotted if v4-mapped, otherwise IPv6 as RFC 5952 writes it."""
    if raw[:12] == _V4_MAPPED:
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def mapping(value: object) -> Mapping[str, Any]:
    """An object's fields; nothing if it is none."""
    return value if isinstance(value, dict) else NOTHING


def items(value: object) -> Sequence[Any]:
    """A list's first `MAX_ITEMS` items; nothing if it is none."""
    return value[:MAX_ITEMS] if isinstance(value, list) else ()


def text(value: object) -> str | None:
    """A name that is there, is not too long (half a name is a wrong one), and cannot drive a terminal."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        return None
    return value if value.isprintable() else value.encode("unicode_escape").decode("ascii")


def shared(value: object) -> str | None:
    """`text` of which many objects say the same: kept once."""
    found = text(value)
    return None if found is None else sys.intern(found)


def uid(metadata: Mapping[str, Any], namespace: str, name: str) -> str:
    """The uid; whoever does not say one is known by name, which no uid can be."""
    return text(metadata.get("uid")) or f"{namespace}/{name}"


def flag(value: object, default: bool) -> bool:
    """A boolean."""
    return value if isinstance(value, bool) else default


def number(value: object, most: int, default: int) -> int:
    """A number from 1 to `most`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most else default


def protocol(item: Mapping[str, Any]) -> int:
    """The IANA number; TCP where nothing is said; 0 if it is none that is traced."""
    said = item.get("protocol")
    return _PROTOCOLS.get(said, 0) if isinstance(said, str) else _PROTOCOLS["TCP"]


def addresses(texts: Sequence[object]) -> tuple[bytes, ...]:
    """The addresses among the texts, each once, in their order."""
    if len(texts) == 1:  # nearly every endpoint
        only = address_bytes(texts[0])
        return () if only is None else (only,)
    return tuple(dict.fromkeys(raw for each in texts if (raw := address_bytes(each)) is not None))


def time_ns(value: object) -> int | None:
    """RFC 3339 as ns since the epoch; None if it is no time between 1970 and 2262 (int64's end)."""
    return _parsed_time(value) if isinstance(value, str) and len(value) <= 40 else None


@functools.lru_cache(maxsize=1024)
def _parsed_time(said: str) -> int | None:
    try:
        when = datetime.fromisoformat(said)
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        ns = (when - _EPOCH) // timedelta(microseconds=1) * 1000
    except (ValueError, OverflowError):
        return None
    return ns if 0 <= ns < 1 << 63 else None
