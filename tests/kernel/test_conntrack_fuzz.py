"""The dump's decoder against the slow reference: whatever order, whatever damage, the same rows and the same counts."""

import random
from random import Random

from conntrack_messages import BOOT_NS, DONE, WANTED, Entry, Row, any_entry, damaged, encode, reference, rows, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.kernel import conntrack

#: One number decides a whole datagram: drawn piece by piece it would take hypothesis ten times as long.
seeds = st.integers(0, (1 << 64) - 1).map(random.Random)


def decoded(data: bytes, wanted: tuple[int, ...] = WANTED) -> tuple[list[Row], int, int]:
    found = conntrack.decode(data, BOOT_NS, wanted)
    return rows(found.entries), found.malformed, found.directional


def directed(random: Random, entry: Entry) -> Entry:
    """Now and then one whose zone is one direction's alone."""
    fields = {"zone": 1 + random.getrandbits(15), "direction": random.choice((1, 2))}
    return Entry(**(vars(entry) | fields)) if random.random() < 0.1 else entry


def message(random: Random, entry: Entry) -> bytes:
    return entry.message([encode(shuffled(random, entry.nodes()))])


@settings(deadline=None, max_examples=150)
@given(seeds)
def test_whole_messages_in_any_order(random: Random) -> None:
    entries = [directed(random, any_entry(random)) for _ in range(20)]
    data = b"".join(message(random, entry) for entry in entries) + random.choice((b"", DONE))
    usable = [entry for entry in entries if entry.protocol in WANTED]
    expected = [entry.row() for entry in usable if entry.direction is None]
    assert decoded(data) == (expected, 0, len(usable) - len(expected))
    assert reference(data) == (expected, 0, len(usable) - len(expected)), "the reference itself"


@settings(deadline=None, max_examples=600)
@given(seeds)
def test_damaged_messages(random: Random) -> None:
    whole = [message(random, directed(random, any_entry(random))) for _ in range(10)]
    data = b"".join(damaged(random, one, random.choice(whole)) if random.random() < 0.5 else one for one in whole)
    assert decoded(data) == reference(data)


@settings(deadline=None, max_examples=600)
@given(seeds)
def test_damaged_datagrams_each_by_itself(random: Random) -> None:
    """What is broken in one datagram does not reach the next, though they are decoded together."""
    whole = [message(random, any_entry(random)) for _ in range(6)]
    cuts = [damaged(random, one + one, random.choice(whole))[: random.randrange(3, 1000)] for one in whole]
    found = conntrack._decode(cuts, BOOT_NS, WANTED)
    each = [reference(one) for one in cuts]
    assert rows(found.entries) == [row for one, _, _ in each for row in one]
    assert found[1:] == (sum(one[1] for one in each), sum(one[2] for one in each))


@settings(deadline=None, max_examples=100)
@given(seeds, st.lists(st.sampled_from((*WANTED, 1, 47)), max_size=3))
def test_only_the_protocols_asked_for(random: Random, wanted: list[int]) -> None:
    data = b"".join(message(random, any_entry(random)) for _ in range(10))
    assert decoded(data, tuple(wanted)) == reference(data, tuple(wanted))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    assert decoded(data) == reference(data)
