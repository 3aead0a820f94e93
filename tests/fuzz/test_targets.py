"""Every target, quickly: its samples, what was found before, and damaged ones."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import CORPUS, TARGETS, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

#: Words that lengths, counts and types like least.
_WORDS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\1\0\0\0", b"\0\0", b"\xff\xff", b"null", b"[]")


def damaged(chance: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0:
                raw[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del raw[at:]
            case 2:
                raw[at:at] = raw[chance.randrange(len(raw) + 1) :][: chance.randrange(40)]
            case 3:
                word = chance.choice(_WORDS)
                raw[at : at + len(word)] = word
            case _:
                del raw[at : at + chance.randrange(20)]
    return bytes(raw)


def test_the_corpus_is_of_targets_and_small() -> None:
    kept = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} <= set(TARGETS)
    assert sum(path.stat().st_size for path in kept) < 100_000


@pytest.mark.parametrize("name", TARGETS)
def test_samples_and_findings(name: str) -> None:
    for data in examples(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if name != "btf"])
def test_damaged_samples(name: str) -> None:
    samples = list(examples(name))

    @settings(
        deadline=None,
        max_examples=12 if TARGETS[name].slow else 150,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.integers(0, (1 << 64) - 1))
    def parse(seed: int) -> None:
        chance = random.Random(seed)
        TARGETS[name](damaged(chance, chance.choice(samples)))

    parse()


_TYPES = """
import random, sys
sys.path.insert(0, sys.argv[1])
from fuzz.targets import TARGETS, examples
from fuzz.test_targets import damaged
chance, samples = random.Random(int(sys.argv[2])), list(examples("btf"))
for _ in range(300):
    TARGETS["btf"](damaged(chance, chance.choice(samples)))
"""


@pytest.mark.parametrize("seed", range(2))
def test_damaged_type_information(seed: int) -> None:
    """In a process of its own: libbpf parses it."""
    arguments = [sys.executable, "-c", _TYPES, str(Path(__file__).resolve().parents[1]), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_target_that_breaks_is_seen() -> None:
    from fuzz.targets import Target

    with pytest.raises(ZeroDivisionError):
        Target(lambda data: 1 // len(data), list)(b"")
