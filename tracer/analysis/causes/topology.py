"""Traffic that stays in its zone or on its node: even within, uneven across."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent
from tracer.analysis.causes.situation import Floats, Situation

Names = npt.NDArray[np.object_]
Places = npt.NDArray[np.int64]

#: Part of the connections that must stay within, for it to be a rule and not a tendency.
STAYS = 0.97


def _places(of_node: Names, node: Places, there: Names, opened: Floats) -> Names:
    """Where each cell's client is: as its node says, or, of a node whose zone nobody tells, where all of it goes."""
    known = of_node.copy()
    for place in np.flatnonzero(of_node == ""):
        mine = (node == place) & (opened > 0)
        goes = {name: opened[mine & (there == name)].sum() for name in set(there[mine])}
        most = max(goes, key=lambda name: goes[name], default="")
        if goes and goes[most] >= STAYS * sum(goes.values()):
            known[place] = most
    return np.asarray(known[node])


def kept_within(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Zone hints and Local traffic policies, by what they do: does a split within zones (nodes) leave anything?"""
    places = np.array([zone if isinstance(zone, str) else "" for zone in situation.node_zones], object)
    nodes = np.array(situation.nodes, object)
    for kind, said, of_node, column in (
        ("zone", situation.hinted, places, "zone"),
        ("node", situation.local, nodes, "node"),
    ):
        group = np.array([g if isinstance(g, str) else "" for g in situation.backends[column]], object)
        if said is False or len(set(group[situation.entitled]) - {""}) < 2:
            continue
        virtual = situation.known & ~situation.direct
        there = group[np.maximum(situation.places("backend"), 0)]
        opened = situation.column("opened")
        here = _places(of_node, situation.places("node"), there, np.where(virtual, opened, 0.0))
        sure = virtual & (of_node[situation.places("node")] != "")
        stays = opened[sure & (here == there)].sum() / max(1.0, opened[sure].sum())
        if stays < STAYS or (kind == "node" and situation.local is None and situation.hinted):
            continue
        load = situation.load(measure)
        fair = np.zeros_like(load)
        for name in sorted(set(here[virtual])):
            fair += situation.fair(measure, situation.known & (here == name), group == name)
        blind = situation.fair(measure)
        explained = Explained(distance(load, blind), distance(load, fair), by_chance(fair, units(situation, measure)))
        what = {"zone": "zone hints", "node": "a Local traffic policy"}[kind]
        undo = {"zone": "take off trafficDistribution", "node": "set the traffic policy to Cluster"}[kind]
        how, within = ("are set", "in") if kind == "zone" else ("is set", "on")
        source = f"{what} {how}" if said else f"whether {what} {how} is not known"
        yield Hypothesis(
            "topology",
            explained.score,
            f"{percent(float(stays))} of the connections stay {within} their {kind} ({source}): even within "
            f"({percent(explained.after)} from even), uneven across ({percent(explained.before)}).",
            f"Put backends where the clients are (topologySpreadConstraints), or let traffic leave its {kind}: {undo}.",
            {"stays": float(stays), "before": explained.before, "after": explained.after},
        )
        return
