"""The truth ledger: what a capture holds, compared with what the kernel's own tables say at that moment.

Three accounts, each kept against a witness that no program of ours has a part in:
- translations: every entry of conntrack's table (a dump) and of the translations map, by tuple and id.
- connections: every TCP socket that stands (sock_diag) in the traced namespaces, and of the connections map.
- backends: where each open connection goes, by conntrack now and by the row that the capture holds.

What is in truth and not here is missing, what is here and not in truth is stale, what both have and tell differently is
wrong. Connections come and go while this reads, so what disagrees is looked at again, and only what disagrees in the
same way both times counts. Pure comparison; reading is `tracer.kernel.witness`.
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tracer.kernel.identity import Numbers, Which, are_in, find, identity, without_zone
from tracer.kernel.maps import DIALLED_ANOTHER, DIALLED_UNKNOWN
from tracer.kernel.sockets import ESTABLISHED, LISTEN
from tracer.record import TUPLE, Flag, Nat, NatSource, Role

Array = npt.NDArray[Any]


class Account(enum.IntEnum):
    """What is compared."""

    TRANSLATIONS = 0
    CONNECTIONS = 1
    BACKENDS = 2


class How(enum.IntEnum):
    """How they disagree."""

    MISSING = 0
    STALE = 1
    WRONG = 2
    UNDECIDED = 3  # not compared: a socket without an entry of which nothing says who dialled


#: One disagreement: `here` is what the capture holds, `there` what the kernel says, zero where it has nothing. `mark`
#: tells two of one tuple apart: conntrack's id, the socket's cookie, the connection's id.
DISAGREEMENT = np.dtype(
    [
        ("account", "u1"),
        ("how", "u1"),
        ("netns", "<u4"),
        ("tuple", TUPLE),
        ("mark", "<u8"),
        ("here", "V16"),
        ("here_port", ">u2"),
        ("there", "V16"),
        ("there_port", ">u2"),
        ("end", "u1"),  # never zero, which NumPy would strip from comparable bytes
    ]
)

_V4_LOOPBACK = bytes(10) + b"\xff\xff\x7f"
_V6_LOOPBACK = bytes(15) + b"\x01"


class View(NamedTuple):
    """What was read at one moment, truth first."""

    entries: Array  # conntrack.ENTRY
    whole: bool  # whether the dump was understood to the last message: else nothing can be called stale
    sockets: Array  # sockets.SOCKET, of the namespaces in `walked`
    left_out: Which  # which of them an option leaves out
    walked: frozenset[int]
    keys: Array  # record.TUPLE and maps.TRANSLATION: the translations map
    values: Array
    connections: Array  # maps.CONNECTION


class Traced(NamedTuple):
    """What the capture was asked to trace, as far as it decides what it must hold."""

    loopback: bool
    servers: bool


class Look(NamedTuple):
    """What one comparison found. `found` is an array of DISAGREEMENT; the counts are by Account."""

    compared: tuple[int, int, int]
    found: Array


@dataclass(frozen=True)
class Agreement:
    """The outcome: the last look's counts, and what disagreed in both; of how many sockets it could not be told."""

    compared: tuple[int, int, int]
    found: Array
    undecided: int

    def count(self, account: Account, how: How) -> int:
        """How many disagree so."""
        return int(np.count_nonzero((self.found["account"] == account) & (self.found["how"] == how)))

    def agreeing(self, account: Account) -> int:
        """How many do not disagree."""
        return self.compared[account] - int(np.count_nonzero(self.found["account"] == account))

    @property
    def is_wrong(self) -> bool:
        """Whether anything is held that differs from the truth."""
        return bool(np.any(self.found["how"] == How.WRONG))

    def figures(self) -> dict[str, int]:
        """By column of the coverage table."""
        counts = {f"checked_{account.name.lower()}": self.compared[account] for account in Account}
        for account, how in OUTCOMES:
            counts[f"{how.name.lower()}_{account.name.lower()}"] = self.count(account, how)
        return counts | {"undecided_connections": self.undecided}


#: Which disagreements there can be. A connection's entry is found by its socket, so it cannot be another's; a backend
#: is compared where conntrack has an entry, so it cannot be stale.
OUTCOMES = (
    (Account.TRANSLATIONS, How.MISSING),
    (Account.TRANSLATIONS, How.STALE),
    (Account.TRANSLATIONS, How.WRONG),
    (Account.CONNECTIONS, How.MISSING),
    (Account.CONNECTIONS, How.STALE),
    (Account.BACKENDS, How.MISSING),
    (Account.BACKENDS, How.WRONG),
)
#: The outcome before the first look.
NOTHING = Agreement((0, 0, 0), np.empty(0, DISAGREEMENT), 0)


def compare(view: View, traced: Traced) -> Look:
    """One look at all three accounts."""
    translations, first = _translations(view)
    connections, second = _connections(view, traced)
    backends, third = _backends(view)
    found = np.concatenate((first, second, third), dtype=DISAGREEMENT)
    return Look((translations, connections, backends), found)


def persisting(first: Look, second: Look) -> Agreement:
    """What disagrees in both looks, in the same way."""
    again = second.found[np.isin(_comparable(second.found), _comparable(first.found))]
    undecided = again["how"] == How.UNDECIDED
    return Agreement(second.compared, again[~undecided], int(np.count_nonzero(undecided)))


# -- translations ----------------------------------------------------------------------------------------------------


def _translations(view: View) -> tuple[int, Array]:
    kept = view.values["ended"] > 0  # for their sockets, which conntrack's table knows nothing of
    keys, values = view.keys[~kept], view.values[~kept]
    there = identity(view.entries["key"], view.entries["value"]["ct_id"])
    here = identity(keys, values["ct_id"])
    place, known = find(here, there)
    truth = view.entries["value"]
    wrong = known.copy()
    wrong[known] = _differ(values[place[known]], truth[known])
    stale = ~are_in(here, there) & view.whole
    missing = _disagree(Account.TRANSLATIONS, How.MISSING, view.entries["key"][~known], truth["ct_id"][~known])
    _tell(missing, "there", truth["backend"][~known], truth["backend_port"][~known])
    old = _disagree(Account.TRANSLATIONS, How.STALE, keys[stale], values["ct_id"][stale])
    _tell(old, "here", values["backend"][stale], values["backend_port"][stale])
    other = _disagree(Account.TRANSLATIONS, How.WRONG, view.entries["key"][wrong], truth["ct_id"][wrong])
    _tell(other, "there", truth["backend"][wrong], truth["backend_port"][wrong])
    held = values[place[wrong]]
    _tell(other, "here", held["backend"], held["backend_port"])
    return len(there) + int(np.count_nonzero(stale)), np.concatenate((missing, old, other))


def _differ(held: Array, truth: Array) -> Which:
    differs: Which = np.zeros(len(held), np.bool_)
    for name in ("backend", "snat", "backend_port", "snat_port", "nat"):
        differs |= held[name] != truth[name]
    return differs


# -- connections -----------------------------------------------------------------------------------------------------


def _connections(view: View, traced: Traced) -> tuple[int, Array]:
    rows = view.connections["row"]
    own = _own_view(view.connections)
    ports_known = rows["tuple"]["src_port"] != 0
    here = identity(own[ports_known], rows["netns"][ports_known])
    listed = view.sockets["state"] != LISTEN
    there = identity(view.sockets["tuple"], view.sockets["netns"])

    standing = np.flatnonzero(view.sockets["state"] == ESTABLISHED)
    held = are_in(there[standing], here)
    told = _to_be_held(view, traced, standing[~held], own[~ports_known], rows["netns"][~ports_known])
    found, unclear = (
        _disagree(Account.CONNECTIONS, how, lacking["tuple"], lacking["cookie"], lacking["netns"])
        for how, lacking in zip((How.MISSING, How.UNDECIDED), told, strict=True)
    )

    # Those of namespaces that were not walked may well be there.
    stale = (rows["flags"] & Flag.ESTABLISHED != 0) & ports_known & np.isin(rows["netns"], list(view.walked))
    stale[stale] = ~are_in(identity(own[stale], rows["netns"][stale]), there[listed])
    old = rows[stale]
    gone = _disagree(Account.CONNECTIONS, How.STALE, own[stale], old["conn_id"], old["netns"])
    compared = int(np.count_nonzero(held)) + len(found) + len(gone)
    return compared, np.concatenate((found, gone, unclear))


def _own_view(connections: Array) -> Array:
    """The tuple as the socket itself has it: whom it talks to, `src` its own end."""
    tuples = connections["row"]["tuple"].copy()
    tuples["zone"] = tuples["reserved"] = 0
    elsewhere = connections["row"]["dialled"] == DIALLED_ANOTHER
    tuples["dst"][elsewhere] = connections["peer"][elsewhere]
    tuples["dst_port"][elsewhere] = connections["row"]["peer_port"][elsewhere]
    servers = connections["row"]["role"] == Role.SERVER
    tuples[servers] = turned(tuples[servers])
    return tuples


def turned(tuples: Array) -> Array:
    """The other end's view."""
    other = tuples.copy()
    other["src"], other["dst"] = tuples["dst"], tuples["src"]
    other["src_port"], other["dst_port"] = tuples["dst_port"], tuples["src_port"]
    return other


def _to_be_held(
    view: View, traced: Traced, places: npt.NDArray[np.int64], vague: Array, netns: Array
) -> tuple[Array, Array]:
    """Those of these sockets that the capture has to hold, and those of which that cannot be told.

    Who dialled is told as the capture tells it of sockets that it finds (bpf/iterator.h): by conntrack's original
    direction, else by a listener on the local port.

    Args:
        view: what was read.
        traced: what is traced.
        places: of sockets that have no entry under their tuple.
        vague: tuples, whose own port is not known yet, of entries that may be theirs.
        netns: the namespaces of those.
    """
    sockets = view.sockets[places]
    wanted = ~view.left_out[places]
    if not traced.loopback:
        wanted &= ~(_is_loopback(sockets["tuple"]["dst"]) | _is_loopback(sockets["tuple"]["src"]))
    without = sockets["tuple"].copy()
    without["src_port"] = 0
    wanted &= ~are_in(identity(without, sockets["netns"]), identity(vague, netns))
    dialled = are_in(_plain(sockets["tuple"]), _plain(view.entries["key"]))
    if traced.servers:
        return sockets[wanted], sockets[:0]
    replies = view.entries["key"].copy()
    for name, end in (("src", "backend"), ("dst", "snat")):
        replies[name], replies[f"{name}_port"] = view.entries["value"][end], view.entries["value"][f"{end}_port"]
    listening = view.sockets[view.sockets["state"] == LISTEN]
    ports = listening["netns"].astype(np.uint64) << np.uint64(16) | listening["tuple"]["src_port"]
    port = sockets["netns"].astype(np.uint64) << np.uint64(16) | sockets["tuple"]["src_port"]
    accepted = ~dialled & (are_in(_plain(sockets["tuple"]), _plain(replies)) | are_in(port, ports))
    return sockets[wanted & dialled], sockets[wanted & ~dialled & ~accepted]


# -- backends --------------------------------------------------------------------------------------------------------


def _backends(view: View) -> tuple[int, Array]:
    """Of client connections that stand, and that conntrack has an entry of which is not younger than they are.

    An entry that was deleted under a connection and made anew may lead elsewhere: what the row says was true all the
    same. So may one that is another socket's of the same tuple; whose it is, the translation's claim tells.
    """
    connections = view.connections
    row = connections["row"]
    rows = (row["role"] == Role.CLIENT) & (row["flags"] & Flag.ESTABLISHED != 0) & (row["tuple"]["src_port"] != 0)
    rows &= (row["nat_source"] != NatSource.SOCKET) & (row["dialled"] != DIALLED_UNKNOWN)
    row = row[rows]
    keys = row["tuple"].copy()
    keys["zone"] = row["ct_zone"]
    place, known = find(_plain(view.entries["key"], zones=True), _plain(keys, zones=True))
    row, entries = row[known], view.entries[place[known]]
    truth = entries["value"]
    held_at, held = find(identity(view.keys, view.values["ct_id"]), identity(entries["key"], truth["ct_id"]))
    claim = np.zeros(len(row), np.uint64)
    born = np.zeros(len(row), np.uint64)
    claim[held], born[held] = view.values["conn_id"][held_at[held]], view.values["created"][held_at[held]]
    heard = np.zeros(len(row), np.bool_)
    heard[held] = view.values["source"][held_at[held]] == NatSource.CONNTRACK

    same = row["ct_id"] == truth["ct_id"]
    stood = row["started"] + row["connect_latency_us"].astype(np.uint64) * np.uint64(1000) + np.uint64(1_000_000)
    older = heard & (row["started"] > 0) & (row["connect_latency_us"] > 0) & (born <= stood)
    unclaimed = (claim == 0) | (claim == row["conn_id"])
    comparable = same | (older & unclaimed)
    row, truth, keys = row[comparable], truth[comparable], entries["key"][comparable]

    unknown = row["nat"] == Nat.UNKNOWN
    wrong = ~unknown & ((row["backend"] != truth["backend"]) | (row["backend_port"] != truth["backend_port"]))
    parts = []
    for how, which in ((How.MISSING, unknown), (How.WRONG, wrong)):
        part = _disagree(Account.BACKENDS, how, keys[which], row["conn_id"][which], row["netns"][which])
        _tell(part, "there", truth["backend"][which], truth["backend_port"][which])
        if how == How.WRONG:
            _tell(part, "here", row["backend"][which], row["backend_port"][which])
        parts.append(part)
    return len(row), np.concatenate(parts)


# -- arrays ----------------------------------------------------------------------------------------------------------


def _disagree(account: Account, how: How, tuples: Array, mark: Array, netns: Array | int = 0) -> Array:
    made = np.zeros(len(tuples), DISAGREEMENT)
    made["account"], made["how"], made["tuple"] = account, how, tuples
    made["mark"], made["netns"], made["end"] = mark, netns, 1
    return made


def _tell(made: Array, side: str, addresses: Array, ports: Array) -> None:
    made[side], made[f"{side}_port"] = addresses, ports


def _comparable(array: Array) -> npt.NDArray[np.bytes_]:
    whole = np.ascontiguousarray(array)
    return whole.view(f"S{whole.dtype.itemsize}")


def _plain(tuples: Array, zones: bool = False) -> Numbers:
    """A tuple alone; whatever its zone, unless `zones` count."""
    return identity(tuples if zones else without_zone(tuples))


def _is_loopback(addresses: Array) -> Which:
    octets = np.ascontiguousarray(addresses).view("u1").reshape(-1, 16)
    v4 = (octets[:, :13] == np.frombuffer(_V4_LOOPBACK, np.uint8)).all(axis=1)
    v6 = (octets == np.frombuffer(_V6_LOOPBACK, np.uint8)).all(axis=1)
    loopback: Which = v4 | v6
    return loopback
