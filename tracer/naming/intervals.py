"""Who held what, from when to when: intervals of wall-clock time by key, and what they say at each moment.

Knows nothing of what is held. Times are ns since the epoch, intervals half open. What has ended is kept for a while,
for the last rows that speak of it, and then forgotten.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

#: The end of what has not ended: int64's greatest.
FOREVER = (1 << 63) - 1
#: Intervals of one key that are kept, and ended ones of all keys: the oldest ended are forgotten first. Both are far
#: more than 15 minutes of an honest cluster bring (10,000 nodes that each replace a pod a minute: 150,000).
MAX_PER_KEY = 64
MAX_ENDED = 200_000

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)
A = TypeVar("A")


class Held(Generic[V]):
    """One interval [begin, end) and what was held in it."""

    __slots__ = ("begin", "end", "value")

    def __init__(self, begin: int, end: int, value: V) -> None:
        self.begin, self.end, self.value = begin, end, value


class Timeline(NamedTuple, Generic[A]):
    """Answers over time: ``answers[i]`` holds from ``breaks[i - 1]`` (or ever) until ``breaks[i]`` (or for good)."""

    breaks: Sequence[int]
    answers: Sequence[A | None]

    def at(self, ns: int) -> A | None:
        """The answer at one moment."""
        return self.answers[bisect_right(self.breaks, ns)]


#: What is said of a key that nobody ever held.
UNKNOWN: Timeline[Any] = Timeline((), (None,))


class Intervals(Generic[K, V]):
    """Intervals by key.

    Cannot leak: what lives is as much as the API server's objects say, and whatever ends is queued here, to be
    forgotten when `keep_ns` have passed or there are more than `MAX_ENDED` of them.
    """

    def __init__(self, keep_ns: int) -> None:
        self._keep_ns = keep_ns
        self._held: dict[K, tuple[Held[V], ...]] = {}
        self._ended: deque[tuple[K, Held[V]]] = deque()
        #: Ended intervals that had to go before their time.
        self.forgotten_early = 0

    def of(self, key: K) -> tuple[Held[V], ...]:
        """All intervals of a key that are kept, in the order in which they came."""
        return self._held.get(key, ())

    def living(self, key: K) -> list[Held[V]]:
        """Those of them that have not ended."""
        return [held for held in self.of(key) if held.end == FOREVER]

    def add(self, key: K, value: V, begin: int, end: int = FOREVER) -> None:
        """A new interval; one of no length is left out."""
        if begin >= end:
            return
        new = Held(begin, end, value)
        others = self._held.get(key, ())
        if len(others) >= MAX_PER_KEY:
            others = self._thinned(others)
        self._held[key] = (*others, new)
        if end != FOREVER:
            self._ended.append((key, new))

    def end(self, key: K, value: V, ns: int) -> None:
        """The living interval with this value, if there is one, ends now; never before it began."""
        for held in self.living(key):
            if held.value == value:
                self.cut(key, held, ns)

    def cut(self, key: K, held: Held[V], ns: int) -> None:
        """This interval ends at `ns`, living or ended; if that is no later than it began, it never was."""
        queued = held.end != FOREVER
        held.end = max(held.begin, ns)
        if held.end == held.begin:
            self._drop(key, held)
        elif not queued:
            self._ended.append((key, held))

    def forget(self, now_ns: int) -> None:
        """Forgets what ended more than `keep_ns` ago, and what is too much."""
        while self._ended:
            key, held = self._ended[0]
            old = held.end + self._keep_ns < now_ns
            if not old and len(self._ended) <= MAX_ENDED:
                return
            self._ended.popleft()
            if self._drop(key, held) and not old:
                self.forgotten_early += 1

    def __iter__(self) -> Iterator[tuple[K, Held[V]]]:
        for key, all_held in self._held.items():
            for held in all_held:
                yield key, held

    def _thinned(self, others: tuple[Held[V], ...]) -> tuple[Held[V], ...]:
        """One less of a key's intervals: the first that has ended, or simply the first."""
        self.forgotten_early += 1
        victim = next((held for held in others if held.end != FOREVER), others[0])
        return tuple(held for held in others if held is not victim)

    def _drop(self, key: K, gone: Held[V]) -> bool:
        before = self._held.get(key, ())
        rest = tuple(held for held in before if held is not gone)
        if rest:
            self._held[key] = rest
        else:
            self._held.pop(key, None)
        return len(rest) < len(before)


def timeline(held: Sequence[Held[V]], decide: Callable[[list[V]], A | None]) -> Timeline[A]:
    """What is to be said at each moment: None where nothing is held, else what `decide` says of what is."""
    if not held:
        return UNKNOWN
    if len(held) == 1:  # nearly every key of a cluster
        only = held[0]
        answer = decide([only.value])
        if only.end == FOREVER:
            return Timeline((only.begin,), (None, answer))
        return Timeline((only.begin, only.end), (None, answer, None))
    breaks: list[int] = []
    answers: list[A | None] = [None]
    for moment in sorted({h.begin for h in held} | {h.end for h in held if h.end != FOREVER}):
        now = [h.value for h in held if h.begin <= moment < h.end]
        answer = decide(now) if now else None
        if answer != answers[-1]:
            breaks.append(moment)
            answers.append(answer)
    return Timeline(tuple(breaks), tuple(answers))
