"""The maps: sizes by arithmetic against what the kernel charges, and descriptors that do not outlive them."""

import os
import re
from dataclasses import fields

import numpy as np
import pytest

from tracer.errors import TracerError, UsageError
from tracer.kernel import libbpf
from tracer.kernel.maps import CONNECTION, CONTROL_PAUSE, SPOTS, TALLY, TRANSLATION, Maps, Sizes
from tracer.record import RECORD, TUPLE, Counter

SMALL = Sizes(connections=100, translations=100, ring_bytes=1 << 16, listeners=10, namespaces=10)


def charged(fd: int) -> int:
    """What the kernel says that a map costs (bpf_map_show_fdinfo)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("memlock:"))


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.needs("bpf")
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(connections=50_000, translations=70_000, ring_bytes=1 << 20, listeners=1_000, namespaces=100),
        Sizes(connections=1 << 18, translations=1 << 12, ring_bytes=1 << 16),
        Sizes(connections=1_025, translations=2_049, ring_bytes=1 << 16, listeners=65, namespaces=33),
    ],
)
def test_the_arithmetic_is_the_kernels(sizes: Sizes) -> None:
    maps = Maps.create(sizes)
    try:
        real = sum(map(charged, maps.descriptors().values()))
    finally:
        maps.close()
    # Not counted are a few pages of the ring's own and some hundred bytes for every map.
    assert sizes.kernel_bytes() == pytest.approx(real, rel=0.02, abs=40_000)


@pytest.mark.needs("bpf")
def test_an_entry_costs_what_the_documentation_says() -> None:
    """At a power of two, where an entry has a bucket of its own."""
    said = re.search(
        r"connection costs (\d+) .* translation (\d+), an owner (\d+), a record (\d+)", Sizes.__doc__ or ""
    )
    assert said
    connection, translation, owner, record = map(int, said.groups())
    maps = Maps.create(Sizes())
    try:
        assert charged(maps.connections) / Sizes().connections == pytest.approx(connection, rel=0.001)
        assert charged(maps.translations) / Sizes().translations == pytest.approx(translation, rel=0.001)
        assert charged(maps.owners) / Sizes().owners == pytest.approx(owner, rel=0.001)
    finally:
        maps.close()
    assert record == RECORD.itemsize + 8


@pytest.mark.parametrize("ring_bytes", [0, 1, 2048, 4095, 5000, (1 << 20) + 4096, -4096])
def test_a_ring_of_an_impossible_size(ring_bytes: int) -> None:
    with pytest.raises(UsageError, match=f"power of two of at least [0-9]+ bytes, not {ring_bytes}: choose"):
        Sizes(ring_bytes=ring_bytes)


@pytest.mark.parametrize("field", ["connections", "translations", "listeners", "namespaces"])
@pytest.mark.parametrize("count", [0, -1])
def test_a_map_without_room(field: str, count: int) -> None:
    with pytest.raises(UsageError, match=f"room for at least one of the {field}, not {count}"):
        Sizes(**{field: count})


@pytest.mark.needs("bpf")
def test_nothing_stays_open_and_every_map_is_named() -> None:
    before = open_descriptors()
    maps = Maps.create(SMALL)
    assert set(maps.descriptors()) == {field.name for field in fields(Maps)}
    mapped = 1  # Python keeps a descriptor of what it has mapped
    assert len(open_descriptors()) == len(before) + len(fields(Maps)) + mapped
    maps.close()
    assert open_descriptors() == before


@pytest.mark.needs("bpf")
def test_nothing_stays_open_if_one_map_cannot_be_had() -> None:
    before = open_descriptors()
    with pytest.raises(TracerError, match=r"when making the BPF map 'vt_listeners': .*'vip-tracer doctor'"):
        Maps.create(Sizes(connections=1, translations=1, ring_bytes=1 << 16, listeners=1 << 62))
    assert open_descriptors() == before


@pytest.mark.needs("bpf")
def test_counters_are_summed_over_the_cpus() -> None:
    maps = Maps.create(SMALL)
    try:
        assert maps.counters_now() == {counter.name.lower(): 0 for counter in Counter}
        per_cpu = np.zeros(libbpf.possible_cpus(), TALLY)
        per_cpu["counters"][:, Counter.LOST_RING] = np.arange(1, len(per_cpu) + 1)
        libbpf.map_update(maps.tallies, bytes(4), per_cpu.tobytes())
        totals = maps.counters_now()
        assert totals.pop("lost_ring") == per_cpu["counters"].sum()
        assert not any(totals.values())
    finally:
        maps.close()


def test_young_connections_have_places_where_there_is_room_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.kernel.maps._KEEPS_ORDER", True)
    assert Sizes(connections=4096).places == 256
    assert Sizes(connections=4095).places == 1
    assert Sizes(connections=32, young=2).places == 2
    for young in (0, SPOTS + 1):
        with pytest.raises(UsageError, match="young"):
            Sizes(young=young)


@pytest.mark.needs("bpf")
def test_controls_and_layouts_fit_their_maps() -> None:
    maps = Maps.create(SMALL)
    try:
        maps.set_control(CONTROL_PAUSE, 1 << 60)
        assert libbpf.map_lookup(maps.control, CONTROL_PAUSE.to_bytes(4, "little"), 8) == (1 << 60).to_bytes(
            8, "little"
        )
        key, value = np.zeros(1, TUPLE), np.zeros(1, TRANSLATION)
        key["src_port"], value["conn_id"] = 1, 2
        assert libbpf.map_update(maps.translations, key.tobytes(), value.tobytes()) == 0
        keys, values = libbpf.map_items(maps.translations, TUPLE, TRANSLATION)
        assert (keys.tobytes(), values.tobytes()) == (key.tobytes(), value.tobytes())
        row = np.zeros(1, CONNECTION)
        row["spot"] = 3
        assert libbpf.map_update(maps.connections, bytes(8), row.tobytes()) == 0
        assert libbpf.map_items(maps.connections, np.dtype("<u8"), CONNECTION)[1]["spot"].tolist() == [3]
    finally:
        maps.close()
