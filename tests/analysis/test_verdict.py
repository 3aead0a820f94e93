"""Against chance: how probable, how large, and what was not seen."""

import math

import numpy as np
import pytest
from analysis.situation_world import situation
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.analysis import cause, verdict
from tracer.analysis.causes import chance
from tracer.analysis.causes.situation import MEASURES, Situation


def judged(known: Situation) -> verdict.Verdict:
    tests = [test for measure in MEASURES if (test := verdict.test_of(known, measure)) is not None]
    return verdict.verdict(verdict.discoveries(tests))


def opened(*counts: int, **more: object) -> Situation:
    return situation([{"backend": i, "opened": n} for i, n in enumerate(counts)], len(counts), **more)


@pytest.mark.parametrize(
    ("value", "freedom", "tail"),
    # NIST's table of critical values of chi-square, and 2 degrees: exp(-x / 2)
    [(18.307, 10, 0.05), (29.588, 10, 0.001), (11.070, 5, 0.05), (124.342, 100, 0.05), (20.0, 2, math.exp(-10))],
)
def test_the_tail_of_chi_square(value: float, freedom: int, tail: float) -> None:
    assert chance.chi_square_tail(value, freedom) == pytest.approx(tail, rel=1e-3)


def test_few_picks_are_drawn_exactly() -> None:
    # Eight picks, all to one of two: 2 of the 256 sequences are as far from even.
    found = chance.probability(np.array([8.0, 0.0]), np.array([4.0, 4.0]), 8)
    assert found == pytest.approx(2 / 256, rel=0.1)
    assert chance.probability(np.array([8.0, 0.0]), np.array([4.0, 4.0]), 8) == found
    assert chance.probability(np.array([4.0, 4.0]), np.array([4.0, 4.0]), 8) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(5, 400))
def test_p_of_what_chance_makes_is_uniform(seed: int, backends: int, picks: int) -> None:
    rng = np.random.default_rng(seed)
    even = np.full(backends, picks / backends)
    found = np.array(
        [chance.probability(row.astype(float), even, picks) for row in rng.multinomial(picks, even / picks, 60)]
    )
    # Of few picks it is not quite 0.05 that lies below it, but 0.078 at the most: of 60, 20 have a probability of 2e-8.
    assert (found < 0.05).sum() < 20


def test_load_on_one_that_was_to_get_none_is_no_chance() -> None:
    assert chance.probability(np.array([50.0, 50.0]), np.array([100.0, 0.0]), 100) == 0


def test_even_uneven_and_too_few() -> None:
    even = judged(opened(1000, 1010, 990))
    assert (even.word, even.measures) == ("balanced", ())
    uneven = judged(opened(2000, 1000, 1000))
    assert (uneven.word, uneven.measures) == ("uneven", ("connections",))
    assert "17% of the new connections" in uneven.reasons[0]
    few = judged(opened(9, 4, 5))
    assert few.word == "inconclusive"
    assert "would tell" in few.reasons[0]
    # beyond chance, and too little for a word
    assert judged(opened(1_020_000, 1_000_000, 980_000)).word == "balanced"


def test_balanced_is_not_said_of_a_small_skew_beyond_chance_nor_of_a_large_one_within() -> None:
    small = judged(opened(10_800, 10_000, 10_000))
    assert (small.word, small.measures) == ("inconclusive", ("connections",))
    assert "more than chance makes" in small.reasons[0]
    large = judged(opened(130, 90, 100, 95, 100))
    assert large.word == "inconclusive"
    assert "chance may make that" in large.reasons[0]


def test_balanced_is_not_said_while_a_backend_fails() -> None:
    cells = [{"backend": i, "opened": 5000, "bytes": 100, "duration_us": 1000} for i in range(3)]
    even = situation([*cells, {"backend": 2, "opened": 0, "refused": 400}])
    said, found = cause.explained(even, judged(even))
    assert judged(even).word == "balanced"
    assert (said.word, [one.name for one in found]) == ("inconclusive", ["failing-backend"])
    assert "failed 400 of 5000" in said.reasons[0]


def test_a_passing_moment_is_no_trouble() -> None:
    cells = [{"backend": i, "opened": 5000, "latencies": 5000, "latency_us": 500_000} for i in range(3)]
    ready = np.array([[1.0, 1.0, 1.0, 0.0]])
    more = {"n_backends": 4, "bin_s": 600.0, "ready": ready}

    def signs(**cell: int) -> list[str]:
        return [one.name for one in cause.troubles(situation([*cells, cell], **more))]  # type: ignore[list-item]

    assert signs(backend=3, opened=20) == []
    assert signs(backend=3, opened=20, timeout=20) == ["stale-translation"]
    assert signs(backend=3, opened=400) == ["stale-translation"]
    # two SYNs sent again, or three
    cells[1] |= {"latency_us": 2_600_000, "duration_us": 2_600_000}
    assert signs(backend=0) == []
    cells[1] |= {"latency_us": 4_600_000, "duration_us": 4_600_000}
    assert signs(backend=0) == ["failing-backend"]


def test_a_skew_without_a_cause_is_not_proven_where_much_of_it_may_be_unseen() -> None:
    cells = [{"backend": i, "opened": n} for i, n in enumerate((2000, 1000, 1000))]
    seen = judged(situation(cells, lost={"node-0": 0.03}))
    hidden = judged(situation(cells, lost={"node-0": 0.1}))
    assert (seen.word, hidden.word) == ("uneven", "uneven")
    assert verdict.unexplained(hidden).word == "inconclusive"
    assert "what was not seen" in verdict.unexplained(hidden).reasons[0]


def test_what_was_not_seen_may_explain_it() -> None:
    cells = [{"backend": i, "opened": n} for i, n in enumerate((1500, 1000, 1000))]
    unresolved = judged(situation([*cells, {"backend": -1, "opened": 1000}]))
    assert unresolved.word == "inconclusive"
    assert "what was not seen" in unresolved.reasons[0]
    assert judged(situation(cells, lost={"node-0": 1 / 3})).word == "inconclusive"
    assert judged(situation(cells, lost={"node-0": 0.01})).word == "uneven"


def test_among_many_services_a_rare_split_is_expected() -> None:
    tests = [verdict.test_of(opened(*row), "connections") for row in [(160, 100, 110)] + [(100, 101, 99)] * 300]
    found = verdict.discoveries([test for test in tests if test is not None])
    alone = verdict.discoveries([found[0]])
    assert alone[0].proven
    assert not found[0].proven
    assert all(one.q <= 1 for one in found)


def test_clients_that_stick_are_clumped() -> None:
    free = [{"client": c, "backend": b, "opened": 20 + (c + b) % 3} for c in range(6) for b in range(3)]
    stuck = [{"client": c, "backend": c % 3, "opened": 60} for c in range(6)]
    assert verdict.clumping(situation(free)) < 1.5
    assert verdict.clumping(situation(stuck)) > 20


def test_nobody_to_share_is_no_verdict() -> None:
    assert judged(situation([{"backend": -1, "opened": 5}])).word == "inconclusive"


def test_a_gap_may_explain_it_and_only_on_the_node_that_has_the_clients() -> None:
    cells = [{"backend": i, "opened": n, "node": 0} for i, n in enumerate((1500, 1000, 1000))]
    cells.append({"backend": 0, "opened": 1, "node": 1})
    assert judged(situation(cells, gaps={"node-0": 0.5})).word == "inconclusive"
    assert judged(situation(cells, gaps={"node-1": 0.5})).word == "uneven"


def test_a_skew_that_nothing_explains_is_nothing_proven_where_clients_repeat_themselves() -> None:
    # Each of many clients asks one backend all the time: as many picks as clients.
    stuck = [{"client": c, "backend": min(c % 4, 2), "opened": 40} for c in range(16)]
    said = judged(situation(stuck))
    assert said.word == "uneven"
    left = verdict.unexplained(said)
    assert (left.word, left.measures) == ("inconclusive", said.measures)
    assert "come back to the same backends" in left.reasons[0]
    # Independent picks with the same shares prove it.
    free = [{"client": c, "backend": b, "opened": 10 * (1 + (b == 2))} for c in range(16) for b in range(3)]
    assert verdict.unexplained(judged(situation(free))).word == "uneven"
