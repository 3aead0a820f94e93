"""Tuples as numbers: equal for equal ones, other for others, also for those that somebody chose."""

import itertools

import numpy as np

from tracer.kernel.identity import are_in, find, identity, without_zone
from tracer.record import TUPLE


def test_bits_that_cancel_in_a_product_make_other_numbers() -> None:
    """All tuples that differ in the highest bits of words, and in those that a shift brings there."""
    bits = [8 * byte + bit for byte in (7, 12, 15, 23, 28, 31) for bit in (2, 7)]
    chosen = np.zeros((2 ** len(bits), TUPLE.itemsize), np.uint8)
    for place, flipped in enumerate(itertools.product((0, 1), repeat=len(bits))):
        for bit in itertools.compress(bits, flipped):
            chosen[place, bit // 8] ^= 1 << bit % 8
    assert len(np.unique(identity(chosen.view(TUPLE)[:, 0]))) == len(chosen)


def test_numbers_and_zones_are_part_of_it_unless_left_out() -> None:
    tuples = np.zeros(4, TUPLE)
    tuples["src_port"] = [1, 1, 2, 2]
    tuples["zone"] = [0, 5, 0, 5]
    assert len(np.unique(identity(tuples))) == 4
    assert len(np.unique(identity(without_zone(tuples)))) == 2
    assert len(np.unique(identity(without_zone(tuples), np.array([1, 1, 1, 2])))) == 3


def test_places_are_those_of_the_wanted() -> None:
    among, wanted = np.array([30, 10, 20], np.uint64), np.array([20, 15, 30, 99, 10], np.uint64)
    place, there = find(among, wanted)
    assert there.tolist() == are_in(wanted, among).tolist() == [True, False, True, False, True]
    assert among[place[there]].tolist() == [20, 30, 10]
    assert not are_in(wanted, among[:0]).any()
