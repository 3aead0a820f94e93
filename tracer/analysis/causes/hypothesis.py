"""What a detector says: a possible cause of a skew in one measure, with the numbers and the rows that speak for it."""

import dataclasses
from collections.abc import Callable, Iterator

from tracer.analysis.causes.situation import Situation

#: A filter as pyarrow and pandas' read_parquet take it: all of these must hold.
Rows = tuple[tuple[str, str, object], ...]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One possible cause: `score` is the part of the skew that goes when its factor is taken out, 0..1.

    `sentence` says what was found, `remedy` what to do; names in both come from the cluster and are not escaped.
    `numbers` are the evidence, `rows` selects those that prove it among the service's rows.
    """

    name: str
    score: float
    sentence: str
    remedy: str
    numbers: dict[str, float]
    rows: Rows = ()


#: A detector: takes a situation and one of `MEASURES`; says nothing where its factor is absent.
Detector = Callable[[Situation, str], Iterator[Hypothesis]]


#: The measures of load as people call them.
CALLED = {"connections": "new connections", "connection_time": "connection time", "bytes": "bytes"}


def percent(part: float) -> str:
    """A part of one as people read it: no decimals from 10 % up."""
    return f"{part:.0%}" if part >= 0.0995 else f"{part:.1%}"


def percent_of(part: float, measure: str) -> str:
    """A part of a measure: 12% of the bytes."""
    return f"{percent(part)} of the {CALLED[measure]}"


def times(count: int, what: str) -> str:
    """1 client, 2 clients."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def some(names: list[str], most: int = 3) -> str:
    """A list of names, cut after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
