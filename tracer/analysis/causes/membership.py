"""Backends that were not there all the time: joined late, left early, replaced by a rollout."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import CALLED, Hypothesis, percent, some, times
from tracer.analysis.causes.situation import Floats, Situation

#: A Deployment's pods: <workload>-<template hash>-<five characters>. Both are of Kubernetes' safe alphabet
#: (k8s.io/apimachinery/pkg/util/rand), which has no vowels.
_POD = re.compile(r"(?P<template>.+-[bcdfghjklmnpqrstvwxz2456789]{5,10})-[bcdfghjklmnpqrstvwxz2456789]{5}")
#: A backend that would have got this many connections and got none was not there: exp(-7) is below 1 in 1,000.
MISSED = 7.0
#: One that was ready less of the time between its first and its last moment was away.
ALWAYS = 0.98


def template(pod: object) -> str:
    """What a pod was made from, as far as its name tells: its ReplicaSet, or its own name."""
    match = _POD.fullmatch(pod) if isinstance(pod, str) else None
    return match["template"] if match else str(pod)


def presence(situation: Situation) -> Floats:
    """Bins by backends, 1 where the backend was there: from the endpoints, or else from its first to its last row.

    Without endpoints a backend is taken as absent before its first and after its last row only where its own rate
    says that this is no accident.
    """
    if situation.ready is not None:
        return situation.ready
    bins = max(1, int(np.ceil(situation.range_s / situation.bin_s)))
    seen = np.zeros((bins, len(situation.backends)))
    known = situation.known & ~situation.direct
    np.add.at(seen, (situation.places("bin")[known], situation.places("backend")[known]),
              situation.column("opened")[known])  # fmt: skip
    busy = seen.sum(axis=1) / max(1.0, seen.sum())
    there = np.ones_like(seen)
    for place in np.flatnonzero(seen.sum(axis=0)):
        when = np.flatnonzero(seen[:, place])
        first, last = int(when[0]), int(when[-1])
        rate = seen[:, place].sum() / max(1e-9, busy[first : last + 1].sum())
        if rate * busy[:first].sum() > MISSED:
            there[:first, place] = 0
        if rate * busy[last + 1 :].sum() > MISSED:
            there[last + 1 :, place] = 0
    return np.asarray(there * (seen.sum(axis=0) > 0))


def changed_backends(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """An even split over whoever was there at each moment, against one over all who ever were."""
    there = presence(situation)
    entitled = there.sum(axis=0) > 0
    bins = np.arange(len(there))
    first = np.where(entitled, np.argmax(there > 0, axis=0), 0)
    last = np.where(entitled, bins[-1] - np.argmax(there[::-1] > 0, axis=0), bins[-1])
    joined, left = np.flatnonzero(entitled & (first > 0)), np.flatnonzero(entitled & (last < bins[-1]))
    between = (bins[:, None] >= first) & (bins[:, None] <= last)
    present = (there * between).sum(axis=0) / np.maximum(1, between.sum(axis=0))
    away = np.flatnonzero(entitled & (present < ALWAYS))
    if not len(joined) and not len(left) and not len(away):
        return
    known = dataclasses.replace(situation, ready=there)
    load, fair = known.load(measure), known.fair(measure)
    explained = Explained(
        before=distance(load, known.even(measure)),
        after=distance(load, fair),
        chance=by_chance(fair, units(known, measure)),
    )
    came = [situation.backend_name(i) for i in joined]
    went = [situation.backend_name(i) for i in left]
    numbers = {"joined": len(joined), "left": len(left), "before": explained.before, "after": explained.after}
    source = "the endpoints" if situation.ready is not None else "first and last connections"
    rest = (
        f"against an even split over whoever was there (by {source}) the {CALLED[measure]} are "
        f"{percent(explained.after)} off, against one over all {percent(explained.before)}"
    )
    pods = situation.backends["pod"]
    new = {template(pods.iloc[i]) for i in joined} - {template(pods.iloc[i]) for i in left}
    rows = (("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in (*joined, *left)]),)
    if len(joined) and len(left) and (new or pods.isna().all()):
        yield Hypothesis(
            "rollout",
            explained.score,
            f"{times(len(left), 'backend')} left and {len(joined)} of another template joined ({some(came)}): {rest}.",
            "Nothing is wrong with the balancing: compare a range that begins after the rollout.",
            numbers,
            rows,
        )
        return
    if not len(joined) and not len(left):
        names = some([situation.backend_name(i) for i in away])
        yield Hypothesis(
            "unready-backend",
            explained.score,
            f"{names} {'was' if len(away) == 1 else 'were'} not ready for {percent(float(1 - present[away].mean()))} "
            f"of the time: {rest}.",
            f"Look at the readiness probes of {names}, and at what made them fail.",
            numbers | {"away": len(away)},
            (("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in away]),),
        )
        return
    after = float(first[joined].min() * situation.bin_s) if len(joined) else 0.0
    when = f"{after / 60:.0f} min" if after >= 120 else f"{after:.0f} s"
    what = f"{some(came)} joined {when} into the range" if came else f"{some(went)} left before the range's end"
    yield Hypothesis(
        "late-backend",
        explained.score,
        f"{what}: {rest}.",
        "Nothing is wrong with the balancing: compare a range in which all backends were there; if load stays on the "
        "old ones, clients keep their connections.",
        numbers,
        rows,
    )
