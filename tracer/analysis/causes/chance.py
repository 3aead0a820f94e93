"""How probable a split is by chance: the G-test, drawn multinomials where picks are few; Pearson's for two splits."""

import math

import numpy as np

from tracer.analysis.causes.situation import Floats

#: Below so many expected picks of a backend the chi-square distribution is wrong: the multinomial is drawn instead.
FEW, DRAWS, SEED = 5.0, (999, 99_999), 20_260_731


def probability(load: Floats, even: Floats, picks: float) -> float:
    """How probable a split at least as far from `even` is by chance, of so many independent picks.

    The G-test with Williams' correction (1976); where a backend is to expect fewer than `FEW` picks, drawn multinomials
    (seeded, so the same data have the same answer). 0 if load is on those who were to get none.
    """
    entitled = even > 0
    if load[~entitled].sum() > 0.5 * load.sum() / max(1.0, picks):
        return 0.0
    share = even[entitled] / even.sum()
    k = len(share)
    if k < 2 or picks < 2:
        return 1.0
    g = float(_g(load[entitled] / load[entitled].sum(), share, picks))
    if picks * share.min() >= FEW:
        williams = 1 + ((1 / share).sum() - 1) / (6 * picks * (k - 1))
        return chi_square_tail(g / williams, k - 1)
    number = round(picks)
    for draws in DRAWS:
        drawn = np.random.default_rng(SEED).multinomial(number, share, size=draws)
        beyond = int((_g(drawn / number, share, picks) >= g * (1 - 1e-12)).sum())
        if beyond >= 10:
            break
    return (beyond + 1) / (draws + 1)


def _g(part: Floats, share: Floats, picks: float) -> Floats:
    """2 n sum p ln(p/q) along the last axis; p ln p is 0 where p is."""
    logs = np.log(np.where(part > 0, part / share, 1.0))
    return np.asarray(2 * picks * (part * logs).sum(axis=-1))


def chi_square_tail(value: float, freedom: int) -> float:
    """P(chi-square with so many degrees of freedom > value): Q(a + 1, x) = Q(a, x) + x^a e^-x / gamma(a + 1).

    From Q(1, x) = e^-x, or Q(1/2, x) = erfc(sqrt x); NIST's Digital Library of Mathematical Functions, 8.8.6 and 8.4.
    """
    x = value / 2
    if x <= 0:
        return 1.0
    a, tail = (0.5, math.erfc(math.sqrt(x))) if freedom % 2 else (1.0, math.exp(-x))
    while a < freedom / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(1.0, tail)


def alike(some: Floats, others: Floats) -> float:
    """How probable it is that two groups of picks differ so much if both are dealt with the same shares (Pearson)."""
    table = np.array([some, others])
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return chi_square_tail(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)
