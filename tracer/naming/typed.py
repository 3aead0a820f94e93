"""JSON values by their Python types, both ways: what is read is checked against the type it is to have.

An address (bytes) is 32 hex digits, a tuple, dataclass or NamedTuple a list of its fields, one of several classes an
object with the class's name: no field names are repeated, and nothing but the types says what a file may hold.
"""

import functools
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

#: The greatest number: times and ids are int64 here.
MAX_NUMBER = (1 << 63) - 1


def encode(kind: Any, value: Any) -> Any:
    """The JSON value of a value of this type."""
    members = _members(kind)
    if members is not None:
        if value is None or len(members) == 1:
            return None if value is None else encode(members[0], value)
        return {type(value).__name__: encode(type(value), value)}
    if kind is bytes:
        return value.hex()
    if get_origin(kind) is tuple:
        return [encode(each, item) for each, item in zip(_items(kind, len(value)), value, strict=True)]
    if kind in (int, str, bool):
        return value
    return [encode(each, getattr(value, name)) for name, each in _fields(kind)]


def decode(kind: Any, value: Any) -> Any:
    """The value of this type that `encode` made the JSON value of. Raises ValueError if it is none."""
    members = _members(kind)
    if members is not None:
        return _decode_union(kind, members, value)
    if kind is int:
        if type(value) is int and 0 <= value <= MAX_NUMBER:
            return value
    elif kind is bool:
        if type(value) is bool:
            return value
    elif kind is str:
        if isinstance(value, str) and value.isprintable():
            return value
    elif kind is bytes:
        if isinstance(value, str) and len(value) == 32:
            return bytes.fromhex(value)
    elif isinstance(value, list):
        if get_origin(kind) is tuple:
            items = _items(kind, len(value))
            return tuple(decode(each, item) for each, item in zip(items, value, strict=True))
        fields = _fields(kind)
        return kind(*(decode(each, item) for (_, each), item in zip(fields, value, strict=True)))
    raise ValueError(f"{str(value)[:60]!r} is no {getattr(kind, '__name__', kind)}")


def _decode_union(kind: Any, members: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in get_args(kind):
        return None
    if len(members) == 1:
        return decode(members[0], value)
    if isinstance(value, dict) and len(value) == 1:
        ((name, inside),) = value.items()
        for member in members:
            if member.__name__ == name:
                return decode(member, inside)
    raise ValueError(f"{str(value)[:60]!r} is none of {', '.join(member.__name__ for member in members)}")


@functools.cache
def _members(kind: Any) -> tuple[Any, ...] | None:
    """The types of a union, but None; None if it is no union."""
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    return tuple(each for each in get_args(kind) if each is not type(None))


def _items(kind: Any, length: int) -> tuple[Any, ...]:
    """The types of the items of a tuple, of which there are `length` if it may have any number."""
    arguments = get_args(kind)
    return (arguments[0],) * length if arguments[-1] is Ellipsis else arguments


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Names and types of the fields of a dataclass or NamedTuple, in order."""
    return tuple(get_type_hints(kind).items())
