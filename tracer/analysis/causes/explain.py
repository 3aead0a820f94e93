"""How much of a skew a factor explains: the distance from a fair split before and after the factor is taken out.

Distances are total variation distances: the part of the load that would have to go elsewhere. A split of few
independent picks is never exactly even, so every distance is held against the one that chance alone gives.
"""

import dataclasses

import numpy as np

from tracer.analysis.causes.situation import MEASURES, Floats, Mask, Situation

#: Distances up to this many times the one expected by chance count as chance.
CHANCE = 1.6


def distance(load: Floats, fair: Floats) -> float:
    """Total variation distance of the shares of two vectors, 0..1; 0 if either is empty."""
    if load.sum() <= 0 or fair.sum() <= 0:
        return 0.0
    return float(np.abs(load / load.sum() - fair / fair.sum()).sum() / 2)


def by_chance(fair: Floats, units: float) -> float:
    """The distance to expect when that many independent units of equal weight are dealt with the shares of `fair`.

    Mean of half the sum of |deviations|, each close to normal with variance p (1 - p) / units: sqrt(2 / pi) times the
    standard deviation. Not above 1 - 1 / k: more is not possible with one unit.
    """
    p = fair / fair.sum() if fair.sum() > 0 else fair
    if units <= 0:
        return 1.0
    return float(min(1 - p.max(initial=0.0), np.sqrt(p * (1 - p) / units).sum() / np.sqrt(2 * np.pi)))


def effective(weights: Floats) -> float:
    """Kish's effective number of units of unequal weight: (sum w)² / sum w²."""
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


def units(situation: Situation, measure: str, among: Mask | None = None) -> float:
    """The effective number of independent picks behind a load.

    New connections are picks. For connection time and bytes a connection's rows hang together: what is in rows of long
    ones is taken as that of as many connections per client and backend as were open at once on average.
    """
    taken = situation.known if among is None else situation.known & among
    if measure == "connections":
        return float(situation.column("opened")[taken].sum())
    long_name = {"connection_time": "long_us", "bytes": "long_bytes"}[measure]
    pair = situation.places("client")[taken] * len(situation.backends) + situation.places("backend")[taken]
    long = situation.column(long_name)[taken]
    short = situation.column(MEASURES[measure])[taken] - long
    of_pair = np.bincount(pair, long)
    rows = np.bincount(pair, situation.column("long_rows")[taken])
    at_once = np.maximum(1.0, rows * situation.interval_s / situation.range_s)
    opened = np.maximum(1.0, situation.column("opened")[taken])
    # Connections differ in weight within a cell too: a lognormal with sigma 1 has E[w²]/E[w]² = e.
    squares = np.e * (short**2 / opened).sum() + (of_pair**2 / at_once).sum()
    total = float(short.sum() + long.sum())
    return float(total**2 / squares) if squares > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Explained:
    """A distance before and after the factor is taken out, and what chance gives after; `score` is the part explained.

    A remainder too small to tell scores no more than it could show.
    """

    before: float
    after: float
    chance: float

    @property
    def score(self) -> float:
        """The part of the distance that goes with the factor, 0..1."""
        if self.before <= 0:
            return 0.0
        rest = self.after if self.after > CHANCE * self.chance else min(self.after, self.chance)
        return float(np.clip(1 - rest / self.before, 0.0, 1.0))


def without(situation: Situation, measure: str, factor: Mask) -> Explained:
    """Takes the cells of a factor out: is the rest even?"""
    rest = situation.known & ~factor
    fair = situation.fair(measure, rest)
    return Explained(
        before=distance(situation.load(measure), situation.fair(measure)),
        after=distance(situation.load(measure, rest), fair),
        chance=by_chance(fair, units(situation, measure, rest)),
    )
