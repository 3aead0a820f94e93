"""What was not seen: rows lost on the way, gaps in watching, and connections whose backend is unknown."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent, percent_of
from tracer.analysis.causes.situation import MEASURES, Floats, Situation


def filled(load: Floats, fair: Floats, missing: float) -> Floats:
    """The load with `missing` added where most is lacking of the shares of `fair`: the most even it can have been."""
    total = load.sum() + missing
    lacks = np.maximum(0.0, fair / max(1e-9, fair.sum()) * total - load)
    return load + lacks * min(1.0, missing / lacks.sum()) if lacks.sum() > 0 else load


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Load that is not among what is known of the backends, in units of the measure.

    `unresolved`: of rows whose backend is unknown. `lost`, `gaps`: what each node's rows stand for that were lost, or
    that nobody made because the node was not watched, taken as like those that were seen.
    """

    unresolved: float
    lost: float
    gaps: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.unresolved + self.lost + self.gaps


def unseen(situation: Situation, measure: str) -> Unseen:
    """What was not seen of a measure."""
    amount = situation.column(MEASURES[measure])
    by_node = np.bincount(situation.places("node"), amount, len(situation.nodes))

    def standing_for(parts: Mapping[str, float]) -> float:
        return float(sum(load * parts.get(name, 0.0) for load, name in zip(by_node, situation.nodes, strict=True)))

    return Unseen(float(amount[~situation.known].sum()), standing_for(situation.lost), standing_for(situation.gaps))


def not_seen(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Had all that is lost or unresolved gone to whoever lacks most: would the split be even?"""
    load, fair = situation.load(measure), situation.fair(measure)
    missing = unseen(situation, measure)
    if missing.total <= 0:
        return
    explained = Explained(
        distance(load, fair),
        distance(filled(load, fair, missing.total), fair),
        by_chance(fair, units(situation, measure)),
    )
    yield Hypothesis(
        "loss",
        0.8 * explained.score,  # it could be, which is less than that it is
        f"{percent_of(missing.total / (missing.total + load.sum()), measure)} was not seen ({_how(missing)}): had all "
        f"of that gone where load is lacking, the split would be {percent(explained.after)} from even instead of "
        f"{percent(explained.before)}.",
        "See coverage/ for the stage that loses (`vip-tracer doctor`), make room there, and look again: this range "
        "proves nothing.",
        dataclasses.asdict(missing) | {"before": explained.before, "after": explained.after},
        (("nat", "==", "unknown"),),
    )


def _how(missing: Unseen) -> str:
    """The ways in which it was not seen, the largest first."""
    ways = {"rows lost": missing.lost, "nodes not watched": missing.gaps, "backend not known": missing.unresolved}
    parts = sorted(((part / missing.total, way) for way, part in ways.items() if part > 0), reverse=True)
    return ", ".join(f"{way}: {percent(part)}" for part, way in parts)
