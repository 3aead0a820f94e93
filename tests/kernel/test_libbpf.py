"""The bpf(2) calls of user space, on real maps."""

import errno
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tracer.errors import TracerError
from tracer.kernel import libbpf

pytestmark = pytest.mark.needs("bpf")

KEY, VALUE = np.dtype("<u8"), np.dtype([("low", "<u4"), ("high", "<u8")])


@pytest.fixture
def table() -> Iterator[int]:
    fd = libbpf.map_create(libbpf.MAP_TYPE_HASH, "vt_test", KEY.itemsize, VALUE.itemsize, 100_000)
    yield fd
    os.close(fd)


def fill(fd: int, count: int) -> None:
    values = np.zeros(count, VALUE)
    values["low"], values["high"] = np.arange(count), np.arange(count) + (1 << 40)
    for key, value in zip(np.arange(count, dtype=KEY), values, strict=True):
        assert libbpf.map_update(fd, key.tobytes(), value.tobytes()) == 0


@pytest.mark.parametrize("count", [0, 1, 5_000, 100_000])
def test_every_element_is_read_once(table: int, count: int) -> None:
    fill(table, count)
    keys, values = libbpf.map_items(table, KEY, VALUE)
    assert (keys.dtype, values.dtype) == (KEY, VALUE)
    order = np.argsort(keys)
    assert np.array_equal(keys[order], np.arange(count))
    assert np.array_equal(values["low"], keys)
    assert np.array_equal(values["high"], keys + (1 << 40))
    assert libbpf.map_count(table, KEY, VALUE) == count


def test_batches_hold_no_more_than_was_asked_for(table: int) -> None:
    fill(table, 5_000)
    sizes = [len(keys) for keys, _ in libbpf.map_batches(table, KEY, VALUE)]
    assert sum(sizes) == 5_000
    assert max(sizes) <= libbpf._BATCH


def test_a_bucket_that_does_not_fit_into_a_batch(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 keys in 131,072 buckets: two share one somewhere, and a batch of one cannot hold them."""
    monkeypatch.setattr(libbpf, "_BATCH", 1)
    fill(table, 5_000)
    sizes = [len(keys) for keys, _ in libbpf.map_batches(table, KEY, VALUE)]
    assert sum(sizes) == 5_000
    assert max(sizes) > 1
    keys, _ = libbpf.map_items(table, KEY, VALUE)
    assert len(np.unique(keys)) == 5_000


def test_a_map_that_changes_while_it_is_read_gives_more_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read goes, and as much is new: some of it further on, so that more elements come than there is room."""
    word, batches, fresh = np.dtype("<u8"), libbpf.map_batches, itertools.count(1 << 32)
    fd = libbpf.map_create(libbpf.MAP_TYPE_HASH, "vt_test", 8, 8, 5_000)

    def insert(number: int) -> None:
        assert libbpf.map_update(fd, number.to_bytes(8, "little"), number.to_bytes(8, "little")) == 0

    def churned(*asked: Any) -> Iterator[libbpf.Pair]:
        for keys, values in batches(*asked):
            yield keys, values
            for key in keys.tolist():
                assert libbpf.map_delete(fd, key.to_bytes(8, "little"))
                insert(next(fresh))

    try:
        for number in range(5_000):
            insert(number)
        monkeypatch.setattr(libbpf, "_BATCH", 500)
        monkeypatch.setattr(libbpf, "map_batches", churned)
        keys, values = libbpf.map_items(fd, word, word)
    finally:
        os.close(fd)
    assert len(keys) > 5_000
    assert len(np.unique(keys)) == len(keys)
    assert np.array_equal(keys, values)
    assert set(range(5_000)) <= set(keys.tolist())


def test_update_answers_with_the_errno(table: int) -> None:
    key, first, second = (n.to_bytes(8, "little") for n in (1, 10, 20))
    pad = bytes(VALUE.itemsize - 8)
    assert libbpf.map_update(table, key, first + pad, libbpf.BPF_NOEXIST) == 0
    assert libbpf.map_update(table, key, second + pad, libbpf.BPF_NOEXIST) == errno.EEXIST
    assert libbpf.map_lookup(table, key, VALUE.itemsize) == first + pad
    assert libbpf.map_update(table, key, second + pad) == 0
    assert libbpf.map_lookup(table, key, VALUE.itemsize) == second + pad


def test_a_full_map_refuses_and_evicts_nothing() -> None:
    fd = libbpf.map_create(libbpf.MAP_TYPE_HASH, "vt_test", 8, 8, 3)
    try:
        answers = [libbpf.map_update(fd, n.to_bytes(8, "little"), bytes(8)) for n in range(5)]
        assert answers == [0, 0, 0, errno.E2BIG, errno.E2BIG]
        keys, _ = libbpf.map_items(fd, np.dtype("<u8"), np.dtype("<u8"))
        assert sorted(keys.tolist()) == [0, 1, 2]
        assert libbpf.map_delete(fd, bytes(8))
        assert libbpf.map_update(fd, (4).to_bytes(8, "little"), bytes(8)) == 0
    finally:
        os.close(fd)


def test_delete_and_lookup_of_what_is_not_there(table: int) -> None:
    assert libbpf.map_lookup(table, bytes(8), VALUE.itemsize) is None
    assert not libbpf.map_delete(table, bytes(8))
    fill(table, 1)
    assert libbpf.map_delete(table, bytes(8))
    assert libbpf.map_lookup(table, bytes(8), VALUE.itemsize) is None


def test_a_per_cpu_value_is_one_for_each_possible_cpu() -> None:
    fd = libbpf.map_create(libbpf.MAP_TYPE_PERCPU_ARRAY, "vt_test", 4, 8, 1)
    try:
        values = np.arange(libbpf.possible_cpus(), dtype="<u8")
        assert libbpf.map_update(fd, bytes(4), values.tobytes()) == 0
        assert libbpf.map_lookup(fd, bytes(4), values.nbytes) == values.tobytes()
    finally:
        os.close(fd)


def test_refusals_are_errors_with_the_maps_name() -> None:
    for arguments in ((9999, "vt_wrong", 8, 8, 1), (libbpf.MAP_TYPE_HASH, "vt_wrong", 0, 8, 1)):
        with pytest.raises(OSError, match="when making the BPF map 'vt_wrong'") as caught:
            libbpf.map_create(*arguments)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="when asking about a BPF map"):
        libbpf.map_items(0, KEY, VALUE)
    with pytest.raises(OSError, match="when opening the socket iterator"):
        libbpf.iter_create(0)


def test_a_map_is_not_inherited(table: int) -> None:
    assert not os.get_inheritable(table)


def test_without_libbpf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "_SONAMES", ("libvt-none.so.1", "libm.so.6"))  # not there, and another library
    libbpf.library.cache_clear()
    try:
        with pytest.raises(TracerError, match=r"libbpf 0\.7 or newer was not found .*apt-get install libbpf1"):
            libbpf.library()
    finally:
        libbpf.library.cache_clear()
