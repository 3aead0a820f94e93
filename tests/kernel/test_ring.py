"""The consumer of the ring buffer, against a model of the kernel's producer (kernel/bpf/ringbuf.c)."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.kernel import libbpf
from tracer.kernel.ring import BUSY, DISCARD, Ring
from tracer.record import RECORD

SIZE = 4096
STEP = RECORD.itemsize + 8
PAGE = 256  # how much of the data is mapped a second time, behind it; here less than all of it


class Producer:
    """What the kernel does: reserve in order, commit or discard in any order, never overtake the consumer."""

    def __init__(self, at: int = 0, size: int = SIZE) -> None:
        self.size = size
        self.consumer = np.array([at], np.uint64)
        self.producer = np.array([at], np.uint64)
        # Wherever a consumer looks beyond the producer it finds what seems to be a finished record.
        self.data = np.frombuffer(
            np.array([RECORD.itemsize] * ((size + PAGE) // 8), np.uint64).tobytes(), np.uint8
        ).copy()
        self.numbers = 0
        self.in_ring: list[list[int]] = []  # [number, position, state]: 0 busy, 1 submitted, 2 discarded

    def ring(self) -> Ring:
        return Ring.over(self.consumer, self.producer, self.data, RECORD, PAGE)

    def write(self, position: int, content: bytes) -> None:
        for i, byte in enumerate(content):
            self.data[(position + i) % self.size] = byte
        self.data[self.size :] = self.data[:PAGE]

    def reserve(self, length: int = RECORD.itemsize) -> bool:
        position = int(self.producer[0])
        after = position + (length + 8 + 7) // 8 * 8
        if after - int(self.consumer[0]) > self.size - 1:  # new_prod_pos - cons_pos > rb->mask
            return False
        self.write(position, (length | BUSY).to_bytes(4, "little") + b"\xee" * 4)
        self.producer[0] = after
        self.in_ring.append([self.numbers, position, 0])
        self.numbers += 1
        return True

    def finish(self, which: int, discard: bool = False, length: int = RECORD.itemsize) -> None:
        entry = self.in_ring[which]
        record = np.zeros(1, RECORD)
        record["conn_id"] = entry[0]
        record["comm"] = str(entry[0])
        self.write(entry[1] + 8, record.tobytes()[:length])
        self.write(entry[1], (length | (DISCARD if discard else 0)).to_bytes(4, "little"))
        entry[2] = 2 if discard else 1

    def expected(self) -> tuple[list[int], int]:
        """What a drain must return now, and how far it must bring the consumer; forgets those."""
        finished = 0
        while finished < len(self.in_ring) and self.in_ring[finished][2]:
            finished += 1
        gone, self.in_ring = self.in_ring[:finished], self.in_ring[finished:]
        return [number for number, _, state in gone if state == 1], finished * STEP


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1 << 40).map(lambda position: position * 8),
    st.lists(st.tuples(st.sampled_from(["reserve"] * 4 + ["submit"] * 3 + ["discard", "drain"]), st.integers(0, 99))),
)
def test_every_finished_record_once_and_in_order(start: int, actions: list[tuple[str, int]]) -> None:
    kernel = Producer(start)
    ring = kernel.ring()
    for action, choice in [*actions, ("drain", 0)]:
        busy = [i for i, entry in enumerate(kernel.in_ring) if not entry[2]]
        if action == "reserve":
            kernel.reserve()
        elif action == "drain":
            before = int(kernel.consumer[0])
            numbers, consumed = kernel.expected()
            got = ring.drain()
            assert got["conn_id"].tolist() == numbers
            assert got["comm"].tolist() == [str(number).encode() for number in numbers]
            assert int(kernel.consumer[0]) == before + consumed
        elif busy:
            kernel.finish(busy[choice % len(busy)], discard=action == "discard")


@pytest.mark.parametrize("offset", range(0, SIZE, 8))
def test_a_record_lies_across_the_end_at_any_position(offset: int) -> None:
    kernel = Producer(7 * SIZE + offset)
    kernel.reserve()
    kernel.reserve()
    kernel.finish(0)
    kernel.finish(1)
    assert kernel.ring().drain()["comm"].tolist() == [b"0", b"1"]


def test_an_empty_ring() -> None:
    kernel = Producer()
    drained = kernel.ring().drain()
    assert (drained.shape, drained.dtype, int(kernel.consumer[0]), kernel.ring().fill()) == ((0,), RECORD, 0, 0.0)


def test_a_full_ring_is_read_whole_and_has_room_again() -> None:
    kernel = Producer(8)
    while kernel.reserve():
        kernel.finish(-1)
    assert len(kernel.in_ring) == (SIZE - 1) // STEP
    ring = kernel.ring()
    assert ring.fill() == (SIZE - 1) // STEP * STEP / SIZE
    assert len(ring.drain()) == (SIZE - 1) // STEP
    assert ring.fill() == 0
    assert kernel.reserve()


def test_what_was_drained_does_not_change_when_the_ring_is_used_again() -> None:
    kernel = Producer()
    kernel.reserve()
    kernel.finish(0)
    drained = kernel.ring().drain()
    kernel.data[:] = 0xFF
    assert drained["conn_id"].tolist() == [0]
    assert drained["comm"].tolist() == [b"0"]


@pytest.mark.parametrize("length", [8, 64, 192, 208, 408, 4000])
@pytest.mark.parametrize("good_ones_before", [0, 1])
def test_records_of_another_size_are_refused(length: int, good_ones_before: int) -> None:
    kernel = Producer(size=2 * SIZE)
    for i in range(good_ones_before):
        kernel.reserve()
        kernel.finish(i)
    kernel.reserve(length)
    kernel.finish(-1, length=length)
    with pytest.raises(TracerError, match="of another size: the BPF programs and this process are of different vers"):
        kernel.ring().drain()
    assert int(kernel.consumer[0]) == 0


def mapped(records: int, length: int = RECORD.itemsize) -> int:
    """A file that looks like a ring buffer map with records in it."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * mmap.PAGESIZE + 2 * SIZE)
    os.pwrite(fd, (records * STEP).to_bytes(8, "little"), mmap.PAGESIZE)
    for i in range(records):
        record = np.zeros(1, RECORD)
        record["conn_id"] = i
        os.pwrite(fd, length.to_bytes(8, "little") + record.tobytes(), 2 * mmap.PAGESIZE + i * STEP)
    return fd


def test_the_mapping_is_consumed_in_place() -> None:
    fd = mapped(3)
    try:
        ring = Ring(fd, SIZE, RECORD)
        assert ring.drain()["conn_id"].tolist() == [0, 1, 2]
        assert int.from_bytes(os.pread(fd, 8, 0), "little") == 3 * STEP
        assert len(ring.drain()) == 0
        ring.close()
    finally:
        os.close(fd)


def mappings_of(fd: int) -> int:
    inode = f" {os.fstat(fd).st_ino} "
    with open("/proc/self/maps", encoding="ascii") as text:
        return sum(inode in line for line in text if "memfd:ring" in line)


@pytest.mark.parametrize("length", [RECORD.itemsize, 64])
def test_it_closes_while_an_error_is_on_its_way(length: int) -> None:
    """The traceback holds the frames, and with them what they saw of the mapping, while the stack unwinds."""
    fd = mapped(2, length)
    try:
        ring = Ring(fd, SIZE, RECORD)
        assert mappings_of(fd) == 2
        try:
            ring.drain()
            raise TracerError("any")
        except TracerError:
            ring.close()
        assert mappings_of(fd) == 0
    finally:
        os.close(fd)


@pytest.mark.needs("bpf")
def test_the_kernels_own_ring_when_nothing_was_written() -> None:
    size = max(SIZE, mmap.PAGESIZE)
    fd = libbpf.map_create(libbpf.MAP_TYPE_RINGBUF, "vt_test", 0, 0, size)
    try:
        # Two consumers of one ring see the same positions; each unmaps only what it mapped.
        first, second = Ring(fd, size, RECORD), Ring(fd, size, RECORD)
        assert len(first.drain()) == 0
        first.close()
        assert len(second.drain()) == 0
        assert second.fill() == 0
        second.close()
        with pytest.raises(OSError, match=r"."):  # twice as much is not there
            Ring(fd, 2 * size, RECORD)
    finally:
        os.close(fd)
