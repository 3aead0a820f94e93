"""The BPF maps: their sizes by arithmetic, their making, their layouts as NumPy sees them.

Knows `bpf/maps.h` (what each map is for is said there). User space makes the maps, so the descriptors
live here and the child that compiles only borrows them.
"""

import mmap
import os
from dataclasses import dataclass, fields

import numpy as np

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
        ("padding", "<u4"),
        ("peer", "V16"),
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
        ("reserved", "u1", (3,)),
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
        ):
            if getattr(self, what) < 1:
                raise UsageError(f"There must be room for at least one of the {what}, not {getattr(self, what)}.")

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
            + cpus * TALLY.itemsize
        )


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
        }
        made: dict[str, int] = {}
        try:
            for name, (kind, key, value, entries) in wanted.items():
                made[name] = libbpf.map_create(kind, f"vt_{name}"[:15], key, value, entries)
        except OSError as error:
            for fd in made.values():
                os.close(fd)
            raise TracerError(
                f"{error.strerror}: run as root on Linux 5.8 or newer, and see 'vip-tracer doctor'."
            ) from error
        return cls(**made)

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

    def set_control(self, which: int, value: int) -> None:
        """Writes one of the CONTROL_* settings, which the programs read at their next run."""
        libbpf.map_update(self.control, which.to_bytes(4, "little"), value.to_bytes(8, "little"))

    def counters_now(self) -> dict[str, int]:
        """Totals since the start by counter name in lower case, summed over the CPUs."""
        raw = libbpf.map_lookup(self.tallies, bytes(4), TALLY.itemsize * libbpf.possible_cpus())
        totals = np.frombuffer(raw or b"", TALLY)["counters"].sum(axis=0)
        return {counter.name.lower(): int(totals[counter]) for counter in Counter}
