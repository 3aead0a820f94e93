"""Backends that serve several services: a service is even, and still one of its pods has twice its peers' load."""

import numpy as np
import numpy.typing as npt

from tracer.analysis.causes.explain import units
from tracer.analysis.causes.hypothesis import CALLED, percent, some
from tracer.analysis.causes.situation import MEASURES, Situation
from tracer.analysis.partial import ROUTE, Partial
from tracer.analysis.situations import ServicePort, Situations
from tracer.analysis.verdict import RATIO

_IP = ROUTE.index("backend_ip")
#: This part of a pod's load must come from elsewhere to be worth a word.
WORTH = 0.2
#: And its load this many standard deviations above what chance makes of an even service: the busiest of a hundred pods
#: is often at three.
SURE = 4.0


class Elsewhere:
    """What backends' addresses get in all, through whatever service."""

    def __init__(self, known: Situations, part: Partial) -> None:
        """Adds up the counts once, for all services."""
        self._known = known
        self._ips = [route[_IP] for route in part.routes]
        self._loads = {
            measure: np.bincount(part.route, part.sum(column), len(part.routes)) for measure, column in MEASURES.items()
        }

    def note(self, port: ServicePort, situation: Situation) -> str:
        """A sentence, if the pods of a service are unevenly loaded in all, and what comes from elsewhere is why."""
        ips = situation.backends["ip"].to_numpy()
        place = {ip: i for i, ip in enumerate(ips[situation.entitled])}
        if len(place) < 2:
            return ""
        routes = [(place[ip], number) for number, ip in enumerate(self._ips) if ip in place]
        best: tuple[float, str] = (0.0, "")
        for measure in ("bytes", "connections"):
            of_port = situation.load(measure)[situation.entitled]
            own = np.bincount([place[ip] for ip in ips[situation.entitled]], of_port, len(place)).astype(np.float64)
            at, numbers = (np.array(each, dtype=np.int64) for each in zip(*routes, strict=True))
            total = np.bincount(at, self._loads[measure][numbers], len(place)).astype(np.float64)
            found = self._uneven(port, situation, measure, own, total, list(place))
            best = max(best, found)
        return best[1]

    def _uneven(
        self,
        port: ServicePort,
        situation: Situation,
        measure: str,
        own: npt.NDArray[np.float64],
        total: npt.NDArray[np.float64],
        ips: list[object],
    ) -> tuple[float, str]:
        busiest = int(total.argmax())
        if not own.any() or not total[busiest]:
            return 0.0, ""
        part = 1 - own[busiest] / total[busiest]
        ratio, alone = (float(load[busiest] * len(load) / load.sum()) for load in (total, own))
        # Standard deviation of one backend's ratio to its even share, if that many picks are dealt evenly.
        chance = np.sqrt((len(own) - 1) / max(1.0, units(situation, measure)))
        if part < WORTH or ratio < RATIO or ratio - 1 < max(2 * (alone - 1), SURE * chance):
            return 0.0, ""
        row = next(i for i, ip in enumerate(situation.backends["ip"]) if ip == ips[busiest])
        name = situation.backend_name(row)
        through = self._known.through(str(ips[busiest]), port)
        where = f" ({some(through)})" if through else ""
        return ratio, (
            f"But its backend {name} gets {ratio:.1f} times its even share of the {CALLED[measure]} in all: "
            f"{percent(part)} of them come through other addresses{where}."
        )
