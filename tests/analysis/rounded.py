"""A service of so many endpoints that the digits of kube-proxy's probabilities make its load uneven.

Five decimals (kube-proxy before 1.17) are 1 to 2 % of the load from 20,000 endpoints on, and more than chance only of
millions of connections: they are drawn as counts, which is all that detectors see.
"""

import numpy as np

from tracer.analysis.causes.rounding import rounded_shares
from tracer.analysis.causes.situation import Situation

from .situation_world import situation_of
from .troubles import STRENGTH

#: Endpoints at each strength; weak: 1.5 to 2 % of the load.
ENDPOINTS = {"weak": (25_000, 30_000), "medium": (60_000, 65_000), "strong": (110_000, 120_000)}
CLIENTS, PER_ENDPOINT = 4, 400
assert set(ENDPOINTS) == set(STRENGTH)


def five_decimals(seed: int, strength: str) -> Situation:
    """Short connections of a few clients on as many nodes, each picked by rules in the endpoints' order."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(*ENDPOINTS[strength]))
    opened = rng.multinomial(n * PER_ENDPOINT // CLIENTS, rounded_shares(n, 5), CLIENTS).ravel()
    one = np.repeat(np.arange(CLIENTS), n)
    # Sums of so many exponential amounts each.
    return situation_of(
        n_backends=n, client=one, node=one, backend=np.tile(np.arange(n), CLIENTS), opened=opened,
        duration_us=rng.gamma(opened, 50_000.0).astype(np.int64), bytes=rng.gamma(opened, 4_000.0).astype(np.int64),
    )  # fmt: skip
