"""What was not seen: rows lost on the way, and connections whose backend is unknown."""

from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent, percent_of
from tracer.analysis.causes.situation import MEASURES, Floats, Situation


def filled(load: Floats, fair: Floats, missing: float) -> Floats:
    """The load with `missing` added where most is lacking of the shares of `fair`: the most even it can have been."""
    total = load.sum() + missing
    lacks = np.maximum(0.0, fair / max(1e-9, fair.sum()) * total - load)
    return load + lacks * min(1.0, missing / lacks.sum()) if lacks.sum() > 0 else load


def not_seen(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Had all that is lost or unresolved gone to whoever lacks most: would the split be even?"""
    load, fair = situation.load(measure), situation.fair(measure)
    unresolved = float(situation.column(MEASURES[measure])[~situation.known].sum())
    lost = (load.sum() + unresolved) * situation.lost / max(1e-9, 1 - situation.lost)
    if unresolved + lost <= 0:
        return
    explained = Explained(
        distance(load, fair),
        distance(filled(load, fair, unresolved + lost), fair),
        by_chance(fair, units(situation, measure)),
    )
    yield Hypothesis(
        "loss",
        0.8 * explained.score,  # it could be, which is less than that it is
        f"{percent(situation.lost)} of the rows were lost and "
        f"{percent_of(unresolved / max(1.0, unresolved + load.sum()), measure)} have no known backend: had all of that "
        f"gone where load is lacking, the split would be "
        f"{percent(explained.after)} from even instead of {percent(explained.before)}.",
        "See coverage/ for the stage that loses (`vip-tracer doctor`), make room there, and look again: this range "
        "proves nothing.",
        {"lost": situation.lost, "unresolved": unresolved, "before": explained.before, "after": explained.after},
        (("nat", "==", "unknown"),),
    )
