"""Causes that lie in the way to the backend: past the virtual address, by another balancer, by old rules."""

from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.chance import alike
from tracer.analysis.causes.explain import CHANCE, by_chance, distance, without
from tracer.analysis.causes.hypothesis import Hypothesis, percent, percent_of, some, times
from tracer.analysis.causes.situation import MEASURES, Situation

#: A node deviates if chance makes so large a difference this rarely, over all nodes.
DEVIATES = 0.001


def bypass(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Clients that dial the backends' own addresses (headless services, pod IPs): nobody balances those."""
    factor = situation.known & situation.direct
    amount = situation.column(MEASURES[measure])
    if not factor.any():
        return
    part = amount[factor].sum() / max(1.0, amount[situation.known].sum())
    explained = without(situation, measure, factor)
    who = np.unique(situation.places("client")[factor])
    places = np.unique(situation.places("backend")[factor])
    yield Hypothesis(
        "bypass",
        explained.score,
        f"{times(len(who), 'client')} dialled the pods' own addresses, past the virtual IP: "
        f"{percent_of(part, measure)}, on {len(places)} of {int(situation.entitled.sum())} backends; the rest is "
        f"{percent(explained.after)} from even.",
        f"Let {some([situation.clients[i] for i in who])} dial the service's virtual IP, or balance over all pods of "
        "the headless service themselves.",
        {"clients": len(who), "share": float(part), "before": explained.before, "after": explained.after},
        (("nat", "==", "none"), ("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in places])),
    )


def socket_balancer(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """A program at connect() that picks the backend (Cilium's socket load balancer is one), and not evenly.

    Where it did everything there is nothing to compare it with: then it is blamed only as far as 0.7.
    """
    factor = situation.known & np.asarray(situation.cells["socket"], dtype=bool) & ~situation.direct
    others = situation.known & ~factor & ~situation.direct
    amount = situation.column(MEASURES[measure])
    if not factor.any():
        return
    own_fair = situation.fair("connections", factor)
    own = distance(situation.load("connections", factor), own_fair)
    if own <= CHANCE * by_chance(own_fair, situation.column("opened")[factor].sum()):
        return
    explained = without(situation, measure, factor)
    alone = amount[others].sum() < 0.1 * amount[factor].sum()
    part = amount[factor].sum() / max(1.0, amount[situation.known].sum())
    rest = "" if alone else f"; what it did not touch is {percent(explained.after)} from even"
    yield Hypothesis(
        "socket-balancer",
        0.7 if alone else explained.score,
        f"A program at connect() picked the backend of {percent_of(part, measure)}, {percent(own)} from even{rest}.",
        "Look into the socket-level balancer's own table of backends on those nodes (with Cilium: `cilium-dbg service "
        "list`), its algorithm and its affinity.",
        {"share": float(part), "own_distance": own, "before": explained.before, "after": explained.after},
        (("nat_source", "==", "socket"),),
    )


def stale_translation(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Connections to an address that was no endpoint (any more): old rules, or an entry that outlived its pod."""
    factor = situation.known & ~situation.endpoint_then & ~situation.direct
    opened = situation.column("opened")
    amount = situation.column(MEASURES[measure])
    if situation.ready is None or not factor.any() or amount[factor].sum() <= 0:
        return
    explained = without(situation, measure, factor)
    where = np.unique(situation.places("node")[factor])
    places = np.unique(situation.places("backend")[factor])
    part = amount[factor].sum() / amount[situation.known].sum()
    failed = sum(situation.column(name)[factor].sum() for name in ("refused", "timeout", "unreachable"))
    nodes = some([situation.nodes[i] for i in where])
    yield Hypothesis(
        "stale-translation",
        explained.score,
        f"{percent_of(part, measure)} ({int(opened[factor].sum())} new connections, {int(failed)} of them failed) went "
        f"to {some([situation.backend_name(i) for i in places])}, no endpoint at that time, from {nodes}.",
        f"Restart kube-proxy on {nodes}, and delete what is left in connection tracking there: `conntrack -D -r "
        f"{situation.backends.iloc[places[0]]['ip']}`.",
        {"share": float(part), "opened": float(opened[factor].sum()), "failed": float(failed), "nodes": len(where),
         "before": explained.before, "after": explained.after},
        (("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in places]),
         ("node", "in", [situation.nodes[i] for i in where])),
    )  # fmt: skip


def deviating_node(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """One node that splits otherwise than all others: its kube-proxy is out of date, or not the same.

    Only new connections through the virtual address tell of rules. A node whose connections come from one client
    is not told from that client.
    """
    virtual = situation.known & ~situation.direct
    node = situation.places("node")
    opened = situation.column("opened")
    if len(np.unique(node[virtual])) < 2:
        return
    best: Hypothesis | None = None
    for place in np.unique(node[virtual]):
        here, others = virtual & (node == place), virtual & (node != place)
        mine, theirs = situation.load("connections", here), situation.load("connections", others)
        fair = situation.fair("connections", here)
        apart = distance(mine, theirs)
        by_client = np.bincount(situation.places("client")[here], opened[here])
        one_client = by_client.max(initial=0) > 0.95 * by_client.sum()
        if one_client or alike(mine, theirs) > DEVIATES / len(np.unique(node[virtual])):
            continue
        explained = without(situation, measure, situation.known & (node == place))
        if best is not None and best.score >= explained.score:
            continue
        never = np.flatnonzero((mine == 0) & (fair >= 10))
        name = situation.nodes[place]
        lacks = f", and never to {some([situation.backend_name(i) for i in never])}" if len(never) else ""
        best = Hypothesis(
            "deviating-node",
            explained.score,
            f"{name} splits its {int(opened[here].sum())} connections {percent(apart)} otherwise than the other nodes"
            f"{lacks}; without it the split is {percent(explained.after)} from even.",
            f"Restart kube-proxy on {name} and compare its rules with another node's (`iptables-save -t nat`, `nft "
            "list ruleset`): its rules do not follow the endpoints.",
            {"opened": float(opened[here].sum()), "apart": apart, "backends_never_used": len(never),
             "before": explained.before, "after": explained.after},
            (("node", "==", name),),
        )  # fmt: skip
    if best is not None:
        yield best
