"""Probabilities as kube-proxy's iptables mode prints them: when their rounding can matter.

The i-th of n rules matches with 1 / (n - i), printed with a fixed number of decimals. Before Kubernetes 1.17 there
were five (kubernetes/kubernetes#83599), which repeat from 319 endpoints on; since then there are ten, and the kernel's
own 31 bits (xt_statistic) are finer than that.
"""

from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent
from tracer.analysis.causes.situation import Floats, Situation

#: Below so many endpoints five decimals are off by less than 1 in 1,000.
MATTERS_FROM = 300


def rounded_shares(n: int, decimals: int) -> Floats:
    """The shares of n endpoints, in the order of their rules, whose probabilities are printed with so many decimals.

    Share i is p_i times the product of all (1 - p_j) before it; the last rule matches always.
    """
    p = np.round(1.0 / (n - np.arange(n)), decimals)
    p[-1] = 1.0
    return np.asarray(p * np.concatenate(([1.0], np.cumprod(1 - p)[:-1])))


def rounding(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """How much of the skew is what five decimals make; ten never make any that shows.

    Nobody knows the rules' order, so the loads are held against the shares rank by rank.
    """
    entitled = situation.entitled
    n = int(entitled.sum())
    if n < MATTERS_FROM:
        return
    load, even = situation.load(measure)[entitled], np.ones(n)
    before, shares = distance(load, even), rounded_shares(n, 5)
    after = distance(np.sort(load), np.sort(shares))
    possible = distance(shares, even)
    yield Hypothesis(
        "rounding",
        Explained(before, after, by_chance(even, units(situation, measure))).score,
        f"With {n} endpoints, probabilities of five decimals (kube-proxy before 1.17) make a skew of "
        f"{percent(possible)}; {percent(before)} was seen.",
        "Update kube-proxy to 1.17 or later, or use its nftables or IPVS mode.",
        {"endpoints": n, "possible": possible, "before": before, "after": after},
    )
