"""Flows: what only conntrack tells of (bpf/flow.h), beyond the one record that the kernel makes of each.

The kernel's record is made when conntrack drops the entry, with the totals of the entry's whole life. Here long flows
get interim rows from periodic dumps of conntrack's table, which are taken off the last one; a flow's end becomes the
time of its last packet; and a refusal is held back until it is known that no socket of this node was refused.

Pure arrays: knows records, dumped entries and translations; reads no table itself.
"""

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.kernel.identity import Numbers, are_in, identity
from tracer.kernel.maps import CLAIM_DATAGRAM, OWNER
from tracer.kernel.timeouts import TCP_CLOSE, TCP_ESTABLISHED, TCP_SYN_RECV, TCP_SYN_SENT, TCP_TIME_WAIT, Timeouts
from tracer.record import RECORD, RESULT_OPEN, TUPLE, Flag, Nat, NatSource, Role

Records = npt.NDArray[Any]

TCP, UDP = 6, 17
_SECOND = 1_000_000_000
#: How long a refusal is held back. The socket hears of it in the same softirq, or when it is unlocked.
HOLD_NS = _SECOND
_ASSURED = 0x04
_V4_MAPPED = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
_COUNTS = ("bytes_sent", "bytes_received", "packets_sent", "packets_received")

#: What is remembered of a flow that was seen in a dump. Its key is when its entry was inserted, and conntrack's id.
_STATE = np.dtype(
    [
        ("key", "S13"),
        ("conn_id", "<u8"),
        ("begin", "<u8"),  # where its next row begins: the end of the last one
        ("end", "<u8"),  # when its last packet was, as the last dump told
        ("started", "<u8"),  # of entries from before the tracer, if conntrack noted it; else 0
        *((name, "<u8") for name in _COUNTS),  # what was reported
        *((f"seen_{name}", "<u8") for name in _COUNTS),  # what the last dump said
        ("counted", "u1"),  # whether it said anything
        ("packets", "<u8"),  # in both directions, as of the last dump
        ("told", "u1"),  # a row said `opened`
        ("state", "u1"),  # of TCP, as of the last dump
        ("status", "u1"),
        ("missed", "u1"),  # in how many dumps in a row it was not there
    ]
)


def _key(created: npt.NDArray[Any], ct_id: npt.NDArray[Any]) -> npt.NDArray[np.bytes_]:
    """Comparable bytes (the last is never zero, which NumPy would strip)."""
    whole = np.empty(len(created), np.dtype([("created", "<u8"), ("ct_id", "<u4"), ("end", "u1")]))
    whole["created"], whole["ct_id"], whole["end"] = created, ct_id, 1
    return whole.view("S13")


class _Table:
    """States in the order of their keys."""

    def __init__(self) -> None:
        self.rows = np.empty(0, _STATE)

    def find(self, keys: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(place, whether it is there) of each key."""
        if not len(self.rows):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
        place = np.minimum(np.searchsorted(self.rows["key"], keys), len(self.rows) - 1)
        return place, self.rows["key"][place] == keys

    def add(self, rows: npt.NDArray[Any]) -> None:
        """New ones, whose keys are not there."""
        rows = np.concatenate((self.rows, rows))
        self.rows = rows[np.argsort(rows["key"])]

    def drop(self, gone: npt.NDArray[np.bool_]) -> None:
        self.rows = self.rows[~gone]


class Flows:
    """The flows of one run. `timeouts` are conntrack's, read by the caller now and then."""

    def __init__(self, run_id: int, interval_ns: int) -> None:
        self._interval = interval_ns
        self._next_id = run_id << 48 | 0xFFF << 36  # the kernel's ids have a CPU's number there
        self._known = _Table()
        self._held = np.empty(0, RECORD)
        self.timeouts = Timeouts()
        self.withdrawn = 0
        self.untold = 0
        #: Refusals whose provisional record found the ring full, and that no socket had claimed when they were removed.
        self.lost = 0

    # -- the kernel's records ----------------------------------------------------------------------------------------

    def settle(self, records: Records) -> Records:
        """A drained batch, with the flows among it made right; provisional ones are kept back."""
        of_flows = (records["role"] == Role.FORWARDED) | (records["tuple"]["protocol"] != TCP)
        provisional = (records["flags"] & Flag.PROVISIONAL) != 0
        if provisional.any():
            self._held = np.concatenate((self._held, records[provisional]), dtype=RECORD)
        if len(self._held):
            claiming = records[(records["role"] == Role.CLIENT) & (records["ct_id"] != 0)]
            self.withdraw(claiming["tuple"], claiming["ct_id"])
        if not of_flows.any():
            return records
        flows = records[of_flows & ~provisional]
        return np.concatenate((records[~of_flows], self._close(flows)), dtype=RECORD)

    def withdraw(self, tuples: npt.NDArray[Any], ct_ids: npt.NDArray[Any]) -> None:
        """A socket of this node has claimed these entries: what is held of them is no flow's.

        Conntrack drops an entry before its socket hears of the refusal: a claim is never before what it claims.
        """
        claimed = are_in(_claim(self._held["tuple"], self._held["ct_id"]), _claim(tuples, ct_ids))
        self.withdrawn += int(np.count_nonzero(claimed))
        self._held = self._held[~claimed]

    @property
    def holds(self) -> bool:
        """Whether there are provisional records."""
        return bool(len(self._held))

    def release(self, now: int, unclaimed: Callable[[bytes, int], bool]) -> Records:
        """Those provisional records that are old enough and that no socket has claimed.

        Args:
            now: CLOCK_BOOTTIME ns.
            unclaimed: asked with tuple and conntrack id: whether the translation is without a claim, or gone.
        """
        ripe = self._held["ts"] + HOLD_NS <= now
        if not ripe.any():
            return np.empty(0, RECORD)
        records, self._held = self._held[ripe], self._held[~ripe]
        free = np.ones(len(records), np.bool_)
        for place in range(len(records)):
            key = np.ascontiguousarray(records["tuple"][place : place + 1], TUPLE).copy()
            key["zone"] = records["ct_zone"][place]
            free[place] = unclaimed(key.tobytes(), int(records["ct_id"][place]))
        self.withdrawn += int(np.count_nonzero(~free))
        records = records[free]
        records["flags"] &= np.uint8(0xFF ^ Flag.PROVISIONAL)
        return self._close(records)

    def _close(self, records: Records) -> Records:
        """Closing records: less what interim rows said, and up to the last packet."""
        records = records.copy()
        created = records["ts"] - records["duration_ns"]
        place, known = self._known.find(_key(created, records["ct_id"]))
        from_dump = self._say_state(records, place, known)
        begin = created.copy()
        # When the entry was dropped, less what it had been waiting; where the last dump saw the end already, that.
        waited = self.timeouts.of(records["tuple"]["protocol"], records["ct_state"], records["ct_status"])
        waited = np.maximum(waited.astype(np.int64) - records["ct_left"], 0).astype(np.uint64) * np.uint64(_SECOND)
        end = records["ts"] - np.minimum(waited, records["ts"])
        stood = records["ct_state"] == TCP_ESTABLISHED
        if known.any():
            state = self._known.rows[place[known]]
            mine = records[known]
            stood[known] |= state["state"] == TCP_ESTABLISHED  # where DESTROY has no state
            # Where nothing is counted, nothing tells whether it went on after the last dump.
            idle = (mine["flags"] & Flag.COUNTED != 0) & (state["end"] > 0)
            idle &= mine["packets_sent"] + mine["packets_received"] == state["packets"]
            idle |= from_dump[known]
            end[known] = np.where(idle, state["end"], end[known])
            begin[known] = state["begin"]
            for name in _COUNTS:
                mine[name] -= np.minimum(state[name], mine[name])
            mine["conn_id"] = state["conn_id"]
            mine["started"] = np.where(mine["started"] > 0, mine["started"], state["started"])
            mine["flags"] &= np.where(state["told"] > 0, 0xFF ^ Flag.OPENED, 0xFF).astype(np.uint8)
            records[known] = mine
            gone = np.zeros(len(self._known.rows), np.bool_)
            gone[place[known]] = True
            self._known.drop(gone)
        records["ts"] = np.clip(end, begin, records["ts"])
        records["duration_ns"] = records["ts"] - begin
        # Gone before a dump told what it had counted by then, or not moved since.
        before = _over_before(records, created, stood) | (records["nat_source"] == NatSource.DUMP) & ~known
        self.withdrawn += int(np.count_nonzero(before))
        kept: Records = records[~before]
        return kept

    def _say_state(self, records: Records, place: npt.NDArray[np.int64],
                   known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:  # fmt: skip
        """A kernel whose DESTROY has no state (before 86d21fc74745): the last dump's, if it was the last one.

        Which records have it from there. How long an entry had left is not told either: the dump's time holds, too.
        """
        untold: npt.NDArray[np.bool_] = known & (records["tuple"]["protocol"] == TCP) & (records["ct_state"] == 0)
        if not untold.any():
            return untold
        state = self._known.rows["state"][place]
        untold &= np.isin(state, (TCP_TIME_WAIT, TCP_CLOSE))
        reset = (state == TCP_CLOSE) & (records["ct_status"] & _ASSURED != 0)
        result = np.where(state == TCP_TIME_WAIT, 0, np.where(reset, errno.ECONNRESET, RESULT_OPEN))
        records["ct_state"] = np.where(untold, state, records["ct_state"])
        records["result"] = np.where(untold, result, records["result"])
        return untold

    # -- dumps -------------------------------------------------------------------------------------------------------

    def look(self, entries: npt.NDArray[Any], values: npt.NDArray[Any], owners: npt.NDArray[Any], now: int,
             flush: bool = False) -> Records:  # fmt: skip
        """Interim rows of the flows in a dump whose interval is over.

        Args:
            entries: the dump's, of conntrack.ENTRY, those whose translations are flows.
            values: their translations, of maps.TRANSLATION, read after the dump.
            owners: their sockets, of maps.OWNER; zero where there is none.
            now: CLOCK_BOOTTIME ns of the dump.
            flush: a row for every flow, closed if its last packet said so: the tracer stops.
        """
        keys = _key(values["created"], values["ct_id"])
        place, known = self._known.find(keys)
        self._forget(place[known])
        if not known.all():
            self._known.add(self._meet(entries[~known], values[~known], keys[~known]))
        place, known = self._known.find(keys)
        rows = self._known.rows
        state = rows[place]
        protocol = entries["key"]["protocol"]
        left = np.where(entries["timeout_s"] == 0xFFFFFFFF, 0, entries["timeout_s"]).astype(np.int64)
        status = entries["status"].astype(np.uint8)
        waited = self.timeouts.of(protocol, entries["state"], status).astype(np.int64) - left
        over = (protocol == TCP) & np.isin(entries["state"], (TCP_TIME_WAIT, TCP_CLOSE))
        last_packet = np.uint64(now) - np.minimum(np.maximum(waited, 0), now // _SECOND).astype(np.uint64) * np.uint64(
            _SECOND
        )
        # An established TCP connection may be idle and open; of the others the last packet is all there is.
        end = np.maximum(np.where((protocol == TCP) & ~over, np.uint64(now), last_packet), state["begin"])
        moved = entries["packets_sent"] + entries["packets_received"]
        # The clock of a dump is in whole seconds: what did not move did not end any later.
        still = (entries["counted"] > 0) & (state["packets"] == moved) & (state["end"] > 0) & (over | (protocol != TCP))
        state["end"] = np.where(still, state["end"], end)
        state["packets"], state["state"], state["status"] = moved, entries["state"], status
        state["counted"] = entries["counted"]
        for name in _COUNTS:
            state[f"seen_{name}"] = entries[name]
        due = (state["end"] - state["begin"] >= self._interval) & ~over
        if flush:
            reported = state["packets_sent"] + state["packets_received"]
            # An entry from before that still waits for an answer to its SYN is what a client that gave up has left.
            waits = (protocol == TCP) & np.isin(entries["state"], (TCP_SYN_SENT, TCP_SYN_RECV))
            due |= (state["told"] == 0) | (moved > reported) | ((state["end"] > state["begin"]) & ~waits)
        records = self._interim(entries[due], values[due], owners[due], state[due], over[due] & flush)
        for name in _COUNTS:
            state[name] = np.where(due, entries[name], state[name])
        state["begin"] = np.where(due, state["end"], state["begin"])
        state["told"] |= due
        rows[place] = state
        return records

    def _meet(self, entries: npt.NDArray[Any], values: npt.NDArray[Any], keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """States of flows that no dump showed before. What an older entry has counted so far is not ours."""
        met = np.zeros(len(entries), _STATE)
        met["key"], met["begin"], met["started"] = keys, values["created"], entries["started"]
        met["conn_id"] = self._next_id + np.arange(1, len(met) + 1, dtype=np.uint64)
        self._next_id += len(met)
        old = values["source"] == NatSource.DUMP
        for name in _COUNTS:
            met[name] = np.where(old, entries[name], 0)
        met["told"] = old
        return met

    def _forget(self, seen: npt.NDArray[np.int64]) -> None:
        """Counts in how many dumps the others were missing; a closing record may be on its way, so twice."""
        missed = self._known.rows["missed"]
        missed += 1
        missed[seen] = 0
        gone = missed > 2
        if gone.any():
            self._known.drop(gone)

    def _interim(self, entries: npt.NDArray[Any], values: npt.NDArray[Any], owners: npt.NDArray[Any],
                 state: npt.NDArray[Any], closed: npt.NDArray[np.bool_]) -> Records:  # fmt: skip
        records = np.zeros(len(entries), RECORD)
        key = entries["key"]
        records["tuple"] = key
        records["tuple"]["zone"] = 0
        for name in ("backend", "snat", "backend_port", "snat_port", "ct_id", "nat"):
            records[name] = values[name]
        records["nat_source"], records["ct_zone"] = values["source"], values["zone"]
        records["conn_id"], records["ts"] = state["conn_id"], state["end"]
        records["duration_ns"] = state["end"] - np.minimum(state["begin"], state["end"])
        born = values["source"] == NatSource.CONNTRACK
        records["started"] = np.where(born, values["created"], state["started"])
        for name in _COUNTS:
            records[name] = entries[name] - np.minimum(state[name], entries[name])
        dst = np.ascontiguousarray(key["dst"]).view("u1").reshape(-1, 16)
        v4 = (dst[:, :12] == _V4_MAPPED).all(axis=1)
        records["flags"] = (
            np.where(entries["counted"] > 0, int(Flag.COUNTED), 0)
            | np.where(v4, int(Flag.IPV4), 0)
            | np.where(born & (state["told"] == 0), int(Flag.OPENED), 0)
            | np.where(closed, int(Flag.CLOSED), 0)
        )
        records["result"] = np.where(closed & (entries["state"] == TCP_TIME_WAIT), 0, RESULT_OPEN)
        records["role"] = Role.FORWARDED
        records["ct_state"] = entries["state"]
        self._own(records, values, owners)
        return records

    def _own(self, records: Records, values: npt.NDArray[Any], owners: npt.NDArray[Any]) -> None:
        """The process and what it dialled, as bpf/flow.h does it."""
        mine = owners["netns"] != 0
        records["role"] = np.where(mine, int(Role.CLIENT), records["role"])
        records["netns"] = np.where(mine, owners["netns"], 0)
        process = mine & (owners["pid"] != 0)
        records["flags"] |= np.where(process, int(Flag.PROCESS), 0).astype(np.uint8)
        for name in ("pid", "comm", "cgroup_id"):
            records[name] = np.where(process, owners[name], np.zeros(1, OWNER)[name])
        rewritten = mine & (owners["rewritten"] > 0)
        for place in np.flatnonzero(rewritten):  # a handful: long UDP flows behind a balancer at the socket
            records["tuple"]["dst"][place] = owners["dialled"][place]
            records["tuple"]["dst_port"][place] = owners["dialled_port"][place]
        records["nat"] = np.where(rewritten, int(Nat.DNAT) | records["nat"] & int(Nat.SNAT), records["nat"])
        records["nat_source"] = np.where(rewritten, int(NatSource.SOCKET), records["nat_source"])
        vague = mine & (owners["undialled"] > 0) & ~rewritten & (records["nat"] & int(Nat.DNAT) == 0)
        records["nat"] = np.where(vague, int(Nat.UNKNOWN), records["nat"])

    def vanish(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], owners: npt.NDArray[Any], now: int) -> Records:
        """Closing rows of flows that are no longer in conntrack's table, and whose DESTROY nobody sent.

        What they transferred since the last dump is not known, and counted as `untold`.
        """
        place, known = self._known.find(_key(values["created"], values["ct_id"]))
        state = self._known.rows[place[known]]
        keys, values, owners = keys[known], values[known], owners[known]
        entries = np.zeros(
            len(keys), np.dtype([("key", TUPLE), ("counted", "u1"), ("state", "u1"), *((n, "<u8") for n in _COUNTS)])
        )
        entries["key"], entries["state"] = keys, state["state"]
        for name in _COUNTS:
            entries[name] = state[f"seen_{name}"]
        entries["counted"] = state["counted"]
        over = (keys["protocol"] != TCP) | np.isin(state["state"], (TCP_TIME_WAIT, TCP_CLOSE))
        state["end"] = np.maximum(np.where(over, state["end"], now), state["begin"])
        records = self._interim(entries, values, owners, state, np.ones(len(keys), np.bool_))
        records = records[~_over_before(records, values["created"], records["ct_state"] == TCP_ESTABLISHED)]
        self.untold += len(records)
        return records


def _claim(tuples: npt.NDArray[Any], ct_id: npt.NDArray[Any]) -> Numbers:
    """What a socket's row and a flow's record have in common: the source, and conntrack's id."""
    sources = np.zeros(len(tuples), TUPLE)
    sources["src"], sources["src_port"] = tuples["src"], tuples["src_port"]
    return identity(sources, ct_id)


def _over_before(
    records: Records, created: npt.NDArray[np.uint64], stood: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which closing records are of entries from before the tracer that had no packet since: no flows of ours.

    Where nothing was counted, by the time of the last packet. TCP that was seen established (`stood`) is one.
    """
    counted = records["flags"] & Flag.COUNTED != 0
    first = records["ts"] - records["duration_ns"] == created
    still = np.where(counted, records["packets_sent"] + records["packets_received"] == 0, records["duration_ns"] == 0)
    stood = stood & (records["tuple"]["protocol"] == TCP)
    before: npt.NDArray[np.bool_] = (records["nat_source"] == NatSource.DUMP) & first & still & ~stood
    return before


def are_flows(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which translations are flows: a UDP socket's, or rewritten here and no TCP socket's."""
    rewritten: npt.NDArray[np.bool_] = (values["conn_id"] == 0) & (values["nat"] & Nat.DNAT != 0)
    flows: npt.NDArray[np.bool_] = (rewritten | (values["conn_id"] == CLAIM_DATAGRAM)) & (values["ended"] == 0)
    return flows
