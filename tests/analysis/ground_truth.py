"""The whole suite, as a table: what is said of every dataset whose cause is known, and of balanced services.

Run it: python -m tests.analysis.ground_truth [--seeds N] [--services N]
"""

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from tracer.analysis import cause
from tracer.analysis import verdict as verdicts
from tracer.analysis.causes.situation import MEASURES, Situation

from . import agents, cases, rounded
from .counted import all_of, of_tables

ROUNDING = "rounding"


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is said of a case: the verdict, the first cause ("none": no cause found), and what is true."""

    truth: str
    variant: str
    strength: str
    verdict: str
    first: str

    @property
    def right(self) -> bool:
        """The right cause comes first (or none, where there is none to find)."""
        return self.verdict != cases.BALANCED and self.first == self.truth

    @property
    def wrong(self) -> bool:
        """Confidently wrong: uneven, and for a cause that is none. "No cause found" is honest."""
        return self.verdict == "uneven" and self.first not in (self.truth, cases.UNEXPLAINED)


def said_of(situation: Situation) -> verdicts.Verdict:
    """The verdict on a situation by itself, causes not asked for."""
    tests = [test for measure in MEASURES if (test := verdicts.test_of(situation, measure)) is not None]
    return verdicts.verdict(verdicts.discoveries(tests))


def judge(case: cases.Case) -> Judged:
    """What is said of one case."""
    return judge_counts(of_tables(case.tables, "shop/web"), case.truth, case.variant, case.strength)


def judge_counts(situation: Situation, truth: str, variant: str, strength: str) -> Judged:
    """What is said of a situation whose cause is known."""
    said, found = cause.explained(situation, said_of(situation))
    first = found[0].name if found else cases.UNEXPLAINED
    return Judged(truth, variant, strength, said.word, first)


def troubled(seeds: Iterable[int], strengths: Iterable[str]) -> list[Judged]:
    """All causes, in all their variants."""
    return [
        judge(cases.troubled(build, truth, strength, seed))
        for truth, builds in cases.CAUSES.items()
        for build in builds
        for strength in strengths
        for seed in seeds
    ] + [
        judge_counts(rounded.five_decimals(seed, strength), ROUNDING, "five_decimals", strength)
        for strength in strengths
        for seed in seeds
    ]


def small_services(seed: int, services: int) -> Iterator[str]:
    """Verdicts on many small balanced services of one cluster."""
    known = [situation for _, situation in all_of(agents.tables(cases.many_balanced(seed, services)))]
    tests = [verdicts.test_of(situation, measure) for situation in known for measure in MEASURES]
    found = verdicts.discoveries([test for test in tests if test is not None])
    for place in range(len(known)):
        own = sum(test is not None for test in tests[3 * place : 3 * place + 3])
        yield verdicts.verdict(found[:own]).word
        found = found[own:]


def table(judged: list[Judged]) -> str:
    """A line per cause and variant: right/all at each strength; then what was said instead."""
    lines = [f"{'cause':24}{'variant':18}" + "".join(f"{s:>9}" for s in cases.STRENGTH) + "  instead"]
    for truth, variant in dict.fromkeys((j.truth, j.variant) for j in judged):
        cells, instead = "", Counter[str]()
        for strength in cases.STRENGTH:
            mine = [j for j in judged if (j.variant, j.strength) == (variant, strength)]
            cells += f"{sum(j.right for j in mine):>6}/{len(mine):<2}"
            instead.update(
                f"{strength} {j.verdict}" + ("" if j.verdict == cases.BALANCED else f" ({j.first})")
                for j in mine
                if not j.right
            )
        lines.append(f"{truth:24}{variant:18}{cells}  " + ", ".join(f"{n} {what}" for what, n in instead.items()))
    return "\n".join(lines)


def summary(judged: list[Judged]) -> str:
    """The figures that count."""
    clear = [j for j in judged if j.strength != "weak"]
    weak = Counter(
        "right" if j.right else "confidently wrong" if j.wrong else j.verdict for j in judged if j.strength == "weak"
    )
    return (
        f"right cause first: {sum(j.right for j in clear)} of {len(clear)} medium and strong cases; weak: {dict(weak)}"
    )


def main() -> None:
    """Runs everything and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="datasets per cause, variant and strength")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--services", type=int, default=1000, help="small balanced services")
    given = parser.parse_args()
    begun = time.monotonic()
    judged = troubled(range(given.first_seed, given.first_seed + given.seeds), cases.STRENGTH)
    print(table(judged))  # noqa: T201  the command's output
    print(summary(judged))  # noqa: T201
    calm = Counter(judge(cases.balanced_case(seed)).verdict for seed in range(20))
    print(f"20 balanced datasets: {dict(calm)}")  # noqa: T201
    said = Counter(small_services(given.first_seed, given.services))
    print(f"{given.services} small balanced services: {dict(said)}; {time.monotonic() - begun:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
