"""The BPF maps: their sizes by arithmetic, their making, their layouts as NumPy sees them.

Knows `bpf/maps.h` (what each map is for is said there). User space makes the maps, so the descriptors
live here and the child that compiles only borrows them.
"""

import mmap
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError, UsageError
from tracer.kernel import libbpf
from tracer.record import TUPLE, Counter

#: `struct row`: the fields of a record that are known before its end.
ROW = np.dtype(
    [
        ("tuple", TUPLE),
        ("backend", "V16"),
        ("snat", "V16"),
        ("conn_id", "<u8"),
        ("ts", "<u8"),
        ("started", "<u8"),
        ("cgroup_id", "<u8"),
        ("comm", "S16"),
        ("connect_latency_us", "<u4"),
        ("pid", "<u4"),
        ("netns", "<u4"),
        ("ct_id", "<u4"),
        ("backend_port", ">u2"),
        ("snat_port", ">u2"),
        ("ct_zone", "<u2"),
        ("flags", "u1"),
        ("role", "u1"),
        ("nat", "u1"),
        ("nat_source", "u1"),
        ("dialled", "u1"),
        ("keeps", "u1"),
        ("peer_port", ">u2"),
        ("visited", "<u2"),
    ]
)

#: `struct connection`: the row so far, and what was reported.
CONNECTION = np.dtype(
    [
        ("row", ROW),
        ("bytes_sent", "<u8"),
        ("bytes_received", "<u8"),
        ("packets_sent", "<u4"),
        ("packets_received", "<u4"),
        ("retransmits", "<u4"),
        ("spot", "<u4"),
        ("peer", "V16"),
    ]
)

#: Spots that a socket may have (bpf/connection.h); a counter for each.
SPOTS = 1 << 14
#: `struct young`: a place for a connection that has not had an interim row; free where `socket` is 0.
YOUNG = np.dtype(
    [
        ("tickets", "<u8"),
        ("socket", "<u8"),
        ("connection", CONNECTION),
        ("reserved", "V40"),
    ]
)

#: `struct translation`.
TRANSLATION = np.dtype(
    [
        ("ct_id", "<u4"),
        ("zone", "<u2"),
        ("nat", "u1"),
        ("source", "u1"),
        ("conn_id", "<u8"),
        ("socket", "<u8"),
        ("created", "<u8"),
        ("ended", "u1"),
        ("reserved", "u1"),
        ("spot", "<u2"),
        ("backend_port", ">u2"),
        ("snat_port", ">u2"),
        ("backend", "V16"),
        ("snat", "V16"),
    ]
)

#: `struct owner`.
OWNER = np.dtype(
    [
        ("cgroup_id", "<u8"),
        ("comm", "S16"),
        ("pid", "<u4"),
        ("netns", "<u4"),
        ("dialled", "V16"),
        ("dialled_port", ">u2"),
        ("rewritten", "u1"),
        ("undialled", "u1"),
        ("released", "u1"),
        ("reserved", "u1", (3,)),
    ]
)

#: `struct dial`, of which user space needs the size only.
DIAL_BYTES = 40
#: A socket's address, or a thread (pid_tgid).
SOCKET_KEY = np.dtype("<u8")
#: The maps that fill with the traffic, which `Sizes` says the room of: keys and values.
FILLING = {
    "connections": (SOCKET_KEY, CONNECTION),
    "translations": (TUPLE, TRANSLATION),
    "owners": (TUPLE, OWNER),
    "listeners": (SOCKET_KEY, np.dtype("u1")),
    "dials": (SOCKET_KEY, np.dtype(f"V{DIAL_BYTES}")),
}
#: `struct tally`, of each CPU.
TALLY = np.dtype([("sequence", "<u8"), ("counters", "<u8", (len(Counter),))])
#: `struct network`: a prefix length in bits, and an IPv6 or v4-mapped address.
NETWORK = np.dtype([("length", "<u4"), ("address", "V16")])

#: `enum claim`: claims on a translation that are no connection's id.
CLAIM_DATAGRAM, CLAIM_LOST, CLAIM_OVER = 1, 2, 3
#: `enum ended`: conntrack dropped the entry, and its row, which a socket may still withdraw, found no room.
ENDED_UNTOLD = 2
#: `enum dialled`.
DIALLED_PEER, DIALLED_ANOTHER, DIALLED_UNKNOWN = range(3)
#: `enum dials`.
DIALS_ARE_PEERS, DIALS_SEEN, DIALS_UNSEEN = range(3)
MODE_ADOPT, MODE_REPORT = range(2)
CONTROL_MODE, CONTROL_PAUSE, CONTROL_WALK, CONTROL_DUE, CONTROL_DIALS = range(5)
CONTROL_NODE_NETNS, CONTROL_NETNS_FILTER, CONTROL_TRACED = range(5, 8)
#: Bits of CONTROL_TRACED.
TRACED_LOOPBACK, TRACED_SERVERS = 1, 2
#: With the last, CONTROL_CROWDED, which only the programs use.
CONTROLS = 9
#: Slots for conntrack zones other than 0.
ZONES = 8

#: What a preallocated hash element costs besides key and value: struct htab_elem (kernel/bpf/hashtab.c), 48 bytes;
#: and its share of the bucket array: 16 bytes a bucket, the number of elements rounded up to a power of two.
_ELEMENT, _BUCKET = 48, 16
#: Whether stores of one processor are seen by others in their order, which the young connections' places need.
_KEEPS_ORDER = platform.machine() == "x86_64"


@dataclass(frozen=True)
class Sizes:
    """How much fits. A connection costs 272 bytes of kernel memory, a translation 176, an owner 160, a record 208."""

    connections: int = 65_536
    translations: int = 131_072
    ring_bytes: int = 2 << 20
    owners: int = 16_384
    listeners: int = 4_096
    dials: int = 4_096
    roomless: int = 8_192
    namespaces: int = 1_024
    networks: int = 1_024
    #: Places for connections that have not had an interim row, beside those above, where these are many more.
    young: int = 256

    def __post_init__(self) -> None:
        page = mmap.PAGESIZE
        if self.ring_bytes < page or self.ring_bytes & (self.ring_bytes - 1):
            raise UsageError(
                f"The ring's size must be a power of two of at least {page} bytes, not {self.ring_bytes}: "
                "choose another --ring-bytes."
            )
        for what in (
            "connections",
            "translations",
            "owners",
            "listeners",
            "dials",
            "roomless",
            "namespaces",
            "networks",
            "young",
        ):
            if getattr(self, what) < 1:
                raise UsageError(f"There must be room for at least one of the {what}, not {getattr(self, what)}.")
        if self.young > SPOTS:
            raise UsageError(f"There are at most {SPOTS} places for young connections, not {self.young}.")

    @property
    def places(self) -> int:
        """How many the map of young connections has; 1 is none."""
        return self.young if _KEEPS_ORDER and self.connections >= 16 * self.young else 1

    def kernel_bytes(self) -> int:
        """Kernel memory of all maps, in bytes: they are preallocated, so this is also what they cost when empty."""

        def hash_map(entries: int, key: int, value: int) -> int:
            buckets = 1 << (entries - 1).bit_length()
            return entries * (_ELEMENT + (key + 7) // 8 * 8 + (value + 7) // 8 * 8) + buckets * _BUCKET

        cpus = libbpf.possible_cpus()
        return (
            hash_map(self.connections, 8, CONNECTION.itemsize)
            + hash_map(self.translations, TUPLE.itemsize, TRANSLATION.itemsize)
            + hash_map(self.owners, TUPLE.itemsize, OWNER.itemsize)
            + hash_map(self.listeners, 8, 1)
            + hash_map(self.dials, 8, DIAL_BYTES)
            + hash_map(self.roomless, 8, 1)
            + hash_map(self.namespaces, 4, 1)
            + self.ring_bytes
            + self.places * YOUNG.itemsize
            + SPOTS * 4
            + cpus * TALLY.itemsize
        )


def young(descriptor: int, access: int = mmap.ACCESS_READ) -> npt.NDArray[Any]:
    """The places of young connections, of YOUNG: the map itself, not a copy. Words are written whole."""
    size = libbpf.map_info(descriptor).max_entries * YOUNG.itemsize
    return np.frombuffer(mmap.mmap(descriptor, size, access=access), YOUNG)


def connections(young_map: int, hash_map: int) -> Iterator[libbpf.Pair]:
    """(sockets, of CONNECTION), a batch at a time: the young first, as they only ever move from there to the others.

    What began or ended while the places were read may be left out.
    """
    live = young(young_map)
    places = live.copy()
    # A place may have changed hands while it was copied. An id is given once.
    whole = (places["socket"] != 0) & (live["socket"] == places["socket"])
    whole &= live["connection"]["row"]["conn_id"] == places["connection"]["row"]["conn_id"]
    places = places[whole]
    yield places["socket"], places["connection"]
    for sockets, values in libbpf.map_batches(hash_map, SOCKET_KEY, CONNECTION):
        new = ~np.isin(sockets, places["socket"])
        yield sockets[new], values[new]


@dataclass
class Maps:
    """Descriptors of all maps. `close` lets go of them; the kernel frees a map with its last user."""

    connections: int
    translations: int
    records: int
    tallies: int
    control: int
    listeners: int
    netns_list: int
    zones: int
    owners: int
    dials: int
    roomless: int
    excluded: int
    untracked: int
    young: int
    spilled: int

    @classmethod
    def create(cls, sizes: Sizes) -> "Maps":
        """Makes all maps.

        Raises:
            TracerError: the kernel refuses (no privilege, no ring buffer before 5.8, no memory).
        """
        hash_map, array, percpu = libbpf.MAP_TYPE_HASH, libbpf.MAP_TYPE_ARRAY, libbpf.MAP_TYPE_PERCPU_ARRAY
        wanted = {
            "connections": (hash_map, 8, CONNECTION.itemsize, sizes.connections),
            "translations": (hash_map, TUPLE.itemsize, TRANSLATION.itemsize, sizes.translations),
            "records": (libbpf.MAP_TYPE_RINGBUF, 0, 0, sizes.ring_bytes),
            "tallies": (percpu, 4, TALLY.itemsize, 1),
            "control": (array, 4, 8, CONTROLS),
            "listeners": (hash_map, 8, 1, sizes.listeners),
            "netns_list": (hash_map, 4, 1, sizes.namespaces),
            "zones": (array, 4, 4, ZONES),
            "owners": (hash_map, TUPLE.itemsize, OWNER.itemsize, sizes.owners),
            "dials": (hash_map, 8, DIAL_BYTES, sizes.dials),
            "roomless": (hash_map, 8, 1, sizes.roomless),
            "excluded": (libbpf.MAP_TYPE_LPM_TRIE, NETWORK.itemsize, 1, sizes.networks),
            "untracked": (libbpf.MAP_TYPE_LPM_TRIE, NETWORK.itemsize, 4, sizes.networks),
            "young": (array, 4, YOUNG.itemsize, sizes.places),
            "spilled": (array, 4, SPOTS * 4, 1),
        }
        made: dict[str, int] = {}
        try:
            for name, (kind, key, value, entries) in wanted.items():
                flags = libbpf.BPF_F_MMAPABLE if name == "young" else 0
                made[name] = libbpf.map_create(kind, f"vt_{name}"[:15], key, value, entries, flags)
        except OSError as error:
            for fd in made.values():
                os.close(fd)
            raise TracerError(
                f"{error.strerror}: run as root on Linux 5.8 or newer, and see 'vip-tracer doctor'."
            ) from error
        maps = cls(**made)
        try:
            if len(maps.places) == 1:  # taken for ever
                maps.places["tickets"] = 1
        except OSError as error:
            maps.close()
            raise TracerError(f"The BPF map 'vt_young' cannot be mapped into memory: {error.strerror}.") from error
        return maps

    @cached_property
    def places(self) -> npt.NDArray[Any]:
        """The places of young connections, of YOUNG: the map itself, not a copy."""
        return young(self.young, mmap.ACCESS_WRITE)

    def open_connections(self) -> Iterator[libbpf.Pair]:
        """(sockets, of CONNECTION), a batch at a time, each connection once: see `connections`."""
        return connections(self.young, self.connections)

    def find_connection(self, sk: int) -> npt.NDArray[Any]:
        """The connection of a socket, by its address: one of CONNECTION, or none."""
        places = self.places
        if sk:  # 0 marks a place that is free
            found: npt.NDArray[Any] = places["connection"][places["socket"] == np.uint64(sk)]  # a copy
            if len(found):
                return found
        raw = libbpf.map_lookup(self.connections, sk.to_bytes(8, "little"), CONNECTION.itemsize)
        return np.frombuffer(raw or b"", CONNECTION)

    def remove_connection(self, sk: int, conn_id: int) -> bool:
        """Frees the place of a connection whose socket is gone. Whether it was there.

        Should it end just now after all, one is counted as lost too many, or one that takes its place is lost.
        """
        places = self.places
        ids = places["connection"]["row"]["conn_id"]
        for place in np.flatnonzero(places["socket"] == np.uint64(sk)):
            if ids[place] != conn_id:
                return False
            places["socket"][place] = 0
            places["tickets"][place] = 0  # nobody else has one for longer than a moment
            return True
        if self.find_connection(sk)["row"]["conn_id"].tolist() != [conn_id]:
            return False
        # `spilled` stays as it is, and is one too many: what it allows is to look in vain.
        return libbpf.map_delete(self.connections, sk.to_bytes(8, "little"))

    def descriptors(self) -> dict[str, int]:
        """Map name → descriptor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def count(self, name: str) -> int:
        """How many elements one of the maps of `FILLING` holds now; reads all of it."""
        key, value = FILLING[name]
        return libbpf.map_count(getattr(self, name), key, value)

    def close(self) -> None:
        """Closes every descriptor."""
        for fd in self.descriptors().values():
            os.close(fd)
        self.__dict__.pop("places", None)  # the kernel frees a mapped map when it is unmapped

    def set_control(self, which: int, value: int) -> None:
        """Writes one of the CONTROL_* settings, which the programs read at their next run."""
        libbpf.map_update(self.control, which.to_bytes(4, "little"), value.to_bytes(8, "little"))

    def counters_now(self) -> dict[str, int]:
        """Totals since the start by counter name in lower case, summed over the CPUs."""
        raw = libbpf.map_lookup(self.tallies, bytes(4), TALLY.itemsize * libbpf.possible_cpus())
        totals = np.frombuffer(raw or b"", TALLY)["counters"].sum(axis=0)
        return {counter.name.lower(): int(totals[counter]) for counter in Counter}
