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
from tracer.analysis.causes.hypothesis import Detector, Hypothesis
from tracer.analysis.causes.situation import MEASURES, Situation
from tracer.analysis.verdict import BALANCED, Verdict, suspected, unexplained

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

#: Detectors of trouble that is one however even the load.
TROUBLES: tuple[Detector, ...] = (routing.stale_translation, failures.failing_backend, failures.slow_to_accept)
#: Old rules that lead less than this part of the load astray, and fail fewer connections, are a passing moment.
ASTRAY, FAILED = 0.01, 5

#: What explains less than this part of the skew is no cause of it.
LEAST = 0.4
#: Scores this close are the same: chance adds to either. Then the more specific cause comes first.
ALIKE = 0.08


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


def explained(situation: Situation, said: Verdict) -> tuple[Verdict, list[Hypothesis]]:
    """A verdict by the tests alone, and the causes: what is left of it, and these.

    An uneven load that clients' habits may have made, for which no cause is found, is inconclusive. So is one that
    looks even while a backend fails: the picks are not all there is.
    """
    if said.word == BALANCED:
        signs = troubles(situation)
        return suspected(said, signs[0].sentence) if signs else said, signs
    found = hypotheses(situation, said.measures) if said.measures else []
    return said if found else unexplained(said), found


def troubles(situation: Situation) -> list[Hypothesis]:
    """What `TROUBLES` see of any measure; they explain nothing of the skew, for there is none to explain."""
    found: dict[str, Hypothesis] = {}
    for detect in TROUBLES:
        for measure in MEASURES:
            for one in detect(situation, measure):
                if one.numbers.get("share", ASTRAY) >= ASTRAY or one.numbers["failed"] >= FAILED:
                    found.setdefault(one.name, dataclasses.replace(one, score=0.0))
    return list(found.values())
