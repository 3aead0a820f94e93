"""Balanced, uneven, or inconclusive: a test against chance, and whether what was not seen could explain the skew.

The null hypothesis is kube-proxy's: each connection is an independent pick, all endpoints alike. Connections are the
picks; bytes and connection time hang on few of them, so their number is the effective one (`causes.explain.units`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tracer.analysis.causes.explain import by_chance, distance, units
from tracer.analysis.causes.hypothesis import CALLED, percent
from tracer.analysis.causes.missing import filled, unseen
from tracer.analysis.causes.situation import MEASURES, Floats, Situation

#: A skew that matters: this part of the load would have to go elsewhere, or a backend has this ratio to its fair share
#: (or lacks as much).
SKEWED, RATIO = 0.1, 1.25
#: False discoveries accepted among all that is called uneven. The effective number of picks is itself an estimate, and
#: heavy tails make it a rough one: bytes and connection time must be far rarer by chance.
DISCOVERIES = {"connections": 0.01, "connection_time": 1e-4, "bytes": 1e-4}
#: Where chance alone makes a distance beyond this, a skew that matters could not be told from it.
LUMPY = 0.08
#: Below so many expected picks of a backend the chi-square distribution is wrong: the multinomial is drawn instead.
FEW, DRAWS, SEED = 5.0, (999, 99_999), 20_260_731

BALANCED, UNEVEN, INCONCLUSIVE = "balanced", "uneven", "inconclusive"


@dataclasses.dataclass(frozen=True)
class Test:
    """One measure of one service port against an even split.

    `effect` is the part of the load that would have to go elsewhere, `ratio` the largest load over the fair one,
    `least` the smallest; `p` the probability of such a split by chance, `q` the same, adjusted for all that is tested;
    `picks` the effective number of independent picks, `chance` the effect that chance alone makes of so many; `clumped`
    how much more connections vary from client to client than independent picks do (1: not at all), and `p_clumped` the
    probability if every pick stood for so many; `effect_at_least` the effect had everything unseen gone where load is
    lacking.
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
    q: float = 1.0

    @property
    def matters(self) -> bool:
        """Whether the skew, beyond chance or not, is large enough to be worth a word."""
        return self.effect >= SKEWED or self.ratio >= RATIO or self.least <= 2 - RATIO

    @property
    def proven(self) -> bool:
        """Whether a skew that matters is beyond chance."""
        return self.matters and self.q <= DISCOVERIES[self.measure]

    @property
    def stands(self) -> bool:
        """Whether a proven skew would be one too had all that was not seen gone where load is lacking."""
        return self.proven and self.effect_at_least >= min(SKEWED, self.effect) / 2

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


def test_of(situation: Situation, measure: str) -> Test | None:
    """The test of one measure; None if there is no load of it, or nobody to share it with."""
    load, even = situation.load(measure), situation.even(measure)
    entitled = situation.entitled
    if load.sum() <= 0 or even.sum() <= 0 or (entitled.sum() == 1 and load[~entitled].sum() == 0):
        return None
    ratios = load[entitled] / even[entitled]
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
        effect_at_least=distance(filled(load, even, unseen(situation, measure).total), even),
    )


def probability(load: Floats, even: Floats, picks: float) -> float:
    """How probable a split at least as far from `even` is by chance, of so many independent picks.

    The G-test with Williams' correction (1976); where a backend is to expect fewer than `FEW` picks, drawn multinomials
    (seeded, so the same data have the same answer). 0 if load is on those who were to get none.
    """
    entitled = even > 0
    if load[~entitled].sum() > 0.5 * load.sum() / max(1.0, picks):
        return 0.0
    share = even[entitled] / even.sum()
    k = len(share)
    if k < 2 or picks < 2:
        return 1.0
    g = float(_g(load[entitled] / load[entitled].sum(), share, picks))
    if picks * share.min() >= FEW:
        williams = 1 + ((1 / share).sum() - 1) / (6 * picks * (k - 1))
        return chi_square_tail(g / williams, k - 1)
    number = round(picks)
    for draws in DRAWS:
        drawn = np.random.default_rng(SEED).multinomial(number, share, size=draws)
        beyond = int((_g(drawn / number, share, picks) >= g * (1 - 1e-12)).sum())
        if beyond >= 10:
            break
    return (beyond + 1) / (draws + 1)


def _g(part: Floats, share: Floats, picks: float) -> Floats:
    """2 n sum p ln(p/q) along the last axis; p ln p is 0 where p is."""
    logs = np.log(np.where(part > 0, part / share, 1.0))
    return np.asarray(2 * picks * (part * logs).sum(axis=-1))


def chi_square_tail(value: float, freedom: int) -> float:
    """P(chi-square with so many degrees of freedom > value): Q(a + 1, x) = Q(a, x) + x^a e^-x / gamma(a + 1).

    From Q(1, x) = e^-x, or Q(1/2, x) = erfc(sqrt x); NIST's Digital Library of Mathematical Functions, 8.8.6 and 8.4.
    """
    x = value / 2
    if x <= 0:
        return 1.0
    a, tail = (0.5, math.erfc(math.sqrt(x))) if freedom % 2 else (1.0, math.exp(-x))
    while a < freedom / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(1.0, tail)


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
        (INCONCLUSIVE, [test for test in tests if test.matters and test.hidden], _too_few),
    ):
        if chosen:
            return Verdict(word, tuple(tests), tuple(test.measure for test in chosen), tuple(map(say, chosen)))
    worst = max(tests, key=lambda test: test.effect)
    why = "more than by chance, but too little to matter" if worst.q <= DISCOVERIES[worst.measure] else "within chance"
    return Verdict(BALANCED, tuple(tests), (), (f"{_say(worst)}: {why}.",))


def unexplained(said: Verdict) -> Verdict:
    """What remains of a verdict for which no cause was found.

    Where clients repeat themselves, their connections are fewer picks than they are many; if so many fewer could have
    made the skew by chance, nothing is proven.
    """
    if said.word != UNEVEN:
        return said
    firm = [test for test in said.tests if test.stands and test.p_clumped <= DISCOVERIES[test.measure]]
    if firm:
        return said
    return dataclasses.replace(
        said, word=INCONCLUSIVE, reasons=tuple(_clumped(test) for test in said.tests if test.stands)
    )


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


def _too_few(test: Test) -> str:
    return (
        f"{_say(test)}, but it hangs on {test.picks:,.0f} independent picks, of which chance alone makes "
        f"{percent(test.chance)}; {needed(test):,} would tell."
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
