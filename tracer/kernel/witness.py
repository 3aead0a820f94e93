"""Reads both sides of the truth ledger: the kernel's own tables, and a capture's maps, one's own or a running agent's.

A capture writes into its control map what it was asked to trace, so the maps alone say what they must hold, and another
process can judge them. It finds them by what the agent holds open: /proc/<pid>/fdinfo names each map's id, and bpf(2)
gives a descriptor for an id to whoever has CAP_SYS_ADMIN. The agent listens to nobody, and is not asked to do anything.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tracer.errors import NoDataError, TracerError
from tracer.kernel import conntrack, ledger, libbpf, maps, netns, sockets
from tracer.kernel.maps import (
    CONNECTION,
    CONTROL_NETNS_FILTER,
    CONTROL_NODE_NETNS,
    CONTROL_TRACED,
    NETWORK,
    TRACED_LOOPBACK,
    TRACED_SERVERS,
    TRANSLATION,
    YOUNG,
)
from tracer.record import TUPLE

#: Between the two looks: what was on its way has arrived.
PAUSE_S = 0.1
#: The maps that are needed, and the sizes of their keys and values.
_NEEDED = {
    "connections": (8, CONNECTION.itemsize),
    "young": (4, YOUNG.itemsize),
    "translations": (TUPLE.itemsize, TRANSLATION.itemsize),
    "control": (4, 8),
    "netns_list": (4, 1),
    "excluded": (NETWORK.itemsize, 1),
}
_NETNS, _FLAG = np.dtype("<u4"), np.dtype("u1")


class Running(NamedTuple):
    """A process that holds a capture's maps, and their ids by name."""

    pid: int
    ids: dict[str, int]


@dataclass(frozen=True)
class Scope:
    """Descriptors of a capture's maps, and what it traces."""

    maps: dict[str, int]
    node_netns: int
    mode: int
    listed: frozenset[int]
    traced: ledger.Traced

    @classmethod
    def of(cls, maps: dict[str, int]) -> "Scope":
        """By what its control map says. The descriptors stay the caller's."""

        def control(which: int) -> int:
            return int.from_bytes(libbpf.map_lookup(maps["control"], which.to_bytes(4, "little"), 8) or b"", "little")

        traced = control(CONTROL_TRACED)
        listed = libbpf.map_items(maps["netns_list"], _NETNS, _FLAG)[0]
        return cls(
            maps,
            control(CONTROL_NODE_NETNS),
            control(CONTROL_NETNS_FILTER),
            frozenset(listed.tolist()),
            ledger.Traced(bool(traced & TRACED_LOOPBACK), bool(traced & TRACED_SERVERS)),
        )

    def wants(self, inode: int) -> bool:
        """Whether sockets of that namespace are traced; as in bpf/connection.h."""
        return self.mode == 0 or (inode in self.listed) == (self.mode == 1)


@dataclass
class Turn:
    """Which namespaces' sockets are listed where not all are: those behind `last`, in the order of their numbers, for
    so many seconds. `last` becomes the last of them."""

    last: int
    seconds: float

    def order(self, inodes: Collection[int]) -> list[int]:
        """All of them, each once."""
        return sorted(inodes, key=lambda inode: (inode <= self.last, inode))


def check(
    scope: Scope,
    between: Callable[[], object] = lambda: None,
    pause_s: float = PAUSE_S,
    turn: Turn | None = None,
) -> ledger.Agreement:
    """Compares twice, unless all agrees at once.

    Args:
        scope: the capture.
        between: drains its ring; called in between, as large tables take a while.
        pause_s: between the two looks.
        turn: whose sockets are listed; None: those of all namespaces.

    Raises:
        TracerError: the kernel does not show its tables.
    """
    view = look(scope, between, turn)
    first = ledger.compare(view, scope.traced)
    if not len(first.found):
        return ledger.persisting(first, first)
    between()
    time.sleep(pause_s)
    between()
    return ledger.persisting(first, ledger.compare(look(scope, between, among=view.walked), scope.traced))


def look(
    scope: Scope,
    between: Callable[[], object] = lambda: None,
    turn: Turn | None = None,
    among: Collection[int] | None = None,
) -> ledger.View:
    """Reads both sides; sockets of all namespaces, of those whose `turn` it is, or of those `among`. See `check`."""
    found = netns.visible()
    if scope.node_netns not in found:
        raise TracerError(
            f"The node's network namespace ({scope.node_netns}) is that of no process or mount visible here: run this "
            "where the agent runs, with the host's PID namespace."
        )
    with netns.entered(found[scope.node_netns], scope.node_netns):
        dumped = conntrack.dump(0, between)
    wanted = [inode for inode in found if scope.wants(inode) and (among is None or inode in among)]
    parts, walked = [np.empty(0, sockets.SOCKET)], set()
    began = time.monotonic()
    for inode in turn.order(wanted) if turn else wanted:
        with contextlib.ExitStack() as inside:
            try:
                inside.enter_context(netns.entered(found[inode], inode))
            except TracerError:  # gone meanwhile, and its sockets with it
                continue
            part = sockets.dump(between)
        part["netns"] = inode
        parts.append(part)
        walked.add(inode)
        if turn:
            turn.last = inode
            if time.monotonic() - began > turn.seconds:
                break
    listed = np.concatenate(parts, dtype=sockets.SOCKET)
    keys, values = libbpf.map_items(scope.maps["translations"], TUPLE, TRANSLATION)
    between()
    parts = [part.copy() for _, part in maps.connections(scope.maps["young"], scope.maps["connections"])]
    connections = np.concatenate(parts, dtype=CONNECTION)
    between()
    left_out = _left_out(scope, listed)
    whole = not dumped.malformed
    return ledger.View(dumped.entries, whole, listed, left_out, frozenset(walked), keys, values, connections)


def _left_out(scope: Scope, listed: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which sockets have an end in a network that --exclude-cidr names."""
    ends = np.concatenate((listed["tuple"]["dst"], listed["tuple"]["src"]))
    octets = np.ascontiguousarray(ends).view("u1").reshape(-1, 16)
    addresses, where = np.unique(octets, axis=0, return_inverse=True)
    hosts = [(128).to_bytes(4, "little") + address.tobytes() for address in addresses]
    excluded = np.array([libbpf.map_lookup(scope.maps["excluded"], host, 1) == b"\1" for host in hosts], np.bool_)
    there = excluded[where.reshape(-1)] if len(hosts) else np.zeros(0, np.bool_)
    left_out: npt.NDArray[np.bool_] = there[: len(listed)] | (there[len(listed) :] & scope.traced.servers)
    return left_out


# -- a running agent's ------------------------------------------------------------------------------------------------


def running(proc: Path = Path("/proc")) -> list[Running]:
    """The processes that hold a capture's maps, oldest first.

    Only root's count: a map can have any name, and where unprivileged users may use bpf(2), anybody may make it.

    Raises:
        TracerError: other users' processes may not be looked into.
    """
    if os.geteuid() != 0:
        raise TracerError("Only root may look into a running agent: run this as root, or in the agent's own pod.")
    found: dict[int, Running] = {}
    names: dict[int, str] = {}
    for pid in sorted(int(entry.name) for entry in os.scandir(proc) if entry.name.isdigit()):
        with contextlib.suppress(OSError):  # it is gone
            if os.stat(f"{proc}/{pid}").st_uid != 0:
                continue
            ids = {_name(number, names): number for number in _map_ids(f"{proc}/{pid}")}
            if ids.keys() >= {f"vt_{name}" for name in _NEEDED}:
                # A loader that is about to end holds its parent's maps too.
                found.setdefault(ids["vt_connections"], Running(pid, ids))
    return list(found.values())


def _map_ids(process: str) -> Iterator[int]:
    for number in os.listdir(f"{process}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"{process}/fd/{number}") != "anon_inode:bpf-map":
                continue
            with open(f"{process}/fdinfo/{number}", encoding="ascii") as info:
                yield from (int(line.split()[1]) for line in info if line.startswith("map_id:"))


def _name(number: int, known: dict[int, str]) -> str:
    if number not in known:
        fd = libbpf.map_by_id(number)
        try:
            known[number] = libbpf.map_info(fd).name
        finally:
            os.close(fd)
    return known[number]


@contextlib.contextmanager
def opened(which: Running) -> Iterator[Scope]:
    """A running capture's maps, open while the block runs.

    Raises:
        TracerError: it is gone, or of another version.
    """
    with contextlib.ExitStack() as undo:
        maps = {}
        for name, sizes in _NEEDED.items():
            try:
                maps[name] = libbpf.map_by_id(which.ids[f"vt_{name}"])
                undo.callback(os.close, maps[name])
                info = libbpf.map_info(maps[name])
            except OSError as error:
                raise NoDataError(f"The agent (process {which.pid}) has ended meanwhile ({error.strerror}).") from error
            if (info.key_size, info.value_size) != sizes:
                raise TracerError(
                    f"Process {which.pid} is another version of vip-tracer: its map {name} has another layout. Run the "
                    "same version's command."
                )
        yield Scope.of(maps)
