"""The running capture: maps, attached programs, and what user space does for them now and then.

Knows the order in which things must happen so that nothing falls between (attach, then read what was there before)
and what has to be done regularly; leaves to `tracer.agent` when, and what becomes of the records.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.errors import TracerError
from tracer.kernel import bridges, conntrack, handover, libbpf, mounts, netns, perf, witness
from tracer.kernel.flows import Flows, are_flows
from tracer.kernel.identity import Numbers, are_in, find, identity, without_zone
from tracer.kernel.ledger import NOTHING, Agreement
from tracer.kernel.loader import Job
from tracer.kernel.maps import (
    CLAIM_DATAGRAM,
    CLAIM_OVER,
    CONTROL_DIALS,
    CONTROL_DUE,
    CONTROL_MODE,
    CONTROL_NETNS_FILTER,
    CONTROL_NODE_NETNS,
    CONTROL_PAUSE,
    CONTROL_TRACED,
    CONTROL_WALK,
    DIALS_ARE_PEERS,
    DIALS_SEEN,
    DIALS_UNSEEN,
    ENDED_UNTOLD,
    MODE_ADOPT,
    MODE_REPORT,
    NETWORK,
    OWNER,
    TRACED_LOOPBACK,
    TRACED_SERVERS,
    TRANSLATION,
    ZONES,
    Maps,
    Sizes,
)
from tracer.kernel.ring import Ring
from tracer.kernel.timeouts import TCP_CLOSE, TCP_TIME_WAIT, Timeouts
from tracer.record import RECORD, ROLE_NAMES, TUPLE, Flag, Nat, NatSource

_log = logging.getLogger(__name__)

CONNECT_PROBE = ("tracepoint/sys_enter_connect", "tracepoint/sys_exit_connect")
#: Whatever may be attached, in the words of bpf/tracer.c; `Capture.programs` says what is.
PROGRAMS = (
    "tp_btf/inet_sock_set_state",
    "tp_btf/tcp_destroy_sock",
    "socket_filter/ctnetlink",
    "iter/tcp",
    "iter/udp",
    "cgroup/sock_release",
    *CONNECT_PROBE,
)
#: How full the ring may be before the walk of the next namespace, whose rows find room up to its half.
_CROWDED = 0.1
#: A walk that one connection's row is due for gives a row to those of its namespace, too, that would be in this part of
#: the interval: so a namespace is walked at the most four times an interval.
_EARLY = 0.25
#: How long a check may list sockets before it leaves the other namespaces to the next.
_CHECK_WALKS_S = 0.1
#: A connect that has not been answered for so long hangs.
_HANGS_NS = 1_000_000_000
#: How long a closed socket's datagrams may wait for conntrack: a neighbour is asked for three times, a second each.
_QUEUED_NS = 5_000_000_000
#: How long the end waits for a record that is being written.
_WRITING_NS = 5_000_000_000
#: By then a connection has claimed its translation: a handshake without a packet lost takes less.
_SETTLED_NS = 1_000_000_000


@dataclass(frozen=True)
class Options:
    """What is captured. Namespaces are given by path, networks as in "10.0.0.0/8".

    `connect_probe` is "on", "off", or "auto": on where a program rewrites addresses inside connect(). `cache` is where
    compiled programs are kept for the next start; by default what $VIP_TRACER_CACHE says, or nowhere. `second_look`:
    whether a second program sees what the kernel does not show to the first; None: where the kernel often does not.
    """

    node_netns: str = netns.OWN
    interval_s: float = 60
    only_netns: tuple[str, ...] = ()
    ignore_netns: tuple[str, ...] = ()
    loopback: bool = False
    roles: tuple[str, ...] = ("client", "forwarded")
    connect_probe: str = "auto"
    exclude_cidrs: tuple[str, ...] = ()
    only_virtual: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    cache: str | None = field(default_factory=lambda: os.environ.get("VIP_TRACER_CACHE") or None)
    second_look: bool | None = None
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
        self.drained_at = time.monotonic()
        self._dumped_alive, self._kept, self._enobufs_then = False, 0, 0
        self._unentered: set[int] = set()
        self._dump_malformed = self._dump_directional = self._dump_lost = self._lost_end = 0
        self._filter = self._netns_filter()
        self._outbox: list[npt.NDArray[Any]] = []
        self._probe: list[int] = []
        self._bridges: list[tuple[bridges.Network, int]] = []
        self._unsent: dict[bytes, int] = {}
        self._cgroups: int | None = None
        self.dumped_s = self.checked_s = self.walked_s = 0.0
        self._checked_to = 0
        self._ledger = NOTHING.figures() | {"checks": 0}
        self._walks = 0
        self._paused = 0
        with contextlib.ExitStack() as undo:
            self.maps = Maps.create(options.sizes)
            undo.callback(self.maps.close)
            for inode in self._filter[1]:
                if libbpf.map_update(self.maps.netns_list, inode.to_bytes(4, "little"), b"\1"):
                    raise TracerError(f"At most {options.sizes.namespaces} namespaces can be chosen or left out.")
            self._exclude()
            self._find_cgroups()
            undo.callback(self._close_cgroups)
            # Until it is known what they are.
            self.maps.set_control(CONTROL_DIALS, DIALS_UNSEEN if options.connect_probe != "on" else DIALS_SEEN)
            self._descriptors = handover.load(self._job())
            undo.callback(self._detach)
            undo.callback(self._detach_probe)
            self._say_what_is_traced()
            self.watch_balancers()
            self._flows = Flows(options.run_id, int(options.interval_s * 1e9))
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
            switches={
                "INCLUDE_LOOPBACK": int(self.options.loopback),
                "NETNS_FILTER": self._filter[0],
                "ROLES": sum(1 << number for number, role in ROLE_NAMES.items() if role in self.options.roles),
                "ONLY_VIRTUAL": int(self.options.only_virtual),
                "EXCLUDE_CIDRS": int(bool(self.options.exclude_cidrs)),
            },
            values={
                "NODE_NETNS": netns.inode(self.options.node_netns),
                "RUN_ID": self.options.run_id,
                "RING_BYTES": self.options.sizes.ring_bytes,
                "YOUNG_SLOTS": len(self.maps.places),
            },
            node_netns=self.options.node_netns.replace("thread-self", str(os.getpid())),
            cgroups=self._cgroups,
            cache=self.options.cache,
            second_look=self.options.second_look,
        )

    def _say_what_is_traced(self) -> None:
        """Into the control map, so that the maps alone say what they must hold."""
        self.maps.set_control(CONTROL_NODE_NETNS, netns.inode(self.options.node_netns))
        self.maps.set_control(CONTROL_NETNS_FILTER, self._filter[0])
        servers = "server" in self.options.roles
        self.maps.set_control(CONTROL_TRACED, TRACED_LOOPBACK * self.options.loopback | TRACED_SERVERS * servers)

    def _exclude(self) -> None:
        # A short IPv6 prefix would take in all of IPv4, whose addresses are v4-mapped here: not meant, unless said.
        mapped = ipaddress.ip_network("::ffff:0:0/96")
        libbpf.map_update(self.maps.excluded, _network(mapped), b"\0")
        for network in map(ipaddress.ip_network, self.options.exclude_cidrs):
            if libbpf.map_update(self.maps.excluded, _network(network), b"\1"):
                raise TracerError(f"At most {self.options.sizes.networks - 1} networks can be excluded.")

    def _find_cgroups(self) -> None:
        try:
            self._cgroups = mounts.host_cgroups()
        except TracerError as error:
            _log.warning("%s Without it, UDP rows do not say whose socket it was.", error)

    def _close_cgroups(self) -> None:
        if self._cgroups is not None:
            os.close(self._cgroups)

    def _detach_probe(self) -> None:
        for descriptor in self._probe:
            os.close(descriptor)

    def watch_balancers(self) -> None:
        """Attaches the connect probe if it is wanted: by option, or as soon as a balancer at the socket is found."""
        if self._probe:
            return
        wanted = self.options.connect_probe
        balanced = wanted != "on" and self._cgroups is not None and _balanced(self._cgroups)
        if wanted == "on" or (wanted == "auto" and balanced):
            self.maps.set_control(CONTROL_DIALS, DIALS_SEEN)
            for name in ("connect_enters", "connect_exits"):
                tracepoint = f"syscalls/sys_{name.removeprefix('connect_')[:-1]}_connect"
                self._probe.append(perf.attach_tracepoint(self._descriptors[f"{name}_program"], tracepoint))
            _log.info("the connect probe is on%s", ": a program rewrites addresses in connect()" if balanced else "")
            return
        if balanced:
            _log.warning("a program rewrites addresses in connect(), and the connect probe is off: what was dialled "
                         "is unknown")  # fmt: skip
        self.maps.set_control(CONTROL_DIALS, DIALS_UNSEEN if balanced else DIALS_ARE_PEERS)

    def _take_in(self) -> None:
        """Translations first, so that sockets find theirs; then once more, for what ended meanwhile."""
        self.reconcile(starting=True)
        self._walk(MODE_ADOPT)
        self.reconcile(starting=True)

    def _detach(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    # -- while it runs ----------------------------------------------------------------------------------------------

    def drain(self) -> npt.NDArray[Any]:
        """Finished records: an array of RECORD."""
        self.drained_at = time.monotonic()
        records = self._flows.settle(self._ring.drain())
        if self._flows.holds:
            self._outbox.append(self._flows.release(_boot_ns(), self._unclaimed))
        if self._outbox:
            records = np.concatenate((records, *self._outbox), dtype=RECORD)
            self._outbox.clear()
        return records

    def _unclaimed(self, key: bytes, ct_id: int) -> bool:
        """Whether a kept translation waits in vain for a socket; then it waits no longer."""
        raw = libbpf.map_lookup(self.maps.translations, key, TRANSLATION.itemsize)
        value = np.frombuffer(raw, TRANSLATION)[0] if raw else None
        if value is None or value["ct_id"] != ct_id:
            return True  # conntrack has made another entry of the tuple meanwhile
        return value["conn_id"] == 0 and libbpf.map_delete(self.maps.translations, key)

    def fill(self) -> float:
        """How full the ring is, 0 to 1."""
        return self._ring.fill()

    @property
    def programs(self) -> tuple[str, ...]:
        """What is attached, in the words of bpf/tracer.c."""
        released, probed = "socket_released" in self._descriptors, bool(self._probe)
        there = {"cgroup/sock_release": released} | dict.fromkeys(CONNECT_PROBE, probed)
        return tuple(name for name in PROGRAMS if there.get(name, True))

    def program_descriptors(self) -> dict[str, int]:
        """Programs that run with the traffic, by name."""
        descriptors = list(self._descriptors.items())  # at once: `stop` may take some out meanwhile
        return {name[: -len("_program")]: fd for name, fd in descriptors if name.endswith("_program")}

    def counters(self) -> dict[str, int]:
        """Totals since the start, by counter name."""
        self._read_socket_error()
        totals = self.maps.counters_now()
        totals["enobufs"] = self.enobufs
        totals["lost_translation_map"] += self._dump_lost
        totals["lost_end"] += self._lost_end
        totals["missed_runs"] = sum(map(libbpf.recursion_misses, self.program_descriptors().values()))
        totals["malformed_events"] += self._dump_malformed
        totals["withdrawn"], totals["untold"] = self._flows.withdrawn, self._flows.untold
        totals["flows"] += self._flows.lost
        totals["lost_flow_ring"] += self._flows.lost
        return totals | self._ledger

    def totals(self) -> dict[str, int]:
        """`counters`, and the levels of `tracer.store.coverage.GAUGES` (reads both maps)."""
        young = int(np.count_nonzero(self.maps.places["socket"]))
        levels = {"open_connections": young + self.maps.count("connections")}
        levels["translations"] = self.maps.count("translations")
        levels |= {"directional": self._dump_directional, "unentered_namespaces": len(self._unentered)}
        return self.counters() | levels

    def ring_fills(self) -> tuple[list[int], float]:
        """Drains by how full they found the ring, as `Ring.fills`, and the sum of what they found."""
        return list(self._ring.fills), self._ring.fill_sum

    def interim(self, hand_over: Callable[[], object]) -> None:
        """Rows for every connection whose interval is over.

        Args:
            hand_over: drains the ring; called in between, so that all of them fit.
        """
        now, interval = _boot_ns(), round(self.options.interval_s * 1e9)
        # The machine may not have run for so long.
        self._emit_all(max(now - interval, 0), max(now - round(interval * (1 - _EARLY)), 0), hand_over)
        self.walked_s = (_boot_ns() - now) / 1e9

    def check(self, hand_over: Callable[[], object] = lambda: None) -> Agreement:
        """Compares the maps with the kernel's own tables (tracer/kernel/ledger.py), and adds the outcome to `counters`.

        Of sockets only those of some namespaces, in turn: each takes the kernel a walk through the sockets of all.

        Args:
            hand_over: drains the ring; called in between, as large tables take a while.

        Raises:
            TracerError: the kernel does not show its tables.
        """
        began = _boot_ns()
        turn = witness.Turn(self._checked_to, _CHECK_WALKS_S)
        agreement = witness.check(witness.Scope.of(self.maps.descriptors()), hand_over, turn=turn)
        self._checked_to = turn.last
        figures = agreement.figures() | {"checks": 1}
        self._ledger = {name: self._ledger[name] + count for name, count in figures.items()}
        self.checked_s = (_boot_ns() - began) / 1e9
        if agreement.is_wrong:
            _log.error("what is held differs from conntrack's table, which is a defect: see 'vip-tracer check'")
        return agreement

    def stop(self, hand_over: Callable[[], object]) -> None:
        """The end: no new connection is taken, and every open one gets a row. `hand_over` is as for `interim`."""
        self._paused = _boot_ns()
        self.maps.set_control(CONTROL_PAUSE, self._paused)
        self._emit_all(self._paused, self._paused, hand_over)
        self.sweep()
        self.reconcile(hand_over, stopping=True)
        # Detached before the last drain, so that nothing goes into a ring that nobody empties.
        for name in ("socket_state", "socket_state_again", "socket_destroyed", "conntrack_socket"):
            if name in self._descriptors:
                os.close(self._descriptors.pop(name))
        self._netlink.close()
        hand_over()
        # A drain stops at a record that is still being written: where tracepoints may be preempted, by a task that has
        # to get a CPU first.
        until = _boot_ns() + _WRITING_NS
        while self._flows.holds or (self.fill() > 0 and _boot_ns() < until):
            time.sleep(0.05)
            hand_over()
        if self.fill() > 0:
            _log.error("the ring still holds rows behind one that a program has been writing for 5 s: they are lost")

    def _emit_all(self, asked: int, due: int, hand_over: Callable[[], object]) -> None:
        """A row of every connection whose interval began at `due` or before (CLOCK_BOOTTIME), in each namespace that
        has one whose interval began at `asked` or before.

        Walks again while rows found no room: each walk that hands over half a ring makes progress. What comes due while
        it walks waits for the next time, or the first connections would take the room of the last for ever.
        """
        self.maps.set_control(CONTROL_DUE, due)
        deferred = -1
        while deferred != (deferred := self.maps.counters_now()["deferred"]):
            waiting = self._where_rows_wait(asked)
            if not waiting:
                return
            self._walk(MODE_REPORT, hand_over, waiting)
            hand_over()

    def _where_rows_wait(self, asked: int) -> set[int]:
        """Namespaces of connections whose interval began then or before; and of connects that hang, which no walk has
        met: so that they claim their translation before anybody takes it for another node's."""
        waiting: set[int] = set()
        hanging = max(_boot_ns() - _HANGS_NS, 0)
        for _, connections in self.maps.open_connections():
            row = connections["row"]
            alone = (row["flags"] & Flag.ESTABLISHED == 0) & (row["visited"] == 0) & (row["ts"] <= hanging)
            waiting.update(np.unique(row["netns"][(row["ts"] <= asked) | alone]).tolist())
        return waiting

    def _walk(
        self, mode: int, hand_over: Callable[[], object] = lambda: None, among: set[int] | None = None
    ) -> set[int]:
        """Runs the socket iterator over every network namespace that is visible here, or those `among`; which ones it
        was.

        The kernel has one table for the sockets of all namespaces, those in TIME_WAIT among them, and goes through it
        for each: half a million of them take a namespace 80 ms. So only those are walked that have to be.
        """
        self._walks += 1
        self.maps.set_control(CONTROL_WALK, self._walks & 0xFFFF)
        self.maps.set_control(CONTROL_MODE, mode)
        return self._walk_with("socket_iterator", hand_over, among)

    def _walk_with(
        self, iterator: str, hand_over: Callable[[], object] = lambda: None, among: set[int] | None = None
    ) -> set[int]:
        """`hand_over` makes room after each namespace."""
        walked: set[int] = set()
        # Once more, for those whose process ended meanwhile and that another refers to.
        for _ in range(2):
            visible = netns.visible()
            left = {inode: path for inode, path in visible.items()
                    if inode not in walked and self._wanted(inode) and (among is None or inode in among)}  # fmt: skip
            closed: set[int] = set()
            for inode, path in left.items():
                try:
                    with netns.entered(path, inode):
                        walk = libbpf.iter_create(self._descriptors[iterator])
                except TracerError as error:
                    closed.add(inode)
                    reason = error
                    continue
                _read_to_end(walk)
                walked.add(inode)
                if self.fill() > _CROWDED:
                    hand_over()
            if not closed:
                break
        if closed and not self._unentered:
            _log.warning("%d network namespaces cannot be entered (%s): what is open there has no interim rows; "
                         "coverage/ counts them", len(closed), reason)  # fmt: skip
        self._unentered = (self._unentered & visible.keys()) - walked | closed
        return walked

    def sweep(self, overdue_s: float = 0.0) -> None:
        """Removes, and counts as lost, connections whose socket is gone although nobody saw its end.

        Those are entries that a walk of their namespace does not meet. Only what has had no row for `overdue_s` is
        looked for: an open connection has one now and then. (One met 65,536 walks ago is left for the next time.)
        """
        before = max(_boot_ns() - round(overdue_s * 1e9), 0)
        waiting = self._where_rows_wait(before)
        if not waiting:
            return
        walked = self._walk(MODE_REPORT, among=waiting)
        for sockets, connections in self.maps.open_connections():
            row = connections["row"]
            met = row["visited"] == self._walks & 0xFFFF
            gone = ~met & (row["ts"] < before) & np.isin(row["netns"], list(walked))
            for sk, conn_id in zip(sockets[gone].tolist(), row["conn_id"][gone].tolist(), strict=True):
                self._lost_end += self.maps.remove_connection(sk, conn_id)

    def _wanted(self, inode: int) -> bool:
        mode, listed = self._filter
        return mode == 0 or (inode in listed) == (mode == 1)

    def _read_socket_error(self) -> None:
        """Counts that the kernel could not allocate an event (ENOBUFS); the next reconciliation makes up for it."""
        with contextlib.suppress(OSError):  # the capture has ended, or ends just now in another thread
            if self._netlink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.enobufs += 1

    # -- translations ------------------------------------------------------------------------------------------------

    def reconcile(
        self, hand_over: Callable[[], object] = lambda: None, *, starting: bool = False, stopping: bool = False
    ) -> None:
        """Makes the translations map agree with conntrack's table, and gives flows their interim rows.

        Inserts what is missing, and removes entries that conntrack no longer has: those born before anybody listened
        end without a DESTROY (nf_conntrack_events=2), and a DESTROY may be lost. What was born or inserted after the
        dump began is left alone.

        Args:
            hand_over: drains the ring; called in between, as a large table takes a while.
            starting: what is over already is not to be reported.
            stopping: every flow gets a row.

        Raises:
            TracerError: conntrack does not answer.
        """
        # As it was before the table is asked for: what comes in between is the next one's.
        self._read_socket_error()
        kept, enobufs = self.maps.counters_now()["kept"], self.enobufs
        self._claim_datagrams()
        earlier = self._known()
        began = _boot_ns()
        with netns.entered(self.options.node_netns):
            dumped = conntrack.dump(began, hand_over)
            self._flows.timeouts = Timeouts.here()
            self._remember_bridges(bridges.unfiltered())
        entries = dumped.entries
        # conntrack notes the wall clock, records have the other.
        since_boot = entries["started"] - np.minimum(time.time_ns() - _boot_ns(), entries["started"])
        entries["started"] = np.where(entries["started"] > 0, since_boot, 0)
        self._dump_malformed += dumped.malformed
        self._dump_directional = dumped.directional
        self._remember_zones(entries["value"]["zone"])
        hand_over()  # so that no closing record is older than what is read now
        keys, values = self._translations()
        # A UDP socket that was closed before its entry was born did not claim it.
        owned = identity(libbpf.map_items(self.maps.owners, TUPLE, OWNER)[0])
        late = _unclaimed_datagrams(keys, values) & are_in(identity(without_zone(keys)), owned)
        values["conn_id"][late] = CLAIM_DATAGRAM
        known = identity(keys, values["ct_id"])
        listed = identity(entries["key"], entries["value"]["ct_id"])
        # Also not what was known before the dump and is not now: it ended meanwhile.
        missing = entries[~are_in(listed, known) & ~are_in(listed, earlier) & (not stopping)]
        over = (missing["key"]["protocol"] == 6) & np.isin(missing["state"], (TCP_TIME_WAIT, TCP_CLOSE)) & starting
        missing["value"]["conn_id"][over] = CLAIM_OVER
        for key, value in zip(_elements(missing["key"], TUPLE), _elements(missing["value"], TRANSLATION), strict=True):
            refused = libbpf.map_update(self.maps.translations, key, value, libbpf.BPF_NOEXIST)
            # Of entries that were born since, the kernel side has counted that they found no room.
            self._dump_lost += starting and refused == errno.E2BIG
        self._look(entries, listed, keys, values, known, began, stopping)
        hand_over()
        # A table that was not wholly understood is no reason to forget anything.
        gone = ~are_in(known, listed) & (values["created"] <= began) & (not dumped.malformed)
        self._remove(keys[gone], values[gone])
        self._forget_owners(keys)
        self._dumped_alive = any((values["source"] == NatSource.DUMP).any() for _, values in self._batches())
        self._kept, self._enobufs_then = kept, enobufs
        self.dumped_s = (_boot_ns() - began) / 1e9

    def _look(self, entries: npt.NDArray[Any], listed: npt.NDArray[Any], keys: npt.NDArray[Any],
              values: npt.NDArray[Any], known: npt.NDArray[Any], now: int, stopping: bool) -> None:  # fmt: skip
        flows = are_flows(values)
        if stopping:  # what was born since is not offered, as in bpf/flow.h
            flows &= values["created"] < self._paused
        if not flows.any():
            return
        keys, values, known = keys[flows], values[flows], known[flows]
        place, there = find(listed, known)
        found, values = entries[place[there]], values[there]
        records = self._flows.look(found, values, self._owners(found["key"], values), now, stopping)
        self._outbox.append(self._asked_for(records))

    def _remove(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        # Of a socket whose role was not asked for no row tells that it has claimed the entry.
        claimed = (values["ended"] > 0) & (values["conn_id"] > CLAIM_OVER)
        self._flows.withdraw(keys[claimed], values["ct_id"][claimed])
        removed = np.zeros(len(keys), np.bool_)
        for place, key in enumerate(_elements(keys, TUPLE)):
            if values["ended"][place] and self._is_open(int(values["socket"][place]), int(values["conn_id"][place])):
                continue  # kept for that connection
            raw = libbpf.map_lookup(self.maps.translations, key, TRANSLATION.itemsize)
            if raw and np.frombuffer(raw, TRANSLATION)["ct_id"][0] == values["ct_id"][place]:
                removed[place] = libbpf.map_delete(self.maps.translations, key)
        untold = (values["ended"] == ENDED_UNTOLD) & (values["conn_id"] == 0)
        self._flows.lost += int(np.count_nonzero(removed & untold))
        removed &= are_flows(values)
        if removed.any():
            keys, values = keys[removed], values[removed]
            owners = self._owners(keys, values)
            self._outbox.append(self._asked_for(self._flows.vanish(keys, values, owners, _boot_ns())))
            for key in _elements(without_zone(keys[owners["released"] > 0]), TUPLE):
                libbpf.map_delete(self.maps.owners, key)

    def _is_open(self, sk: int, conn_id: int) -> bool:
        return bool(self.maps.find_connection(sk)["row"]["conn_id"].tolist() == [conn_id])

    def _asked_for(self, records: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the options leave of rows that are made here; as bpf/flow.h has it for the others."""
        wanted = np.isin(records["role"], [n for n, role in ROLE_NAMES.items() if role in self.options.roles])
        if self.options.only_virtual:
            wanted &= (records["nat"] == Nat.UNKNOWN) | (records["nat"] & Nat.DNAT != 0)
        if self.options.exclude_cidrs:
            trie = self.maps.excluded
            hosts = [_host(bytes(address)) for address in records["tuple"]["dst"]]
            wanted &= np.array([libbpf.map_lookup(trie, host, 1) != b"\1" for host in hosts], np.bool_)
        return records[wanted]

    def _owners(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Whose UDP sockets they are: an array of OWNER, zero where they are nobody's."""
        owners = np.zeros(len(keys), OWNER)
        mine = np.flatnonzero(values["conn_id"] == CLAIM_DATAGRAM)
        for place, key in zip(mine, _elements(without_zone(keys[mine]), TUPLE), strict=True):
            raw = libbpf.map_lookup(self.maps.owners, key, OWNER.itemsize)
            if raw:
                owners[place] = np.frombuffer(raw, OWNER)[0]
        return owners

    def _forget_owners(self, translations: npt.NDArray[Any]) -> None:
        """Closed UDP sockets whose last datagram never came to conntrack, seen so for a while."""
        keys, owners = libbpf.map_items(self.maps.owners, TUPLE, OWNER)
        waits = (owners["released"] > 0) & ~are_in(identity(keys), identity(without_zone(translations)))
        now = _boot_ns()
        self._unsent = {key: self._unsent.get(key, now) for key in _elements(keys[waits], TUPLE)}
        for key in [key for key, since in self._unsent.items() if now - since >= _QUEUED_NS]:
            libbpf.map_delete(self.maps.owners, key)
            del self._unsent[key]

    def _claim_datagrams(self) -> None:
        """Lets open UDP sockets claim their translations; without UDP there is nothing to walk for."""
        keys, values = self._translations()
        if _unclaimed_datagrams(keys, values).any():
            self._walk_with("datagram_iterator")

    def _remember_bridges(self, found: list[tuple[bridges.Network, int]]) -> None:
        for network in {network for network, _ in self._bridges} - {network for network, _ in found}:
            libbpf.map_delete(self.maps.untracked, _network(network))
        for network, number in found:  # what finds no room stays unknown
            libbpf.map_update(self.maps.untracked, _network(network), number.to_bytes(4, "little"))
        self._bridges = found

    @property
    def needs_reconciliation(self) -> bool:
        """Whether the maps may hold entries whose end nobody will tell: from before the start, kept, lost events, or
        sockets whose datagrams never came."""
        self._read_socket_error()
        kept = self.maps.counters_now()["kept"]
        return self._dumped_alive or kept != self._kept or self.enobufs != self._enobufs_then or bool(self._unsent)

    @property
    def has_flows(self) -> bool:
        """Whether there are flows, to which only a dump gives interim rows and the time of their last packet.

        What is younger than a second may be a connection that its socket is about to claim.
        """
        before = max(_boot_ns() - _SETTLED_NS, 0)
        return any(
            ((are_flows(values) | _unclaimed_datagrams(keys, values)) & (values["created"] < before)).any()
            for keys, values in self._batches()
        )

    def _known(self) -> Numbers:
        parts = [identity(keys, values["ct_id"]) for keys, values in self._batches()]
        return np.concatenate(parts, dtype=np.uint64)

    def _remember_zones(self, zones: npt.NDArray[np.uint16]) -> None:
        """Tells the programs of zones that only a dump has shown so far; as in bpf/conntrack.h, up to eight."""
        slots = [int.from_bytes(libbpf.map_lookup(self.maps.zones, slot.to_bytes(4, "little"), 4) or b"", "little")
                 for slot in range(ZONES)]  # fmt: skip
        for zone in map(int, np.unique(zones)):
            if zone and zone not in slots and 0 in slots:
                slot = slots.index(0)
                slots[slot] = zone
                libbpf.map_update(self.maps.zones, slot.to_bytes(4, "little"), zone.to_bytes(4, "little"))

    def _batches(self) -> Iterator[libbpf.Pair]:
        return libbpf.map_batches(self.maps.translations, TUPLE, TRANSLATION)

    def _translations(self) -> libbpf.Pair:
        return libbpf.map_items(self.maps.translations, TUPLE, TRANSLATION)


def _unclaimed_datagrams(keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """UDP entries that may be those of open sockets, which only a walk finds."""
    found: npt.NDArray[np.bool_] = (keys["protocol"] == 17) & (values["conn_id"] == 0)
    return found


def _host(address: bytes) -> bytes:
    """The key that asks a longest-prefix-match map for an address."""
    return (128).to_bytes(4, "little") + address


def _network(network: bridges.Network) -> bytes:
    """A `struct network`."""
    raw, length = network.network_address.packed, network.prefixlen
    if network.version == 4:
        raw, length = bytes(10) + b"\xff\xff" + raw, length + 96
    return np.array([(length, raw)], NETWORK).tobytes()


def _balanced(cgroups: int) -> bool:
    """Whether a program rewrites addresses inside connect() in any cgroup."""
    for _, _, _, directory in os.fwalk(".", dir_fd=cgroups):
        for where in (libbpf.ATTACH_CONNECT4, libbpf.ATTACH_CONNECT6):
            with contextlib.suppress(OSError):  # the cgroup is gone meanwhile
                if libbpf.attached_to_cgroup(directory, where):
                    return True
    return False


def _elements(array: npt.NDArray[Any], kind: np.dtype[Any]) -> list[bytes]:
    """The bytes of each element, in the layout of `kind`: NumPy's copies may have turned big-endian fields."""
    data, size = np.ascontiguousarray(array, dtype=kind).tobytes(), kind.itemsize
    return [data[start : start + size] for start in range(0, len(data), size)]


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
