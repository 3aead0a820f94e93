"""The ten name columns of a batch of records: joined by distinct value, not by row.

A batch has thousands of rows and a few hundred addresses. Distinct keys are found by `distinct`, each is asked of the
`Book` once, and NumPy spreads the answers over the rows, each as of its
connection's start. Knows the record's layout and the columns' names, not how they are stored.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.naming.book import Book
from tracer.naming.cgroups import Cgroups, Identity
from tracer.naming.distinct import distinct
from tracer.naming.holders import ServiceName, Who
from tracer.naming.intervals import FOREVER, Timeline
from tracer.naming.objects import Key
from tracer.record import RECORD, Flag, Nat, Role

Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int32]

_WORDS = RECORD.itemsize // 8
# The words of a record (tests/test_record.py holds the offsets): addresses are two each.
_SRC, _DST, _BACKEND = 0, 2, RECORD.fields["backend"][1] // 8  # type: ignore[index]
_PROTOCOL_SHIFT, _HERE_SHIFT = np.uint64(16), np.uint64(24)
_ALL_LOOPBACK_V4 = np.array([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 127]], dtype=np.uint8)
_LOOPBACK_V6 = np.array([[0] * 15 + [1]], dtype=np.uint8)


@dataclasses.dataclass(frozen=True, slots=True)
class Coded:
    """A column of n strings: ``texts[codes[i]]``, null where the code is -1. Each text is there once."""

    codes: Codes
    texts: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """The names of n rows, by column name.

    `unnamed` (n,): rows whose destination was rewritten, but whose service or backend is not known (neither pod nor
    node, or more than one may be meant), and rows whose client's cgroup is a pod's that was not heard of. They may
    yet get a name if they are named again later. `ambiguous` (n,): rows where more than one pod or service may be
    meant, so that none is named. `services` and `pods` (behind backends) are those the rows are about, by namespace
    and name.
    """

    columns: dict[str, Coded]
    unnamed: Mask
    ambiguous: Mask
    services: set[Key]
    pods: set[Key]


class _Answers:
    """What was found for some distinct keys, and which of it each row got."""

    def __init__(self, found: list[Any], codes: Codes) -> None:
        self.found, self.codes = found, codes

    def column(self, field: int) -> Coded:
        """One field of the answers."""
        texts = [None if answer is None else answer[field] for answer in self.found]
        distinct_texts = [text for text in dict.fromkeys(texts) if text is not None]
        places: dict[str | None, int] = {text: place for place, text in enumerate(distinct_texts)}
        places[None] = -1
        order = np.fromiter(map(places.__getitem__, texts), dtype=np.int32, count=len(texts))
        return Coded(order[self.codes], distinct_texts)

    def rows(self, which: Callable[[Any], bool]) -> Mask:
        """The rows whose answer is so."""
        return np.array([which(answer) for answer in self.found], dtype=bool)[self.codes]

    def keys(self) -> set[Key]:
        """Namespace and name of all that were found."""
        return {(each[0], each[1]) for each in self.found if each is not None and each[0] and each[1]}


class Namer:
    """Names batches from a book, and clients by their cgroup where `cgroups` is given."""

    def __init__(self, book: Book, cgroups: Cgroups | None = None) -> None:
        self._book, self._cgroups = book, cgroups

    def name(self, records: np.ndarray, wall_start_ns: npt.NDArray[np.int64]) -> Names:
        """Names of n records of `RECORD`.

        `wall_start_ns` (n,) is when each connection began, or where that is not known when its row begins, in ns
        since the epoch. Never raises for any bytes.
        """
        records = np.ascontiguousarray(records)
        starts = wall_start_ns.astype(np.int64, copy=False)
        words = records.view("<u8").reshape(len(records), _WORDS)
        key, nat = records["tuple"], records["nat"]
        protocol = key["protocol"].astype(np.uint64) << _PROTOCOL_SHIFT
        dnat = (nat & Nat.DNAT) != 0
        here = dnat & ((records["role"] == Role.FORWARDED) | _loopback(records))
        dialled = key["dst_port"].astype(np.uint64) | protocol | (here.astype(np.uint64) << _HERE_SHIFT)
        backend_port = records["backend_port"].astype(np.uint64) | protocol
        nothing = np.zeros(len(records), dtype=np.uint64)

        source = self._answer(words[:, _SRC : _SRC + 2], nothing, starts, self._who)
        service = self._answer(words[:, _DST : _DST + 2], dialled, starts, self._service)
        backend = self._answer(words[:, _BACKEND : _BACKEND + 2], backend_port, starts, self._who)
        unheard = self._by_cgroup(records, source)
        # Without a translation it is not known where the connection went (tracer.store.columns has it null too).
        unknown = (nat == Nat.UNKNOWN) & (records["role"] != Role.SERVER)
        backend.codes[unknown] = len(backend.found)
        backend.found.append(None)

        columns = {"src_namespace": source.column(0), "src_pod": source.column(1), "src_workload": source.column(2)}
        columns |= {
            name: service.column(i) for i, name in enumerate(("dst_namespace", "dst_service", "dst_service_port"))
        }
        fields = ("backend_pod", "backend_workload", "backend_node", "backend_zone")
        columns |= {name: backend.column(i) for i, name in enumerate(fields, start=1)}
        open_ends = service.rows(_not_known) | backend.rows(_not_known)
        ambiguous = source.rows(_ambiguous) | service.rows(_ambiguous) | backend.rows(_ambiguous)
        return Names(columns, (dnat & open_ends) | unheard, ambiguous, service.keys(), backend.keys())

    def meet(self, records: np.ndarray) -> None:
        """Notes whose the processes of these records are: a cgroup, or a process, may be gone when rows are named."""
        if self._cgroups is None:
            return
        rows = np.flatnonzero(_of_processes(records))
        of_cgroup, number = np.unique(records["cgroup_id"][rows], return_inverse=True)
        by_process = np.array([self._cgroups.by_process(each) for each in of_cgroup.tolist()], dtype=bool)
        for cgroup_id in of_cgroup[~by_process].tolist():
            self._cgroups.path(cgroup_id)
        for pid in np.unique(records["pid"][rows[by_process[number]]]).tolist():
            self._cgroups.note(pid)

    def _who(self, address: bytes, rest: int) -> Timeline[Who]:
        return self._book.whose(address, rest >> 16, rest & 0xFFFF)

    def _service(self, address: bytes, rest: int) -> Timeline[ServiceName]:
        return self._book.service(address, rest >> 16 & 0xFF, rest & 0xFFFF, bool(rest >> 24))

    def _answer(
        self,
        address: npt.NDArray[np.uint64],
        other: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int64],
        ask: Callable[[bytes, int], Timeline[Any]],
    ) -> _Answers:
        """The answers for n keys of an address (n, 2) and another word (n,), each at its time."""
        keys = np.column_stack((address, other))
        rows, number = distinct(keys)
        raw = keys[rows, :2].tobytes()
        timelines = [ask(raw[16 * i : 16 * i + 16], rest) for i, rest in enumerate(keys[rows, 2].tolist())]
        return _spread(timelines, number, starts)

    def _by_cgroup(self, records: np.ndarray, source: _Answers) -> Mask:
        """Puts in the pods that the clients' cgroups tell, which is certain where an address is not.

        Returns the rows of pods that were not heard of (or are gone for long): whoever has the address is not them.
        """
        unheard = np.zeros(len(records), dtype=bool)
        rows = np.flatnonzero(_of_processes(records))
        if self._cgroups is None or not len(rows):
            return unheard
        of_cgroup, number = np.unique(records["cgroup_id"][rows], return_inverse=True)
        by_process = np.array([self._cgroups.by_process(int(each)) for each in of_cgroup], dtype=bool)
        told = [None if v1 else self._cgroups.of_cgroup(int(c)) for c, v1 in zip(of_cgroup, by_process, strict=True)]
        self._put(told, rows, number, source, unheard)
        rows = rows[by_process[number]]
        if len(rows):
            begun = records["started"][rows]
            begun = np.where(begun != 0, begun, records["ts"][rows] - records["duration_ns"][rows])
            pids, number = np.unique(records["pid"][rows], return_inverse=True)
            earliest = np.full(len(pids), np.iinfo(np.uint64).max, dtype=np.uint64)
            np.minimum.at(earliest, number, begun)
            told = [self._cgroups.of_process(int(p), int(ns)) for p, ns in zip(pids, earliest, strict=True)]
            self._put(told, rows, number, source, unheard)
        return unheard

    def _put(
        self,
        told: Sequence[Identity | None],
        rows: npt.NDArray[np.intp],
        number: npt.NDArray[np.intp],
        source: _Answers,
        unheard: Mask,
    ) -> None:
        """``told[number]`` are the identities of `rows`: their answers replace those by address."""
        code_of = np.full(len(told), -1, dtype=np.int32)
        missing = np.zeros(len(told), dtype=bool)
        for i, identity in enumerate(told):
            if identity is not None:
                pod = self._book.pod(identity.uid, identity.container)
                code_of[i], missing[i] = len(source.found), pod is None
                source.found.append(None if pod is None else self._book.describe(pod))
        codes = code_of[number]
        source.codes[rows[codes >= 0]] = codes[codes >= 0]
        unheard[rows[missing[number]]] = True


def _spread(timelines: list[Timeline[Any]], number: npt.NDArray[np.intp], starts: npt.NDArray[np.int64]) -> _Answers:
    """Each row's answer: ``timelines[number]`` at `starts`. Only timelines that change within the batch cost a look."""
    if not timelines:
        return _Answers([], np.zeros(0, dtype=np.int32))
    first, last = int(starts.min()), int(starts.max())
    found: list[Any] = []
    base = np.empty(len(timelines), dtype=np.int32)
    changing: list[tuple[int, Sequence[int]]] = []
    for i, (breaks, answers) in enumerate(timelines):
        base[i] = len(found)
        if not breaks or breaks[-1] <= first:
            found.append(answers[-1])
            continue
        begin, end = bisect_right(breaks, first), bisect_right(breaks, last)
        found.extend(answers[begin : end + 1])
        if end > begin:
            changing.append((i, breaks[begin:end]))
    codes = base[number]
    if changing:
        table = np.full((len(timelines), max(len(breaks) for _, breaks in changing)), FOREVER, dtype=np.int64)
        for i, breaks in changing:
            table[i, : len(breaks)] = breaks
        for column in table.T:
            codes += column[number] <= starts
    return _Answers(found, codes)


def _of_processes(records: np.ndarray) -> Mask:
    """Rows whose cgroup and process are the client's."""
    known = (records["flags"] & Flag.PROCESS) != 0
    return np.asarray(known & (records["role"] != Role.SERVER) & (records["cgroup_id"] != 0))


def _loopback(records: np.ndarray) -> Mask:
    """Rows dialled to 127.0.0.0/8 (v4-mapped) or ::1."""
    raw = records["tuple"]["dst"].copy().view(np.uint8).reshape(len(records), 16)
    v4 = (raw[:, :13] == _ALL_LOOPBACK_V4).all(axis=1)
    return np.asarray(v4 | (raw == _LOOPBACK_V6).all(axis=1))


def _not_known(answer: Who | ServiceName | None) -> bool:
    return answer is None or answer.ambiguous


def _ambiguous(answer: Who | ServiceName | None) -> bool:
    return answer is not None and answer.ambiguous
