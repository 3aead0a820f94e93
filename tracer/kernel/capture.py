"""The running capture: maps, attached programs, and what user space does for them now and then.

Knows the order in which things must happen so that nothing falls between (attach, then read what was there before)
and what has to be done regularly; leaves to `tracer.agent` when, and what becomes of the records.
"""

import contextlib
import errno
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError
from tracer.kernel import conntrack, handover, libbpf, netns
from tracer.kernel.loader import Job
from tracer.kernel.maps import (
    CONNECTION,
    CONTROL_MODE,
    CONTROL_PAUSE,
    MODE_ADOPT,
    MODE_FLUSH,
    MODE_INTERIM,
    TRANSLATION,
    ZONES,
    Maps,
    Sizes,
)
from tracer.kernel.ring import Ring
from tracer.record import RECORD, TUPLE, NatSource

#: A key of the connections map: a socket's address.
_SOCKET = np.dtype("<u8")


@dataclass(frozen=True)
class Options:
    """What is captured. Namespaces are given by path."""

    node_netns: str = netns.OWN
    interval_s: float = 60
    only_netns: tuple[str, ...] = ()
    ignore_netns: tuple[str, ...] = ()
    loopback: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    run_id: int = field(default_factory=lambda: random.getrandbits(16))


def _boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Capture:
    """Attached programs and their maps; a context manager. One thread uses it; `totals` may be called from another."""

    def __init__(self, options: Options) -> None:
        """Loads, attaches, and takes in what was there before.

        Raises:
            TracerError: what is missing, and what to do.
        """
        self.options = options
        self.enobufs = 0
        self._dumped_alive, self._kept, self._enobufs_then = False, 0, 0
        self._dump_malformed = self._dump_lost = self._lost_end = 0
        self._filter = self._netns_filter()
        with contextlib.ExitStack() as undo:
            self.maps = Maps.create(options.sizes)
            undo.callback(self.maps.close)
            for inode in self._filter[1]:
                if libbpf.map_update(self.maps.netns_list, inode.to_bytes(4, "little"), b"\1"):
                    raise TracerError(f"At most {options.sizes.namespaces} namespaces can be chosen or left out.")
            self._descriptors = handover.load(self._job())
            undo.callback(self._detach)
            self._netlink = socket.socket(fileno=os.dup(self._descriptors["conntrack_socket"]))
            undo.callback(self._netlink.close)
            self._ring = Ring(self.maps.records, options.sizes.ring_bytes, RECORD)
            undo.callback(self._ring.close)
            self._take_in()
            self._undo = undo.pop_all()

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Detaches everything; the kernel frees programs and maps with their last descriptor."""
        self._undo.close()

    # -- start ------------------------------------------------------------------------------------------------------

    def _netns_filter(self) -> tuple[int, list[int]]:
        only, ignore = self.options.only_netns, self.options.ignore_netns
        if only and ignore:
            raise TracerError("Namespaces can be chosen (--only-netns) or left out (--ignore-netns), not both at once.")
        return (1 if only else 2 if ignore else 0), [netns.inode(path) for path in only or ignore]

    def _job(self) -> Job:
        return Job(
            maps=self.maps.descriptors(),
            constants={
                "NODE_NETNS": netns.inode(self.options.node_netns),
                "RUN_ID": self.options.run_id,
                "INTERVAL_NS": int(self.options.interval_s * 1e9),
                "INCLUDE_LOOPBACK": int(self.options.loopback),
                "NETNS_FILTER": self._filter[0],
                "RING_BYTES": self.options.sizes.ring_bytes,
            },
            node_netns=self.options.node_netns.replace("thread-self", str(os.getpid())),
        )

    def _take_in(self) -> None:
        """Translations first, so that sockets find theirs; then once more, for what ended meanwhile."""
        self.reconcile()
        self._walk(MODE_ADOPT)
        self.reconcile()

    def _detach(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    # -- while it runs ----------------------------------------------------------------------------------------------

    def drain(self) -> npt.NDArray[Any]:
        """Finished records, in the order of the ring: an array of RECORD."""
        return self._ring.drain()

    def fill(self) -> float:
        """How full the ring is, 0 to 1."""
        return self._ring.fill()

    @property
    def programs(self) -> tuple[str, ...]:
        """What is attached, in the words of bpf/tracer.c."""
        return (
            "tp_btf/inet_sock_set_state",
            "tp_btf/tcp_destroy_sock",
            "socket_filter/ctnetlink",
            "iter/tcp",
        )

    def program_descriptors(self) -> dict[str, int]:
        """Programs that run with the traffic, by name."""
        return {name[: -len("_program")]: fd for name, fd in self._descriptors.items() if name.endswith("_program")}

    def counters(self) -> dict[str, int]:
        """Totals since the start, by counter name."""
        self._read_socket_error()
        totals = self.maps.counters_now()
        totals["enobufs"] = self.enobufs
        totals["lost_translation_map"] += self._dump_lost
        totals["lost_end"] += self._lost_end
        totals["missed_runs"] = sum(map(libbpf.recursion_misses, self.program_descriptors().values()))
        totals["malformed_events"] += self._dump_malformed
        return totals

    def totals(self) -> dict[str, int]:
        """`counters`, and the levels `open_connections` and `translations` (reads both maps: for coverage)."""
        open_now = libbpf.map_count(self.maps.connections, _SOCKET, CONNECTION)
        known = libbpf.map_count(self.maps.translations, TUPLE, TRANSLATION)
        return self.counters() | {"open_connections": open_now, "translations": known}

    def interim(self, hand_over: Callable[[], object]) -> None:
        """Rows for every connection whose interval is over.

        Args:
            hand_over: drains the ring; called in between, so that all of them fit.
        """
        self._emit_all(MODE_INTERIM, hand_over)

    def stop(self, hand_over: Callable[[], object]) -> None:
        """The end: no new connection is taken, and every open one gets a row. `hand_over` is as for `interim`."""
        self.maps.set_control(CONTROL_PAUSE, _boot_ns())
        self._emit_all(MODE_FLUSH, hand_over)
        self.sweep()
        # Detached before the last drain, so that nothing goes into a ring that nobody empties.
        for name in ("socket_state", "socket_destroyed"):
            os.close(self._descriptors.pop(name))
        hand_over()

    def _emit_all(self, mode: int, hand_over: Callable[[], object]) -> None:
        """Walks again while rows found no room: each walk that hands over half a ring makes progress."""
        deferred = -1
        while deferred != (deferred := self.maps.counters_now()["deferred"]):
            self._walk(mode)
            hand_over()

    def _walk(self, mode: int) -> set[int]:
        """Runs the socket iterator over every network namespace that is visible here; which ones it was."""
        self.maps.set_control(CONTROL_MODE, mode)
        walked = set()
        for inode, path in netns.visible().items():
            if not self._wanted(inode):
                continue
            with contextlib.suppress(TracerError):  # gone meanwhile, and its sockets with it
                with netns.entered(path):
                    walk = libbpf.iter_create(self._descriptors["socket_iterator"])
                _read_to_end(walk)
                walked.add(inode)
        return walked

    def sweep(self) -> None:
        """Removes, and counts as lost, connections whose socket is gone although nobody saw its end.

        Those are entries from before a walk that the walk did not meet, in a namespace that it went through.
        """
        began = _boot_ns()
        walked = self._walk(MODE_INTERIM)
        for sockets, connections in libbpf.map_batches(self.maps.connections, _SOCKET, CONNECTION):
            row = connections["row"]
            born = np.maximum(row["ts"], connections["visited"])
            gone = (born < began) & np.isin(row["netns"], list(walked))
            for key, conn_id in zip(_elements(sockets[gone], _SOCKET), row["conn_id"][gone], strict=True):
                self._forget(key, conn_id)

    def _forget(self, key: bytes, conn_id: int) -> None:
        raw = libbpf.map_lookup(self.maps.connections, key, CONNECTION.itemsize)
        if raw and np.frombuffer(raw, CONNECTION)["row"]["conn_id"][0] == conn_id:
            self._lost_end += libbpf.map_delete(self.maps.connections, key)

    def _wanted(self, inode: int) -> bool:
        mode, listed = self._filter
        return mode == 0 or (inode in listed) == (mode == 1)

    def _read_socket_error(self) -> None:
        """Counts that the kernel could not allocate an event (ENOBUFS); the next reconciliation makes up for it."""
        if self._netlink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.enobufs += 1

    # -- translations ------------------------------------------------------------------------------------------------

    def reconcile(self, hand_over: Callable[[], object] = lambda: None) -> None:
        """Makes the translations map agree with conntrack's table.

        Inserts what is missing, and removes entries that conntrack no longer has: those born before anybody listened
        end without a DESTROY (nf_conntrack_events=2), and a DESTROY may be lost. What was born or inserted after the
        dump began is left alone.

        Args:
            hand_over: drains the ring; called in between, as a large table takes a while.

        Raises:
            TracerError: conntrack does not answer.
        """
        earlier = _identity(*self._known())
        began = _boot_ns()
        with netns.entered(self.options.node_netns):
            entries, malformed = conntrack.dump(began, hand_over)
        self._dump_malformed += malformed
        self._remember_zones(entries["value"]["zone"])
        keys, values = self._translations()
        hand_over()
        known = _identity(keys, values["ct_id"])
        listed = _identity(entries["key"], entries["value"]["ct_id"])
        # Also not what was known before the dump and is not now: it ended meanwhile.
        missing = entries[~np.isin(listed, known) & ~np.isin(listed, earlier)]
        for key, value in zip(_elements(missing["key"], TUPLE), _elements(missing["value"], TRANSLATION), strict=True):
            refused = libbpf.map_update(self.maps.translations, key, value, libbpf.BPF_NOEXIST)
            self._dump_lost += refused == errno.E2BIG
        hand_over()
        # A table that was not wholly understood is no reason to forget anything.
        gone = ~np.isin(known, listed) & (values["created"] <= began) & (not malformed)
        for key, ct_id in zip(_elements(keys[gone], TUPLE), values["ct_id"][gone], strict=True):
            raw = libbpf.map_lookup(self.maps.translations, key, TRANSLATION.itemsize)
            if raw and np.frombuffer(raw, TRANSLATION)["ct_id"][0] == ct_id:
                libbpf.map_delete(self.maps.translations, key)
        self._dumped_alive = bool(np.any(self._translations()[1]["source"] == NatSource.DUMP))
        self._kept, self._enobufs_then = self.maps.counters_now()["kept"], self.enobufs

    @property
    def needs_reconciliation(self) -> bool:
        """Whether the map may hold entries whose end nobody will tell: from before the start, kept, or lost events."""
        self._read_socket_error()
        kept = self.maps.counters_now()["kept"]
        return self._dumped_alive or kept != self._kept or self.enobufs != self._enobufs_then

    def _known(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        keys, values = self._translations()
        return keys, values["ct_id"]

    def _remember_zones(self, zones: npt.NDArray[np.uint16]) -> None:
        """Tells the programs of zones that only a dump has shown so far; as in bpf/conntrack.h, up to eight."""
        slots = [int.from_bytes(libbpf.map_lookup(self.maps.zones, slot.to_bytes(4, "little"), 4) or b"", "little")
                 for slot in range(ZONES)]  # fmt: skip
        for zone in map(int, np.unique(zones)):
            if zone and zone not in slots and 0 in slots:
                slot = slots.index(0)
                slots[slot] = zone
                libbpf.map_update(self.maps.zones, slot.to_bytes(4, "little"), zone.to_bytes(4, "little"))

    def _translations(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return libbpf.map_items(self.maps.translations, TUPLE, TRANSLATION)


def _elements(array: npt.NDArray[Any], kind: np.dtype[Any]) -> list[bytes]:
    """The bytes of each element, in the layout of `kind`: NumPy's copies may have turned big-endian fields."""
    data, size = np.ascontiguousarray(array, dtype=kind).tobytes(), kind.itemsize
    return [data[start : start + size] for start in range(0, len(data), size)]


def _identity(keys: npt.NDArray[Any], ct_ids: npt.NDArray[Any]) -> npt.NDArray[np.bytes_]:
    """Tuple and conntrack id as comparable bytes (the last byte is never zero, which NumPy would strip)."""
    whole = np.empty(len(keys), np.dtype([("key", TUPLE), ("ct_id", "<u4"), ("end", "u1")]))
    whole["key"], whole["ct_id"], whole["end"] = keys, ct_ids, 1
    return whole.view(f"S{whole.dtype.itemsize}")


def _read_to_end(walk: int) -> None:
    try:
        while True:
            try:
                if not os.read(walk, 4096):
                    return
            except BlockingIOError:  # a million sockets in one call: the kernel pauses
                continue
    finally:
        os.close(walk)
