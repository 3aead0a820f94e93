"""Causes of a skew, ranked: every detector is asked, and who explains most comes first.

A cause is found for the measures that are uneven. One that explains only some of them counts for that part. Nothing
found is an answer too: an empty list.
"""

import dataclasses
from collections.abc import Sequence

from tracer.analysis.causes import (
    clients,
    failures,
    lifetime,
    membership,
    missing,
    rounding,
    routing,
    topology,
)
from tracer.analysis.causes.explain import by_chance, distance, surprise, units
from tracer.analysis.causes.hypothesis import Detector, Hypothesis
from tracer.analysis.causes.situation import MEASURES, Situation

#: All detectors; where two explain the same, the one that says more (and is listed first) comes first.
DETECTORS: tuple[Detector, ...] = (
    routing.bypass,
    routing.stale_translation,
    failures.failing_backend,
    failures.slow_to_accept,
    membership.changed_backends,
    topology.kept_within,
    clients.sticking_clients,
    lifetime.long_lived,
    routing.socket_balancer,
    routing.deviating_node,
    missing.not_seen,
    rounding.rounding,
)

#: What explains less than this part of the skew is no cause of it.
LEAST = 0.4
#: Scores this close are the same: chance adds to either. Then the more specific cause comes first.
ALIKE = 0.08
#: A measure is skewed from this distance on, or from this ratio of a backend's load to its fair share (or back).
SKEWED, RATIO = 0.1, 1.25
#: It is so beyond chance from so many standard deviations on.
SIGMAS = 4.0
#: The load hangs on few connections if chance alone makes such a distance.
LUMPY = 0.08


def skewed(situation: Situation) -> tuple[list[str], bool]:
    """Measures whose load is uneven enough to matter, and whether that is beyond chance.

    If none is beyond chance, those whose load hangs on so few connections that chance alone makes a skew: it is there,
    and worth a cause, but proves nothing. Even means: over all backends that were to get connections in the range.
    """
    beyond, lumpy = [], []
    for measure in MEASURES:
        load, fair = situation.load(measure), situation.even(measure)
        if load.sum() <= 0 or fair.sum() <= 0:
            continue
        ratio = load[situation.entitled] / fair[situation.entitled]
        picks = units(situation, measure)
        if distance(load, fair) < SKEWED and ratio.max() < RATIO and ratio.min() > 2 - RATIO:
            continue
        if surprise(load, fair, picks) > SIGMAS:
            beyond.append(measure)
        elif by_chance(fair, picks) > LUMPY:
            lumpy.append(measure)
    return (beyond, True) if beyond else (lumpy, False)


def hypotheses(situation: Situation, measures: Sequence[str]) -> list[Hypothesis]:
    """Possible causes of the skew in these measures, most likely first; those below `LEAST` are left out.

    A cause's score is the mean of what it explains of each measure, its words those of the measure it explains best.
    """
    found: dict[str, dict[str, Hypothesis]] = {}
    place: dict[str, int] = {}
    for measure in measures:
        for number, detect in enumerate(DETECTORS):
            for one in detect(situation, measure):
                by_measure = found.setdefault(one.name, {})
                place[one.name] = min(number, place.get(one.name, number))
                if measure not in by_measure or by_measure[measure].score < one.score:
                    by_measure[measure] = one
    ranked = []
    for by_measure in found.values():
        score = sum(one.score for one in by_measure.values()) / len(measures)
        ranked.append(dataclasses.replace(max(by_measure.values(), key=lambda one: one.score), score=score))
    alike = max((one.score for one in ranked), default=0.0) - ALIKE
    ranked.sort(key=lambda one: (one.score < alike, place[one.name] if one.score >= alike else 0, -one.score))
    return [one for one in ranked if one.score >= LEAST]
