"""Connections that live long: dealt evenly once, and then nobody deals them again."""

from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.explain import CHANCE, Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent, percent_of, some
from tracer.analysis.causes.situation import MEASURES, Situation

#: This many clients or fewer that carry `MOST` of the long connections' load are few.
FEW, MOST = 3, 0.8


def long_lived(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """New connections are even; is the load of connections shorter than the reporting interval even too?"""
    long_name = {"connection_time": "long_us", "bytes": "long_bytes"}.get(measure)
    if long_name is None or situation.column(long_name).sum() <= 0:
        return
    opened, fair_opened = situation.load("connections"), situation.fair("connections")
    uneven = distance(opened, fair_opened)
    if opened.sum() > 0 and uneven > max(0.1, CHANCE * by_chance(fair_opened, opened.sum())):
        return
    long = situation.column(long_name)
    short = situation.column(MEASURES[measure]) - long
    load, fair = situation.load(measure), situation.fair(measure)
    # The short ones are as many picks as connections, of unequal weight (a lognormal with sigma 1: e).
    chance = by_chance(fair, opened.sum() / np.e)
    explained = Explained(distance(load, fair), distance(situation.load(measure, values=short), fair), chance)
    part = long[situation.known].sum() / max(1.0, load.sum())
    by_client = np.bincount(situation.places("client")[situation.known], long[situation.known])
    order = np.argsort(by_client)[::-1]
    few = int(np.searchsorted(np.cumsum(by_client[order]), MOST * by_client.sum())) + 1
    at_once = situation.column("long_rows")[situation.known].sum() * situation.interval_s / situation.range_s
    fully = explained.score * min(1.0, 3 * part)
    numbers = {"share": float(part), "open_at_once": float(at_once), "clients_with_most": few,
               "independent_picks": units(situation, measure), "before": explained.before,
               "after": explained.after}  # fmt: skip
    known = (
        f"{percent_of(part, measure)} is in connections longer than {situation.interval_s:.0f} s"
        f", about {at_once:.0f} at once"
    )
    rows = (("opened", "==", False),)
    heaviest = some([situation.clients[i] for i in order[:few]])
    whose = f", most of it of {heaviest}" if few <= FEW else ""
    if situation.protocol == "udp":
        yield Hypothesis(
            "udp-pinning",
            fully,
            f"{known}: UDP flows that go on for ever keep the backend of their first packet.",
            "Let clients ask from a new port each time, or use a node-local cache (NodeLocal DNSCache for DNS).",
            numbers,
            rows,
        )
    elif few <= FEW and distance(situation.load(measure, values=long), fair) <= CHANCE * by_chance(fair, at_once):
        yield Hypothesis(
            "few-clients",
            fully,
            f"{known}, most of it of {heaviest}: too few to average out.",
            f"Spread the work of {heaviest} over more connections, or have them renewed now and then.",
            numbers,
            rows,
        )
    else:
        yield Hypothesis(
            "long-lived-connections",
            fully,
            f"{known}{whose}; new connections are {percent(uneven)} from even.",
            "Bound the life of connections (max connection age at the server, keep-alive limits at the client), or "
            "balance requests instead of connections (a proxy that knows HTTP/2 or gRPC).",
            numbers,
            rows,
        )
