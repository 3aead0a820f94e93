"""The benchmark's statistics, by hand and by simulation."""

import random
import statistics

from tests.bench import paired


def test_ranks_are_those_of_the_sign_test() -> None:
    assert paired.ranks(30) == (9, 20)  # Conover, Practical Nonparametric Statistics: the 10th and the 21st
    assert paired.ranks(6) == (0, 5)
    assert paired.ranks(10) == (1, 8)
    assert paired.ranks(2) == (0, 1)
    assert paired.ranks(1) == (0, 0)


def test_the_interval_holds_the_median_in_95_of_100() -> None:
    source, held = random.Random(1), 0
    for _ in range(400):
        pairs = [(1.0, source.lognormvariate(0, 0.2)) for _ in range(15)]
        found = paired.ratio(pairs)
        held += found.low <= 1.0 <= found.high
        assert found.low <= found.median <= found.high
    assert held >= 0.95 * 400


def test_the_ratio_is_that_of_each_pair_and_not_of_all() -> None:
    assert paired.ratio([(1, 1), (10, 10), (100, 50)]).median == 1.0
    assert paired.ratio([(2, 1)]).median == statistics.median([0.5])
