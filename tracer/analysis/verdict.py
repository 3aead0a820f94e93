"""Balanced, uneven, or inconclusive: a test against chance, and whether what was not seen could explain the skew.

The null hypothesis is kube-proxy's: each connection is an independent pick, all endpoints alike. Connections are the
picks; bytes and connection time hang on few of them, so their number is the effective one (`causes.explain.units`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tracer.analysis.causes.chance import probability
from tracer.analysis.causes.explain import by_chance, distance, units
from tracer.analysis.causes.hypothesis import CALLED, percent
from tracer.analysis.causes.missing import filled, unseen
from tracer.analysis.causes.situation import MEASURES, Situation

#: A skew that matters: this part of the load would have to go elsewhere, or a backend has this ratio to its fair share
#: (or lacks as much).
SKEWED, RATIO = 0.1, 1.25
#: Below this, no skew is worth a word, however certain: of enough connections everything is beyond chance.
LEAST = 0.01
#: False discoveries accepted among all that is called uneven. The effective number of picks is itself an estimate, and
#: heavy tails make it a rough one: bytes and connection time must be far rarer by chance.
DISCOVERIES = {"connections": 0.01, "connection_time": 1e-4, "bytes": 1e-4}
#: A skew without a cause is not proven where this part of it may lie in what was not seen.
UNSEEN = 0.25
#: Where chance alone makes a distance beyond this, a skew that matters could not be told from it.
LUMPY = 0.08

BALANCED, UNEVEN, INCONCLUSIVE = "balanced", "uneven", "inconclusive"


@dataclasses.dataclass(frozen=True)
class Test:
    """One measure of one service port against an even split.

    `effect` is the part of the load that would have to go elsewhere, `ratio` the largest load over the fair one,
    `least` the smallest; `p` the probability of such a split by chance, `q` the same, adjusted for all that is tested;
    `picks` the effective number of independent picks, `chance` the effect that chance alone makes of so many; `clumped`
    how much more connections vary from client to client than independent picks do (1: not at all), and `p_clumped` the
    probability if every pick stood for so many; `effect_at_least` the effect had everything unseen gone where load is
    lacking, and `matters_at_least` whether it would matter then.
    """

    measure: str
    effect: float
    ratio: float
    least: float
    p: float
    picks: float
    chance: float
    clumped: float
    p_clumped: float
    effect_at_least: float
    matters_at_least: bool
    q: float = 1.0

    @property
    def matters(self) -> bool:
        """Whether the skew, beyond chance or not, is large enough to be worth a word."""
        return _matters(self.effect, self.ratio, self.least)

    @property
    def there(self) -> bool:
        """Whether there is a skew at all, small as it may be: beyond chance."""
        return self.effect >= LEAST and self.q <= DISCOVERIES[self.measure]

    @property
    def proven(self) -> bool:
        """Whether a skew that matters is beyond chance."""
        return self.matters and self.there

    @property
    def stands(self) -> bool:
        """Whether a proven skew would be one too had all that was not seen gone where load is lacking."""
        return self.proven and self.matters_at_least

    @property
    def hidden(self) -> bool:
        """Whether chance alone makes so large a difference that a skew could not be seen."""
        return self.chance > LUMPY


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`word` is one of BALANCED, UNEVEN, INCONCLUSIVE; `measures` those it rests on; `reasons` are sentences."""

    word: str
    tests: tuple[Test, ...]
    measures: tuple[str, ...]
    reasons: tuple[str, ...]


#: Of a service port with one backend, which has all of the load.
ALONE = Verdict(BALANCED, (), (), ("It has one backend.",))


def _matters(effect: float, ratio: float, least: float) -> bool:
    return effect >= SKEWED or ratio >= RATIO or least <= 2 - RATIO


def test_of(situation: Situation, measure: str) -> Test | None:
    """The test of one measure; None if there is no load of it, or nobody to share it with."""
    load, even = situation.load(measure), situation.even(measure)
    entitled = situation.entitled
    if load.sum() <= 0 or even.sum() <= 0 or (entitled.sum() == 1 and load[~entitled].sum() == 0):
        return None
    ratios = load[entitled] / even[entitled]
    most_even = filled(load, even, unseen(situation, measure).total)
    still = most_even[entitled] / (even[entitled] * most_even.sum() / load.sum())
    at_least = distance(most_even, even)
    picks = units(situation, measure)
    clumped = clumping(situation)
    return Test(
        measure=measure,
        effect=distance(load, even),
        ratio=float(ratios.max()),
        least=float(ratios.min()),
        p=probability(load, even, picks),
        picks=picks,
        chance=by_chance(even, picks),
        clumped=clumped,
        p_clumped=probability(load, even, picks / clumped),
        effect_at_least=at_least,
        matters_at_least=_matters(at_least, float(still.max()), float(still.min())),
    )


def clumping(situation: Situation) -> float:
    """How much more the clients' splits differ from the common one than independent picks would: 1 for not at all.

    Pearson's statistic over its degrees of freedom, of clients by backends; clients that stick to a backend, or come
    back to it, raise it to about the number of connections each makes.
    """
    known = situation.known
    clients = len(situation.clients)
    table = np.bincount(
        situation.places("client")[known] * len(situation.backends) + situation.places("backend")[known],
        situation.column("opened")[known],
        clients * len(situation.backends),
    ).reshape(clients, len(situation.backends))
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if freedom <= 0:
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return max(1.0, float(((table - expected) ** 2 / expected).sum() / freedom))


def discoveries(tests: Sequence[Test]) -> list[Test]:
    """The tests with their q: Benjamini and Hochberg's (1995) adjusted p, over all of one measure."""
    found = list(tests)
    for measure in MEASURES:
        mine = sorted((i for i, test in enumerate(found) if test.measure == measure), key=lambda i: found[i].p)
        least = 1.0
        for rank in range(len(mine), 0, -1):
            i = mine[rank - 1]
            least = min(least, found[i].p * len(mine) / rank)
            found[i] = dataclasses.replace(found[i], q=least)
    return found


def verdict(tests: Sequence[Test]) -> Verdict:
    """The verdict on one service port, of its tests with their q."""
    if not tests:
        return Verdict(INCONCLUSIVE, (), (), ("No connection began, and none moved anything, to a known backend.",))
    for word, chosen, say in (
        (UNEVEN, [test for test in tests if test.stands], _beyond_chance),
        (INCONCLUSIVE, [test for test in tests if test.proven], _maybe_unseen),
        (INCONCLUSIVE, [test for test in tests if test.matters], _not_proven),
        (INCONCLUSIVE, [test for test in tests if test.there], _small),
    ):
        if chosen:
            return Verdict(word, tuple(tests), tuple(test.measure for test in chosen), tuple(map(say, chosen)))
    worst = max(tests, key=lambda test: test.effect)
    why = "within chance" if worst.effect >= LEAST else "too little for a word"
    return Verdict(BALANCED, tuple(tests), (), (f"{_say(worst)}: {why}.",))


def unexplained(said: Verdict) -> Verdict:
    """What remains of a verdict for which no cause was found.

    Where clients repeat themselves, their connections are fewer picks than they are many; if so many fewer could have
    made the skew by chance, nothing is proven. Nor is it if what was not seen may hold a good part of the skew.
    """
    if said.word != UNEVEN:
        return said
    standing = [test for test in said.tests if test.stands]
    seen = [test for test in standing if test.effect_at_least >= (1 - UNSEEN) * test.effect]
    if any(test.p_clumped <= DISCOVERIES[test.measure] for test in seen):
        return said
    reasons = map(_clumped, seen) if seen else map(_maybe_unseen, standing)
    return dataclasses.replace(said, word=INCONCLUSIVE, reasons=tuple(reasons))


def suspected(said: Verdict, trouble: str) -> Verdict:
    """What remains of "balanced" where something is wrong that the split does not show (a sentence)."""
    return dataclasses.replace(said, word=INCONCLUSIVE, reasons=(f"{said.reasons[0]} But {trouble}",))


def needed(test: Test) -> int:
    """So many picks make chance's distance half of `LUMPY`: it goes with the root of their number."""
    return math.ceil(test.picks * (2 * test.chance / LUMPY) ** 2)


def _beyond_chance(test: Test) -> str:
    return f"{_say(test)}: {_chance(test.p)} by chance, of {test.picks:,.0f} independent picks."


def _maybe_unseen(test: Test) -> str:
    return (
        f"{_say(test)}, but had what was not seen gone where load is lacking, it would be "
        f"{percent(test.effect_at_least)}."
    )


def _not_proven(test: Test) -> str:
    if not test.hidden:
        shares = f"the backends have {test.least:.2f} to {test.ratio:.2f} times their share"
        return f"{_say(test)} ({shares}), but chance may make that of {test.picks:,.0f} picks (p = {test.p:.2g})."
    return (
        f"{_say(test)}, but it hangs on {test.picks:,.0f} independent picks, of which chance alone makes "
        f"{percent(test.chance)}; {needed(test):,} would tell."
    )


def _small(test: Test) -> str:
    return (
        f"{_say(test)}: more than chance makes of {test.picks:,.0f} independent picks ({_chance(test.p)}), but less "
        f"than the {percent(SKEWED)} from which it is called uneven."
    )


def _clumped(test: Test) -> str:
    return (
        f"{_say(test)}, but clients come back to the same backends: their connections vary {test.clumped:,.0f} times "
        f"as much as independent picks ({_chance(test.p_clumped)} by chance then)."
    )


def _say(test: Test) -> str:
    return f"{percent(test.effect)} of the {CALLED[test.measure]} would have to go elsewhere"


def _chance(p: float) -> str:
    return "less than one in a million" if p < 1e-6 else f"p = {p:.2g}"
