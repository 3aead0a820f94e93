"""Clients that come back to the same backend: affinity, pinned UDP flows, or too few clients to average out."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tracer.analysis.causes.explain import Explained, by_chance, distance, effective, without
from tracer.analysis.causes.hypothesis import Hypothesis, percent, percent_of, some, times
from tracer.analysis.causes.situation import MEASURES, Floats, Situation

#: From this stickiness on all clients, or one, are said to come back.
ALL_STICK, ONE_STICKS = 0.35, 0.5
#: So many connections of a node's other clients, or of one client, are enough to see a habit.
ENOUGH = 20


def stickiness(picks: Floats, node: npt.NDArray[np.int64]) -> tuple[float, Floats]:
    """How much clients come back to the same backend: 0 picks anew each time, 1 never changes; of all, and of each.

    `picks`: clients by backends, connections; `node`: each client's node. Of a client it is the probability that two of
    its connections meet at one backend, above that of one of its own and one of another client of its node (of any,
    where the node has no others), so that what a whole node has in common is not taken for a client's habit.
    """
    total = picks.sum(axis=1)
    pairs = total * (total - 1)
    meet = (picks * (picks - 1)).sum(axis=1)
    of_node = np.zeros((int(node.max(initial=0)) + 1, picks.shape[1]))
    np.add.at(of_node, node, picks)
    others = of_node[node] - picks
    alone = others.sum(axis=1) < ENOUGH
    others[alone] = (picks.sum(axis=0) - picks)[alone]
    base = (picks * others).sum(axis=1) / np.maximum(1.0, total * others.sum(axis=1))
    own = np.divide(meet, pairs, out=np.zeros_like(meet), where=pairs > 0)
    each = np.divide(own - base, 1 - base, out=np.zeros_like(base), where=(pairs > 0) & (base < 0.95))
    # A client counts with its connections, not with their square: a heavy one is not all there is to see.
    weight = np.where(pairs > 0, total, 0.0)
    room = float((weight * (1 - base)).sum())
    return (float((weight * (own - base)).sum()) / room if room > 0.05 * weight.sum() else 0.0), each


def sticking_clients(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Two ways to see it: the rest is even without the clients that stick; or all stick, and are few, and unequal.

    The second deals clients instead of connections: is the skew what chance gives so few units?
    """
    virtual = situation.known & ~situation.direct
    client, backend, opened = situation.places("client"), situation.places("backend"), situation.column("opened")
    picks = np.zeros((len(situation.clients), len(situation.backends)))
    np.add.at(picks, (client[virtual], backend[virtual]), opened[virtual])
    node = np.zeros(len(picks), dtype=np.int64)
    node[client] = situation.places("node")
    index, each = stickiness(picks, node)
    habitual = np.flatnonzero((each > ONE_STICKS) & (picks.sum(axis=1) >= ENOUGH))
    if index < ALL_STICK and not len(habitual):
        return
    amounts = np.zeros_like(picks)
    np.add.at(amounts, (client[virtual], backend[virtual]), situation.column(MEASURES[measure])[virtual])
    fair = situation.fair(measure)
    before = distance(situation.load(measure), fair)
    alone = without(situation, measure, np.isin(client, habitual) & virtual)
    dealt = by_chance(fair, effective(amounts[amounts > 0])) if index >= ALL_STICK else 0.0
    # What remains is what even as few units as these would not give by chance.
    as_few = Explained(before, 0.0 if before <= 2 * dealt else before, 0.0).score * min(1.0, 0.3 + index)
    by_client = amounts.sum(axis=1)
    heaviest, active = int(by_client.argmax()), int((by_client > 0).sum())
    top = float(by_client.max() / max(1.0, by_client.sum()))
    if as_few >= alone.score:
        comes = "comes" if active == 1 else "come"
        known = f"{times(active, 'client')} {comes} back to the same backend (stickiness {index:.2f} of 1), the "
        known += f"heaviest makes {percent_of(top, measure)}"
        who = [situation.clients[heaviest]]
    else:
        part = float(by_client[habitual].sum() / max(1.0, by_client.sum()))
        known = f"{len(habitual)} of {times(active, 'client')} come back to the same backend with "
        known += f"{percent_of(part, measure)}; without them the split is {percent(alone.after)} from even"
        who = [situation.clients[i] for i in habitual[np.argsort(-by_client[habitual])]]
    yield _named(situation, max(as_few, alone.score), known, who, {
        "clients": active, "clients_that_stick": len(habitual), "stickiness": index, "heaviest_client_share": top,
        "before": before, "after": alone.after, "by_chance_of_clients": dealt,
    })  # fmt: skip


def _named(situation: Situation, score: float, known: str, who: list[str], numbers: dict[str, float]) -> Hypothesis:
    rows = ((situation.client_column, "in", who),)
    if situation.affinity:
        return Hypothesis(
            "session-affinity",
            score,
            f"Session affinity ClientIP is on, and {known}.",
            "Turn sessionAffinity off if the application does not need it, or spread the load over more clients.",
            numbers,
            rows,
        )
    if situation.protocol == "udp":
        return Hypothesis(
            "udp-pinning",
            score,
            f"UDP flows are translated once, and {known}.",
            "Let clients ask from a new port each time, or use a node-local cache (NodeLocal DNSCache for DNS).",
            numbers,
            rows,
        )
    affinity = "Session affinity is off" if situation.affinity is False else "Whether affinity is on is not known"
    return Hypothesis(
        "few-clients",
        score,
        f"{affinity}, but {known}.",
        "Look what pins clients (affinity, a balancer that hashes addresses, as IPVS `sh` does, one source port used "
        f"again), and spread the load of {some(who)} over more clients or connections.",
        numbers,
        rows,
    )
